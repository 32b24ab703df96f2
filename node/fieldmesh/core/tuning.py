"""Which settings suit a box: threads and slice sizes, from a few measured steps of one model on it.

Owns: what is worth measuring next within how much time, and what follows from it. Must not: run or time
anything.

Open to choice is only what changes no answer and no state that may go to another box. Flash attention and
the KV cache's type are part of both and never measured (``engine.llama``, profiles), nor is the split of the
cache among sequences.

- *Threads*: up to the cores that the process may use, for llama.cpp's threads spin while they wait for each
  other: on a busy box two can be slower than one. The fewest that are about as fast as the best.
- *Prefill slice* (while nothing decodes): as large as a step of ``PREFILL_STEP_S_MAX`` allows. Larger slices
  are computed faster, but a cancel, a deadline and an arrival wait for the step's end.
- *Mixed slice* (beside running streams): what of prompts takes ``MIXED_STEP_S_MAX``, which is the gap that a
  stream shows when a long prompt arrives. Smaller ones keep who arrives together waiting for each other.

What was measured while the box had other work (``undisturbed``) says how many threads to run beside that
work, but nothing of slices, and is not worth keeping: the next start measures anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

MEASURE_S_MAX = 1.5
"""What all trials may take together; the first, which nothing is known about, alone may exceed it."""
ONE_THREAD_S_MAX = 3.0
"""What the first trial of one thread may take at worst, even where less time is left."""
FAR_SLOWER_FACTOR = 5.0
"""A thread count whose step is so much slower than another's is tried no further."""
PREFILL_STEP_S_MAX = 1.0
MIXED_STEP_S_MAX = 0.5
FEWER_THREADS_FACTOR = 1.1
"""Fewer threads are taken where more would be faster by less than this."""
OWN_SHARE_MIN = 0.8
ROUNDS_DIFFER_FACTOR = 1.3
"""Beyond these a measurement was disturbed: threads that wait for a core show by the first, threads that spin
while they wait for one that has none by the second (guesses)."""
ROUNDS = 2
"""Each thread count is tried so often, in turns, and its best counts: a moment's disturbance is none."""

SLICES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
TRIED_SLICES = (32, 64, 128, 256, 512, 1024)
PREFILL_TOKENS_MIN = 32
MIXED_PREFILL_TOKENS_MIN = 16
"""What prompts get at least of a step, however many streams are in it."""

# A request as it is assumed: its prompt, and its answer half alone and half in full company.
_PROMPT_TOKENS = 256
_ANSWER_TOKENS = 128


class Trial(NamedTuple):
    """One step: so many sequences of so many tokens each, by so many threads."""

    threads: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What an engine runs with."""

    threads: int
    prefill_tokens: int
    mixed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``most`` is what the engine has room for (and what a fixed value is); ``open`` names the fields of
    ``Choice`` that may be chosen."""

    most: Choice
    open: frozenset[str]
    slots: int

    def allows(self, choice: Choice) -> bool:
        """Whether the choice is within these bounds."""
        fixed = {"threads", "prefill_tokens", "mixed_tokens"} - self.open
        return (
            all(getattr(choice, name) == getattr(self.most, name) for name in fixed)
            and 1 <= choice.threads <= self.most.threads
            and 1 < choice.prefill_tokens <= self.most.prefill_tokens
            and self.slots < choice.mixed_tokens <= max(self.most.prefill_tokens, self.most.mixed_tokens)
        )


class Took(NamedTuple):
    """Seconds that a trial took by the clock, and those in which its threads were computing."""

    wall_s: float
    own_s: float


Timings = Mapping[Trial, tuple[Took, ...]]
"""What each trial took, every time."""


def undisturbed(timings: Timings) -> bool:
    """Whether the threads had the cores for themselves, so that another day would tell the same."""
    took = [t for each in timings.values() for t in each]
    repeated = [[t.wall_s for t in each] for each in timings.values() if len(each) > 1]
    own = sum(t.own_s for t in took) >= OWN_SHARE_MIN * sum(t.wall_s for t in took)
    return own and sum(map(max, repeated)) <= ROUNDS_DIFFER_FACTOR * sum(map(min, repeated))


