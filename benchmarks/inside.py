"""What engine processes do by themselves, without a network: drafts, moves, a start, a step's overhead.

Owns: the measures of benchmarks.engine that need no other server. Must not: run on its own.
"""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TypeVar

from benchmarks.report import Row
from fieldmesh.core.model import Chunk, Constraint, ConstraintKind, Message, Prompt, Sampling
from fieldmesh.core.steps import Slice
from fieldmesh.engine.frames import Submit, encode
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.loop import EngineLoop
from fieldmesh.engine.port import Job, JobEvent
from fieldmesh.engine.settings import EngineSettings

Moved = TypeVar("Moved")

SEQUENCES = 8
MOVED_TOKENS = 1000
STEPS_WATCHED = 40
STATE_BYTES_MAX = 1 << 28
EDITED = (
    "The ferry leaves the north pier at nine in the morning and reaches the island shortly before noon. "
    "Passengers should arrive half an hour early, because the crew counts everyone twice before the gate is "
    "closed. Bicycles travel free of charge, dogs need a ticket of their own, and cars must be booked a week "
    "ahead. On the island a small bus waits beside the lighthouse. It stops at the market, at the old mill "
    "and at the beach, where swimming is allowed from May until the end of September. The last ferry returns "
    "at six in the evening; whoever misses it can stay at the guest house above the harbour."
)
CHANGES = {"nine": "eight", "noon": "eleven", "week": "month", "May": "June", "six": "five"}
ASKED = f"Give this text back with every time of it changed, and nothing else:\n\n{EDITED}"


