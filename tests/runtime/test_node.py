"""Whole nodes on loopback. Goal: what a client is promised holds at any node, whoever does the work.

Method: nodes in this process with real listeners, real channels and the real core; only the model behind the
scheduler is fake, except in tests of the process itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fieldmesh.client import AsyncClient, Persistence
from fieldmesh.config import (
    DiscoverySlice,
    EngineSlice,
    LimitsSlice,
    ListenSlice,
    NodeConfig,
    NodeSlice,
)
from fieldmesh.core.errors import (
    AddressInUse,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    DomainNotFound,
    FieldmeshError,
    InvalidRequest,
    ModelFileInvalid,
    ModelNotFound,
    ModelTooLarge,
    ProfileInvalid,
    ProfileNotFound,
    PromptTooLong,
    QueueFull,
    RequestIdReused,
    StateFolderInUse,
    StreamLost,
)
from fieldmesh.core.model import Address, EngineState, FinishReason, NodeId, NodeState
from fieldmesh.engine.cost import CostModel
from fieldmesh.engine.fake import FakeEngine
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.rpc.errors import PUSHBACK_KEY, error_from_call
from fieldmesh.runtime import door
from fieldmesh.runtime.gate import Caller
from fieldmesh.runtime.node import Node, running
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import inference_pb2_grpc, peer_pb2, peer_pb2_grpc
from tests.engine.tiny_model import write_tiny_model

FAST = CostModel(step_base_s=0.001, decode_row_s=0.0, prefill_token_s=0.0)
ANY = Address(host="127.0.0.1", port=0)
ONCE = Persistence(attempts_max=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@dataclass
class Site:
    """Some nodes in a folder of their own."""

    folder: Path
    model: Path
    stack: AsyncExitStack
    nodes: dict[str, Node]
    engines: dict[str, FakeEngine]

    def config(self, name: str, profile: str = "general", **slices: object) -> NodeConfig:
        seeds = tuple(node.peer_address for node in self.nodes.values())
        defaults: dict[str, object] = {
            "node": NodeSlice(
                name=name,
                mesh="test",
                profile=profile,
                model=str(self.model),
                state_folder=str(self.folder / name),
                drain_timeout_s=1.0,
            ),
            "listen": ListenSlice(client=ANY, peer=ANY),
            "discovery": DiscoverySlice(mdns=False, seeds=seeds),
        }
        return NodeConfig(**{**defaults, **slices})  # type: ignore[arg-type]

    async def start(self, name: str, profile: str = "general", **slices: object) -> Node:
        def make_engine(settings: EngineSettings) -> FakeEngine:
            self.engines[name] = FakeEngine(settings, cost=FAST)
            return self.engines[name]

        node = await self.stack.enter_async_context(
            running(self.config(name, profile, **slices), make_engine)
        )
        self.nodes[name] = node
        return node

    async def formed(self) -> None:
        """Every node can use every other."""
        names = set(self.nodes)
        for node in self.nodes.values():
            await until(node, lambda ready: ready >= names)

    def client(self, name: str, persistence: Persistence = ONCE) -> AsyncClient:
        return AsyncClient(self.nodes[name].client_address, persistence=persistence)


async def until(node: Node, holds: Callable[[set[str]], bool]) -> None:
    """Return when ``holds`` is true of the names that ``node`` may send requests to."""
    view = node.view
    async with asyncio.timeout(20):
        while True:
            ready = {
                member.name
                for member in view.members
                if member.state is NodeState.ALIVE
                and member.load.engine is EngineState.READY
                and not member.load.draining
                and member.row is not None
                and member.row.profiles
            }
            if holds(ready):
                return
            view = await node._driver.wait_view_changed(view.revision)


@asynccontextmanager
async def new_site(folder: Path, model: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(folder=folder, model=model, stack=stack, nodes={}, engines={})


@pytest.fixture
async def site(tmp_path: Path, tiny: Path) -> AsyncIterator[Site]:
    async with new_site(tmp_path, tiny) as made:
        yield made


@pytest.fixture
async def mesh(site: Site) -> Site:
    """A generalist and a programmer that know each other."""
    await site.start("general", "general")
    await site.start("code", "code")
    await site.formed()
    return site


# --- answers -----------------------------------------------------------------------------


async def test_a_question_is_answered_by_the_owner_of_its_domain_through_another_node(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("Write a function that adds two numbers", max_tokens=20, ignore_eos=True)
        text = "".join([chunk.text async for chunk in stream])
        result = await stream.result()
    assert text == result.text
    assert (result.served_by, result.entry_node, result.hops) == ("code", "general", 1)
    assert (result.profile, result.domain, result.fallback) == ("code", "programming", False)
    assert (result.completion_tokens, result.finish_reason) == (20, FinishReason.LENGTH)
    assert [attempt.reason for attempt in result.attempts] == ["served"]
    assert 0 < result.ttft_s <= result.duration_s


async def test_the_entry_node_answers_itself_where_it_is_the_one(mesh: Site) -> None:
    async with mesh.client("general") as client:
        result = await client.chat("hello", profile="general", max_tokens=5).result()
    assert (result.served_by, result.hops) == ("general", 0)


async def test_when_a_domains_owner_is_gone_the_generalist_answers_and_says_so(mesh: Site) -> None:
    mesh.engines["code"].lose()
    await until(mesh.nodes["general"], lambda ready: "code" not in ready)
    async with mesh.client("general") as client:
        result = await client.chat("hello", domain="programming", max_tokens=5).result()
    assert (result.served_by, result.fallback) == ("general", True)


async def test_a_raw_prompt_is_continued_and_token_ids_too(mesh: Site) -> None:
    async with mesh.client("general") as client:
        tokens = await client.tokenize("abc", profile="code")
        by_text = await client.generate("abc", profile="code", temperature=0.0, max_tokens=5).result()
        by_ids = await client.generate(
            tokens.token_ids, profile="code", temperature=0.0, max_tokens=5
        ).result()
    assert by_text.token_ids == by_ids.token_ids


async def test_an_explanation_names_every_candidate(mesh: Site) -> None:
    async with mesh.client("general") as client:
        result = await client.chat("Sort a list in Python", max_tokens=2, explain=True).result()
    assert result.explanation is not None
    assert {candidate.node_name for candidate in result.explanation.candidates} == {"general", "code"}


# --- request ids -------------------------------------------------------------------------


async def test_a_repeat_is_answered_and_not_done_again(mesh: Site) -> None:
    async with mesh.client("general") as client:
        first = await client.chat("hello", request_id="r1", max_tokens=5, temperature=1.0).result()
        again = await client.chat("hello", request_id="r1", max_tokens=5, temperature=1.0).result()
    assert again.generation_id == first.generation_id
    assert again.text == first.text


async def test_another_request_under_a_used_id_is_refused(mesh: Site) -> None:
    async with mesh.client("general") as client:
        await client.chat("hello", request_id="r1", max_tokens=5).result()
        with pytest.raises(RequestIdReused):
            await client.chat("something else", request_id="r1", max_tokens=5).result()


# --- ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["general", "code"])
async def test_abort_works_at_any_node(mesh: Site, asked: str) -> None:
    async with mesh.client("general") as client, mesh.client(asked) as other:
        stream = client.chat("hello", profile="code", request_id="r1", max_tokens=1000, ignore_eos=True)
        await anext(stream)
        assert await other.abort("r1")
        result = await stream.result()
    assert result.finish_reason is FinishReason.ABORT
    assert result.completion_tokens == len(result.token_ids) < 1000
    await idle(mesh)


async def test_a_request_that_waits_for_somebody_to_serve_it_can_be_aborted(site: Site) -> None:
    await site.start("only")
    await site.formed()
    site.engines["only"].lose()
    await until(site.nodes["only"], lambda ready: not ready)
    async with site.client("only") as client:
        reading = asyncio.create_task(client.chat("hello", request_id="r1").result())
        async with asyncio.timeout(5):
            while not await client.abort("r1"):
                pass
        with pytest.raises(Cancelled):
            await reading


async def test_abort_of_what_does_not_run_says_so(mesh: Site) -> None:
    async with mesh.client("general") as client:
        assert not await client.abort("nothing")


async def test_a_client_that_leaves_stops_the_engine_behind_a_hop(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=1000, ignore_eos=True)
        await anext(stream)
        await stream.close()
    await idle(mesh)


async def test_a_deadline_crosses_the_hop_and_stops_the_engine(mesh: Site) -> None:
    async with mesh.client("general") as client:
        with pytest.raises(DeadlineExceeded):
            await client.chat(
                "hello", profile="code", max_tokens=2000, ignore_eos=True, timeout_s=0.3
            ).result()
    await idle(mesh)


async def test_an_engine_lost_before_the_first_token_costs_nothing_but_time(mesh: Site) -> None:
    mesh.engines["code"]._clock = Stopped()  # it has taken the request and will never answer
    async with mesh.client("general") as client:
        stream = client.chat("hello", domain="programming", max_tokens=5)
        reading = asyncio.create_task(stream.result())
        await mesh.engines["code"]._arrived.wait()
        mesh.engines["code"].lose()
        result = await asyncio.wait_for(reading, 20)
    assert result.served_by == "general"
    assert [attempt.reason for attempt in result.attempts] == ["ENGINE_LOST", "served"]


async def test_vectors_come_from_another_node_where_one_engine_is_lost(site: Site) -> None:
    for name in ("one", "two"):
        await site.start(name, "general")
    await site.formed()
    async with site.client("one") as client:
        first = await client.embed(["hello", "there"], profile="general")
        site.engines[first.served_by].lose(EngineState.FAILED)
        second = await client.embed(["hello", "there"], profile="general")
    assert {first.served_by, second.served_by} == {"one", "two"}
    assert first.vectors == second.vectors


@pytest.mark.parametrize("texts", [[], [""], ["x"] * 129])
async def test_texts_that_cannot_be_embedded_are_refused_by_the_field(mesh: Site, texts: list[str]) -> None:
    async with mesh.client("general") as client:
        with pytest.raises(InvalidRequest) as caught:
            await client.embed(texts)
    assert caught.value.field.startswith("inputs")


async def test_an_engine_lost_midway_ends_the_stream_with_the_count_of_tokens(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("hello", profile="code", max_tokens=2000, ignore_eos=True)
        first = await anext(stream)
        mesh.engines["code"].lose()
        with pytest.raises(StreamLost) as caught:
            await stream.result()
    assert int(caught.value.metadata["tokens_delivered"]) >= len(first.token_ids)


class Stopped:
    """A clock on which no step ever ends."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.Event().wait()


