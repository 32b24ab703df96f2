"""OpenAI's own library, unmodified, at a node that does not own the domain. Goal: it notices no mesh.

Method: nodes in this process with real listeners and the real core; the model behind the scheduler is fake.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from fieldmesh.core.errors import QueueFull
from tests.gateway.site import doors, slow_down, tiny, url
from tests.runtime.test_node import Site, idle

__all__ = ["doors", "tiny"]

CODING = "Write a function that adds two numbers"


@pytest.fixture
async def client(doors: Site) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=url(doors) + "/v1", api_key="none", max_retries=0) as made:
        yield made


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_a_question_is_answered_by_the_specialist_and_the_headers_say_so(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="auto", messages=said(CODING), max_tokens=20, extra_body={"ignore_eos": True},
        extra_headers={"X-Request-ID": "mine-1"},
    )  # fmt: skip
    answer = raw.parse()
    assert raw.headers["x-fieldmesh-served-by"] == "code"
    assert raw.headers["x-fieldmesh-profile"] == "code"
    assert raw.headers["x-fieldmesh-attempts"] == "1"
    assert raw.headers["x-request-id"] == "mine-1"
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].message.content
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


async def test_a_stream_says_the_same_as_one_document_and_ends_with_the_usage(client: AsyncOpenAI) -> None:
    ask = {"model": "code", "messages": said("hello"), "temperature": 0.0, "max_completion_tokens": 30}
    whole = await client.chat.completions.create(**ask)
    stream = await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.headers["x-fieldmesh-served-by"] == "code"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_without_usage_has_none(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=said("hello"), max_tokens=5, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_several_answers_each_have_their_index_and_end(client: AsyncOpenAI) -> None:
    ask = {"model": "code", "messages": said("hello"), "n": 3, "seed": -7, "max_tokens": 8}
    whole = await client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert all(choice.message.content for choice in whole.choices)
    texts = ["", "", ""]
    ends = {}
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}


async def test_log_probabilities_come_with_their_alternatives(client: AsyncOpenAI) -> None:
    ask = {"model": "code", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    chat = await client.chat.completions.create(**ask, messages=said("hello"), logprobs=True, top_logprobs=2)
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 4
    assert all(len(entry.top_logprobs) == 2 and entry.logprob < 0 and entry.bytes for entry in told.content)
    text = await client.completions.create(**ask, prompt="hello", logprobs=2)
    likely = text.choices[0].logprobs
    assert likely is not None
    assert "".join(likely.tokens or ()) == text.choices[0].text
    assert likely.text_offset is not None
    assert likely.text_offset[1] == len((likely.tokens or [""])[0])


async def test_text_and_token_ids_are_continued(client: AsyncOpenAI) -> None:
    ask = {"model": "code", "temperature": 0.0, "max_tokens": 8}
    by_text = await client.completions.create(**ask, prompt=["abc"])
    by_ids = await client.completions.create(**ask, prompt=[256, *b"abc"])
    assert by_text.object == "text_completion"
    assert by_text.choices[0].text == by_ids.choices[0].text
    stream = await client.completions.create(**ask, prompt="abc", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == by_text.choices[0].text


async def test_profiles_models_and_auto_can_be_named(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["auto", "code", "general", "tiny"]
    assert (await client.models.retrieve("code")).id == "code"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
async def test_vectors_are_the_same_packed_and_as_numbers(
    doors: Site, client: AsyncOpenAI, encoding: dict[str, str]
) -> None:
    texts = ["hello", "there"]
    made = await client.embeddings.create(model="code", input=texts, **encoding)
    async with doors.client("general") as ours:
        same = await ours.embed(texts, profile="code")
    assert [tuple(entry.embedding) for entry in made.data] == list(same.vectors)
    assert made.usage.prompt_tokens == same.prompt_tokens
    assert (await client.embeddings.create(model="code", input="hello")).data[0] == made.data[0]


async def test_what_cannot_be_embedded_is_refused(client: AsyncOpenAI) -> None:
    told = []
    for options in ({"input": [1, 2]}, {"input": [""]}, {"dimensions": 3}):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(**{"model": "code", "input": "x", **options})
        told.append(caught.value.param)
    assert told == ["input", "inputs[0]", "dimensions"]
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        await client.embeddings.create(model="code", input=[[1, 2]])


async def test_what_nobody_offers_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=said("hello"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "tiny" in caught.value.message


REFUSED = [
    ({"temperature": 9}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 2**40}, "max_tokens"),
    ({"n": 17}, "n"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
    ({"stop": ["x" * 300]}, "stop[0]"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"seed": "seven"}, "seed"),
]


async def test_what_cannot_be_done_is_refused_by_the_parameter(client: AsyncOpenAI) -> None:
    told = []
    for options, _ in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="code", messages=said("x"), extra_body=options)
        told.append(caught.value.param)
        assert "sampling_params" not in caught.value.message
    assert told == [param for _, param in REFUSED]


UNREADABLE = [
    ([{"type": "image_url", "image_url": {"url": "data:"}}], "messages[0].content[0].type"),
    ("", "messages[0].content"),
    (7, "messages[0].content"),
]


async def test_content_that_cannot_be_read_is_refused(client: AsyncOpenAI) -> None:
    told = []
    for content, _ in UNREADABLE:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model="code", messages=[{"role": "user", "content": content}]
            )
        told.append(caught.value.param)
    assert told == [param for _, param in UNREADABLE]


@pytest.mark.parametrize("characters", [5000, 50_000])
async def test_a_prompt_over_the_context_is_told_as_litellm_and_langchain_look_for_it(
    client: AsyncOpenAI, characters: int
) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is too long") as caught:
        await client.chat.completions.create(model="code", messages=said("x" * characters))
    assert caught.value.code == "context_length_exceeded"


async def test_what_is_not_known_is_ignored(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="code",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "me"},
        ],
        max_tokens=3,
        user="someone",
        store=True,
        tools=[],
        parallel_tool_calls=False,
        metadata={"a": "b"},
        extra_body={"never_heard_of": {"this": 1}, "stream_options": None},
    )
    assert answer.choices[0].finish_reason


async def test_a_client_that_leaves_stops_the_engine_behind_a_hop(doors: Site, client: AsyncOpenAI) -> None:
    slow_down(doors, "code")
    stream = await client.chat.completions.create(
        model="code", messages=said("hello"), max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    assert doors.engines["code"].load().running == 1
    await stream.close()
    await idle(doors)


async def test_a_client_that_waits_for_a_whole_answer_and_leaves_stops_it_too(
    doors: Site, client: AsyncOpenAI
) -> None:
    slow_down(doors, "code")
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(
            model="code",
            messages=said("hello"),
            max_tokens=2000,
            extra_body={"ignore_eos": True},
            timeout=0.3,
        )
    await idle(doors)


async def test_a_node_that_leaves_says_so_and_when_to_ask_again(doors: Site) -> None:
    doors.nodes["general"]._service.drain()
    async with AsyncOpenAI(base_url=url(doors) + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="general", messages=said("hello"))
    assert caught.value.response.status_code == 503
    assert (caught.value.code, caught.value.type) == ("draining", "server_error")
    assert caught.value.response.headers["retry-after"] == "0"


async def test_a_repeat_under_one_idempotency_key_is_answered_and_not_done_again(client: AsyncOpenAI) -> None:
    ask = {"model": "code", "messages": said("hello"), "max_tokens": 5, "temperature": 1.0}
    key = {"Idempotency-Key": "k 1"}
    first = await client.chat.completions.create(**ask, extra_headers=key)
    again = await client.chat.completions.create(**ask, extra_headers=key)
    assert (again.id, again.choices[0].message) == (first.id, first.choices[0].message)
    with pytest.raises(openai.ConflictError):
        await client.chat.completions.create(**{**ask, "max_tokens": 6}, extra_headers=key)


async def test_a_loss_midway_ends_the_stream_with_an_error(doors: Site, client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="code", messages=said("hello"), max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    events = aiter(stream)
    await anext(events)
    doors.engines["code"].lose()
    with pytest.raises(openai.APIError) as caught:
        async for _ in events:
            pass
    assert caught.value.code == "stream_lost"


async def test_a_schema_reaches_the_engine_as_it_was_sent(
    doors: Site, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    engine = doors.engines["code"]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda job: seen.append(job) or submit(job))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:  # the fake model enforces nothing, and says so
        await client.chat.completions.create(model="code", messages=said("x"), response_format=form)
    assert json.loads(seen[0].sampling.constraint.source) == schema
    assert caught.value.code == "constraint_invalid"


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
        raw = await client.chat.completions.with_raw_response.create(
            model="code", messages=said("hello"), max_tokens=3
        )
    assert raw.http_request.headers["x-stainless-retry-count"] == "1"
    assert raw.headers["x-fieldmesh-served-by"] == "code"
