"""Keeps the voters as ``core.topology`` advises, while this node leads the log.

Owns: showing the topology who is there, and performing one change at a time through the council. Every node
looks, so that a new leader knows how long the others have been there. Must not: decide who should vote.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from fieldmesh.core.errors import ChangeRefused, FieldmeshError
from fieldmesh.core.model import Member, MeshView, NodeId, NodeState
from fieldmesh.core.raft_model import Members, Refusal
from fieldmesh.core.topology import Advice, Topology, VoterPolicy
from fieldmesh.runtime import log
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import CouncilStatus

LOOK_INTERVAL_S = 2.0
CHANGE_TIMEOUT_S = 10.0
HAND_OVER_TIMEOUT_S = 1.0
_HERE = (NodeState.ALIVE, NodeState.SUSPECT)

logger = log.get()


class Electorate:
    """The voters of the mesh as this node sees to them. ``advice`` says what is done, or why nothing is."""

    def __init__(self, council: Council, view: Callable[[], MeshView]) -> None:
        self.advice = ""
        self._council = council
        self._view = view
        self._topology = Topology()

    async def run(self) -> None:
        """Look after the voters until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def hand_over(self) -> None:
        """Give the leader's office to another voter before this node leaves; harmless where it has none."""
        try:
            if self._council.leading:
                to = successor(self._council.status(), self._view())
                await self._council.transfer(to, HAND_OVER_TIMEOUT_S)
        except FieldmeshError as error:  # the others elect somebody, only a little later
            logger.info("office_not_handed_over", code=error.code, why=error.message)

    async def look(self) -> None:
        """Take in who is there and, as the leader, do what is next."""
        now, status = asyncio.get_running_loop().time(), self._council.status()
        self._topology.observe(_eligible(self._view(), status), now)
        if not self._council.leading:
            self.advice = ""
            return
        self._topology.policy = VoterPolicy.of(self._council.state)
        advice = self._advise(status, now)
        if advice.why != self.advice:
            self.advice = advice.why
            logger.info("voters_advice", advice=advice.why, change=type(advice.change).__name__)
        if advice.change is None:
            return
        try:
            await self._council.change(advice.change, CHANGE_TIMEOUT_S)
        except FieldmeshError as error:  # looked at again in a moment: the office may have gone to another
            self.advice = f"{advice.why}; not yet: {error.message}"
            logger.info("voters_not_changed", code=error.code, why=error.message)

    def _advise(self, status: CouncilStatus, now: float) -> Advice:
        consensus = self._council.host.consensus
        raft = consensus.raft.status if consensus is not None else None
        return self._topology.advise(
            Members(voters=status.voters, learners=status.learners),
            leader=self._council.me,
            caught_up=frozenset(status.caught_up),
            lost=status.lost_voters,
            pending=raft is None or raft.members_index > raft.commit,
            now=now,
        )


def _eligible(view: MeshView, status: CouncilStatus) -> MeshView:
    """Members of the log, and those who follow it as it is now: not another log, nor an old epoch."""
    return replace(view, members=tuple(m for m in view.members if _may_vote(m, status)))


def _may_vote(member: Member, status: CouncilStatus) -> bool:
    if member.id in (*status.voters, *status.learners):
        return True
    seat, own = member.row.seat if member.row is not None else None, status.seat
    return seat is not None and own is not None and (seat.log, seat.epoch) == (own.log, own.epoch)


def successor(status: CouncilStatus, view: MeshView) -> NodeId:
    """The voter that should lead next: of those that are there the one furthest along, as far as is known.
    Raises ChangeRefused where there is none."""
    here = {member.id for member in view.members if member.state in _HERE and not member.load.draining}
    matches = dict(status.matches)
    others = [voter for voter in status.voters if voter != status.leader and voter in here]
    if not others:
        raise ChangeRefused(
            "No other voter is there to take the office", metadata={"reason": Refusal.NOT_MEMBER.value}
        )
    return max(others, key=lambda voter: (matches.get(voter, 0), voter))
