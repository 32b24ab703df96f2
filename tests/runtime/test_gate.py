"""The gate of the peer listener: who is let in, and what the others are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import FieldmeshError, InvalidRequest, MeshMismatch, ProtocolMismatch
from fieldmesh.core.model import NodeId
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime.gate import CONTROL_METHOD, Caller, Gate, caller_of

HERE = Caller(node=NodeId("a" * 32), mesh="home", protocol_min=2, protocol_max=3)


async def _unary(_: object, __: object) -> bytes:
    return b"in"


async def _stream(_: object, __: object) -> AsyncIterator[bytes]:
    yield b"in"


METHODS: dict[str, Any] = {
    "UnaryUnary": grpc.unary_unary_rpc_method_handler(_unary),
    "UnaryStream": grpc.unary_stream_rpc_method_handler(_stream),
    "StreamUnary": grpc.stream_unary_rpc_method_handler(_unary),
    "StreamStream": grpc.stream_stream_rpc_method_handler(_stream),
}


@asynccontextmanager
async def gated(user_agent: str | None) -> AsyncIterator[tuple[Gate, Any]]:
    gate = Gate(HERE)
    server = grpc.aio.server(interceptors=(gate,))
    service, _, control = CONTROL_METHOD[1:].partition("/")
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("test.Service", METHODS),
            grpc.method_handlers_generic_handler(service, {control: METHODS["StreamUnary"]}),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = () if user_agent is None else (("grpc.primary_user_agent", user_agent),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield gate, channel
    await server.stop(None)


async def call(channel: Any, method: str) -> bytes | FieldmeshError:
    """What a call of any shape yields, or the typed error that it ended with."""
    path = f"/test.Service/{method}"
    requests = iter([b""])
    try:
        match method:
            case "UnaryUnary":
                return bytes(await channel.unary_unary(path)(b""))
            case "UnaryStream":
                return b"".join([part async for part in channel.unary_stream(path)(b"")])
            case "StreamUnary":
                return bytes(await channel.stream_unary(path)(requests))
            case _:
                return b"".join([part async for part in channel.stream_stream(path)(requests)])
    except grpc.aio.AioRpcError as error:
        return error_from_call(error)


def user_agent(mesh: str = "home", low: int = 2, high: int = 2) -> str:
    return Caller(node=NodeId("b" * 32), mesh=mesh, protocol_min=low, protocol_max=high).user_agent()


@pytest.mark.parametrize("method", list(METHODS))
async def test_a_node_of_this_mesh_that_speaks_a_common_version_is_let_in(method: str) -> None:
    for low, high in ((1, 2), (2, 3), (3, 9)):
        async with gated(user_agent(low=low, high=high)) as (gate, channel):
            assert await call(channel, method) == b"in"
            assert gate.refused == 0


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        (user_agent(mesh="other"), MeshMismatch),
        (user_agent(low=1, high=1), ProtocolMismatch),
        (user_agent(low=4, high=9), ProtocolMismatch),
        (None, InvalidRequest),
        ("fieldmesh-node/2-3 home", InvalidRequest),
    ],
)
async def test_everybody_else_is_refused_with_a_code_that_says_why(
    method: str, said: str | None, refusal: type[FieldmeshError]
) -> None:
    async with gated(said) as (gate, channel):
        assert type(await call(channel, method)) is refusal
        assert gate.refused == 1


async def test_control_messages_pass_for_the_core_to_answer() -> None:
    async with gated(user_agent(mesh="other")) as (_, channel):
        assert await channel.stream_unary(CONTROL_METHOD)(iter([b""])) == b"in"


async def test_a_method_that_does_not_exist_is_unimplemented_as_everywhere() -> None:
    async with gated(None) as (gate, channel):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test.Service/Nothing")(b"")
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert gate.refused == 0


@given(
    mesh=st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True),
    node=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    versions=st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
)
def test_what_a_caller_says_is_understood(mesh: str, node: str, versions: tuple[int, int]) -> None:
    said = Caller(node=NodeId(node), mesh=mesh, protocol_min=versions[0], protocol_max=versions[1])
    for agent in (said.user_agent(), said.user_agent() + " grpc-python-asyncio/1.85.1 grpc-c/58"):
        assert caller_of([("host", "x"), ("user-agent", agent)]) == said


@given(agent=st.one_of(st.text(max_size=200), st.binary(max_size=200)))
def test_any_user_agent_is_a_caller_or_nobody(agent: str | bytes) -> None:
    caller = caller_of([("user-agent", agent)])
    assert caller is None or (len(caller.node) == 32 and caller.mesh)
