"""Goal: the scheduler keeps its promises (bounds, order, fairness, nothing starves, nothing lost).

Method: examples for each rule; random workloads on virtual time against what must hold, with ``check``
after every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmesh.core.batching import Batcher
from fieldmesh.core.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from fieldmesh.core.model import FinishReason, Priority
from fieldmesh.core.steps import BatcherConfig, Output, Sampled, StepPlan, Work

CONFIG = BatcherConfig(
    slots=4,
    context_tokens=256,
    cells_total=4 * 256,
    prefill_tokens=64,
    mixed_tokens=16,
    queue_max=8,
    reuse_tokens_min=4,
)


def work(name: str, prompt: int = 10, tokens_max: int = 5, first: int = 0, **more: object) -> Work:
    ids = tuple(range(first, first + prompt))
    return Work(id=name, prompt_token_ids=ids, tokens_max=tokens_max, **more)  # type: ignore[arg-type]


class Drive:
    """A host on virtual time: a step takes 10 ms and 1 ms a token, a transfer ends after ``transfer_steps``
    beats and succeeds while ``disk_works``. Checks the batcher after every beat."""

    def __init__(self, config: BatcherConfig = CONFIG) -> None:
        self.batcher = Batcher(config)
        self.now = 0.0
        self.transfer_steps = 1
        self.disk_works = True
        self._transfer: tuple[int, Callable[[], None]] | None = None
        self.outputs: list[Output] = []
        self.plans: list[StepPlan] = []

    def submit(self, *works: Work) -> None:
        for one in works:
            self.batcher.submit(one, self.now)
            self.batcher.check()

    def step(self) -> StepPlan:
        self._end_transfer()
        plan = self.batcher.plan(self.now)
        self.batcher.check()
        self.plans.append(plan)
        self._begin_transfer(plan)
        if plan.slices:
            self.now += 0.01 + 0.001 * plan.tokens
            results = [Sampled(id=s.id, token_ids=(1000 + s.position,)) for s in plan.slices if s.sample]
            self.outputs.extend(self.batcher.commit(results, self.now))
            self.batcher.check()
        return plan

    def _begin_transfer(self, plan: StepPlan) -> None:
        cache, ok = self.batcher.cache, self.disk_works
        if plan.save is not None or plan.fetch:
            assert self._transfer is None, "two transfers at once"
        if (save := plan.save) is not None:
            self._transfer = self.transfer_steps, lambda: cache.saved(save.name, ok=ok)
        if fetch := plan.fetch:
            self._transfer = self.transfer_steps, lambda: cache.fetched(fetch, ok=ok)

    def _end_transfer(self) -> None:
        if self._transfer is not None:
            steps, end = self._transfer
            self._transfer = (steps - 1, end) if steps else None
            if not steps:
                end()

    def run(self, steps_max: int = 10_000) -> None:
        for _ in range(steps_max):
            if not self.step().slices and self._transfer is None:
                return
        raise AssertionError("still busy")

    def finished(self) -> list[str]:
        return [o.id for o in self.outputs if o.finish is not None]

    def indices(self, name: str) -> list[int]:
        told = [o for o in self.outputs if o.id == name]
        return [o.first_token_index + offset for o in told for offset in range(len(o.token_ids))]

    def tokens_of(self, name: str) -> int:
        return len(self.indices(name))


# --- steps ---------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_then_decoded_to_its_length() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=10, tokens_max=3))
    drive.run()
    assert [(len(s.token_ids), s.sample) for p in drive.plans for s in p.slices] == [
        (10, True),
        (1, True),
        (1, True),
    ]
    last = drive.outputs[-1]
    assert last.finish is FinishReason.LENGTH
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.cached_tokens, last.usage.completion_tokens) == (10, 0, 3)


def test_a_stop_ends_the_generation_at_once() -> None:
    drive = Drive()
    drive.submit(work("a", tokens_max=50))
    plan = drive.batcher.plan(0.0)
    (output,) = drive.batcher.commit([Sampled(id="a", token_ids=(7,), stop=True)], 0.1)
    assert plan.tokens == 10
    assert (output.finish, output.first_token_index) == (FinishReason.STOP, 0)
    assert drive.step().slices == ()


def test_a_long_prompt_leaves_every_step_to_the_running_streams_first() -> None:
    drive = Drive()
    drive.submit(work("a", tokens_max=40), work("b", tokens_max=40, first=500))
    drive.step()
    drive.submit(work("long", prompt=200, first=1000))
    while drive.tokens_of("long") == 0:
        plan = drive.step()
        assert {"a", "b"} <= {s.id for s in plan.slices}
        assert plan.tokens <= CONFIG.mixed_tokens


def test_with_nothing_to_decode_a_prompt_gets_large_steps() -> None:
    drive = Drive()
    drive.submit(work("long", prompt=200))
    assert drive.step().tokens == CONFIG.prefill_tokens


@pytest.mark.parametrize(("token_s", "tokens"), [(0.001, 64), (0.01, 50), (0.1, 32)])
def test_a_slow_model_gets_smaller_steps_so_that_none_takes_long(token_s: float, tokens: int) -> None:
    batcher, now, lengths = Batcher(CONFIG), 0.0, []
    batcher.submit(work("long", prompt=250, tokens_max=1), now)
    while (plan := batcher.plan(now)).slices:
        now += token_s * plan.tokens
        lengths.append(plan.tokens)
        batcher.commit([Sampled(id=s.id, token_ids=(1,)) for s in plan.slices if s.sample], now)
    assert lengths[:3] == [64, tokens, tokens]


def test_a_short_prompt_is_not_held_up_by_a_long_one() -> None:
    drive = Drive()
    drive.submit(work("long", prompt=200), work("short", prompt=8, first=1000))
    plan = drive.step()
    assert [s.id for s in plan.slices] == ["short", "long"]
    assert plan.slices[0].sample


def test_resumed_tokens_are_computed_as_the_prompt_is() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=20, tokens_max=60, resume_token_ids=tuple(range(500, 545))))
    drive.run()
    lengths = [len(s.token_ids) for p in drive.plans for s in p.slices]
    assert lengths[:3] == [CONFIG.prefill_tokens, 65 - CONFIG.prefill_tokens, 1]
    assert drive.outputs[0].first_token_index == 45
    assert drive.outputs[-1].first_token_index == 59


def test_an_empty_plan_needs_no_commit() -> None:
    batcher = Batcher(CONFIG)
    assert batcher.plan(0.0) == StepPlan()
    assert batcher.plan(1.0) == StepPlan()


# --- admission -----------------------------------------------------------------------------


def test_work_waits_for_a_slot() -> None:
    drive = Drive(replace(CONFIG, slots=1, cells_total=256))
    drive.submit(work("a"), work("b", first=100))
    assert {s.id for s in drive.step().slices} == {"a"}
    drive.run()
    assert drive.finished() == ["a", "b"]


def test_the_end_of_a_generation_says_how_long_it_waited_for_its_first_slot() -> None:
    drive = Drive(STORING)
    drive.submit(work("batch", prompt=60, tokens_max=50, priority=Priority.BATCH))
    while drive.tokens_of("batch") < 10:
        drive.step()
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    drive.submit(work("late", first=2000))
    submitted_at = drive.now
    drive.run()
    queue_s = {o.id: o.usage.queue_s for o in drive.outputs if o.usage is not None}
    # The batch one had its slot at once; that it had to make way later is another matter.
    assert (queue_s["batch"], queue_s["interactive"]) == (0.0, 0.0)
    assert queue_s["late"] is not None
    assert 0.05 < queue_s["late"] < drive.now - submitted_at


def test_work_waits_for_cells_not_only_for_slots() -> None:
    drive = Drive(replace(CONFIG, cells_total=256))
    drive.submit(work("a", prompt=100, tokens_max=50), work("b", prompt=100, tokens_max=50, first=1000))
    drive.step()
    assert drive.batcher.load().running == 1
    drive.run()
    assert drive.finished() == ["a", "b"]


def test_a_full_queue_is_refused_with_a_time_to_come_back() -> None:
    drive = Drive(replace(CONFIG, queue_max=2))
    drive.submit(*(work(f"w{i}") for i in range(6)))
    with pytest.raises(QueueFull, match="2 waiting") as refused:
        drive.submit(work("one-too-many"))
    assert refused.value.retry_after_s == 1.0


def test_a_prompt_that_cannot_fit_is_refused() -> None:
    with pytest.raises(PromptTooLong, match="at most 257"):
        Drive().submit(work("a", prompt=200, tokens_max=58))


def test_a_prompt_that_just_fits_fills_its_context() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=200, tokens_max=57))
    drive.run()
    assert drive.tokens_of("a") == 57


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (work("a", prompt=0), "prompt"),
        (work("a", tokens_max=2, resume_token_ids=(1, 2)), "max_tokens"),
    ],
)
def test_impossible_work_is_refused(bad: Work, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Drive().submit(bad)
    assert refused.value.field == field


def test_an_id_in_use_is_refused() -> None:
    drive = Drive()
    drive.submit(work("a"))
    with pytest.raises(InvalidRequest, match="already running"):
        drive.submit(work("a"))
    drive.step()
    with pytest.raises(InvalidRequest, match="already running"):
        drive.submit(work("a"))


# --- order ---------------------------------------------------------------------------------

ONE = replace(CONFIG, slots=1, cells_total=256)


def test_interactive_goes_before_normal_before_batch() -> None:
    drive = Drive(ONE)
    drive.submit(
        work("first"),
        work("batch", priority=Priority.BATCH),
        work("normal", priority=Priority.NORMAL),
        work("interactive", priority=Priority.INTERACTIVE),
    )
    drive.run()
    assert drive.finished() == ["interactive", "first", "normal", "batch"]


def test_a_batch_request_does_not_starve_under_endless_interactive_ones() -> None:
    drive = Drive(replace(ONE, ageing_s=1.0))
    drive.submit(work("batch", priority=Priority.BATCH))
    for number in range(400):
        drive.submit(work(f"i{number}", priority=Priority.INTERACTIVE))
        while drive.batcher.load().queued > 1:
            drive.step()
        if "batch" in drive.finished():
            break
    assert "batch" in drive.finished()
    assert drive.now < 5.0


def test_a_tenant_with_one_request_does_not_wait_behind_anothers_hundred() -> None:
    drive = Drive(replace(ONE, queue_max=64))
    drive.submit(*(work(f"a{i}", tenant="a") for i in range(40)))
    drive.step()
    drive.submit(work("b", tenant="b"))
    drive.run()
    assert drive.finished().index("b") <= 2


def test_two_busy_tenants_get_equal_shares() -> None:
    drive = Drive(replace(ONE, queue_max=64))
    for i in range(20):
        drive.submit(work(f"a{i}", tenant="a"), work(f"b{i}", tenant="b"))
    drive.run()
    first_half = [name[0] for name in drive.finished()[:20]]
    assert abs(first_half.count("a") - first_half.count("b")) <= 2


def test_a_tenant_that_was_away_gets_no_credit_for_it() -> None:
    drive = Drive(replace(ONE, queue_max=64))
    drive.submit(*(work(f"a{i}", tenant="a") for i in range(30)))
    while len(drive.finished()) < 10:
        drive.step()
    drive.submit(*(work(f"b{i}", tenant="b") for i in range(10)))
    drive.run()
    next_ten = [name[0] for name in drive.finished()[10:20]]
    assert 4 <= next_ten.count("b") <= 6


# --- preemption ----------------------------------------------------------------------------

STORING = replace(ONE, stored_cells=1000, store_tokens_min=50, restore_tokens_min=8)


def test_an_interactive_request_takes_the_place_of_a_batch_one() -> None:
    drive = Drive(STORING)
    drive.submit(work("batch", prompt=60, tokens_max=50, priority=Priority.BATCH))
    while drive.tokens_of("batch") < 10:
        drive.step()
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    plan = drive.step()
    assert [s.id for s in plan.slices] == ["interactive"]
    assert plan.save is not None
    assert (plan.save.slot, len(plan.save.token_ids)) == (0, 69)
    drive.run()
    assert drive.finished() == ["interactive", "batch"]
    assert drive.indices("batch") == list(range(50))


def test_a_preempted_request_goes_on_from_its_saved_state_without_computing_anything_again() -> None:
    drive = Drive(STORING)
    drive.submit(work("batch", prompt=60, tokens_max=50, priority=Priority.BATCH))
    while drive.tokens_of("batch") < 10:
        drive.step()
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    drive.run()
    assert sum(len(s.token_ids) for p in drive.plans for s in p.slices if s.id == "batch") == 60 + 49
    last = drive.outputs[-1].usage
    assert last is not None
    assert (last.prompt_tokens, last.cached_tokens, last.completion_tokens) == (60, 0, 50)


@pytest.mark.parametrize("disk", [True, False])
def test_without_a_saved_state_a_preempted_request_is_computed_again(disk: bool) -> None:
    drive = Drive(STORING if disk else ONE)
    drive.disk_works = False
    drive.submit(work("batch", prompt=60, tokens_max=50, priority=Priority.BATCH))
    while drive.tokens_of("batch") < 10:
        drive.step()
    drive.submit(work("interactive", prompt=200, first=1000, priority=Priority.INTERACTIVE))
    drive.run()
    assert sum(len(s.token_ids) for p in drive.plans for s in p.slices if s.id == "batch") == 69 + 69 + 40
    assert drive.indices("batch") == list(range(50))


def test_equals_do_not_take_each_others_place() -> None:
    drive = Drive(STORING)
    drive.submit(work("a", tokens_max=50))
    drive.step()
    drive.submit(work("b", first=1000))
    drive.run()
    assert drive.finished() == ["a", "b"]


def test_who_has_waited_long_enough_is_not_preempted_any_more() -> None:
    drive = Drive(replace(STORING, ageing_s=1.0))
    drive.submit(work("batch", tokens_max=100, priority=Priority.BATCH))
    drive.step()
    drive.now = 2.0
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    drive.run()
    assert drive.finished() == ["batch", "interactive"]


def test_who_is_nearly_done_is_not_preempted() -> None:
    drive = Drive(STORING)
    drive.submit(work("batch", tokens_max=STORING.preempt_tokens_min, priority=Priority.BATCH))
    drive.step()
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    drive.run()
    assert drive.finished() == ["batch", "interactive"]


def test_cells_are_made_free_as_slots_are() -> None:
    drive = Drive(replace(STORING, slots=2))
    drive.submit(work("batch", prompt=100, tokens_max=100, priority=Priority.BATCH))
    drive.step()
    drive.submit(work("normal", prompt=100, tokens_max=20, first=1000))
    assert {s.id for s in drive.step().slices} == {"normal"}
    drive.run()
    assert drive.finished() == ["normal", "batch"]


def test_a_preempted_request_can_be_cancelled_and_its_state_may_then_go() -> None:
    drive = Drive(STORING)
    drive.submit(work("batch", prompt=60, tokens_max=50, priority=Priority.BATCH))
    drive.step()
    drive.submit(work("interactive", first=1000, priority=Priority.INTERACTIVE))
    drive.step()
    (name,) = drive.batcher.cache.stored
    assert drive.batcher.cache.stored.pinned(name)
    assert drive.batcher.cancel("batch")
    assert not drive.batcher.cache.stored.pinned(name)
    drive.run()
    assert drive.finished() == ["interactive"]


# --- saved states --------------------------------------------------------------------------


def converse(drive: Drive, *names: tuple[str, int]) -> None:
    for name, first in names:
        drive.submit(work(name, prompt=100, first=first))
        drive.run()


def test_a_retired_sequence_comes_back_from_its_saved_state() -> None:
    drive = Drive(STORING)
    converse(drive, ("a", 0), ("b", 1000), ("again", 0))
    usage = drive.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 99
    assert [p.fetch for p in drive.plans if p.fetch]


def test_while_a_state_is_loaded_others_take_the_slots_that_are_left() -> None:
    drive = Drive(replace(STORING, slots=2, cells_total=512))
    converse(drive, ("a", 0), ("b", 1000), ("c", 2000), ("d", 3000))
    drive.transfer_steps = 3
    drive.submit(work("again", prompt=100), work("new", prompt=20, first=5000, tokens_max=9))
    assert {s.id for s in drive.step().slices} == {"new"}
    drive.run()
    assert {o.usage.cached_tokens for o in drive.outputs[-9:] if o.usage is not None} >= {99}


def test_a_state_that_cannot_be_loaded_is_dropped_and_computed_again() -> None:
    drive = Drive(STORING)
    converse(drive, ("a", 0), ("b", 1000))
    drive.disk_works = False
    converse(drive, ("again", 0))
    usage = drive.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0
    assert sum(len(p.drops) for p in drive.plans) == 1


def test_saved_states_are_bounded_by_cells_the_oldest_go_first() -> None:
    drive = Drive(replace(STORING, stored_cells=250))
    converse(drive, ("a", 0), ("b", 1000), ("c", 2000), ("d", 3000))
    assert drive.batcher.cache.stored.cells <= 250
    firsts = [drive.batcher.cache.stored.tokens(n)[0] for n in drive.batcher.cache.stored]
    assert firsts == [2000, 3000]


def test_a_longer_state_takes_the_place_of_the_shorter_one_that_it_begins_with() -> None:
    drive = Drive(STORING)
    converse(drive, ("a", 0))
    known = (*range(100), *(t for o in drive.outputs for t in o.token_ids), *range(2000, 2075))
    drive.submit(Work(id="longer", prompt_token_ids=known, tokens_max=5))
    drive.run()
    (name,) = drive.batcher.cache.stored
    assert drive.batcher.cache.stored.length(name) == 184


def test_what_a_saved_state_has_already_is_not_saved_again() -> None:
    drive = Drive(STORING)
    converse(drive, ("a", 0), ("b", 1000), ("again", 0), ("c", 2000))
    assert sum(p.save is not None for p in drive.plans) == 3


def test_a_state_from_elsewhere_is_used_like_an_own_one() -> None:
    drive = Drive(STORING)
    assert drive.batcher.cache.claim()
    assert not drive.batcher.cache.claim()
    assert drive.batcher.cache.adopt("", tuple(range(90)))
    drive.batcher.cache.unclaim()
    converse(drive, ("a", 0))
    usage = drive.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 90


def test_a_cache_that_cannot_be_cut_gives_whole_sequences_or_nothing() -> None:
    drive = Drive(replace(STORING, cuttable=False))
    converse(drive, ("a", 0))
    known = (*range(100), *(t for o in drive.outputs for t in o.token_ids), *range(2000, 2020))
    drive.submit(Work(id="next turn", prompt_token_ids=known, tokens_max=2))
    drive.run()
    drive.submit(work("other turn", prompt=90))
    drive.run()
    cached = [o.usage.cached_tokens for o in drive.outputs if o.usage is not None]
    assert cached == [0, 104, 0]


def test_what_a_slot_does_not_hold_after_all_is_computed() -> None:
    drive = Drive()
    converse(drive, ("a", 0))
    drive.submit(work("b", prompt=100))
    assert drive.batcher.plan(drive.now).tokens == 1
    (piece,) = drive.batcher.restart([0])
    assert (piece.position, len(piece.token_ids)) == (0, CONFIG.prefill_tokens)
    drive.batcher.check()
    drive.batcher.commit([], drive.now)
    drive.run()
    usage = drive.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0


# --- pause, cancel, deadline -----------------------------------------------------------------


def test_a_paused_generation_keeps_its_place_and_computes_nothing() -> None:
    drive = Drive()
    drive.submit(work("a", tokens_max=9))
    drive.step()
    drive.batcher.pause("a")
    assert drive.step().slices == ()
    assert drive.batcher.load().running == 1
    drive.batcher.resume("a")
    drive.run()
    assert drive.tokens_of("a") == 9


def test_a_cancelled_generation_frees_its_slot_within_a_step() -> None:
    drive = Drive(ONE)
    drive.submit(work("a", tokens_max=100), work("b"))
    drive.step()
    assert drive.batcher.cancel("a")
    assert {s.id for s in drive.step().slices} == {"b"}
    assert not drive.batcher.cancel("a")


def test_a_cancel_while_a_step_runs_takes_effect_at_its_commit() -> None:
    drive = Drive(ONE)
    drive.submit(work("a", tokens_max=100))
    drive.batcher.plan(0.0)
    assert drive.batcher.cancel("a")
    drive.batcher.check()
    assert drive.batcher.commit([], 0.1) == ()
    drive.batcher.check()
    assert drive.batcher.load().running == 0


def test_waiting_work_can_be_cancelled() -> None:
    drive = Drive(ONE)
    drive.submit(work("a"), work("b"))
    drive.step()
    assert drive.batcher.cancel("b")
    drive.run()
    assert drive.finished() == ["a"]


def test_a_deadline_ends_running_and_waiting_work_at_the_next_plan() -> None:
    drive = Drive(ONE)
    drive.submit(work("a", tokens_max=200, deadline=1.0), work("b", deadline=0.5))
    drive.step()
    assert drive.batcher.deadline == 0.5
    drive.now = 0.6
    assert drive.step().expired == ("b",)
    drive.now = 1.0
    plan = drive.step()
    assert plan.expired == ("a",)
    assert plan.slices == ()
    assert drive.batcher.deadline is None


def test_a_paused_generation_meets_its_deadline_too() -> None:
    drive = Drive()
    drive.submit(work("a", deadline=1.0))
    drive.step()
    drive.batcher.pause("a")
    drive.now = 2.0
    assert drive.step().expired == ("a",)


# --- prefixes ------------------------------------------------------------------------------


def test_a_finished_prompt_is_reused_from_the_slot_that_holds_it() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=100))
    drive.run()
    drive.submit(work("b", prompt=120))
    plan = drive.step()
    (place,) = plan.places
    assert (place.keep_tokens, place.source) == (100, place.slot)
    assert plan.tokens == 20
    drive.run()
    assert drive.outputs[-1].usage is not None
    assert drive.outputs[-1].usage.cached_tokens == 100


def test_a_prefix_of_a_running_sequence_is_copied_to_another_slot() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=40, tokens_max=50))
    drive.step()
    drive.submit(work("b", prompt=60))
    (place,) = drive.step().places
    assert place.source != place.slot
    assert place.keep_tokens == 40


def burst(drive: Drive, count: int) -> None:
    """Requests that share 100 tokens and have 8 of their own each."""
    for i in range(count):
        own = tuple(range(1000 * (i + 1), 1000 * (i + 1) + 8))
        drive.submit(Work(id=f"b{i}", prompt_token_ids=(*range(100), *own), tokens_max=4))


def test_requests_that_arrive_together_compute_their_shared_prefix_once() -> None:
    drive = Drive()
    burst(drive, 4)
    drive.run()
    assert len(drive.finished()) == 4
    usages = [o.usage for o in drive.outputs if o.usage is not None]
    assert sum(u.prompt_tokens - u.cached_tokens for u in usages) == 100 + 4 * 8


def test_others_are_not_held_up_by_those_who_wait_for_a_prefix() -> None:
    drive = Drive()
    burst(drive, 3)
    drive.submit(work("other", prompt=5, first=90_000))
    assert {s.id for s in drive.step().slices} == {"b0", "other"}


def test_nobody_waits_for_a_prefix_whose_computation_stopped() -> None:
    for stop in ("pause", "cancel"):
        drive = Drive()
        burst(drive, 2)
        drive.step()
        getattr(drive.batcher, stop)("b0")
        assert "b1" in {s.id for s in drive.step().slices}


def test_an_interactive_request_does_not_wait_for_a_batch_ones_prefix() -> None:
    drive = Drive()
    drive.submit(work("batch", prompt=200, priority=Priority.BATCH))
    drive.step()
    drive.submit(work("interactive", prompt=200, priority=Priority.INTERACTIVE))
    assert "interactive" in {s.id for s in drive.step().slices}


def test_the_last_token_of_a_known_prompt_is_computed_again() -> None:
    drive = Drive()
    drive.submit(work("a", prompt=50))
    drive.run()
    drive.submit(work("b", prompt=50))
    assert drive.step().tokens == 1


def test_a_short_common_prefix_is_not_worth_it() -> None:
    drive = Drive()
    drive.submit(Work(id="a", prompt_token_ids=(1, 2, 3, 9, 9), tokens_max=1))
    drive.run()
    drive.submit(Work(id="b", prompt_token_ids=(1, 2, 3, 4, 5), tokens_max=1))
    (place,) = drive.step().places
    assert place.keep_tokens == 0


def test_reuse_can_be_turned_off_for_models_whose_cache_cannot_be_cut() -> None:
    drive = Drive(replace(CONFIG, reuse_prefixes=False))
    for name in ("a", "b"):
        drive.submit(work(name, prompt=50))
        drive.run()
    assert [p.tokens for p in drive.plans if p.places] == [50, 50]


LONG = replace(CONFIG, context_tokens=1024, cells_total=4 * 1024, prefill_tokens=256, mixed_tokens=128)


def computed(plans: list[StepPlan]) -> list[tuple[int, int]]:
    """Position and length of all slices of prompts."""
    return [(s.position, len(s.token_ids)) for p in plans for s in p.slices if not s.decodes]


@pytest.mark.parametrize(
    ("behind", "question", "slice_"),
    [
        (400, 50, (386, 64)),
        (400, 63, (399, 64)),
        (400, 64, (400, 64)),
        (400, 47, (400, 47)),
        (272, 48, (256, 64)),
        (271, 48, (271, 48)),
    ],
)
def test_a_question_that_is_nearly_a_tile_becomes_one_behind_a_long_prefix(
    behind: int, question: int, slice_: tuple[int, int]
) -> None:
    drive = Drive(LONG)
    drive.submit(work("a", prompt=behind, tokens_max=1))
    drive.run()
    drive.plans.clear()
    drive.submit(work("b", prompt=behind + question, tokens_max=1))
    drive.run()
    assert computed(drive.plans) == [slice_]
    usage = drive.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == slice_[0]


def test_no_prefix_is_shortened_where_a_step_has_no_room_for_a_tile() -> None:
    drive = Drive(replace(LONG, mixed_tokens=32))
    drive.submit(work("a", prompt=400, tokens_max=1), work("long", first=5000, tokens_max=50))
    while drive.tokens_of("long") < 5 or drive.tokens_of("a") < 1:
        drive.step()
    drive.plans.clear()
    drive.submit(work("b", prompt=450, tokens_max=1))
    drive.step()
    assert computed(drive.plans) == [(400, 31)]


def test_no_saved_state_and_none_that_cannot_be_cut_is_shortened() -> None:
    stored = replace(LONG, slots=1, cells_total=1024, stored_cells=2048, restore_tokens_min=16)
    for config in (stored, replace(stored, cuttable=False)):
        drive = Drive(config)
        drive.submit(work("a", prompt=400, tokens_max=1))
        drive.run()
        drive.submit(work("other", prompt=400, first=5000, tokens_max=1))
        drive.run()
        drive.plans.clear()
        drive.submit(work("b", prompt=450, tokens_max=1))
        drive.run()
        assert computed(drive.plans) == [(400, 50)]


@pytest.mark.parametrize(
    ("prompt", "slices"),
    [
        (256 + 60, [(0, 256), (256, 60)]),
        (512 + 60, [(0, 256), (256, 252), (508, 64)]),
        (512 + 47, [(0, 256), (256, 256), (512, 47)]),
        (512 + 64, [(0, 256), (256, 256), (512, 64)]),
    ],
)
def test_the_last_piece_of_a_prompt_is_a_tile_rather_than_nearly_one(
    prompt: int, slices: list[tuple[int, int]]
) -> None:
    drive = Drive(LONG)
    drive.submit(work("a", prompt=prompt, tokens_max=1))
    drive.run()
    assert computed(drive.plans) == slices


def test_new_work_overwrites_the_prefix_used_least_recently() -> None:
    drive = Drive()
    for i in range(CONFIG.slots):
        drive.submit(work(f"w{i}", prompt=20, first=1000 * i, tokens_max=10 - 3 * i))
    drive.run()
    drive.submit(work("new", prompt=20, first=9000))
    drive.run()
    drive.submit(*(work(f"again{i}", prompt=20, first=1000 * i) for i in range(CONFIG.slots)))
    assert sorted(p.keep_tokens for p in drive.step().places) == [0, 19, 19, 19]


def test_resident_prefixes_give_way_when_cells_are_needed() -> None:
    drive = Drive(replace(CONFIG, cells_total=256))
    drive.submit(work("a", prompt=150, tokens_max=1))
    drive.run()
    drive.submit(work("b", prompt=150, tokens_max=1, first=1000))
    drive.run()
    drive.submit(work("c", prompt=150, tokens_max=1))
    assert drive.step().places[0].keep_tokens == 0


def test_running_sequences_sit_beside_each_other() -> None:
    drive = Drive()
    drive.submit(*(work(f"w{i}", first=1000 * i, tokens_max=5 + 50 * (i % 2)) for i in range(4)))
    while len(drive.finished()) < 2:
        drive.step()
    drive.submit(work("new", first=9000))
    plan = drive.step()
    slots = sorted(s.slot for s in plan.slices)
    assert slots == list(range(slots[0], slots[0] + len(slots)))


# --- misuse --------------------------------------------------------------------------------


def test_planning_twice_without_commit_raises() -> None:
    drive = Drive()
    drive.submit(work("a"))
    drive.batcher.plan(0.0)
    with pytest.raises(AssertionError, match="without commit"):
        drive.batcher.plan(0.0)


def test_committing_without_a_plan_or_with_foreign_results_raises() -> None:
    drive = Drive()
    with pytest.raises(AssertionError, match="without a plan"):
        drive.batcher.commit([], 0.0)
    drive.submit(work("a"))
    drive.batcher.plan(0.0)
    with pytest.raises(AssertionError, match="not what was planned"):
        drive.batcher.commit([Sampled(id="b", token_ids=(1,))], 0.0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"slots": 0}, "slots"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
        ({"mixed_tokens": 4}, "mixed_tokens"),
        ({"context_tokens": 4}, "context_tokens"),
        ({"cells_total": 100}, "cells_total"),
        ({"cells_total": 5000}, "cells_total"),
        ({"queue_max": -1}, "queue_max"),
        ({"ageing_s": 0.0}, "ageing_s"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Batcher(replace(CONFIG, **change))  # type: ignore[arg-type]
    assert refused.value.field == field


# --- numbers -------------------------------------------------------------------------------


def test_load_counts_what_is_pending_and_how_fast_it_goes() -> None:
    drive = Drive(replace(ONE, prefill_tokens=8, mixed_tokens=8))
    drive.submit(work("a", prompt=20, tokens_max=30), work("b", prompt=7, tokens_max=11))
    drive.step()
    load = drive.batcher.load()
    assert (load.running, load.queued, load.slots_free) == (1, 1, 0)
    assert load.pending_prefill_tokens == 12 + 7
    assert load.pending_decode_tokens == 30 + 11
    assert load.kv_cells_used == 49
    assert load.prefill_tokens_per_s == pytest.approx(8 / 0.018)
    drive.step(), drive.step(), drive.step()
    assert drive.batcher.load().decode_tokens_per_s == pytest.approx(1 / 0.011)


# --- drafts --------------------------------------------------------------------------------

REPEATING = Work(id="a", prompt_token_ids=tuple(range(100, 120)) * 2, tokens_max=30)


def drawn(plan: StepPlan, kept: int, then: int = 7) -> list[Sampled]:
    """The first tokens of the only slice's draft, and another one."""
    (piece,) = plan.slices
    return [Sampled(id=piece.id, token_ids=(*piece.draft[:kept], then))]


