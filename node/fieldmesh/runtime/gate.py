"""Who calls on the peer listener. Owns: the introduction that every call between nodes carries, and refusing
calls from other meshes, from other protocol versions, and from whoever is no node.

The introduction travels as the user agent: set once a connection, sent with every call without anybody's
doing, and compressed to a few bytes. It is a claim. Control messages pass unchecked: the core introduces
nodes to each other in words of its own, and answers a mismatch so that both operators read why.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from fieldmesh.core.errors import FieldmeshError, InvalidRequest, MeshMismatch, ProtocolMismatch
from fieldmesh.core.model import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, NodeId
from fieldmesh.rpc.errors import error_metadata

CONTROL_METHOD = "/fieldmesh.v1.PeerService/Control"

_INTRODUCTION = re.compile(
    r"fieldmesh-node/([1-9][0-9]{0,3})-([1-9][0-9]{0,3}) ([A-Za-z0-9._-]{1,63}) ([0-9a-f]{32})(?: .*)?"
)
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who a call says it comes from."""

    node: NodeId
    mesh: str
    protocol_min: int = PROTOCOL_VERSION_MIN
    protocol_max: int = PROTOCOL_VERSION_MAX

    def user_agent(self) -> str:
        """What a connection of this caller is to send; gRPC appends its own name and version."""
        return f"fieldmesh-node/{self.protocol_min}-{self.protocol_max} {self.mesh} {self.node}"


def caller_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller | None:
    """Who a call with this metadata says it comes from; None where it does not say."""
    for key, value in metadata or ():
        if key == "user-agent" and isinstance(value, str) and (found := _INTRODUCTION.fullmatch(value)):
            return Caller(
                node=NodeId(found[4]), mesh=found[3], protocol_min=int(found[1]), protocol_max=int(found[2])
            )
    return None


async def refuse(context: Context, error: FieldmeshError) -> None:
    """End a call with a coded status; raises what gRPC ends handlers with."""
    await context.abort(_CODES[error.status.value], error.message, error_metadata(error))


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls of this mesh's nodes pass, and refuses others before their request is read."""

    def __init__(self, local: Caller) -> None:
        self.refused = 0
        self._local = local

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method == CONTROL_METHOD:
            return handler
        error = self._problem(caller_of(handler_call_details.invocation_metadata))
        if error is None:
            return handler
        self.refused += 1
        return _refusing(handler, error)

    def _problem(self, caller: Caller | None) -> FieldmeshError | None:
        local = self._local
        if caller is None:
            return InvalidRequest(
                "This listener is for nodes only; clients are served on the other port", field="user-agent"
            )
        if caller.mesh != local.mesh:
            return MeshMismatch(
                f"This node belongs to mesh {local.mesh!r}, the caller to {caller.mesh!r}", field="mesh"
            )
        if caller.protocol_max < local.protocol_min or caller.protocol_min > local.protocol_max:
            return ProtocolMismatch(
                f"This node speaks protocol {local.protocol_min} to {local.protocol_max}, the caller "
                f"{caller.protocol_min} to {caller.protocol_max}: upgrade the older one",
                field="protocol",
            )
        return None


def _refusing(handler: Handler, error: FieldmeshError) -> Handler:
    """A handler of the same shape that ends every call with ``error``."""

    async def unary(_: object, context: Context) -> None:
        await refuse(context, error)

    async def stream(_: object, context: Context) -> AsyncIterator[bytes]:
        await refuse(context, error)
        yield b""  # never reached; it makes this a generator

    match handler.request_streaming, handler.response_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler(unary)
        case False, True:
            return grpc.unary_stream_rpc_method_handler(stream)
        case True, False:
            return grpc.stream_unary_rpc_method_handler(unary)
        case _:
            return grpc.stream_stream_rpc_method_handler(stream)
