"""Clients of the log in the simulated world. Owns: what they ask, what they are told, the history of both.

Each does one operation after another: get, put, or compare-and-set on one of a few keys, at a node that it
believes to lead. It asks again with the same sequence number where it was told nothing, and gives up after a
while: then the outcome is unknown for ever, and a new client (a new number in the history) takes its place.
Clients reach every node whatever the nodes can reach: the hardest case for stale reads. Must not: see more
of a machine than a client of the real service would (its answers), save for the oracle's sake.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from fieldmesh.core import settings
from fieldmesh.core.consensus import Answered, NotDone, Submit
from fieldmesh.core.raft_model import Read, ReadReady
from fieldmesh.core.settings import Code
from simulations.linearizability import Kind, Operation
from simulations.raft_cluster import Cluster

ANSWER_S_MAX = 1.0
ATTEMPTS_MAX = 6
CLIENT_DELAY_S = 0.002


@dataclass(slots=True, kw_only=True)
class Client:
    """One client. ``seen`` is what it last read or wrote of a key: (value, revision)."""

    number: int
    session: int = 0
    sequence: int = 0
    target: str = ""
    seen: dict[str, tuple[str | None, int]]
    operation: Operation | None = None
    command: settings.Command | None = None
    attempts: int = 0
    request: int = 0


class Clients:
    """All clients of one cluster, and the history of what they did."""

    def __init__(self, cluster: Cluster, *, count: int, keys: int, think_s: float) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.random = cluster.world.random
        self.keys = [f"app/k{number}" for number in range(keys)]
        self.think_s = think_s
        self.history: list[Operation] = []
        self.running = True
        self._numbers = itertools.count()
        self._requests = itertools.count(1)
        self._values = itertools.count()
        self._waiting: dict[int, tuple[Client, int]] = {}  # request -> (client, committed when it was asked)
        self.clients = [self._new_client() for _ in range(count)]
        cluster.answers = self._on_answer

    def _new_client(self) -> Client:
        return Client(number=next(self._numbers), seen={}, target=self.random.choice(self.cluster.labels))

    def start(self) -> None:
        """Begin to ask."""
        for client in self.clients:
            self._after(self.random.random() * self.think_s, client, self._next)

    def stop(self) -> None:
        """Ask nothing new; what is under way stays unknown."""
        self.running = False
        for client in self.clients:
            self._record_unknown(client)

    def _after(self, delay_s: float, client: Client, function: Any) -> None:
        self.world.at(self.world.time + delay_s, f"client {client.number}", lambda: function(client))

    # --- asking ---

    def _next(self, client: Client) -> None:
        if not self.running:
            return
        client.attempts = 0
        client.command = client.operation = None
        if self.random.random() < 0.15:
            client.target = self.random.choice(self.cluster.labels)
        if client.session == 0:
            client.command = settings.Command(kind=settings.Kind.OPEN_SESSION)
        else:
            self._choose(client)
        self._ask(client)

    def _choose(self, client: Client) -> None:
        key = self.random.choice(self.keys)
        draw = self.random.random()
        kind = Kind.GET if draw < 0.4 else Kind.CAS if draw < 0.7 and key in client.seen else Kind.PUT
        value = None if kind is Kind.GET else f"v{next(self._values)}"
        expected, revision = client.seen.get(key, (None, 0))
        client.operation = Operation(
            client=client.number,
            key=key,
            kind=kind,
            invoked=self.world.time,
            returned=None,
            value=value,
            expected=expected if kind is Kind.CAS else None,
        )
        if kind is Kind.GET:
            return
        client.sequence += 1
        change = settings.Change(
            key=key, value=value, expected_revision=revision if kind is Kind.CAS else None
        )
        client.command = settings.Command(
            kind=settings.Kind.WRITE,
            session=client.session,
            sequence=client.sequence,
            acknowledged=client.sequence - 1,
            changes=(change,),
            author=f"c{client.number}",
        )

    def _ask(self, client: Client) -> None:
        """Send the request to the node that is believed to lead; hear nothing for a while, ask another."""
        if not self.running:
            return
        client.attempts += 1
        request = client.request = next(self._requests)
        self._waiting[request] = (client, self.cluster.oracle.last_committed)
        if client.command is None:
            event: Any = Read(id=request)
        else:
            wall_ms = int(self.world.time * 1000) + 1_700_000_000_000
            event = Submit(requests=((request, client.command),), time_ms=wall_ms)
        self.world.post(client.target, event, delay_s=CLIENT_DELAY_S)
        self._after(ANSWER_S_MAX, client, lambda c: self._give_up(c, request))

    def _give_up(self, client: Client, request: int) -> None:
        if self._waiting.pop(request, None) is not None:
            self.cluster.counts["client_timeouts"] += 1
            self._ask_elsewhere(client, None)

    def _ask_elsewhere(self, client: Client, leader: str | None) -> None:
        client.target = leader if leader is not None else self.random.choice(self.cluster.labels)
        if client.attempts < ATTEMPTS_MAX and self.running:
            self._after(0.05, client, self._ask)
            return
        self._record_unknown(client)
        self.clients.remove(client)
        if self.running:
            self.clients.append(self._new_client())
            self._after(self.think_s, self.clients[-1], self._next)

    def _record_unknown(self, client: Client) -> None:
        if client.operation is not None:
            self.history.append(client.operation)
            client.operation = None
        self._waiting.pop(client.request, None)
        client.request = 0

    # --- answers ---

    def _on_answer(self, label: str, effect: Any) -> None:
        """An answer leaves a node; it arrives a little later."""
        request = getattr(effect, "request", None) or getattr(effect, "id", None)
        if request not in self._waiting:
            return
        client, committed = self._waiting.pop(request)
        read: tuple[str | None, int] | None = None
        if isinstance(effect, ReadReady):
            self.cluster.oracle.read_proven(label, effect.index, committed)
            assert client.operation is not None
            node = self.cluster.node(label)
            if node is None:
                return
            value = node.consensus.state.values.get(client.operation.key)
            read = (value.text, value.revision) if value is not None else (None, 0)
        self._after(CLIENT_DELAY_S, client, lambda c: self._hear(c, request, effect, read))

    def _hear(self, client: Client, request: int, effect: Any, read: tuple[str | None, int] | None) -> None:
        if client.request != request or not self.running:
            return
        client.request = 0
        if isinstance(effect, Answered):
            self._hear_outcome(client, effect.outcome)
        elif read is not None:
            self._hear_value(client, read)
        else:
            self._ask_elsewhere(client, effect.leader if isinstance(effect, NotDone) else None)

    def _hear_value(self, client: Client, read: tuple[str | None, int]) -> None:
        assert client.operation is not None
        client.seen[client.operation.key] = read
        self._record(client, replace(client.operation, value=read[0]))

    def _hear_outcome(self, client: Client, outcome: settings.Outcome) -> None:
        operation = client.operation
        if operation is None:
            client.session = outcome.session
            self._after(self.think_s * self.random.random(), client, self._next)
            return
        assert operation.value is not None
        if outcome.code is Code.DONE:
            self.cluster.oracle.acknowledged(outcome.revision, operation.value)
            client.seen[operation.key] = (operation.value, outcome.revision)
            self._record(client, replace(operation, done=True))
        elif outcome.code is Code.REVISION_CONFLICT:
            client.seen.pop(operation.key, None)
            self._record(client, replace(operation, done=False))
        else:
            raise AssertionError(f"client {client.number} was told {outcome}")

    def _record(self, client: Client, operation: Operation) -> None:
        self.history.append(replace(operation, returned=self.world.time))
        client.operation = None
        self.cluster.counts[f"done_{operation.kind.value}"] += 1
        self._after(self.think_s * 2 * self.random.random(), client, self._next)
