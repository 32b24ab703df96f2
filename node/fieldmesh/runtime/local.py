"""Runs requests on this node's own engines.

Owns: the pace at which tokens leave (the first at once, then every 25 ms
or 8 tokens: a message costs some 100 µs of CPU at every hop), and ending a run by its request id. Must not:
choose nodes, or know gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import assert_never

from fieldmesh.core.dispatch import Resumption
from fieldmesh.core.model import Ask, Chunk, Completion, Embeddings, FinishReason, Prompt, RequestId, Usage
from fieldmesh.core.tools import merged
from fieldmesh.core.tracing import Trace
from fieldmesh.engine.port import Job, JobEvent, Started
from fieldmesh.runtime.choices import choice_samplings, together
from fieldmesh.runtime.models import Models
from fieldmesh.runtime.moving import Moving, job_id
from fieldmesh.runtime.tracing import EngineSteps

FLUSH_TOKENS = 8
FLUSH_INTERVAL_S = 0.025


class LocalRuns:
    """The requests that run on this node's engines, whoever asked."""

    def __init__(self, models: Models, moving: Moving) -> None:
        self.models = models
        self._moving = moving
        self._aborts: dict[RequestId, asyncio.Future[None]] = {}

    async def run(
        self,
        ask: Ask,
        *,
        profile: str,
        generation_id: str,
        epoch: int,
        deadline_s: float | None,
        trace: Trace,
        resumption: Resumption | None = None,
    ) -> AsyncGenerator[JobEvent, None]:
        """One Started, chunks, one Completion. Closing the generator stops the engine within a step. With a
        ``resumption`` the chunks go on behind its tokens.

        Raises what ``Engine.submit`` raises, ProfileNotFound and EngineNotReady.
        """
        loop = asyncio.get_running_loop()
        due = None if deadline_s is None else loop.time() + deadline_s
        sampling = ask.sampling.over(self.models.find(profile).profile.sampling)
        aborted: asyncio.Future[None] = loop.create_future()
        self._aborts[ask.request_id] = aborted
        steps, failure = EngineSteps(trace, loop.time()), None
        try:
            async with self.models.using(profile) as engine:
                if resumption is not None and resumption.node:
                    await self._moving.fetch(engine, profile, generation_id, resumption)
                jobs = [
                    Job(
                        generation_id=job_id(generation_id, epoch, index),
                        prompt=ask.prompt,
                        sampling=choice,
                        epoch=epoch,
                        priority=ask.priority,
                        tenant=ask.tenant,
                        deadline_s=None if due is None else due - loop.time(),
                        resume_token_ids=resumption.token_ids if resumption is not None else (),
                    )
                    for index, choice in enumerate(choice_samplings(sampling))
                ]
                steps.submitted()
                runs = [paced(engine.submit(job), aborted) for job in jobs]
                async with aclosing(runs[0] if len(runs) == 1 else together(runs)) as events:
                    async for event in events:
                        steps.saw(event)
                        yield event
        except BaseException as error:
            failure = error
            raise
        finally:
            steps.ended(failure)
            if self._aborts.get(ask.request_id) is aborted:
                del self._aborts[ask.request_id]

    def abort(self, request_id: RequestId) -> bool:
        """End the run of this request with finish reason ABORT; False where none runs here."""
        aborted = self._aborts.get(request_id)
        if aborted is None or aborted.done():
            return False
        aborted.set_result(None)
        return True

    async def tokenize(self, profile: str, prompt: Prompt) -> tuple[tuple[int, ...], str]:
        """Token ids, and the model whose they are. Raises ProfileNotFound, EngineNotReady, EngineLost."""
        async with self.models.using(profile) as engine:
            return await engine.tokenize(prompt), engine.settings.model_name

    async def embed(self, profile: str, texts: tuple[str, ...], deadline_s: float | None) -> Embeddings:
        """Vectors of texts. Raises what ``Engine.embed`` raises, ProfileNotFound and EngineNotReady."""
        async with self.models.using(profile) as engine:
            return await engine.embed(texts, deadline_s=deadline_s)


async def paced(
    events: AsyncIterator[JobEvent], aborted: asyncio.Future[None]
) -> AsyncGenerator[JobEvent, None]:
    """``events`` with chunks joined: the first passes at once, later ones wait for company, but not long.

    When ``aborted`` is done, ends with a Completion of reason ABORT.
    """
    loop = asyncio.get_running_loop()
    pending: Chunk | None = None
    flush_at = loop.time()
    prompt_tokens = completion_tokens = 0
    coming: asyncio.Task[JobEvent] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(anext(events))  # type: ignore[arg-type]
            timeout_s = None if pending is None else max(0.0, flush_at - loop.time())
            await asyncio.wait((coming, aborted), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            event: JobEvent | None = None
            if coming.done():
                if pending is not None and coming.exception() is not None:
                    yield pending  # what was made before the end is the reader's
                    pending = None
                event, coming = coming.result(), None
            if isinstance(event, Chunk):
                completion_tokens = event.next_token_index
                pending = event if pending is None else _joined(pending, event)
            due = len(pending.token_ids) >= FLUSH_TOKENS or loop.time() >= flush_at if pending else False
            if pending is not None and (due or isinstance(event, Completion) or aborted.done()):
                yield pending
                pending, flush_at = None, loop.time() + FLUSH_INTERVAL_S
            match event:
                case None | Chunk():
                    pass
                case Started():
                    prompt_tokens = event.prompt_tokens
                    yield event
                case Completion():
                    yield event
                    return
                case _:
                    assert_never(event)
            if aborted.done():
                usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
                yield Completion(finish_reason=FinishReason.ABORT, usage=usage)
                return
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait((coming,))
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return replace(
        first,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        reasoning=first.reasoning + second.reasoning,
        tool_calls=merged(first.tool_calls + second.tool_calls),
    )
