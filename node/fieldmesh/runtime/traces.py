"""Tells traces: ``TraceService`` at this node, on both of its listeners.

Owns: asking the other nodes for what they have of one. Must not: keep anything, or fold what was told
(whoever asked does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from fieldmesh.core.dispatch import Entry
from fieldmesh.core.errors import FieldmeshError, TraceNotFound
from fieldmesh.core.model import Address, Member, MeshView, NodeState
from fieldmesh.rpc.tracing import kept_to_proto, trace_name
from fieldmesh.runtime.door import Context, guarded
from fieldmesh.runtime.tracing import Tracer
from fieldmesh.v1 import trace_pb2 as pb
from fieldmesh.v1.trace_pb2_grpc import TraceServiceStub

TRACES = pb.DESCRIPTOR.services_by_name["TraceService"]
PEER_TIMEOUT_S = 2.0
"""A node that tells nothing for so long is named as silent; clients give a call three seconds."""
PEERS_ASKED_MAX = 128
SILENT_TOLD_MAX = 64
SPANS_TOLD_MAX = 2048
"""Of all nodes together: what fits a message, however long their names are."""

_WORTH_ASKING = (NodeState.ALIVE, NodeState.SUSPECT)


class Traces:
    """``TraceService``. ``channels`` are warm ones to peers. Errors: INVALID_REQUEST, TRACE_NOT_FOUND."""

    def __init__(
        self,
        tracer: Tracer,
        entry: Entry,
        view: Callable[[], MeshView],
        channels: Callable[[Address], grpc.aio.Channel],
    ) -> None:
        self._tracer = tracer
        self._entry = entry
        self._view = view
        self._channels = channels

    @guarded
    async def GetTrace(self, request: pb.GetTraceRequest, context: Context) -> pb.GetTraceResponse:
        name = trace_name(request.id)
        found, silent = [self._own(name)], list[pb.SilentNode]()
        if not request.own:
            others = [m for m in self._view().members if m.id != self._entry.node]
            asked = [m for m in others if m.state in _WORTH_ASKING][:PEERS_ASKED_MAX]
            for told in await asyncio.gather(*(self._ask(member, name) for member in asked)):
                if isinstance(told, pb.SilentNode):
                    silent.append(told)
                else:
                    found.append(told)
            silent += [_silent(m, f"it is {m.state.value}") for m in others if m not in asked]
        having = [told for told in found if told.nodes]
        if not having:
            raise TraceNotFound(_nowhere(name, silent))
        # A name may fit more than one trace: whichever began last.
        trace_id = max(having, key=_began).trace_id
        return pb.GetTraceResponse(
            trace_id=trace_id,
            nodes=bounded([node for told in having if told.trace_id == trace_id for node in told.nodes]),
            silent_nodes=silent[:SILENT_TOLD_MAX],
        )

    def _own(self, name: str) -> pb.GetTraceResponse:
        kept = self._tracer.find(name)
        if kept is None:
            return pb.GetTraceResponse()
        return pb.GetTraceResponse(
            trace_id=kept.trace_id, nodes=[kept_to_proto(kept, self._entry.node, self._entry.name)]
        )

    async def _ask(self, member: Member, name: str) -> pb.GetTraceResponse | pb.SilentNode:
        request = pb.GetTraceRequest(id=name, own=True)
        try:
            stub: Any = TraceServiceStub(self._channels(member.address))
            told: pb.GetTraceResponse = await stub.GetTrace(request, timeout=PEER_TIMEOUT_S)
            return told
        except grpc.aio.AioRpcError as error:
            match error.code():
                case grpc.StatusCode.NOT_FOUND:
                    return pb.GetTraceResponse()
                case grpc.StatusCode.UNIMPLEMENTED:
                    return _silent(member, "its version tells no traces")
                case grpc.StatusCode.DEADLINE_EXCEEDED:
                    return _silent(member, f"it did not answer within {PEER_TIMEOUT_S:g} s")
                case _:
                    return _silent(member, "it cannot be reached")
        except FieldmeshError as error:  # this node is stopping
            return _silent(member, error.message)


def bounded(nodes: list[pb.NodeSpans]) -> list[pb.NodeSpans]:
    """The same with at most SPANS_TOLD_MAX spans; those that are cut off are counted."""
    left = SPANS_TOLD_MAX
    for node in nodes:
        surplus = max(0, len(node.spans) - left)
        if surplus:
            del node.spans[left:]
            node.spans_dropped += surplus
        left -= len(node.spans)
    return nodes


def _silent(member: Member, reason: str) -> pb.SilentNode:
    return pb.SilentNode(node_id=member.id, node_name=member.name, reason=reason)


def _began(told: pb.GetTraceResponse) -> float:
    return min((span.start_unix_s for node in told.nodes for span in node.spans), default=0.0)


def _nowhere(name: str, silent: list[pb.SilentNode]) -> str:
    unasked = f" Not asked: {', '.join(node.node_name for node in silent[:8])}." if silent else ""
    return (
        f"No node that answers has a trace or request {name}: it is too old, its caller asked not to be "
        f"sampled, or it was never here.{unasked}"
    )
