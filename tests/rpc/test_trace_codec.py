"""Traces on the wire. Goal: a caller's context is believed where it is one, and spans arrive as they left."""

from __future__ import annotations

import pytest

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.timeline import NodeSpans
from fieldmesh.core.tracing import Kept, Span, SpanKind, TraceContext
from fieldmesh.rpc.tracing import (
    STATE_CHARS_MAX,
    context_from,
    kept_to_proto,
    metadata_of,
    spans_from_proto,
    trace_name,
)
from fieldmesh.v1 import trace_pb2 as pb

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def of(*values: str, state: str | None = None) -> TraceContext | None:
    pairs = [("traceparent", value) for value in values]
    return context_from(pairs if state is None else [*pairs, ("tracestate", state)])


def test_a_callers_context_is_read_and_handed_on() -> None:
    context = of(GOOD, state="vendor=1")
    assert context == TraceContext(trace_id=TRACE, span_id=SPAN, sampled=True, state="vendor=1")
    assert metadata_of(context) == (("traceparent", GOOD), ("tracestate", "vendor=1"))


@pytest.mark.parametrize(
    ("flags", "sampled"), [("00", False), ("01", True), ("03", True), ("02", False), ("ff", True)]
)
def test_one_bit_says_whether_to_sample(flags: str, sampled: bool) -> None:
    context = of(f"00-{TRACE}-{SPAN}-{flags}")
    assert context is not None
    assert context.sampled is sampled
    assert metadata_of(context)[0][1].endswith("-01" if sampled else "-00")


def test_a_later_version_may_say_more() -> None:
    assert of(f"cc-{TRACE}-{SPAN}-01-what-the-future-holds") == of(GOOD)
    assert of(f"cc-{TRACE}-{SPAN}-01") == of(GOOD)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        GOOD.upper(),
        f" {GOOD}",
        f"{GOOD}\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0g",
        f"cc-{TRACE}-{SPAN}-01more",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 100_000}",
    ],
)
def test_what_is_no_context_begins_a_trace_of_ones_own(value: str) -> None:
    assert of(value) is None


def test_two_contexts_are_none() -> None:
    assert of(GOOD, GOOD) is None
    assert context_from(None) is None
    assert context_from([("traceparent", GOOD.encode())]) is None


@pytest.mark.parametrize("state", ["x" * (STATE_CHARS_MAX + 1), "näh=1", "a=1\r\nx-evil: 1"])
def test_a_state_that_cannot_be_handed_on_is_dropped_alone(state: str) -> None:
    context = of(GOOD, state=state)
    assert context is not None
    assert (context.trace_id, context.state) == (TRACE, "")


def test_states_of_several_headers_are_joined() -> None:
    context = context_from([("tracestate", "a=1"), ("traceparent", GOOD), ("tracestate", "b=2")])
    assert context is not None
    assert context.state == "a=1,b=2"


def test_spans_arrive_as_they_left() -> None:
    spans = [
        Span(
            span_id=SPAN,
            parent_id="",
            name="chat tiny",
            kind=SpanKind.SERVER,
            started_at=1_790_000_000.123456,
            ended_at=1_790_000_001.5,
            error="STREAM_LOST",
            attributes={"n": 3, "share": 0.5, "fits": True, "why": "so", "reasons": ("stop", "length")},
        ),
        Span(span_id=SPAN[::-1], parent_id=SPAN, name="decode", kind=SpanKind.CLIENT, started_at=2.0),
    ]
    kept = Kept(
        trace_id=TRACE, opened_at=0, clock_offset_s=0, request_ids=["r"], spans=spans, spans_dropped=4
    )
    told = pb.NodeSpans.FromString(kept_to_proto(kept, "a" * 32, "general").SerializeToString())
    assert spans_from_proto(told) == NodeSpans(
        node_id="a" * 32,
        node_name="general",
        spans=tuple(spans),
        request_ids=("r",),
        spans_dropped=4,
    )


@pytest.mark.parametrize("name", ["", "1234567", "x" * 65, "a b c d e", "../../../etc"])
def test_a_name_that_can_name_no_trace_is_refused_in_words(name: str) -> None:
    with pytest.raises(InvalidRequest, match="trace id") as caught:
        trace_name(name)
    assert caught.value.field == "id"
