"""Runs one node's part in the replicated log in real time. Owns: its store, its timer, the effects' order.

Effects of all events go through one queue, in order; a Save is written by a thread, and nothing behind it
happens before it is durable. What comes while it is written is gathered: later Saves of the queue share one
transaction, submitted commands share one entry batch, so one fsync serves many. A Save that fails, or a log
that this version cannot apply, ends this life of the machine; the node lives on, and another life begins from
what is durable as soon as the disk takes a write again. Must not: decide, or know how messages travel.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, assert_never

from fieldmesh.core import settings
from fieldmesh.core.consensus import (
    Answered,
    Consensus,
    ConsensusEffect,
    ConsensusEvent,
    NotDone,
    StateChanged,
    Submit,
)
from fieldmesh.core.errors import ConsensusStopped, FieldmeshError, UpgradeNeeded
from fieldmesh.core.events import Note, Received, Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import recovered
from fieldmesh.core.raft_model import (
    Apply,
    Change,
    Company,
    Doubt,
    MembersChanged,
    Message,
    Post,
    Proposed,
    RaftConfig,
    Read,
    ReadFailed,
    ReadReady,
    Refusal,
    Refused,
    Restore,
    Role,
    RoleChanged,
    Save,
    Saved,
    Stored,
    Transfer,
)
from fieldmesh.runtime import log
from fieldmesh.runtime.raft_store import RaftStore

GATHERED_MAX = 4096
"""Commands that wait for the Save that is being written."""
REBOOT_S_MIN = 0.5
REBOOT_S_MAX = 15.0

logger = log.get()


class Unsettled(Exception):
    """The office or the machine was lost in between: what was asked may or may not have happened."""


@dataclass(slots=True)
class RefusedHere(Exception):
    """Nothing was done; ``leader`` is who might. No ``reason``: another leader's entry won the place."""

    reason: Refusal | None
    leader: NodeId | None


@dataclass(slots=True)
class _ChangeWaiting:
    index: int
    term: int
    done: asyncio.Future[None]


