"""The codec of traces: W3C Trace Context in metadata and headers, and spans to protobuf and back.

Owns: what of a caller's ``traceparent`` and ``tracestate`` is believed. Must not: import grpc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, cast

from google.protobuf.json_format import MessageToDict

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.timeline import NodeSpans
from fieldmesh.core.tracing import ID_CHARS_MIN, Attributes, Kept, Span, SpanKind, TraceContext, Value
from fieldmesh.rpc.inference import REQUEST_ID
from fieldmesh.v1 import trace_pb2 as pb

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
STATE_CHARS_MAX: Final = 512
_SAMPLED: Final = 1

# A later version may say more behind a dash; version ff and ids of zeros mean nothing.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.{0,200})?"
)


def context_from(pairs: Iterable[tuple[str, str | bytes]] | None) -> TraceContext | None:
    """The trace that metadata or headers name; None where they name none, or none that can be understood."""
    parent: str | None = None
    states: list[str] = []
    for name, value in pairs or ():
        if name == TRACEPARENT and isinstance(value, str):
            if parent is not None:
                return None  # which of the two would be anybody's guess
            parent = value
        elif name == TRACESTATE and isinstance(value, str):
            states.append(value)
    found = _TRACEPARENT.fullmatch(parent) if parent is not None else None
    if found is None or (found[1] == "00" and found[5]):
        return None
    state = ",".join(states)
    return TraceContext(
        trace_id=found[2],
        span_id=found[3],
        sampled=bool(int(found[4], 16) & _SAMPLED),
        state=state if len(state) <= STATE_CHARS_MAX and state.isascii() and state.isprintable() else "",
    )


def traceparent(context: TraceContext) -> str:
    """A context as it is handed on."""
    return f"00-{context.trace_id}-{context.span_id}-{'01' if context.sampled else '00'}"


def metadata_of(context: TraceContext) -> tuple[tuple[str, str], ...]:
    """What a call carries that belongs to a trace."""
    if not context.span_id:
        return ()
    parent = (TRACEPARENT, traceparent(context))
    return (parent, (TRACESTATE, context.state)) if context.state else (parent,)


def trace_name(name: str) -> str:
    """The id by which a trace is asked for. Raises InvalidRequest."""
    if len(name) < ID_CHARS_MIN or not REQUEST_ID.fullmatch(name):
        raise InvalidRequest(
            f"id must be a trace id (32 hex digits, or {ID_CHARS_MIN} or more of the first), or a request "
            f"id of {ID_CHARS_MIN} to 64 letters, digits and . _ : -",
            field="id",
        )
    return name


# --- spans -------------------------------------------------------------------------------

_KINDS = {
    SpanKind.INTERNAL: pb.SPAN_KIND_INTERNAL,
    SpanKind.SERVER: pb.SPAN_KIND_SERVER,
    SpanKind.CLIENT: pb.SPAN_KIND_CLIENT,
}
_KINDS_BACK = {number: kind for kind, number in _KINDS.items()}


def kept_to_proto(kept: Kept, node_id: str, node_name: str) -> pb.NodeSpans:
    """What this node has of a trace."""
    return pb.NodeSpans(
        node_id=node_id,
        node_name=node_name,
        spans=[_span_to_proto(span) for span in kept.spans],
        request_ids=kept.request_ids,
        spans_dropped=kept.spans_dropped,
    )


def _span_to_proto(span: Span) -> pb.Span:
    made = pb.Span(
        span_id=span.span_id,
        parent_id=span.parent_id,
        name=span.name,
        kind=_KINDS[span.kind],
        start_unix_s=span.started_at,
        end_unix_s=span.ended_at,
        error=span.error,
    )
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in span.attributes.items()
    }
    made.attributes.update(cast(Any, plain))
    return made


def spans_from_proto(told: pb.NodeSpans) -> NodeSpans:
    """What a node has of a trace."""
    return NodeSpans(
        node_id=told.node_id,
        node_name=told.node_name,
        spans=tuple(_span(span) for span in told.spans),
        request_ids=tuple(told.request_ids),
        spans_dropped=told.spans_dropped,
    )


def _span(told: pb.Span) -> Span:
    return Span(
        span_id=told.span_id,
        parent_id=told.parent_id,
        name=told.name,
        kind=_KINDS_BACK.get(told.kind, SpanKind.INTERNAL),
        started_at=told.start_unix_s,
        ended_at=told.end_unix_s if told.HasField("end_unix_s") else None,
        error=told.error,
        attributes=_attributes(told),
    )


def _attributes(told: pb.Span) -> Attributes:
    # A Struct knows one kind of number.
    def value(found: Any) -> Value:
        if isinstance(found, list):
            return tuple(str(entry) for entry in found)
        if isinstance(found, float) and found.is_integer():
            return int(found)
        return cast(Value, found)

    return {name: value(found) for name, found in MessageToDict(told.attributes).items()}
