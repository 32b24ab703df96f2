"""One trace over all hops. Goal: whatever a request went through is told by any node, in one tree.

Method: whole nodes on loopback with fake engines, asked over gRPC and HTTP; then the trace is asked for.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from fieldmesh.client import AsyncClient, Traced
from fieldmesh.config import ListenSlice
from fieldmesh.core.errors import (
    Cancelled,
    EngineLost,
    InvalidRequest,
    StreamLost,
    TraceNotFound,
)
from fieldmesh.core.model import Address
from fieldmesh.core.timeline import Timeline, timeline
from fieldmesh.runtime import traces
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import inference_pb2_grpc, trace_pb2
from tests.runtime.test_node import ANY, Site, mesh, new_site, site, tiny, until

__all__ = ["mesh", "site", "tiny"]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
HTTP = {"listen": ListenSlice(client=ANY, peer=ANY, http=ANY)}


def steps(folded: Timeline) -> list[str]:
    """Every step with its node, indented as it is nested."""
    return [f"{'  ' * row.depth}{row.node_name}: {row.span.name}" for row in folded.rows]


async def told(client: AsyncClient, name: str, holds: Callable[[Traced], bool]) -> Traced:
    """The trace as soon as ``holds`` is true of it."""
    async with asyncio.timeout(20):
        while True:
            with suppress(TraceNotFound):
                traced = await client.trace(name)
                if holds(traced):
                    return traced


async def ended(client: AsyncClient, name: str) -> Traced:
    """The trace once all of its steps have ended: a node may still be closing one that was answered."""
    return await told(
        client,
        name,
        lambda traced: all(span.ended_at is not None for node in traced.nodes for span in node.spans),
    )


async def test_a_forwarded_request_is_one_tree_over_both_nodes(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=20, ignore_eos=True)
        result = await stream.result()
        traced = await ended(client, stream.trace_id)
    assert result.trace_id == stream.trace_id == traced.trace_id
    folded = timeline(traced.nodes)
    assert steps(folded) == [
        "general: chat tiny",
        "  general: route",
        "  general: forward code",
        "    code: chat tiny",
        "      code: queue",
        "      code: prefill",
        "      code: decode",
    ]
    rows = {step.strip(): row for step, row in zip(steps(folded), folded.rows, strict=True)}
    root, served = rows["general: chat tiny"].span, rows["code: chat tiny"].span
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["gen_ai.response.model"] == "tiny"
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert [row.attributes["gen_ai.usage.output_tokens"] for row in (root, served)] == [20, 20]
    assert root.attributes["fieldmesh.request_id"] == result.request_id
    assert rows["general: forward code"].span.attributes["fieldmesh.node"] == "code"
    assert rows["general: route"].span.attributes["fieldmesh.routing.node"] == "code"
    assert (root.kind.value, rows["general: forward code"].span.kind.value) == ("server", "client")
    assert [row.span.error for row in folded.rows] == [""] * 7
    queue, prefill, decode = (rows[f"code: {name}"] for name in ("queue", "prefill", "decode"))
    assert queue.ends_s == pytest.approx(prefill.begins_s)
    assert prefill.ends_s == pytest.approx(decode.begins_s, abs=1e-3)
    assert decode.ends_s is not None
    assert decode.ends_s - decode.begins_s > 0.015  # 19 steps of a millisecond
    assert folded.moved_s == {}  # one box, one clock
    manual = (Path(__file__).parents[2] / "deploy" / "observability" / "README.md").read_text()
    ours = {name for row in folded.rows for name in row.span.attributes if name.startswith("fieldmesh.")}
    assert {name for name in ours if name.removeprefix("fieldmesh.") not in manual} == set()


async def test_a_request_that_is_answered_where_it_came_is_a_tree_too(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.generate("hello", profile="general", max_tokens=3, ignore_eos=True)
        await stream.result()
        traced = await ended(client, stream.request_id)
    assert steps(timeline(traced.nodes)) == [
        "general: text_completion tiny",
        "  general: route",
        "  general: attempt",
        "    general: queue",
        "    general: prefill",
        "    general: decode",
    ]


async def test_any_node_tells_what_others_did(site: Site) -> None:
    for name, profile in (("general", "general"), ("code", "code"), ("health", "health")):
        await site.start(name, profile)
    await site.formed()
    async with site.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=2)
        await stream.result()
        here = await ended(client, stream.trace_id)
    async with site.client("health") as client:
        for name in (stream.request_id, stream.trace_id[:8].upper()):
            assert timeline((await ended(client, name)).nodes) == timeline(here.nodes)
    assert {node.node_name for node in here.nodes} == {"general", "code"}
    assert here.silent_nodes == ()


async def test_every_step_of_a_loss_says_what_it_was(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=500, ignore_eos=True)
        async for _ in stream:
            break
        mesh.engines["code"].lose()
        with pytest.raises(StreamLost) as caught:
            await stream.result()
        traced = await ended(client, stream.trace_id)
    assert caught.value.metadata["trace_id"] == stream.trace_id
    errors = {f"{row.node_name}: {row.span.name}": row.span.error for row in timeline(traced.nodes).rows}
    assert errors == {
        "general: chat tiny": StreamLost.code,
        "general: route": "",
        "general: forward code": EngineLost.code,
        "code: chat tiny": EngineLost.code,
        "code: queue, prefill": "",  # the first token came
        "code: decode": EngineLost.code,
    }


async def test_a_request_that_is_tried_elsewhere_has_a_step_for_each_try(site: Site) -> None:
    for name in ("general", "first", "second"):
        await site.start(name, "general" if name == "general" else "code")
    await site.formed()
    tried: list[str] = []

    def refuse_once(name: str) -> None:
        local = site.nodes[name]._service.local
        run = local.run

        async def refusing(*args: Any, **options: Any) -> AsyncIterator[Any]:
            tried.append(name)
            if len(tried) == 1:
                raise EngineLost("it is gone")
            async for event in run(*args, **options):
                yield event

        local.run = refusing  # type: ignore[method-assign,assignment]

    refuse_once("first")
    refuse_once("second")
    async with site.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=2, ignore_eos=True)
        await stream.result()
        traced = await ended(client, stream.trace_id)
    rows = [row for row in timeline(traced.nodes).rows if row.depth < 2]
    assert [(row.span.name, row.span.error) for row in rows] == [
        ("chat tiny", ""),
        ("route", ""),
        (f"forward {tried[0]}", EngineLost.code),
        ("route", ""),
        (f"forward {tried[1]}", ""),
    ]
    assert [row.span.attributes.get("fieldmesh.attempt") for row in rows] == [None, None, 1, None, 2]


async def test_a_request_waits_and_tries_again_within_its_trace(mesh: Site) -> None:
    mesh.engines["code"].lose()
    await until(mesh.nodes["general"], lambda ready: "code" not in ready)
    async with mesh.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=3, ignore_eos=True)
        asking = asyncio.ensure_future(stream.result())
        running = await told(client, stream.request_id, lambda traced: "'wait'" in repr(traced))
        mesh.engines["code"].recover()
        await asking
        traced = await ended(client, stream.trace_id)
    waiting = {row.span.name: row for row in timeline(running.nodes).rows}
    assert waiting["route"].span.error == "NO_CANDIDATE"
    assert waiting["wait"].ends_s is None
    assert steps(timeline(traced.nodes))[:5] == [
        "general: chat tiny",
        "  general: route",
        "  general: wait",
        "  general: route",
        "  general: forward code",
    ]


async def test_a_caller_who_leaves_ends_every_step(mesh: Site) -> None:
    async with mesh.client("general") as client:
        async with client.chat("hello", profile="code", max_tokens=500, ignore_eos=True) as stream:
            async for _ in stream:
                break
        traced = await ended(client, stream.trace_id)
    errors = {f"{row.node_name}: {row.span.name}": row.span.error for row in timeline(traced.nodes).rows}
    assert errors["general: chat tiny"] == Cancelled.code
    assert errors["general: forward code"] == Cancelled.code
    assert errors["code: chat tiny"] == Cancelled.code


async def test_a_trace_of_the_callers_own_goes_on_here(mesh: Site) -> None:
    async with mesh.client("general") as client:
        for _ in range(2):
            await client.chat("hello", profile="code", max_tokens=2, traceparent=PARENT).result()
        traced = await ended(client, TRACE)
        with pytest.raises(InvalidRequest) as caught:
            client.chat("hello", traceparent="nonsense")
    assert caught.value.field == "traceparent"
    tops = [row.span for row in timeline(traced.nodes).rows if row.depth == 0]
    assert [top.parent_id for top in tops] == ["00f067aa0ba902b7"] * 2
    (entry,) = [node for node in traced.nodes if node.node_name == "general"]
    assert len(entry.request_ids) == 2


async def test_a_caller_who_does_not_want_to_be_sampled_is_not_at_any_hop(mesh: Site) -> None:
    async with mesh.client("general") as client:
        result = await client.chat("hello", profile="code", traceparent=f"{PARENT[:-2]}00").result()
        assert result.served_by == "code"
        with pytest.raises(TraceNotFound):
            await client.trace(result.request_id)


async def test_a_caller_without_our_client_brings_its_trace_as_metadata(mesh: Site) -> None:
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="hello")],
        target=pb.Target(profile="code"),
        sampling_params=pb.SamplingParams(max_tokens=2),
    )
    async with grpc.aio.insecure_channel(str(mesh.nodes["general"].client_address)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Chat(request, metadata=(("traceparent", PARENT), ("tracestate", "vendor=1")))
        assert [message.WhichOneof("response") async for message in call][-1] == "complete"
    async with mesh.client("code") as client:
        traced = await ended(client, TRACE)
    assert {node.node_name for node in traced.nodes} == {"general", "code"}


async def test_texts_that_become_vectors_at_a_peer_are_one_trace_too(mesh: Site) -> None:
    request = pb.EmbedRequest(inputs=["hello"], target=pb.Target(profile="code"))
    async with grpc.aio.insecure_channel(str(mesh.nodes["general"].client_address)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await stub.Embed(request, metadata=(("traceparent", PARENT),))).served_by == "code"
        mesh.engines["code"].lose()
        with suppress(grpc.aio.AioRpcError):
            await stub.Embed(request, metadata=(("traceparent", PARENT),), timeout=5)
    async with mesh.client("general") as client:
        traced = await ended(client, TRACE)
    rows = timeline(traced.nodes).rows
    assert steps(timeline(traced.nodes))[:3] == [
        "general: embeddings",
        "  general: forward code",
        "    code: embeddings tiny",
    ]
    assert [row.span.error for row in rows[:3]] == ["", "", ""]
    assert rows[3].span.error != ""


async def test_nothing_that_was_asked_or_answered_is_in_a_trace(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("the patient's secret", profile="code", max_tokens=8, stop=["confidential"])
        result = await stream.result()
        traced = await ended(client, stream.trace_id)
    told = repr(traced)
    assert "secret" not in told
    assert "confidential" not in told
    assert result.text
    assert result.text not in told


# --- over HTTP ---------------------------------------------------------------------------


async def ask_over_http(address: Address | None, body: object, **headers: str) -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(
        f"http://{address}/v1/chat/completions", json.dumps(body).encode(), headers, method="POST"
    )

    def fetch() -> tuple[int, dict[str, str]]:
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                response.read()
                return response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers)

    return await asyncio.to_thread(fetch)


def question(**more: object) -> dict[str, object]:
    return {"model": "code", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **more}


async def test_answers_over_http_say_their_trace(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        general = await site.start("general", "general", **HTTP)
        await site.start("code", "code")
        await site.formed()
        address = general.http_address
        status, headers = await ask_over_http(address, question(), traceparent=PARENT)
        assert (status, headers["x-fieldmesh-trace"]) == (200, TRACE)
        status, streamed = await ask_over_http(address, question(stream=True))
        made = streamed["x-fieldmesh-trace"]
        assert (status, len(made)) == (200, 32)
        async with site.client("code") as client:
            assert "code: decode" in " ".join(steps(timeline((await ended(client, TRACE)).nodes)))
            assert (await ended(client, made)).trace_id == made
    assert made != TRACE


async def test_a_refusal_over_http_says_its_trace_where_it_has_one(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        node = await site.start("general", "general", **HTTP)
        await site.formed()
        too_long = question(model="general", messages=[{"role": "user", "content": "x" * 5000}])
        status, headers = await ask_over_http(node.http_address, too_long)
        assert status == 400
        async with site.client("general") as client:
            traced = await ended(client, headers["x-fieldmesh-trace"])
    errors = [row.span.error for row in timeline(traced.nodes).rows]
    assert errors[0] == "PROMPT_TOO_LONG"


@asynccontextmanager
async def silent_listener() -> AsyncIterator[Address]:
    """Takes connections and says nothing."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    async with server:
        yield Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        for writer in writers:
            writer.close()


