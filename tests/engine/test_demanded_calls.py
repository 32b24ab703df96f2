"""Goal: a call that is demanded is valid whatever the model, and is told in pieces as it is made.

Method: the embedded default model in the engine's process; its template knows no tools.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from fieldmesh.core.errors import ConstraintInvalid, InvalidRequest
from fieldmesh.core.model import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Message,
    Prompt,
    Sampling,
    Tool,
    ToolCallPart,
    Tools,
)
from fieldmesh.core.tools import merged
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine, Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import Answer, ask
from tests.engine.tiny_model import default_model_path

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

WEATHER = Tool(
    name="get_weather",
    description="Tells the weather in a city.",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"City": {"type": "string", "maxLength": 20}},
        }
    ),
)
TIME = Tool(name="get_time", description="Tells what time it is.")
OFFERED = (WEATHER, TIME)
SAMPLING = Sampling(temperature=1.0, seed=1, max_tokens=150)


def question(tools: Tools, sampling: Sampling = SAMPLING, resumed: tuple[int, ...] = ()) -> Job:
    messages = (Message(role="user", content="What is the weather in Rome?"),)
    prompt = Prompt(messages=messages, tools=tools)
    return Job(generation_id="t", prompt=prompt, sampling=sampling, resume_token_ids=resumed)


def calls(answer: Answer) -> tuple[ToolCallPart, ...]:
    return merged([part for chunk in answer.chunks for part in chunk.tool_calls])


def reason(answer: Answer) -> FinishReason:
    assert answer.completion is not None
    return answer.completion.finish_reason


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineProcess]:
    made = EngineProcess(EngineSettings(model_path=str(default_model_path()), slots=2))
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("seed", range(4))
async def test_a_required_call_names_a_tool_and_satisfies_its_schema(engine: Engine, seed: int) -> None:
    answer = await ask(engine, question(Tools(offered=OFFERED, required=True), replace(SAMPLING, seed=seed)))
    (call,) = calls(answer)
    arguments = json.loads(call.arguments)
    if call.name == "get_weather":
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("C", "F")
    else:
        assert (call.name, arguments) == ("get_time", {})
    assert (answer.text, reason(answer)) == ("", FinishReason.TOOL_CALLS)


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
async def test_a_named_tool_is_the_one_that_is_called(engine: Engine, name: str) -> None:
    answer = await ask(engine, question(Tools(offered=OFFERED, required=True, named=name)))
    assert [call.name for call in calls(answer)] == [name]


async def test_the_arguments_are_told_as_they_are_made(engine: Engine) -> None:
    named = Tools(offered=OFFERED, required=True, named="get_weather")
    answer = await ask(engine, question(named))
    told = [part for chunk in answer.chunks for part in chunk.tool_calls]
    assert [part.name for part in told if part.name] == [told[0].name] == ["get_weather"]
    assert len(told) > 3


async def test_a_call_that_was_interrupted_goes_on_where_it_was(engine: Engine) -> None:
    named = Tools(offered=OFFERED, required=True, named="get_weather")
    greedy = replace(SAMPLING, temperature=0.0)
    whole = await ask(engine, question(named, greedy))
    for cut in (3, 15, len(whole.token_ids) - 1, len(whole.token_ids)):
        rest = await ask(engine, question(named, greedy, tuple(whole.token_ids[:cut])))
        assert [*whole.token_ids[:cut], *rest.token_ids] == whole.token_ids
        assert calls(whole)[0].arguments.endswith("".join(part.arguments for part in calls(rest)))
        assert reason(rest) is FinishReason.TOOL_CALLS


async def test_a_call_that_is_cut_off_says_so(engine: Engine) -> None:
    named = Tools(offered=OFFERED, required=True, named="get_weather")
    answer = await ask(engine, question(named, replace(SAMPLING, max_tokens=25)))
    assert reason(answer) is FinishReason.LENGTH


async def test_beside_a_schema_the_answer_is_a_call_or_a_document(engine: Engine) -> None:
    schema = Constraint(kind=ConstraintKind.JSON_SCHEMA, source=WEATHER.parameters)
    told = set()
    for seed in range(8):
        sampling = replace(SAMPLING, seed=seed, temperature=1.5, constraint=schema)
        answer = await ask(engine, question(Tools(offered=(TIME,)), sampling))
        if calls(answer):
            assert answer.text == ""
        else:
            assert set(json.loads(answer.text)) == {"city", "unit"}
        told.add(bool(calls(answer)))
    assert told  # which of the two is the model's choice


async def test_what_cannot_be_held_is_refused(engine: Engine) -> None:
    odd = Tool(name="odd", parameters='{"not": {}}')
    with pytest.raises(ConstraintInvalid, match="tools cannot be enforced") as caught:
        await ask(engine, question(Tools(offered=(odd,), required=True)))
    assert caught.value.field == "tools"
    with pytest.raises(InvalidRequest) as refused:
        regex = Constraint(kind=ConstraintKind.REGEX, source="a")
        await ask(engine, question(Tools(offered=OFFERED), replace(SAMPLING, constraint=regex)))
    assert refused.value.field == "sampling_params.regex"
    with pytest.raises(InvalidRequest) as overrun:
        required = Tools(offered=OFFERED, required=True)
        await ask(engine, question(required, replace(SAMPLING, ignore_eos=True)))
    assert overrun.value.field == "sampling_params.ignore_eos"
    large = Tool(name="large", parameters=json.dumps({"description": "x" * 70_000}))
    with pytest.raises(ConstraintInvalid, match="tools has 7"):
        await ask(engine, question(Tools(offered=(large,), required=True)))
    assert calls(await ask(engine, question(Tools(offered=OFFERED, required=True))))
