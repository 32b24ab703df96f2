"""Who is alive. Owns: heartbeats, probes, suspicion, standing, peer exchange, the belief about each peer.

Must not: know what nodes offer, or the directory beyond the mark that its messages carry along.

How it works. Up to ``direct_max`` peers, everybody beats to everybody every ``beat_s``. A peer that was
silent for ``probe_after_s`` is probed, directly and through others (SWIM 3.1); silent for
``suspect_after_s`` it is SUSPECT, or UNREACHABLE where others still vouch for it or where it beats but
says that it does not hear us (a one-way link). A suspicion that nobody refutes in time is a death; the
time shrinks with every independent accuser (Lifeguard 3.2). Beyond ``direct_max``, each beat goes to a
few random peers, who must answer, and the rest is gossip (SWIM 4): then a peer's silence is counted
from the first beat that it did not answer.

Lifeguard 3.1: a node whose own loop was late accuses nobody until what arrived meanwhile was heard, and
one that was frozen restarts all its clocks.

    (unknown) --heard--> ALIVE --silent--> SUSPECT --time--> DEAD --heard--> ALIVE
                         ALIVE --vouched for | deaf to us--> UNREACHABLE --vouchers stop--> SUSPECT
                         any   --goodbye--> LEFT --higher incarnation--> ALIVE
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from random import Random
from typing import assert_never

from fieldmesh.core.errors import MeshMismatch, ProtocolMismatch
from fieldmesh.core.events import Note, Received, Send, Tick
from fieldmesh.core.joining import JoinConfig, Joining, backoff_s
from fieldmesh.core.messages import (
    ADDRESSES_MAX,
    PEERS_PER_WELCOME_MAX,
    RUMORS_PER_MESSAGE_MAX,
    ControlMessage,
    Goodbye,
    Gossip,
    Heartbeat,
    Hello,
    Introduction,
    Mark,
    MembershipMessage,
    PeerHint,
    ProbeReply,
    ProbeRequest,
    Refused,
    Rumor,
    Rumored,
    Welcome,
)
from fieldmesh.core.model import (
    PROTOCOL_VERSION_MAX,
    PROTOCOL_VERSION_MIN,
    Address,
    Load,
    NodeId,
    NodeState,
)
from fieldmesh.core.peers import (
    AddressesChanged,
    JoinHint,
    LeaveRequested,
    LinkFailed,
    LoadChanged,
    MembershipConfig,
    MembershipEvent,
    Peer,
)
from fieldmesh.core.rumors import Rumors

PEERS_FULL = "PEERS_FULL"
RTT_CREDIBLE_S_MAX = 60.0
NOTE_INTERVAL_S = 10.0
"""A remote's nonsense is told to the operator at most once in this time, however often it comes."""

__all__ = [
    "AddressesChanged",
    "JoinHint",
    "LeaveRequested",
    "LinkFailed",
    "LoadChanged",
    "Membership",
    "MembershipConfig",
    "Peer",
]

Effect = Send[ControlMessage] | Note