@dataclass(slots=True)
class Seen:
    """One answer as the host saw it. Times are seconds since it was asked for."""

    token_ids: list[int]
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The pace after the first token."""
        return (len(self.token_ids) - 1) / (self.last_s - self.first_s)


async def watched(events: AsyncIterator[JobEvent]) -> Seen:
    """Read an answer to its end."""
    seen, begun = Seen([]), time.perf_counter()
    async for event in events:
        if isinstance(event, Chunk) and event.token_ids:
            seen.last_s = time.perf_counter() - begun
            seen.first_s = seen.first_s or seen.last_s
            seen.token_ids += event.token_ids
    return seen


@asynccontextmanager
async def two_engines(first: EngineSettings, second: EngineSettings) -> AsyncIterator[list[EngineProcess]]:
    """Two started engines."""
    engines = [EngineProcess(first), EngineProcess(second)]
    try:
        for engine in engines:
            await engine.start()
        yield engines
    finally:
        for engine in engines:
            await engine.close()


def settings_of(model: Path, threads: int, **more: object) -> EngineSettings:
    return EngineSettings(model_path=str(model), threads=threads, **more)  # type: ignore[arg-type]


async def prompt_lookup(model: Path, rounds: int, threads: int) -> list[Row]:
    """An edited text, and a text that repeats nothing, with drafts and without: the same tokens, other paces.

    The edited answer is held to the text with five words open (a constraint, on both sides), because a model
    of 135 M parameters does not copy a paragraph of its own accord.
    """
    changes = "|".join(CHANGES)
    allowed = re.sub(rf"\b({changes})\b", f"({changes}|{'|'.join(CHANGES.values())})", re.escape(EDITED))
    held = Constraint(kind=ConstraintKind.REGEX, source=allowed.replace("\\ ", " "))
    asks = {
        "prompt_lookup_speedup": (
            Prompt(messages=(Message(role="user", content=ASKED),)),
            Sampling(temperature=0.0, max_tokens=128, constraint=held),
            1.3,
        ),
        "prompt_lookup_new_text": (
            Prompt(messages=(Message(role="user", content="Tell me about the city of Lisbon"),)),
            Sampling(temperature=0.0, max_tokens=128, ignore_eos=True),
            None,
        ),
    }
    rows = []
    async with two_engines(
        settings_of(model, threads, slots=2), settings_of(model, threads, slots=2, draft_tokens_max=0)
    ) as engines:
        for measure, (prompt, sampling, aim) in asks.items():
            paces: tuple[list[float], list[float]] = ([], [])
            for number in range(rounds + 1):  # the first compiles the constraint
                answers = []
                for engine, found in zip(engines, paces, strict=True):
                    job = Job(generation_id=f"{measure}-{number}", prompt=prompt, sampling=sampling)
                    answers.append(await watched(engine.submit(job)))
                    found.append(answers[-1].tokens_per_s)
                if answers[0].token_ids != answers[1].token_ids:
                    raise RuntimeError("drafts changed what was answered")
            ratios = sorted(a / b for a, b in zip(paces[0][1:], paces[1][1:], strict=True))
            rows.append(
                Row(
                    measure=measure,
                    unit="ratio of tokens/s",
                    ours=statistics.median(ratios),
                    aim=aim,
                    higher_is_better=True,
                    note="{:.0f} against {:.0f} tokens/s".format(*(statistics.median(p[1:]) for p in paces))
                    + f", the same tokens; ratios {ratios[0]:.2f} to {ratios[-1]:.2f}",
                )
            )
    return rows


async def state_move(model: Path, rounds: int, threads: int) -> list[Row]:
    """A sequence of 1,000 tokens taken out, put into another process and gone on with there, against
    computing as many tokens in that process: each up to the first new token."""
    settings = settings_of(model, threads, slots=2, state_bytes_max=STATE_BYTES_MAX)
    sampling = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
    moved, computed = [], []
    async with two_engines(settings, settings) as (here, there):
        vocabulary = here.info.vocabulary_tokens if here.info else 1
        for number in range(rounds):
            rng = Random(number)

            def prompt(rng: Random = rng) -> Prompt:
                return Prompt(token_ids=tuple(rng.randrange(vocabulary) for _ in range(MOVED_TOKENS)))

            running = here.submit(Job(generation_id=f"m{number}", prompt=prompt(), sampling=sampling))
            while not isinstance(await anext(running), Chunk):
                pass
            begun = time.perf_counter()
            state = await here.export(f"m{number}")
            await running.aclose()  # type: ignore[attr-defined]
            await there.import_(state)
            moved.append(await _first_token_s(there, state.job(f"m{number}"), begun))
            again = Job(generation_id=f"c{number}", prompt=prompt(), sampling=sampling)
            computed.append(await _first_token_s(there, again, time.perf_counter()))
    ratios = sorted(m / c for m, c in zip(moved, computed, strict=True))
    return [
        Row(
            measure="state_move_ratio",
            unit="ratio of s",
            ours=statistics.median(ratios),
            aim=0.2,
            note=f"{statistics.median(moved):.3f} against {statistics.median(computed):.3f} s; "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
        )
    ]


async def state_stall(model: Path, rounds: int, threads: int) -> list[Row]:
    """What four running streams notice when a sequence of 1,000 tokens is taken out of their engine, and when
    it is put into theirs: their longest gap then, beyond the usual one."""
    settings = settings_of(model, threads, slots=8, state_bytes_max=STATE_BYTES_MAX)
    out, into = [], []
    async with two_engines(settings, settings) as engines:
        vocabulary = engines[0].info.vocabulary_tokens if engines[0].info else 1
        for number in range(2 * rounds):
            here, there = engines if number % 2 else reversed(engines)
            rng = Random(number)
            sampling = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
            tokens = tuple(rng.randrange(vocabulary) for _ in range(MOVED_TOKENS))
            job = Job(generation_id=f"s{number}", prompt=Prompt(token_ids=tokens), sampling=sampling)
            running = here.submit(job)
            while not isinstance(await anext(running), Chunk):
                pass
            async with _streams(here, f"out{number}") as arrivals:
                state, stall_ms = await _stall_ms(arrivals, partial(here.export, f"s{number}"))
                out.append(stall_ms)
            await running.aclose()  # type: ignore[attr-defined]
            async with _streams(there, f"in{number}") as arrivals:
                into.append((await _stall_ms(arrivals, partial(there.import_, state)))[1])
    return [
        Row(
            measure=f"state_{way}_stall_ms",
            unit="ms",
            ours=statistics.median(stalls),
            aim=20.0,
            note=f"{min(stalls):.1f} to {max(stalls):.1f}",
        )
        for way, stalls in (("export", out), ("import", into))
    ]


@asynccontextmanager
async def _streams(engine: EngineProcess, name: str) -> AsyncIterator[asyncio.Queue[float]]:
    """Four streams of one engine; when each token of the last of them comes."""
    sampling = Sampling(temperature=0.0, max_tokens=1000, ignore_eos=True)
    arrivals: asyncio.Queue[float] = asyncio.Queue()

    async def stream(number: int) -> None:
        job = Job(generation_id=f"{name}-{number}", prompt=Prompt(text="Once"), sampling=sampling)
        async for event in engine.submit(job):
            if number == 3 and isinstance(event, Chunk):
                arrivals.put_nowait(time.perf_counter())

    tasks = [asyncio.create_task(stream(number)) for number in range(4)]
    try:
        yield arrivals
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stall_ms(
    arrivals: asyncio.Queue[float], act: Callable[[], Awaitable[Moved]]
) -> tuple[Moved, float]:
    """Do something beside streams: the longest gap between two tokens meanwhile and in the five steps after
    it, beyond the usual one."""
    before = [await arrivals.get() for _ in range(STEPS_WATCHED)][STEPS_WATCHED // 2 :]
    moved = await act()
    after = [before[-1], *[await arrivals.get() for _ in range(arrivals.qsize() + 5)]]
    usual = statistics.median(late - early for early, late in pairwise(before))
    return moved, 1000 * (max(late - early for early, late in pairwise(after)) - usual)


async def _first_token_s(engine: EngineProcess, job: Job, begun: float) -> float:
    """Seconds from ``begun`` to a job's first token; the rest of it is cancelled."""
    events = engine.submit(job)
    while True:
        event = await anext(events)
        if isinstance(event, Chunk) and event.token_ids:
            taken = time.perf_counter() - begun
            await events.aclose()  # type: ignore[attr-defined]
            return taken


