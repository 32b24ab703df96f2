"""The world: a heap of (time, sequence, target, event) over machines of the core.

Owns: virtual time, hosts with clocks and disks, the network between them, every kind of fault, the
trace hash. Must not: know what any machine decides, read a real clock, or draw randomness outside
the one seeded generator. Nothing here is specific to the mesh: ``boot`` makes the machine, the codec
makes its messages bytes, ``on_effect`` performs effects that the world does not know.

A host is a box: it has addresses, a clock (offset and rate), a disk, and at most one running machine.
What a disk was asked to persist is *cached* until it is synced, and a crash keeps only a prefix of the
cached writes. Effects are performed in order: a ``Send`` after a ``Persist`` waits until it is durable.
"""

from __future__ import annotations

import heapq
import itertools
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

from fieldmesh.core.events import Machine, Note, Persist, Received, Send, Tick
from fieldmesh.core.model import Address, NodeId

TICKS_WITHOUT_PROGRESS_MAX = 100
"""A machine whose deadline stays in the past for this many ticks at one instant has a timer storm."""

TRACE_LINES_KEPT_MAX = 200_000


class Codec(Protocol):
    """Turns a machine's messages into bytes and back; ``decode`` returns None for what it refuses."""

    def encode(self, message: Any) -> bytes: ...

    def decode(self, data: bytes) -> Any | None: ...


class IdentityCodec:
    """Passes messages as they are: for machines whose wire format does not exist yet."""

    def encode(self, message: Any) -> Any:
        return message

    def decode(self, data: Any) -> Any:
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two hosts. Probabilities are per message, times in seconds.

    Without ``reorder`` messages of one link arrive in order, as on a TCP connection.
    """

    delay_s: float = 0.001
    jitter_s: float = 0.001
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """How long a ``Persist`` takes until it is durable: uniform between the two, in seconds."""

    sync_s_min: float = 0.0005
    sync_s_max: float = 0.005


class InvariantBroken(AssertionError):
    """Something that must never happen happened; the message says when and where."""


@dataclass(slots=True)
class Disk:
    """``durable`` survives a crash; ``cached`` was written and is not synced yet, oldest first."""

    durable: dict[str, bytes] = field(default_factory=dict)
    cached: deque[tuple[str, bytes]] = field(default_factory=deque)


Boot = Callable[["Host"], tuple[Machine[Any, Any], Iterable[Any]]]
"""Makes a machine from what the host's disk holds, and the events it is given first."""