def next_trial(timings: Timings, limits: Limits, left_s: float) -> Trial | None:
    """What to run next; None where there is nothing more to learn in the time that is left.

    One thread is tried early, and where all of them may have been slow because of what else runs: then it is
    the one that will be quick."""
    for rounds in range(1, ROUNDS + 1):
        for shape in _shapes(limits):
            for threads in _contenders(timings, limits):
                trial = Trial(threads, *shape)
                single = trial == Trial(1, 1, 1) and trial not in timings
                if len(timings.get(trial, ())) >= rounds:
                    continue
                if _worst_s(trial, timings) <= max(left_s, ONE_THREAD_S_MAX if single else 0.0):
                    return trial
    if not limits.open & {"prefill_tokens", "mixed_tokens"}:
        return None
    threads = _best_threads(timings, limits)
    for tokens in TRIED_SLICES[1:]:
        trial = Trial(threads, 1, tokens)
        known = _slice_s(tokens // 2, threads, timings)
        if tokens > limits.most.prefill_tokens or known > PREFILL_STEP_S_MAX:
            return None
        if trial not in timings:
            return trial if _worst_s(trial, timings) <= left_s else None
    return None


def choose(timings: Timings, limits: Limits) -> Choice:
    """What suits best. Where too little was measured, what the limits say."""
    most = limits.most
    threads = _best_threads(timings, limits)
    prefill, mixed = most.prefill_tokens, most.mixed_tokens
    if not timings or not undisturbed(timings):
        return Choice(threads=threads, prefill_tokens=prefill, mixed_tokens=mixed)
    if "prefill_tokens" in limits.open:
        sizes = [n for n in SLICES if PREFILL_TOKENS_MIN < n <= most.prefill_tokens]
        fast = [n for n in sizes if _slice_s(n, threads, timings) <= PREFILL_STEP_S_MAX]
        prefill = max(fast, default=min(PREFILL_TOKENS_MIN, most.prefill_tokens))
    if "mixed_tokens" in limits.open:
        least = min(limits.slots + MIXED_PREFILL_TOKENS_MIN, max(most.prefill_tokens, most.mixed_tokens))
        sizes = [n for n in SLICES if least < n <= prefill]
        fast = [n for n in sizes if _slice_s(n - limits.slots, threads, timings) <= MIXED_STEP_S_MAX]
        mixed = max(fast, default=least)
    return Choice(threads=threads, prefill_tokens=prefill, mixed_tokens=mixed)


def in_words(timings: Timings, choice: Choice, limits: Limits) -> str:
    """What was measured, for an operator."""
    parts = []
    for threads in sorted({trial.threads for trial in timings}):
        one, full = (_took_s(timings, Trial(threads, n, 1)) for n in (1, limits.slots))
        parts.append(f"{threads} thread{'s' * (threads > 1)}: a token {one * 1000:.1f} ms")
        if full and limits.slots > 1:
            parts[-1] += f", {limits.slots} at once {full * 1000:.1f} ms"
    largest = max((t.tokens for t in timings if t.threads == choice.threads and t.sequences == 1), default=1)
    if largest > 1 and (took_s := _slice_s(largest, choice.threads, timings)):
        parts.append(f"prompts {largest / took_s:.0f} tokens/s")
    return "; ".join(parts)


def _contenders(timings: Timings, limits: Limits) -> tuple[int, ...]:
    """Thread counts that are worth trying: the most, one, then between; not those that have been far slower
    than another already."""
    most = limits.most.threads
    if "threads" not in limits.open:
        return (most,)
    counts = dict.fromkeys((most, 1, most * 3 // 4 or 1, most // 2 or 1, most // 4 or 1))
    alone = {n: took_s for n in counts if (took_s := _took_s(timings, Trial(n, 1, 1)))}
    far = FAR_SLOWER_FACTOR * min(alone.values(), default=0.0)
    return tuple(n for n in counts if n not in alone or alone[n] <= far)


def _shapes(limits: Limits) -> tuple[tuple[int, int], ...]:
    """Sequences and tokens of each: a stream alone, all slots together, and a slice of a prompt."""
    return (1, 1), (limits.slots, 1), (1, min(TRIED_SLICES[0], limits.most.prefill_tokens))


def _worst_s(trial: Trial, timings: Timings) -> float:
    """What a trial takes at most, as far as is known: a token costs no more in company than alone, and fewer
    threads take no longer than in proportion."""
    size = trial.sequences * trial.tokens
    return min(
        (
            _took_s(timings, known)
            * max(1.0, size / (known.sequences * known.tokens))
            * max(1.0, known.threads / trial.threads)
            for known in timings
        ),
        default=0.0,
    )


def _best_threads(timings: Timings, limits: Limits) -> int:
    """The fewest that are about as fast as the best, by what was measured of all."""
    counts = [n for n in _contenders(timings, limits) if Trial(n, 1, 1) in timings]
    alone, full, piece = _shapes(limits)
    steps = ((alone, _ANSWER_TOKENS / 2), (full, _ANSWER_TOKENS / 2), (piece, _PROMPT_TOKENS / piece[1]))
    known = [(shape, n) for shape, n in steps if all(Trial(threads, *shape) in timings for threads in counts)]
    costs = {
        threads: sum(n * _took_s(timings, Trial(threads, *shape)) for shape, n in known) for threads in counts
    }
    best = min(costs.values(), default=0.0)
    near = (n for n, cost in costs.items() if cost <= best * FEWER_THREADS_FACTOR)
    return min(near, default=limits.most.threads)


def _slice_s(tokens: int, threads: int, timings: Timings) -> float:
    """What one sequence's slice takes: between two that were measured, and beyond the largest as it goes on;
    0 where nothing is known."""
    known = {t.tokens: _took_s(timings, t) for t in timings if t.threads == threads and t.sequences == 1}
    below = max((n for n in known if n <= tokens), default=0)
    above = min((n for n in known if n >= tokens), default=0)
    if not below or not above:
        nearest = below or above
        return known[nearest] * max(1.0, tokens / nearest) if nearest else 0.0
    if below == above:
        return known[below]
    return known[below] + (known[above] - known[below]) * (tokens - below) / (above - below)


def _took_s(timings: Timings, trial: Trial) -> float:
    return min((took.wall_s for took in timings.get(trial, ())), default=0.0)
