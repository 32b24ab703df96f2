"""Runs the mesh core in real time. Owns: the clock it reads, its one timer, and the order of its effects.

Each event reads the loop's clock once. Effects are performed in the order in which they were given; those
behind a ``Persist`` wait until it is durable, which a thread sees to, while later events go on: what one list
promises says nothing about another. Where the disk refuses, what waited for it is not done, and the node
lives on: its messages may be lost anyway, and the mesh says again what matters. Must not: decide anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from fieldmesh.core.errors import FieldmeshError, InvalidRequest
from fieldmesh.core.events import Note, Persist, Received, Send, Tick
from fieldmesh.core.mesh import Effect, Event, LeaveRequested, LinkFailed, LoadChanged, Mesh, OfferChanged
from fieldmesh.core.model import Address, Load, MeshView, NodeId
from fieldmesh.rpc import wire
from fieldmesh.runtime import log
from fieldmesh.runtime.gate import Caller, Gate
from fieldmesh.runtime.links import Links, LinksConfig
from fieldmesh.runtime.receiver import Receiver

VIEW_INTERVAL_S = 0.02
"""A burst of changes is published as one view."""
LOAD_INTERVAL_S = 0.1
"""How often ordinary changes of load reach the core; the next heartbeat carries the latest."""
TICK_AFTER_DEFECT_S = 1.0
SAVES_WAITING_MAX = 64
GOODBYE_TIMEOUT_S = 0.5

_WARNINGS = frozenset({"join_refused", "own_id_seen_elsewhere", "snapshot_damaged"})


class Storage(Protocol):
    """Where values become durable (``StateFolder``)."""

    def write(self, key: str, value: bytes) -> None:
        """Return when durable. Raises FieldmeshError, ValueError. Called from a thread."""
        ...


class Driver:
    """One node's mesh, alive. Belongs to one event loop; every method is called in it.

    ``receiver.handler()`` and the interceptor ``gate`` go to the peer's server; ``links`` gives the channels
    to peers.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        local: NodeId,
        storage: Storage,
        links_config: LinksConfig | None = None,
    ) -> None:
        caller = Caller(node=local, mesh=mesh.membership.mesh)
        self.gate = Gate(caller)
        self.links = Links(caller, self._link_failed, links_config)
        self.receiver = Receiver(self._received, links_config, self.links.bytes)
        self.malformed = 0
        self._mesh = mesh
        self._local = local
        self._saver = Saver(storage)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._load = Load()
        self._load_timer: asyncio.TimerHandle | None = None
        self._published = mesh.view
        self._publishing: asyncio.TimerHandle | None = None
        self._view_changed = asyncio.Event()
        self._observers: list[Callable[[MeshView], None]] = []
        self._company: list[Callable[[], None]] = []
        self._closed = False
        self._log = log.get()

    @property
    def view(self) -> MeshView:
        """The mesh as it is seen now; the same object until something changed."""
        return self._mesh.view

    def start(self) -> None:
        """Begin to beat. Call it when the peer's server listens."""
        self.handle(Tick())

    def handle(self, event: Event) -> None:
        """Hand one event to the core, now. Raises what ``Mesh.handle`` raises (local misuse)."""
        if self._closed:
            return
        effects = self._mesh.handle(event, self._loop.time())
        if self._publishing is None and self._mesh.view_changed:
            self._publishing = self._loop.call_later(VIEW_INTERVAL_S, self._publish)
        self._perform(iter(effects))
        self._set_timer()

    def announce(
        self,
        addresses: Sequence[Address],
        client_addresses: Sequence[Address],
        http_addresses: Sequence[Address] = (),
    ) -> None:
        """Tell where this node's listeners are reached from now on, best first.

        Where the box lost an address, connections begin anew: those from the lost one lead nowhere, and
        without that the node would be found dead before TCP noticed (tried: 0.1 s against 3.5 s of silence).
        """
        kept = {address.host for address in addresses}
        if any(address.host not in kept for address in self._mesh.membership.addresses):
            self.links.reconnect()
        self.handle(
            OfferChanged(
                addresses=tuple(addresses),
                client_addresses=tuple(client_addresses),
                http_addresses=tuple(http_addresses),
            )
        )

    def load_changed(self, load: Load) -> None:
        """Tell how busy this node is: at once where it matters to who may be asked, else now and then."""
        self._load = load
        known = self._mesh.membership.load
        if (load.accepting, load.engine) != (known.accepting, known.engine):
            self.handle(LoadChanged(load=load))
        elif self._load_timer is None:
            self._load_timer = self._loop.call_later(LOAD_INTERVAL_S, self._tell_load)

    def observe(self, observer: Callable[[MeshView], None]) -> None:
        """Call ``observer`` with the present view, and with each that is published from now on."""
        self._observers.append(observer)
        observer(self._published)

    def accompany(self, other: Callable[[], None]) -> None:
        """Call ``other`` whenever this node beats: what else is to be said to peers costs less then, for a
        message that finds everybody awake costs a fourth of one that wakes them."""
        self._company.append(other)

    async def wait_view_changed(self, revision: int) -> MeshView:
        """The published view, as soon as its revision is another than ``revision``."""
        while self._published.revision == revision:
            await self._view_changed.wait()
        return self._published

    async def close(self) -> None:
        """Say goodbye to every peer and end. Harmless when repeated."""
        if self._closed:
            return
        self.handle(LeaveRequested())
        self._closed = True
        for timer in (self._timer, self._publishing, self._load_timer):
            if timer is not None:
                timer.cancel()
        await self._saver.close()
        self.receiver.close()
        await self.links.flush(GOODBYE_TIMEOUT_S)
        await self.links.close()

    # --- events ----------------------------------------------------------------------------

    def _received(self, stream: NodeId, data: bytes) -> None:
        try:
            sender, message = wire.decode(data)
            if sender != stream:
                raise InvalidRequest("sender is not the node that opened the stream", field="sender")
        except InvalidRequest as error:
            self.malformed += 1
            self._log.warning("control_message_malformed", peer=stream, why=error.message)
            return
        self.handle(Received(sender=sender, message=message))

    def _link_failed(self, address: Address, to: NodeId | None, why: str) -> None:
        self._log.debug("link_failed", address=str(address), peer=to, why=why)
        self.handle(LinkFailed(address=address, to=to))

    def _set_timer(self) -> None:
        """Keep one timer. One that fires early costs a call; moving it at each event would cost more."""
        deadline = self._mesh.deadline
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._timer_fired)

    def _timer_fired(self) -> None:
        # A defect in the core must not stop the beat: the loop reports it, and this tick comes instead.
        self._timer = self._loop.call_later(TICK_AFTER_DEFECT_S, self._timer_fired)
        deadline = self._mesh.deadline
        if deadline is not None and self._loop.time() >= deadline:
            self.handle(Tick())
            for other in self._company:
                other()
        else:
            self._set_timer()

    def _tell_load(self) -> None:
        self._load_timer = None
        self.handle(LoadChanged(load=self._load))

    # --- effects ---------------------------------------------------------------------------

    def _perform(self, effects: Iterator[Effect]) -> None:
        """Perform what is left of one list, up to the first that must wait for the disk."""
        for effect in effects:
            match effect:
                case Send(to=to, address=address, message=message):
                    self.links.send(address, to, wire.encode(self._local, message))
                case Persist(key=key, data=data):
                    self._saver.save(key, data, lambda: self._perform(effects))
                    return
                case Note(event=event, fields=fields):
                    write = self._log.warning if event in _WARNINGS else self._log.info
                    write(event, **dict(fields))
                case _:
                    assert_never(effect)

    def _publish(self) -> None:
        self._publishing = None
        view = self._mesh.view
        if view is self._published:
            return
        self._published = view
        self._view_changed.set()
        self._view_changed = asyncio.Event()
        for observer in self._observers:
            observer(view)


