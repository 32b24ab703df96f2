"""What an engine can do reaches the caller through another node.

Goal: nothing that a request says, and nothing that an answer holds, is lost on a hop. Method: two whole nodes
in this process over the real llama.cpp with a tiny model.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fieldmesh.client import AsyncClient
from fieldmesh.core.errors import ConstraintInvalid, InvalidRequest
from fieldmesh.core.model import FinishReason, Message, Tool, Tools
from fieldmesh.runtime.node import running
from tests.engine.tiny_model import write_tiny_model
from tests.runtime.test_node import ONCE, Site, new_site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("real")
    async with new_site(folder, write_tiny_model(folder / "tiny.gguf")) as site:
        for name in ("general", "code"):
            site.nodes[name] = await site.stack.enter_async_context(running(site.config(name, name)))
        await site.formed()
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(mesh: Site) -> AsyncIterator[AsyncClient]:
    """Asks the generalist; what demands the profile `code` goes over a hop."""
    async with AsyncClient(mesh.nodes["general"].client_address, persistence=ONCE) as made:
        yield made


async def test_a_constraint_holds_over_a_hop(client: AsyncClient) -> None:
    stream = client.chat("hello", profile="code", regex="(field|mesh){3}", max_tokens=50, temperature=1.0)
    result = await stream.result()
    assert (result.served_by, result.hops) == ("code", 1)
    assert re.fullmatch("(field|mesh){3}", result.text)


async def test_a_demanded_call_and_its_result_go_over_a_hop(client: AsyncClient) -> None:
    schema = '{"properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}'
    tools = Tools(offered=(Tool(name="weather", parameters=schema),), required=True)
    asked = Message(role="user", content="What is the weather?")
    stream = client.chat([asked], profile="code", tools=tools, max_tokens=200, n=2)
    parts = [(chunk, part) async for chunk in stream for part in chunk.tool_calls]
    result = await stream.result()
    assert (result.served_by, result.finish_reason) == ("code", FinishReason.TOOL_CALLS)
    calls = [call for choice in result.choices for call in choice.tool_calls]
    assert [call.name for call in calls] == ["weather"] * 2
    assert all(json.loads(call.arguments)["city"] in ("Rome", "Oslo") for call in calls)
    assert {chunk.call_id(part) for chunk, part in parts} == {call.id for call in calls}
    assert len({call.id for call in calls}) == 2
    answered = [
        asked,
        Message(role="assistant", content=result.text, tool_calls=result.tool_calls),
        Message(role="tool", content="sun", tool_call_id=result.tool_calls[0].id),
    ]
    again = await client.chat(answered, profile="code", tools=[*tools.offered], max_tokens=3).result()
    assert again.prompt_tokens > result.prompt_tokens
    with pytest.raises(InvalidRequest, match="conversations"):
        client.generate("hello", tools=tools)


async def test_several_answers_come_over_a_hop_and_share_their_prompt(client: AsyncClient) -> None:
    prompt = "the field mesh of edge nodes, with words enough to be worth a copy. " * 4
    options = {"profile": "code", "max_tokens": 9, "temperature": 1.0, "ignore_eos": True}
    stream = client.generate(prompt, n=3, seed=40, **options)
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.index] += chunk.text
    result = await stream.result()
    assert [choice.text for choice in result.choices] == texts
    assert [choice.seed for choice in result.choices] == [40, 41, 42]
    assert (result.completion_tokens, result.text, result.hops) == (27, texts[0], 1)
    assert len({choice.token_ids for choice in result.choices}) == 3
    for choice in result.choices:
        alone = await client.generate(prompt, seed=choice.seed, **options).result()
        assert alone.token_ids == choice.token_ids


async def test_a_prompt_is_computed_once_for_all_its_answers(mesh: Site, client: AsyncClient) -> None:
    tally = mesh.nodes["code"].models.hosted["code"].tally
    prompt = "Nobody has asked this before: what do the nodes of a mesh say to each other at night? " * 8
    tokens = len((await client.tokenize(prompt, profile="code")).token_ids)
    assert tokens > 200
    before = tally.prefix_queried_tokens - tally.prefix_hit_tokens
    result = await client.generate(prompt, profile="code", n=4, max_tokens=3, temperature=1.0).result()
    assert (result.prompt_tokens, len(result.choices)) == (tokens, 4)
    assert tally.prefix_queried_tokens - tally.prefix_hit_tokens - before <= tokens + 3 * 2


async def test_logprobs_come_over_a_hop(client: AsyncClient) -> None:
    result = await client.chat("hi", profile="code", logprobs=3, max_tokens=4, ignore_eos=True).result()
    (choice,) = result.choices
    assert [entry.drawn.token_id for entry in choice.logprobs] == list(choice.token_ids)
    for entry in choice.logprobs:
        assert len(entry.top) == 3
        assert entry.drawn.logprob <= entry.top[0].logprob <= 0


async def test_a_bias_holds_over_a_hop(client: AsyncClient) -> None:
    (letter,) = (await client.tokenize("z", profile="code")).token_ids[-1:]
    result = await client.chat("hi", profile="code", logit_bias={letter: 100.0}, max_tokens=5).result()
    assert result.text == "zzzzz"


async def test_vectors_come_over_a_hop_and_are_those_of_the_node_itself(
    mesh: Site, client: AsyncClient
) -> None:
    texts = ["the field", "a mesh of nodes", "the field"]
    made = await client.embed(texts, profile="code")
    assert (made.served_by, made.profile) == ("code", "code")
    async with AsyncClient(mesh.nodes["code"].client_address, persistence=ONCE) as there:
        itself = await there.embed(texts, profile="code")
    assert made.vectors == itself.vectors
    assert made.vectors[0] == pytest.approx(made.vectors[2], abs=1e-5)
    assert made.model_fingerprint == itself.model_fingerprint != ""


async def test_a_schema_that_cannot_be_enforced_is_refused_over_a_hop(client: AsyncClient) -> None:
    with pytest.raises(ConstraintInvalid, match="not") as caught:
        await client.chat("hello", profile="code", json_schema={"not": {}}).result()
    assert caught.value.field == "sampling_params.json_schema"
