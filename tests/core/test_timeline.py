"""The tree of a trace. Goal: by whichever clock a step is told, it lies inside what it is part of.

Method: spans by hand, with clocks that are set wrong.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.timeline import NodeSpans, Timeline, timeline
from fieldmesh.core.tracing import Span, SpanKind


def span(name: str, parent: str, began: float, ended: float | None, clock: float = 0.0) -> Span:
    return Span(
        span_id=name,
        parent_id=parent,
        name=name,
        kind=SpanKind.INTERNAL,
        started_at=began + clock,
        ended_at=None if ended is None else ended + clock,
    )


def told(node: str, *spans: Span) -> NodeSpans:
    return NodeSpans(node_id=node, node_name=node, spans=spans)


def forwarded(clock: float) -> Timeline:
    """One request that another node answers, whose clock is wrong by so much."""
    entry = told(
        "general",
        span("chat", "client", 100.0, 101.0),
        span("route", "chat", 100.0, 100.1),
        span("forward", "chat", 100.1, 101.0),
    )
    serving = told(
        "code",
        span("serve", "forward", 100.15, 100.95, clock),
        span("prefill", "serve", 100.2, 100.5, clock),
        span("decode", "serve", 100.5, 100.9, clock),
    )
    return timeline([serving, entry])


@pytest.mark.parametrize("clock", [0.0, 3.0, -3.0, 86_400.0, -1.7e9])
def test_steps_lie_inside_the_call_that_they_were_made_for(clock: float) -> None:
    made = forwarded(clock)
    assert [(row.depth, row.node_name, row.span.name) for row in made.rows] == [
        (0, "general", "chat"),
        (1, "general", "route"),
        (1, "general", "forward"),
        (2, "code", "serve"),
        (3, "code", "prefill"),
        (3, "code", "decode"),
    ]
    rows = {row.span.name: row for row in made.rows}
    assert made.duration_s == pytest.approx(1.0)
    assert rows["serve"].begins_s == pytest.approx(0.15, abs=1e-5)
    assert rows["decode"].ends_s == pytest.approx(0.9, abs=1e-5)
    assert set(made.moved_s) == ({"code"} if clock else set())


def test_a_clock_that_is_not_seen_to_be_wrong_is_left_alone() -> None:
    assert forwarded(0.04).moved_s == {}
    assert forwarded(0.06)  # out at the end by a hair: the way back would have taken no time
    assert forwarded(0.06).moved_s == {"code": pytest.approx(-0.06)}


def test_what_ran_longer_than_its_caller_waited_begins_with_the_call() -> None:
    made = timeline(
        [
            told("general", span("forward", "", 10.0, 10.5)),
            told("code", span("serve", "forward", 50.0, 59.0)),
        ]
    )
    assert [(row.begins_s, row.ends_s) for row in made.rows] == [(0.0, 0.5), (0.0, 9.0)]


def test_the_other_side_of_a_call_that_was_given_up_may_hear_of_it_late() -> None:
    forward, serve = span("forward", "", 10.0, 10.5), span("serve", "forward", 10.1, 10.7)
    serve.error = "CANCELLED"
    made = timeline([told("general", forward), told("code", serve)])
    assert made.moved_s == {}
    assert made.duration_s == pytest.approx(0.7)


def test_what_still_runs_has_no_end() -> None:
    made = timeline(
        [
            told("general", span("chat", "", 10.0, None), span("forward", "chat", 10.5, None)),
            told("code", span("serve", "forward", 5.0, None)),
        ]
    )
    assert [(row.begins_s, row.ends_s) for row in made.rows] == [(0.0, None), (0.5, None), (0.5, None)]
    assert made.duration_s == 0.5


def test_a_step_whose_parent_nobody_tells_of_stands_at_the_top() -> None:
    made = timeline([told("code", span("serve", "forward", 10.0, 11.0), span("decode", "serve", 10.0, 11.0))])
    assert [(row.depth, row.span.name) for row in made.rows] == [(0, "serve"), (1, "decode")]


def test_the_trunk_says_where_more_follows() -> None:
    assert [row.trunk for row in forwarded(0.0).rows] == [
        (),
        (True,),
        (False,),
        (False, False),
        (False, False, True),
        (False, False, False),
    ]


def test_an_empty_trace_is_an_empty_tree() -> None:
    assert timeline([]) == Timeline(rows=(), duration_s=0.0, moved_s={})


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),  # node
            st.integers(-1, 12),  # parent; it may be the span itself, a later one, or nobody
            st.floats(-1e9, 1e9),
            st.one_of(st.none(), st.floats(0, 1e6)),
        ),
        max_size=12,
    )
)
def test_nonsense_is_folded_too_and_each_step_told_once(
    spans: list[tuple[int, int, float, float | None]],
) -> None:
    made = timeline(
        told(f"n{node}", span(str(index), str(parent), began, None if took is None else began + took))
        for index, (node, parent, began, took) in enumerate(spans)
    )
    names = [row.span.name for row in made.rows]
    assert len(names) == len(set(names))
    assert all(row.begins_s >= 0 for row in made.rows)
    for row in made.rows:
        assert row.ends_s is None or 0 <= row.ends_s <= made.duration_s * (1 + 1e-9) + 1e-6
