"""What silence means. Owns: probes (our own, and those for others), suspicion, changes of belief.

Must not: believe third parties' rumors (``hearsay`` does), or let anybody in (``handshake`` does).
The rules are those of SWIM 3 and Lifeguard 3.2; ``membership`` tells how they meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fieldmesh.core.events import Note
from fieldmesh.core.messages import ProbeReply, ProbeRequest, Rumored
from fieldmesh.core.model import Address, NodeId, NodeState
from fieldmesh.core.peers import MembershipEffect, Peer
from fieldmesh.core.roster import Roster
from fieldmesh.core.voice import Voice, send_to


class Suspicion:
    """One node's judgement of its peers' silence."""

    def __init__(self, roster: Roster, voice: Voice) -> None:
        self._roster = roster
        self._voice = voice
        self._helping: dict[NodeId, list[tuple[NodeId, int, float]]] = {}
        """By target: who asked for a probe, the nonce, until when an answer is of use."""

    def heard(self, peer: Peer, now: float, *, answers: bool = True) -> Iterator[MembershipEffect]:
        """The peer itself spoke just now; not ``answers``: a beat of ours still waits for its answer."""
        peer.heard_at = now
        peer.doubted = False
        peer.probes = 0
        if self._roster.direct:
            peer.waiting_since = now
        elif answers or peer.waiting_since is None:
            peer.waiting_since = now if peer.deaf else None
        yield from self.become(peer, NodeState.UNREACHABLE if peer.deaf else NodeState.ALIVE, now)
        for asker, nonce, until in self._helping.pop(peer.id, ()):
            other = self._roster.peers.get(asker)
            if other is not None and other.address is not None and now <= until:
                yield send_to(
                    other,
                    ProbeReply(
                        target=peer.id,
                        nonce=nonce,
                        incarnation=peer.incarnation,
                        refutations=peer.refutations,
                    ),
                )

    def judge(self, peer: Peer, now: float, stalled: bool) -> Iterator[MembershipEffect]:
        """Decide what a peer's silence means."""
        config = self._roster.config
        silent = 0.0 if peer.waiting_since is None else now - peer.waiting_since
        if (silent >= config.probe_after_s or peer.deaf) and now >= peer.probe_at:
            yield from self._probe(peer, now)
        if peer.state is NodeState.SUSPECT and now - peer.since >= self._suspicion_s(peer) and not stalled:
            yield from self.become(peer, NodeState.DEAD, now)
            self._voice.spread(self._voice.rumor_about(peer, Rumored.DEAD))
            return
        if silent < config.suspect_after_s or peer.state is NodeState.SUSPECT:
            return
        if now - peer.vouched_at < config.vouch_s:
            yield from self.become(peer, NodeState.UNREACHABLE, now)
        elif stalled and not peer.doubted:
            peer.doubted = True  # first hear what arrived while our own loop was late
        else:
            yield from self.suspect(peer, self._roster.local, now)

    def next_due(self) -> float:
        """When the next peer must be judged; infinity where nothing is expected of any."""
        due = math.inf
        config = self._roster.config
        for peer in self._roster.living.values():
            if peer.waiting_since is not None:
                suspect_at = peer.waiting_since + config.suspect_after_s
                due = min(due, max(peer.waiting_since + config.probe_after_s, peer.probe_at))
                if peer.state is NodeState.ALIVE:
                    due = min(due, suspect_at)
                elif peer.state is NodeState.UNREACHABLE and not peer.deaf:
                    due = min(due, max(suspect_at, peer.vouched_at + config.vouch_s))
            if peer.state is NodeState.SUSPECT:
                due = min(due, peer.since + self._suspicion_s(peer))
        return due

    def suspect(self, peer: Peer, accuser: NodeId, now: float) -> Iterator[MembershipEffect]:
        """Doubt that a peer lives, say so to others, and give it the chance to refute."""
        peer.confirmers = {accuser: None}
        yield from self.become(peer, NodeState.SUSPECT, now)
        if accuser == self._roster.local and self._deaf_ourselves(now):
            return
        self._voice.spread(replace(self._voice.rumor_about(peer, Rumored.SUSPECT), accuser=accuser))
        if peer.address is not None:
            yield self._voice.beat(peer, now, wants_answer=True)

    def _deaf_ourselves(self, now: float) -> bool:
        """Most of the mesh is silent at once: then it is more likely us, and we accuse nobody aloud."""
        living = list(self._roster.living.values())
        silent = sum(
            peer.waiting_since is not None and now - peer.waiting_since >= self._roster.config.probe_after_s
            for peer in living
        )
        return len(living) >= 3 and 2 * silent > len(living)

    def _suspicion_s(self, peer: Peer) -> float:
        """How long a suspicion may be refuted: Lifeguard 3.2, by the number of independent accusers."""
        config = self._roster.config
        wanted = min(config.confirmations_wanted, max(0, len(self._roster.living) - 2))
        if wanted == 0:
            return config.suspicion_s_min
        share = math.log(len(peer.confirmers)) / math.log(wanted + 1)
        span = config.suspicion_s_max - config.suspicion_s_min
        return max(config.suspicion_s_min, config.suspicion_s_max - span * share)

    def become(self, peer: Peer, state: NodeState, now: float) -> Iterator[MembershipEffect]:
        """Change the belief about a peer, and say so in the log."""
        before = peer.state
        if before is state:
            return
        self._roster.set_state(peer, state, now)
        self._roster.counts[f"{state.value}"] += 1
        yield Note(
            event=f"peer_{state.value}",
            fields=(("peer", peer.id), ("name", peer.name), ("before", before.value)),
        )
        if (
            state is not NodeState.ALIVE
            and not peer.gone
            and self._roster.direct
            and peer.address is not None
        ):
            # It may still hear us: let it know at once that we do not hear it.
            yield self._voice.beat(peer, now, wants_answer=True)

    def leave(self, peer: Peer, now: float) -> Iterator[MembershipEffect]:
        """It said goodbye, to us or to another."""
        if peer.state is NodeState.LEFT:
            return
        yield from self.become(peer, NodeState.LEFT, now)
        self._voice.spread(self._voice.rumor_about(peer, Rumored.LEFT))

    # --- probes ------------------------------------------------------------------------------

    def _probe(self, peer: Peer, now: float) -> Iterator[MembershipEffect]:
        """One round: ask the peer itself, and others to ask it."""
        peer.probe_at = now + self._roster.config.probe_interval_s
        peer.probes += 1
        self._roster.counts["probes"] += 1
        if peer.address is None:
            return
        if not peer.sequence:  # known from others only: it may not know us
            yield from self._voice.hello(peer)
            return
        yield self._voice.beat(peer, now, wants_answer=True)
        if peer.probes > 1:
            self._roster.try_other_address(peer, now)
            yield from self._voice.hello(peer, one=True)
        yield from self._ask_others(peer)

    def _ask_others(self, peer: Peer) -> Iterator[MembershipEffect]:
        assert peer.address is not None
        others = [
            p
            for p in self._roster.living.values()
            if p is not peer and p.state is NodeState.ALIVE and p.address
        ]
        for other in self._roster.rng.sample(others, min(self._roster.config.indirect_probes, len(others))):
            self._roster.counts["indirect_probes"] += 1
            nonce = self._roster.rng.getrandbits(32)
            yield send_to(other, ProbeRequest(target=peer.id, address=peer.address, nonce=nonce))

    def asked_to_probe(self, sender: NodeId, request: ProbeRequest, now: float) -> Iterator[MembershipEffect]:
        """Probe for another node; the reply goes out when the target is heard."""
        target = self._roster.peers.get(request.target)
        if target is None or target.gone or target.address is None or sender not in self._roster.peers:
            self._roster.counts["cannot_help"] += 1
            return
        for waiting in [t for t, asked in self._helping.items() if asked[-1][2] < now]:
            del self._helping[waiting]
        asked = self._helping.setdefault(target.id, [])
        if (
            len(self._helping) > self._roster.config.helping_max
            or len(asked) >= self._roster.config.helping_max
        ):
            self._roster.counts["cannot_help"] += 1
            if not asked:
                del self._helping[target.id]
            return
        asked.append((sender, request.nonce, now + self._roster.config.suspect_after_s))
        yield self._voice.beat(target, now, wants_answer=True)

    def vouched(self, reply: ProbeReply, now: float) -> Iterator[MembershipEffect]:
        """The reply to a probe that we asked for."""
        peer = self._roster.peers.get(reply.target)
        if peer is None or (reply.incarnation, reply.refutations) < peer.standing or peer.gone:
            return
        self._roster.counts["vouched"] += 1
        yield from self.vouch(peer, now)

    def vouch(self, peer: Peer, now: float) -> Iterator[MembershipEffect]:
        """Another node hears it."""
        peer.vouched_at = now
        if peer.state is NodeState.SUSPECT:
            yield from self.become(peer, NodeState.UNREACHABLE, now)

    def link_failed(self, address: Address, now: float) -> Iterator[MembershipEffect]:
        """Refused or broken connections hurry a death up, but do not prove it."""
        for peer in list(self._roster.living.values()):
            if peer.address != address:
                continue
            self._roster.try_other_address(peer, now)
            earlier = now - self._roster.config.suspect_after_s + self._roster.config.link_failed_grace_s
            if peer.waiting_since is None or earlier < peer.waiting_since:
                peer.waiting_since = earlier
                yield from self._probe(peer, now)
            self._roster.hurry(now)