class RaftHost:
    """One node's replica, alive. Belongs to one event loop; every method is called in it.

    ``send`` hands a message to the network and never waits. ``on_change`` is called after whatever may have
    changed a view of this host: state, role, members, or whether it runs.
    """

    def __init__(
        self,
        me: NodeId,
        open_store: Callable[[], RaftStore],
        *,
        config: RaftConfig,
        rng: Random,
        send: Callable[[NodeId, Message], None],
        on_change: Callable[[], None],
    ) -> None:
        self.me = me
        self.config = config
        self.consensus: Consensus | None = None
        self.stopped_why = ""
        self.saves = 0
        self._open_store = open_store
        self._opened: RaftStore | None = None
        self._rng = rng
        self._send = send
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="consensus")
        self._effects: deque[ConsensusEffect] = deque()
        self._saving: asyncio.Future[None] | None = None
        self._durable = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reboot: asyncio.Task[None] | None = None
        self._reboot_s = REBOOT_S_MIN
        self._numbers = itertools.count(1)
        self._gathered: deque[tuple[int, settings.Command]] = deque()
        self._flushing = False
        self._answers: dict[int, asyncio.Future[settings.Outcome]] = {}
        self._reads: dict[int, asyncio.Future[int]] = {}
        self._changes: list[_ChangeWaiting] = []
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"RaftHost({self.me[:8]}, {self.consensus.raft.status if self.consensus else self.stopped_why})"
        )

    # --- lives -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin the first life. Raises StateFolderInvalid, StateFolderInUse, StateUnwritable, UpgradeNeeded:
        the store must be looked at, and this host stays stopped."""
        try:
            self._opened = await self._in_thread(self._open_store)
            self._begin(await self._in_thread(self._store.load))
        except FieldmeshError as error:
            self.stopped_why = error.message
            raise

    async def found(self, stored: Stored) -> None:
        """Put a founder's log into the empty store and live on with it. Raises StateFolderInvalid,
        StateUnwritable."""
        self._end("founding")
        await self._written()
        try:
            await self._in_thread(self._store.found, stored)
        finally:
            self._begin(await self._in_thread(self._store.load))

    async def go_on_alone(self) -> None:
        """Begin a new epoch of this node's log with itself as the only voter: what others alone held is lost.
        Raises StateFolderInvalid, StateUnwritable."""
        self._end("a new epoch begins")
        await self._written()
        try:
            stored = await self._in_thread(self._store.load)
            await self._in_thread(self._store.found, recovered(stored, self.me))
        finally:
            self._begin(await self._in_thread(self._store.load))

    def stop(self, why: str) -> None:
        """End this life, and begin no other before this node is started again."""
        self._fail(why, reboot=False)

    async def backup(self) -> Path:
        """Write a consistent copy of the store beside it; the caller reads and removes it, one at a time.
        Raises StateUnwritable."""
        copy = self._store.path.with_name(self._store.path.name + ".copy")
        copy.unlink(missing_ok=True)
        await self._in_thread(self._store.backup, copy)
        return copy

    async def close(self) -> None:
        """End this life; what was saved stays. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._end("the node is leaving")
        if self._reboot is not None:
            self._reboot.cancel()
            await asyncio.gather(self._reboot, return_exceptions=True)
        await self._written()
        if self._opened is not None:
            await self._in_thread(self._opened.close)
        self._thread.shutdown()

    @property
    def _store(self) -> RaftStore:
        if self._opened is None:
            raise ConsensusStopped(f"This node's log could not be opened: {self.stopped_why}")
        return self._opened

    def _begin(self, stored: Stored) -> None:
        if self._closed:
            return
        self._durable = 0
        self.consensus = Consensus(self.me, self.config, stored, self._rng, self._loop.time())
        self.stopped_why = ""
        self._set_timer()
        self._on_change()

    def _end(self, why: str) -> None:
        """End this life: nothing more is said or done by it; whoever waits learns that it is unsettled."""
        self.consensus = None
        self.stopped_why = why
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._effects.clear()
        self._gathered.clear()
        self._unsettle()
        self._on_change()

    def _fail(self, why: str, *, reboot: bool = True) -> None:
        logger.error("consensus_stopped", why=why, again=reboot)
        self._end(why)
        if reboot and not self._closed and self._reboot is None:
            self._reboot = self._loop.create_task(self._begin_again(), name="consensus reboot")

    async def _begin_again(self) -> None:
        """Begin another life once the disk takes a write."""
        try:
            await self._written()
            while True:
                await asyncio.sleep(self._reboot_s)
                self._reboot_s = min(2 * self._reboot_s, REBOOT_S_MAX)
                try:
                    stored = await self._in_thread(self._store.load)
                    await self._in_thread(self._store.save, Save(sequence=0, hard=stored.hard))
                    self._begin(stored)
                except FieldmeshError as error:
                    self.stopped_why = error.message
                    continue
                logger.info("consensus_goes_on", term=stored.hard.term)
                return
        finally:
            self._reboot = None

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._thread, function, *arguments)

    async def _written(self) -> None:
        """Return when no Save is being written."""
        if self._saving is not None:
            await asyncio.wait((self._saving,))

    # --- what is asked ---------------------------------------------------------------------

    def submit(self, command: settings.Command) -> asyncio.Future[settings.Outcome]:
        """Do a command, if this node leads. The future ends in its outcome, RefusedHere or Unsettled."""
        number, future = next(self._numbers), self._loop.create_future()
        if self.consensus is None:
            future.set_exception(RefusedHere(Refusal.NOT_LEADER, None))
        elif len(self._gathered) >= GATHERED_MAX:
            future.set_exception(RefusedHere(Refusal.BUSY, self.consensus.raft.leader))
        else:
            self._answers[number] = future
            future.add_done_callback(lambda _: self._answers.pop(number, None))
            self._gathered.append((number, command))
            self._flush_soon()
        return future

    def read(self) -> asyncio.Future[int]:
        """Prove that this node leads now. The future ends in an index that is applied here, RefusedHere or
        Unsettled."""
        number, future = next(self._numbers), self._loop.create_future()
        if self.consensus is None or self.consensus.raft.leadership is None:
            leader = self.consensus.raft.leader if self.consensus else None
            future.set_exception(RefusedHere(Refusal.NOT_LEADER, leader))
            return future
        self._reads[number] = future
        future.add_done_callback(lambda _: self._reads.pop(number, None))
        self._handle(Read(id=number))
        return future

    async def change(self, change: Change) -> None:
        """Change the members by one; returns when that is committed. Raises RefusedHere, Unsettled."""
        for effect in self._handle(change):
            if isinstance(effect, Refused):
                raise RefusedHere(effect.reason, effect.leader)
            if isinstance(effect, Proposed):
                done: asyncio.Future[None] = self._loop.create_future()
                self._changes.append(_ChangeWaiting(effect.first_index, effect.term, done))
                self._settle_changes()
                await done
                return
        raise RefusedHere(Refusal.NOT_LEADER, None)

    def transfer(self, to: NodeId) -> None:
        """Begin to hand the office to ``to``. Raises RefusedHere."""
        for effect in self._handle(Transfer(to=to)):
            if isinstance(effect, Refused):
                raise RefusedHere(effect.reason, effect.leader)

    def join_in(self) -> None:
        """This node writes to the others just now: what the log would say soon goes along."""
        if self.consensus is not None and self.consensus.raft.leadership is not None:
            self._handle(Company())

    def doubt(self, node: NodeId) -> None:
        """The mesh misses ``node``: where it leads, its followers need not wait for long."""
        if self.consensus is not None and self.consensus.raft.leader == node:
            self._handle(Doubt(node=node))

    def received(self, sender: NodeId, message: Message) -> None:
        """A message came from ``sender``."""
        self._handle(Received(sender=sender, message=message))

    # --- events ----------------------------------------------------------------------------

    def _handle(self, event: ConsensusEvent) -> list[ConsensusEffect]:
        """Hand one event to the machine and perform what follows, as far as the disk allows now."""
        consensus = self.consensus
        if consensus is None:
            return []
        try:
            effects = consensus.handle(event, self._loop.time())
        except UpgradeNeeded as error:
            self._fail(error.message, reboot=False)
            return []
        except Exception:
            logger.exception("consensus_crashed")
            self._fail("a defect of Fieldmesh; the node's log has the details")
            return []
        self._effects.extend(effects)
        self._pump()
        self._set_timer()
        return effects

    def _set_timer(self) -> None:
        """Keep one timer; one that fires early costs a call, moving it at each message would cost more."""
        deadline = self.consensus.deadline if self.consensus is not None else None
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        deadline = self.consensus.deadline if self.consensus is not None else None
        if deadline is not None and self._loop.time() >= deadline:
            self._handle(Tick())
        else:
            self._set_timer()

    def _flush_soon(self) -> None:
        if not self._flushing and self._saving is None:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Submit what was gathered as one batch."""
        self._flushing = False
        requests = tuple((number, c) for number, c in self._gathered if self._awaited(number))
        self._gathered.clear()
        if requests:
            self._handle(Submit(requests=requests, time_ms=int(time.time() * 1000)))

    def _awaited(self, number: int) -> bool:
        future = self._answers.get(number)
        return future is not None and not future.done()

    # --- effects ---------------------------------------------------------------------------

    def _pump(self) -> None:
        """Perform effects in order up to the next Save, and have all waiting Saves written together."""
        while self._effects and self._saving is None:
            effect = self._effects[0]
            if isinstance(effect, Save) and effect.sequence > self._durable:
                self._write([effect for effect in self._effects if isinstance(effect, Save)])
                return
            self._effects.popleft()
            self._perform(effect)

    def _write(self, saves: list[Save]) -> None:
        consensus, last = self.consensus, saves[-1].sequence
        self._saving = self._loop.run_in_executor(self._thread, self._store.save, *saves)

        def written(future: asyncio.Future[None]) -> None:
            self._saving = None
            error = future.exception()
            if self.consensus is not consensus or consensus is None:
                return  # that life is over; what it saved counts in the next one
            if error is not None:
                self._fail(error.message if isinstance(error, FieldmeshError) else repr(error))
                return
            self.saves += 1
            self._reboot_s = REBOOT_S_MIN
            self._durable = last
            self._pump()
            self._handle(Saved(sequence=last))
            if self._gathered:
                self._flush_soon()

        self._saving.add_done_callback(written)

    def _perform(self, effect: ConsensusEffect) -> None:
        match effect:
            case Post(to=to, message=message):
                self._send(to, message)
            case Answered(request=request, outcome=outcome):
                if (future := self._answers.get(request)) is not None and not future.done():
                    future.set_result(outcome)
            case NotDone(request=request, reason=reason, leader=leader):
                if (future := self._answers.get(request)) is not None and not future.done():
                    future.set_exception(RefusedHere(reason, leader))
            case ReadReady(id=read, index=index):
                if (reading := self._reads.get(read)) is not None and not reading.done():
                    reading.set_result(index)
            case ReadFailed(id=read):
                if (reading := self._reads.get(read)) is not None and not reading.done():
                    reading.set_exception(RefusedHere(Refusal.NOT_LEADER, None))
            case StateChanged():
                self._settle_changes()
                self._on_change()
            case RoleChanged(role=role, term=term, leader=leader):
                logger.info("consensus_role", role=role.value, term=term, leader=leader or "")
                if role is not Role.LEADER:
                    self._unsettle()
                self._on_change()
            case MembersChanged(members=members):
                logger.info("consensus_members", voters=list(members.voters), learners=list(members.learners))
                self._on_change()
            case Note(event=event, fields=fields):
                logger.warning(event, **dict(fields))
            case Proposed() | Refused() | Save():
                pass  # answered where the event was handed in; a Save is written, not performed
            case Apply() | Restore():
                raise AssertionError("the consensus machine keeps these to itself")
            case _:
                assert_never(effect)

    def _settle_changes(self) -> None:
        """Tell those who changed the members whether that is committed."""
        raft = self.consensus.raft if self.consensus is not None else None
        for waiting in list(self._changes):
            if waiting.done.done():
                self._changes.remove(waiting)
            elif raft is not None and raft.applied >= waiting.index:
                self._changes.remove(waiting)
                if raft.log.term_at(waiting.index) in (waiting.term, None):
                    waiting.done.set_result(None)
                else:
                    waiting.done.set_exception(RefusedHere(None, raft.leader))

    def _unsettle(self) -> None:
        """Whoever waits for this node's office waits in vain."""
        changes, self._changes = self._changes, []
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *self._reads.values()]
        for future in [*waiting, *(change.done for change in changes)]:
            if not future.done():
                future.set_exception(Unsettled())