def decoding_alone(config: BatcherConfig = CONFIG, one: Work = REPEATING) -> Batcher:
    """A batcher in which ``one`` has drawn its first token: the one that its prompt repeats."""
    batcher = Batcher(config)
    batcher.submit(one, 0.0)
    batcher.commit(drawn(batcher.plan(0.0), 0, then=100), 0.1)
    return batcher


def test_a_sequence_that_is_alone_gets_a_draft_where_it_repeats_itself() -> None:
    batcher = decoding_alone()
    plan = batcher.plan(0.1)
    (piece,) = plan.slices
    assert (piece.position, piece.token_ids, piece.draft) == (40, (100,), tuple(range(101, 116)))
    assert plan.tokens == 16
    (output,) = batcher.commit(drawn(plan, 3), 0.2)
    assert (output.first_token_index, output.token_ids) == (1, (101, 102, 103, 7))
    batcher.check()
    (after,) = batcher.plan(0.2).slices
    assert (after.position, after.token_ids) == (44, (7,))


def test_of_a_draft_that_fails_nothing_counts_as_computed() -> None:
    batcher = decoding_alone()
    batcher.commit(drawn(batcher.plan(0.1), 0), 0.2)
    assert batcher.position("a") == (0, 41, [*REPEATING.prompt_token_ids, 100, 7], "")


