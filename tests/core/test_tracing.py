"""The book of traces. Goal: what a request did is found again, and the book never outgrows its bounds.

Method: the book alone, with times and randomness from the test.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.tracing import (
    SPAN_BYTES,
    VALUE_CHARS_MAX,
    Kept,
    Span,
    SpanKind,
    Trace,
    TraceBook,
    TraceBounds,
    TraceContext,
)

OFFSET_S = 1_000_000.0


def book(**bounds: float) -> TraceBook:
    return TraceBook(TraceBounds(**bounds), Random(1))  # type: ignore[arg-type]


def opened(
    of: TraceBook, request_id: str = "r", context: TraceContext | None = None, now: float = 0
) -> Trace:
    return of.open(context, request_id, now=now, clock_offset_s=OFFSET_S)


def found(of: TraceBook, name: str, now: float = 0) -> Kept:
    kept = of.find(name, now)
    assert kept is not None
    return kept


def test_a_request_without_a_trace_gets_one_of_its_own() -> None:
    made = book()
    first, second = opened(made, "one").context, opened(made, "two").context
    assert first.trace_id != second.trace_id
    assert len(first.trace_id) == 32
    assert (first.span_id, first.sampled) == ("", True)


def test_a_request_goes_on_in_the_trace_that_it_brought() -> None:
    made = book()
    trace = opened(made, "one", TraceContext(trace_id="a" * 32, span_id="b" * 16))
    trace.begin("route", 1.0)
    (span,) = found(made, "one").spans
    assert (found(made, "one").trace_id, span.parent_id) == ("a" * 32, "b" * 16)


def test_a_step_inside_a_step_is_its_child_and_so_is_what_is_handed_on() -> None:
    made = book()
    trace = opened(made)
    outer = trace.begin("chat", 1.0, {"gen_ai.operation.name": "chat"}, SpanKind.SERVER)
    assert outer is not None
    inner = trace.under(outer).begin("forward", 2.0, kind=SpanKind.CLIENT)
    assert inner is not None
    trace.end(inner, 3.0, {"n": 3})
    trace.end(outer, 4.5, error="STREAM_LOST")
    assert (outer.parent_id, inner.parent_id) == ("", outer.span_id)
    assert trace.under(outer).under(inner).context.span_id == inner.span_id
    assert (inner.started_at, inner.ended_at) == (OFFSET_S + 2.0, OFFSET_S + 3.0)
    assert (outer.ended_at, outer.error) == (OFFSET_S + 4.5, "STREAM_LOST")
    assert inner.attributes == {"n": 3}


def test_what_has_ended_is_told_once_and_stays_as_it_is() -> None:
    told: list[tuple[TraceContext, Span]] = []
    made = TraceBook(TraceBounds(), Random(1), lambda context, span: told.append((context, span)))
    trace = opened(made)
    span = trace.begin("chat", 1.0)
    assert told == []
    trace.end(span, 2.0)
    trace.end(span, 9.0, error="LATE")
    assert told == [(trace.context, span)]
    assert span is not None
    assert (span.ended_at, span.error) == (OFFSET_S + 2.0, "")


def test_a_caller_who_wants_no_sample_leaves_nothing_and_the_wish_is_handed_on() -> None:
    made = book()
    trace = opened(made, "r", TraceContext(trace_id="a" * 32, span_id="b" * 16, sampled=False))
    span = trace.begin("chat", 1.0)
    trace.end(span, 2.0)
    trace.add("route", 1.0, 2.0)
    assert span is None
    assert (len(made), made.find("r", 0), made.size_bytes) == (0, None, 0)
    handed_on = trace.under(span).context
    assert (handed_on.span_id, handed_on.sampled) == ("b" * 16, False)


def test_a_trace_is_found_by_its_id_its_beginning_and_its_requests() -> None:
    made = book()
    context = TraceContext(trace_id="0123456789abcdef" * 2, span_id="b" * 16)
    for request_id in ("first", "second"):
        opened(made, request_id, context)
    for name in (context.trace_id, "01234567", "0123456789ABCDEF", "first", "second"):
        assert found(made, name).trace_id == context.trace_id
    assert found(made, "first").request_ids == ["first", "second"]
    for name in ("0123456", "01234568", "third", ""):
        assert made.find(name, 0) is None


def test_a_request_id_that_is_used_again_names_the_later_trace() -> None:
    made = book(traces_max=2)
    opened(made, "r", now=1)
    later = opened(made, "r", now=2).context.trace_id
    opened(made, "other", now=3)  # the first one goes
    assert found(made, "r").trace_id == later


def test_what_is_too_old_is_not_told_and_goes_with_the_next() -> None:
    made = book(kept_s=10.0)
    opened(made, "old", now=0)
    assert made.find("old", 10.0) is not None
    assert made.find("old", 10.5) is None
    opened(made, "new", now=11.0)
    assert len(made) == 1


def test_a_trace_holds_so_many_steps_and_counts_the_rest() -> None:
    made = book(spans_max=3)
    trace = opened(made)
    spans = [trace.begin("route", float(now)) for now in range(5)]
    assert [span is not None for span in spans] == [True, True, True, False, False]
    assert found(made, "r").spans_dropped == 2
    trace.end(spans[-1], 9.0)


def test_long_values_are_cut() -> None:
    trace = opened(book())
    span = trace.begin("chat", 1.0, {"name": "x" * 1000})
    trace.end(span, 2.0)
    assert span is not None
    assert span.attributes["name"] == "x" * VALUE_CHARS_MAX


def test_a_step_that_ends_before_it_began_took_no_time() -> None:
    trace = opened(book())
    span = trace.begin("prefill", 2.0)
    trace.end(span, 1.0)
    assert span is not None
    assert span.ended_at == span.started_at


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 300), st.booleans()), max_size=60
    ),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_the_book_stays_within_its_bounds(
    work: list[tuple[int, int, int, bool]], traces_max: int, spans: int
) -> None:
    bytes_max = spans * SPAN_BYTES
    made = book(traces_max=traces_max, bytes_max=bytes_max, spans_max=4, kept_s=30)
    for now, (which, steps, chars, ends) in enumerate(work):
        before = made.size_bytes
        trace = opened(made, f"r{which}", TraceContext(trace_id=f"{which:032x}", span_id="b" * 16), now)
        assert len(made) <= traces_max
        assert made.size_bytes <= max(bytes_max, before)
        for _ in range(steps):
            span = trace.begin("step", now, {"text": "x" * chars})
            if ends:
                trace.end(span, now)
        names = [made.find(f"r{number}", now) for number in range(6)]
        assert made.size_bytes == sum({kept.trace_id: kept.size_bytes for kept in names if kept}.values())
    opened(made, "last", now=len(work) + 31)
    assert len(made) == 1
    assert made.size_bytes == 0


@pytest.mark.parametrize("bits", [64, 128])
def test_ids_are_never_zero(bits: int) -> None:
    class Zero(Random):
        def getrandbits(self, k: int, /) -> int:
            return 0

    assert int(TraceBook(TraceBounds(), Zero()).new_id(bits), 16) == 1