# --- who tells ---------------------------------------------------------------------------


async def test_nodes_that_do_not_answer_are_named(mesh: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "PEER_TIMEOUT_S", 1.0)
    await mesh.start("spare", "health")
    await mesh.formed()
    async with mesh.client("general") as client, silent_listener() as silent_address:
        stream = client.chat("hello", profile="code", max_tokens=2)
        await stream.result()
        broken, frozen = mesh.nodes["code"], mesh.nodes["spare"]
        monkeypatch.setattr(broken._service.tracer, "find", lambda _: 1 / 0)
        links = mesh.nodes["general"]._driver.links
        link = links._link(frozen.peer_address)
        nowhere = grpc.aio.insecure_channel(str(silent_address))
        monkeypatch.setattr(link, "channel", lambda _: nowhere)
        traced = await client.trace(stream.trace_id)
        await nowhere.close()
    reasons = {node.node_name: node.reason for node in traced.silent_nodes}
    assert reasons == {"code": "it cannot be reached", "spare": "it did not answer within 1 s"}
    assert {node.node_name for node in traced.nodes} == {"general"}


def test_a_trace_of_very_many_steps_is_told_as_far_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "SPANS_TOLD_MAX", 5)
    nodes = [
        trace_pb2.NodeSpans(spans=[trace_pb2.Span(name=f"{index}") for index in range(size)], spans_dropped=1)
        for size in (3, 4, 2)
    ]
    told_of = traces.bounded(nodes)
    assert [len(node.spans) for node in told_of] == [3, 2, 0]
    assert [node.spans_dropped for node in told_of] == [1, 3, 3]
    assert [span.name for span in told_of[1].spans] == ["0", "1"]


async def test_a_trace_that_nobody_has_is_not_found_in_words(mesh: Site) -> None:
    async with mesh.client("general") as client:
        with pytest.raises(TraceNotFound, match="ffffffffff"):
            await client.trace("ffffffffff")
        with pytest.raises(InvalidRequest):
            await client.trace("short")