def test_a_draft_leaves_room_for_the_last_token() -> None:
    batcher = decoding_alone(one=replace(REPEATING, tokens_max=5))
    plan = batcher.plan(0.1)
    assert plan.slices[0].draft == (101, 102, 103)
    (output,) = batcher.commit(drawn(plan, 3), 0.2)
    assert output.finish is FinishReason.LENGTH
    assert output.usage is not None
    assert output.usage.completion_tokens == 5


@pytest.mark.parametrize("other", ["running", "waiting"])
def test_nobody_else_pays_for_a_draft(other: str) -> None:
    batcher = decoding_alone(CONFIG if other == "running" else replace(CONFIG, slots=1, cells_total=256))
    batcher.submit(work("b", prompt=5, first=1000), 0.1)
    plan = batcher.plan(0.1)
    assert len(plan.slices) == (2 if other == "running" else 1)
    assert [s.draft for s in plan.slices] == [()] * len(plan.slices)


@pytest.mark.parametrize("change", [{"draft_tokens_max": 0}, {"cuttable": False}])
def test_there_are_no_drafts_where_they_are_not_wanted_or_could_not_be_taken_back(
    change: dict[str, int],
) -> None:
    batcher = decoding_alone(replace(CONFIG, **change))
    assert batcher.plan(0.1).slices[0].draft == ()


