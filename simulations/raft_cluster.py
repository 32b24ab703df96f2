"""A log's members as hosts of the discrete-event world. Owns: stores that lose what was not synced.

``Node`` stands between ``core.consensus`` and the world: a Save becomes a Persist of the world (so nothing
behind it happens before it is durable, and a crash keeps a prefix), a Post becomes a Send through the real
wire codec. Must not: decide what happens when; that is the scenario's (``simulations.raft``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from fieldmesh.core.consensus import Answered, Consensus, NotDone, StateChanged
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.events import Persist, Send
from fieldmesh.core.model import Address, NodeId
from fieldmesh.core.raft_members import founded
from fieldmesh.core.raft_model import (
    Append,
    Apply,
    Chunk,
    Entry,
    HardState,
    Members,
    MembersChanged,
    Message,
    Post,
    PreVote,
    PreVoteReply,
    Proposed,
    RaftConfig,
    ReadFailed,
    ReadReady,
    Refused,
    Restore,
    Role,
    RoleChanged,
    Save,
    Saved,
    Snapshot,
    Stored,
    Vote,
    VoteReply,
)
from fieldmesh.rpc import consensus as codec
from simulations.raft_oracle import Oracle
from simulations.world import Host, Link, World

GROUP = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """A message with the name of its sender, for the oracle."""

    sender: str
    message: Message


class WatchedCodec:
    """The real wire format. The oracle hears what leaves; what the format refuses is dropped by the world."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def encode(self, spoken: Spoken) -> bytes:
        message = spoken.message
        body = message.body
        if not isinstance(body, PreVote) and not (isinstance(body, PreVoteReply) and body.granted):
            voted = isinstance(body, Vote) or (isinstance(body, VoteReply) and body.granted)
            self.oracle.sends(spoken.sender, message.term, voted=voted)
        if isinstance(body, Chunk) and body.offset == 0:
            self.oracle.counts["snapshots_sent"] += 1
        if isinstance(body, Append):
            self.oracle.exist(spoken.sender, body.prev_term, body.entries)
        return codec.encode(message)

    def decode(self, data: bytes) -> Message | None:
        try:
            return codec.decode(data)
        except InvalidRequest:
            return None


@dataclass(slots=True)
class Store:
    """What one host's disk holds durably."""

    hard: HardState = field(default_factory=HardState)
    snapshot: Snapshot = field(default_factory=Snapshot)
    entries: list[Entry] = field(default_factory=list)

    @staticmethod
    def of(stored: Stored) -> Store:
        return Store(hard=stored.hard, snapshot=stored.snapshot, entries=list(stored.entries))

    def save(self, save: Save) -> None:
        """One transaction, in the order that Save demands."""
        if save.hard is not None:
            self.hard = save.hard
        if save.snapshot is not None:
            self.snapshot = save.snapshot
            self.entries = [entry for entry in self.entries if entry.index > save.snapshot.index]
        if save.truncate_after is not None:
            self.entries = [entry for entry in self.entries if entry.index <= save.truncate_after]
        self.entries.extend(save.entries)

    def term_at(self, index: int) -> int | None:
        """The term of an entry that is here, or of the snapshot's last one."""
        if self.entries and index >= self.entries[0].index:
            return self.entries[index - self.entries[0].index].term
        return self.snapshot.term if index == self.snapshot.index else None

    def load(self) -> Stored:
        return Stored(hard=self.hard, snapshot=self.snapshot, entries=tuple(self.entries))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDone:
    """Stands behind a Persist: what it named is durable now."""

    key: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForBoot:
    """An event for one life of a host; its next life must not see it."""

    boots: int
    event: Any


