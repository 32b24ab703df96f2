"""`trace`. Owns: a request's way through the mesh and the time of each step, as lines on one axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import Json, Node, connect
from fieldmesh.core.timeline import Row, Timeline, timeline

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from fieldmesh.client import Traced
    from fieldmesh.core.tracing import Span

BAR_CHARS_MIN: Final = 10
BAR_CHARS_MAX: Final = 60
STEP_CHARS_MIN: Final = 12
NODE_CHARS_MAX: Final = 16
NOTE_CHARS_MIN: Final = 10
TIME_CHARS: Final = 8
GAPS: Final = 4


def trace(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="A trace id (8 digits of it do), or a request id.")
    ],
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Show which way a request took through the mesh, and how long each step took there.

    Every node keeps the steps of its latest requests in memory; the one that is asked asks the others.
    """
    with connect(node) as client:
        traced = client.trace(name)
    if as_json:
        terminal.write_json(trace_json(traced))
        return
    console = terminal.console()
    console.print(trace_lines(traced, console.width), soft_wrap=True)


def trace_json(traced: Traced) -> dict[str, Any]:
    """A trace as `--json` prints it; times are seconds from its beginning."""
    from fieldmesh.client import as_json

    folded = timeline(traced.nodes)
    return {
        "trace_id": traced.trace_id,
        "request_ids": _request_ids(traced),
        "duration_s": folded.duration_s,
        "spans": [
            {
                "node": row.node_name,
                "name": row.span.name,
                "depth": row.depth,
                "begins_s": row.begins_s,
                "ends_s": row.ends_s,
                "error": row.span.error,
                "kind": row.span.kind.value,
                "span_id": row.span.span_id,
                "parent_id": row.span.parent_id,
                "started_unix_s": row.span.started_at,
                "attributes": as_json(row.span.attributes),
            }
            for row in folded.rows
        ],
        "clocks_moved_s": folded.moved_s,
        "spans_dropped": sum(node.spans_dropped for node in traced.nodes),
        "silent_nodes": as_json(traced.silent_nodes),
    }


def _request_ids(traced: Traced) -> list[str]:
    return list(dict.fromkeys(entry for node in traced.nodes for entry in node.request_ids))


def trace_lines(traced: Traced, width: int) -> Group:
    """A trace as people read it, in ``width`` columns: one line a step, with its place in time."""
    from rich.console import Group
    from rich.text import Text

    folded = timeline(traced.nodes)
    requests = _request_ids(traced)
    of = f"{len(requests)} requests" if len(requests) > 1 else f"request {requests[0]}" if requests else ""
    head = [f"trace {traced.trace_id}"] + ([of] if of else [])
    return Group(
        *(Text(terminal.printable(line)) for line in _folded_line(head, width)),
        *_Drawing(folded, width).lines(),
        *(Text(terminal.printable(line), style="dim") for line in _remarks(traced, folded)),
    )


def _folded_line(parts: list[str], width: int) -> list[str]:
    joined = " · ".join(parts)
    return [joined] if len(joined) <= width else parts


def _remarks(traced: Traced, folded: Timeline) -> list[str]:
    made = [
        f"The clock of {node} differs: its steps are moved {'on' if moved_s > 0 else 'back'} by "
        f"{seconds(abs(moved_s))}, into the calls to it."
        for node, moved_s in folded.moved_s.items()
    ]
    made += [f"{node.node_name} tells nothing: {node.reason}." for node in traced.silent_nodes]
    dropped = sum(node.spans_dropped for node in traced.nodes)
    return [*made, f"{dropped} steps more were not kept."] if dropped else made


