"""Who comes in. Owns: knocking, hellos and welcomes, refusals, and the exchange of peers.

Must not: judge silence (``suspicion``) or know where members may live (``joining``).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

from fieldmesh.core.errors import MeshMismatch, ProtocolMismatch
from fieldmesh.core.events import Send
from fieldmesh.core.hearsay import Hearsay
from fieldmesh.core.joining import backoff_s
from fieldmesh.core.messages import (
    ADDRESSES_MAX,
    PEERS_PER_WELCOME_MAX,
    Hello,
    Introduction,
    PeerHint,
    Refused,
    Rumored,
    Welcome,
)
from fieldmesh.core.model import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Address, NodeId, NodeState
from fieldmesh.core.peers import MembershipEffect, Peer
from fieldmesh.core.roster import Roster
from fieldmesh.core.suspicion import Suspicion
from fieldmesh.core.voice import Voice, send_to

PEERS_FULL = "PEERS_FULL"


class Handshake:
    """How one node and others come to know each other."""

    def __init__(self, roster: Roster, voice: Voice, suspicion: Suspicion, hearsay: Hearsay) -> None:
        self._roster = roster
        self._voice = voice
        self._suspicion = suspicion
        self._hearsay = hearsay

    def knock(self, now: float) -> Iterator[MembershipEffect]:
        """Say Hello where somebody may live, and where somebody lived; both at a bounded rate."""
        for address in self._roster.joining.due(now):
            if address in self._roster.addresses:
                self._roster.joining.forget(address)
                continue
            hello = Hello(who=self._voice.introduction(), dialed=address, wants_peers=True)
            yield Send(to=None, address=address, message=hello)
        # In a large mesh gossip tells of the living; knocking is for those that nobody tells of.
        budget = self._roster.joining.config.tries_per_beat_max if self._roster.direct else 1
        for peer in self._roster.peers.values():
            if budget and peer.state is NodeState.DEAD and peer.retry_at <= now and peer.addresses:
                budget -= 1
                peer.retries += 1
                peer.retry_at = now + backoff_s(self._roster.joining.config, self._roster.rng, peer.retries)
                peer.address_index += 1
                yield from self._voice.hello(peer, one=True)

    def greeted(self, sender: NodeId, hello: Hello, now: float) -> Iterator[MembershipEffect]:
        """Answer a hello: a welcome, or a refusal with its reason."""
        who = hello.who
        refusal = self._refusal(sender, who)
        if refusal is not None:
            self._roster.counts["refused"] += 1
            code, sentence = refusal
            if who.addresses:
                yield Send(
                    to=sender,
                    address=who.addresses[0],
                    message=Refused(code=code, message=sentence, dialed=hello.dialed),
                )
            yield from self._roster.note_seldom(
                now, f"refusal {sender}", "peer_refused", code=code, message=sentence
            )
            return
        peer, new = yield from self._admit(sender, who, now, hears_us=False)
        if peer is None:
            return
        for rumor in hello.rumors:
            # Of this very life: one of a higher incarnation says that ours is stale, not that we are unheard.
            if (
                rumor.about == self._roster.local
                and rumor.incarnation == self._roster.incarnation
                and rumor.refutations >= self._roster.refutations
            ):
                peer.deaf = True  # until its beats say otherwise, or answer what it is told from now on
                peer.waiting_since = now if self._roster.direct else peer.waiting_since or now
                yield from self._suspicion.become(peer, NodeState.UNREACHABLE, now)
            yield from self._hearsay.hear_rumor(rumor, sender, now)
        addresses = peer.addresses if new else (peer.addresses[:1] if peer.addresses else ())
        for address in addresses[: self._roster.config.addresses_welcomed_max]:
            yield Send(to=sender, address=address, message=self._welcome(peer, hello))
        if not new and peer.address not in addresses:
            yield send_to(peer, self._welcome(peer, hello))

    def welcomed(self, sender: NodeId, welcome: Welcome, now: float) -> Iterator[MembershipEffect]:
        """Take a welcome, the address that it proves to work, and the peers that it names."""
        if self._refusal(sender, welcome.who) is not None:
            self._roster.counts["refused"] += 1
            return
        peer, _ = yield from self._admit(sender, welcome.who, now, hears_us=True)
        if peer is None:
            if sender == self._roster.local:
                self._roster.joining.forget(welcome.dialed)
            return
        self._roster.joining.answered(welcome.dialed, now)
        if welcome.dialed not in peer.addresses:  # a name or a translated address: it works for us
            peer.addresses = (welcome.dialed, *peer.addresses[: ADDRESSES_MAX - 1])
        peer.address_index = peer.addresses.index(welcome.dialed)
        self._take_addresses(peer)
        for hint in welcome.peers:
            self._roster.learn(hint, now, vouched=True)

    def _admit(
        self, sender: NodeId, who: Introduction, now: float, *, hears_us: bool
    ) -> Generator[MembershipEffect, None, tuple[Peer | None, bool]]:
        """Take in what a node says of itself; returns its record (or None) and whether it is new.

        A welcome answers what we said, so its sender hears us. One that we had lost and that knocks may be
        knocking because it does not: it is not taken for alive until it says that it hears us again.
        """
        if sender == self._roster.local:
            if who.nonce != self._roster.nonce:  # our key lives a second life elsewhere
                self._roster.own_incarnation_seen = max(self._roster.own_incarnation_seen, who.incarnation)
                yield from self._roster.note_seldom(
                    now, "own id", "own_id_seen_elsewhere", addresses=", ".join(map(str, who.addresses))
                )
            return None, False
        peer = self._roster.peers.get(sender)
        new = peer is None
        if peer is None:
            peer = Peer(
                id=sender,
                name=who.name,
                incarnation=who.incarnation,
                refutations=who.refutations,
                addresses=(),
                state=NodeState.DEAD,
                since=now,
            )
            self._roster.add(peer)
            self._roster.counts["joined"] += 1
        elif who.incarnation < peer.incarnation:
            yield from self.tell_stale(peer, who.addresses, peer.incarnation, now)
            return None, False
        elif who.incarnation == peer.incarnation and peer.nonce not in (0, who.nonce):
            # Two lives under one incarnation: a state folder restored from a backup, or copied.
            yield from self.tell_stale(peer, who.addresses, peer.incarnation + 1, now)
            return None, False
        lost = not new and peer.state is not NodeState.ALIVE and who.incarnation == peer.incarnation
        fresh = self._roster.advance(peer, who.incarnation, who.sequence, now)
        if fresh:
            self._take_introduction(peer, who)
            peer.deaf = not hears_us and (lost or peer.deaf)
        yield from self._name_clash(peer, now)
        if fresh and peer.state is not NodeState.LEFT:
            yield from self._suspicion.heard(peer, now, answers=hears_us)
        if new:
            self._voice.spread(self._voice.rumor_about(peer, Rumored.ALIVE))
        return peer, new

    def _refusal(self, sender: NodeId, who: Introduction) -> tuple[str, str] | None:
        roster = self._roster
        if who.mesh != roster.mesh:
            return MeshMismatch.code, (
                f"this node belongs to mesh {roster.mesh!r}, not {who.mesh!r}: use the same mesh name on both"
            )
        if who.protocol_min > PROTOCOL_VERSION_MAX or who.protocol_max < PROTOCOL_VERSION_MIN:
            return ProtocolMismatch.code, (
                f"this node speaks protocol {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}, the peer "
                f"{who.protocol_min} to {who.protocol_max}: bring both to one version"
            )
        if sender != roster.local and sender not in roster.peers and not roster.make_room():
            return PEERS_FULL, f"this node knows {roster.config.peers_max} peers already (peers_max)"
        return None

    def _take_introduction(self, peer: Peer, who: Introduction) -> None:
        peer.name, peer.nonce = who.name, who.nonce
        peer.refutations = max(peer.refutations, who.refutations)
        current = peer.address
        if peer.addresses != who.addresses:
            peer.addresses = who.addresses[:ADDRESSES_MAX]
            peer.address_index = peer.addresses.index(current) if current in peer.addresses else 0
            self._roster.revision += 1
        self._take_addresses(peer)

    def _take_addresses(self, owner: Peer) -> None:
        """An address belongs to whoever last proved to live there: stale records lose it."""
        claimed = set(owner.addresses)
        for peer in self._roster.peers.values():
            if peer is owner or peer.state is NodeState.ALIVE or not claimed.intersection(peer.addresses):
                continue
            self._roster.counts["address_taken_over"] += 1
            peer.addresses = tuple(a for a in peer.addresses if a not in claimed)
            peer.address_index = 0

    def _name_clash(self, peer: Peer, now: float) -> Iterator[MembershipEffect]:
        others = [p.id for p in self._roster.living.values() if p is not peer and p.name == peer.name]
        if peer.name == self._roster.name:
            others.append(self._roster.local)
        for other in others:
            key = f"name {min(peer.id, other)} {max(peer.id, other)}"
            yield from self._roster.note_seldom(
                now, key, "duplicate_name", name=peer.name, one=min(peer.id, other), other=max(peer.id, other)
            )

    def tell_stale(
        self, peer: Peer, addresses: tuple[Address, ...], incarnation: int, now: float
    ) -> Iterator[MembershipEffect]:
        """A node lives under an incarnation that was used before: tell it which one it must rise above."""
        self._roster.counts["stale_incarnation"] += 1
        if now < peer.tell_stale_at:
            return
        peer.tell_stale_at = now + self._roster.config.probe_interval_s
        rumor = replace(self._voice.rumor_about(peer, Rumored.DEAD), incarnation=incarnation)
        for address in addresses[: self._roster.config.addresses_welcomed_max]:
            hello = Hello(who=self._voice.introduction(), dialed=address, rumors=(rumor,))
            yield Send(to=peer.id, address=address, message=hello)

    def _welcome(self, asker: Peer, hello: Hello) -> Welcome:
        others: list[Peer] = []
        if hello.wants_peers:
            others = [p for p in self._roster.living.values() if p is not asker and _worth_telling(p)]
        if len(others) > PEERS_PER_WELCOME_MAX:
            others = self._roster.rng.sample(others, PEERS_PER_WELCOME_MAX)
        hints = tuple(
            PeerHint(
                id=p.id,
                name=p.name,
                incarnation=p.incarnation,
                refutations=p.refutations,
                addresses=p.addresses,
            )
            for p in others
        )
        return Welcome(who=self._voice.introduction(), dialed=hello.dialed, peers=hints)


def _worth_telling(peer: Peer) -> bool:
    """Only those that this node hears itself: second-hand peers would circulate for ever."""
    return peer.state is NodeState.ALIVE and bool(peer.addresses)