@dataclass(slots=True)
class _Save:
    key: str
    data: bytes
    then: list[Callable[[], None]] = field(default_factory=list)


class Saver:
    """Makes values durable one after the other, in a thread, and lets what waited for each go on.

    A value that waits behind another of its own key replaces it: both are whole, and whoever waited for the
    older is served by the newer. Only neighbours are joined, so no key overtakes another.
    """

    def __init__(self, storage: Storage) -> None:
        self.failures = 0
        self._storage = storage
        self._waiting: deque[_Save] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._task: asyncio.Task[None] | None = None
        self._log = log.get()

    def save(self, key: str, data: bytes, then: Callable[[], None]) -> None:
        """Make ``data`` durable, then call ``then``; it is not called where the disk refuses."""
        if self._waiting and self._waiting[-1].key == key:
            self._waiting[-1].data = data
        elif len(self._waiting) >= SAVES_WAITING_MAX:
            self._failed(key, "the disk is too slow")
            return
        else:
            self._waiting.append(_Save(key, data))
        self._waiting[-1].then.append(then)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="saver")

    async def close(self) -> None:
        """Return when everything that was to be saved is."""
        while self._task is not None:
            await asyncio.wait((self._task,))
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                save = self._waiting.popleft()
                try:
                    await loop.run_in_executor(self._thread, self._storage.write, save.key, save.data)
                except (FieldmeshError, ValueError) as error:
                    self._failed(save.key, str(error))
                else:
                    for then in save.then:
                        then()
        finally:
            self._task = None

    def _failed(self, key: str, why: str) -> None:
        self.failures += 1
        self._log.error("state_not_saved", key=key, why=why)
