"""Keeps the voters as ``core.topology`` advises, while this node leads the log.

Owns: showing the topology who is there, performing one change at a time through the council, and stopping a
log that the mesh has gone on without. Every node looks, so that a new leader knows how long the others have
been there. Must not: decide who should vote.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import MeshView
from fieldmesh.core.raft_model import Members
from fieldmesh.core.topology import Advice, Topology, VoterPolicy
from fieldmesh.runtime import log
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.recovery import superseded

LOOK_INTERVAL_S = 1.0
CHANGE_TIMEOUT_S = 10.0

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

    async def look(self) -> None:
        """Take in who is there and, as the leader, do what is next."""
        now = asyncio.get_running_loop().time()
        self._topology.observe(self._eligible(), now)
        if why := superseded(self._council.seat, self._view()):
            self._stop(why)
        if not self._council.leading:
            self.advice = ""
            return
        self._topology.policy = VoterPolicy.of(self._council.state)
        advice = self._advise(now)
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

    def _stop(self, why: str) -> None:
        """Say once that this node's log counts no more, and let it rest."""
        if self._council.host.consensus is not None:
            self._council.host.stop(why)

    def _eligible(self) -> MeshView:
        """The mesh without the nodes that belong to another log."""
        view, status = self._view(), self._council.status()
        own = status.seat.log if status.seat is not None else ""
        members = tuple(
            member
            for member in view.members
            if member.row is None or member.row.seat is None or member.row.seat.log == own
        )
        return replace(view, members=members)

    def _advise(self, now: float) -> Advice:
        status = self._council.status()
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
