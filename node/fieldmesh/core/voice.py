"""What a node says. Owns: the making of beats and hellos, and which rumors and gossip ride on them.

Must not: decide whom to speak to or when, nor believe anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fieldmesh.core.events import Send
from fieldmesh.core.messages import (
    ADDRESSES_MAX,
    RUMORS_PER_MESSAGE_MAX,
    Gossip,
    Heartbeat,
    Hello,
    Introduction,
    MembershipMessage,
    Rumor,
    Rumored,
)
from fieldmesh.core.model import NodeState
from fieldmesh.core.peers import MembershipEffect, Peer
from fieldmesh.core.roster import Roster
from fieldmesh.core.rumors import Rumors

_RUMORED = {
    NodeState.ALIVE: Rumored.ALIVE,
    NodeState.SUSPECT: Rumored.SUSPECT,
    NodeState.UNREACHABLE: Rumored.SUSPECT,
    NodeState.DEAD: Rumored.DEAD,
    NodeState.LEFT: Rumored.LEFT,
}


class Voice:
    """One node's messages to its peers, made from its roster."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._rumors = Rumors()
        self._gossip_ring: list[Peer] = []

    def beat(self, peer: Peer, now: float, *, wants_answer: bool) -> MembershipEffect:
        """A heartbeat to a peer that has an address."""
        return send_to(peer, self._heartbeat_for(peer, now, wants_answer=wants_answer))

    def _heartbeat_for(self, peer: Peer, now: float, *, wants_answer: bool) -> Heartbeat:
        heard_age_s = None
        if self._roster.direct and peer.waiting_since is not None:
            heard_age_s = max(0.0, now - peer.waiting_since - max(0.0, self._roster.late_now))
        held_s = now - peer.echo_at if peer.echo_sent_s else 0.0
        return Heartbeat(
            to=peer.id,
            incarnation=self._roster.incarnation,
            refutations=self._roster.refutations,
            sequence=self._roster.next_sequence(),
            sent_s=now,
            load=self._roster.load,
            directory=self._roster.mark,
            wants_answer=wants_answer,
            heard_age_s=heard_age_s,
            echo_sent_s=peer.echo_sent_s,
            echo_held_s=held_s,
            rumors=self._rumors_for(peer),
            gossip=() if self._roster.direct else self._gossip(),
        )

    def hello(self, peer: Peer, *, one: bool = False) -> Iterator[MembershipEffect]:
        """Hellos to all addresses of a peer, or to the ``one`` that it is tried at now."""
        accused = peer.sequence and peer.state is not NodeState.ALIVE
        rumors = (self.rumor_about(peer, _RUMORED[peer.state]),) if accused else ()
        addresses = (peer.address,) if one and peer.address else peer.addresses
        for address in addresses[: self._roster.config.addresses_welcomed_max]:
            yield Send(
                to=peer.id,
                address=address,
                message=Hello(who=self.introduction(), dialed=address, rumors=rumors, wants_peers=peer.gone),
            )

    def introduction(self) -> Introduction:
        """What this node says of itself; each takes a sequence number."""
        return Introduction(
            mesh=self._roster.mesh,
            name=self._roster.name,
            incarnation=self._roster.incarnation,
            refutations=self._roster.refutations,
            sequence=self._roster.next_sequence(),
            nonce=self._roster.nonce,
            addresses=self._roster.addresses,
            directory=self._roster.mark,
        )

    # --- rumors and gossip -------------------------------------------------------------------

    def rumor_about(self, peer: Peer, says: Rumored) -> Rumor:
        """A rumor of our own about a peer as we know it."""
        return Rumor(
            about=peer.id,
            says=says,
            incarnation=peer.incarnation,
            refutations=peer.refutations,
            accuser=self._roster.local,
            name=peer.name,
            addresses=peer.addresses[:ADDRESSES_MAX],
        )

    def spread(self, rumor: Rumor) -> None:
        """Pass a rumor on with the next messages (SWIM 4.1)."""
        self._rumors.spread(
            rumor, self._roster.config.rumor_factor * math.ceil(math.log2(len(self._roster.living) + 2))
        )

    def _rumors_for(self, peer: Peer) -> tuple[Rumor, ...]:
        """What this peer should hear: first what is said of itself, then what was passed on least."""
        chosen: list[Rumor] = []
        if peer.accused is not None:
            chosen.append(peer.accused)
            peer.accused = None
        elif peer.state is NodeState.SUSPECT or peer.state is NodeState.DEAD:
            chosen.append(self.rumor_about(peer, _RUMORED[peer.state]))
        return (*chosen, *self._rumors.take(RUMORS_PER_MESSAGE_MAX - len(chosen)))

    def _gossip(self) -> tuple[Gossip, ...]:
        """Third-hand news: the next few of a shuffled ring of those who were heard of."""
        if len(self._gossip_ring) < self._roster.config.gossip_per_heartbeat:
            self._gossip_ring = [p for p in self._roster.living.values() if p.sequence]
            self._roster.rng.shuffle(self._gossip_ring)
        chosen = [
            self._gossip_ring.pop()
            for _ in range(min(self._roster.config.gossip_per_heartbeat, len(self._gossip_ring)))
        ]
        return tuple(
            Gossip(
                about=p.id,
                incarnation=p.incarnation,
                refutations=p.refutations,
                sequence=p.sequence,
                load=p.load,
            )
            for p in chosen
            if p.state is NodeState.ALIVE
        )


def send_to(peer: Peer, message: MembershipMessage) -> MembershipEffect:
    """Send to the address that the peer is tried at now."""
    assert peer.address is not None
    return Send(to=peer.id, address=peer.address, message=message)
