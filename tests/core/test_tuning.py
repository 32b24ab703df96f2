"""Goal: a box gets the threads and slices that suit it, within bounds, from few steps, whatever it is like.
Method: boxes that are formulas, measured by the real order of trials on virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fieldmesh.core.tuning import (
    MEASURE_S_MAX,
    MIXED_STEP_S_MAX,
    ONE_THREAD_S_MAX,
    PREFILL_STEP_S_MAX,
    Choice,
    Limits,
    Took,
    Trial,
    choose,
    in_words,
    next_trial,
    undisturbed,
)

ALL = frozenset({"threads", "prefill_tokens", "mixed_tokens"})


def limits(threads: int = 4, slots: int = 4, opened: frozenset[str] = ALL, prefill: int = 256) -> Limits:
    most = Choice(threads=threads, prefill_tokens=prefill, mixed_tokens=48)
    return Limits(most=most, open=opened, slots=slots)


@dataclass
class Box:
    """A box on which a step of ``trial`` takes ``step_s(trial)``; ``share`` of it is the engine's own."""

    step_s: Callable[[Trial], float]
    share: float = 1.0
    timings: dict[Trial, tuple[Took, ...]] = field(default_factory=dict)
    passed_s: float = 0.0

    def measure(self, bounds: Limits) -> Choice:
        while trial := next_trial(self.timings, bounds, MEASURE_S_MAX - self.passed_s):
            took_s = self.step_s(trial)
            self.passed_s += took_s
            self.timings[trial] = (*self.timings.get(trial, ()), Took(took_s, took_s * self.share))
        return choose(self.timings, bounds)


def scaling(weights_s: float, token_s: float) -> Callable[[Trial], float]:
    """Every step reads the weights once, and computes its tokens; all of it faster with more threads."""
    return lambda t: (weights_s + token_s * t.sequences * t.tokens) / t.threads


def test_a_box_that_is_faster_with_every_thread_gets_all_of_them() -> None:
    assert Box(scaling(0.01, 0.002)).measure(limits()).threads == 4


def test_a_busy_box_where_two_threads_wait_for_each_other_gets_one() -> None:
    def step_s(t: Trial) -> float:
        return (0.01 + 0.002 * t.sequences * t.tokens) * (1 if t.threads == 1 else 3)

    assert Box(step_s).measure(limits(threads=2)).threads == 1


def test_a_box_on_which_all_threads_take_a_second_a_token_is_tried_with_one() -> None:
    box = Box(lambda t: 0.0002 * t.sequences * t.tokens if t.threads == 1 else 0.8)
    assert box.measure(limits(threads=2)).threads == 1
    assert [t for t in box.timings if t.threads == 2] == [Trial(2, 1, 1)], "once is enough"


def test_threads_that_gain_next_to_nothing_are_left_to_others() -> None:
    def step_s(t: Trial) -> float:  # the memory is the bottleneck: beyond four threads little is won
        return (0.04 + 0.002 * t.sequences * t.tokens) / min(4.0, t.threads) * (1 - 0.002 * t.threads)

    assert Box(step_s).measure(limits(threads=16)).threads == 4


def test_no_more_threads_are_tried_than_may_be_used() -> None:
    box = Box(scaling(0.001, 0.0001))
    box.measure(limits(threads=6))
    assert {t.threads for t in box.timings} == {6, 4, 3, 1}


def test_a_step_of_prompts_keeps_its_time_and_uses_it() -> None:
    chosen = Box(lambda t: 0.008 * t.tokens * t.sequences + 0.02).measure(limits(threads=1))
    assert 0.008 * chosen.prefill_tokens + 0.02 <= PREFILL_STEP_S_MAX
    assert chosen.prefill_tokens == 96


def test_a_fast_box_computes_as_much_in_a_step_as_there_is_room_for() -> None:
    chosen = Box(scaling(0.002, 0.0001)).measure(limits())
    assert (chosen.prefill_tokens, chosen.mixed_tokens) == (256, 256)