class Watched(Consensus):
    """The machine under test, with the oracle looking at what it applies."""

    def __init__(self, label: str, oracle: Oracle, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.label = label
        self.oracle = oracle

    def _apply(self, effect: Apply) -> list[Any]:
        self.oracle.applied(self.label, self.raft.term, effect.entries)
        return super()._apply(effect)

    def _restore(self, effect: Restore) -> list[Any]:
        self.oracle.restored(self.label, effect)
        return super()._restore(effect)


class Node:
    """One life of one member: the machine that the world runs."""

    def __init__(self, cluster: Cluster, host: Host, consensus: Watched) -> None:
        self.cluster = cluster
        self.host = host
        self.boots = host.boots
        self.consensus = consensus
        self.stopped = False

    @property
    def deadline(self) -> float | None:
        return None if self.stopped else self.consensus.deadline

    def handle(self, event: Any, now: float) -> list[Any]:
        if isinstance(event, ForBoot):
            if event.boots != self.boots:
                return []
            event = event.event
        if self.stopped:
            return []
        role = self.consensus.raft.role
        effects = self.cluster.translate(self, self.consensus.handle(event, now))
        if role is not Role.LEADER and self.consensus.raft.role is Role.LEADER:
            self.cluster.oracle.elected(self.host.label, self.consensus.raft)
        return effects

    def check(self) -> None:
        self.consensus.check()
        self.cluster.oracle.after(self.host.label, self.consensus.raft)


class Cluster:
    """The hosts of one log in one world."""

    def __init__(
        self,
        seed: int,
        *,
        founders: int,
        spares: int,
        config: RaftConfig,
        link: Link,
        record: bool = False,
        machine: Callable[..., Consensus] = Watched,
    ) -> None:
        self.oracle = Oracle()
        self.world = World(seed, WatchedCodec(self.oracle), link=link, on_effect=self._perform, record=record)
        self.config = config
        self.counts: Counter[str] = self.oracle.counts
        self.stores: dict[str, Store] = {}
        self.journal: dict[tuple[str, str], Save] = {}
        self.disk_full: set[str] = set()
        self.doomed: set[str] = set()
        self.answers: Callable[[str, Any], None] = lambda label, effect: None
        self._machine = machine
        self.labels = [f"n{number}" for number in range(founders + spares)]
        for label in self.labels:
            self.stores[label] = Store()
            address = Address(host=label, port=1)
            self.world.add_host(label, NodeId(label), (address,), self._boot)
        self._found(founders)

    def _found(self, founders: int) -> None:
        """One founder writes the log's first entry; more founders begin with a copy that names them all."""
        stored = founded(NodeId(self.labels[0]), GROUP)
        if founders > 1:
            voters = tuple(NodeId(label) for label in self.labels[:founders])
            first = stored.entries[0]
            data = Members(voters=voters).encode()
            stored = Stored(
                hard=stored.hard,
                entries=(Entry(index=first.index, term=first.term, kind=first.kind, data=data),),
            )
        for label in self.labels[:founders]:
            self.stores[label] = Store.of(stored)

    # --- lives ---

    def _boot(self, host: Host) -> tuple[Node, Iterable[Any]]:
        self._fold(host)
        for key in [key for key in self.journal if key[0] == host.label]:
            del self.journal[key]
        stored = self.stores[host.label].load()
        self.oracle.boots(host.label, stored.hard.term, stored.hard.vote)
        rng = Random(self.world.random.getrandbits(64))
        now = host.local(self.world.time)
        consensus = self._machine(host.label, self.oracle, NodeId(host.label), self.config, stored, rng, now)
        return Node(self, host, consensus), ()  # type: ignore[arg-type]

    def _fold(self, host: Host) -> None:
        """Move what the world made durable into the store, in the order in which it was written."""
        for key in list(host.disk.durable):
            del host.disk.durable[key]
            save = self.journal.pop((host.label, key))
            store = self.stores[host.label]
            store.save(save)
            before = store.term_at(save.entries[0].index - 1) if save.entries else None
            self.oracle.exist(host.label, before, save.entries)

    def wipe(self, label: str) -> None:
        """Take all that a host's disk holds; whoever ran there dies."""
        host = self.world.hosts[label]
        self.world.crash(label)
        host.disk.durable.clear()
        self.stores[label] = Store()
        self.oracle.forget(label)
        self.counts["wiped"] += 1

    def node(self, label: str) -> Node | None:
        machine = self.world.hosts[label].machine
        return machine if isinstance(machine, Node) and not machine.stopped else None

    @property
    def leader(self) -> str | None:
        """Who leads the newest term, if anybody that runs does."""
        leading = [
            (node.consensus.raft.term, label)
            for label in self.labels
            if (node := self.node(label)) is not None and node.consensus.raft.role is Role.LEADER
        ]
        return max(leading)[1] if leading else None

    # --- effects ---

    def translate(self, node: Node, effects: list[Any]) -> list[Any]:
        """The machine's effects as the world's, in the same order. A full disk ends this life at its Save."""
        label, out = node.host.label, list[Any]()
        for effect in effects:
            if isinstance(effect, Save):
                if label in self.disk_full:
                    self._stop_on_full_disk(node)
                    return out
                self._watch_save(node, effect)
                key = f"{node.boots}:{effect.sequence}"
                self.journal[label, key] = effect
                out += [Persist(key=key, data=b""), SaveDone(key=key, sequence=effect.sequence)]
            elif isinstance(effect, Post):
                spoken = Spoken(sender=label, message=effect.message)
                out.append(Send(to=effect.to, address=Address(host=effect.to, port=1), message=spoken))
            else:
                out.append(effect)
        return out

    def _watch_save(self, node: Node, save: Save) -> None:
        label, consensus = node.host.label, node.consensus
        self.counts["saves"] += 1
        if label in self.doomed:
            self.doomed.discard(label)
            self.counts["kill_in_save"] += 1
            boots, soon = node.boots, self.world.time + self.world.random.uniform(0.0, 0.003)
            self.world.at(soon, f"dies saving {label}", lambda: self._crash_life(label, boots))
        if save.snapshot is not None and save.truncate_after is None:
            self.counts["compactions"] += 1
            self.oracle.state_of(label, consensus.applied, consensus.state)

    def _stop_on_full_disk(self, node: Node) -> None:
        node.stopped = True
        self.counts["disk_full"] += 1
        label, boots = node.host.label, node.boots
        self.world.at(self.world.time, f"disk full {label}", lambda: self._crash_life(label, boots))

    def _crash_life(self, label: str, boots: int) -> None:
        host = self.world.hosts[label]
        if host.machine is not None and host.boots == boots:
            self.world.crash(label)

    def _perform(self, host: Host, effect: Any) -> None:
        if isinstance(effect, SaveDone):
            self._fold(host)
            self.world.post(host.label, ForBoot(boots=host.boots, event=Saved(sequence=effect.sequence)))
        elif isinstance(effect, Answered | NotDone | ReadReady | ReadFailed | Refused):
            self.answers(host.label, effect)
        elif not isinstance(effect, RoleChanged | MembersChanged | StateChanged | Proposed):
            raise TypeError(f"{host.label}: nobody performs {effect!r}")
