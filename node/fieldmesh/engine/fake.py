"""An engine without a model: the real loop and the real scheduler over a cost model, in any clock.

Owns: FakeModel (tokens as a function of prompt, seed and position) and FakeEngine behind the port. It is
part of the product: simulations, protocol tests and ``tests/contract`` hold it to the port's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

from fieldmesh.core.errors import Internal
from fieldmesh.core.model import EngineState, Logprobs, Sampling, TokenLogprob
from fieldmesh.core.steps import Place, Slice
from fieldmesh.engine.cost import CostModel, prompt_digest, token_at
from fieldmesh.engine.embeddings import Pooling
from fieldmesh.engine.frames import Command, Ready
from fieldmesh.engine.front import EngineFront
from fieldmesh.engine.loop import Drawn, EngineLoop, Walk
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import fingerprint_of

_WORDS = tuple(
    word
    for line in (
        "field mesh node edge river stone light cloud seed root leaf wind salt iron glass paper one two",
        "three many few here there goes comes holds breaks mends waits runs and or but then so as if of",
        "in on at by to from é ü ñ 中 文 🙂 🌾",
    )
    for word in line.split(" ")
)
_BYTES = 256
_BOS, _EOS = _BYTES, _BYTES + 1
_FIRST_WORD = _BYTES + 2
FAKE_VOCABULARY_TOKENS = _FIRST_WORD + len(_WORDS)
FAKE_STATE_BYTES = 64
FAKE_FACTS: dict[str, object] = {"fake": True}
_END_EVERY_TOKENS = 200
"""On average a fake answer ends by itself after this many tokens."""


class FakeModel:
    """A vocabulary of bytes and words. An answer's tokens depend on prompt, seed and index alone."""

    vocabulary_tokens = FAKE_VOCABULARY_TOKENS
    end_tokens = frozenset({_EOS})
    cuttable = True
    pooling = Pooling.MEAN
    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    bos = ""
    eos = ""

    def tokenize(self, text: str, *, add_bos: bool) -> tuple[int, ...]:
        """One token a byte."""
        return (*((_BOS,) if add_bos else ()), *text.encode("utf-8", errors="replace"))

    def piece(self, token: int) -> bytes:
        """A byte, or a word with a space before it."""
        if token < _BYTES:
            return bytes([token])
        return f" {_WORDS[token - _FIRST_WORD]}".encode() if token >= _FIRST_WORD else b""

    def embed(self, slices: Sequence[Slice]) -> list[tuple[float, ...]]:
        """A token's row depends on the token alone."""
        return [
            tuple(byte - 127.5 for byte in prompt_digest((token,)))
            for piece in slices
            for token in piece.token_ids
        ]

    def place(self, places: Sequence[Place], fetched: memoryview | None = None) -> list[int]:
        """Nothing is computed, so nothing needs its place."""
        return []

    def cut(self, slot: int, keep_tokens: int) -> bool:
        """Nothing is computed, so nothing has to go."""
        return True

    def state_bytes(self, slot: int) -> int:
        """A state says nothing, and takes little room."""
        return FAKE_STATE_BYTES

    def save_state(self, slot: int, into: memoryview) -> None:
        """There is nothing to say."""

    def run(self, slices: Sequence[Slice]) -> Mapping[str, int]:
        """Every slice that samples, in order."""
        return {s.id: row for row, s in enumerate(s for s in slices if s.sample)}

    def sampler(
        self,
        sampling: Sampling,
        seed: int,
        resumed: Sequence[int],
        prompt: Sequence[int],
        walk: Walk | None = None,
    ) -> FakeSampler:
        """What draws one generation's tokens."""
        return FakeSampler(sampling, prompt_digest(prompt, seed if sampling.temperature > 0 else 0))


class FakeSampler:
    """Draws words, now and then the end."""

    def __init__(self, sampling: Sampling, digest: bytes) -> None:
        self._sampling = sampling
        self._digest = digest

    def draw(self, row: int, index: int, forced: int | None = None) -> Drawn:
        """A word, or the end of the answer where that is allowed."""
        token = self._token(index) if forced is None else forced
        top = self._sampling.logprobs
        if top is None:
            return Drawn(token)
        likeliest = range(_FIRST_WORD, _FIRST_WORD + top)
        return Drawn(token, logprobs=Logprobs(drawn=_equal(token), top=tuple(map(_equal, likeliest))))

    def _token(self, index: int) -> int:
        may_end = not self._sampling.ignore_eos and index >= self._sampling.min_tokens
        if may_end and token_at(self._digest, index, _END_EVERY_TOKENS) == 0:
            return _EOS
        return _FIRST_WORD + token_at(self._digest, index, len(_WORDS))


