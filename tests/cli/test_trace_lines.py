"""`trace` at the terminal. Goal: one line a step, on one axis, for any terminal and for programs.

Method: the command against a scripted node, and the drawing of traces made by hand.
"""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fieldmesh.cli.tracing import seconds, trace_lines
from fieldmesh.client import SilentNode, Traced
from fieldmesh.client.records import traced_from_proto
from fieldmesh.core.errors import NoCandidate, TraceNotFound
from fieldmesh.core.timeline import NodeSpans
from fieldmesh.core.tracing import Kept, Span, SpanKind, Value
from fieldmesh.rpc.tracing import kept_to_proto
from fieldmesh.v1 import trace_pb2 as pb
from tests.cli.conftest import Commands
from tests.client.scripted import ScriptedNode, refuses

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def span(name: str, parent: str, began: float, ended: float | None, error: str = "", **more: Value) -> Span:
    return Span(
        span_id=name,
        parent_id=parent,
        name=name,
        kind=SpanKind.INTERNAL,
        started_at=1000.0 + began,
        ended_at=None if ended is None else 1000.0 + ended,
        error=error,
        attributes={key.replace("__", "."): value for key, value in more.items()},
    )


ENTRY = (
    span("chat tiny", "", 0.0, 2.0),
    span(
        "route", "chat tiny", 0.0, 0.0002, fieldmesh__routing__node="code", fieldmesh__routing__candidates=2
    ),
    span("forward code", "chat tiny", 0.001, 0.5, "NODE_UNREACHABLE"),
    span("forward spare", "chat tiny", 0.5, 2.0, fieldmesh__attempt=2),
)
SERVING = (
    span("chat", "forward spare", 50.6, 51.9),
    span("prefill", "chat", 50.6, 51.0, gen_ai__usage__input_tokens=38),
    span("decode", "chat", 51.0, 51.9, gen_ai__usage__output_tokens=64),
)


def traced(*extra: NodeSpans) -> Traced:
    return Traced(
        trace_id=TRACE,
        nodes=(
            NodeSpans(node_id="a", node_name="general", spans=ENTRY, request_ids=("r-1",)),
            NodeSpans(node_id="b", node_name="spare", spans=SERVING, spans_dropped=3),
            *extra,
        ),
        silent_nodes=(SilentNode(node_id="c", node_name="code", reason="it is dead"),),
    )


