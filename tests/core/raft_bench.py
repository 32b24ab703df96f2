"""A bench for the log's machine: a few nodes, a wire that the test controls message by message, stores.

Saves are durable at once (and reported) unless ``autosave`` is off; nothing is delivered unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from fieldmesh.core.events import Received, Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft import Raft
from fieldmesh.core.raft_model import (
    Append,
    Body,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    Post,
    RaftConfig,
    Role,
    Save,
    Saved,
    Stored,
)

GROUP = "bench"
B = TypeVar("B")


def members(voters: str, learners: str = "") -> Members:
    return Members(
        voters=tuple(NodeId(v) for v in sorted(voters)), learners=tuple(NodeId(v) for v in sorted(learners))
    )


def log(terms: str, who: Members) -> tuple[Entry, ...]:
    """Entry 1 names the members in term 1; the digits are the terms of the entries that follow."""
    first = Entry(index=1, term=1, kind=EntryKind.MEMBERS, data=who.encode())
    rest = (
        Entry(index=position, term=int(term), kind=EntryKind.COMMAND, data=f"{position}/{term}".encode())
        for position, term in enumerate(terms, start=2)
    )
    return (first, *rest)


def stored(terms: str, who: Members, term: int = 1) -> Stored:
    entries = log(terms, who)
    return Stored(hard=HardState(term=max(term, entries[-1].term), group=GROUP), entries=entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    sender: NodeId
    to: NodeId
    message: Message


class Bench:
    """``logs`` gives nodes logs that differ from entry 1 alone; ``fresh`` nodes have none at all."""

    def __init__(
        self,
        voters: str = "abc",
        learners: str = "",
        *,
        fresh: str = "",
        logs: dict[str, str] | None = None,
        config: RaftConfig | None = None,
        term: int = 1,
    ) -> None:
        self.config = config or RaftConfig()
        self.now = 0.0
        self.autosave = True
        self.wire: list[Wired] = []
        self.effects: dict[str, list[Any]] = {}
        self.stores: dict[str, Stored] = {}
        self.nodes: dict[str, Raft] = {}
        who = members(voters, learners)
        for name in sorted({*voters, *learners}):
            self.stores[name] = stored((logs or {}).get(name, ""), who, term)
        for name in fresh:
            self.stores[name] = Stored()
        for name in self.stores:
            self.boot(name)

    def boot(self, name: str) -> Raft:
        """Start a node from what is durable; what was not is forgotten."""
        self.effects[name] = []
        self.nodes[name] = Raft(NodeId(name), self.config, self.stores[name], Random(name), self.now)
        return self.nodes[name]

    def handle(self, name: str, event: Any) -> list[Any]:
        """Hand in an event; perform its effects; return them."""
        effects: list[Any] = list(self.nodes[name].handle(event, self.now))
        self.nodes[name].check()
        self.effects[name] += effects
        for effect in list(effects):
            if isinstance(effect, Save) and self.autosave:
                self.store(name, effect)
                effects += self.handle(name, Saved(sequence=effect.sequence))
            elif isinstance(effect, Post):
                wired = Wired(sender=NodeId(name), to=effect.to, message=effect.message)
                if wired not in self.wire:  # what Saved caused was wired already
                    self.wire.append(wired)
        return effects

    def store(self, name: str, save: Save) -> None:
        """Make a Save durable, in the order that it demands."""
        old = self.stores[name]
        snapshot = save.snapshot or old.snapshot
        entries = [entry for entry in old.entries if entry.index > snapshot.index]
        if save.truncate_after is not None:
            entries = [entry for entry in entries if entry.index <= save.truncate_after]
        self.stores[name] = Stored(
            hard=save.hard or old.hard, snapshot=snapshot, entries=(*entries, *save.entries)
        )

    def give(
        self, name: str, sender: str, term: int, body: Body, group: str = GROUP, epoch: int = 0
    ) -> list[Any]:
        """Hand a node a message as if ``sender`` had sent it."""
        message = Message(group=group, epoch=epoch, term=term, body=body)
        return self.handle(name, Received(sender=NodeId(sender), message=message))

    def settle(self, among: str | None = None) -> None:
        """Deliver what is on the wire between these nodes, and what that causes; the rest is lost."""
        names = among if among is not None else "".join(self.nodes)
        for _ in range(10_000):
            if not self.wire:
                return
            wired = self.wire.pop(0)
            if wired.to in names and wired.sender in names and wired.to in self.nodes:
                self.handle(wired.to, Received(sender=wired.sender, message=wired.message))
        raise AssertionError("the nodes do not come to rest")

    def pass_time(self, seconds: float, among: str | None = None) -> None:
        """Let time pass in small steps: ticks where due, everything delivered between ``among``."""
        names = among if among is not None else "".join(self.nodes)
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.01)
            for name in names:
                deadline = self.nodes[name].deadline
                if deadline is not None and deadline <= self.now:
                    self.handle(name, Tick())
            self.settle(names)

    def elect(self, name: str, among: str | None = None) -> Raft:
        """Let all leases run out, then let ``name`` campaign first."""
        self.now += 10.0
        self.handle(name, Tick())
        self.settle(among)
        node = self.nodes[name]
        assert node.role is Role.LEADER, f"{name} is {node.role}"
        return node

    def lead_alone(self, name: str, voter: str) -> Raft:
        """Make ``name`` leader by the vote of ``voter``; its first entry reaches nobody."""
        self.now += 10.0
        self.handle(name, Tick())
        while self.nodes[name].role is not Role.LEADER:
            wired = self.wire.pop(0)
            if {wired.sender, wired.to} == {name, voter} and not isinstance(wired.message.body, Append):
                self.handle(wired.to, Received(sender=wired.sender, message=wired.message))
        self.wire.clear()
        return self.nodes[name]

    def replies(self, effects: list[Any], kind: type[B]) -> list[B]:
        """The bodies of this kind among the messages of a list of effects."""
        return [e.message.body for e in effects if isinstance(e, Post) and isinstance(e.message.body, kind)]


def of_kind(effects: list[Any], kind: type[B]) -> list[B]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]