def _equal(token: int) -> TokenLogprob:
    """Every word is as likely as the others."""
    return TokenLogprob(token_id=token, piece=FakeModel().piece(token), logprob=-math.log(len(_WORDS)))


class Clock(Protocol):
    """Time as a fake engine sees it."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return when ``now`` has advanced by ``seconds``."""
        ...


class LoopClock:
    """The event loop's own time."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class FakeEngine(EngineFront):
    """An engine that computes nothing. ``lose`` and ``recover`` play the loss of its process."""

    def __init__(
        self, settings: EngineSettings, *, cost: CostModel | None = None, clock: Clock | None = None
    ) -> None:
        super().__init__(settings)
        self._cost = cost or CostModel()
        self._clock = clock or LoopClock()
        self._commands: deque[Command] = deque()  # bounded by Streams: a few for each of its jobs
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        """Ready at once."""
        if self._task is not None:
            raise Internal("an engine is started once")
        self.recover()
        assert self.info is not None
        return self.info

    def recover(self) -> None:
        """Come back after ``lose``: an empty engine, ready."""
        self.tally.restarts += self._task is not None
        seeds = count(1)
        model = FakeModel()
        settings = replace(self.settings, state_folder="")  # what says nothing need not reach a disk
        loop = EngineLoop(settings, model, new_seed=lambda: next(seeds))
        if self.settings.state_bytes_max:
            loop.keep_states(model, FAKE_FACTS, self._exchange.fd, wake=self._arrived.set, inline=True)
        self._commands.clear()
        self._take(Ready(self._describe()))
        self._take(loop.statistics())
        self._task = asyncio.get_running_loop().create_task(self._serve(loop), name="fake-engine")

    def lose(self, state: EngineState = EngineState.LOST) -> None:
        """Drop everything, as if the process had been killed."""
        if self._task is not None:
            self._task.cancel()
        self._lose(state, "the engine's process ended (signal 9)")

    async def close(self) -> None:
        """End; running jobs end with EngineLost."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._lose(EngineState.LOST, "the engine was closed")
        self._exchange.close()

    def _send(self, command: Command) -> None:
        if self.state is EngineState.READY:
            self._commands.append(command)
            self._arrived.set()

    def _now(self) -> float:
        return self._clock.now()

    async def _serve(self, loop: EngineLoop) -> None:
        busy = False
        while True:
            if not busy:
                await self._wait_for_command(loop.deadline)
            self._arrived.clear()
            while self._commands:
                for report in loop.handle(self._commands.popleft(), self._clock.now()):
                    self._take(report)
            plan, reports = loop.plan(self._clock.now())
            for report in reports:
                self._take(report)
            if busy := bool(plan.slices):
                await self._clock.sleep(self._cost.step_s(plan))
                for report in loop.run(plan, self._clock.now):
                    self._take(report)
            if loop.embeddings:
                await self._clock.sleep(self._cost.step_base_s)
                for report in loop.embed(self._clock.now(), beside_streams=busy):
                    self._take(report)
                busy = busy or bool(loop.embeddings)

    async def _wait_for_command(self, deadline: float | None) -> None:
        """Return when a command is there or ``deadline`` has come."""
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._arrived.wait())]
        if deadline is not None:
            waits.append(asyncio.ensure_future(self._clock.sleep(max(0.0, deadline - self._clock.now()))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _describe(self) -> EngineInfo:
        return EngineInfo(
            model=self.settings.model_name or "fake",
            fingerprint=prompt_digest((), 0).hex() * 2,
            architecture="fake",
            parameters=0,
            context_tokens=self.settings.context_tokens,
            slots=self.settings.slots,
            vocabulary_tokens=FAKE_VOCABULARY_TOKENS,
            threads=self.settings.threads,
            state_fingerprint=fingerprint_of(FAKE_FACTS) if self.settings.state_bytes_max else "",
        )