class _Drawing:
    """The lines of a timeline: node, step, time, bar, note; the note goes first where there is no room."""

    def __init__(self, folded: Timeline, width: int) -> None:
        self._folded = folded
        rows = folded.rows
        self._node = min(NODE_CHARS_MAX, max((len(row.node_name) for row in rows), default=0))
        step = max((len(step_of(row)) for row in rows), default=0)
        self._note = max((len(note_of(row.span)) for row in rows), default=0)
        # What is left for the bar when everything else has what it wants.
        left = width - self._node - TIME_CHARS - GAPS - step - self._note
        if left < BAR_CHARS_MIN:
            left += self._note
            self._note = max(0, min(self._note, left - BAR_CHARS_MIN))
            self._note = self._note if self._note >= NOTE_CHARS_MIN else 0
            left -= self._note
        if left < BAR_CHARS_MIN:
            shorter = max(STEP_CHARS_MIN, step + left - BAR_CHARS_MIN)
            left, step = left + step - shorter, shorter
        self._step = step
        self._bar = max(3, min(BAR_CHARS_MAX, left))

    def lines(self) -> list[Text]:
        """All lines, with the axis at the top."""
        from rich.text import Text

        total = seconds(self._folded.duration_s)
        axis = f"0{total:>{self._bar - 1}}" if self._bar > len(total) else total
        margin = self._node + self._step + TIME_CHARS + GAPS - 1
        return [Text(" " * margin + axis, style="dim"), *(self._line(row) for row in self._folded.rows)]

    def _line(self, row: Row) -> Text:
        from rich.text import Text

        span = row.span
        took = "…" if row.ends_s is None else seconds(row.ends_s - row.begins_s)
        node = terminal.shortened(terminal.printable(row.node_name), self._node)
        step = terminal.shortened(terminal.printable(step_of(row)), self._step)
        made = Text(f"{node:<{self._node}} ", style="cyan")
        made.append(f"{step:<{self._step}} ", style="red" if span.error else "")
        made.append(f"{took:>{TIME_CHARS}} ", style="")
        made.append(f"{self._stroke(row):<{self._bar}}", style="red" if span.error else "green")
        if self._note:
            note = terminal.shortened(terminal.printable(note_of(span)), self._note)
            made.append(f" {note}", style="red" if span.error else "dim")
        made.rstrip()
        return made

    def _stroke(self, row: Row) -> str:
        """The row's place on the axis, at least one character; what has no end is dotted to the end."""
        scale = self._bar / self._folded.duration_s if self._folded.duration_s > 0 else 0.0
        begin = max(0, min(self._bar - 1, int(row.begins_s * scale)))
        if row.ends_s is None:
            return " " * begin + "┄" * (self._bar - begin)
        end = max(begin + 1, min(self._bar, math.ceil(row.ends_s * scale - 1e-6)))
        return " " * begin + "━" * (end - begin)


def step_of(row: Row) -> str:
    """A step's name at its place in the tree; ✗ where it failed."""
    mark = "✗ " if row.span.error else ""
    if not row.trunk:
        return f"{mark}{row.span.name}"
    above = "".join("│ " if more else "  " for more in row.trunk[:-1])
    return f"{above}{'├' if row.trunk[-1] else '└'} {mark}{row.span.name}"


def note_of(span: Span) -> str:
    """What else is worth a word on a line: the error, or what was counted or chosen."""
    about = span.attributes
    if span.error:
        return span.error
    if "fieldmesh.routing.node" in about:
        others = about.get("fieldmesh.routing.candidates")
        of = f" of {others}" if others != 1 else ""
        return f"chose {about['fieldmesh.routing.node']}{of}"
    if isinstance(number := about.get("fieldmesh.attempt"), int) and number > 1:
        return f"attempt {number}"
    if span.name == "prefill" and "gen_ai.usage.input_tokens" in about:
        cached = about.get("gen_ai.usage.cache_read.input_tokens")
        return f"{about['gen_ai.usage.input_tokens']} tokens" + (f", {cached} cached" if cached else "")
    if span.name == "decode" and "gen_ai.usage.output_tokens" in about:
        return f"{about['gen_ai.usage.output_tokens']} tokens"
    return ""


def seconds(duration_s: float) -> str:
    """A time with three digits."""
    if duration_s >= 0.9995:
        return f"{duration_s:.2f} s" if duration_s < 99.995 else f"{duration_s:.0f} s"
    milliseconds = duration_s * 1000
    digits = 2 if milliseconds < 9.995 else 1 if milliseconds < 99.95 else 0
    return f"{milliseconds:.{digits}f} ms"
