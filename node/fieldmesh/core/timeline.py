"""A trace's spans, told by several nodes, as one tree on one axis of time.

Owns: who is whose child, in which order, and where a step lies on the axis although clocks differ: what a
node did for another happened while the other waited for it, so that a node whose clock says otherwise is
moved by what is missing. Must not: draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fieldmesh.core.tracing import Span

DEPTH_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpans:
    """What one node tells of a trace."""

    node_id: str
    node_name: str
    spans: tuple[Span, ...]
    request_ids: tuple[str, ...] = ()
    spans_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One span on the axis: seconds from the beginning of the trace. ``trunk`` says of each level above it,
    and last of itself, whether more follows there. ``ends_s`` is None where nobody knows an end."""

    node_name: str
    span: Span
    trunk: tuple[bool, ...]
    begins_s: float
    ends_s: float | None

    @property
    def depth(self) -> int:
        return len(self.trunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A trace in the order in which it is read. ``moved_s``: by how much clocks were corrected, by node."""

    rows: tuple[Row, ...]
    duration_s: float
    moved_s: dict[str, float]


def timeline(nodes: Iterable[NodeSpans]) -> Timeline:
    """The tree of a trace. A span whose parent nobody tells of stands at the top."""
    told = [(node, span) for node in nodes for span in node.spans]
    known = {span.span_id for _, span in told}
    below: dict[str, list[tuple[NodeSpans, Span]]] = {}
    for node, span in told:
        below.setdefault(span.parent_id if span.parent_id in known else "", []).append((node, span))
    folding = _Folding(below)
    folding.children("", (), None, 0.0)
    rows = folding.rows
    start_s = min((row.begins_s for row in rows), default=0.0)
    end_s = max((row.begins_s if row.ends_s is None else row.ends_s for row in rows), default=0.0)
    return Timeline(
        rows=tuple(
            Row(
                node_name=row.node_name,
                span=row.span,
                trunk=row.trunk,
                begins_s=row.begins_s - start_s,
                ends_s=None if row.ends_s is None else row.ends_s - start_s,
            )
            for row in rows
        ),
        duration_s=end_s - start_s,
        moved_s=folding.moved_s,
    )


class _Folding:
    """The walk from the top down; ``rows`` are on the clock of the node at the top."""

    def __init__(self, below: dict[str, list[tuple[NodeSpans, Span]]]) -> None:
        self.rows: list[Row] = []
        self.moved_s: dict[str, float] = {}
        self._below = below
        self._done: set[str] = set()

    def children(
        self, parent_id: str, trunk: tuple[bool, ...], parent: tuple[str, Span] | None, shift_s: float
    ) -> None:
        """Everything under one span, whose node's clock is moved by ``shift_s``."""
        found = [
            (node, span, self._shift_s(node, span, parent, shift_s))
            for node, span in self._below.get(parent_id, ())
            if span.span_id not in self._done
        ]
        found.sort(key=lambda entry: (entry[1].started_at + entry[2], entry[1].span_id))
        self._done.update(span.span_id for _, span, _ in found)
        for position, (node, span, moved_s) in enumerate(found):
            self.rows.append(
                Row(
                    node_name=node.node_name,
                    span=span,
                    trunk=(*trunk, position < len(found) - 1) if parent is not None else (),
                    begins_s=span.started_at + moved_s,
                    ends_s=None if span.ended_at is None else span.ended_at + moved_s,
                )
            )
            if len(trunk) < DEPTH_MAX:
                self.children(span.span_id, self.rows[-1].trunk, (node.node_id, span), moved_s)

    def _shift_s(self, node: NodeSpans, span: Span, parent: tuple[str, Span] | None, shift_s: float) -> float:
        if parent is None:
            return 0.0
        parent_node, outer = parent
        if node.node_id == parent_node:
            return shift_s
        moved_s = fitting_s(span, outer, shift_s, self.moved_s.get(node.node_name, 0.0))
        if moved_s:
            self.moved_s.setdefault(node.node_name, moved_s)
        return moved_s


def fitting_s(inner: Span, outer: Span, outer_shift_s: float, wanted_s: float) -> float:
    """By how much to move ``inner`` so that it lies in ``outer``: by ``wanted_s`` where that does; else to
    the middle, as the ways there and back are taken to be equally long; to the beginning where it is too
    long. Of a call that failed or was given up, the other side may hear late: it only begins inside."""
    least_s = outer.started_at + outer_shift_s - inner.started_at
    if outer.ended_at is None:
        return max(wanted_s, least_s)
    cut_short = inner.ended_at is None or inner.error or outer.error
    most_s = outer.ended_at + outer_shift_s - (inner.started_at if cut_short else inner.ended_at or 0.0)
    if most_s < least_s:
        return least_s
    return wanted_s if least_s <= wanted_s <= most_s else (least_s + most_s) / 2
