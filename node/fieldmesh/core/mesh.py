"""The one door to the mesh: membership and directory behind ``handle``, ``deadline`` and ``view``.

Owns: how the two machines meet (marks in heartbeats lead to pulls, rows lead to members), this node's
own row, the snapshot, and the immutable view that everything else reads. Must not: decide who is alive
(``membership``), how rows converge (``replica``), or where requests go (``routing``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

from fieldmesh.core import directory
from fieldmesh.core.directory import RowCodec
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.events import Note, Persist, Received, Send, Tick
from fieldmesh.core.joining import HintSource, JoinConfig
from fieldmesh.core.membership import Membership
from fieldmesh.core.messages import (
    ControlMessage,
    DirectoryPull,
    DirectoryPush,
    Heartbeat,
    Hello,
    Mark,
    PeerHint,
    Sealer,
    Welcome,
)
from fieldmesh.core.model import Address, Member, MeshView, NodeId, NodeState, ProfileOffer, Row, Seat
from fieldmesh.core.peers import (
    AddressesChanged,
    JoinHint,
    LeaveRequested,
    LinkFailed,
    LoadChanged,
    MembershipConfig,
    Peer,
)
from fieldmesh.core.replica import Replica, ReplicaConfig

__all__ = [
    "Effect",
    "Event",
    "HintSource",
    "Identity",
    "JoinHint",
    "LeaveRequested",
    "LinkFailed",
    "LoadChanged",
    "Mesh",
    "MeshConfig",
    "OfferChanged",
]

SNAPSHOT_KEY = "directory"
"""``Persist`` key of the snapshot that ``Mesh`` takes back at the next start."""
INCARNATION_KEY = "incarnation"
"""``Persist`` key of this node's incarnation, decimal digits; the host starts above it the next time."""

