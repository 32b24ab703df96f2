"""What every engine shows to its host, whatever stands behind it.

Owns: the port's methods, checks before work, requests to the tokenizer, the spreading of reports to whom
they concern. Must not: know how commands reach the loop (a socket, or a call).
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any, assert_never

from fieldmesh.core.errors import EngineLost, EngineNotReady, GenerationNotFound, QueueFull
from fieldmesh.core.model import Embeddings, EngineState, Load, Prompt
from fieldmesh.engine.checks import check_job, check_prompt, check_texts
from fieldmesh.engine.exchange import Exchange
from fieldmesh.engine.frames import (
    Accepted,
    Cancel,
    Command,
    Done,
    Embed,
    Embedded,
    Exported,
    Failed,
    Imported,
    Loading,
    Ready,
    Report,
    Statistics,
    Tokenize,
    Tokenized,
    Tokens,
    rebuilt,
)
from fieldmesh.engine.loads import LoadWatch
from fieldmesh.engine.port import EngineInfo, Job, JobEvent
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import SequenceState
from fieldmesh.engine.streams import Streams
from fieldmesh.engine.tally import EngineTally

QUESTIONS_MAX = 64


class EngineFront(ABC):
    """The host's side of one engine. All methods belong to one event loop.

    ``loaded_share`` says how far loading is, 0 to 1. ``fingerprint_hint`` may be set before ``start`` where
    the file's SHA-256 is known: it then need not be read twice.
    """

    pid: int | None = None

    def __init__(self, settings: EngineSettings) -> None:
        settings.validate()
        self.settings = settings
        self.info: EngineInfo | None = None
        self.last_loss = ""
        self.steps = 0
        self.tally = EngineTally()
        self.loaded_share = 0.0
        self.fingerprint_hint = ""
        self._watch = LoadWatch(settings)
        self._questions: dict[int, asyncio.Future[Report]] = {}
        self._exchange = Exchange(
            self._asked,
            bytes_max=settings.state_bytes_max,
            running=lambda: self._watch.load.running,
        )
        self._streams = Streams(
            self._send,
            jobs_max=settings.slots + settings.queue_max,
            stream_tokens_max=settings.stream_tokens_max,
            slow_reader_timeout_s=settings.slow_reader_timeout_s,
        )

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hand a command to the loop; never blocks. Dropped where there is none."""

    @abstractmethod
    def _now(self) -> float:
        """The loop's clock."""

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Load the model; returns when jobs are taken."""

    @abstractmethod
    async def close(self) -> None:
        """End and free everything; running jobs end with EngineLost."""

    @property
    def state(self) -> EngineState:
        return self._watch.state

    async def submit(self, job: Job) -> AsyncIterator[JobEvent]:
        """Run one job; see the port."""
        check_job(job)
        self._demand_ready()
        deadline = None if job.deadline_s is None else self._now() + job.deadline_s
        async with contextlib.aclosing(self._streams.run(job, deadline)) as events:
            async for event in events:
                yield event

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt (messages pass through the chat template first)."""
        check_prompt(prompt)
        answer: Tokenized = await self._asked(lambda key: Tokenize(key, prompt))
        return answer.token_ids

    async def embed(self, texts: tuple[str, ...], *, deadline_s: float | None = None) -> Embeddings:
        """A vector of length 1 for each text, pooled as the model was made for."""
        check_texts(texts)
        deadline = None if deadline_s is None else self._now() + deadline_s
        answer: Embedded = await self._asked(lambda key: Embed(key, texts, deadline))
        return Embeddings(vectors=answer.vectors, prompt_tokens=answer.prompt_tokens)

    async def _asked(self, command: Callable[[int], Command]) -> Any:
        """The report that answers a command. A caller who leaves cancels it."""
        self._demand_ready()
        if len(self._questions) >= QUESTIONS_MAX:
            raise QueueFull("too many texts wait for the engine; ask again later", retry_after_s=1.0)
        key = self._streams.next_key()
        future: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._questions[key] = future
        try:
            self._send(command(key))
            return await future
        except asyncio.CancelledError:
            self._send(Cancel(key))
            raise
        finally:
            del self._questions[key]

    async def export(self, generation_id: str) -> SequenceState:
        """The state of a running generation; see the port."""
        self._demand_ready()
        generation = self._streams.key_of(generation_id)
        if generation is None:
            raise GenerationNotFound(f"no generation {generation_id!r} runs here", field="generation_id")
        return await self._exchange.export(generation)

    async def import_(self, state: SequenceState) -> None:
        """Keep a state; see the port."""
        self._demand_ready()
        await self._exchange.import_(state)

    def load(self) -> Load:
        """The latest statistics; never blocks."""
        return self._watch.load

    async def wait_load_changed(self) -> Load:
        """Return when state, queue or pressure differ from what the last call returned."""
        return await self._watch.wait_changed()

    def _demand_ready(self) -> None:
        if self.state is EngineState.READY:
            return
        if self.state is EngineState.FAILED:
            raise EngineNotReady(f"the engine was given up: {self.last_loss}")
        raise EngineNotReady(f"the engine is {self.state.value}; ask again shortly", retry_after_s=0.5)

    def _take(self, report: Report) -> None:
        """Bring one report to whom it concerns. Raises the error of a failed load (key 0)."""
        match report:
            case Tokens():
                self._streams.take(report)
            case Accepted():
                self.tally.accepted(report)
                self._streams.take(report)
            case Done():
                self.tally.done(report)
                self._streams.take(report)
            case Failed() if report.key == 0:
                raise rebuilt(report)
            case Failed():
                if future := self._questions.get(report.key):
                    _fail(future, rebuilt(report))
                self._streams.take(report)
            case Tokenized() | Embedded() | Exported() | Imported():
                if (future := self._questions.get(report.key)) and not future.done():
                    future.set_result(report)
            case Statistics():
                self.steps = report.steps
                if report.timing is not None:
                    self.tally.stepped(report.timing)
                self._watch.set_statistics(report.load)
            case Ready():
                self.info = report.info
                self._watch.set_state(EngineState.READY)
            case Loading():
                self.loaded_share = report.share
            case _:
                assert_never(report)

    def _lose(self, state: EngineState, reason: str) -> None:
        """The loop is gone: everything it worked on ends with EngineLost."""
        self.last_loss, self.loaded_share = reason, 0.0
        self._watch.set_state(state)
        self._streams.fail_all(lambda: EngineLost(f"{reason}; the generation can be asked for again"))
        for future in self._questions.values():
            _fail(future, EngineLost(reason))


def _fail(future: asyncio.Future[Report], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
