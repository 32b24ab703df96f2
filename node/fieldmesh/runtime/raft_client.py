"""What must be done at the leader, wherever it is asked: commands, changes of members, points to read at.

Owns: finding the leader, trying again where that is safe, this node's session (§6.3 of the dissertation), and
telling refused from unknown. An attempt that was refused did nothing; one whose answer was lost may have been
done, and from then on no refusal of a later attempt is told as such. Must not: know how an attempt travels
(``Colleagues``), or what is configured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fieldmesh.core import settings
from fieldmesh.core.errors import (
    ChangeRefused,
    ConsensusStopped,
    FieldmeshError,
    LogNotFounded,
    NodeUnreachable,
    NoQuorum,
    NotLeader,
    OutcomeUnknown,
)
from fieldmesh.core.following import LogView
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import Change, Refusal, Transfer
from fieldmesh.core.settings import Code, Command, Kind, Outcome
from fieldmesh.runtime.council_model import Colleagues, CouncilConfig, refusal_error
from fieldmesh.runtime.raft_host import RaftHost, RefusedHere, Unsettled

T = TypeVar("T")

_PASSING = (Refusal.TERM_NOT_COMMITTED.value, Refusal.CHANGE_PENDING.value)


class Situation(Protocol):
    """The log as the node sees it while a call goes on."""

    @property
    def view(self) -> LogView | None: ...

    @property
    def news(self) -> asyncio.Event:
        """Set, and replaced by another, at the next news."""
        ...

    @property
    def led_at(self) -> float:
        """When a leader was last known (loop time)."""
        ...


class RaftClient:
    """This node as a client of the log."""

    def __init__(
        self, host: RaftHost, colleagues: Colleagues, situation: Situation, config: CouncilConfig
    ) -> None:
        self._host = host
        self._colleagues = colleagues
        self._situation = situation
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._session = _Session()
        self._opening = asyncio.Lock()

    def deadline(self, timeout_s: float | None) -> float:
        """When a call that may take so long must end (loop time)."""
        return self._loop.time() + (self._config.timeout_s if timeout_s is None else timeout_s)

    def known_view(self) -> LogView:
        """The log as it is seen. Raises ConsensusStopped, LogNotFounded where none is."""
        view = self._situation.view
        if view is not None:
            return view
        if self._host.stopped_why:
            raise ConsensusStopped(f"This node's part in the log has stopped: {self._host.stopped_why}")
        raise LogNotFounded(
            "This node knows of no replicated configuration: start one node of the mesh with --found, once"
        )

    async def news_before(self, deadline: float, why: str) -> None:
        """Wait for news of the log. Raises NoQuorum, saying ``why``, at the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._situation.news.wait()
        except TimeoutError:
            raise NoQuorum(f"Not in time: {why}", retry_after_s=1.0) from None

    # --- what can be asked -------------------------------------------------------------------

    async def read_index(self, deadline: float) -> int:
        """Up to where the log must be applied for a read to be current (§6.4)."""

        async def once(leader: NodeId, view: LogView, timeout_s: float) -> int:
            if leader == self._host.me:
                return await self._host.read()
            return await self._colleagues.read_index(leader, view, timeout_s)

        return await self._at_leader(once, _Attempts(deadline=deadline))

    async def change(self, change: Change | Transfer, deadline: float) -> None:
        """Change the members by one, or begin a transfer."""

        async def once(leader: NodeId, view: LogView, timeout_s: float) -> None:
            if leader != self._host.me:
                await self._colleagues.change(leader, view, change, timeout_s)
            elif isinstance(change, Transfer):
                self._host.transfer(change.to)
            else:
                await self._host.change(change)

        await self._at_leader(once, _Attempts(deadline=deadline, once_only=True))

    async def submit(self, command: Command, deadline: float) -> tuple[Outcome, bool]:
        """The outcome of a command, and whether no attempt before the last may have been done."""

        async def once(leader: NodeId, view: LogView, timeout_s: float) -> Outcome:
            if leader == self._host.me:
                return await self._host.submit(command)
            return await self._colleagues.submit(leader, view, command, timeout_s)

        attempts = _Attempts(deadline=deadline, command=command)
        outcome = await self._at_leader(once, attempts)
        return outcome, not attempts.maybe_done

    async def write(
        self, changes: Sequence[settings.Change], author: str, origin: str, deadline: float
    ) -> tuple[Outcome, Command]:
        """Do changes under this node's own session; another is opened where that one has expired."""
        for _ in range(2):
            session = await self._open_session(deadline)
            sequence = session.begin()
            command = Command(
                kind=Kind.WRITE,
                session=session.id,
                sequence=sequence,
                acknowledged=session.acknowledged,
                changes=tuple(changes),
                author=author,
                origin=origin,
            )
            try:
                outcome, certain = await self.submit(command, deadline)
            except (OutcomeUnknown, asyncio.CancelledError):
                self._abandon(session)
                raise
            finally:
                session.end(sequence)
            if outcome.code not in (Code.SESSION_EXPIRED, Code.TOO_MANY_IN_FLIGHT):
                return outcome, command
            self._abandon(session)
            if not certain:
                raise _unknown(command)
        return outcome, command

    async def _open_session(self, deadline: float) -> _Session:
        async with self._opening:
            if not self._session.usable:
                outcome, _ = await self.submit(Command(kind=Kind.OPEN_SESSION), deadline)
                self._session = _Session(outcome.session)
            return self._session

    def _abandon(self, session: _Session) -> None:
        """Open another session at the next write; the old one keeps its outcomes for those who ask again."""
        if self._session is session:
            self._session = _Session()

    # --- attempts ----------------------------------------------------------------------------

    async def _at_leader(
        self, once: Callable[[NodeId, LogView, float], Awaitable[T]], attempts: _Attempts
    ) -> T:
        """Do something at the leader, looking for it again where it has moved."""
        leader: NodeId | None = None
        while True:
            try:
                view = self.known_view()
                leader = leader or view.leader
                if leader is None:
                    await self._leader_before(attempts.deadline)
                    continue
                async with asyncio.timeout_at(attempts.deadline):
                    return await once(leader, view, attempts.deadline - self._loop.time())
            except RefusedHere as refused:
                if refused.reason not in (None, Refusal.NOT_LEADER, Refusal.TRANSFERRING):
                    self._pass_or_raise(refusal_error(refused.reason), attempts)
                leader = refused.leader if refused.leader != leader else None
            except NotLeader as error:
                leader = NodeId(error.metadata.get("leader", "")) or None
            except NodeUnreachable:
                leader = None
            except Unsettled:
                leader, attempts.maybe_done = None, True
                if attempts.once_only:
                    raise attempts.unknown() from None
            except TimeoutError:
                attempts.maybe_done = True
                raise self._too_late(attempts) from None
            except FieldmeshError as error:
                leader = None
                self._pass_or_raise(error, attempts)
            if self._out_of_time(attempts):
                raise self._too_late(attempts)
            await asyncio.sleep(self._config.retry_pause_s)

    def _out_of_time(self, attempts: _Attempts) -> bool:
        return self._loop.time() + self._config.retry_pause_s >= attempts.deadline

    def _pass_or_raise(self, error: FieldmeshError, attempts: _Attempts) -> None:
        """Raise what stands in the way, unless it passes by itself and there is time left for that."""
        passing = isinstance(error, ChangeRefused) and error.metadata.get("reason") in _PASSING
        if not passing or self._out_of_time(attempts):
            raise attempts.unknown() if attempts.counts else error

    async def _leader_before(self, deadline: float) -> None:
        """Wait for news of a leader, as long as an election may take. Raises NoQuorum."""
        until = min(deadline, self._situation.led_at + self._config.leader_patience_s)
        try:
            async with asyncio.timeout_at(until):
                await self._situation.news.wait()
        except TimeoutError:
            raise self._no_quorum() from None

    def _too_late(self, attempts: _Attempts) -> FieldmeshError:
        return attempts.unknown() if attempts.counts else self._no_quorum()

    def _no_quorum(self) -> NoQuorum:
        view = self._situation.view
        voters = f" of {len(view.members.voters)} voters" if view else ""
        return NoQuorum(
            f"No majority{voters} can be reached from this node: nothing was changed. Reads are served from "
            "the last known revision, and inference goes on",
            retry_after_s=1.0,
        )


