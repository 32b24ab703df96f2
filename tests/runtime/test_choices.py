"""Goal: several completions behave as one run: one start, one end, one sum. Method: scripted streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fieldmesh.core.errors import EngineLost, FieldmeshError
from fieldmesh.core.model import Chunk, Completion, FinishReason, Sampling, Usage
from fieldmesh.engine.port import JobEvent, Started
from fieldmesh.runtime.choices import choice_samplings, together

Script = list[JobEvent | FieldmeshError | asyncio.Event]


def chunk(index: int, *token_ids: int) -> Chunk:
    return Chunk(generation_id="g", epoch=0, first_token_index=index, token_ids=token_ids, text="x")


def end(tokens: int, seed: int = 0, reason: FinishReason = FinishReason.STOP) -> Completion:
    usage = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=tokens)
    return Completion(finish_reason=reason, usage=usage, seed=seed)


class Run:
    """A stream that says what it was told to, waiting where it meets an event."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.closed = False

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        try:
            for entry in self._script:
                if isinstance(entry, FieldmeshError):
                    raise entry
                if isinstance(entry, asyncio.Event):
                    await entry.wait()
                else:
                    yield entry
        finally:
            self.closed = True


async def joined(*runs: Run) -> list[JobEvent]:
    return [event async for event in together([run.events() for run in runs])]


async def test_each_chunk_has_the_index_of_its_completion_and_the_usage_is_summed() -> None:
    first = Run([Started(prompt_tokens=7), chunk(0, 1), chunk(1, 2, 3), end(3, seed=5)])
    second = Run([Started(prompt_tokens=7), chunk(0, 9), end(1, seed=6, reason=FinishReason.LENGTH)])
    events = await joined(first, second)
    assert events[0] == Started(prompt_tokens=7)
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert [c.token_ids for c in chunks if c.index == 0] == [(1,), (2, 3)]
    assert [c.token_ids for c in chunks if c.index == 1] == [(9,)]
    done = events[-1]
    assert isinstance(done, Completion)
    assert done.usage == Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=4)
    assert [(c.index, c.finish_reason, c.completion_tokens, c.seed) for c in done.choices] == [
        (0, FinishReason.STOP, 3, 5),
        (1, FinishReason.LENGTH, 1, 6),
    ]


async def test_nothing_is_told_before_all_have_started() -> None:
    """What was delivered could not be taken back where the last one finds the queue full."""
    refused = EngineLost("gone")
    late = asyncio.Event()
    first = Run([Started(prompt_tokens=7), chunk(0, 1), late, end(1)])
    second = Run([refused])
    seen: list[JobEvent] = []
    with pytest.raises(EngineLost):
        async for event in together([first.events(), second.events()]):
            seen.append(event)  # noqa: PERF401
    assert seen == []
    assert first.closed


async def test_an_error_of_one_ends_all() -> None:
    never = asyncio.Event()
    first = Run([Started(prompt_tokens=7), chunk(0, 1), never])
    second = Run([Started(prompt_tokens=7), chunk(0, 1), EngineLost("gone")])
    with pytest.raises(EngineLost):
        await joined(first, second)
    assert first.closed and second.closed


async def test_closing_ends_all() -> None:
    never = asyncio.Event()
    runs = [Run([Started(prompt_tokens=7), chunk(0, 1), never]) for _ in range(3)]
    stream = together([run.events() for run in runs])
    await anext(stream)
    await stream.aclose()
    assert all(run.closed for run in runs)


def test_seeds_count_up_and_wrap() -> None:
    assert [s.seed for s in choice_samplings(Sampling(n=3, seed=2**32 - 2))] == [2**32 - 2, 2**32 - 1, 0]
    assert [s.seed for s in choice_samplings(Sampling(n=2))] == [None, None]
    assert all(s.n == 1 for s in choice_samplings(Sampling(n=4)))
