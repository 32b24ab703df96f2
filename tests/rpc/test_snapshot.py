"""What the web page is told. Goal: whole at first, then what changed; nothing that is not for everybody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fieldmesh.core.model import (
    Address,
    Attempt,
    CandidateNote,
    EngineState,
    Explanation,
    Load,
    Member,
    NodeId,
    NodeState,
)
from fieldmesh.rpc.admin import status_json
from fieldmesh.rpc.snapshot import Flow, Snapshot, changes, reasons, snapshot
from fieldmesh.v1 import admin_pb2 as pb
from tests.core.mesh_views import CODE_OFFER, member, three, view

A, B = NodeId("a"), NodeId("b")
LOG = status_json(
    pb.GetRaftStatusResponse(
        local_id="a",
        role="follower",
        term=3,
        leader_id="b",
        leader_name="b",
        members=[pb.RaftMember(id="a", name="a", voter=True, here=True)],
        revision=7,
        lag_entries=2,
        stale_s=0.4,
    )
)
FLOW = Flow(key="k", entry=A, serving=B, profile="code", domain="programming", tokens=3, state="running")


def told(*members: Member, log: dict[str, object] = LOG, flows: tuple[Flow, ...] = ()) -> Snapshot:
    return snapshot(view(*(members or three())), mesh="m", models=["auto", "code"], log=log, flows=flows)


def test_a_snapshot_tells_each_node_its_load_and_the_log() -> None:
    busy = Load(
        engine=EngineState.READY, slots=4, running=3, queued=2, queue_max=8, kv_cells_used=1, kv_cells_total=4
    )
    found = told(*three()[:1], member("b", CODE_OFFER, load=busy, rtt_s=0.00123))
    assert (found["mesh"], found["local"], found["models"]) == ("m", "a", ["auto", "code"])
    node = found["nodes"]["b"]
    assert (node["name"], node["state"], node["engine"]) == ("b", "alive", "ready")
    assert (node["running"], node["slots"], node["queued"], node["queue_max"]) == (3, 4, 2, 8)
    assert (node["kv_pressure"], node["rtt_ms"]) == (0.25, 1.0)
    assert node["profiles"][0]["domains"] == ["programming"]
    log = found["log"]
    assert (log["leader"]["name"], log["term"], log["revision"], log["lag_entries"]) == ("b", 3, 7, 2)
    assert [member["name"] for member in log["members"]] == ["a"]
    assert log["stale_s"] == 0


def test_a_node_that_drains_and_one_without_a_row_are_told_as_such() -> None:
    draining = member("b", load=Load(engine=EngineState.READY, draining=True))
    stranger = replace(member("c", state=NodeState.SUSPECT), row=None)
    nodes = told(*three()[:1], draining, stranger)["nodes"]
    assert nodes["b"]["engine"] == "draining"
    assert (nodes["c"]["state"], nodes["c"]["profiles"], nodes["c"]["pages"]) == ("suspect", [], [])


def test_only_what_changed_is_told_again() -> None:
    a, b, c = three()
    before = told(a, b, c)
    assert changes({}, before) == before
    assert changes(before, told(a, b, c)) == {}
    now = told(a, replace(b, state=NodeState.DEAD))
    assert changes(before, now) == {"nodes": {"b": now["nodes"]["b"], "c": None}}
    asked = told(a, b, c, flows=(FLOW,))
    assert changes(before, asked) == {"requests": asked["requests"]}


@pytest.mark.parametrize(("rtt_s", "stale_s"), [(0.0011, 0.9), (0.0009, 0.1)])
def test_what_merely_trembles_is_no_change(rtt_s: float, stale_s: float) -> None:
    a, b, c = three()
    now = told(a, replace(b, rtt_s=rtt_s), c, log={**LOG, "stale_s": stale_s})
    assert changes(told(), now) == {}


@pytest.mark.parametrize(
    ("peer", "http", "pages"),
    [
        ("127.0.0.1", "127.0.0.1", ["http://127.0.0.1:7480/"]),
        ("10.0.0.7", "10.0.0.7", ["http://10.0.0.7:7480/"]),
        ("10.0.0.7", "127.0.0.1", []),
        ("10.0.0.7", "localhost", []),
        ("fd00::1", "fd00::1", ["http://[fd00::1]:7480/"]),
    ],
)
def test_a_page_on_loopback_is_named_to_its_own_box_only(peer: str, http: str, pages: list[str]) -> None:
    found = member("b")
    assert found.row is not None
    row = replace(found.row, http_addresses=(Address(host=http, port=7480),))
    other = replace(found, address=Address(host=peer, port=7421), row=row)
    assert told(three()[0], other)["nodes"]["b"]["pages"] == pages


def test_a_request_is_told_by_where_it_goes_and_the_reasons_only_where_they_are_asked_for() -> None:
    note = CandidateNote(node=B, node_name="b", profile="code", score=1.23456, eligible=True, reason="free")
    attempt = Attempt(
        node=A,
        node_name="a",
        model_fingerprint="f",
        epoch=0,
        first_token_index=0,
        last_token_index=2,
        reason="ENGINE_LOST",
    )
    why = Explanation(
        policy="expected-time",
        classified_domain="programming",
        classified_confidence=0.98765,
        candidates=(note,),
    )
    flow = replace(FLOW, attempts=(attempt,), explanation=why)
    (request,) = told(flows=(flow,))["requests"]
    assert (request["entry"], request["serving"], request["attempts"]) == ("a", "b", 1)
    assert "candidates" not in request
    document = json.loads(json.dumps(reasons(flow)))
    assert document["attempts"] == [{"node": "a", "name": "a", "reason": "ENGINE_LOST", "tokens": 2}]
    assert (document["classified_domain"], document["classified_confidence"]) == ("programming", 0.988)
    assert document["candidates"] == [
        {"node": "b", "name": "b", "profile": "code", "score": 1.235, "eligible": True, "reason": "free"}
    ]
    assert reasons(FLOW)["candidates"] == []
