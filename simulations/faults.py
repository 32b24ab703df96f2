"""What can go wrong: one function a kind of fault, each undone after a while.

Owns: the faults and the record of who was in trouble until when (so that invariants know what to expect).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from fieldmesh.core.mesh import INCARNATION_KEY, HintSource, JoinHint, LeaveRequested, Mesh, OfferChanged
from fieldmesh.core.model import Address, Row
from fieldmesh.rpc import wire
from simulations.node import KeyedSealer, Settings, make_key, mesh_of, node_id, profile
from simulations.serving import AskArrived, Ledger
from simulations.world import World


@dataclass(slots=True)
class Playground:
    """A world with the settings of its nodes. Trouble is kept per host and per pair."""

    world: World
    rng: Random
    settings: dict[str, Settings]
    mesh: str
    mdns: bool = False
    ledger: Ledger = field(default_factory=Ledger)
    counts: Counter[str] = field(default_factory=Counter)
    trouble_until: dict[str, float] = field(default_factory=dict)
    frozen_until: dict[str, float] = field(default_factory=dict)
    pair_trouble_until: dict[tuple[str, str], float] = field(default_factory=dict)
    cut_since: dict[tuple[str, str], float] = field(default_factory=dict)
    down_since: dict[str, float] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    """Every id that ever lived, and its host."""
    addresses_given: int = 0

    def start(self, label: str) -> None:
        """Boot a host that is down."""
        host = self.world.hosts[label]
        if host.machine is None:
            self.down_since.pop(label, None)
            self.trouble(label)
            self.ids[node_id(self.settings[label].key)] = label
            self.world.start(label)
            if self.mdns:
                self.later(1.1, f"mDNS announces {label}", lambda: self.announce(label))

    def announce(self, label: str) -> None:
        """Multicast: everybody who runs and is not cut off hears of this host's address, and it of theirs."""
        for other in self.up():
            if other == label or (label, other) in self.world.cuts or label not in self.up():
                continue
            for teller, hearer in ((label, other), (other, label)):
                address = self.world.hosts[teller].addresses[0]
                self.world.post(hearer, JoinHint(address=address, source=HintSource.MDNS))

    def stop(self, label: str, *, power: bool = False) -> bool:
        """Kill a host that is up."""
        host = self.world.hosts[label]
        if host.machine is None:
            return False
        self.counts += self.counts_of(mesh_of(host.machine))
        for ask in [ask for ask, entry in self.ledger.open.items() if entry == host.identity]:
            del self.ledger.open[ask]  # its caller's connection broke with the node that it asked
            self.ledger.counts["lost_with_entry"] += 1
        self.down_since.setdefault(label, self.world.time)
        self.trouble(label)
        self.world.crash(label, power=power)
        return True

    def counts_of(self, mesh: Mesh) -> Counter[str]:
        """What one machine counted in its life."""
        counts = Counter(mesh.membership.counts)
        counts["rows_rejected"] += mesh.replica.rejected
        counts["rebuilds"] += mesh.replica.rebuilds
        counts["epochs"] = max(counts["epochs"], mesh.replica.epoch)
        return counts

    def trouble(self, label: str, lasts_s: float = 0.0) -> None:
        """From now until ``lasts_s`` later nobody can expect much of this host."""
        until = self.world.time + lasts_s
        self.trouble_until[label] = max(self.trouble_until.get(label, 0.0), until)

    def up(self) -> list[str]:
        return [label for label, host in self.world.hosts.items() if host.machine is not None]

    def pick(self) -> str | None:
        """Somebody who is up and not frozen."""
        hosts = self.world.hosts
        free = [label for label in self.up() if hosts[label].frozen_until <= self.world.time]
        return self.rng.choice(free) if free else None

    def new_address(self) -> Address:
        self.addresses_given += 1
        return Address(host=f"10.0.9.{self.addresses_given}", port=7000)

    def later(self, delay_s: float, what: str, function: Callable[[], object]) -> None:
        self.world.at(self.world.time + delay_s, what, function)

    def calm(self) -> None:
        """Everything heals: the quiet begins."""
        self.heal()
        for label in self.world.hosts:
            self.start(label)

    def cut(self, sources: list[str], destinations: list[str], *, both: bool) -> None:
        self.world.cut(sources, destinations, both=both)
        for pair in self.world.cuts:
            self.cut_since.setdefault(pair, self.world.time)

    def heal(self) -> None:
        self.world.heal()
        for source, destination in self.cut_since:
            self.pair_trouble_until[source, destination] = self.world.time
            self.pair_trouble_until[destination, source] = self.world.time
        self.cut_since.clear()


