"""OpenAI's Responses API through its own library, unmodified, at a node that does not own the domain.

Method: nodes in this process with real listeners and the real core; the model behind the scheduler is fake,
and says what it is told to where that matters. What must hold an answer to a schema is the real llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from pydantic import BaseModel

from fieldmesh.core.errors import QueueFull
from fieldmesh.core.model import Message, Prompt, ToolCall
from fieldmesh.engine.fake import FakeModel
from fieldmesh.runtime import http_responses
from fieldmesh.runtime.node import running
from tests.engine.tiny_model import write_tiny_model
from tests.gateway.site import OPEN, doors, say, slow_down, tiny, url
from tests.runtime.test_node import Site, idle, new_site

__all__ = ["doors", "tiny"]

HELLO = "What is the weather in Rome?"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
ROME = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
CALLED = f"Let me see. <tool_call>\n{ROME}\n</tool_call>"


@pytest.fixture
async def client(doors: Site) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=url(doors) + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("responses")
    async with new_site(folder, write_tiny_model(folder / "tiny.gguf")) as site:
        for name in ("general", "code"):
            node = running(site.config(name, name, **OPEN))
            site.nodes[name] = await site.stack.enter_async_context(node)
        await site.formed()
        yield site


async def events_of(stream: Any) -> list[Any]:
    """All events; their numbers count up from 0."""
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


async def test_a_question_is_answered(client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "It is sunny.")
    raw = await client.responses.with_raw_response.create(
        model="code", input=HELLO, instructions="Be brief.", temperature=0.5, metadata={"a": "b"}
    )
    answer = raw.parse()
    assert raw.headers["x-fieldmesh-served-by"] == "code"
    assert (answer.output_text, answer.status, answer.model) == ("It is sunny.", "completed", "tiny")
    assert (answer.instructions, answer.temperature, answer.metadata) == ("Be brief.", 0.5, {"a": "b"})
    assert answer.usage is not None
    assert answer.usage.output_tokens == len("It is sunny.") + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert type(answer).model_validate(answer.model_dump()) == answer  # every field as the library has it


async def test_a_stream_says_the_same_in_typed_events(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, CALLED)
    events = await events_of(
        await client.responses.create(model="code", input=HELLO, tools=[WEATHER], stream=True)
    )
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if kinds[at - 1] != kind] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
    whole = events[-1].response
    assert text == whole.output_text == "Let me see."
    said, called = whole.output
    assert (called.type, called.name, called.status) == ("function_call", "weather", "completed")
    assert "".join(piece.delta for piece in pieces) == called.arguments == '{"city": "Rome"}'
    assert len(pieces) > 1
    assert {piece.item_id for piece in pieces} == {called.id}
    assert [event.item.id for event in events if event.type == "response.output_item.done"] == [
        said.id,
        called.id,
    ]
    assert events[0].response.id == whole.id
    again = await client.responses.retrieve(whole.id)
    assert again == whole
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True))


async def test_the_librarys_own_assembly_of_a_stream_agrees(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, CALLED)
    async with client.responses.stream(model="code", input=HELLO, tools=[WEATHER]) as stream:
        last = [event async for event in stream][-1]
        answer = await stream.get_final_response()
    assert last.type == "response.completed"
    assert answer.output_text == "Let me see."
    assert getattr(answer.output[1], "parsed_arguments", None) == {"city": "Rome"}


async def test_a_round_of_calls_and_results_reaches_the_model(
    doors: Site, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Prompt] = []
    engine = doors.engines["code"]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: seen.append(job.prompt) or submit(job))
    say(monkeypatch, CALLED)
    first = await client.responses.create(
        model="code", input=HELLO, tools=[WEATHER], instructions="Be brief."
    )
    called = first.output[1]
    assert called.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": called.call_id, "output": "sun"}
    say(monkeypatch, "It is sunny.")
    by_hand: Any = [{"role": "user", "content": HELLO}, *first.output, result]
    for more in ({"previous_response_id": first.id, "input": [result]}, {"input": by_hand}):
        second = await client.responses.create(model="code", tools=[WEATHER], **more)
        assert second.output_text == "It is sunny."
    assert seen[0].messages[0] == Message(role="system", content="Be brief.")
    assert (
        seen[1].messages
        == seen[2].messages
        == (
            Message(role="user", content=HELLO),
            Message(
                role="assistant",
                content="Let me see.",
                tool_calls=(ToolCall(id=called.call_id, name="weather", arguments='{"city": "Rome"}'),),
            ),
            Message(role="tool", content="sun", tool_call_id=called.call_id),
        )
    )


async def test_a_conversation_goes_on_from_what_is_kept(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "One.")
    first = await client.responses.create(model="code", input="Count.")
    second = await client.responses.create(model="code", input="On.", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        await client.responses.retrieve(first.id)
    assert gone.value.code == "response_not_found"
    third = await client.responses.create(model="code", input="On.", previous_response_id=second.id)
    assert third.status == "completed"


async def test_what_is_not_kept_cannot_be_gone_on_from(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    unkept = await client.responses.create(model="code", input="hello", store=False, max_output_tokens=3)
    for response_id in (unkept.id, "resp_nobody"):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="code", input="x", previous_response_id=response_id)
        assert (caught.value.code, caught.value.param) == (
            "previous_response_not_found",
            "previous_response_id",
        )
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(response_id)


async def test_only_so_much_is_kept(tmp_path: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_responses, "KEPT_MAX", 2)
    async with new_site(tmp_path, tiny) as site:
        await site.start("general", **OPEN)
        await site.formed()
        async with AsyncOpenAI(base_url=url(site) + "/v1", api_key="none", max_retries=0) as client:
            made = [
                await client.responses.create(model="general", input="hello", max_output_tokens=2)
                for _ in range(3)
            ]
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made[0].id)
            assert (await client.responses.retrieve(made[1].id)).output == made[1].output


async def test_an_answer_that_was_cut_off_is_incomplete(client: AsyncOpenAI) -> None:
    ask: Any = {"model": "code", "input": "hello", "max_output_tokens": 4, "temperature": 0.0}
    whole = await client.responses.create(**ask)
    assert whole.incomplete_details is not None
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = await events_of(await client.responses.create(**ask, stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "incomplete")
    assert events[-1].response.output_text == whole.output_text


async def test_an_answer_without_a_word_is_one_message(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "")
    answer = await client.responses.create(model="code", input="hello")
    assert (len(answer.output), answer.output_text, answer.status) == (1, "", "completed")


async def test_reasoning_is_an_item_of_its_own(
    doors: Site, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeModel, "chat_template", FakeModel.chat_template + "{# </think> #}")
    doors.engines["code"].lose()
    doors.engines["code"].recover()
    say(monkeypatch, "<think>Hm.</think>It is sunny.")
    events = await events_of(await client.responses.create(model="code", input="hello", stream=True))
    thought, said = events[-1].response.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Hm.", [])
    assert (said.type, events[-1].response.output_text) == ("message", "It is sunny.")
    told = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(told) == "Hm."
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens
    whole = await client.responses.create(model="code", input="hello")
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    by_hand: Any = [{"role": "user", "content": "hello"}, *whole.output, {"role": "user", "content": "On."}]
    assert (await client.responses.create(model="code", input=by_hand)).status == "completed"


async def test_log_probabilities_come_with_the_text(client: AsyncOpenAI) -> None:
    ask: Any = {
        "model": "code", "input": "hello", "max_output_tokens": 3, "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    whole = await client.responses.create(**ask)
    (message,) = whole.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert [len(entry.top_logprobs) for entry in part.logprobs or ()] == [2, 2, 2]


REFUSED = [
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"temperature": 9}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"metadata": 7}, "metadata"),
]


async def test_what_cannot_be_done_is_refused_by_the_parameter(client: AsyncOpenAI) -> None:
    told = []
    for options, _ in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="code", input="x", extra_body=options)
        told.append(caught.value.param)
    assert told == [param for _, param in REFUSED]


async def test_a_loss_midway_fails_the_response(doors: Site, client: AsyncOpenAI) -> None:
    slow_down(doors, "code")
    stream = await client.responses.create(model="code", input="hello", max_output_tokens=2000, stream=True)
    events = [await anext(aiter(stream))]
    doors.engines["code"].lose()
    events += [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    failed = events[-1]
    assert (failed.type, failed.response.status, failed.response.error.code) == (
        "response.failed",
        "failed",
        "server_error",
    )
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(failed.response.id)


async def test_a_client_that_leaves_stops_the_engine(doors: Site, client: AsyncOpenAI) -> None:
    slow_down(doors, "code")
    stream = await client.responses.create(model="code", input="hello", max_output_tokens=2000, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await idle(doors)


async def test_the_library_asks_again_when_it_was_told_to(
    doors: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = doors.nodes["general"]._service
    ask, refusals = service.ask, iter([QueueFull("All are full", retry_after_s=0.02)])

    def full_once(*args: Any, **options: Any) -> Any:
        if (refusal := next(refusals, None)) is not None:
            raise refusal
        return ask(*args, **options)

    monkeypatch.setattr(service, "ask", full_once)
    async with AsyncOpenAI(base_url=url(doors) + "/v1", api_key="none", max_retries=1) as client:
        answer = await client.responses.create(model="code", input="hello", max_output_tokens=3)
    assert answer.output_text


class City(StrEnum):
    ROME = "Rome"
    OSLO = "Oslo"


class Weather(BaseModel):
    city: City
    sunny: bool


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_what_must_fit_a_model_of_pydantics_does(real: Site) -> None:
    async with AsyncOpenAI(base_url=url(real) + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.responses.parse(
            model="code", input=HELLO, text_format=Weather, max_output_tokens=200
        )
        assert isinstance(answer.output_parsed, Weather)
        async with client.responses.stream(
            model="code", input=HELLO, text_format=Weather, max_output_tokens=200
        ) as stream:
            streamed = await stream.get_final_response()
        assert isinstance(streamed.output_parsed, Weather)


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_a_demanded_call_is_valid_whatever_the_model(real: Site, choice: Any) -> None:
    async with AsyncOpenAI(base_url=url(real) + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.responses.create(
            model="code", input=HELLO, tools=[WEATHER], tool_choice=choice, max_output_tokens=200
        )
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
