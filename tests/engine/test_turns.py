"""Goal: loops over one model take turns: fairly, small steps beside streams of others, none where there is no
work. Method: the real loop over the fake model, on a clock that the model's steps advance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fieldmesh.core.errors import DeadlineExceeded
from fieldmesh.core.steps import Slice, StepPlan
from fieldmesh.engine.fake import FakeModel
from fieldmesh.engine.frames import Done, Embed, Embedded, Failed, Pause, Report, Submit
from fieldmesh.engine.loop import EngineLoop
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.turns import Seat, Turns
from tests.engine.asking import GREEDY, job

SETTINGS = EngineSettings(model_path="fake", slots=2, context_tokens=512, prefill_tokens=64, mixed_tokens=8)
LONG = replace(GREEDY, max_tokens=200)


class Table:
    """Loops by name at one table. ``steps`` are (name, tokens), in order; a token takes a millisecond."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.steps: list[tuple[str, int]] = []
        self.plans: list[str] = []
        self.reports: list[Report] = []
        self.turns = Turns(lambda: self.now)
        self.seats = {name: self.join(name) for name in names}

    def join(self, name: str) -> Seat:
        table = self

        class Model(FakeModel):
            def run(self, slices: Sequence[Slice]) -> Mapping[str, int]:
                tokens = sum(len(piece.token_ids) for piece in slices)
                table.steps.append((name, tokens))
                table.now += tokens / 1000
                return super().run(slices)

        class Loop(EngineLoop):
            def plan(self, now: float, **more: Any) -> tuple[StepPlan, list[Report]]:
                table.plans.append(name)
                return super().plan(now, **more)

        return self.turns.join(Loop(SETTINGS, Model(), new_seed=lambda: 1), self.reports.extend)

    def submit(self, name: str, key: int = 1, **more: Any) -> None:
        self.seats[name].handle([Submit(key, job(f"{name}{key}", **more), None)], self.now)

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.turns.round()

    def until_idle(self) -> None:
        while self.turns.wait_s() == 0.0:
            self.turns.round()


def test_each_loop_with_work_makes_one_step_a_round() -> None:
    table = Table("a", "b", "c")
    for name in table.seats:
        table.submit(name, sampling=LONG)
    table.rounds(20)
    assert [name for name, _ in table.steps] == ["a", "b", "c"] * 20


def test_many_streams_of_one_do_not_take_the_turn_of_another() -> None:
    table = Table("a", "b")
    table.submit("a", 1, sampling=LONG)
    table.submit("a", 2, sampling=LONG)
    table.submit("b", sampling=LONG)
    table.rounds(40)
    assert [name for name, _ in table.steps] == ["a", "b"] * 40


def test_a_long_prompt_of_one_does_not_hold_up_the_streams_of_another() -> None:
    table = Table("a", "b")
    table.submit("a", sampling=LONG)
    table.rounds(3)
    table.submit("b", prompt="x" * 300, sampling=GREEDY)
    table.rounds(20)
    largest = max(tokens for name, tokens in table.steps if name == "b")
    assert largest <= SETTINGS.mixed_tokens
    assert [name for name, _ in table.steps[3:]] == ["a", "b"] * 20


def test_a_prompt_is_read_in_large_steps_where_nobody_else_streams() -> None:
    table = Table("a", "b")
    table.submit("b", prompt="x" * 300, sampling=GREEDY)
    table.rounds(2)
    assert table.steps == [("b", SETTINGS.prefill_tokens)] * 2


def test_a_loop_without_work_is_not_even_asked() -> None:
    table = Table("a", "b", "c")
    table.until_idle()
    table.plans.clear()
    table.submit("b", sampling=LONG)
    table.until_idle()
    assert set(table.plans) == {"b"}


def test_a_loop_that_comes_later_takes_turns_and_one_that_left_takes_none() -> None:
    table = Table("a", "b")
    table.submit("a", sampling=LONG)
    table.submit("b", sampling=LONG)
    table.rounds(2)
    table.turns.leave(table.seats.pop("a"))
    table.seats["c"] = table.join("c")
    table.submit("c", sampling=LONG)
    table.steps.clear()
    table.rounds(3)
    assert [name for name, _ in table.steps] == ["b", "c"] * 3


def test_an_idle_table_waits_for_a_command_and_a_paused_one_for_its_deadline() -> None:
    table = Table("a", "b")
    table.until_idle()
    assert table.turns.wait_s() is None
    table.seats["a"].handle([Submit(1, job("a", sampling=LONG), 5.0)], table.now)
    table.turns.round()
    table.seats["a"].handle([Pause(1)], table.now)
    table.until_idle()
    wait_s = table.turns.wait_s()
    assert wait_s is not None
    assert table.now + wait_s == 5.0
    table.now = 5.0
    table.until_idle()
    (failed,) = (r for r in table.reports if isinstance(r, Failed))
    assert failed.code == DeadlineExceeded.code


def test_every_job_and_every_text_comes_to_its_end() -> None:
    table = Table("a", "b")
    for key in range(1, 6):
        table.submit("a", key)
        table.submit("b", key)
    table.seats["b"].handle([Embed(9, ("one", "two"), None)], table.now)
    table.until_idle()
    assert sum(isinstance(r, Done) for r in table.reports) == 10
    assert sum(isinstance(r, Embedded) for r in table.reports) == 1