Fault = Callable[[Playground, float], None]


def kill(ground: Playground, lasts_s: float) -> None:
    """kill -9, and a restart."""
    label = ground.pick()
    if label is not None and ground.stop(label):
        ground.later(lasts_s, f"restart {label}", lambda: ground.start(label))


def power(ground: Playground, lasts_s: float) -> None:
    """The plug is pulled, and put back."""
    label = ground.pick()
    if label is not None and ground.stop(label, power=True):
        ground.later(lasts_s, f"restart {label}", lambda: ground.start(label))


def freeze(ground: Playground, lasts_s: float) -> None:
    """SIGSTOP, and SIGCONT."""
    label = ground.pick()
    if label is None:
        return
    ground.world.freeze(label, lasts_s)
    ground.frozen_until[label] = ground.world.time + lasts_s
    ground.down_since.setdefault(label, ground.world.time)
    host = ground.world.hosts[label]

    def thaw() -> None:
        if host.machine is not None and host.frozen_until <= ground.world.time:
            ground.down_since.pop(label, None)

    ground.later(lasts_s, f"thaw {label}", thaw)


def partition(ground: Playground, lasts_s: float) -> None:
    """The mesh falls into two parts."""
    labels = list(ground.world.hosts)
    ground.rng.shuffle(labels)
    size = ground.rng.randint(1, max(1, len(labels) // 2))
    ground.cut(labels[:size], labels[size:], both=True)
    ground.later(lasts_s, "heal", ground.heal)


def one_way(ground: Playground, lasts_s: float) -> None:
    """One direction between two nodes is cut."""
    source, destination = ground.rng.sample(list(ground.world.hosts), 2)
    ground.cut([source], [destination], both=False)
    ground.later(lasts_s, "heal", ground.heal)


def leave(ground: Playground, lasts_s: float) -> None:
    """A node says goodbye, stops, and comes back."""
    label = ground.pick()
    if label is None:
        return
    ground.counts["leave"] += 1
    ground.trouble(label, lasts_s)
    ground.down_since.setdefault(label, ground.world.time)
    ground.world.post(label, LeaveRequested())
    ground.later(0.2, f"stop {label}", lambda: ground.stop(label))
    ground.later(0.2 + lasts_s, f"restart {label}", lambda: ground.start(label))


def publish(ground: Playground, lasts_s: float) -> None:
    """A node offers something else."""
    label = ground.pick()
    if label is None:
        return
    ground.counts["publish"] += 1
    words = f"subject {ground.rng.getrandbits(16)}"
    ground.settings[label].profiles = (profile(f"p-{label}", words),)
    ground.world.post(label, OfferChanged(profiles=ground.settings[label].profiles))


def move(ground: Playground, lasts_s: float) -> None:
    """A node gets another address while it runs; nobody has the old one."""
    label = ground.pick()
    if label is None:
        return
    ground.counts["move"] += 1
    address = ground.new_address()
    ground.world.move(label, (address,))
    ground.trouble(label)
    ground.world.post(label, OfferChanged(addresses=(address,)))


def take_over(ground: Playground, lasts_s: float) -> None:
    """A node goes down, and its address comes up with another node behind it, as DHCP does it."""
    label, other = ground.pick(), ground.pick()
    if label is None or other is None or label == other:
        return
    ground.counts["take_over"] += 1
    address = ground.world.hosts[label].addresses[0]
    for victim in (label, other):
        ground.stop(victim)
    ground.world.move(other, (address,))
    ground.world.move(label, (ground.new_address(),))
    ground.later(lasts_s / 2, f"restart {other}", lambda: ground.start(other))
    ground.later(lasts_s, f"restart {label}", lambda: ground.start(label))


def new_key(ground: Playground, lasts_s: float) -> None:
    """A box loses its disk and comes back as somebody else with the same name and address."""
    label = ground.pick()
    if label is None or not ground.stop(label):
        return
    ground.counts["new_key"] += 1
    host = ground.world.hosts[label]
    host.disk.durable.clear()
    ground.settings[label].key = make_key(f"{label} {ground.rng.getrandbits(64)}")
    ground.later(lasts_s, f"restart {label}", lambda: ground.start(label))


def old_disk(ground: Playground, lasts_s: float) -> None:
    """A box is restored from a backup: same key, an incarnation that the mesh has seen long ago."""
    label = ground.pick()
    if label is None or not ground.stop(label):
        return
    ground.counts["old_disk"] += 1
    ground.world.hosts[label].disk.durable[INCARNATION_KEY] = b"0"
    ground.later(lasts_s, f"restart {label}", lambda: ground.start(label))


def vandal(ground: Playground, lasts_s: float) -> None:
    """A member writes into the document what it must not: rubbish or an older row under another's key, or a
    well signed row of another mesh."""
    label, victim = ground.pick(), ground.pick()
    if label is None or victim is None or label == victim:
        return
    mesh = mesh_of(ground.world.hosts[label].machine)
    key = node_id(ground.settings[victim].key)
    kind = ground.rng.choice(("rubbish", "older", "foreign"))
    ground.counts[f"vandal_{kind}"] += 1
    if kind == "rubbish":
        mesh.replica._map[key] = ground.rng.randbytes(40)
    elif kind == "older":
        held = mesh.replica.rows.get(key)
        row = wire.decode_row(held.envelope.payload) if held is not None else None
        if row is not None and row.sequence > 1:
            older = replace(row, sequence=row.sequence - 1, profiles=())
            sealer = KeyedSealer(ground.settings[victim].key)
            mesh.replica._map[key] = sealer.seal(row.incarnation, row.sequence - 1, wire.encode_row(older))
    else:
        stranger = make_key(f"stranger {ground.rng.getrandbits(64)}")
        row = Row(
            id=node_id(stranger),
            name="stranger",
            mesh="another",
            incarnation=1,
            sequence=1,
            addresses=(ground.new_address(),),
            client_addresses=(),
        )
        mesh.replica._map[row.id] = KeyedSealer(stranger).seal(1, 1, wire.encode_row(row))
    mesh.replica._read(ground.world.hosts[label].local(ground.world.time))


def ask(ground: Playground, lasts_s: float) -> None:
    """No fault: a client asks somebody who is up (a burst of asks, where it lasts)."""
    for _ in range(1 + int(lasts_s)):
        label = ground.pick()
        if label is None or ground.world.hosts[label].frozen_until > ground.world.time:
            return
        number = sum(ground.ledger.counts[kind] for kind in ("posted",))
        ground.ledger.counts["posted"] += 1
        domains = sorted({p.name for s in ground.settings.values() for p in s.profiles if p.domains})
        request = AskArrived(
            id=f"ask-{number}",
            domain=ground.rng.choice([*domains, ""]),
            prompt=tuple(ground.rng.randrange(1000) for _ in range(ground.rng.randint(1, 350))),
            tokens_max=ground.rng.randint(1, 120),
        )
        ground.world.post(label, request, ground.rng.uniform(0.0, 0.5))


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "power": power,
    "freeze": freeze,
    "partition": partition,
    "one_way": one_way,
    "leave": leave,
    "publish": publish,
    "move": move,
    "take_over": take_over,
    "new_key": new_key,
    "old_disk": old_disk,
    "vandal": vandal,
    "ask": ask,
}
