"""Goal: the real and the fake engine keep the port's word alike. Method: one suite over both; the real one
runs a tiny random model in its own process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from fieldmesh.core.errors import (
    DeadlineExceeded,
    EngineLost,
    EngineNotReady,
    GenerationNotFound,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    SlowReader,
    StateRefused,
)
from fieldmesh.core.model import Chunk, EngineState, FinishReason, Message, Prompt, Sampling
from fieldmesh.engine.cost import CostModel
from fieldmesh.engine.fake import FakeEngine
from fieldmesh.engine.front import EngineFront
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine, Job
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import SequenceState
from tests.engine.asking import GREEDY, ask, chat, drain, job, wait_load
from tests.engine.tiny_model import write_tiny_model

FAST = CostModel(step_base_s=0.0005, decode_row_s=0.0, prefill_token_s=0.0)
pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS, QUEUE_MAX, CONTEXT_TOKENS = 2, 2, 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def make_engine(kind: str, model: Path) -> EngineFront:
    settings = EngineSettings(
        model_path=str(model),
        slots=SLOTS,
        queue_max=QUEUE_MAX,
        context_tokens=CONTEXT_TOKENS,
        stream_tokens_max=8,
        slow_reader_timeout_s=0.3,
        state_bytes_max=1 << 24,
    )
    return EngineProcess(settings) if kind == "real" else FakeEngine(settings, cost=FAST)


@pytest_asyncio.fixture(params=["real", "fake"], scope="module", loop_scope="module")
async def engine(request: pytest.FixtureRequest, model: Path) -> AsyncIterator[Engine]:
    made = make_engine(request.param, model)
    await made.start()
    yield made
    await made.close()


@pytest.fixture(params=["real", "fake"])
def unstarted(request: pytest.FixtureRequest, model: Path) -> Engine:
    return make_engine(request.param, model)


async def test_an_engine_that_was_not_started_takes_nothing(unstarted: Engine) -> None:
    assert unstarted.load().engine is EngineState.LOADING
    assert not unstarted.load().accepting
    with pytest.raises(EngineNotReady, match="loading"):
        await ask(unstarted, job("a"))
    await unstarted.close()


async def test_a_job_starts_streams_and_completes(engine: Engine) -> None:
    answer = await ask(engine, job("a"))
    assert answer.started is not None
    assert answer.completion is not None
    assert answer.completion.finish_reason is FinishReason.LENGTH
    assert len(answer.token_ids) == GREEDY.max_tokens == answer.completion.usage.completion_tokens
    assert answer.started.prompt_tokens == answer.completion.usage.prompt_tokens > 0
    assert answer.chunks[0].first_token_index == 0
    assert answer.text


async def test_the_same_greedy_prompt_gives_the_same_answer(engine: Engine) -> None:
    assert (await ask(engine, job("a"))).token_ids == (await ask(engine, job("b"))).token_ids


async def test_a_seed_fixes_the_draws_and_is_reported(engine: Engine) -> None:
    drawn = Sampling(temperature=1.0, max_tokens=20, ignore_eos=True)
    first = await ask(engine, job("a", sampling=drawn))
    assert first.completion is not None
    again = await ask(engine, job("b", sampling=replace(drawn, seed=first.completion.seed)))
    other = await ask(engine, job("c", sampling=replace(drawn, seed=first.completion.seed + 1)))
    assert again.token_ids == first.token_ids != other.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_resumed_job_goes_on_as_if_never_interrupted(engine: Engine, temperature: float) -> None:
    sampling = replace(GREEDY, temperature=temperature, seed=5)
    whole = await ask(engine, job("a", sampling=sampling))
    delivered = tuple(whole.token_ids[:9])
    rest = await ask(engine, job("b", sampling=sampling, resume_token_ids=delivered, epoch=3))
    assert rest.chunks[0].first_token_index == 9
    assert rest.chunks[0].epoch == 3
    assert [*delivered, *rest.token_ids] == whole.token_ids
    assert rest.completion is not None
    assert rest.completion.usage.completion_tokens == len(whole.token_ids)
    assert whole.text.endswith(rest.text)


async def test_a_job_whose_last_token_was_delivered_completes_at_once(engine: Engine) -> None:
    whole = await ask(engine, job("a"))
    rest = await ask(engine, job("b", resume_token_ids=tuple(whole.token_ids)))
    assert rest.token_ids == []
    assert rest.completion is not None
    assert rest.completion.finish_reason is FinishReason.LENGTH


async def test_a_stop_string_ends_the_answer_before_itself(engine: Engine) -> None:
    whole = await ask(engine, job("a"))
    stop = whole.text[4:7]
    cut = await ask(engine, job("b", sampling=replace(GREEDY, stop=(stop,))))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.completion is not None
    assert (cut.completion.finish_reason, cut.completion.matched_stop) == (FinishReason.STOP, stop)


async def test_a_stop_token_ends_the_answer_without_its_text(engine: Engine) -> None:
    whole = await ask(engine, job("a"))
    stop = whole.token_ids[5]
    cut = await ask(engine, job("b", sampling=replace(GREEDY, stop_token_ids=(stop,))))
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert cut.completion is not None
    assert cut.completion.finish_reason is FinishReason.STOP


async def test_a_stop_token_waits_for_min_tokens(engine: Engine) -> None:
    whole = await ask(engine, job("a"))
    sampling = replace(GREEDY, ignore_eos=False, min_tokens=12)
    answer = await ask(engine, job("b", sampling=sampling))
    assert len(answer.token_ids) >= 12
    assert whole.token_ids[:12] == answer.token_ids[:12]


async def test_more_jobs_than_slots_all_finish(engine: Engine) -> None:
    jobs = [ask(engine, job(f"j{i}", prompt=f"field {i}")) for i in range(SLOTS + QUEUE_MAX)]
    answers = await asyncio.gather(*jobs)
    assert all(len(a.token_ids) == GREEDY.max_tokens for a in answers)


async def test_answers_side_by_side_equal_answers_alone(engine: Engine) -> None:
    prompts = ["the field", "a mesh of stone and so on", "er"]
    alone = [(await ask(engine, job(f"a{i}", prompt=p))).token_ids for i, p in enumerate(prompts)]
    together = await asyncio.gather(*(ask(engine, job(f"b{i}", prompt=p)) for i, p in enumerate(prompts)))
    assert [a.token_ids for a in together] == alone


async def test_a_repeated_prompt_is_cached_and_answers_the_same(engine: Engine) -> None:
    prompt = "a prompt that no other test has " * 3
    cold, warm = await ask(engine, job("a", prompt=prompt)), await ask(engine, job("b", prompt=prompt))
    assert cold.completion is not None and warm.completion is not None
    assert cold.completion.usage.cached_tokens == 0
    assert warm.completion.usage.cached_tokens == warm.completion.usage.prompt_tokens - 1
    assert warm.token_ids == cold.token_ids


async def test_messages_pass_through_the_chat_template(engine: Engine) -> None:
    prompt = Prompt(messages=(Message(role="user", content="hello"),))
    answer = await ask(engine, chat("a", "hello"))
    assert answer.started is not None
    assert answer.started.prompt_tokens == len(await engine.tokenize(prompt))


async def test_token_ids_and_text_are_the_same_prompt(engine: Engine) -> None:
    token_ids = await engine.tokenize(Prompt(text="the field mesh"))
    by_ids = Job(generation_id="b", prompt=Prompt(token_ids=token_ids), sampling=GREEDY)
    assert (await ask(engine, job("a"))).token_ids == (await ask(engine, by_ids)).token_ids


async def test_closing_the_iterator_frees_the_slot(engine: Engine) -> None:
    endless = replace(GREEDY, max_tokens=4000)
    events = engine.submit(job("a", sampling=endless))
    await anext(events)
    assert (await wait_load(engine, lambda load: load.running == 1)).kv_cells_used > 4000
    await events.aclose()  # type: ignore[attr-defined]
    await wait_load(engine, lambda load: load.running == 0)


async def test_a_generation_id_in_use_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    events = engine.submit(job("a", sampling=replace(GREEDY, max_tokens=4000)))
    await anext(events)
    with pytest.raises(InvalidRequest, match="runs here already"):
        await ask(engine, job("a"))
    await events.aclose()  # type: ignore[attr-defined]
    await ask(engine, job("a"))


async def test_a_full_queue_refuses_with_a_time_to_come_back(engine: Engine) -> None:
    endless = replace(GREEDY, max_tokens=4000)
    streams = [engine.submit(job(f"j{i}", sampling=endless)) for i in range(SLOTS + QUEUE_MAX)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(QueueFull) as refused:
        await ask(engine, job("one-too-many"))
    assert refused.value.retry_after_s
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_sequence_can_be_taken_out_and_gone_on_with(engine: Engine, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=7, max_tokens=300, ignore_eos=True)
    one = job("a", "the field mesh " * 20, sampling=sampling)
    whole = await ask(engine, one)
    running = engine.submit(one)
    delivered = 0
    while not delivered:
        event = await anext(running)
        delivered = len(event.token_ids) if isinstance(event, Chunk) else 0
    state = await engine.export("a")
    await running.aclose()  # type: ignore[attr-defined]
    done = state.header.token_ids[state.header.prompt_tokens :]
    assert len(done) >= delivered
    await engine.import_(state)
    rest = await ask(engine, state.job("b"))
    assert [*done, *rest.token_ids] == whole.token_ids
    assert rest.completion is not None
    assert rest.completion.usage.completion_tokens == 300
    assert rest.completion.usage.cached_tokens >= state.header.prompt_tokens - 1


async def test_what_does_not_run_cannot_be_taken_out(engine: Engine) -> None:
    with pytest.raises(GenerationNotFound):
        await engine.export("nobody")


async def test_junk_is_not_taken_in(engine: Engine) -> None:
    running = engine.submit(job("a", sampling=replace(GREEDY, max_tokens=4000)))
    while not isinstance(await anext(running), Chunk):
        pass
    state = await engine.export("a")
    await running.aclose()  # type: ignore[attr-defined]
    with pytest.raises(StateRefused):
        await engine.import_(SequenceState(state.header, state.envelope[:-1]))
    with pytest.raises(StateRefused, match="keeps"):
        await engine.import_(SequenceState(state.header, bytes(1 << 25)))


async def test_a_deadline_ends_a_running_job(engine: Engine) -> None:
    with pytest.raises(DeadlineExceeded, match="of 4000 tokens"):
        await ask(engine, job("a", sampling=replace(GREEDY, max_tokens=4000), deadline_s=0.01))
    await wait_load(engine, lambda load: load.running == 0)


async def test_a_deadline_already_past_is_said_so(engine: Engine) -> None:
    with pytest.raises(DeadlineExceeded):
        await ask(engine, job("a", deadline_s=-1.0))


async def test_an_unread_stream_is_paused_then_ended_and_others_go_on(engine: Engine) -> None:
    events = engine.submit(job("slow", sampling=replace(GREEDY, max_tokens=4000)))
    await anext(events)
    await ask(engine, job("other"))
    await wait_load(engine, lambda load: load.running == 0)
    with pytest.raises(SlowReader, match=r"not read for 0\.3 s"):
        await drain(events)


async def test_a_slow_reader_who_reads_in_time_loses_nothing(engine: Engine) -> None:
    sampling = replace(GREEDY, max_tokens=60)
    events = engine.submit(job("slow", sampling=sampling))
    started = [await anext(events)]
    await ask(engine, job("other"))  # meanwhile the unread stream fills and is paused
    answer = await ask(engine, job("same", sampling=sampling))
    read = await drain(events)
    assert started
    assert sum(len(getattr(e, "token_ids", ())) for e in read) == 60
    assert [t for e in read for t in getattr(e, "token_ids", ())] == answer.token_ids


def from_ids(*token_ids: int) -> Job:
    return Job(generation_id="a", prompt=Prompt(token_ids=token_ids), sampling=GREEDY)


@pytest.mark.parametrize(
    ("bad", "error", "field"),
    [
        (job("a", prompt=""), InvalidRequest, "prompt.text"),
        (Job(generation_id="a", prompt=Prompt(), sampling=GREEDY), InvalidRequest, "prompt"),
        (from_ids(1 << 30), InvalidRequest, "prompt.token_ids"),
        (from_ids(-1), InvalidRequest, "prompt.token_ids"),
        (Job(generation_id="", prompt=Prompt(text="x"), sampling=GREEDY), InvalidRequest, "generation_id"),
        (chat("a", "x", role="cat"), InvalidRequest, "messages[0].role"),
        (chat("a", "  "), InvalidRequest, "messages"),
        (job("a", prompt="\ud800"), InvalidRequest, "prompt"),
        (job("a", prompt="long " * 1000), PromptTooLong, "prompt"),
        (job("a", prompt="x" * (5 << 20)), PromptTooLong, "prompt"),
        (job("a", prompt="x" * 300_000), PromptTooLong, "prompt"),
        (job("a", resume_token_ids=(5,) * 5000), PromptTooLong, "resume_token_ids"),
        (job("a", resume_token_ids=(1 << 30,)), InvalidRequest, "resume_token_ids"),
        (job("a", deadline_s=math.nan), InvalidRequest, "deadline_s"),
        (job("a", sampling=replace(GREEDY, temperature=-1)), InvalidRequest, "temperature"),
        (job("a", sampling=replace(GREEDY, temperature=math.nan)), InvalidRequest, "temperature"),
        (job("a", sampling=replace(GREEDY, top_p=2)), InvalidRequest, "top_p"),
        (job("a", sampling=replace(GREEDY, min_p=-0.1)), InvalidRequest, "min_p"),
        (job("a", sampling=replace(GREEDY, top_k=-1)), InvalidRequest, "top_k"),
        (job("a", sampling=replace(GREEDY, repetition_penalty=0)), InvalidRequest, "repetition_penalty"),
        (job("a", sampling=replace(GREEDY, max_tokens=0)), InvalidRequest, "max_tokens"),
        (job("a", sampling=replace(GREEDY, max_tokens=1 << 40)), InvalidRequest, "max_tokens"),
        (job("a", sampling=replace(GREEDY, seed=-1)), InvalidRequest, "seed"),
        (job("a", sampling=replace(GREEDY, stop=("",))), InvalidRequest, "stop"),
        (job("a", sampling=replace(GREEDY, stop=("\ud800",))), InvalidRequest, "stop"),
        (job("a", sampling=replace(GREEDY, stop=("x",) * 99)), InvalidRequest, "stop"),
        (job("a", sampling=replace(GREEDY, stop_token_ids=(1 << 30,))), InvalidRequest, "stop_token_ids"),
    ],
)  # fmt: skip
async def test_bad_input_is_refused_by_field_and_the_engine_lives(
    engine: Engine, bad: Job, error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as refused:
        await ask(engine, bad)
    assert refused.value.field == field  # type: ignore[attr-defined]
    await ask(engine, job("fine", sampling=replace(GREEDY, max_tokens=1)))


async def test_a_closed_engine_ends_its_jobs_and_takes_no_more(unstarted: Engine) -> None:
    engine = unstarted
    await engine.start()
    events = engine.submit(job("a", sampling=replace(GREEDY, max_tokens=4000)))
    await anext(events)
    await engine.close()
    with pytest.raises(EngineLost):
        await drain(events)
    with pytest.raises(EngineNotReady):
        await ask(engine, job("b"))
    assert engine.load().engine is EngineState.LOST
    assert not engine.load().accepting


async def test_load_tells_of_work_and_of_speed(engine: Engine) -> None:
    idle = await wait_load(engine, lambda load: load.running == 0)
    assert (idle.engine, idle.running, idle.slots_free) == (EngineState.READY, 0, SLOTS)
    await ask(engine, job("a", prompt="the field mesh " * 8))
    load = await wait_load(engine, lambda load: load.running == 0)
    assert load.prefill_tokens_per_s > 0
    assert load.decode_tokens_per_s > 0
    assert load.pending_decode_tokens == load.pending_prefill_tokens == 0