async def step_overhead(model: Path, rounds: int, threads: int) -> list[Row]:
    """Eight sequences in this process: what a step takes beside the model, from plan to sent report."""
    settings = settings_of(model, threads, slots=SEQUENCES, context_tokens=512)
    llama = LlamaModel(settings, lambda _share: None)
    loop = EngineLoop(settings, llama, lambda: 1)
    ours, theirs = socket.socketpair()
    spent, compute = [0.0], llama.run

    def timed(slices: Sequence[Slice]) -> dict[str, int]:
        begun = time.perf_counter()
        rows = compute(slices)
        spent[0] += time.perf_counter() - begun
        return rows

    llama.run = timed  # type: ignore[method-assign]
    shares = []
    for number in range(rounds):
        sampling = Sampling(temperature=0.7, seed=number, max_tokens=64, ignore_eos=True)
        for key in range(SEQUENCES):
            prompt = Prompt(text=f"Sequence {key} of round {number} says:")
            job = Job(generation_id=f"{number}-{key}", prompt=prompt, sampling=sampling)
            loop.handle(Submit(number * SEQUENCES + key + 1, job, None), time.monotonic())
        shares.append(_overhead_percent(loop, spent, (ours, theirs)))
    ours.close()
    theirs.close()
    llama.close()
    return [
        Row(
            measure="step_overhead_percent",
            unit="% of a step",
            ours=statistics.median(shares),
            aim=4.0,
            note=f"8 sequences, temperature 0.7; {min(shares):.2f} to {max(shares):.2f}",
        )
    ]


def _overhead_percent(
    loop: EngineLoop, spent: list[float], pair: tuple[socket.socket, socket.socket]
) -> float:
    """The share of the steps of eight single tokens that is not spent in the model."""
    whole = model = 0.0
    while True:
        begun, before = time.perf_counter(), spent[0]
        plan, _ = loop.plan(time.monotonic())
        if not plan.slices:
            return 100 * (whole - model) / whole
        pair[0].sendall(encode(loop.run(plan, time.monotonic)))
        pair[1].recv(1 << 20)
        if len(plan.slices) == SEQUENCES and all(s.decodes for s in plan.slices):
            whole += time.perf_counter() - begun
            model += spent[0] - before


async def cold_start(model: Path, rounds: int, threads: int) -> list[Row]:
    """From the start of the engine's process to its first token."""
    times = []
    for _ in range(max(3, rounds)):
        engine = EngineProcess(settings_of(model, threads))
        begun = time.perf_counter()
        await engine.start()
        sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
        job = Job(generation_id="first", prompt=Prompt(text="Hello"), sampling=sampling)
        times.append(await _first_token_s(engine, job, begun))
        await engine.close()
    return [
        Row(
            measure="cold_start_s",
            unit="s",
            ours=statistics.median(times),
            aim=2.0,
            note=f"worst {max(times):.2f}",
        )
    ]
