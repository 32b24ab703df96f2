"""Calls about the log on the wire. Goal: what comes out is what went in, and nothing else is accepted."""

from __future__ import annotations

import pytest

from fieldmesh.core import settings
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.following import NEVER, PIECE_BYTES_MAX, Content, LogView, Piece
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import AddLearner, Change, Members, Promote, Remove, Transfer
from fieldmesh.core.settings import Code, Command, Kind, Outcome
from fieldmesh.rpc import following as wire
from fieldmesh.v1 import consensus_pb2 as pb

NODE = NodeId("a" * 32)
VIEW = LogView(
    log="log",
    epoch=1,
    term=3,
    leader=NODE,
    members=Members(voters=(NODE,), learners=(NodeId("b"),)),
    commit=9,
    applied=8,
    current_at=90.0,
)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(view=VIEW, revision=4),
        Piece(view=VIEW, revision=4, content=Content.SNAPSHOT, data=b"\x00\xff", more=True),
        Piece(view=VIEW, revision=2**62, content=Content.RECORDS, data=b"x"),
    ],
)
def test_a_piece_crosses_the_wire_with_its_age(piece: Piece) -> None:
    response = pb.WatchResponse.FromString(wire.piece_to_proto(piece, now=100.0).SerializeToString())
    assert response.view.stale_s == 10.0
    assert wire.piece_from_proto(response, now=100.0) == piece


def test_what_was_never_current_stays_so() -> None:
    view = LogView(log="log", epoch=0, term=1, leader=None, members=VIEW.members, commit=0, applied=0)
    back = wire.piece_from_proto(wire.piece_to_proto(Piece(view=view, revision=0), now=5.0), now=50.0)
    assert (back.view.current_at, back.view.leader) == (NEVER, None)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.view.ClearField("log"),
        lambda r: setattr(r.view, "log", "x" * 200),
        lambda r: setattr(r.view, "term", 2**63),
        lambda r: setattr(r, "revision", 2**63),
        lambda r: setattr(r.view, "stale_s", float("nan")),
        lambda r: setattr(r.view, "stale_s", -5.0),
        lambda r: setattr(r, "content", 9),
        lambda r: setattr(r, "data", b"x" * (PIECE_BYTES_MAX + 1)),
        lambda r: r.view.members.voters.append("0"),
    ],
)
def test_a_piece_that_no_member_sends_is_refused(spoil: object) -> None:
    response = wire.piece_to_proto(Piece(view=VIEW, revision=4), now=100.0)
    spoil(response)  # type: ignore[operator]
    with pytest.raises(InvalidRequest):
        wire.piece_from_proto(response, now=100.0)


@pytest.mark.parametrize(
    "change", [AddLearner(node=NODE), Promote(node=NODE), Remove(node=NODE), Transfer(to=NODE)]
)
def test_a_change_of_members_crosses_the_wire(change: Change | Transfer) -> None:
    assert wire.change_from_proto(wire.change_to_proto(VIEW, change)) == change


@pytest.mark.parametrize("node", ["", "x" * 200, "a,b", "a;b"])
def test_a_change_without_a_node_id_is_refused(node: str) -> None:
    with pytest.raises(InvalidRequest):
        wire.change_from_proto(pb.ChangeMembersRequest(log="log", add=node))


def test_commands_cross_the_wire_and_anything_else_is_refused() -> None:
    command = Command(kind=Kind.OPEN_SESSION, author="ann")
    good = settings.encode(command)
    assert wire.commands_from_proto(pb.SubmitRequest(commands=[good, good])) == [command, command]
    newer = bytes((settings.COMMAND_VERSION + 1,)) + good[1:]
    for commands in ([], [good] * (wire.COMMANDS_MAX + 1), [b""], [good, b"\x01nonsense"], [newer]):
        with pytest.raises(InvalidRequest):
            wire.commands_from_proto(pb.SubmitRequest(commands=commands))


@pytest.mark.parametrize("code", list(Code))
def test_outcomes_cross_the_wire(code: Code) -> None:
    outcome = Outcome(code=code, revision=7, session=3)
    assert wire.outcome_from_proto(wire.outcome_to_proto(outcome)) == outcome


def test_an_outcome_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        wire.outcome_from_proto(pb.SubmitResult(applied=True, code="new"))
