"""Goal: an answer under a constraint matches it, can be repeated and resumed, and costs no other stream much.
Method: the embedded default model in the engine's process.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from fieldmesh.core.errors import ConstraintInvalid, InvalidRequest
from fieldmesh.core.model import Chunk, Constraint, ConstraintKind, FinishReason, Sampling
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import ask, chat, job
from tests.engine.tiny_model import default_model_path

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "kind": {"enum": ["capital", "harbour", "village"]},
    },
    "required": ["city", "population", "kind"],
    "additionalProperties": False,
}
JSON = Constraint(kind=ConstraintKind.JSON_SCHEMA, source=json.dumps(SCHEMA))
DATE = Constraint(kind=ConstraintKind.REGEX, source="[0-9]{4}-[0-9]{2}-[0-9]{2}")
LIST = Constraint(
    kind=ConstraintKind.GRAMMAR, source='start: "- " word ("\\n- " word){2}\nword: /[a-z]{2,8}/\n'
)
QUESTION = "Describe Lisbon."
WARM = Sampling(temperature=1.0, max_tokens=120, constraint=JSON)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineProcess]:
    made = EngineProcess(EngineSettings(model_path=str(default_model_path()), slots=4))
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
async def test_an_answer_satisfies_its_schema_however_wildly_it_is_drawn(
    engine: Engine, temperature: float
) -> None:
    sampling = replace(WARM, temperature=temperature, seed=3)
    answers = await asyncio.gather(
        *(ask(engine, chat(f"c{i}", QUESTION, replace(sampling, seed=i))) for i in range(4))
    )
    for answer in answers:
        assert answer.completion is not None and answer.completion.finish_reason is FinishReason.STOP
        document = json.loads(answer.text)
        assert set(document) == set(SCHEMA["required"])
        assert document["kind"] in ("capital", "harbour", "village")
        assert 0 <= document["population"] <= 99_999_999


@pytest.mark.parametrize(("constraint", "form"), [(DATE, r"\d{4}-\d{2}-\d{2}"), (LIST, r"- \w+(\n- \w+){2}")])
async def test_regexes_and_grammars_hold_to_the_last_character(
    engine: Engine, constraint: Constraint, form: str
) -> None:
    answer = await ask(engine, chat("c", QUESTION, replace(WARM, constraint=constraint, seed=1)))
    assert re.fullmatch(form, answer.text)
    assert answer.completion is not None and answer.completion.finish_reason is FinishReason.STOP
    assert answer.completion.usage.completion_tokens == len(answer.token_ids)


async def test_a_seed_repeats_the_answer(engine: Engine) -> None:
    first, second = [await ask(engine, chat(name, QUESTION, replace(WARM, seed=11))) for name in "ab"]
    assert first.token_ids == second.token_ids


async def test_a_resumed_answer_goes_on_as_the_interrupted_one_would_have(engine: Engine) -> None:
    greedy = replace(WARM, temperature=0.0)
    whole = await ask(engine, chat("whole", QUESTION, greedy))
    assert len(whole.token_ids) > 10
    for cut in (1, 5, len(whole.token_ids) - 1, len(whole.token_ids)):
        resumed = replace(chat("rest", QUESTION, greedy), resume_token_ids=tuple(whole.token_ids[:cut]))
        rest = await ask(engine, resumed)
        assert [*whole.token_ids[:cut], *rest.token_ids] == whole.token_ids
        assert rest.completion is not None and rest.completion.finish_reason is FinishReason.STOP


async def test_tokens_that_the_constraint_does_not_allow_cannot_be_resumed(engine: Engine) -> None:
    resumed = replace(
        chat("c", QUESTION, WARM), resume_token_ids=await engine.tokenize(job("x", "no JSON").prompt)
    )
    with pytest.raises(InvalidRequest) as caught:
        await ask(engine, resumed)
    assert caught.value.field == "resume_token_ids"


async def test_an_early_end_and_a_stop_string_keep_their_meaning(engine: Engine) -> None:
    numbers = Constraint(kind=ConstraintKind.REGEX, source="[0-9]*")
    sampling = Sampling(temperature=0, max_tokens=20, min_tokens=5, constraint=numbers)
    assert len((await ask(engine, chat("c", QUESTION, sampling))).text) >= 5
    stopped = await ask(engine, chat("d", QUESTION, replace(WARM, stop=(",",))))
    assert stopped.completion is not None and stopped.completion.matched_stop == ","


async def test_a_constraint_and_no_end_contradict_each_other(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await ask(engine, chat("c", QUESTION, replace(WARM, ignore_eos=True)))
    assert caught.value.field == "sampling_params.ignore_eos"


async def test_running_streams_flow_on_while_a_hostile_constraint_is_tried(engine: Engine) -> None:
    """The trial takes a good second, a step some 20 ms: far more tokens than these come meanwhile."""
    running = engine.submit(
        job("running", "Count: one two", Sampling(temperature=0, max_tokens=1500, ignore_eos=True))
    )
    delivered = 0
    while not delivered:
        event = await anext(running)
        delivered = len(event.token_ids) if isinstance(event, Chunk) else 0
    hostile = Constraint(kind=ConstraintKind.REGEX, source=".?" * 30_000)
    refused = asyncio.create_task(ask(engine, chat("hostile", QUESTION, replace(WARM, constraint=hostile))))
    meanwhile = 0
    while not refused.done():
        event = await anext(running)
        meanwhile += len(event.token_ids) if isinstance(event, Chunk) else 0
    assert isinstance(refused.exception(), ConstraintInvalid)
    assert meanwhile >= 10
    await running.aclose()  # type: ignore[attr-defined]


async def test_a_job_that_waits_for_its_constraint_can_be_cancelled(engine: Engine) -> None:
    slow = Constraint(kind=ConstraintKind.REGEX, source=".?" * 29_000)
    waiting = asyncio.create_task(ask(engine, chat("waiting", QUESTION, replace(WARM, constraint=slow))))
    after = asyncio.create_task(ask(engine, chat("after", QUESTION, replace(WARM, constraint=DATE))))
    await asyncio.sleep(0)
    waiting.cancel()
    assert (await after).text
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engine.load().running == 0
