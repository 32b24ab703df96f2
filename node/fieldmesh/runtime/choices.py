"""Several completions of one prompt, as one run.

Owns: their seeds, the joining of their streams, the sum of their usage. Must not: know engines. The engine
computes a prompt that several jobs share once: the others wait for it and go on from a copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fieldmesh.core.model import Choice, Chunk, Completion, Sampling
from fieldmesh.engine.port import JobEvent

SEEDS = 1 << 32


def choice_samplings(sampling: Sampling) -> list[Sampling]:
    """The sampling of each completion; seeds count up from the one that was given."""
    seed, n = sampling.seed, sampling.n
    return [
        replace(sampling, n=1, seed=None if seed is None else (seed + index) % SEEDS) for index in range(n)
    ]


async def together(runs: Sequence[AsyncGenerator[JobEvent, None]]) -> AsyncGenerator[JobEvent, None]:
    """One Started when all have started, then their chunks as they come, each with its index, then one
    Completion. The first error ends all; closing the generator ends all.
    """
    queue: asyncio.Queue[tuple[int, JobEvent] | BaseException] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_pump(run, index, queue)) for index, run in enumerate(runs)]
    waiting, early = len(runs), list[Chunk]()
    ends: dict[int, Completion] = {}
    try:
        while len(ends) < len(runs):
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            index, event = found
            if isinstance(event, Completion):
                ends[index] = event
            elif isinstance(event, Chunk):
                chunk = replace(event, index=index)
                if waiting:
                    early.append(chunk)  # what one makes until the last has started
                else:
                    yield chunk
            else:
                waiting -= 1
                if not waiting:
                    yield event
                    for chunk in early:
                        yield chunk
        yield _summed([ends[index] for index in range(len(runs))])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _pump(
    run: AsyncGenerator[JobEvent, None],
    index: int,
    queue: asyncio.Queue[tuple[int, JobEvent] | BaseException],
) -> None:
    try:
        async with aclosing(run):
            async for event in run:
                await queue.put((index, event))
    except Exception as error:  # noqa: BLE001 - raised where the queue is read
        await queue.put(error)


def _summed(ends: Sequence[Completion]) -> Completion:
    first = ends[0]
    choices = tuple(
        Choice(
            index=index,
            finish_reason=end.finish_reason,
            completion_tokens=end.usage.completion_tokens,
            matched_stop=end.matched_stop,
            seed=end.seed,
        )
        for index, end in enumerate(ends)
    )
    tokens = sum(choice.completion_tokens for choice in choices)
    reasoning = sum(end.usage.reasoning_tokens for end in ends)
    usage = replace(first.usage, completion_tokens=tokens, reasoning_tokens=reasoning)
    return replace(first, usage=usage, choices=choices)
