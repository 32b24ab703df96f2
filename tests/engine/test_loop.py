"""Goal: the loop reports every job's life in order and once. Method: the fake model, time by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fieldmesh.core.model import EngineState, FinishReason, Message, Prompt, Sampling
from fieldmesh.engine.cost import CostModel, prompt_digest, sample_step, token_at
from fieldmesh.engine.fake import FakeModel
from fieldmesh.engine.frames import (
    Accepted,
    Cancel,
    Done,
    Failed,
    Pause,
    Ping,
    Report,
    Resume,
    Statistics,
    Submit,
    Tokenize,
    Tokenized,
    Tokens,
)
from fieldmesh.engine.loop import EngineLoop
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import GREEDY, job

SETTINGS = EngineSettings(model_path="fake", slots=2, context_tokens=256, queue_max=1, mixed_tokens=8)


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Driven:
    def __init__(self, settings: EngineSettings = SETTINGS) -> None:
        self.loop = EngineLoop(settings, FakeModel(), new_seed=lambda: 42)
        self.time = Time()
        self.reports: list[Report] = []

    def tell(self, command: object) -> None:
        self.reports += self.loop.handle(command, self.time())  # type: ignore[arg-type]

    def run(self, steps_max: int = 1000) -> None:
        for _ in range(steps_max):
            plan, reports = self.loop.plan(self.time())
            self.reports += reports
            if not plan.slices:
                return
            self.reports += self.loop.run(plan, self.time)

    def of(self, key: int) -> list[Report]:
        return [r for r in self.reports if getattr(r, "key", None) == key]


def test_a_job_is_accepted_streamed_and_done() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), None))
    driven.run()
    kinds = [type(r) for r in driven.of(1)]
    assert kinds == [Accepted, *[Tokens] * 24, Done]
    done = driven.of(1)[-1]
    assert isinstance(done, Done)
    assert (done.completion.finish_reason, done.completion.seed) == (FinishReason.LENGTH, 42)


def test_an_end_token_ends_the_answer_without_text() -> None:
    driven = Driven()
    driven.tell(
        Submit(1, job("a", prompt="x", sampling=replace(GREEDY, ignore_eos=False, max_tokens=250)), None)
    )
    driven.run()
    last, done = driven.of(1)[-2:]
    assert isinstance(last, Tokens) and isinstance(done, Done)
    if done.completion.finish_reason is FinishReason.STOP:
        assert last.text == ""
        assert last.token_ids == (257,)
    assert done.completion.usage.completion_tokens == last.first_token_index + 1


def test_held_back_text_comes_with_the_last_token() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), None))
    driven.run()
    text = "".join(r.text for r in driven.of(1) if isinstance(r, Tokens))
    again = Driven()
    again.tell(Submit(1, job("a", sampling=replace(GREEDY, stop=(text[-3:] + "never",))), None))
    again.run()
    tokens = [r for r in again.of(1) if isinstance(r, Tokens)]
    assert "".join(r.text for r in tokens) == text
    assert tokens[-1].text.endswith(text[-3:])


def test_a_cancelled_job_is_not_heard_of_again() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), None))
    driven.run(steps_max=3)
    heard = len(driven.of(1))
    driven.tell(Cancel(1))
    driven.run()
    assert len(driven.of(1)) == heard


def test_a_cancel_while_a_step_is_computed_is_obeyed_at_its_end() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), None))
    plan, _ = driven.loop.plan(driven.time())
    driven.tell(Cancel(1))
    reports = driven.loop.run(plan, driven.time)
    assert [type(r) for r in reports] == [Statistics]
    assert driven.loop.batcher.load().running == 0


def test_a_paused_job_produces_nothing_until_resumed() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), None))
    driven.run(steps_max=3)
    driven.tell(Pause(1))
    heard = len(driven.of(1))
    driven.run()
    assert len(driven.of(1)) == heard
    driven.tell(Resume(1))
    driven.run()
    assert isinstance(driven.of(1)[-1], Done)


def test_a_deadline_is_reported_with_what_was_reached() -> None:
    driven = Driven()
    driven.tell(Submit(1, job("a"), driven.time.now + 0.01))
    driven.run()
    failure = driven.of(1)[-1]
    assert isinstance(failure, Failed)
    assert failure.code == "DEADLINE_EXCEEDED"
    assert driven.loop.deadline is None


def test_refusals_name_code_and_field() -> None:
    driven = Driven()
    for key in range(1, 5):
        driven.tell(Submit(key, job(str(key)), None))
    (refused,) = driven.of(4)
    assert isinstance(refused, Failed)
    assert refused.code == "QUEUE_FULL"


def test_ping_and_tokenize_are_answered_between_steps() -> None:
    driven = Driven()
    driven.tell(Ping())
    driven.tell(Tokenize(9, Prompt(text="ab")))
    statistics, tokenized = driven.reports
    assert isinstance(statistics, Statistics)
    assert statistics.load.engine is EngineState.READY
    assert tokenized == Tokenized(9, (256, 97, 98))


def test_a_model_without_a_template_takes_text_but_no_messages() -> None:
    model = FakeModel()
    model.chat_template = ""
    loop = EngineLoop(SETTINGS, model, new_seed=lambda: 1)
    messages = (Message(role="user", content="x"),)
    (refused,) = loop.handle(Tokenize(1, Prompt(messages=messages)), 0.0)
    assert isinstance(refused, Failed)
    assert "chat_template" in refused.message
    assert not loop.has_chat_template


def test_warming_up_measures_speed_and_leaves_nothing_running() -> None:
    driven = Driven()
    driven.loop.warm_up(driven.time)
    load = driven.loop.batcher.load()
    assert load.running == 0
    assert load.prefill_tokens_per_s > 0
    assert load.decode_tokens_per_s > 0


# --- the cost model ------------------------------------------------------------------------------


def test_a_simulator_can_drive_the_scheduler_without_the_loop() -> None:
    driven = Driven()
    batcher, cost, now = driven.loop.batcher, CostModel(), 0.0
    driven.tell(Submit(1, job("a", sampling=Sampling(max_tokens=10, ignore_eos=True)), None))
    digests, indices, tokens = {"1": prompt_digest((1, 2, 3))}, {"1": 0}, []
    while (plan := batcher.plan(now)).slices:
        now += cost.step_s(plan)
        for output in batcher.commit(sample_step(plan, digests, indices, 100), now):
            indices[output.id] = output.first_token_index + len(output.token_ids)
            tokens.extend(output.token_ids)
    assert tokens == [token_at(digests["1"], index, 100) for index in range(10)]
    assert 0.1 < now < 0.3


def test_more_rows_cost_more_and_prefill_is_cheaper_a_token_than_decode() -> None:
    driven = Driven()
    batcher, cost = driven.loop.batcher, CostModel()
    driven.tell(Submit(1, Job(generation_id="a", prompt=Prompt(token_ids=(5,) * 100), sampling=GREEDY), None))
    plan = batcher.plan(0.0)
    assert plan.tokens == 100
    assert cost.step_s(plan) == pytest.approx(0.006 + 100 * 0.0026)
