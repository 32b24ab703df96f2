"""What others say of others. Owns: which rumors and gossip are believed; refuting those about us.

Must not: pass on (``voice`` does), or judge silence (``suspicion`` does). The rules are those of SWIM 4.
"""

from __future__ import annotations

from collections.abc import Iterator

from fieldmesh.core.events import Note
from fieldmesh.core.messages import Gossip, PeerHint, Rumor, Rumored
from fieldmesh.core.model import NodeId, NodeState
from fieldmesh.core.peers import MembershipEffect, Peer
from fieldmesh.core.roster import Roster
from fieldmesh.core.suspicion import Suspicion
from fieldmesh.core.voice import Voice

ACCUSERS_MAX = 16
"""Independent accusers of one peer that are told apart."""


class Hearsay:
    """One node's ear for what is said of third parties, and of itself."""

    def __init__(self, roster: Roster, voice: Voice, suspicion: Suspicion) -> None:
        self._roster = roster
        self._voice = voice
        self._suspicion = suspicion

    def hear_rumor(self, rumor: Rumor, sender: NodeId, now: float) -> Iterator[MembershipEffect]:
        """Take a rumor that ``sender`` passed on."""
        if rumor.about == self._roster.local:
            yield from self._of_ourselves(rumor, now)
            return
        peer = self._roster.peers.get(rumor.about)
        if peer is None:
            if rumor.says is Rumored.ALIVE and rumor.about != sender:
                hint = PeerHint(
                    id=rumor.about,
                    name=rumor.name,
                    incarnation=rumor.incarnation,
                    refutations=rumor.refutations,
                    addresses=rumor.addresses,
                )
                self._roster.learn(hint, now, vouched=True)
                self._voice.spread(rumor)
            return
        if (rumor.incarnation, rumor.refutations) < peer.standing:
            return
        if rumor.says is Rumored.ALIVE:
            yield from self._alive(peer, rumor, now)
        elif rumor.says is Rumored.LEFT:
            if rumor.incarnation == peer.incarnation:
                yield from self._suspicion.leave(peer, now)
        elif now - peer.heard_at < self._roster.config.probe_after_s and self._roster.direct:
            peer.accused = rumor  # we hear it: let it defend itself
        else:
            yield from self._accused(peer, rumor, now)

    def _of_ourselves(self, rumor: Rumor, now: float) -> Iterator[MembershipEffect]:
        """SWIM 4.2: refute with a higher standing whatever is said against us."""
        if rumor.incarnation > self._roster.incarnation:
            self._roster.own_incarnation_seen = max(self._roster.own_incarnation_seen, rumor.incarnation)
            return
        if rumor.says is Rumored.ALIVE or (rumor.incarnation, rumor.refutations) < self._roster.standing:
            return
        self._roster.refutations += 1
        self._roster.counts["refuted"] += 1
        self._voice.spread(
            Rumor(
                about=self._roster.local,
                says=Rumored.ALIVE,
                incarnation=self._roster.incarnation,
                refutations=self._roster.refutations,
                accuser=self._roster.local,
                name=self._roster.name,
                addresses=self._roster.addresses,
            )
        )
        self._roster.beat_soon(now)
        yield Note(event="refuted", fields=(("said", rumor.says.value), ("accuser", rumor.accuser)))

    def _alive(self, peer: Peer, rumor: Rumor, now: float) -> Iterator[MembershipEffect]:
        if (rumor.incarnation, rumor.refutations) == peer.standing:
            return
        if rumor.incarnation > peer.incarnation:
            self._roster.advance(peer, rumor.incarnation, 0, now)
            peer.addresses = rumor.addresses or peer.addresses
        peer.refutations = rumor.refutations
        self._voice.spread(rumor)
        if peer.state is NodeState.SUSPECT:
            self._roster.counts["refutations_heard"] += 1
            yield from self._suspicion.vouch(peer, now)
        if not self._roster.direct and peer.state is not NodeState.LEFT:
            # That it lives is no news of the way there: it stays unreachable while it leaves us unanswered.
            if peer.waiting_since is None or now - peer.waiting_since < self._roster.config.suspect_after_s:
                yield from self._suspicion.become(peer, NodeState.ALIVE, now)
        elif peer.state is NodeState.DEAD:
            peer.retry_at = now
            self._roster.hurry(now)

    def _accused(self, peer: Peer, rumor: Rumor, now: float) -> Iterator[MembershipEffect]:
        """Somebody else misses a peer that we do not hear either."""
        peer.refutations = max(peer.refutations, rumor.refutations)
        if peer.gone:
            return
        if peer.state is NodeState.SUSPECT:
            if rumor.says is Rumored.DEAD:
                yield from self._suspicion.become(peer, NodeState.DEAD, now)
                self._voice.spread(rumor)
            elif rumor.accuser not in peer.confirmers and len(peer.confirmers) < ACCUSERS_MAX:
                peer.confirmers[rumor.accuser] = None
                self._roster.counts["confirmed"] += 1
                self._voice.spread(rumor)
                self._roster.hurry(now)
        elif not self._roster.direct and now - peer.heard_at >= self._roster.config.probe_after_s:
            yield from self._suspicion.suspect(peer, rumor.accuser, now)

    def hear_gossip(self, gossip: Gossip, now: float) -> None:
        """Take third-hand news of a peer's life and load, where it is newer than ours."""
        peer = self._roster.peers.get(gossip.about)
        if peer is None or gossip.about == self._roster.local or gossip.incarnation < peer.incarnation:
            return
        if gossip.incarnation == peer.incarnation and gossip.sequence <= peer.sequence:
            return
        never_heard = peer.state is NodeState.DEAD and not peer.sequence
        self._roster.advance(peer, gossip.incarnation, gossip.sequence, now)
        if peer.load != gossip.load:
            peer.load = gossip.load
            self._roster.revision += 1
        if never_heard and not self._roster.direct:
            self._roster.set_state(peer, NodeState.ALIVE, now)