@dataclass(slots=True, kw_only=True)
class _Attempts:
    """One errand: until when, what is told of it, and whether an attempt may have been done unheard.

    ``once_only``: what may have been done is not tried again (a change of members has no session).
    """

    deadline: float
    command: Command | None = None
    once_only: bool = False
    maybe_done: bool = False

    @property
    def counts(self) -> bool:
        """Whether something may have changed; an opened session and a read point change nothing."""
        writes = self.command is not None and self.command.kind is Kind.WRITE
        return self.maybe_done and (writes or self.once_only)

    def unknown(self) -> OutcomeUnknown:
        if self.command is not None:
            return _unknown(self.command)
        return OutcomeUnknown(
            "The leader was lost while the members changed: look at them before asking again"
        )


class _Session:
    """A session of this node in the log, and which of its sequence numbers are under way."""

    def __init__(self, session: int = 0) -> None:
        self.id = session
        self._next = 1
        self._under_way: set[int] = set()

    @property
    def usable(self) -> bool:
        outcomes_kept = self._next - min(self._under_way, default=self._next)
        return self.id > 0 and outcomes_kept < settings.SESSION_OUTCOMES_MAX

    @property
    def acknowledged(self) -> int:
        """All sequence numbers up to this one have their outcomes."""
        return min(self._under_way, default=self._next) - 1

    def begin(self) -> int:
        sequence, self._next = self._next, self._next + 1
        self._under_way.add(sequence)
        return sequence

    def end(self, sequence: int) -> None:
        self._under_way.discard(sequence)


def _unknown(command: Command) -> OutcomeUnknown:
    return OutcomeUnknown(
        "The write may or may not have been done; asking again with the same session and sequence is safe",
        metadata={"session": str(command.session), "sequence": str(command.sequence)},
    )