def test_beside_streams_prompts_get_no_more_of_a_step_than_a_reader_bears() -> None:
    step_s = scaling(0.006, 0.005)  # about SmolLM2 on two old cores
    chosen = Box(step_s).measure(limits(threads=1))
    prompt_tokens = chosen.mixed_tokens - 4
    assert step_s(Trial(1, 1, prompt_tokens)) <= MIXED_STEP_S_MAX
    assert chosen.mixed_tokens == 96


def test_a_slow_box_lets_prompts_pass_all_the_same() -> None:
    chosen = Box(scaling(1.0, 0.2)).measure(limits(threads=1, slots=8))
    assert (chosen.prefill_tokens, chosen.mixed_tokens) == (32, 8 + 16)


@pytest.mark.parametrize("weights_s", [0.0001, 0.001, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("token_s", [0.00001, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("threads", [1, 2, 7, 64])
def test_measuring_keeps_its_time(weights_s: float, token_s: float, threads: int) -> None:
    box = Box(scaling(weights_s, token_s))
    bounds = limits(threads=threads)
    chosen = box.measure(bounds)
    first_s = box.step_s(Trial(threads, 1, 1))
    assert box.passed_s <= max(MEASURE_S_MAX, first_s + ONE_THREAD_S_MAX) + 1e-9
    assert bounds.allows(chosen)


def test_a_step_that_takes_longer_than_all_may_is_the_only_one() -> None:
    box = Box(lambda t: 5.0)
    assert box.measure(limits()) == Choice(threads=4, prefill_tokens=32, mixed_tokens=20)
    assert len(box.timings) == 1


def test_what_is_fixed_is_neither_tried_nor_changed() -> None:
    box = Box(scaling(1.0, 0.2))
    bounds = limits(opened=frozenset({"mixed_tokens"}))
    chosen = box.measure(bounds)
    assert (chosen.threads, chosen.prefill_tokens) == (4, 256)
    assert {t.threads for t in box.timings} == {4}


def test_slices_are_not_cut_for_a_box_that_is_busy_for_a_moment() -> None:
    slow = scaling(0.02, 0.015)
    quiet, waiting = Box(slow), Box(slow, share=0.5)
    spinning = Box(lambda t: slow(t) * (1 + len(spinning.timings.get(t, ()))))
    assert quiet.measure(limits(threads=1)).prefill_tokens == 64
    assert undisturbed(quiet.timings)
    for busy in (waiting, spinning):
        chosen = busy.measure(limits(threads=1))
        assert (chosen.prefill_tokens, chosen.mixed_tokens) == (256, 48)
        assert not undisturbed(busy.timings)


def test_a_busy_box_is_still_asked_for_its_threads() -> None:
    box = Box(lambda t: (0.01 + 0.002 * t.sequences * t.tokens) * t.threads, share=0.5)
    assert box.measure(limits(threads=2)).threads == 1


def test_nothing_measured_leaves_what_there_is_room_for() -> None:
    assert choose({}, limits()) == limits().most


@pytest.mark.parametrize(
    "choice",
    [
        Choice(threads=5, prefill_tokens=256, mixed_tokens=48),
        Choice(threads=0, prefill_tokens=256, mixed_tokens=48),
        Choice(threads=4, prefill_tokens=512, mixed_tokens=48),
        Choice(threads=4, prefill_tokens=256, mixed_tokens=4),
        Choice(threads=4, prefill_tokens=256, mixed_tokens=257),
    ],
)
def test_a_choice_beyond_the_bounds_is_told(choice: Choice) -> None:
    assert not limits().allows(choice)


def test_a_choice_that_changes_what_is_fixed_is_told() -> None:
    bounds = limits(opened=frozenset({"prefill_tokens"}))
    assert bounds.allows(Choice(threads=4, prefill_tokens=64, mixed_tokens=48))
    assert not bounds.allows(Choice(threads=2, prefill_tokens=64, mixed_tokens=48))


def test_an_operator_reads_what_was_measured() -> None:
    box = Box(scaling(0.02, 0.004))
    chosen = box.measure(limits(threads=2))
    assert in_words(box.timings, chosen, limits(threads=2)) == (
        "1 thread: a token 24.0 ms, 4 at once 36.0 ms; 2 threads: a token 12.0 ms, 4 at once 18.0 ms; "
        "prompts 481 tokens/s"
    )
