"""A stream whose node leaves goes on at another one.

Goal: its reader notices nothing, what was computed moves with it, and a state that is damaged, cut short, too
large or somebody else's is refused and costs nothing but time. Method: whole nodes in this process over the
real llama.cpp with a tiny model; peers that lie are played by a server of our own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fieldmesh.client import AsyncClient
from fieldmesh.config import EngineSlice
from fieldmesh.core.dispatch import Resumption
from fieldmesh.core.errors import FieldmeshError, GenerationNotFound, InvalidRequest, StateRefused
from fieldmesh.core.model import Address, MeshView, NodeId, Prompt, Sampling
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.llama import EXACT_TOKENS
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import SequenceState
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime.door import Context, guarded_stream, handlers
from fieldmesh.runtime.gate import Caller
from fieldmesh.runtime.links import PeerBytes
from fieldmesh.runtime.moving import FETCH_TIMEOUT_S, PIECE_BYTES_MAX, SEND_TIMEOUT_S, Moving
from fieldmesh.runtime.node import Node, running
from fieldmesh.v1 import peer_pb2, peer_pb2_grpc
from tests.core.mesh_views import member
from tests.engine.tiny_model import write_tiny_model
from tests.runtime.test_node import ONCE, Site, new_site

pytestmark = pytest.mark.engine

PROMPT = "the field mesh of edge nodes, with words enough to be worth moving. " * 6
SHORT = PROMPT[:20]
TOKENS = 1500
ENGINE = EngineSlice(threads=1, batch_tokens=256, prefill_chunk_tokens=48)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
async def site(tmp_path: Path, model: Path) -> AsyncIterator[Site]:
    """A generalist that is asked, and two nodes that have the profile that is asked for."""
    async with new_site(tmp_path, model) as made:
        for name, profile in (("entry", "general"), ("first", "code"), ("second", "code")):
            await start(made, name, profile)
        await made.formed()
        yield made


async def start(site: Site, name: str, profile: str, **slices: Any) -> Node:
    config = site.config(name, profile, **{"engine": ENGINE, **slices})
    config = replace(config, node=replace(config.node, drain_timeout_s=20.0))
    site.nodes[name] = await site.stack.enter_async_context(running(config))
    return site.nodes[name]


def options(**more: object) -> dict[str, Any]:
    return {"profile": "code", "max_tokens": TOKENS, "ignore_eos": True, **more}


def exact(result: Any) -> tuple[int, ...]:
    """The part of an answer that does not depend on how it was computed (engine.llama)."""
    return tuple(result.token_ids[: EXACT_TOKENS - result.prompt_tokens])


async def moved(
    site: Site, client: AsyncClient, prompt: str = PROMPT, **more: object
) -> tuple[Any, str, Node]:
    """Ask, let the serving node leave after some tokens, and read to the end; the result, all text, and who
    went on."""
    stream = client.generate(prompt, **options(**more))
    text = ""
    left: Node | None = None
    draining: asyncio.Task[None] | None = None
    async for chunk in stream:
        text += chunk.text
        if draining is None and len(text) > 40:
            left = next(
                site.nodes[name]
                for name in ("first", "second")
                if site.nodes[name].models.node_load().running
            )
            draining = asyncio.create_task(left.drain(20.0, asyncio.Event()))
    assert draining is not None and left is not None
    await draining
    went_on = site.nodes["second" if left is site.nodes["first"] else "first"]
    return await stream.result(), text, went_on


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.3, "seed": 5}], ids=str)
async def test_a_stream_goes_on_at_another_node_as_it_would_have_gone_on(
    site: Site, sampling: dict[str, object]
) -> None:
    async with site.client("entry", ONCE) as client:
        alone = await client.generate(SHORT, **options(**sampling)).result()
        result, text, went_on = await moved(site, client, SHORT, **sampling)
    assert [a.reason for a in result.attempts] == ["moved", "served"]
    assert exact(result) == exact(alone)
    assert text == result.text
    assert (result.completion_tokens, result.prompt_tokens) == (TOKENS, alone.prompt_tokens)
    assert result.served_by == went_on.config.node.name


async def test_what_was_computed_moves_with_the_stream(site: Site) -> None:
    async with site.client("entry", ONCE) as client:
        result, _, went_on = await moved(site, client, temperature=0.0)
    assert [a.reason for a in result.attempts] == ["moved", "served"]
    assert result.cached_tokens == result.prompt_tokens, "nothing of the prompt was computed again"
    received = went_on._driver.links.bytes.received
    assert sum(count for (_, lane), count in received.items() if lane == "bulk") > 100_000


async def test_an_answer_without_a_seed_goes_on_by_the_one_that_it_began_with(site: Site) -> None:
    async with site.client("entry", ONCE) as client:
        result, _, _ = await moved(site, client, SHORT, temperature=1.0)
        again = await client.generate(SHORT, **options(temperature=1.0, seed=result.seed)).result()
    assert [a.reason for a in result.attempts] == ["moved", "served"]
    assert exact(again) == exact(result)


async def test_a_node_that_keeps_no_states_computes_them_again(tmp_path: Path, model: Path) -> None:
    async with new_site(tmp_path, model) as site:
        await start(site, "entry", "general")
        for name in ("first", "second"):
            await start(site, name, "code", engine=replace(ENGINE, states_mib_max=0))
        await site.formed()
        async with site.client("entry", ONCE) as client:
            alone = await client.generate(SHORT, **options(temperature=0.0)).result()
            result, text, _ = await moved(site, client, SHORT, temperature=0.0)
    assert [a.reason for a in result.attempts] == ["moved", "served"]
    assert exact(result) == exact(alone)
    assert (len(result.token_ids), text) == (TOKENS, result.text)


async def test_a_node_that_leaves_has_nothing_left_when_its_streams_have_moved(site: Site) -> None:
    async with site.client("entry", ONCE) as client:
        stream = client.generate(PROMPT, **options(max_tokens=1900, temperature=0.0))
        await anext(stream)
        name = next(n for n in ("first", "second") if site.nodes[n].models.node_load().running)
        await site.nodes[name].drain(20.0, asyncio.Event())
        assert site.nodes[name].models.node_load().running == 0
        other = site.nodes["second" if name == "first" else "first"]
        result = await stream.result()
        assert result.served_by == other.config.node.name


# --- who may have a state --------------------------------------------------------------------------


@dataclass
class Running:
    """A generation that runs at one node, and how to ask for its state."""

    site: Site
    at: Node
    stub: peer_pb2_grpc.PeerServiceAsyncStub
    request: peer_pb2.FetchStateRequest

    async def refusal(self, deadline_s: float | None = 5.0, **changes: Any) -> FieldmeshError:
        request = peer_pb2.FetchStateRequest()
        request.CopyFrom(self.request)
        for name, value in changes.items():
            setattr(request, name, value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in self.stub.FetchState(request, timeout=deadline_s):
                pass
        return error_from_call(refused.value)


@pytest.fixture
async def sequence(tmp_path: Path, model: Path) -> AsyncIterator[Running]:
    async with new_site(tmp_path, model) as site, AsyncExitStack() as stack:
        for name, profile in (("entry", "general"), ("first", "code")):
            await start(site, name, profile)
        await site.formed()
        engine = site.nodes["first"].models.hosted["code"].engine
        assert isinstance(engine, EngineProcess) and engine.info is not None
        events = engine.submit(
            Job(
                generation_id="g/0/0",
                prompt=Prompt(text=PROMPT),
                sampling=Sampling(temperature=0.0, max_tokens=1900, ignore_eos=True),
            )
        )
        await anext(events)
        await anext(events)
        caller = Caller(node=site.nodes["entry"].key.id, mesh="test")
        channel = await stack.enter_async_context(connected(site.nodes["first"], caller))
        request = peer_pb2.FetchStateRequest(
            profile="code", generation_id="g", fingerprint=engine.info.state_fingerprint, bytes_max=1 << 28
        )
        yield Running(
            site=site, at=site.nodes["first"], stub=peer_pb2_grpc.PeerServiceStub(channel), request=request
        )
        await events.aclose()  # type: ignore[attr-defined]


def connected(node: Node, caller: Caller) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        str(node.peer_address), options=(("grpc.primary_user_agent", caller.user_agent()),)
    )


async def test_a_member_is_given_a_running_state_in_bounded_pieces(sequence: Running) -> None:
    call = sequence.stub.FetchState(sequence.request, timeout=FETCH_TIMEOUT_S)
    pieces = [piece async for piece in call]
    assert all(len(piece.data) <= PIECE_BYTES_MAX for piece in pieces)
    assert pieces[0].total_bytes == sum(len(piece.data) for piece in pieces)
    assert [piece.total_bytes for piece in pieces[1:]] == [0] * (len(pieces) - 1)


async def test_another_model_s_state_is_refused_before_a_byte_flows(sequence: Running) -> None:
    refused = await sequence.refusal(fingerprint="0" * 64)
    assert isinstance(refused, StateRefused) and refused.field == "fingerprint"


async def test_a_state_larger_than_the_caller_takes_is_not_sent(sequence: Running) -> None:
    assert isinstance(await sequence.refusal(bytes_max=1000), StateRefused)


async def test_what_does_not_run_here_is_not_found(sequence: Running) -> None:
    assert isinstance(await sequence.refusal(generation_id="other"), GenerationNotFound)
    assert isinstance(await sequence.refusal(profile="health"), GenerationNotFound)


@pytest.mark.parametrize("deadline_s", [None, SEND_TIMEOUT_S + 5])
async def test_a_caller_who_would_take_for_ever_is_refused(
    sequence: Running, deadline_s: float | None
) -> None:
    refused = await sequence.refusal(deadline_s)
    assert isinstance(refused, InvalidRequest) and refused.field == "deadline"


async def test_who_is_no_member_is_given_nothing(sequence: Running) -> None:
    stranger = Caller(node=NodeId("e" * 32), mesh="test")
    async with connected(sequence.at, stranger) as channel:
        asking = replace(sequence, stub=peer_pb2_grpc.PeerServiceStub(channel))
        refused = await asking.refusal()
    assert isinstance(refused, StateRefused) and "members" in refused.message


# --- states that are none --------------------------------------------------------------------------


class Liar:
    """A peer that sends what a test wants."""

    def __init__(self) -> None:
        self.responses: list[peer_pb2.FetchStateResponse] = []

    @guarded_stream
    async def FetchState(
        self, request: peer_pb2.FetchStateRequest, context: Context
    ) -> AsyncIterator[peer_pb2.FetchStateResponse]:
        for response in self.responses:
            yield response


def cut(envelope: bytes, size: int = PIECE_BYTES_MAX) -> list[peer_pb2.FetchStateResponse]:
    return [
        peer_pb2.FetchStateResponse(
            total_bytes=0 if start else len(envelope), data=envelope[start : start + size]
        )
        for start in range(0, len(envelope), size)
    ]


@dataclass
class Taking:
    """An engine that takes a state from a peer; ``state`` is a good one."""

    engine: EngineProcess
    moving: Moving
    liar: Liar
    state: SequenceState

    async def takes(self, responses: list[peer_pb2.FetchStateResponse]) -> bool:
        self.liar.responses = responses
        resumption = Resumption(token_ids=(), node=NodeId("b" * 32), epoch=0)
        return await self.moving.fetch(self.engine, "code", "g", resumption)


@pytest.fixture
async def taking(model: Path) -> AsyncIterator[Taking]:
    settings = EngineSettings(model_path=str(model), slots=1, context_tokens=1024, state_bytes_max=1 << 24)
    engine = EngineProcess(settings)
    await engine.start()
    job = Job(
        generation_id="s",
        prompt=Prompt(text=PROMPT),
        sampling=Sampling(temperature=0.0, max_tokens=600, ignore_eos=True),
    )
    events = engine.submit(job)
    await anext(events)
    await anext(events)
    state = await engine.export("s")
    await events.aclose()  # type: ignore[attr-defined]
    liar = Liar()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(peer_pb2.DESCRIPTOR.services_by_name["PeerService"], liar),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        peer = replace(member("b"), id=NodeId("b" * 32), address=Address(host="127.0.0.1", port=port))
        view = MeshView(local=NodeId("a" * 32), members=(peer,))
        moving = Moving(None, lambda: view, lambda address: channel, PeerBytes())  # type: ignore[arg-type]
        yield Taking(engine=engine, moving=moving, liar=liar, state=state)
    await server.stop(None)
    await engine.close()


def flipped(envelope: bytes, position: int) -> bytes:
    return envelope[:position] + bytes([envelope[position] ^ 1]) + envelope[position + 1 :]


async def test_a_sound_state_is_taken(taking: Taking) -> None:
    assert await taking.takes(cut(bytes(taking.state.envelope)))
    assert await taking.takes(cut(bytes(taking.state.envelope), 1000))


Lie = Callable[[bytes], list[peer_pb2.FetchStateResponse]]


@pytest.mark.parametrize(
    "lie",
    [
        lambda e: [],
        lambda e: cut(flipped(e, 0)),
        lambda e: cut(flipped(e, 20)),
        lambda e: cut(flipped(e, len(e) // 2)),
        lambda e: cut(flipped(e, len(e) - 1)),
        lambda e: cut(e)[:-1] if len(e) > PIECE_BYTES_MAX else cut(e, 1000)[:-1],
        lambda e: [*cut(e), peer_pb2.FetchStateResponse(data=b"more")],
        lambda e: cut(e[:-1]),
        lambda e: [peer_pb2.FetchStateResponse(total_bytes=len(e) + 1, data=e[:1000])],
        lambda e: [peer_pb2.FetchStateResponse(total_bytes=1 << 40, data=e[:1000])],
        lambda e: [peer_pb2.FetchStateResponse(total_bytes=0, data=e[:1000])],
        lambda e: [peer_pb2.FetchStateResponse(total_bytes=len(e))],
        lambda e: cut(e + bytes(2 * PIECE_BYTES_MAX), 2 * PIECE_BYTES_MAX),
    ],
)
async def test_a_state_that_is_not_what_it_says_is_refused(taking: Taking, lie: Lie) -> None:
    assert not await taking.takes(lie(bytes(taking.state.envelope)))
    assert await taking.takes(cut(bytes(taking.state.envelope))), "nothing is held against the next one"


async def test_a_node_that_is_not_known_is_not_asked(taking: Taking) -> None:
    resumption = Resumption(token_ids=(), node=NodeId("f" * 32), epoch=0)
    assert not await taking.moving.fetch(taking.engine, "code", "g", resumption)
