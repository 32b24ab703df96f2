"""Tools through OpenAI's and Ollama's own libraries, unmodified, at a node that does not own the domain.

Goal: calls come as these libraries read them, streamed or not, and their results go back to the model.
Method: where the model decides, a fake one says what it is told to; where a call is demanded, the real
llama.cpp with a tiny random model must make a valid one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import ollama
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from fieldmesh.core.model import Message, Prompt, Tool, ToolCall, Tools
from fieldmesh.runtime.node import running
from tests.engine.tiny_model import write_tiny_model
from tests.gateway.site import OPEN, doors, say, tiny, url
from tests.runtime.test_node import Site, new_site

__all__ = ["doors", "tiny"]

HELLO: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
ROME, OSLO = (json.dumps({"name": "weather", "arguments": {"city": city}}) for city in ("Rome", "Oslo"))
TWO_CALLS = f"Let me see. <tool_call>\n{ROME}\n</tool_call>\n<tool_call>\n{OSLO}\n</tool_call>"


@pytest.fixture
async def client(doors: Site) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=url(doors) + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("tools")
    async with new_site(folder, write_tiny_model(folder / "tiny.gguf")) as site:
        for name in ("general", "code"):
            node = running(site.config(name, name, **OPEN))
            site.nodes[name] = await site.stack.enter_async_context(node)
        await site.formed()
        yield site


async def test_calls_come_whole(client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, TWO_CALLS)
    answer = await client.chat.completions.create(model="code", messages=HELLO, tools=[WEATHER, TIME])
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls = choice.message.tool_calls or []
    assert [(c.type, c.function.name, json.loads(c.function.arguments)["city"]) for c in calls] == [
        ("function", "weather", "Rome"),
        ("function", "weather", "Oslo"),
    ]
    assert len({call.id for call in calls}) == 2


async def test_calls_are_streamed_name_first(client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, TWO_CALLS)
    begun: dict[int, tuple[str | None, str | None]] = {}
    arguments: dict[int, list[str]] = {0: [], 1: []}
    text, ends = "", []
    async for chunk in await client.chat.completions.create(
        model="code", messages=HELLO, tools=[WEATHER], stream=True
    ):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        ends.append(choice.finish_reason)
        for part in choice.delta.tool_calls or ():
            assert part.function is not None
            if part.index not in begun:
                assert (part.type, part.function.name) == ("function", "weather")
                begun[part.index] = (part.id, part.function.name)
            else:
                assert (part.id, part.function.name) == (None, None)
            arguments[part.index].append(part.function.arguments or "")
    assert text == "Let me see."
    assert ["".join(pieces) for pieces in arguments.values()] == ['{"city": "Rome"}', '{"city": "Oslo"}']
    assert len(arguments[0]) > 1
    assert [end for end in ends if end] == ["tool_calls"]


async def test_the_librarys_own_assembly_of_a_stream_agrees(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, TWO_CALLS)
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    async with client.chat.completions.stream(model="code", messages=HELLO, tools=[strict]) as stream:
        events = [event.type async for event in stream]
        answer = await stream.get_final_completion()
    assert events.count("tool_calls.function.arguments.done") == 2
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [{"city": "Rome"}, {"city": "Oslo"}]


async def test_one_call_at_a_time_where_no_more_are_wanted(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, TWO_CALLS)
    answer = await client.chat.completions.create(
        model="code", messages=HELLO, tools=[WEATHER], parallel_tool_calls=False
    )
    assert [call.function.arguments for call in answer.choices[0].message.tool_calls or ()] == [
        '{"city": "Rome"}'
    ]
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_without_tools_what_looks_like_a_call_is_text(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, ROME)
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [TIME]}):
        answer = await client.chat.completions.create(model="code", messages=HELLO, **options)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ROME, "stop")
        assert answer.choices[0].message.tool_calls is None


async def test_a_round_of_calls_and_results_reaches_the_model(
    doors: Site, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, ROME)
    seen = []
    engine = doors.engines["code"]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: seen.append(job) or submit(job))
    first = await client.chat.completions.create(model="code", messages=HELLO, tools=[WEATHER])
    message = first.choices[0].message
    (call,) = message.tool_calls or ()
    turns = [*HELLO, message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    say(monkeypatch, "It is sunny.")
    second = await client.chat.completions.create(model="code", messages=turns, tools=[WEATHER])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is sunny.", "stop")
    assert seen[1].prompt == Prompt(
        messages=(
            Message(role="user", content=HELLO[0]["content"]),
            Message(
                role="assistant",
                content="",
                tool_calls=(ToolCall(id=call.id, name="weather", arguments='{"city": "Rome"}'),),
            ),
            Message(role="tool", content="sun", tool_call_id=call.id),
        ),
        tools=Tools(
            offered=(
                Tool(
                    name="weather",
                    description="Tells it.",
                    parameters=json.dumps(PARAMETERS, separators=(",", ":")),
                ),
            )
        ),
    )


REFUSED = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "tools[0].parameters"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
     "messages[0].tool_calls[0].arguments"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
]  # fmt: skip


async def test_what_cannot_be_done_with_tools_is_refused_by_the_parameter(client: AsyncOpenAI) -> None:
    told = []
    for options, _ in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="code", messages=HELLO, extra_body=options)
        told.append(caught.value.param)
    assert told == [param for _, param in REFUSED]


async def test_ollamas_library_reads_calls_too(doors: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, TWO_CALLS)
    async with ollama.AsyncClient(host=url(doors)) as client:
        whole = await client.chat("code", HELLO, tools=[WEATHER])
        parts = [part async for part in await client.chat("code", HELLO, tools=[WEATHER], stream=True)]
        told = [call for part in parts for call in part.message.tool_calls or ()]
        assert [call.function.arguments for call in whole.message.tool_calls or ()] == [
            {"city": "Rome"},
            {"city": "Oslo"},
        ]
        assert told == whole.message.tool_calls
        assert "".join(part.message.content or "" for part in parts) == whole.message.content == "Let me see."
        assert (whole.done_reason, parts[-1].done_reason) == ("stop", "stop")
        say(monkeypatch, '{"name": "weather", "arguments": {"city": Rome}}')
        odd = await client.chat("code", HELLO, tools=[WEATHER])
        assert (odd.message.content, odd.message.tool_calls) == (
            '{"name": "weather", "arguments": {"city": Rome}',
            None,
        )
        say(monkeypatch, "It is sunny.")
        turns = [*HELLO, whole.message, {"role": "tool", "content": "sun", "tool_name": "weather"}]
        again = await client.chat("code", turns, tools=[WEATHER])
        assert again.message.content == "It is sunny."


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_demanded_call_is_valid_whatever_the_model(real: Site, choice: Any) -> None:
    async with AsyncOpenAI(base_url=url(real) + "/v1", api_key="none", max_retries=0) as client:
        ask: Any = {
            "model": "code", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "seed": 3,
            "max_tokens": 200,
        }  # fmt: skip
        whole = await client.chat.completions.create(**ask)
        (call,) = whole.choices[0].message.tool_calls or ()
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
        assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("tool_calls", None)
        pieces = ""
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            for part in chunk.choices[0].delta.tool_calls or ():
                pieces += (part.function and part.function.arguments) or ""
        assert pieces == call.function.arguments