class Membership:
    """One node's belief about its mesh. ``mark`` is stamped on its messages by whoever owns the directory."""

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
        self.revision = 0
        """Rises whenever something that others may see of a peer changed."""
        self.left = False
        self.counts: Counter[str] = Counter()
        """Remote nonsense that was dropped, and what the protocol did; keys are fixed in this module."""
        self.own_incarnation_seen = incarnation
        self.joining = Joining(rng, join)
        self._rng = rng
        self._nonce = rng.getrandbits(63)
        self._sequence = 0
        self._peers: dict[NodeId, Peer] = {}
        self._living: dict[NodeId, Peer] = {}
        """Those of them that are not gone."""
        self._rumors = Rumors()
        self._helping: dict[NodeId, list[tuple[NodeId, int, float]]] = {}
        self._ring: list[NodeId] = []
        self._gossip_ring: list[Peer] = []
        self._noted: dict[str, float] = {}
        self._direct = True
        self._beat_at: float | None = None
        self._due: float | None = 0.0
        self._late_now = 0.0
        self._deaf_believed_from = float("-inf")

    def __repr__(self) -> str:
        states = Counter(peer.state.value for peer in self._peers.values())
        return f"Membership({self.name}, {dict(sorted(states.items()))})"

    # --- the machine -----------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        return self._due

    @property
    def peers(self) -> dict[NodeId, Peer]:
        """Every known node but this one. Read only."""
        return self._peers

    @property
    def direct(self) -> bool:
        """Whether everybody beats to everybody."""
        return self._direct

    def handle(self, event: MembershipEvent, now: float) -> list[Effect]:
        """Take one event; local misuse (a clock that runs backwards) raises, remote nonsense is counted."""
        if self.left:
            return []
        self._notice_lateness(now)
        effects = list(self._dispatch(event, now))
        if self._due is not None and self.joining.next_at is not None:
            self._due = min(self._due, max(self.joining.next_at, now))
        return effects

    def learn(self, hint: PeerHint, now: float, *, vouched: bool) -> None:
        """A member that another node, or the directory (not vouched), tells of."""
        if hint.id == self.local:
            self.own_incarnation_seen = max(self.own_incarnation_seen, hint.incarnation)
            return
        peer = self._peers.get(hint.id)
        if peer is not None:
            newer = hint.incarnation > peer.incarnation
            if newer or not peer.addresses:
                peer.addresses = hint.addresses or peer.addresses
            if peer.gone and (newer or vouched) and (peer.state is NodeState.DEAD or newer):
                peer.retry_at = now
                if newer and peer.state is NodeState.LEFT:
                    self._set_state(peer, NodeState.DEAD, now)
                self._hurry(now)
            return
        if not self._make_room():
            self.counts["peers_full"] += 1
            return
        trusted = vouched and not self._direct
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
        self._add(peer)
        self.revision += 1
        self._choose_mode(now)
        self._hurry(now)

    def raise_incarnation(self, incarnation: int) -> None:
        """Outlive a record of this node that is newer than this life."""
        if incarnation <= self.incarnation:
            raise ValueError(f"incarnation must rise above {self.incarnation}, got {incarnation}")
        self.incarnation, self.refutations = incarnation, 0
        self.own_incarnation_seen = max(self.own_incarnation_seen, incarnation)

    def check(self) -> None:
        """The rules that hold between any two events."""
        assert self.local not in self._peers, "a node is not its own peer"
        assert len(self._peers) <= self.config.peers_max, "more peers than peers_max"
        assert self.left or self._due is not None, "no deadline"
        for peer in self._peers.values():
            assert peer.gone != (peer.id in self._living), f"{peer.id} is misfiled"
            assert peer.state is not NodeState.SUSPECT or peer.confirmers, f"{peer.id} is accused by nobody"
            assert not (peer.gone and peer.waiting_since is not None), f"{peer.id} is gone and waited for"
            assert len(peer.addresses) <= ADDRESSES_MAX + 1, f"{peer.id} has too many addresses"

    # --- events ----------------------------------------------------------------------------

    def _dispatch(self, event: MembershipEvent, now: float) -> Iterator[Effect]:
        match event:
            case Tick():
                yield from self._tick(now)
            case Received(sender=sender, message=message):
                yield from self._received(sender, message, now)
            case JoinHint(address=address, source=source):
                if address not in self.addresses and not self._lives_at(address):
                    self.joining.add(address, source, now)
            case LinkFailed(address=address):
                yield from self._link_failed(address, now)
            case LoadChanged(load=load):
                urgent = load.accepting != self.load.accepting or load.engine is not self.load.engine
                self.revision += load != self.load  # the view shows our own load too
                self.load = load
                if urgent:
                    self.beat_soon(now)
            case AddressesChanged(addresses=addresses):
                self.addresses = addresses[:ADDRESSES_MAX]
                yield from (hello for peer in self._living.values() for hello in self._hello(peer))
            case LeaveRequested():
                self.left, self._due = True, None
                goodbye = Goodbye(incarnation=self.incarnation, sequence=self._next_sequence())
                yield from (
                    self._send(peer, goodbye) for peer in self._living.values() if peer.address is not None
                )
            case _:
                assert_never(event)

    def _received(self, sender: NodeId, message: MembershipMessage, now: float) -> Iterator[Effect]:
        match message:
            case Heartbeat():
                yield from self._heartbeat(sender, message, now)
            case Hello():
                yield from self._greeted(sender, message, now)
            case Welcome():
                yield from self._welcomed(sender, message, now)
            case Refused():
                self.joining.refused(message.dialed, now)
                yield from self._note_seldom(
                    now, f"refused {message.dialed}", "join_refused", address=str(message.dialed),
                    code=message.code, message=message.message,
                )  # fmt: skip
            case ProbeRequest():
                yield from self._asked_to_probe(sender, message, now)
            case ProbeReply():
                yield from self._vouched(message, now)
            case Goodbye():
                peer = self._peers.get(sender)
                if peer is not None and message.incarnation >= peer.incarnation:
                    peer.incarnation, peer.sequence = message.incarnation, message.sequence
                    yield from self._leave(peer, now)
            case _:
                assert_never(message)

    # --- time ------------------------------------------------------------------------------

    def _notice_lateness(self, now: float) -> None:
        """Our own loop was late: what seems silent may only be unheard."""
        if self._due is None or self._beat_at is None:
            self._late_now = 0.0
            return
        self._late_now = now - self._due
        if self._late_now > self.config.late_s:  # that they missed our beats is our own doing
            self._deaf_believed_from = max(self._deaf_believed_from, now + self.config.beat_s)
        if self._late_now <= self.config.frozen_s:
            return
        self.counts["frozen"] += 1
        self._deaf_believed_from = now + self.config.suspect_after_s
        for peer in self._peers.values():
            if peer.waiting_since is not None:
                peer.waiting_since = now
                peer.doubted = False
        self._due = now

    def _tick(self, now: float) -> Iterator[Effect]:
        stalled = self._late_now > self.config.late_s
        if stalled:
            self.counts["late"] += 1
        if self._beat_at is None or now >= self._beat_at:
            self._beat_at = now + self.config.beat_s * self._rng.uniform(0.95, 1.05)
            yield from self._beat(now)
            self._forget_long_gone(now)
        for peer in list(self._living.values()):
            if peer.waiting_since is not None or peer.state is NodeState.SUSPECT:
                yield from self._judge(peer, now, stalled)
        yield from self._knock(now)
        self._late_now = 0.0
        self._due = max(self._next_due(), now + 0.01)

    def _next_due(self) -> float:
        assert self._beat_at is not None
        due = self._beat_at
        config = self.config
        for peer in self._living.values():
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

    def _hurry(self, now: float) -> None:
        self._due = now if self._due is None else min(self._due, now)

    def beat_soon(self, now: float) -> None:
        """Something is worth telling at once."""
        if self._beat_at is not None:
            self._beat_at = min(self._beat_at, now)
        self._hurry(now)

    # --- beats -----------------------------------------------------------------------------

    def _beat(self, now: float) -> Iterator[Effect]:
        for peer in self._beat_targets():
            if peer.address is None:
                continue
            if not self._direct and peer.waiting_since is None:
                peer.waiting_since = now
            yield self._send(peer, self._heartbeat_for(peer, now, wants_answer=not self._direct))

    def _beat_targets(self) -> list[Peer]:
        if self._direct:
            return list(self._living.values())
        targets: list[Peer] = []
        while len(targets) < self.config.random_probes:
            if not self._ring:
                self._ring = [peer.id for peer in self._living.values()]
                self._rng.shuffle(self._ring)
                if not self._ring:
                    break
            peer = self._peers.get(self._ring.pop())
            if peer is not None and not peer.gone:
                targets.append(peer)
        return targets

    def _heartbeat_for(self, peer: Peer, now: float, *, wants_answer: bool) -> Heartbeat:
        heard_age_s = None
        if self._direct and peer.waiting_since is not None:
            heard_age_s = max(0.0, now - peer.waiting_since - max(0.0, self._late_now))
        held_s = now - peer.echo_at if peer.echo_sent_s else 0.0
        return Heartbeat(
            to=peer.id,
            incarnation=self.incarnation,
            refutations=self.refutations,
            sequence=self._next_sequence(),
            sent_s=now,
            load=self.load,
            directory=self.mark,
            wants_answer=wants_answer,
            heard_age_s=heard_age_s,
            echo_sent_s=peer.echo_sent_s,
            echo_held_s=held_s,
            rumors=self._rumors_for(peer),
            gossip=() if self._direct else self._gossip(),
        )

    def _heartbeat(self, sender: NodeId, beat: Heartbeat, now: float) -> Iterator[Effect]:
        peer = self._peers.get(sender)
        if sender == self.local or beat.to != self.local:
            self.counts["misaddressed"] += 1
            return
        if peer is None:
            self.counts["unknown_sender"] += 1
            return
        if beat.incarnation < peer.incarnation:
            yield from self._tell_stale(peer, peer.addresses, peer.incarnation, now)
            return
        if not self._advance(peer, beat.incarnation, beat.sequence, now):
            self.counts["stale_message"] += 1
            return
        if peer.state is NodeState.LEFT:
            return
        peer.refutations = max(peer.refutations, beat.refutations)
        if peer.load != beat.load:
            peer.load = beat.load
            self.revision += 1
        self._measure(peer, beat, now)
        self._hear_of_deafness(peer, beat, now)
        yield from self._heard(peer, now)
        for rumor in beat.rumors:
            yield from self._rumor(rumor, sender, now)
        for gossip in beat.gossip:
            self._gossiped(gossip, now)
        if beat.wants_answer and peer.address is not None:
            yield self._send(peer, self._heartbeat_for(peer, now, wants_answer=False))

    def _measure(self, peer: Peer, beat: Heartbeat, now: float) -> None:
        """Round trip, smoothed as in RFC 6298 but quick to fall: what is above it is mostly a late loop.
        Worth a revision when it has moved by a fifth of what the view shows."""
        peer.echo_sent_s, peer.echo_at = beat.sent_s, now
        if not beat.echo_sent_s:
            return
        sample = now - beat.echo_sent_s - beat.echo_held_s
        if not 0.0 <= sample <= RTT_CREDIBLE_S_MAX:
            return
        gain = 0.5 if sample < peer.rtt_s else 0.125
        peer.rtt_s = sample if not peer.rtt_s else peer.rtt_s + gain * (sample - peer.rtt_s)
        if abs(peer.rtt_s - peer.rtt_shown_s) > 0.2 * peer.rtt_shown_s:
            peer.rtt_shown_s = peer.rtt_s
            self.revision += 1

    def _hear_of_deafness(self, peer: Peer, beat: Heartbeat, now: float) -> None:
        if beat.heard_age_s is None:
            peer.deaf = False
        elif now >= self._deaf_believed_from or beat.heard_age_s < self.config.suspect_after_s:
            peer.deaf = beat.heard_age_s >= self.config.suspect_after_s
        if beat.heard_age_s is not None and beat.heard_age_s >= self.config.probe_after_s:
            self._try_other_address(peer, now)

    # --- hearing ---------------------------------------------------------------------------

    def _advance(self, peer: Peer, incarnation: int, sequence: int, now: float) -> bool:
        """Whether a message is newer than all before; a higher incarnation begins a new life."""
        if incarnation > peer.incarnation:
            self.counts["new_life"] += 1
            peer.incarnation, peer.refutations, peer.sequence, peer.nonce = incarnation, 0, 0, 0
            peer.rtt_s = peer.rtt_shown_s = peer.echo_sent_s = 0.0
            peer.load = Load()
            peer.deaf = False
            if peer.state is NodeState.LEFT:
                self._set_state(peer, NodeState.DEAD, now)
            self.revision += 1
        if sequence <= peer.sequence:
            return False
        peer.sequence = sequence
        return True

    def _heard(self, peer: Peer, now: float) -> Iterator[Effect]:
        """The peer itself spoke just now."""
        peer.heard_at = now
        peer.doubted = False
        peer.probes = 0
        peer.waiting_since = now if self._direct or peer.deaf else None
        yield from self._become(peer, NodeState.UNREACHABLE if peer.deaf else NodeState.ALIVE, now)
        for asker, nonce, until in self._helping.pop(peer.id, ()):
            other = self._peers.get(asker)
            if other is not None and other.address is not None and now <= until:
                yield self._send(
                    other,
                    ProbeReply(
                        target=peer.id,
                        nonce=nonce,
                        incarnation=peer.incarnation,
                        refutations=peer.refutations,
                    ),
                )

    def _judge(self, peer: Peer, now: float, stalled: bool) -> Iterator[Effect]:
        """Decide what a peer's silence means."""
        config = self.config
        silent = 0.0 if peer.waiting_since is None else now - peer.waiting_since
        if (silent >= config.probe_after_s or peer.deaf) and now >= peer.probe_at:
            yield from self._probe(peer, now)
        if peer.state is NodeState.SUSPECT and now - peer.since >= self._suspicion_s(peer) and not stalled:
            yield from self._become(peer, NodeState.DEAD, now)
            self._spread(self._rumor_about(peer, Rumored.DEAD))
            return
        if silent < config.suspect_after_s or peer.state is NodeState.SUSPECT:
            return
        if now - peer.vouched_at < config.vouch_s:
            yield from self._become(peer, NodeState.UNREACHABLE, now)
        elif stalled and not peer.doubted:
            peer.doubted = True  # first hear what arrived while our own loop was late
        else:
            yield from self._suspect(peer, self.local, now)

    def _suspect(self, peer: Peer, accuser: NodeId, now: float) -> Iterator[Effect]:
        peer.confirmers = {accuser: None}
        yield from self._become(peer, NodeState.SUSPECT, now)
        if accuser == self.local and self._deaf_ourselves(now):
            return
        self._spread(replace(self._rumor_about(peer, Rumored.SUSPECT), accuser=accuser))
        if peer.address is not None:
            yield self._send(peer, self._heartbeat_for(peer, now, wants_answer=True))

    def _deaf_ourselves(self, now: float) -> bool:
        """Most of the mesh is silent at once: then it is more likely us, and we accuse nobody aloud."""
        living = list(self._living.values())
        silent = sum(
            peer.waiting_since is not None and now - peer.waiting_since >= self.config.probe_after_s
            for peer in living
        )
        return len(living) >= 3 and 2 * silent > len(living)

    def _suspicion_s(self, peer: Peer) -> float:
        """How long a suspicion may be refuted: Lifeguard 3.2, by the number of independent accusers."""
        config = self.config
        wanted = min(config.confirmations_wanted, max(0, len(self._living) - 2))
        if wanted == 0:
            return config.suspicion_s_min
        share = math.log(len(peer.confirmers)) / math.log(wanted + 1)
        span = config.suspicion_s_max - config.suspicion_s_min
        return max(config.suspicion_s_min, config.suspicion_s_max - span * share)

    def _become(self, peer: Peer, state: NodeState, now: float) -> Iterator[Effect]:
        """Change the belief about a peer, and say so in the log."""
        before = peer.state
        if before is state:
            return
        self._set_state(peer, state, now)
        self.counts[f"{state.value}"] += 1
        yield Note(
            event=f"peer_{state.value}",
            fields=(("peer", peer.id), ("name", peer.name), ("before", before.value)),
        )
        if state is not NodeState.ALIVE and not peer.gone and self._direct and peer.address is not None:
            # It may still hear us: let it know at once that we do not hear it.
            yield self._send(peer, self._heartbeat_for(peer, now, wants_answer=True))

    def _set_state(self, peer: Peer, state: NodeState, now: float) -> None:
        if state is not NodeState.SUSPECT:
            peer.confirmers = {}
        peer.state, peer.since = state, now
        self.revision += 1
        if peer.gone:
            self._living.pop(peer.id, None)
        else:
            self._living[peer.id] = peer
        if peer.gone:
            peer.waiting_since, peer.deaf, peer.doubted = None, False, False
            peer.retries, peer.retry_at = 0, now
            for address in peer.addresses:
                self.joining.lost(address, now)
        elif self._direct and peer.waiting_since is None:
            peer.waiting_since = now
        self._choose_mode(now)
        self._hurry(now)

    def _choose_mode(self, now: float) -> None:
        """Direct beats up to ``direct_max`` peers; the clocks of the others' silence change meaning."""
        direct = len(self._living) <= self.config.direct_max
        if direct == self._direct:
            return
        self._direct = direct
        for peer in self._living.values():
            if direct and peer.waiting_since is None:
                peer.waiting_since = now
            elif not direct and peer.state is NodeState.ALIVE:
                peer.waiting_since = None

    # --- probes ----------------------------------------------------------------------------

    def _probe(self, peer: Peer, now: float) -> Iterator[Effect]:
        """One round: ask the peer itself, and others to ask it."""
        peer.probe_at = now + self.config.probe_interval_s
        peer.probes += 1
        self.counts["probes"] += 1
        if peer.address is None:
            return
        if not peer.sequence:  # known from others only: it may not know us
            yield from self._hello(peer)
            return
        yield self._send(peer, self._heartbeat_for(peer, now, wants_answer=True))
        if peer.probes > 1:
            self._try_other_address(peer, now)
            yield from self._hello(peer, one=True)
        yield from self._ask_others(peer)

    def _ask_others(self, peer: Peer) -> Iterator[Effect]:
        assert peer.address is not None
        others = [
            p for p in self._living.values() if p is not peer and p.state is NodeState.ALIVE and p.address
        ]
        for other in self._rng.sample(others, min(self.config.indirect_probes, len(others))):
            self.counts["indirect_probes"] += 1
            nonce = self._rng.getrandbits(32)
            yield self._send(other, ProbeRequest(target=peer.id, address=peer.address, nonce=nonce))

    def _asked_to_probe(self, sender: NodeId, request: ProbeRequest, now: float) -> Iterator[Effect]:
        target = self._peers.get(request.target)
        if target is None or target.gone or target.address is None or sender not in self._peers:
            self.counts["cannot_help"] += 1
            return
        for waiting in [t for t, asked in self._helping.items() if asked[-1][2] < now]:
            del self._helping[waiting]
        asked = self._helping.setdefault(target.id, [])
        if len(self._helping) > self.config.helping_max or len(asked) >= self.config.helping_max:
            self.counts["cannot_help"] += 1
            if not asked:
                del self._helping[target.id]
            return
        asked.append((sender, request.nonce, now + self.config.suspect_after_s))
        yield self._send(target, self._heartbeat_for(target, now, wants_answer=True))

    def _vouched(self, reply: ProbeReply, now: float) -> Iterator[Effect]:
        peer = self._peers.get(reply.target)
        if peer is None or (reply.incarnation, reply.refutations) < peer.standing or peer.gone:
            return
        self.counts["vouched"] += 1
        yield from self._vouch(peer, now)

    def _vouch(self, peer: Peer, now: float) -> Iterator[Effect]:
        """Another node hears it."""
        peer.vouched_at = now
        if peer.state is NodeState.SUSPECT:
            yield from self._become(peer, NodeState.UNREACHABLE, now)

    def _link_failed(self, address: Address, now: float) -> Iterator[Effect]:
        """Refused or broken connections hurry a death up, but do not prove it."""
        for peer in list(self._living.values()):
            if peer.address != address:
                continue
            self._try_other_address(peer, now)
            earlier = now - self.config.suspect_after_s + self.config.link_failed_grace_s
            if peer.waiting_since is None or earlier < peer.waiting_since:
                peer.waiting_since = earlier
                yield from self._probe(peer, now)
            self._hurry(now)

    def _try_other_address(self, peer: Peer, now: float) -> None:
        if len(peer.addresses) > 1:
            self.counts["address_tried"] += 1
            peer.address_index = (peer.address_index + 1) % len(peer.addresses)
            self.revision += 1

    # --- joining ---------------------------------------------------------------------------

    def _knock(self, now: float) -> Iterator[Effect]:
        """Say Hello where somebody may live, and where somebody lived; both at a bounded rate."""
        for address in self.joining.due(now):
            if address in self.addresses:
                self.joining.forget(address)
                continue
            hello = Hello(who=self._introduction(), dialed=address, wants_peers=True)
            yield Send(to=None, address=address, message=hello)
        # In a large mesh gossip tells of the living; knocking is for those that nobody tells of.
        budget = self.joining.config.tries_per_beat_max if self._direct else 1
        for peer in self._peers.values():
            if budget and peer.state is NodeState.DEAD and peer.retry_at <= now and peer.addresses:
                budget -= 1
                peer.retries += 1
                peer.retry_at = now + backoff_s(self.joining.config, self._rng, peer.retries)
                peer.address_index += 1
                yield from self._hello(peer, one=True)

    def _hello(self, peer: Peer, *, one: bool = False) -> Iterator[Effect]:
        accused = peer.sequence and peer.state is not NodeState.ALIVE
        rumors = (self._rumor_about(peer, _RUMORED[peer.state]),) if accused else ()
        addresses = (peer.address,) if one and peer.address else peer.addresses
        for address in addresses[: self.config.addresses_welcomed_max]:
            yield Send(
                to=peer.id,
                address=address,
                message=Hello(who=self._introduction(), dialed=address, rumors=rumors, wants_peers=peer.gone),
            )

    def _greeted(self, sender: NodeId, hello: Hello, now: float) -> Iterator[Effect]:
        who = hello.who
        refusal = self._refusal(sender, who)
        if refusal is not None:
            self.counts["refused"] += 1
            code, sentence = refusal
            if who.addresses:
                yield Send(
                    to=sender,
                    address=who.addresses[0],
                    message=Refused(code=code, message=sentence, dialed=hello.dialed),
                )
            yield from self._note_seldom(
                now, f"refusal {sender}", "peer_refused", code=code, message=sentence
            )
            return
        peer, new = yield from self._admit(sender, who, now)
        if peer is None:
            return
        for rumor in hello.rumors:
            if rumor.about == self.local and (rumor.incarnation, rumor.refutations) >= self.standing:
                peer.deaf = True  # until its beats say otherwise
                yield from self._become(peer, NodeState.UNREACHABLE, now)
            yield from self._rumor(rumor, sender, now)
        addresses = peer.addresses if new else (peer.addresses[:1] if peer.addresses else ())
        for address in addresses[: self.config.addresses_welcomed_max]:
            yield Send(to=sender, address=address, message=self._welcome(peer, hello))
        if not new and peer.address not in addresses:
            yield self._send(peer, self._welcome(peer, hello))

    def _welcomed(self, sender: NodeId, welcome: Welcome, now: float) -> Iterator[Effect]:
        if self._refusal(sender, welcome.who) is not None:
            self.counts["refused"] += 1
            return
        peer, _ = yield from self._admit(sender, welcome.who, now)
        if peer is None:
            if sender == self.local:
                self.joining.forget(welcome.dialed)
            return
        self.joining.answered(welcome.dialed, now)
        if welcome.dialed not in peer.addresses:  # a name or a translated address: it works for us
            peer.addresses = (welcome.dialed, *peer.addresses[: ADDRESSES_MAX - 1])
        peer.address_index = peer.addresses.index(welcome.dialed)
        self._take_addresses(peer)
        for hint in welcome.peers:
            self.learn(hint, now, vouched=True)

    def _admit(
        self, sender: NodeId, who: Introduction, now: float
    ) -> Generator[Effect, None, tuple[Peer | None, bool]]:
        """Take in what a node says of itself; returns its record (or None) and whether it is new."""
        if sender == self.local:
            if who.nonce != self._nonce:  # our key lives a second life elsewhere
                self.own_incarnation_seen = max(self.own_incarnation_seen, who.incarnation)
                yield from self._note_seldom(
                    now, "own id", "own_id_seen_elsewhere", addresses=", ".join(map(str, who.addresses))
                )
            return None, False
        peer = self._peers.get(sender)
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
            self._add(peer)
            self.counts["joined"] += 1
        elif who.incarnation < peer.incarnation:
            yield from self._tell_stale(peer, who.addresses, peer.incarnation, now)
            return None, False
        elif who.incarnation == peer.incarnation and peer.nonce not in (0, who.nonce):
            # Two lives under one incarnation: a state folder restored from a backup, or copied.
            yield from self._tell_stale(peer, who.addresses, peer.incarnation + 1, now)
            return None, False
        fresh = self._advance(peer, who.incarnation, who.sequence, now)
        if fresh:
            self._take_introduction(peer, who)
        yield from self._name_clash(peer, now)
        if fresh and peer.state is not NodeState.LEFT:
            yield from self._heard(peer, now)
        if new:
            self._spread(self._rumor_about(peer, Rumored.ALIVE))
        return peer, new

    def _refusal(self, sender: NodeId, who: Introduction) -> tuple[str, str] | None:
        if who.mesh != self.mesh:
            return MeshMismatch.code, (
                f"this node belongs to mesh {self.mesh!r}, not {who.mesh!r}: use the same mesh name on both"
            )
        if who.protocol_min > PROTOCOL_VERSION_MAX or who.protocol_max < PROTOCOL_VERSION_MIN:
            return ProtocolMismatch.code, (
                f"this node speaks protocol {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION_MAX}, the peer "
                f"{who.protocol_min} to {who.protocol_max}: bring both to one version"
            )
        if sender != self.local and sender not in self._peers and not self._make_room():
            return PEERS_FULL, f"this node knows {self.config.peers_max} peers already (peers_max)"
        return None

    def _take_introduction(self, peer: Peer, who: Introduction) -> None:
        peer.name, peer.nonce = who.name, who.nonce
        peer.refutations = max(peer.refutations, who.refutations)
        current = peer.address
        if peer.addresses != who.addresses:
            peer.addresses = who.addresses[:ADDRESSES_MAX]
            peer.address_index = peer.addresses.index(current) if current in peer.addresses else 0
            self.revision += 1
        self._take_addresses(peer)

    def _take_addresses(self, owner: Peer) -> None:
        """An address belongs to whoever last proved to live there: stale records lose it."""
        claimed = set(owner.addresses)
        for peer in self._peers.values():
            if peer is owner or peer.state is NodeState.ALIVE or not claimed.intersection(peer.addresses):
                continue
            self.counts["address_taken_over"] += 1
            peer.addresses = tuple(a for a in peer.addresses if a not in claimed)
            peer.address_index = 0

    def _name_clash(self, peer: Peer, now: float) -> Iterator[Effect]:
        others = [p.id for p in self._living.values() if p is not peer and p.name == peer.name]
        if peer.name == self.name:
            others.append(self.local)
        for other in others:
            key = f"name {min(peer.id, other)} {max(peer.id, other)}"
            yield from self._note_seldom(
                now, key, "duplicate_name", name=peer.name, one=min(peer.id, other), other=max(peer.id, other)
            )

    def _tell_stale(
        self, peer: Peer, addresses: tuple[Address, ...], incarnation: int, now: float
    ) -> Iterator[Effect]:
        """A node lives under an incarnation that was used before: tell it which one it must rise above."""
        self.counts["stale_incarnation"] += 1
        if now < peer.probe_at:
            return
        peer.probe_at = now + self.config.probe_interval_s
        rumor = replace(self._rumor_about(peer, Rumored.DEAD), incarnation=incarnation)
        for address in addresses[: self.config.addresses_welcomed_max]:
            hello = Hello(who=self._introduction(), dialed=address, rumors=(rumor,))
            yield Send(to=peer.id, address=address, message=hello)

    def _welcome(self, asker: Peer, hello: Hello) -> Welcome:
        others: list[Peer] = []
        if hello.wants_peers:
            others = [p for p in self._living.values() if p is not asker and _worth_telling(p)]
        if len(others) > PEERS_PER_WELCOME_MAX:
            others = self._rng.sample(others, PEERS_PER_WELCOME_MAX)
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
        return Welcome(who=self._introduction(), dialed=hello.dialed, peers=hints)

    def _introduction(self) -> Introduction:
        return Introduction(
            mesh=self.mesh,
            name=self.name,
            incarnation=self.incarnation,
            refutations=self.refutations,
            sequence=self._next_sequence(),
            nonce=self._nonce,
            addresses=self.addresses,
            directory=self.mark,
        )

    def _leave(self, peer: Peer, now: float) -> Iterator[Effect]:
        if peer.state is NodeState.LEFT:
            return
        yield from self._become(peer, NodeState.LEFT, now)
        self._spread(self._rumor_about(peer, Rumored.LEFT))

    # --- rumors and gossip -----------------------------------------------------------------

    @property
    def standing(self) -> tuple[int, int]:
        return (self.incarnation, self.refutations)

    def _rumor_about(self, peer: Peer, says: Rumored) -> Rumor:
        return Rumor(
            about=peer.id,
            says=says,
            incarnation=peer.incarnation,
            refutations=peer.refutations,
            accuser=self.local,
            name=peer.name,
            addresses=peer.addresses[:ADDRESSES_MAX],
        )

    def _spread(self, rumor: Rumor) -> None:
        self._rumors.spread(rumor, self.config.rumor_factor * math.ceil(math.log2(len(self._living) + 2)))

    def _rumors_for(self, peer: Peer) -> tuple[Rumor, ...]:
        """What this peer should hear: first what is said of itself, then what was passed on least."""
        chosen: list[Rumor] = []
        if peer.accused is not None:
            chosen.append(peer.accused)
            peer.accused = None
        elif peer.state is NodeState.SUSPECT or peer.state is NodeState.DEAD:
            chosen.append(self._rumor_about(peer, _RUMORED[peer.state]))
        return (*chosen, *self._rumors.take(RUMORS_PER_MESSAGE_MAX - len(chosen)))

    def _rumor(self, rumor: Rumor, sender: NodeId, now: float) -> Iterator[Effect]:
        if rumor.about == self.local:
            yield from self._hear_of_ourselves(rumor, now)
            return
        peer = self._peers.get(rumor.about)
        if peer is None:
            if rumor.says is Rumored.ALIVE and rumor.about != sender:
                hint = PeerHint(
                    id=rumor.about,
                    name=rumor.name,
                    incarnation=rumor.incarnation,
                    refutations=rumor.refutations,
                    addresses=rumor.addresses,
                )
                self.learn(hint, now, vouched=True)
                self._spread(rumor)
            return
        if (rumor.incarnation, rumor.refutations) < peer.standing:
            return
        if rumor.says is Rumored.ALIVE:
            yield from self._rumored_alive(peer, rumor, now)
        elif rumor.says is Rumored.LEFT:
            if rumor.incarnation == peer.incarnation:
                yield from self._leave(peer, now)
        elif now - peer.heard_at < self.config.probe_after_s and self._direct:
            peer.accused = rumor  # we hear it: let it defend itself
        else:
            yield from self._accused(peer, rumor, now)

    def _hear_of_ourselves(self, rumor: Rumor, now: float) -> Iterator[Effect]:
        """SWIM 4.2: refute with a higher standing whatever is said against us."""
        if rumor.incarnation > self.incarnation:
            self.own_incarnation_seen = max(self.own_incarnation_seen, rumor.incarnation)
            return
        if rumor.says is Rumored.ALIVE or (rumor.incarnation, rumor.refutations) < self.standing:
            return
        self.refutations += 1
        self.counts["refuted"] += 1
        self._spread(
            Rumor(
                about=self.local,
                says=Rumored.ALIVE,
                incarnation=self.incarnation,
                refutations=self.refutations,
                accuser=self.local,
                name=self.name,
                addresses=self.addresses,
            )
        )
        self.beat_soon(now)
        yield Note(event="refuted", fields=(("said", rumor.says.value), ("accuser", rumor.accuser)))

    def _rumored_alive(self, peer: Peer, rumor: Rumor, now: float) -> Iterator[Effect]:
        if (rumor.incarnation, rumor.refutations) == peer.standing:
            return
        if rumor.incarnation > peer.incarnation:
            self._advance(peer, rumor.incarnation, 0, now)
            peer.addresses = rumor.addresses or peer.addresses
        peer.refutations = rumor.refutations
        self._spread(rumor)
        if peer.state is NodeState.SUSPECT:
            self.counts["refutations_heard"] += 1
            yield from self._vouch(peer, now)
        if not self._direct and peer.state is not NodeState.LEFT:
            peer.waiting_since = None
            yield from self._become(peer, NodeState.ALIVE, now)
        elif peer.state is NodeState.DEAD:
            peer.retry_at = now
            self._hurry(now)

    def _accused(self, peer: Peer, rumor: Rumor, now: float) -> Iterator[Effect]:
        """Somebody else misses a peer that we do not hear either."""
        peer.refutations = max(peer.refutations, rumor.refutations)
        if peer.gone:
            return
        if peer.state is NodeState.SUSPECT:
            if rumor.says is Rumored.DEAD:
                yield from self._become(peer, NodeState.DEAD, now)
                self._spread(rumor)
            elif rumor.accuser not in peer.confirmers and len(peer.confirmers) < 16:
                peer.confirmers[rumor.accuser] = None
                self.counts["confirmed"] += 1
                self._spread(rumor)
                self._hurry(now)
        elif not self._direct and now - peer.heard_at >= self.config.probe_after_s:
            yield from self._suspect(peer, rumor.accuser, now)

    def _gossip(self) -> tuple[Gossip, ...]:
        """Third-hand news: the next few of a shuffled ring of those who were heard of."""
        if len(self._gossip_ring) < self.config.gossip_per_heartbeat:
            self._gossip_ring = [p for p in self._living.values() if p.sequence]
            self._rng.shuffle(self._gossip_ring)
        chosen = [
            self._gossip_ring.pop()
            for _ in range(min(self.config.gossip_per_heartbeat, len(self._gossip_ring)))
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

    def _gossiped(self, gossip: Gossip, now: float) -> None:
        peer = self._peers.get(gossip.about)
        if peer is None or gossip.about == self.local or gossip.incarnation < peer.incarnation:
            return
        if gossip.incarnation == peer.incarnation and gossip.sequence <= peer.sequence:
            return
        never_heard = peer.state is NodeState.DEAD and not peer.sequence
        self._advance(peer, gossip.incarnation, gossip.sequence, now)
        if peer.load != gossip.load:
            peer.load = gossip.load
            self.revision += 1
        if never_heard and not self._direct:
            self._set_state(peer, NodeState.ALIVE, now)

    # --- small things ----------------------------------------------------------------------

    def _add(self, peer: Peer) -> None:
        self._peers[peer.id] = peer
        if not peer.gone:
            self._living[peer.id] = peer

    def _remove(self, peer: Peer) -> None:
        del self._peers[peer.id]
        self._living.pop(peer.id, None)
        self.revision += 1

    def _lives_at(self, address: Address) -> bool:
        return any(p.state is NodeState.ALIVE and p.address == address for p in self._peers.values())

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _send(self, peer: Peer, message: MembershipMessage) -> Effect:
        assert peer.address is not None
        return Send(to=peer.id, address=peer.address, message=message)

    def _forget_long_gone(self, now: float) -> None:
        if len(self._living) < len(self._peers):
            for peer in [p for p in self._peers.values() if p.gone]:
                if now - peer.since >= self.config.forget_after_s:
                    self._remove(peer)

    def _make_room(self) -> bool:
        """Whether one more peer fits, after forgetting the one that has been gone longest."""
        if len(self._peers) < self.config.peers_max:
            return True
        gone = min((p for p in self._peers.values() if p.gone), key=lambda p: p.since, default=None)
        if gone is None:
            return False
        self._remove(gone)
        return True

    def _note_seldom(self, now: float, key: str, event: str, **fields: str | int | float) -> Iterator[Effect]:
        self.counts[event] += 1
        if now - self._noted.get(key, float("-inf")) < NOTE_INTERVAL_S:
            return
        if len(self._noted) >= self.config.helping_max:
            self._noted.clear()
        self._noted[key] = now
        yield Note(event=event, fields=tuple(fields.items()))


_RUMORED = {
    NodeState.ALIVE: Rumored.ALIVE,
    NodeState.SUSPECT: Rumored.SUSPECT,
    NodeState.UNREACHABLE: Rumored.SUSPECT,
    NodeState.DEAD: Rumored.DEAD,
    NodeState.LEFT: Rumored.LEFT,
}


def _worth_telling(peer: Peer) -> bool:
    """Only those that this node hears itself: second-hand peers would circulate for ever."""
    return peer.state is NodeState.ALIVE and bool(peer.addresses)
