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

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import assert_never

from fieldmesh.core.events import Received, Tick
from fieldmesh.core.handshake import Handshake
from fieldmesh.core.hearsay import Hearsay
from fieldmesh.core.joining import JoinConfig
from fieldmesh.core.messages import (
    ADDRESSES_MAX,
    Goodbye,
    Heartbeat,
    Hello,
    MembershipMessage,
    ProbeReply,
    ProbeRequest,
    Refused,
    Welcome,
)
from fieldmesh.core.model import Address, NodeId, NodeState
from fieldmesh.core.peers import (
    AddressesChanged,
    JoinHint,
    LeaveRequested,
    LinkFailed,
    LoadChanged,
    MembershipConfig,
    MembershipEffect,
    MembershipEvent,
    Peer,
)
from fieldmesh.core.roster import Roster
from fieldmesh.core.suspicion import Suspicion
from fieldmesh.core.voice import Voice, send_to

RTT_CREDIBLE_S_MAX = 60.0
RTT_SHOWN_STEP_S_MIN = 0.0005
"""Less is noise of two loops, and nothing beside the time that a token takes."""


class Membership(Roster):
    """One node's belief about its mesh: the roster, and the machine that keeps it true."""

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
        super().__init__(
            local=local,
            name=name,
            mesh=mesh,
            addresses=addresses,
            incarnation=incarnation,
            rng=rng,
            config=config,
            join=join,
        )
        self.left = False
        self._voice = Voice(self)
        self._suspicion = Suspicion(self, self._voice)
        self._hearsay = Hearsay(self, self._voice, self._suspicion)
        self._handshake = Handshake(self, self._voice, self._suspicion, self._hearsay)
        self._ring: list[NodeId] = []
        self._deaf_believed_from = float("-inf")

    def __repr__(self) -> str:
        states = Counter(peer.state.value for peer in self.peers.values())
        return f"Membership({self.name}, {dict(sorted(states.items()))})"

    # --- the machine -------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        return self.due

    def handle(self, event: MembershipEvent, now: float) -> list[MembershipEffect]:
        """Take one event; local misuse (a clock that runs backwards) raises, remote nonsense is counted."""
        if self.left:
            return []
        self._notice_lateness(now)
        effects = list(self._dispatch(event, now))
        if self.due is not None and self.joining.next_at is not None:
            self.due = min(self.due, max(self.joining.next_at, now))
        return effects

    def check(self) -> None:
        """The rules that hold between any two events."""
        super().check()
        assert self.left or self.due is not None, "no deadline"

    # --- events ------------------------------------------------------------------------------

    def _dispatch(self, event: MembershipEvent, now: float) -> Iterator[MembershipEffect]:
        match event:
            case Tick():
                yield from self._tick(now)
            case Received(sender=sender, message=message):
                yield from self._received(sender, message, now)
            case JoinHint(address=address, source=source):
                if address not in self.addresses and not self.lives_at(address):
                    self.joining.add(address, source, now)
            case LinkFailed(address=address):
                yield from self._suspicion.link_failed(address, now)
            case LoadChanged(load=load):
                urgent = load.accepting != self.load.accepting or load.engine is not self.load.engine
                self.revision += load != self.load  # the view shows our own load too
                self.load = load
                if urgent:
                    self.beat_soon(now)
            case AddressesChanged(addresses=addresses):
                self.addresses = addresses[:ADDRESSES_MAX]
                yield from (hello for peer in self.living.values() for hello in self._voice.hello(peer))
            case LeaveRequested():
                self.left, self.due = True, None
                goodbye = Goodbye(incarnation=self.incarnation, sequence=self.next_sequence())
                yield from (
                    send_to(peer, goodbye) for peer in self.living.values() if peer.address is not None
                )
            case _:
                assert_never(event)

    def _received(self, sender: NodeId, message: MembershipMessage, now: float) -> Iterator[MembershipEffect]:
        match message:
            case Heartbeat():
                yield from self._heartbeat(sender, message, now)
            case Hello():
                yield from self._handshake.greeted(sender, message, now)
            case Welcome():
                yield from self._handshake.welcomed(sender, message, now)
            case Refused():
                self.joining.refused(message.dialed, now)
                yield from self.note_seldom(
                    now, f"refused {message.dialed}", "join_refused", address=str(message.dialed),
                    code=message.code, message=message.message,
                )  # fmt: skip
            case ProbeRequest():
                yield from self._suspicion.asked_to_probe(sender, message, now)
            case ProbeReply():
                yield from self._suspicion.vouched(message, now)
            case Goodbye():
                peer = self.peers.get(sender)
                if peer is not None and message.incarnation >= peer.incarnation:
                    peer.incarnation, peer.sequence = message.incarnation, message.sequence
                    yield from self._suspicion.leave(peer, now)
            case _:
                assert_never(message)

    # --- time --------------------------------------------------------------------------------

    def _notice_lateness(self, now: float) -> None:
        """Our own loop was late: what seems silent may only be unheard."""
        if self.due is None or self.beat_at is None:
            self.late_now = 0.0
            return
        self.late_now = now - self.due
        if self.late_now > self.config.late_s:  # that they missed our beats is our own doing
            self._deaf_believed_from = max(self._deaf_believed_from, now + self.config.beat_s)
        if self.late_now <= self.config.frozen_s:
            return
        self.counts["frozen"] += 1
        self._deaf_believed_from = now + self.config.suspect_after_s
        for peer in self.peers.values():
            if peer.waiting_since is not None:
                peer.waiting_since = now
                peer.doubted = False
        self.due = now

    def _tick(self, now: float) -> Iterator[MembershipEffect]:
        stalled = self.late_now > self.config.late_s
        if stalled:
            self.counts["late"] += 1
        if self.beat_at is None or now >= self.beat_at:
            self.beat_at = now + self.config.beat_s * self.rng.uniform(0.95, 1.05)
            yield from self._beat(now)
            self.forget_long_gone(now)
        for peer in list(self.living.values()):
            if peer.waiting_since is not None or peer.state is NodeState.SUSPECT:
                yield from self._suspicion.judge(peer, now, stalled)
        yield from self._handshake.knock(now)
        self.late_now = 0.0
        self.due = max(min(self.beat_at, self._suspicion.next_due()), now + 0.01)

    # --- beats -------------------------------------------------------------------------------

    def _beat(self, now: float) -> Iterator[MembershipEffect]:
        for peer in self._beat_targets():
            if peer.address is None:
                continue
            if not self.direct and peer.waiting_since is None:
                peer.waiting_since = now
            yield self._voice.beat(peer, now, wants_answer=not self.direct)

    def _beat_targets(self) -> list[Peer]:
        if self.direct:
            return list(self.living.values())
        targets: list[Peer] = []
        while len(targets) < self.config.random_probes:
            if not self._ring:
                self._ring = [peer.id for peer in self.living.values()]
                self.rng.shuffle(self._ring)
                if not self._ring:
                    break
            peer = self.peers.get(self._ring.pop())
            if peer is not None and not peer.gone:
                targets.append(peer)
        return targets

    def _heartbeat(self, sender: NodeId, beat: Heartbeat, now: float) -> Iterator[MembershipEffect]:
        peer = self.peers.get(sender)
        if sender == self.local or beat.to != self.local:
            self.counts["misaddressed"] += 1
            return
        if peer is None:
            self.counts["unknown_sender"] += 1
            return
        if beat.incarnation < peer.incarnation:
            yield from self._handshake.tell_stale(peer, peer.addresses, peer.incarnation, now)
            return
        if not self.advance(peer, beat.incarnation, beat.sequence, now):
            self.counts["stale_message"] += 1
            return
        if peer.state is NodeState.LEFT:
            return
        peer.refutations = max(peer.refutations, beat.refutations)
        if peer.load != beat.load:
            peer.load = beat.load
            self.revision += 1
        self._measure(peer, beat, now)
        answers = self._answers(peer, beat)
        self._hear_of_deafness(peer, beat, now, answers=answers)
        yield from self._suspicion.heard(peer, now, answers=answers)
        for rumor in beat.rumors:
            yield from self._hearsay.hear_rumor(rumor, sender, now)
        for gossip in beat.gossip:
            self._hearsay.hear_gossip(gossip, now)
        if beat.wants_answer and peer.address is not None:
            yield self._voice.beat(peer, now, wants_answer=False)

    def _measure(self, peer: Peer, beat: Heartbeat, now: float) -> None:
        """Round trip, smoothed as in RFC 6298 but quick to fall: what is above it is mostly a late loop.
        Worth a revision when it has moved by a fifth of what the view shows, and not by a hair."""
        peer.echo_sent_s, peer.echo_at = beat.sent_s, now
        if not beat.echo_sent_s:
            return
        sample = now - beat.echo_sent_s - beat.echo_held_s
        if not 0.0 <= sample <= RTT_CREDIBLE_S_MAX:
            return
        gain = 0.5 if sample < peer.rtt_s else 0.125
        peer.rtt_s = sample if not peer.rtt_s else peer.rtt_s + gain * (sample - peer.rtt_s)
        step_s = max(0.2 * peer.rtt_shown_s, RTT_SHOWN_STEP_S_MIN) if peer.rtt_shown_s else 0.0
        if abs(peer.rtt_s - peer.rtt_shown_s) > step_s:
            peer.rtt_shown_s = peer.rtt_s
            self.revision += 1

    def _answers(self, peer: Peer, beat: Heartbeat) -> bool:
        """Whether a beat shows that ours arrived, where one was to be answered: by its echo."""
        return self.direct or peer.waiting_since is None or beat.echo_sent_s >= peer.waiting_since

    def _hear_of_deafness(self, peer: Peer, beat: Heartbeat, now: float, *, answers: bool) -> None:
        """In direct mode it says itself for how long it has missed us. Beyond that nobody misses anybody, but
        a peer that speaks and leaves our beats unanswered does not hear them."""
        if not self.direct:
            silent = now - peer.waiting_since if peer.waiting_since is not None else 0.0
            if answers or (silent >= self.config.suspect_after_s and now >= self._deaf_believed_from):
                peer.deaf = not answers
            return
        if beat.heard_age_s is None:
            peer.deaf = False
        elif now >= self._deaf_believed_from or beat.heard_age_s < self.config.suspect_after_s:
            peer.deaf = beat.heard_age_s >= self.config.suspect_after_s
        if beat.heard_age_s is not None and beat.heard_age_s >= self.config.probe_after_s:
            self.try_other_address(peer, now)