def test_what_was_drawn_must_follow_the_draft() -> None:
    batcher = decoding_alone()
    batcher.plan(0.1)
    with pytest.raises(AssertionError):
        batcher.commit([Sampled(id="a", token_ids=(101, 99, 103))], 0.2)


# --- properties ----------------------------------------------------------------------------

WORKS = st.lists(
    st.builds(
        lambda prompt, tokens_max, first, priority, tenant, resume: (
            prompt,
            tokens_max,
            first,
            priority,
            tenant,
            resume,
        ),
        st.integers(1, 150),
        st.integers(1, 40),
        st.sampled_from([0, 0, 1000, 2000]),
        st.sampled_from(list(Priority)),
        st.sampled_from(["", "a", "b"]),
        st.integers(0, 45),
    ),
    min_size=1,
    max_size=25,
)
ACTIONS = st.lists(st.sampled_from(["step", "step", "step", "cancel", "pause", "resume"]), max_size=60)


@settings(max_examples=60)
@given(WORKS, ACTIONS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_request_ends_exactly_once_with_all_its_tokens(works, actions, slots, random) -> None:  # type: ignore[no-untyped-def]
    config = replace(CONFIG, slots=slots, cells_total=max(256, 200 * slots), queue_max=25)
    drive, cancelled, expected = Drive(config), set(), {}
    pending = list(enumerate(works))
    for action in [*actions, *["step"] * 5]:
        if pending and random.random() < 0.5:
            number, (prompt, tokens_max, first, priority, tenant, resume) = pending.pop(0)
            resume = min(resume, tokens_max - 1)
            drive.submit(
                work(
                    f"w{number}",
                    prompt=prompt,
                    tokens_max=tokens_max,
                    first=first,
                    priority=priority,
                    tenant=tenant,
                    resume_token_ids=tuple(range(5000, 5000 + resume)),
                )
            )
            expected[f"w{number}"] = list(range(resume, tokens_max))
        name = f"w{random.randrange(len(works))}"
        if action == "step":
            drive.step()
        elif action == "cancel":
            if drive.batcher.cancel(name):
                cancelled.add(name)
        else:
            getattr(drive.batcher, action)(name)
        drive.batcher.check()
    for name in expected:
        drive.batcher.resume(name)
    drive.run()
    assert drive.batcher.load() == replace(
        drive.batcher.load(), running=0, queued=0, kv_cells_used=0, pending_decode_tokens=0
    )
    for name, indices in expected.items():
        got = drive.indices(name)
        if name in cancelled:
            assert got == indices[: len(got)]
            assert name not in drive.finished()
        else:
            assert got == indices
            assert drive.finished().count(name) == 1


@settings(max_examples=80)
@given(
    WORKS,
    st.sampled_from([0, 100, 500]),
    st.sampled_from([0, 150, 600]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_what_a_slot_holds_is_always_what_the_plan_builds_on(works, parked, stored, cuttable, random) -> None:  # type: ignore[no-untyped-def]
    """A model cache driven by the plans alone, with states that come and go, transfers that take their time
    and fail, and places that turn out empty, holds each sequence's true tokens at every step."""
    config = replace(
        CONFIG,
        queue_max=25,
        parked_cells=parked,
        stored_cells=stored,
        cuttable=cuttable,
        store_tokens_min=20,
        restore_tokens_min=8,
    )
    batcher, now = Batcher(config), 0.0
    slots: dict[int, list[int]] = {i: [] for i in range(3 * CONFIG.slots)}
    states: dict[str, list[int]] = {}
    loaded: tuple[str, list[int]] = ("", [])
    transfer: Callable[[], None] | None = None
    truth: dict[str, list[int]] = {}
    coming = list(enumerate(works))
    for _ in range(3000):
        while coming and (random.random() < 0.3 or not truth):
            number, (prompt, tokens_max, first, priority, tenant, _resume) = coming.pop()
            one = work(f"w{number}", prompt, tokens_max, first, priority=priority, tenant=tenant)
            truth[one.id] = list(one.prompt_token_ids)
            batcher.submit(one, now)
        if transfer is not None and random.random() < 0.5:
            transfer = transfer()
            batcher.check()
        plan = batcher.plan(now)
        batcher.check()
        for name in plan.drops:
            del states[name]
        if (save := plan.save) is not None:
            taken = slots[save.slot][: len(save.token_ids)]
            assert tuple(taken) == save.token_ids == tuple(slots[save.slot])
            good = random.random() < 0.8
            states.update({save.name: taken} if good else {})
            assert transfer is None
            loaded = ("", [])  # one buffer for all
            transfer = lambda n=save.name, ok=good: batcher.cache.saved(n, ok=ok)  # noqa: E731
        if plan.fetch:
            loaded, good = (plan.fetch, states[plan.fetch]), random.random() < 0.8
            assert transfer is None
            transfer = lambda n=plan.fetch, ok=good: batcher.cache.fetched(n, ok=ok)  # noqa: E731
        empty = set()
        for place in plan.places:
            assert not place.state or place.state == loaded[0]
            held = loaded[1] if place.state else slots[place.source]
            if place.source in empty or random.random() < 0.1:
                held = []
                empty.add(place.slot)
            else:
                assert cuttable or place.keep_tokens in (0, len(held))
                assert len(held) >= place.keep_tokens
            slots[place.slot] = held[: place.keep_tokens]
        slices = batcher.restart(empty) if empty else plan.slices
        batcher.check()
        if slices:
            assert len({s.slot for s in slices}) == len(slices)
            results = []
            for piece in slices:
                assert len(slots[piece.slot]) == piece.position
                slots[piece.slot].extend(piece.token_ids)
                assert not piece.draft or (cuttable and len(slices) == 1)
                assert slots[piece.slot] == truth[piece.id][: len(slots[piece.slot])]
                assert len(slots[piece.slot]) + len(piece.draft) <= CONFIG.context_tokens
                if piece.sample:  # answers repeat themselves, so that there are drafts, of which some hold
                    held = piece.draft[: random.randint(0, len(piece.draft))]
                    said = len(truth[piece.id]) + len(held)
                    results.append(Sampled(id=piece.id, token_ids=(*held, 7000 + said % 5)))
                    truth[piece.id].extend(results[-1].token_ids)
                    slots[piece.slot].extend(held)
            now += 0.01
            batcher.commit(results, now)
            batcher.check()
        elif transfer is None and not coming:
            break
    assert (batcher.load().running, batcher.load().queued) == (0, 0)
    for number, (prompt, tokens_max, *_rest) in enumerate(works):
        assert len(truth[f"w{number}"]) == prompt + tokens_max


@settings(max_examples=60)
@given(WORKS, st.sampled_from([0, 300]), st.booleans())
def test_nothing_starves_while_interactive_requests_keep_coming(works, stored, disk_works) -> None:  # type: ignore[no-untyped-def]
    """Each request of any priority is done within a bounded virtual time of an endless foreground load, with
    preempted ones saved or computed again."""
    drive = Drive(replace(CONFIG, slots=2, cells_total=512, queue_max=60, ageing_s=0.5, stored_cells=stored))
    drive.transfer_steps, drive.disk_works = 3, disk_works
    for number, (prompt, tokens_max, first, priority, tenant, _resume) in enumerate(works):
        drive.submit(
            work(
                f"w{number}",
                prompt=prompt,
                tokens_max=tokens_max,
                first=first,
                priority=priority,
                tenant=tenant,
            )
        )
    for number in range(5000):
        if drive.batcher.load().queued < 30:
            drive.submit(work(f"i{number}", priority=Priority.INTERACTIVE, tenant="flood", first=number))
        drive.step()
        if {f"w{n}" for n in range(len(works))} <= set(drive.finished()):
            break
    else:
        raise AssertionError("starved")
    assert drive.now < 40.0