def drawn(shown: Traced, width: int, *, colours: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=colours)
    console.print(trace_lines(shown, width), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_each_step_is_a_line_at_its_place_in_time() -> None:
    assert drawn(traced(), 72) == [
        f"trace {TRACE} · request r-1",
        "                                  0              2.00 s",
        "general chat tiny          2.00 s ━━━━━━━━━━━━━━━━━━━━━",
        "general ├ route           0.20 ms ━                     chose code of 2",
        "general ├ ✗ forward code   499 ms ━━━━━━                NODE_UNREACHABLE",
        "general └ forward spare    1.50 s      ━━━━━━━━━━━━━━━━ attempt 2",
        "spare     └ chat           1.30 s       ━━━━━━━━━━━━━━",
        "spare       ├ prefill      400 ms       ━━━━━           38 tokens",
        "spare       └ decode       900 ms           ━━━━━━━━━━  64 tokens",
        "The clock of spare differs: its steps are moved back by 50.00 s, into the calls to it.",
        "code tells nothing: it is dead.",
        "3 steps more were not kept.",
    ]


@pytest.mark.parametrize("width", [36, 50, 72, 110, 240])
def test_every_step_keeps_its_name_its_time_and_its_bar_at_any_width(width: int) -> None:
    lines = drawn(traced(), width)
    steps = [line for line in lines if "━" in line]
    assert len(steps) == 7
    assert all(len(line) <= width for line in steps)
    assert all(line.split()[0] in ("general", "spare") and (" s " in line or "ms " in line) for line in steps)
    assert sum("✗" in line for line in steps) == 1  # colours are not the only sign of a failure


def test_a_terminal_that_is_too_narrow_for_everything_still_gets_every_line() -> None:
    assert sum("━" in line for line in drawn(traced(), 20)) == 7


def test_failures_are_red_where_there_are_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    (failed,) = [line for line in drawn(traced(), 110, colours=True) if "✗" in line]
    assert "\x1b[31m" in failed
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in "".join(drawn(traced(), 110, colours=True))


def test_what_still_runs_is_dotted_to_the_end_of_the_axis() -> None:
    entry = NodeSpans(
        node_id="a",
        node_name="general",
        spans=(span("chat tiny", "", 0.0, None), span("route", "chat tiny", 0.0, 1.0)),
    )
    shown = drawn(Traced(trace_id=TRACE, nodes=(entry,), silent_nodes=()), 60)
    assert shown[2].split() == ["general", "chat", "tiny", "…", "┄" * 32]


def test_what_nodes_tell_does_not_steer_the_terminal() -> None:
    evil = NodeSpans(node_id="e", node_name="\x1b[2Jevil", spans=(span("\x1b]0;x\x07step", "", 0, 1),))
    assert "\x1b" not in "".join(drawn(traced(evil), 100))


@pytest.mark.parametrize(
    ("duration_s", "shown"),
    [
        (0, "0.00 ms"),
        (0.000123, "0.12 ms"),
        (0.00999, "9.99 ms"),
        (0.012345, "12.3 ms"),
        (0.25, "250 ms"),
        (0.9999, "1.00 s"),
        (99.99, "99.99 s"),
        (600, "600 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(duration_s: float, shown: str) -> None:
    assert seconds(duration_s) == shown


# --- the command -------------------------------------------------------------------------


def kept(*spans: Span) -> pb.GetTraceResponse:
    made = Kept(trace_id=TRACE, opened_at=0, clock_offset_s=0, request_ids=["r-1"], spans=list(spans))
    return pb.GetTraceResponse(
        trace_id=TRACE,
        nodes=[kept_to_proto(made, "a", "general")],
        silent_nodes=[pb.SilentNode(node_id="c", node_name="code", reason="it is dead")],
    )


def test_a_trace_is_asked_for_by_its_name(cli: Commands, node: ScriptedNode) -> None:
    node.trace = kept(*ENTRY)
    assert cli("trace", "--node", str(node.address), TRACE[:8]) == 0
    assert node.requests[-1].id == TRACE[:8]
    assert cli.out.splitlines()[0] == f"trace {TRACE} · request r-1"
    assert "✗ forward code" in cli.out


def test_json_tells_everything(cli: Commands, node: ScriptedNode) -> None:
    node.trace = kept(*ENTRY)
    assert cli("trace", "--node", str(node.address), "--json", TRACE) == 0
    told = json.loads(cli.out)
    assert (told["trace_id"], told["request_ids"], told["duration_s"]) == (TRACE, ["r-1"], 2.0)
    assert told["silent_nodes"] == [{"node_id": "c", "node_name": "code", "reason": "it is dead"}]
    (failed,) = [entry for entry in told["spans"] if entry["error"]]
    assert (failed["name"], failed["node"], failed["depth"]) == ("forward code", "general", 1)
    assert told["spans"][1]["attributes"] == {
        "fieldmesh.routing.node": "code",
        "fieldmesh.routing.candidates": 2,
    }
    assert traced_from_proto(node.trace).nodes[0].spans == ENTRY


def test_a_trace_that_nobody_has_ends_as_not_found(cli: Commands, node: ScriptedNode) -> None:
    node.unary_errors.append(TraceNotFound("No node that answers has it"))
    assert cli("trace", "--node", str(node.address), TRACE) == 4
    assert cli.err == "fieldmesh: No node that answers has it [TRACE_NOT_FOUND]\n"


def test_whoever_asks_is_told_the_trace(cli: Commands, node: ScriptedNode) -> None:
    assert cli("ask", "--node", str(node.address), "hello") == 0
    sent = node.metadata[-1]["traceparent"].split("-")[1]
    assert cli.err.rstrip().endswith(f"· trace {sent[:8]}")
    assert cli("ask", "--node", str(node.address), "--json", "hello") == 0
    assert json.loads(cli.out)["trace_id"] == node.metadata[-1]["traceparent"].split("-")[1]


def test_a_failure_says_where_to_look(cli: Commands, node: ScriptedNode) -> None:
    node.script.append(refuses(NoCandidate("Nobody can serve this", metadata={"trace_id": TRACE})))
    assert cli("ask", "--node", str(node.address), "--timeout-s", "0.1", "hello") != 0
    sent = node.metadata[0]["traceparent"].split("-")[1]
    assert f"fieldmesh trace {sent[:8]}" in cli.err
