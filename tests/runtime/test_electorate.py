"""Who may become a voter, who should lead next, and when a log counts no more, by what a node sees."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fieldmesh.core.errors import ChangeRefused
from fieldmesh.core.model import Address, Load, Member, MeshView, NodeId, NodeState, Row, Seat, SeatKind
from fieldmesh.runtime.council_model import CouncilStatus
from fieldmesh.runtime.electorate import _may_vote, successor
from fieldmesh.runtime.recovery import superseded

A, B, C = NodeId("a" * 32), NodeId("b" * 32), NodeId("c" * 32)
OWN = Seat(log="own", epoch=1, kind=SeatKind.VOTER)
HERE = Address(host="10.0.0.1", port=1)
STATUS = CouncilStatus(
    seat=OWN,
    role=None,
    term=1,
    leader=A,
    voters=(A, B, C),
    learners=(),
    commit=1,
    applied=1,
    revision=0,
    lag_entries=0,
    stale_s=0.0,
    stopped_why="",
    following=None,
    log_bytes=0,
    matches=((B, 5), (C, 9)),
    caught_up=(),
    lost_voters=(),
    other_logs={},
)


def member(
    node: NodeId, seat: Seat | None = OWN, state: NodeState = NodeState.ALIVE, *, draining: bool = False
) -> Member:
    row = Row(
        id=node,
        name=node[0],
        mesh="m",
        incarnation=1,
        sequence=1,
        addresses=(HERE,),
        client_addresses=(HERE,),
        seat=seat,
    )
    return Member(
        id=node,
        name=node[0],
        address=HERE,
        state=state,
        incarnation=1,
        load=Load(draining=draining),
        row=row,
    )


def view(*members: Member) -> MeshView:
    return MeshView(local=A, members=members)


@pytest.mark.parametrize(
    ("seat", "may"),
    [
        (replace(OWN, kind=SeatKind.OBSERVER), True),
        (None, False),
        (Seat(log="another", epoch=1, kind=SeatKind.OBSERVER), False),
        (Seat(log="own", epoch=0, kind=SeatKind.VOTER), False),
    ],
)
def test_only_who_follows_the_log_as_it_is_now_may_become_a_voter(seat: Seat | None, may: bool) -> None:
    alone = replace(STATUS, voters=(A,))
    assert _may_vote(member(B, seat), alone) is may
    assert _may_vote(member(A, seat), alone), "who is a member counts as one whatever its row says"


def test_the_voter_that_is_furthest_along_should_lead_next() -> None:
    assert successor(STATUS, view(member(A), member(B), member(C))) == C
    assert successor(STATUS, view(member(A), member(B), member(C, state=NodeState.DEAD))) == B
    assert successor(STATUS, view(member(A), member(B), member(C, draining=True))) == B
    with pytest.raises(ChangeRefused):
        successor(STATUS, view(member(A)))


def test_a_log_counts_no_more_when_somebody_is_in_a_later_epoch_of_it() -> None:
    later = Seat(log="own", epoch=2, kind=SeatKind.VOTER)
    assert "epoch 2" in superseded(OWN, view(member(A), member(B, later)))
    assert "epoch 2" in superseded(OWN, view(member(B, later, NodeState.DEAD))), "what was said stays true"
    assert superseded(later, view(member(B))) == ""
    assert superseded(OWN, view(member(B, Seat(log="another", epoch=9, kind=SeatKind.VOTER)))) == ""
    assert superseded(None, view(member(B, later))) == ""