async def idle(mesh: Site) -> None:
    """Return when no engine works: within a step, for all that a reader can tell."""
    async with asyncio.timeout(10):
        for name, node in mesh.nodes.items():
            view = node.view
            while mesh.engines[name].load().running or mesh.engines[name].load().queued:
                view = await node._driver.wait_view_changed(view.revision)


# --- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"profile": "cod"}, ProfileNotFound, "code"),
        ({"model": "gpt"}, ModelNotFound, "tiny"),
        ({"domain": "programing"}, DomainNotFound, "programming"),
    ],
)
async def test_what_nobody_offers_is_refused_with_what_exists(
    mesh: Site, options: dict[str, str], kind: type[FieldmeshError], told: str
) -> None:
    async with mesh.client("general") as client:
        with pytest.raises(kind) as caught:
            await client.chat("hello", **options).result()  # type: ignore[arg-type]
    assert told in caught.value.message
    assert caught.value.field.startswith("target.")


async def test_a_prompt_over_the_context_is_refused_by_the_field(mesh: Site) -> None:
    async with mesh.client("general") as client:
        with pytest.raises(PromptTooLong) as caught:
            await client.generate("x" * 5000, profile="code").result()
    assert caught.value.field == "prompt"


async def test_raw_requests_with_bad_fields_are_refused_and_the_node_lives(mesh: Site) -> None:
    bad = [
        pb.ChatRequest(),
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="")]),
        pb.ChatRequest(messages=[pb.ChatMessage(role="robot", content="x")]),
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="x")],
            sampling_params=pb.SamplingParams(temperature=-1),
        ),
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="x")],
            sampling_params=pb.SamplingParams(max_tokens=2**31 - 1),
        ),
    ]
    async with grpc.aio.insecure_channel(str(mesh.nodes["general"].client_address)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request in bad:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Chat(request):
                    pass
            error = error_from_call(caught.value)
            assert isinstance(error, InvalidRequest), error
            assert error.field
    async with mesh.client("general") as client:
        await client.chat("hello", max_tokens=2).result()


@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe", b"\xff\xff\xff"], ids=["not UTF-8", "not protobuf"])
async def test_bytes_that_are_no_request_are_refused_with_a_code_and_the_node_lives(
    mesh: Site, data: bytes
) -> None:
    async with grpc.aio.insecure_channel(str(mesh.nodes["general"].client_address)) as channel:
        call = channel.unary_stream("/fieldmesh.v1.InferenceService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call(data):
                pass
    error = error_from_call(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == "request"
    async with mesh.client("general") as client:
        await client.chat("hello", max_tokens=2).result()


async def test_a_caller_who_never_reads_gives_its_place_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "WRITE_TIMEOUT_S", 0.2)
    await site.start("only", limits=LimitsSlice(streams_max=1))
    await site.formed()
    options = [("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(str(site.nodes["only"].client_address), options=options) as channel:
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="x")],
            sampling_params=pb.SamplingParams(max_tokens=1500, ignore_eos=True),
        )
        stuck = inference_pb2_grpc.InferenceServiceStub(channel).Chat(request)
        await stuck.read()
        async with site.client("only") as client, asyncio.timeout(20):
            while True:
                try:
                    await client.chat("hello", max_tokens=2).result()
                    break
                except FieldmeshError as error:
                    assert error.code == "TOO_MANY_STREAMS", error
        stuck.cancel()


async def test_a_full_mesh_refuses_at_once_with_pushback(site: Site) -> None:
    await site.start("only", engine=EngineSlice(slots=1, queue_max=0))
    await site.formed()
    async with grpc.aio.insecure_channel(str(site.nodes["only"].client_address)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="x")],
            sampling_params=pb.SamplingParams(max_tokens=2000, ignore_eos=True),
        )
        running_call = stub.Chat(request)
        await running_call.read()
        await until(site.nodes["only"], lambda ready: not site.nodes["only"].view.members[0].load.accepting)
        refused = stub.Chat(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        running_call.cancel()
    assert isinstance(error_from_call(caught.value), QueueFull)
    assert PUSHBACK_KEY in dict(caught.value.trailing_metadata() or ())


async def test_a_full_node_spills_to_another(site: Site) -> None:
    await site.start("one", engine=EngineSlice(slots=1, queue_max=0))
    await site.start("two", engine=EngineSlice(slots=1, queue_max=0))
    await site.formed()
    async with site.client("one") as client:
        first = client.chat("hello", max_tokens=2000, ignore_eos=True)
        await anext(first)
        second = await client.chat("hello", max_tokens=3).result()
        await first.close()
    assert second.served_by == "two"


async def test_a_draining_node_takes_nothing_new(mesh: Site) -> None:
    node = mesh.nodes["general"]
    await node.drain(1.0, asyncio.Event())
    async with mesh.client("general") as client:
        with pytest.raises(FieldmeshError) as caught:
            await client.chat("hello").result()
    assert caught.value.retryable
    await until(mesh.nodes["code"], lambda ready: "general" not in ready)


async def test_streams_are_bounded(site: Site) -> None:
    await site.start("only", limits=LimitsSlice(streams_max=1))
    await site.formed()
    async with site.client("only") as client:
        first = client.chat("hello", max_tokens=2000, ignore_eos=True)
        await anext(first)
        with pytest.raises(FieldmeshError) as caught:
            await client.chat("hello").result()
        await first.close()
    assert caught.value.code == "TOO_MANY_STREAMS"


# --- peers -------------------------------------------------------------------------------


def forward(profile: str, *path: str, hops_left: int = 0) -> peer_pb2.ForwardRequest:
    chat = pb.ChatRequest(request_id="r", messages=[pb.ChatMessage(role="user", content="x")])
    return peer_pb2.ForwardRequest(
        generation_id="g", profile=profile, path=path, hops_left=hops_left, chat=chat
    )


async def forwarded(
    mesh: Site, request: peer_pb2.ForwardRequest, mesh_name: str = "test"
) -> list[peer_pb2.ForwardResponse]:
    caller = Caller(node=NodeId("a" * 32), mesh=mesh_name).user_agent()
    options = (("grpc.primary_user_agent", caller),)
    async with grpc.aio.insecure_channel(str(mesh.nodes["code"].peer_address), options=options) as channel:
        stub = peer_pb2_grpc.PeerServiceStub(channel)
        try:
            return [response async for response in stub.Forward(request)]
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None


async def test_a_request_from_another_mesh_is_refused(mesh: Site) -> None:
    with pytest.raises(FieldmeshError) as caught:
        await forwarded(mesh, forward("code", "a" * 32), mesh_name="another")
    assert caught.value.code == "MESH_MISMATCH"


async def test_a_request_that_comes_back_is_refused_as_a_loop(mesh: Site) -> None:
    me = mesh.nodes["code"].key.id
    with pytest.raises(FieldmeshError) as caught:
        await forwarded(mesh, forward("code", "a" * 32, me))
    assert caught.value.code == "HOP_LIMIT"


async def test_a_profile_that_is_not_here_is_passed_on_while_hops_are_left(mesh: Site) -> None:
    with pytest.raises(ProfileNotFound):
        await forwarded(mesh, forward("general", "a" * 32))
    request = forward("general", "a" * 32, hops_left=1)
    request.chat.target.profile = "general"
    responses = await forwarded(mesh, request)
    assert responses[-1].complete.served_by == "general"
    assert [attempt.reason for attempt in responses[-1].complete.attempts] == ["served"]


# --- health, reflection, start -----------------------------------------------------------


async def test_health_follows_the_engine_of_each_profile(mesh: Site) -> None:
    async with grpc.aio.insecure_channel(str(mesh.nodes["code"].client_address)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="fieldmesh.v1.InferenceService/code")
        async with asyncio.timeout(10):
            watch = stub.Watch(request)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            mesh.engines["code"].lose()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            whole = await stub.Check(health_pb2.HealthCheckRequest())
            assert whole.status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


async def test_reflection_lists_the_services(mesh: Site) -> None:
    async with grpc.aio.insecure_channel(str(mesh.nodes["code"].client_address)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"fieldmesh.v1.InferenceService", "fieldmesh.v1.MeshService", "grpc.health.v1.Health"} <= names


async def test_a_node_that_restarts_is_waited_for_and_not_denied(site: Site) -> None:
    await site.start("general")
    async with AsyncExitStack() as first_life:
        everything, site.stack = site.stack, first_life
        await site.start("code", "code")
        await site.formed()
        site.stack = everything
        peer_address = site.nodes.pop("code").peer_address
    loading = asyncio.Event()

    class Loading(FakeEngine):
        async def start(self) -> EngineInfo:
            await loading.wait()
            return await super().start()

    config = site.config("code", "code", listen=ListenSlice(client=ANY, peer=peer_address))
    await site.stack.enter_async_context(running(config, lambda settings: Loading(settings, cost=FAST)))
    async with asyncio.timeout(20), site.client("general") as client:
        view = site.nodes["general"].view
        while not any(m.name == "code" and m.state is NodeState.ALIVE for m in view.members):
            view = await site.nodes["general"]._driver.wait_view_changed(view.revision)
        answer = asyncio.create_task(client.chat("hello", profile="code", max_tokens=2).result())
        while not site.nodes["general"]._service.running:
            await asyncio.wait((answer,), timeout=0.02)
        loading.set()
        assert (await answer).served_by == "code"


async def test_a_taken_port_is_told_with_its_option(site: Site) -> None:
    first = await site.start("first")
    listen = ListenSlice(client=first.client_address, peer=ANY)
    with pytest.raises(AddressInUse) as caught:
        await site.start("second", listen=listen)
    assert caught.value.field == "listen.client"


async def test_a_state_folder_in_use_is_told(site: Site) -> None:
    await site.start("same")
    with pytest.raises(StateFolderInUse):
        await site.start("same")


@pytest.mark.parametrize("content", [None, b"not a model", b"GGUF\x03\x00\x00\x00"])
async def test_a_bad_model_file_is_told_before_anything_starts(site: Site, content: bytes | None) -> None:
    site.model = site.folder / "model.gguf"
    if content is not None:
        site.model.write_bytes(content)
    with pytest.raises(ModelFileInvalid):
        await site.start("node")


async def test_a_model_that_does_not_fit_is_told_before_anything_starts(site: Site) -> None:
    with pytest.raises(ModelTooLarge) as caught:
        await site.start("node", engine=EngineSlice(memory_mib_max=10))
    assert caught.value.metadata["budget_mib"] == "10"


async def test_a_broken_profile_is_told_with_its_key(site: Site) -> None:
    profile = site.folder / "broken.toml"
    profile.write_text('name = "broken"\nslotz = 3\n')
    with pytest.raises(ProfileInvalid, match="slots"):
        await site.start("node", str(profile))


async def test_a_listener_beyond_loopback_needs_a_word(site: Site) -> None:
    listen = ListenSlice(client=Address(host="0.0.0.0", port=0), peer=ANY)
    with pytest.raises(ConfigError, match="insecure"):
        await site.start("node", listen=listen)


async def test_a_node_of_another_mesh_is_not_taken_in(mesh: Site) -> None:
    foreign = mesh.config("foreign")
    node = NodeSlice(
        name="foreign", mesh="other", model=str(mesh.model), state_folder=str(mesh.folder / "foreign")
    )
    await mesh.start("foreign", node=node, discovery=foreign.discovery)
    await until(mesh.nodes["foreign"], lambda ready: ready == {"foreign"})
    assert {member.name for member in mesh.nodes["general"].view.members} == {"general", "code"}


async def test_cancelled_is_the_word_for_a_stream_that_was_closed(mesh: Site) -> None:
    async with mesh.client("general") as client:
        stream = client.chat("hello", max_tokens=1000, ignore_eos=True)
        await anext(stream)
        await stream.close()
        with pytest.raises(Cancelled):
            await stream.result()
