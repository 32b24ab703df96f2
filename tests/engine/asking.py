"""Helpers for tests that ask an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from fieldmesh.core.model import Chunk, Completion, Load, Message, Prompt, Sampling
from fieldmesh.engine.port import Engine, Job, JobEvent, Started

GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)


@dataclass(slots=True)
class Answer:
    """All that a job yielded."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    started: Started | None = None
    completion: Completion | None = None


def job(name: str, prompt: str = "the field mesh", sampling: Sampling = GREEDY, **more: object) -> Job:
    """A job that goes on from a text."""
    return Job(generation_id=name, prompt=Prompt(text=prompt), sampling=sampling, **more)  # type: ignore[arg-type]


def chat(name: str, content: str, sampling: Sampling = GREEDY, role: str = "user") -> Job:
    """A job that answers one message."""
    messages = (Message(role=role, content=content),)
    return Job(generation_id=name, prompt=Prompt(messages=messages), sampling=sampling)


async def collect(events: AsyncIterator[JobEvent]) -> Answer:
    """Read a job to its end; checks the order of what it yields."""
    answer = Answer()
    async for event in events:
        assert answer.completion is None, "something came after the completion"
        match event:
            case Started():
                assert answer.started is None and not answer.chunks
                answer.started = event
            case Chunk():
                assert answer.started is not None
                if answer.chunks:
                    assert event.first_token_index == answer.chunks[-1].next_token_index
                answer.chunks.append(event)
                answer.token_ids.extend(event.token_ids)
                answer.text += event.text
            case Completion():
                answer.completion = event
    assert answer.completion is not None
    return answer


async def drain(events: AsyncIterator[JobEvent]) -> list[JobEvent]:
    """The rest of a job that was begun elsewhere."""
    return [event async for event in events]


async def ask(engine: Engine, one: Job) -> Answer:
    """Run one job to its end."""
    return await collect(engine.submit(one))


async def wait_load(engine: Engine, condition: Callable[[Load], bool], timeout_s: float = 30.0) -> Load:
    """Return once the engine's load satisfies ``condition``."""
    async with asyncio.timeout(timeout_s):
        while not condition(engine.load()):
            await engine.wait_load_changed()
    return engine.load()
