"""The replicated configuration as this node reaches it: the one door for reading, writing and watching it.

Every node has a council, whatever it is to the log: a voter, a learner, an observer that follows a voter's
watch stream, or none because nobody has founded a log yet. A write entered anywhere is carried to the leader
and ends as an outcome, as a coded refusal (nothing was done), or as OUTCOME_UNKNOWN, after which the same
session and sequence may be tried again without being done twice. A read is either linearizable, or says how
old it may be. Owns: finding the leader, this node's session, the newest state that it has seen, founding.
Must not: decide who should vote (``core.topology``), what a command means (``core.settings``), or agree on
anything itself (``raft_host``).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from fieldmesh.core import settings, settings_schema
from fieldmesh.core.errors import (
    ChangeRefused,
    FieldmeshError,
    InvalidRequest,
    NoQuorum,
)
from fieldmesh.core.following import NEVER, Held, LogView
from fieldmesh.core.model import NodeId, Seat, SeatKind
from fieldmesh.core.raft_members import founded
from fieldmesh.core.raft_model import AddLearner, Change, Promote, Remove, Transfer
from fieldmesh.core.settings import Command, Kind, Outcome, State
from fieldmesh.runtime import log
from fieldmesh.runtime.council_model import (
    Changed,
    Colleagues,
    CouncilConfig,
    CouncilStatus,
    Reading,
    Whole,
)
from fieldmesh.runtime.raft_client import RaftClient
from fieldmesh.runtime.raft_follow import Follower, Shelf
from fieldmesh.runtime.raft_host import RaftHost
from fieldmesh.runtime.raft_store import RaftStore

logger = log.get()

T = TypeVar("T")


# --- the door ------------------------------------------------------------------------------


class Council:
    """One node's access to the replicated configuration. Belongs to one event loop."""

    def __init__(
        self,
        me: NodeId,
        *,
        open_store: Callable[[], RaftStore],
        shelf: Shelf,
        colleagues: Colleagues,
        rng: Random,
        config: CouncilConfig | None = None,
    ) -> None:
        self.me = me
        self.config = config or CouncilConfig()
        self.news = asyncio.Event()
        """Set, and replaced by another, at the next news of any kind."""
        self.host = RaftHost(
            me,
            open_store,
            config=self.config.raft,
            rng=rng,
            send=colleagues.send,
            on_change=self._changed,
        )
        self._follower = Follower(
            me,
            colleagues,
            shelf,
            rng=rng,
            leaderless_s=self.config.follow_after_s,
            wanted=self._follows,
            news=lambda: self.news,
            on_change=self._changed,
        )
        self._colleagues = colleagues
        self._loop = asyncio.get_running_loop()
        self._last: Held | None = None
        self._known_logs: frozenset[str] = frozenset()
        self._leaderless: asyncio.TimerHandle | None = None
        self._observers: list[Callable[[State], None]] = []
        self._observed: State | None = None
        self._leader: NodeId | None = None
        self._own_leader: NodeId | None = None
        self._own_led_at = self._loop.time()
        self.led_at = self._loop.time()
        self._client = RaftClient(self.host, colleagues, self, self.config)
        self._founding: asyncio.Task[None] | None = None

    # --- life ------------------------------------------------------------------------------

    async def start(self, *, found: bool = False) -> None:
        """Take this node's seat. With ``found``, begin a log here unless this node, or anybody that it can
        see after ``found_wait_s``, has one. Never raises for a bad store: the status says why it stands."""
        try:
            await self.host.start()
        except FieldmeshError as error:
            logger.error("consensus_store_refused", code=error.code, error=error.message)
        self._follower.start()
        if found and self.view is None and not self.host.stopped_why:
            self._founding = self._loop.create_task(self._found_unless_there(), name="founding")

    async def close(self) -> None:
        """Leave; harmless when repeated."""
        if self._founding is not None:
            self._founding.cancel()
            await asyncio.gather(self._founding, return_exceptions=True)
        if self._leaderless is not None:
            self._leaderless.cancel()
        await self._follower.close()
        await self.host.close()

    def neighbours_changed(self) -> None:
        """Look again at what others say of their logs."""
        known = frozenset(self._other_logs())
        if (seat := self.seat) is not None:
            for name in sorted(known - self._known_logs):
                logger.warning("other_log_in_this_mesh", log=name, own=seat.log)
            self._known_logs = known
        self._tell()

    async def found(self) -> str:
        """Begin a new log with this node as its only voter; returns the log's name.

        Raises ChangeRefused where this node belongs to a log or follows one already."""
        if (view := self.view) is not None:
            raise ChangeRefused(
                f"This node belongs to the log {view.log} already; a mesh has one. Use an empty state folder "
                "for a new mesh",
                metadata={"reason": "already_founded", "log": view.log},
            )
        name = secrets.token_hex(8)
        await self.host.found(founded(self.me, name))
        logger.info("log_founded", log=name)
        return name

    async def _found_unless_there(self) -> None:
        await asyncio.sleep(self.config.found_wait_s)
        others = self._other_logs()
        if self.view is not None or others:
            logger.warning("log_not_founded", why="this mesh has one already", logs=sorted(others))
            return
        try:
            await self.found()
        except FieldmeshError as error:
            logger.error("log_not_founded", why=error.message)

    # --- what is known ---------------------------------------------------------------------

    @property
    def held(self) -> Held | None:
        """The newest of what this node has: as a member of the log, by following one, or from before."""
        member, followed = self.member, self._follower.held
        if member is None:
            return followed or self._last
        if followed is None or member.view.log != followed.view.log:
            return member
        heard = member.view.leader is not None and self.me in member.view.members.all
        return member if heard else max(member, followed, key=_recency)

    @property
    def member(self) -> Held | None:
        """What this node's own log says, while it runs; None where it has none."""
        consensus = self.host.consensus
        if consensus is None or not consensus.raft.hard.group:
            return None
        raft = consensus.raft
        view = LogView(
            log=raft.hard.group,
            epoch=raft.hard.epoch,
            term=raft.term,
            leader=raft.leader,
            members=raft.log.members,
            commit=raft.log.commit,
            applied=consensus.applied,
            current_at=raft.current_at(self._loop.time()),
        )
        return Held(view=view, state=consensus.state)

    @property
    def log(self) -> str:
        """The name of the log that this node belongs to or follows; empty where it knows of none."""
        consensus = self.host.consensus
        if consensus is not None and consensus.raft.hard.group:
            return consensus.raft.hard.group  # asked for each message: no view is made for it
        return held.view.log if (held := self.held) is not None else ""

    @property
    def view(self) -> LogView | None:
        """The log as this node sees it best; None where it knows of none."""
        held = self.held
        return held.view if held is not None else None

    @property
    def state(self) -> State:
        """The newest configuration that this node has; empty before it knows of one."""
        held = self.held
        return held.state if held is not None else _EMPTY

    @property
    def leading(self) -> bool:
        """Whether this node leads the log, as far as it knows."""
        return self.host.consensus is not None and self.host.consensus.raft.leadership is not None

    def observe(self, observer: Callable[[State], None]) -> None:
        """Call ``observer`` with the present configuration, and with each that differs from now on. It must
        not raise or wait."""
        self._observers.append(observer)
        observer(self.state)

    async def wait_changed(self) -> None:
        """Return at the next news of any kind: state, leader, members, contact."""
        await self.news.wait()

    def status(self) -> CouncilStatus:
        """Everything about this node's part in the log, now."""
        view, consensus = self.view, self.host.consensus
        raft = consensus.raft.status if consensus is not None else None
        leadership = consensus.raft.leadership if consensus is not None else None
        now = self._loop.time()
        learners = view.members.learners if view else ()
        return CouncilStatus(
            seat=self.seat,
            role=raft.role if raft and self.me in (view.members.all if view else ()) else None,
            term=view.term if view else 0,
            leader=view.leader if view else None,
            voters=view.members.voters if view else (),
            learners=learners,
            commit=view.commit if view else 0,
            applied=view.applied if view else 0,
            revision=self.state.revision,
            lag_entries=view.commit - view.applied if view else 0,
            stale_s=self._stale_s(view),
            stopped_why=self.host.stopped_why,
            following=self._follower.target,
            log_bytes=raft.log_bytes if raft else 0,
            matches=raft.matches if raft else (),
            caught_up=tuple(n for n in learners if leadership is not None and leadership.caught_up(n, now)),
            lost_voters=raft.lost_voters if raft else (),
            other_logs=self._other_logs(),
        )

    # --- reading ---------------------------------------------------------------------------

    async def read(self, *, linearizable: bool = False, timeout_s: float | None = None) -> Reading:
        """The configuration: at once with its possible age, or ``linearizable``: with every write that was
        acknowledged anywhere before this call. Raises LogNotFounded, NoQuorum, ConsensusStopped."""
        view = self._client.known_view()
        if not linearizable:
            return Reading(state=self.state, applied=view.applied, stale_s=self._stale_s(view))
        deadline = self._client.deadline(timeout_s)
        index = await self._client.read_index(deadline)
        while (applied := self._client.known_view().applied) < index:
            await self._client.news_before(deadline, "this node has not caught up with the leader")
        return Reading(state=self.state, applied=applied, stale_s=0.0)

    async def watch(self, from_revision: int | None = None) -> AsyncGenerator[Whole | Changed, None]:
        """Everything that is configured, then every change; with ``from_revision`` only what came after it,
        if that is still remembered (else Whole comes first). Ends when its caller closes it.

        Raises InvalidRequest for a revision that is to come, LogNotFounded."""
        self._client.known_view()
        deadline = self._client.deadline(None)
        while from_revision is not None and from_revision > self.state.revision:
            try:  # it was seen at a node that is ahead of this one, or it is to come
                await self._client.news_before(deadline, "this node has not caught up")
            except NoQuorum:
                raise InvalidRequest(
                    f"revision {from_revision} is to come; the newest here is {self.state.revision}",
                    field="revision",
                ) from None
        seen = from_revision
        while True:
            news, state = self.news, self.state
            records = (
                settings.changes_since(state, seen) if seen is not None and seen <= state.revision else None
            )
            if records is None:
                yield Whole(state=state)
            elif seen != state.revision:
                yield Changed(revision=state.revision, records=records)
            seen = state.revision
            await news.wait()

    # --- writing ---------------------------------------------------------------------------

    async def write(
        self,
        changes: Sequence[settings.Change],
        *,
        author: str,
        origin: str,
        timeout_s: float | None = None,
    ) -> tuple[Outcome, Command]:
        """Do ``changes`` together or not at all, under this node's own session.

        Returns the outcome (its ``code`` may say REVISION_CONFLICT and the like) and the command that was
        given. Raises InvalidRequest (``settings_schema``), and as ``submit`` does; OutcomeUnknown names in
        its metadata the session and sequence under which ``submit`` may ask again.
        """
        settings_schema.validate(changes)
        return await self._client.write(changes, author, origin, self._client.deadline(timeout_s))

    async def submit(self, command: Command, timeout_s: float | None = None) -> Outcome:
        """Do one command under its own session and sequence; asking again with the same is safe.

        Raises InvalidRequest, LogNotFounded, ConsensusStopped and NoQuorum, ChangeRefused, QueueFull,
        UpgradeNeeded (nothing was done), OutcomeUnknown (it may have been done).
        """
        if command.kind is Kind.WRITE:
            settings_schema.validate(command.changes)
        outcome, _ = await self._client.submit(command, self._client.deadline(timeout_s))
        return outcome

    # --- members ---------------------------------------------------------------------------

    async def add(self, node: NodeId, timeout_s: float | None = None) -> None:
        """Take ``node`` in as a learner. Raises as ``change``; a member of another log is refused."""
        seat, view = self._colleagues.seats().get(node), self._client.known_view()
        if seat is not None and seat.log != view.log:
            raise ChangeRefused(
                f"Node {node} belongs to the log {seat.log}, this one is {view.log}: end that node, move its "
                "state folder away and start it again",
                metadata={"reason": "other_log", "log": seat.log},
            )
        await self.change(AddLearner(node=node), timeout_s)

    async def promote(self, node: NodeId, timeout_s: float | None = None) -> None:
        """Give a caught-up learner a vote. Raises as ``change``."""
        await self.change(Promote(node=node), timeout_s)

    async def remove(self, node: NodeId, timeout_s: float | None = None) -> None:
        """Take a voter or a learner out. Raises as ``change``."""
        await self.change(Remove(node=node), timeout_s)

    async def transfer(self, node: NodeId, timeout_s: float | None = None) -> None:
        """Hand the leader's office to a voter; returns when it leads. Raises as ``change``."""
        deadline = self._client.deadline(timeout_s)
        await self._client.change(Transfer(to=node), deadline)
        while self._client.known_view().leader != node:
            await self._client.news_before(deadline, f"node {node} has not taken the office")

    async def change(self, change: Change, timeout_s: float | None = None) -> None:
        """Change the members by one, through the leader; returns when that is committed.

        Raises ChangeRefused (``metadata["reason"]`` is a value of ``raft_model.Refusal``), LogNotFounded,
        NoQuorum, OutcomeUnknown (look at the members before asking again)."""
        await self._client.change(change, self._client.deadline(timeout_s))

    # --- bookkeeping -----------------------------------------------------------------------

    def _changed(self) -> None:
        """Something about the log is new: wake everybody who waits for that."""
        now, held, member = self._loop.time(), self.held, self.member
        leader = held.view.leader if held is not None else None
        if leader is not None or self._leader is not None or (held is not None and self._last is None):
            self.led_at = now  # a log that has just become known may take as long to get its leader
        if held is not None:
            self._last = replace(held, view=replace(held.view, leader=None))
        self._leader = leader
        own_leader = member.view.leader if member is not None else None
        if own_leader is not None or self._own_leader is not None:
            self._own_led_at = now
        self._own_leader = own_leader
        if own_leader is None and self._leaderless is None:
            self._leaderless = self._loop.call_later(self.config.follow_after_s, self._still_leaderless)
        self._tell()
        state = self.state
        if state is not self._observed:
            self._observed = state
            for observer in self._observers:
                observer(state)

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def _still_leaderless(self) -> None:
        """A member that hears no leader asks others whether it is one still."""
        self._leaderless = None
        if self._own_leader is None:
            self._leaderless = self._loop.call_later(self.config.follow_after_s, self._still_leaderless)
            self._tell()

    def _follows(self) -> bool:
        """Whether others must be asked: by who is no member, or by one that has had no leader for a while."""
        member = self.member
        if member is None or self.me not in member.view.members.all:
            return True
        if member.view.leader is not None:
            return False
        return self._loop.time() - self._own_led_at >= self.config.follow_after_s

    @property
    def seat(self) -> Seat | None:
        """What this node is to the log that it belongs to or follows; None where it knows of none."""
        view = self.view
        if view is None:
            return None
        kind = SeatKind.OBSERVER
        if self.me in view.members.all:
            kind = SeatKind.VOTER if self.me in view.members.voters else SeatKind.LEARNER
        return Seat(log=view.log, epoch=view.epoch, kind=kind)

    def _stale_s(self, view: LogView | None) -> float | None:
        if view is None or view.current_at == NEVER:
            return None
        return max(0.0, self._loop.time() - view.current_at)

    def _other_logs(self) -> dict[str, tuple[NodeId, ...]]:
        """Every log but this node's own, with the nodes that say they belong to it."""
        own = self.view.log if self.view is not None else ""
        found: dict[str, list[NodeId]] = {}
        for node, seat in self._colleagues.seats().items():
            if seat.log != own and node != self.me:
                found.setdefault(seat.log, []).append(node)
        return {name: tuple(sorted(nodes)) for name, nodes in sorted(found.items())}


def _recency(held: Held) -> tuple[int, int, float]:
    return held.view.epoch, held.view.applied, held.view.current_at


_EMPTY = State()
