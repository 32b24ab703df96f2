"""A node's part in what its mesh agrees on, put together: council, voters, and what operators ask.

Owns: the order in which these start and end, and carrying news between them and the mesh: which log this node
belongs to, what others say of theirs, and which rules count now. Must not: decide any of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from random import Random

import grpc

from fieldmesh.core.effective import Rules, effective
from fieldmesh.core.mesh import OfferChanged
from fieldmesh.core.model import NodeId, NodeState, Seat
from fieldmesh.core.settings import State
from fieldmesh.runtime import log
from fieldmesh.runtime.admin import ADMIN, Admin
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.door import Calls, handlers
from fieldmesh.runtime.driver import Driver
from fieldmesh.runtime.electorate import Electorate
from fieldmesh.runtime.raft_links import RaftLinks
from fieldmesh.runtime.raft_service import RaftService
from fieldmesh.runtime.raft_store import LOG_FILE, RaftStore
from fieldmesh.runtime.recovery import superseded
from fieldmesh.runtime.state import StateFolder
from fieldmesh.v1.admin_pb2 import GetRaftStatusResponse

_MISSED = (NodeState.SUSPECT, NodeState.DEAD, NodeState.LEFT)

logger = log.get()


class Agreement:
    """What this node has agreed on with others. ``rules`` are those that count now."""

    def __init__(
        self, *, me: NodeId, name: str, folder: StateFolder, driver: Driver, own: Rules, rng: Random
    ) -> None:
        self.rules = own
        self._own = own
        self._driver = driver
        self._links = RaftLinks(lambda: driver.view, driver.links.log)
        self.council = Council(
            me,
            open_store=lambda: RaftStore.open(folder.path / LOG_FILE, me),
            shelf=folder,
            colleagues=self._links,
            rng=rng,
        )
        self._service = RaftService(self.council)
        self._electorate = Electorate(self.council, lambda: driver.view)
        self._admin = Admin(
            self.council, name=name, view=lambda: driver.view, advice=lambda: self._electorate.advice
        )

    async def open(self, stack: AsyncExitStack, *, found: bool, obey: Callable[[Rules], None]) -> None:
        """Take this node's seat. ``obey`` is called with other rules whenever they change."""
        stack.callback(self._service.close)
        stack.push_async_callback(self._links.close)
        stack.push_async_callback(self.council.close)
        await self.council.start(found=found)

        def changed(state: State) -> None:
            rules = effective(self._own, state)
            if rules != self.rules:
                self.rules = rules
                logger.info("rules_changed", revision=state.revision, policy=rules.policy.value)
                obey(rules)

        self.council.observe(changed)
        self._driver.accompany(self.council.host.join_in)

    def for_clients(self, calls: Calls) -> grpc.GenericRpcHandler:
        """What the client listener is given."""
        return handlers(ADMIN, self._admin, calls)

    def raft_status(self) -> GetRaftStatusResponse:
        """What this node knows of the log now."""
        return self._admin.raft_status()

    def for_peers(self) -> Sequence[grpc.GenericRpcHandler]:
        """What the peer listener is given."""
        return self._service.handlers()

    async def run(self) -> None:
        """Carry news and look after the voters until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell_seat(), name="seat")
            group.create_task(self._hear_seats(), name="seats")
            group.create_task(self._electorate.run(), name="voters")

    async def leave(self) -> None:
        """Hand over the leader's office, if this node has it and another voter is there."""
        await self._electorate.hand_over()

    async def _tell_seat(self) -> None:
        """Tell the mesh which log this node belongs to; while its own rests, it is no candidate for one."""
        told: Seat | None = None
        while True:
            news = self.council.news
            seat = self.council.seat
            if seat is not None and seat != told and not self.council.host.stopped_why:
                told = seat
                self._driver.handle(OfferChanged(seat=seat))
            await news.wait()

    async def _hear_seats(self) -> None:
        """Tell the council who is missed and what others say of their logs, and let this node's log rest if
        the mesh has gone on without it: at once, for two that come back together could elect a leader."""
        view, seats = self._driver.view, dict[NodeId, Seat]()
        while True:
            if (now := self._links.seats()) != seats:
                seats = dict(now)
                self.council.neighbours_changed()
            for member in view.members:
                if member.state in _MISSED:
                    self.council.host.doubt(member.id)
            why = superseded(self.council.seat, view)
            if why and self.council.host.consensus is not None:
                self.council.host.stop(why)
            view = await self._driver.wait_view_changed(view.revision)
