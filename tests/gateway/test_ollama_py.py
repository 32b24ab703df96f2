"""Ollama's own library, unmodified, and curl, at a node that does not own the domain.

Method: nodes in this process with real listeners and the real core; the model behind the scheduler is fake.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator

import ollama
import pytest
from ollama import AsyncClient

from fieldmesh.core.model import EngineState
from tests.gateway.site import doors, slow_down, tiny, url
from tests.runtime.test_node import Site, idle

__all__ = ["doors", "tiny"]

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(doors: Site) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(host=url(doors)) as made:
        yield made


async def test_a_stream_says_the_same_as_one_document(client: AsyncClient) -> None:
    options = {"temperature": 0, "num_predict": 30, "num_ctx": 99, "stop": ["zzz"]}
    whole = await client.chat("code:latest", HELLO, options=options, keep_alive="5m", tools=[])
    parts = [part async for part in await client.chat("code", HELLO, options=options, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (whole.done, whole.model, parts[-1].model) == (True, "tiny", "tiny")
    assert parts[-1].done_reason == whole.done_reason
    assert parts[-1].eval_count == whole.eval_count
    assert parts[-1].prompt_eval_count
    assert parts[-1].total_duration


async def test_a_prompt_is_a_question_unless_it_is_raw(doors: Site, client: AsyncClient) -> None:
    options = {"temperature": 0, "num_predict": 8}
    asked = await client.generate("code", "hello", system="Be brief.", options=options)
    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert asked.response == (await client.chat("code", chat, options=options)).message.content
    raw = await client.generate("code", "hello", raw=True, options=options)
    async with doors.client("general") as ours:
        same = await ours.generate("hello", profile="code", temperature=0.0, max_tokens=8).result()
    assert raw.response == same.text
    parts = [
        part async for part in await client.generate("code", "hello", raw=True, options=options, stream=True)
    ]
    assert "".join(part.response for part in parts) == raw.response


async def test_a_model_can_be_warmed_up_by_asking_nothing(client: AsyncClient) -> None:
    warmed = await client.generate("code")
    assert (warmed.done, warmed.done_reason, warmed.response) == (True, "load", "")
    assert (await client.chat("code", [])).done_reason == "load"
    with pytest.raises(ollama.ResponseError) as caught:
        await client.generate("gpt", "")
    assert caught.value.status_code == 404


async def test_what_there_is_can_be_listed_and_shown(client: AsyncClient) -> None:
    names = ["auto", "code", "general", "tiny"]
    assert [model.model for model in (await client.list()).models] == names
    assert [model.model for model in (await client.ps()).models] == names[1:]
    shown = await client.show("code")
    assert shown.modelinfo == {
        "general.architecture": "fieldmesh",
        "general.basename": "tiny",
        "fieldmesh.profile": "code",
        "fieldmesh.context_length": 2048,
    }
    assert shown.capabilities == ["completion", "tools", "embedding"]
    with pytest.raises(ollama.ResponseError) as caught:
        await client.show("gpt")
    assert (caught.value.status_code, "code" in caught.value.error) == (404, True)


async def test_vectors_are_those_of_the_mesh(doors: Site, client: AsyncClient) -> None:
    made = await client.embed("code", ["hello", "there"])
    async with doors.client("general") as ours:
        same = await ours.embed(["hello", "there"], profile="code")
    assert [tuple(vector) for vector in made.embeddings] == list(same.vectors)
    assert made.prompt_eval_count == same.prompt_tokens
    assert tuple((await client.embeddings("code", "hello")).embedding) == same.vectors[0]


async def test_only_what_answers_now_counts_as_loaded(doors: Site, client: AsyncClient) -> None:
    doors.engines["code"].lose(EngineState.FAILED)
    node = doors.nodes["general"]
    view = node.view
    async with asyncio.timeout(20):
        while "code" in {model.model for model in (await client.ps()).models}:
            view = await node._driver.wait_view_changed(view.revision)
    assert "code" in {model.model for model in (await client.list()).models}


async def test_thinking_is_refused_by_a_model_that_cannot(client: AsyncClient) -> None:
    assert (await client.chat("code", HELLO, think=False, options={"num_predict": 2})).message.content
    with pytest.raises(ollama.ResponseError, match="no thinking mode"):
        await client.chat("code", HELLO, think="high")


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        ({"model": "gpt"}, 404, "tiny"),
        ({"options": {"temperature": 9}}, 400, "temperature is 9"),
        ({"format": {"type": "object"}}, 400, "constraints"),
        ({"messages": [{"role": "user", "content": "x", "images": [b"x"]}]}, 400, "text only"),
    ],
)
async def test_refusals_are_told_in_ollamas_words(
    client: AsyncClient, given: dict[str, object], status: int, told: str
) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        await client.chat(**{"model": "code", "messages": HELLO, **given})
    assert (caught.value.status_code, told in caught.value.error) == (status, True)


async def test_a_loss_midway_ends_the_stream_with_an_error(doors: Site, client: AsyncClient) -> None:
    parts = await client.chat("code", HELLO, stream=True, options={"num_predict": 2000, "temperature": 0})
    await anext(parts)
    doors.engines["code"].lose()
    with pytest.raises(ollama.ResponseError, match="lost"):
        async for _ in parts:
            pass


async def test_curl_streams_and_stops_the_engine_when_it_is_killed(doors: Site) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("CURL IS MISSING: the HTTP door was not tried with it (Debian: package curl)")
    slow_down(doors, "code")
    body = {"model": "code", "messages": HELLO, "stream": True, "max_tokens": 2000, "ignore_eos": True}
    process = await asyncio.create_subprocess_exec(
        curl, "-sN", f"{url(doors)}/v1/chat/completions", "-d", json.dumps(body),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert (await process.stdout.readline()).startswith(b'data: {"id":"chatcmpl-')
    process.kill()
    await process.wait()
    await idle(doors)
