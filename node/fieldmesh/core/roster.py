"""Who is known. Owns: what a node holds of itself and of its peers, their standing, and when it acts next.

Must not: send anything, or judge; ``membership`` and its parts do, all on one roster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

from fieldmesh.core.events import Note
from fieldmesh.core.joining import JoinConfig, Joining
from fieldmesh.core.messages import ADDRESSES_MAX, Mark, PeerHint
from fieldmesh.core.model import Address, Load, NodeId, NodeState
from fieldmesh.core.peers import MembershipConfig, Peer

NOTE_INTERVAL_S = 10.0
"""A remote's nonsense is told to the operator at most once in this time, however often it comes."""


class Roster:
    """One node, and every other node that it knows. Mutable; changed by membership and its parts alone."""

    def __init__(
        self,
        *,
        local: NodeId,
        name: str,
        mesh: str,
        addresses: tuple[Address, ...],
        incarnation: int,
        rng: Random,
        config: MembershipConfig | None = None,
        join: JoinConfig | None = None,
    ) -> None:
        self.config = config or MembershipConfig()
        self.local, self.name, self.mesh = local, name, mesh
        self.addresses = addresses[:ADDRESSES_MAX]
        self.incarnation = incarnation
        self.refutations = 0
        self.load = Load()
        self.mark = Mark()
        """Of the directory; stamped on messages, set by whoever owns the directory."""
        self.revision = 0
        """Rises whenever something that others may see of a peer changed."""
        self.counts: Counter[str] = Counter()
        """Remote nonsense that was dropped, and what the protocol did; keys are fixed in the code."""
        self.own_incarnation_seen = incarnation
        self.joining = Joining(rng, join)
        self.rng = rng
        self.nonce = rng.getrandbits(63)
        """Tells this life from another under the same incarnation."""
        self.peers: dict[NodeId, Peer] = {}
        """Every known node but this one."""
        self.living: dict[NodeId, Peer] = {}
        """Those of them that are not gone."""
        self.direct = True
        """Whether everybody beats to everybody."""
        self.beat_at: float | None = None
        self.due: float | None = 0.0
        self.late_now = 0.0
        """By how many seconds the event under way came after it was due."""
        self._sequence = 0
        self._noted: dict[str, float] = {}

    def raise_incarnation(self, incarnation: int) -> None:
        """Outlive a record of this node that is newer than this life."""
        if incarnation <= self.incarnation:
            raise ValueError(f"incarnation must rise above {self.incarnation}, got {incarnation}")
        self.incarnation, self.refutations = incarnation, 0
        self.own_incarnation_seen = max(self.own_incarnation_seen, incarnation)

    @property
    def standing(self) -> tuple[int, int]:
        """What a rumor about this node must match to count against it."""
        return (self.incarnation, self.refutations)

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def check(self) -> None:
        """The rules that hold between any two events."""
        assert self.local not in self.peers, "a node is not its own peer"
        assert len(self.peers) <= self.config.peers_max, "more peers than peers_max"
        for peer in self.peers.values():
            assert peer.gone != (peer.id in self.living), f"{peer.id} is misfiled"
            assert peer.state is not NodeState.SUSPECT or peer.confirmers, f"{peer.id} is accused by nobody"
            assert not (peer.gone and peer.waiting_since is not None), f"{peer.id} is gone and waited for"
            assert len(peer.addresses) <= ADDRESSES_MAX + 1, f"{peer.id} has too many addresses"

    # --- peers come and go -------------------------------------------------------------------

    def learn(self, hint: PeerHint, now: float, *, vouched: bool) -> None:
        """A member that another node, or the directory (not vouched), tells of."""
        if hint.id == self.local:
            self.own_incarnation_seen = max(self.own_incarnation_seen, hint.incarnation)
            return
        peer = self.peers.get(hint.id)
        if peer is not None:
            newer = hint.incarnation > peer.incarnation
            if newer or not peer.addresses:
                peer.addresses = hint.addresses or peer.addresses
            if peer.gone and (newer or vouched) and (peer.state is NodeState.DEAD or newer):
                peer.retry_at = now
                if newer and peer.state is NodeState.LEFT:
                    self.set_state(peer, NodeState.DEAD, now)
                self.hurry(now)
            return
        if not self.make_room():
            self.counts["peers_full"] += 1
            return
        trusted = vouched and not self.direct
        peer = Peer(
            id=hint.id,
            name=hint.name,
            incarnation=hint.incarnation,
            refutations=hint.refutations,
            addresses=hint.addresses[:ADDRESSES_MAX],
            state=NodeState.ALIVE if trusted else NodeState.UNREACHABLE if vouched else NodeState.DEAD,
            since=now,
        )
        if vouched and not trusted:
            peer.vouched_at = now
            peer.waiting_since = now - self.config.suspect_after_s
        self.add(peer)
        self.revision += 1
        self.choose_mode(now)
        self.hurry(now)

    def add(self, peer: Peer) -> None:
        self.peers[peer.id] = peer
        if not peer.gone:
            self.living[peer.id] = peer

    def remove(self, peer: Peer) -> None:
        del self.peers[peer.id]
        self.living.pop(peer.id, None)
        self.revision += 1

    def make_room(self) -> bool:
        """Whether one more peer fits, after forgetting the one that has been gone longest."""
        if len(self.peers) < self.config.peers_max:
            return True
        gone = min((p for p in self.peers.values() if p.gone), key=lambda p: p.since, default=None)
        if gone is None:
            return False
        self.remove(gone)
        return True

    def forget_long_gone(self, now: float) -> None:
        if len(self.living) < len(self.peers):
            for peer in [p for p in self.peers.values() if p.gone]:
                if now - peer.since >= self.config.forget_after_s:
                    self.remove(peer)

    def lives_at(self, address: Address) -> bool:
        """Whether a peer that we hear is reached there."""
        return any(p.state is NodeState.ALIVE and p.address == address for p in self.peers.values())

    # --- what is believed of a peer ----------------------------------------------------------

    def advance(self, peer: Peer, incarnation: int, sequence: int, now: float) -> bool:
        """Whether a message is newer than all before; a higher incarnation begins a new life."""
        if incarnation > peer.incarnation:
            self.counts["new_life"] += 1
            peer.incarnation, peer.refutations, peer.sequence, peer.nonce = incarnation, 0, 0, 0
            peer.rtt_s = peer.rtt_shown_s = peer.echo_sent_s = 0.0
            peer.load = Load()
            peer.deaf = False
            if not self.direct:
                peer.waiting_since = None  # what waits for an answer was said to the life before
            if peer.state is NodeState.LEFT:
                self.set_state(peer, NodeState.DEAD, now)
            self.revision += 1
        if sequence <= peer.sequence:
            return False
        peer.sequence = sequence
        return True

    def set_state(self, peer: Peer, state: NodeState, now: float) -> None:
        """File a peer under its new state, and set the clocks that this state runs by."""
        if state is not NodeState.SUSPECT:
            peer.confirmers = {}
        peer.state, peer.since = state, now
        self.revision += 1
        if peer.gone:
            self.living.pop(peer.id, None)
        else:
            self.living[peer.id] = peer
        if peer.gone:
            peer.waiting_since, peer.deaf, peer.doubted = None, False, False
            peer.retries, peer.retry_at = 0, now
            for address in peer.addresses:
                self.joining.lost(address, now)
        elif self.direct and peer.waiting_since is None:
            peer.waiting_since = now
        self.choose_mode(now)
        self.hurry(now)

    def choose_mode(self, now: float) -> None:
        """Direct beats up to ``direct_max`` peers; the clocks of the others' silence change meaning."""
        direct = len(self.living) <= self.config.direct_max
        if direct == self.direct:
            return
        self.direct = direct
        for peer in self.living.values():
            if direct and peer.waiting_since is None:
                peer.waiting_since = now
            elif not direct and peer.state is NodeState.ALIVE:
                peer.waiting_since = None

    def try_other_address(self, peer: Peer, now: float) -> None:
        """Speak to a peer at its next address, where it has several."""
        if len(peer.addresses) > 1:
            self.counts["address_tried"] += 1
            peer.address_index = (peer.address_index + 1) % len(peer.addresses)
            self.revision += 1

    # --- when to act, what to log ------------------------------------------------------------

    def hurry(self, now: float) -> None:
        """Something is due at once."""
        self.due = now if self.due is None else min(self.due, now)

    def beat_soon(self, now: float) -> None:
        """Something is worth telling at once."""
        if self.beat_at is not None:
            self.beat_at = min(self.beat_at, now)
        self.hurry(now)

    def note_seldom(self, now: float, key: str, event: str, **fields: str | int | float) -> Iterator[Note]:
        """Count ``event``; tell the operator unless ``key`` was told of just now."""
        self.counts[event] += 1
        if now - self._noted.get(key, float("-inf")) < NOTE_INTERVAL_S:
            return
        if len(self._noted) >= self.config.helping_max:
            self._noted.clear()
        self._noted[key] = now
        yield Note(event=event, fields=tuple(fields.items()))