NOWHERE = Address(host="", port=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this node is. ``incarnation`` is above that of every earlier start."""

    id: NodeId
    name: str
    mesh: str
    addresses: tuple[Address, ...]
    client_addresses: tuple[Address, ...] = ()
    http_addresses: tuple[Address, ...] = ()
    incarnation: int = 1
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferChanged:
    """What this node says of itself changed; None leaves a part as it was."""

    profiles: tuple[ProfileOffer, ...] | None = None
    addresses: tuple[Address, ...] | None = None
    client_addresses: tuple[Address, ...] | None = None
    http_addresses: tuple[Address, ...] | None = None
    seat: Seat | None = None


Event = Tick | Received[ControlMessage] | JoinHint | LinkFailed | LoadChanged | OfferChanged | LeaveRequested
Effect = Send[ControlMessage] | Persist | Note


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Slices of the machines inside, and the rhythm of what is the mesh's own (seconds).

    ``pull_interval_s`` is for each peer; in a mesh too large for direct beats, ``pull_interval_large_s`` is
    for all peers together (a state vector of 1,000 nodes has 10 kB). The first snapshot is taken
    ``snapshot_first_s`` after the start: a node that dies young remembers whom it met. ``row_keep_s``: rows
    of nodes that were gone for so long are dropped. ``incarnation_raises_max`` bounds a war between two
    nodes that live with copies of one key.
    """

    membership: MembershipConfig = field(default_factory=MembershipConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    pull_interval_s: float = 0.3
    pull_interval_large_s: float = 0.5
    snapshot_first_s: float = 1.0
    snapshot_interval_s: float = 5.0
    compact_check_interval_s: float = 60.0
    row_keep_s: float = 7 * 24 * 3600.0
    incarnation_raises_max: int = 3


class Mesh:
    """One node's part of the mesh. Not thread-safe; belongs to one loop."""

    def __init__(
        self,
        *,
        config: MeshConfig | None = None,
        identity: Identity,
        sealer: Sealer,
        codec: RowCodec,
        rng: Random,
        snapshot: bytes | None = None,
    ) -> None:
        """Raises InvalidRequest where the identity makes no acceptable row."""
        self.config = config or MeshConfig()
        self._identity = identity
        self._profiles: tuple[ProfileOffer, ...] = ()
        self._seat: Seat | None = None
        self._codec = codec
        self._rng = rng
        self.membership = Membership(
            local=identity.id,
            name=identity.name,
            mesh=identity.mesh,
            addresses=identity.addresses,
            incarnation=identity.incarnation,
            rng=rng,
            config=self.config.membership,
            join=self.config.join,
        )
        self.replica = Replica(
            identity.id,
            sealer,
            rng,
            incarnation=identity.incarnation,
            config=self.config.replica,
            snapshot=snapshot,
        )
        self._rows: dict[NodeId, Row] = {}
        self._rejected_rows = 0
        self._publish()
        self._members: dict[NodeId, tuple[tuple[object, ...], Member]] = {}
        self._view: MeshView | None = None
        self._view_basis: tuple[int, int] = (-1, -1)
        self._revision = 0
        self._row_revision = 0
        self._pulled_at: dict[NodeId, float] = {}
        self._pulled_last = float("-inf")
        self._snapshot_dirty = False
        self._snapshot_due = 0.0
        self._compact_check_at = rng.uniform(0.5, 1.0) * self.config.compact_check_interval_s
        self._clock_started: float | None = None
        self._raises = 0
        self._starting: list[Effect] = []
        if self.replica.snapshot_damaged:
            self._starting.append(Note(event="snapshot_damaged"))

    def __repr__(self) -> str:
        return f"Mesh({self._identity.name}, {self.membership!r}, {self.replica!r})"

    # --- the machine -----------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        return self.membership.deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at ``now`` (seconds, monotonic).

        Raises InvalidRequest for an ``OfferChanged`` that makes no acceptable row; the old row stays.
        """
        if self.membership.left:
            return []
        effects = self._begin(now) if self._clock_started is None else []
        self.membership.mark = self.replica.mark
        match event:
            case Received(sender=sender, message=message):
                effects += self._received(sender, message, now)
            case OfferChanged():
                effects += self._offer(event, now)
            case _:
                effects += self.membership.handle(event, now)
                if isinstance(event, Tick):
                    effects += self._housekeeping(now)
                elif isinstance(event, LeaveRequested):
                    effects.append(Persist(key=SNAPSHOT_KEY, data=self.replica.snapshot()))
        if self.membership.own_incarnation_seen > self.membership.incarnation:
            effects += self._outlive(now)
        return effects

    @property
    def view(self) -> MeshView:
        """The mesh as this node sees it now. The same object until something changed."""
        if self._view is None or self.view_changed:
            self._view_basis = (self.membership.revision, self._row_revision)
            self._revision += 1
            self._view = self._build_view()
        return self._view

    @property
    def view_changed(self) -> bool:
        """Whether ``view`` would be made anew: something in it changed since it was last asked for."""
        return (self.membership.revision, self._row_revision) != self._view_basis

    def check(self) -> None:
        """The rules that hold between any two events, those of the machines inside included."""
        self.membership.check()
        self.replica.check()
        assert set(self._rows) <= set(self.replica.rows), "a row is shown that the replica does not hold"
        for node, row in self._rows.items():
            assert row.id == node and row.mesh == self._identity.mesh, f"foreign row under {node}"

    def _received(self, sender: NodeId, message: ControlMessage, now: float) -> Iterator[Effect]:
        if isinstance(message, DirectoryPull):
            yield from self._answer(sender, message)
        elif isinstance(message, DirectoryPush):
            yield from self._take(sender, message, now)
        else:
            yield from self.membership.handle(Received(sender=sender, message=message), now)
            yield from self._compare(sender, message, now)

    # --- the view --------------------------------------------------------------------------

    def _build_view(self) -> MeshView:
        members = [self._member(peer) for peer in self.membership.peers.values()]
        identity = self._identity
        members.append(
            Member(
                id=identity.id,
                name=identity.name,
                address=self.membership.addresses[0] if self.membership.addresses else NOWHERE,
                state=NodeState.LEFT if self.membership.left else NodeState.ALIVE,
                incarnation=self.membership.incarnation,
                load=self.membership.load,
                row=self._rows.get(identity.id),
            )
        )
        members.sort(key=lambda member: member.id)
        return MeshView(local=identity.id, members=tuple(members), revision=self._revision)

    def _member(self, peer: Peer) -> Member:
        """The peer's record in the view, made anew only where something in it changed."""
        row = self._rows.get(peer.id)
        basis = (peer.state, peer.load, peer.incarnation, peer.address, peer.name, peer.rtt_shown_s, row)
        cached = self._members.get(peer.id)
        if cached is not None and cached[0] == basis:
            return cached[1]
        member = Member(
            id=peer.id,
            name=peer.name,
            address=peer.address or NOWHERE,
            state=peer.state,
            incarnation=peer.incarnation,
            load=peer.load,
            rtt_s=peer.rtt_shown_s,
            row=row,
        )
        self._members[peer.id] = (basis, member)
        return member

    # --- our own row -----------------------------------------------------------------------

    def _publish(self) -> None:
        row = Row(
            id=self._identity.id,
            name=self._identity.name,
            mesh=self._identity.mesh,
            incarnation=self.membership.incarnation,
            sequence=self.replica.next_sequence,
            addresses=self._identity.addresses,
            client_addresses=self._identity.client_addresses,
            http_addresses=self._identity.http_addresses,
            profiles=self._profiles,
            seat=self._seat,
            version=self._identity.version,
        )
        wrong = directory.problem(row)
        if wrong:
            raise InvalidRequest(f"this node's own row is not acceptable: {wrong}", field=wrong.split(":")[0])
        self.replica.publish(self._codec.encode_row(row))
        self._rows[row.id] = row

    def _offer(self, event: OfferChanged, now: float) -> Iterable[Effect]:
        before = (self._identity, self._profiles, self._seat)
        if event.profiles is not None:
            self._profiles = event.profiles
        if event.seat is not None:
            self._seat = event.seat
        if event.addresses is not None:
            self._identity = replace(self._identity, addresses=event.addresses)
        if event.client_addresses is not None:
            self._identity = replace(self._identity, client_addresses=event.client_addresses)
        if event.http_addresses is not None:
            self._identity = replace(self._identity, http_addresses=event.http_addresses)
        try:
            self._publish()
        except InvalidRequest:
            self._identity, self._profiles, self._seat = before
            raise
        self._rows_changed()
        effects: list[Effect] = []
        if event.addresses is not None:
            effects += self.membership.handle(AddressesChanged(addresses=event.addresses), now)
        self.membership.mark = self.replica.mark
        self.membership.beat_soon(now)
        return effects

    def _outlive(self, now: float) -> Iterable[Effect]:
        """A record of this node is newer than this life: our state was lost, or our key was copied."""
        seen = self.membership.own_incarnation_seen
        if self._raises >= self.config.incarnation_raises_max:
            self.membership.own_incarnation_seen = self.membership.incarnation
            return
        self._raises += 1
        self.membership.raise_incarnation(seen + 1)
        self.replica.raise_incarnation(seen + 1)
        self._publish()
        self._rows_changed()
        self.membership.beat_soon(now)
        yield Persist(key=INCARNATION_KEY, data=str(seen + 1).encode())
        yield Note(event="own_id_seen_elsewhere", fields=(("incarnation", seen), ("raised_to", seen + 1)))

    # --- the directory ---------------------------------------------------------------------

    def _begin(self, now: float) -> list[Effect]:
        """The first event: from now on there is a clock."""
        self._clock_started = now
        self._snapshot_due = now + self.config.snapshot_first_s
        self._compact_check_at += now
        for node in sorted(self.replica.rows):
            self._adopt_row(node, now)
        starting, self._starting = self._starting, []
        return starting

    def _adopt_row(self, node: NodeId, now: float) -> None:
        """Show a row that the replica holds, if its author may say what it says."""
        held = self.replica.rows.get(node)
        if node == self._identity.id or held is None:
            return
        row = directory.open_row(held.envelope, self._codec, self._identity.mesh)
        if row is None:
            self._rejected_rows += 1
            self._rows.pop(node, None)
            return
        self._rows[node] = row
        hint = PeerHint(
            id=node, name=row.name, incarnation=row.incarnation, refutations=0, addresses=row.addresses
        )
        self.membership.learn(hint, now, vouched=False)

    def _rows_changed(self) -> None:
        self._row_revision += 1
        self._snapshot_dirty = True

    def _compare(self, sender: NodeId, message: ControlMessage, now: float) -> Iterator[Effect]:
        """Pull from a peer whose mark differs, at a bounded rate."""
        mark = _mark_of(message)
        if mark is None or mark == self.replica.mark or mark.epoch < self.replica.epoch:
            return
        peer = self.membership.peers.get(sender)
        if peer is None or peer.gone:
            return
        direct = self.membership.direct
        last = self._pulled_at.get(sender, float("-inf")) if direct else self._pulled_last
        if now - last < (self.config.pull_interval_s if direct else self.config.pull_interval_large_s):
            return
        yield from self._pull(peer, now, 0)

    def _pull(self, peer: Peer, now: float, after_client: int) -> Iterator[Effect]:
        if peer.address is None:
            return
        self._pulled_at[peer.id] = self._pulled_last = now
        yield Send(to=peer.id, address=peer.address, message=self.replica.pull(after_client))

    def _answer(self, sender: NodeId, pull: DirectoryPull) -> Iterator[Effect]:
        peer = self.membership.peers.get(sender)
        if peer is None or peer.address is None:
            return
        push = self.replica.answer(pull)
        if push is not None:
            yield Send(to=sender, address=peer.address, message=push)

    def _take(self, sender: NodeId, push: DirectoryPush, now: float) -> Iterator[Effect]:
        peer = self.membership.peers.get(sender)
        if peer is None or peer.gone:
            return
        before = self.replica.mark
        changed = self.replica.apply(push, now)
        for node in changed:
            self._adopt_row(node, now)
        if changed:
            self._rows_changed()
        if self.replica.mark != before:
            self.membership.mark = self.replica.mark
        self.membership.own_incarnation_seen = max(
            self.membership.own_incarnation_seen, self.replica.own_incarnation_seen
        )
        if push.next_client:
            yield from self._pull(peer, now, push.next_client)

    def _housekeeping(self, now: float) -> Iterator[Effect]:
        """What is due once in a while; asked at every tick."""
        self.replica.tick(now)
        if now >= self._compact_check_at:
            self._compact_check_at = now + self.config.compact_check_interval_s * self._rng.uniform(0.5, 1.5)
            if self.replica.wants_compaction:
                self.replica.compact()
                yield Note(event="directory_compacted", fields=(("epoch", self.replica.epoch),))
            self._drop_long_gone(now)
        if self._snapshot_dirty and now >= self._snapshot_due:
            self._snapshot_dirty, self._snapshot_due = False, now + self.config.snapshot_interval_s
            yield Persist(key=SNAPSHOT_KEY, data=self.replica.snapshot())

    def _drop_long_gone(self, now: float) -> None:
        assert self._clock_started is not None
        for node in sorted(self._rows):
            peer = self.membership.peers.get(node)
            since = self._clock_started if peer is None else peer.since
            gone = node != self._identity.id and (peer is None or peer.gone)
            if gone and now - since >= self.config.row_keep_s:
                self.replica.drop(node)
                del self._rows[node]
                self._rows_changed()
        self._members = {n: m for n, m in self._members.items() if n in self.membership.peers}
        self._pulled_at = {n: t for n, t in self._pulled_at.items() if n in self.membership.peers}


def _mark_of(message: ControlMessage) -> Mark | None:
    match message:
        case Heartbeat(directory=mark):
            return mark
        case Hello(who=who) | Welcome(who=who):
            return who.directory
        case _:
            return None