@dataclass(slots=True, eq=False)
class Host:
    """One box. ``machine`` is None while it is down; ``identity`` is what its messages claim as sender."""

    label: str
    identity: NodeId
    addresses: tuple[Address, ...]
    boot: Boot
    clock_offset_s: float = 0.0
    clock_rate: float = 1.0
    disk: Disk = field(default_factory=Disk)
    disk_speed: DiskSpeed = field(default_factory=DiskSpeed)
    machine: Machine[Any, Any] | None = None
    boots: int = 0
    powered: bool = True
    frozen_until: float = 0.0
    late_probability: float = 0.0
    late_s_max: float = 0.0
    busy_until: float = 0.0
    # Effects not performed yet, because a Persist before them is not durable yet.
    waiting: deque[Any] = field(default_factory=deque)
    syncing: bool = False
    ticks_without_progress: int = 0
    tick_at: float | None = None

    def local(self, time: float) -> float:
        """This host's monotonic clock at world time ``time``."""
        return self.clock_offset_s + time * self.clock_rate

    def world_time(self, local: float) -> float:
        return (local - self.clock_offset_s) / self.clock_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deliver:
    source: str
    sender: NodeId
    send: Send[Any]
    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Post:
    """An event from the host's own world (the scenario, the user, a failed connection)."""

    event: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wake:
    """The host's timer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Synced:
    """The oldest cached write became durable."""

    boots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    label: str
    function: Callable[[], object]


_Entry = _Deliver | _Post | _Wake | _Synced | _Call


class World:
    """A seeded world. ``seed`` and the calls made on it determine everything that happens.

    ``refused``, when given, makes the event that a sender's machine gets when the process that it sends
    to ended (connection broken or refused); nobody is told of a lost message, a cut or a power loss.
    ``lists_wait`` chooses between "a Send waits for every Persist before it" (True: logs) and "for
    those of the same list only" (False: the law in ``core.events``).
    """

    def __init__(
        self,
        seed: int,
        codec: Codec,
        *,
        link: Link | None = None,
        refused: Callable[[Send[Any]], Any] | None = None,
        on_effect: Callable[[Host, Any], None] | None = None,
        lists_wait: bool = True,
        record: bool = False,
        check_every_events: int = 1,
    ) -> None:
        self.random = random.Random(seed)
        self.codec = codec
        self.time = 0.0
        self.hosts: dict[str, Host] = {}
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.invariants: list[Callable[[Host], None]] = []
        self.trace: deque[str] | None = deque(maxlen=TRACE_LINES_KEPT_MAX) if record else None
        self.events_done = 0
        self.bytes_sent = 0
        self.link_default = link or Link()
        self.links: dict[tuple[str, str], Link] = {}
        self.cuts: set[tuple[str, str]] = set()
        self._refused = refused
        self._on_effect = on_effect
        self._lists_wait = lists_wait
        self._check_every_events = check_every_events
        self._heap: list[tuple[float, int, str, _Entry]] = []
        self._sequence = itertools.count()
        self._owners: dict[Address, str] = {}
        self._last_arrival: dict[tuple[str, str], float] = {}
        self._connections: dict[tuple[str, str], Send[Any]] = {}
        self._hash = blake2b(digest_size=16)

    # --- setting up ------------------------------------------------------------------------

    def add_host(
        self,
        label: str,
        identity: NodeId,
        addresses: tuple[Address, ...],
        boot: Boot,
        *,
        clock_offset_s: float = 0.0,
        clock_rate: float = 1.0,
        disk_speed: DiskSpeed | None = None,
    ) -> Host:
        """Put a box into the world, switched on but without a running machine."""
        if label in self.hosts:
            raise ValueError(f"host {label!r} exists already")
        host = Host(
            label=label,
            identity=identity,
            addresses=(),
            boot=boot,
            clock_offset_s=clock_offset_s,
            clock_rate=clock_rate,
            disk_speed=disk_speed or DiskSpeed(),
        )
        self.hosts[label] = host
        self.move(label, addresses)
        return host

    def move(self, label: str, addresses: tuple[Address, ...]) -> None:
        """Give a host these addresses; whoever held one of them loses it."""
        host = self.hosts[label]
        for address in host.addresses:
            if self._owners.get(address) == label:
                del self._owners[address]
        for address in addresses:
            previous = self._owners.get(address)
            if previous is not None:
                other = self.hosts[previous]
                other.addresses = tuple(a for a in other.addresses if a != address)
            self._owners[address] = label
        host.addresses = addresses

    def at(self, time: float, label: str, function: Callable[[], object]) -> None:
        """Call ``function`` at world time ``time``; ``label`` goes into the trace."""
        self._push(max(time, self.time), "", _Call(label=label, function=function))

    def post(self, label: str, event: Any, delay_s: float = 0.0) -> None:
        """Hand ``event`` to the machine of a host after ``delay_s``; lost if it is down by then."""
        self._push(self.time + delay_s, label, _Post(event=event))

    # --- faults ----------------------------------------------------------------------------

    def start(self, label: str) -> None:
        """Boot the host's machine from its disk."""
        host = self.hosts[label]
        if host.machine is not None:
            raise RuntimeError(f"{label} runs already")
        host.powered = True
        host.boots += 1
        host.frozen_until = host.busy_until = 0.0
        self.counts["restart" if host.boots > 1 else "start"] += 1
        self._log(label, f"boot {host.boots}", b"boot")
        host.machine, events = host.boot(host)
        for event in events:
            self.post(label, event)
        self._arm(host)

    def crash(self, label: str, *, power: bool = False) -> None:
        """kill -9 (connections are refused from now on) or, with ``power``, silence.

        Of the writes that were not synced a prefix survives, drawn at random.
        """
        host = self.hosts[label]
        if host.machine is None:
            return
        survivors = self.random.randint(0, len(host.disk.cached))
        self.counts["power_loss" if power else "kill"] += 1
        self.counts["writes_lost"] += len(host.disk.cached) - survivors
        for _ in range(survivors):
            key, data = host.disk.cached.popleft()
            host.disk.durable[key] = data
        host.disk.cached.clear()
        host.waiting.clear()
        host.syncing = False
        host.machine = None
        host.tick_at = None
        host.powered = not power
        self._log(label, f"crash power={power}", b"crash")
        for source, destination in [pair for pair in self._connections if label in pair]:
            send = self._connections.pop((source, destination))
            if destination == label and (source, label) not in self.cuts:
                self._refuse(source, label, send)

    def freeze(self, label: str, seconds: float) -> None:
        """Stop the process (SIGSTOP): everything for it waits, then comes at once, late."""
        self.counts["freeze"] += 1
        host = self.hosts[label]
        host.frozen_until = max(host.frozen_until, self.time + seconds)

    def make_late(self, label: str, probability: float, seconds_max: float) -> None:
        """From now on each event may find the host's loop busy for up to ``seconds_max``."""
        host = self.hosts[label]
        host.late_probability, host.late_s_max = probability, seconds_max
        if probability:
            self.counts["late_loop"] += 1

    def cut(self, sources: Iterable[str], destinations: Iterable[str], *, both: bool = True) -> None:
        """Drop everything from sources to destinations, and back unless ``both`` is False."""
        destinations = tuple(destinations)
        for source in sources:
            for destination in destinations:
                if source != destination:
                    self.cuts.add((source, destination))
                    if both:
                        self.cuts.add((destination, source))
        self.counts["partition" if both else "one_way_partition"] += 1

    def heal(self) -> None:
        """Undo every cut."""
        if self.cuts:
            self.counts["heal"] += 1
        self.cuts.clear()

    # --- running ---------------------------------------------------------------------------

    def run(self, until: float, *, stop: Callable[[], bool] | None = None) -> None:
        """Process events up to world time ``until``, or until ``stop`` (asked after each) is true."""
        while self._heap and self._heap[0][0] <= until:
            self.step()
            if stop is not None and stop():
                return
        self.time = max(self.time, until)

    def step(self) -> None:
        """Process the next event."""
        time, _, label, entry = heapq.heappop(self._heap)
        self.time = time
        self.events_done += 1
        if isinstance(entry, _Call):
            self._log("", entry.label, b"call")
            entry.function()
            return
        host = self.hosts[label]
        if isinstance(entry, _Synced):
            self._synced(host, entry)
            return
        if host.machine is None:
            self._reach_nobody(host, entry)
            return
        delayed = self._delayed_until(host)
        if delayed > time:
            if isinstance(entry, _Wake):
                host.tick_at = delayed
            self._push(delayed, label, entry)
            return
        self._deliver(host, entry)

    @property
    def digest(self) -> str:
        """Hash over everything that has happened: equal for equal runs."""
        return self._hash.hexdigest()

    # --- inside ----------------------------------------------------------------------------

    def _push(self, time: float, label: str, entry: _Entry) -> None:
        heapq.heappush(self._heap, (time, next(self._sequence), label, entry))

    def _delayed_until(self, host: Host) -> float:
        if host.frozen_until > self.time:
            return host.frozen_until
        # What waited for the end of a stall is done in one go: only a later event may meet the next stall.
        idle = host.busy_until < self.time
        if idle and host.late_probability and self.random.random() < host.late_probability:
            host.busy_until = self.time + self.random.uniform(0.0, host.late_s_max)
        return host.busy_until

    def _reach_nobody(self, host: Host, entry: _Entry) -> None:
        """A message arrives where no machine runs."""
        if not isinstance(entry, _Deliver):
            return
        self.counts["undelivered"] += 1
        self._refuse(entry.source, host.label, entry.send)

    def _refuse(self, source: str, destination: str, send: Send[Any]) -> None:
        """Tell a sender's machine that nobody listens where it sends to."""
        sender, receiver = self.hosts[source], self.hosts[destination]
        if self._refused is None or sender.machine is None or not receiver.powered:
            return
        if (destination, source) not in self.cuts:
            self.counts["connection_refused"] += 1
            self.post(source, self._refused(send), delay_s=self.link_default.delay_s)

    def _deliver(self, host: Host, entry: _Deliver | _Post | _Wake) -> None:
        assert host.machine is not None
        local = host.local(self.time)
        if isinstance(entry, _Wake):
            if host.tick_at is not None and host.tick_at <= self.time:
                host.tick_at = None
            deadline = host.machine.deadline
            if deadline is None or local < deadline:
                self._arm(host)
                return
            event: Any = Tick()
            self._log(host.label, "tick", b"t")
        elif isinstance(entry, _Post):
            event = entry.event
            self._log(host.label, event, b"p")
        else:
            message = self.codec.decode(entry.data)
            if message is None:
                self.counts["refused_by_codec"] += 1
                return
            event = Received(sender=entry.sender, message=message)
            self.counts["delivered"] += 1
            data = entry.data if isinstance(entry.data, bytes) else repr(entry.data).encode()
            self._log(host.label, message, entry.source.encode() + data)
        self._handle(host, event, local)

    def _handle(self, host: Host, event: Any, local: float) -> None:
        assert host.machine is not None
        try:
            effects = host.machine.handle(event, local)
        except AssertionError as error:
            raise InvariantBroken(f"t={self.time:.6f} {host.label} on {event!r}: {error}") from error
        self._perform(host, effects)
        self._guard_progress(host, event, local)
        if self.events_done % self._check_every_events:
            self._arm(host)
            return
        try:
            host.machine.check()
            for invariant in self.invariants:
                invariant(host)
        except AssertionError as error:
            raise InvariantBroken(f"t={self.time:.6f} {host.label} after {event!r}: {error}") from error
        self._arm(host)

    def _guard_progress(self, host: Host, event: Any, local: float) -> None:
        """A tick must move the deadline into the future; many that do not are a timer storm."""
        assert host.machine is not None
        deadline = host.machine.deadline
        if deadline is None or deadline > local:
            host.ticks_without_progress = 0
        elif isinstance(event, Tick):
            host.ticks_without_progress += 1
            if host.ticks_without_progress > TICKS_WITHOUT_PROGRESS_MAX:
                raise InvariantBroken(f"t={self.time:.6f} {host.label}: its deadline stays in the past")

    def _arm(self, host: Host) -> None:
        """Schedule the host's timer, unless one that fires no later is scheduled already."""
        if host.machine is None or host.machine.deadline is None:
            return
        due = max(self.time, host.world_time(host.machine.deadline) + 1e-9)
        if host.tick_at is None or due < host.tick_at:
            host.tick_at = due
            self._push(due, host.label, _Wake())

    def _perform(self, host: Host, effects: Iterable[Any]) -> None:
        """Perform a list of effects; what stands behind a Persist waits for it."""
        blocked = bool(host.waiting) and self._lists_wait
        for effect in effects:
            if isinstance(effect, Persist):
                self.counts["persist"] += 1
                host.disk.cached.append((effect.key, effect.data))
                host.waiting.append(effect)
                self._sync_next(host)
                blocked = True
            elif blocked:
                host.waiting.append(effect)
            else:
                self._perform_one(host, effect)

    def _sync_next(self, host: Host) -> None:
        if host.syncing or not host.disk.cached:
            return
        host.syncing = True
        speed = host.disk_speed
        delay = self.random.uniform(speed.sync_s_min, speed.sync_s_max)
        self._push(self.time + delay, host.label, _Synced(boots=host.boots))

    def _synced(self, host: Host, entry: _Synced) -> None:
        if host.machine is None or entry.boots != host.boots or not host.disk.cached:
            return
        key, data = host.disk.cached.popleft()
        host.disk.durable[key] = data
        host.syncing = False
        self._log(host.label, f"synced {key}", b"s" + key.encode())
        persist = host.waiting.popleft()
        assert isinstance(persist, Persist) and persist.key == key, "effects left their order"
        while host.waiting and not isinstance(host.waiting[0], Persist):
            self._perform_one(host, host.waiting.popleft())
        self._sync_next(host)

    def _perform_one(self, host: Host, effect: Any) -> None:
        if isinstance(effect, Send):
            self._send(host, effect)
        elif isinstance(effect, Note):
            self.notes[effect.event] += 1
            self._log(host.label, effect, effect.event.encode())
        elif self._on_effect is not None:
            self._on_effect(host, effect)
        else:
            raise TypeError(f"{host.label} asked for an effect that this world cannot perform: {effect!r}")

    def _send(self, host: Host, effect: Send[Any]) -> None:
        self.counts["sent"] += 1
        data = self.codec.encode(effect.message)
        if isinstance(data, bytes):
            self.bytes_sent += len(data)
        label = self._owners.get(effect.address)
        if label is None or (host.label, label) in self.cuts or not self.hosts[label].powered:
            self.counts["dropped"] += 1
            return
        link = self.links.get((host.label, label), self.link_default)
        if link.loss and self.random.random() < link.loss:
            self.counts["lost"] += 1
            return
        if self.hosts[label].machine is None:
            self._refuse(host.label, label, effect)
            return
        self._connections[host.label, label] = effect
        entry = _Deliver(source=host.label, sender=host.identity, send=effect, data=data)
        self._push(self._arrival(host.label, label, link), label, entry)
        if link.duplicate and self.random.random() < link.duplicate:
            self.counts["duplicated"] += 1
            self._push(self.time + link.delay_s + self.random.random() * 0.5, label, entry)

    def _arrival(self, source: str, destination: str, link: Link) -> float:
        time = self.time + link.delay_s + self.random.random() * link.jitter_s
        if link.reorder and self.random.random() < link.reorder:
            self.counts["reordered"] += 1
            return time + self.random.random() * 10 * (link.delay_s + link.jitter_s)
        time = max(time, self._last_arrival.get((source, destination), 0.0))
        self._last_arrival[source, destination] = time
        return time

    def _log(self, label: str, what: object, data: bytes) -> None:
        self._hash.update(struct.pack("<d", self.time) + label.encode() + data)
        if self.trace is not None:
            self.trace.append(f"{self.time:12.6f} {label:>8} {what!r}")


def lossy(link: Link, *, loss: float, duplicate: float = 0.0, reorder: float = 0.0) -> Link:
    """A worse copy of a link."""
    return replace(link, loss=loss, duplicate=duplicate, reorder=reorder)
