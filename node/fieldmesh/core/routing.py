"""Which node should serve this request.

Owns: the estimate of when each node would be done, the policies, and the reasons in words. Must not: match
names (``catalogue`` does), keep anything between two decisions (``traffic``), or draw randomness of its
own (a ``Random`` is handed in).

How a request finds its node:

1. *Who may answer* (``Catalogue.groups``), by profile, model and domain. Where none is given, the classifier
   proposes a domain, or abstains.
2. *Who can* (``_obstacle``): ALIVE, engine READY, not draining, not tried before, not on the request's path.
3. *Who is looked at*: all of a small group, a random ``SAMPLE_NODES_MAX`` of a large one, and always
   the local node. Looking at a few at random is nearly as good as looking at all, and does not herd on
   the one that an old load report shows idle (Mitzenmacher, "The Power of Two Choices in Randomized Load
   Balancing", 2001; and "How Useful Is Old Information?", 2000).
4. *Who is best* (``Policy``). By default the least expected time to finish; those within
   ``ABOUT_EQUAL_FACTOR`` and ``ABOUT_EQUAL_S`` of the best count as equal: among them a higher tier
   comes first, then the local node, then chance.

Nodes that accept come before nodes that are full. Where nobody of a domain's owners accepts, the
wish spills to a generalist: an answer beats a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import assert_never

from fieldmesh.core.catalogue import (
    NAME_SHOWN_CHARS_MAX,
    NAMES_SHOWN_MAX,
    Group,
    Index,
    Offer,
    quoted,
    what_exists,
)
from fieldmesh.core.classify import Classification
from fieldmesh.core.errors import (
    ConfigError,
    FieldmeshError,
    HopLimit,
    NoCandidate,
    QueueFull,
)
from fieldmesh.core.model import EngineState, Load, Member, NodeId, NodeState, ProfileOffer
from fieldmesh.core.traffic import Traffic, Unreported

SAMPLE_NODES_MAX = 10
"""Nodes of a large group that one decision looks at (besides the local one)."""

ABOUT_EQUAL_FACTOR = 1.15
ABOUT_EQUAL_S = 0.05
"""Within this factor and this many seconds of the best, expected times count as equal: they are guesses."""

RTT_PRIOR_S = 0.002
"""Round trip to a peer that has not been measured yet (a LAN)."""

FORWARD_COST_S = 0.001
"""What a hop costs beside the network: two more codecs and event loops (measured 0.7 to 1.2 ms)."""

PREFILL_PRIOR_TOKENS_PER_S = 250.0
DECODE_PRIOR_TOKENS_PER_S = 30.0
"""Speeds assumed where no candidate has measured its own: a small model on a small CPU box."""

DECODE_PRIOR_TOKENS = 128
"""What a running request is assumed to have left where its node reports no pending tokens."""

BATCH_SLOWDOWN_EXPONENT = 0.65
"""One stream's speed falls with the batch as ``batch ** -0.65`` (fitted to 1, 2, 4, 8 and 16 sequences of a
135M model on 2 cores: 115, 62, 42, 26 and 17 tokens a second)."""

RETRY_AFTER_MIN_S = 0.2
RETRY_AFTER_MAX_S = 30.0
NO_CANDIDATE_RETRY_AFTER_S = 1.0

EXPLAINED_CANDIDATES_MAX = 256


class Policy(Enum):
    """How candidates are ranked, by the name that configuration uses."""

    EXPECTED_TIME = "expected-time"
    ROUND_ROBIN = "round-robin"
    LEAST_LOADED = "least-loaded"
    RANDOM = "random"

    @classmethod
    def parse(cls, name: str) -> Policy:
        """The policy of that name. Raises ConfigError with the names that exist."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(
                f"There is no routing policy {quoted(name)}."
                + what_exists("policies", [p.value for p in cls], name),
                field="routing.policy",
            ) from None


_WEIGHTED = (Policy.EXPECTED_TIME, Policy.LEAST_LOADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a request needs of the mesh.

    ``text`` is what the classifier reads where neither profile, model nor domain is given.
    ``prompt_tokens`` may be an estimate. ``failed`` nodes were tried and lost, ``full`` ones refused this
    request for lack of room; ``path`` lists the nodes that it came through. With ``hops_left`` 0 only the
    local node may serve it.
    """

    profile: str = ""
    model: str = ""
    domain: str = ""
    text: str = ""
    prompt_tokens: int = 0
    max_tokens: int = 256
    failed: frozenset[NodeId] = frozenset()
    full: frozenset[NodeId] = frozenset()
    path: tuple[NodeId, ...] = ()
    hops_left: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One node with the profile that it would answer with.

    ``score`` is what the policy ranks by, least first: seconds to the end (expected-time), requests a slot
    (least-loaded), the turn of the last request sent there (round-robin), a random number (random).
    ``reason`` is filled where an explanation was asked for.
    """

    member: Member
    offer: ProfileOffer
    score: float
    eligible: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who should serve a request. ``candidates`` is never empty; best first, each node once.

    ``domain`` is the one wished for or proposed by the classifier. ``considered`` holds all candidates, those
    of ``candidates`` first, where an explanation was asked for.
    """

    policy: Policy
    candidates: tuple[Candidate, ...]
    domain: str = ""
    fallback: bool = False
    classification: Classification | None = None
    considered: tuple[Candidate, ...] = ()


# --- how long it would take --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens a second to assume where a node has not measured its own."""

    prefill: float = PREFILL_PRIOR_TOKENS_PER_S
    decode: float = DECODE_PRIOR_TOKENS_PER_S

    @classmethod
    def among(cls, loads: Sequence[Load]) -> Speeds:
        """The mean of those that are known: a newcomer is taken to be like the others until it says more."""
        prefill = [x.prefill_tokens_per_s for x in loads if x.prefill_tokens_per_s > 0]
        decode = [x.decode_tokens_per_s for x in loads if x.decode_tokens_per_s > 0]
        return cls(
            sum(prefill) / len(prefill) if prefill else PREFILL_PRIOR_TOKENS_PER_S,
            sum(decode) / len(decode) if decode else DECODE_PRIOR_TOKENS_PER_S,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now to the last token, by cause."""

    load_s: float
    network_s: float
    wait_s: float
    prefill_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        return self.load_s + self.network_s + self.wait_s + self.prefill_s + self.decode_s


def estimate(
    need: Need, member: Member, profile: str, sent: Unreported, speeds: Speeds, *, local: bool
) -> Estimate:
    """When this member would be done with the request by this profile, if it were sent now.

    A model that is not in memory is loaded first. Ahead of the request are the prompts that wait for prefill
    (one after the other), and, where no slot is free, as many running requests as must end first. Its own
    decoding is slower than the speed reported by as much as the batch has grown since.
    """
    load = member.load
    prefill = load.prefill_tokens_per_s or speeds.prefill
    decode = load.decode_tokens_per_s or speeds.decode
    busy = load.running + load.queued + sent.requests
    slots = max(1, load.slots)
    wait_s = (load.pending_prefill_tokens + sent.prompt_tokens) / prefill
    batch = busy + 1
    if batch > slots:
        pending_tokens = load.pending_decode_tokens or DECODE_PRIOR_TOKENS * (load.running + load.queued)
        tokens_each = (pending_tokens + sent.max_tokens) / busy
        wait_s += (batch - slots) * tokens_each / (decode * slots)
        batch = slots
    slowdown = (batch / max(1, load.running)) ** BATCH_SLOWDOWN_EXPONENT if batch > load.running else 1.0
    return Estimate(
        load.load_s(profile),
        0.0 if local else (member.rtt_s or RTT_PRIOR_S) + FORWARD_COST_S,
        wait_s,
        need.prompt_tokens / prefill,
        need.max_tokens * slowdown / decode,
    )


# --- the decision ------------------------------------------------------------------------


@dataclass(slots=True)
class _Inquiry:
    """One decision in the making."""

    need: Need
    index: Index
    traffic: Traffic
    rng: Random
    policy: Policy
    weights: Mapping[str, float]
    tried: frozenset[NodeId] = field(init=False)

    def __post_init__(self) -> None:
        self.tried = self.need.failed.union(self.need.path)

    def obstacle(self, member: Member) -> str:
        """Why this member cannot serve the request at all; empty where it can."""
        if member.state is not NodeState.ALIVE:
            return f"it is {member.state.value}"
        if member.load.engine is not EngineState.READY:
            return f"its engine is {member.load.engine.value}"
        if member.load.draining:
            return "it is draining"
        if member.id in self.tried:
            return "the request came through it" if member.id in self.need.path else "it failed this request"
        if self.need.hops_left <= 0 and member.id != self.index.view.local:
            return "the request has no hops left"
        return ""

    def accepts(self, member: Member) -> bool:
        """Whether one more request would find a slot or a place in the queue."""
        load = member.load
        room = load.slots + load.queue_max - load.running - load.queued
        return (
            room > 0 and member.id not in self.need.full and room > self.traffic.unreported(member).requests
        )

    def sample(self, group: Group) -> tuple[list[Offer], list[Offer]]:
        """Offers to look at: of nodes that accept, and of nodes that could but are full."""
        offers: Sequence[Offer] = group.offers
        if len(offers) > SAMPLE_NODES_MAX:
            offers = self.rng.sample(offers, SAMPLE_NODES_MAX)
            if group.local is not None and group.local not in offers:
                offers.append(group.local)
        accepting, full = self._sorted_out(offers)
        if not accepting and len(offers) < len(group.offers):
            accepting, full = self._sorted_out(group.offers)
            if len(accepting) > SAMPLE_NODES_MAX:
                accepting = self.rng.sample(accepting, SAMPLE_NODES_MAX)
            if len(full) > SAMPLE_NODES_MAX:
                full = self.rng.sample(full, SAMPLE_NODES_MAX)
        return accepting, full

    def _sorted_out(self, offers: Sequence[Offer]) -> tuple[list[Offer], list[Offer]]:
        members = self.index.view.members
        accepting: list[Offer] = []
        full: list[Offer] = []
        for offer in offers:
            member = members[offer.position]
            if not self.obstacle(member):
                (accepting if self.accepts(member) else full).append(offer)
        return accepting, full

    def scores(self, offers: Sequence[Offer]) -> list[Candidate]:
        """Candidates in the order given, each with what the policy ranks it by."""
        members = [self.index.view.members[o.position] for o in offers]
        score: Callable[[Member, ProfileOffer], float]
        match self.policy:
            case Policy.EXPECTED_TIME:
                speeds = Speeds.among([m.load for m in members])
                score = lambda m, o: self.estimate(m, o, speeds).total_s  # noqa: E731
            case Policy.LEAST_LOADED:
                score = lambda m, _: self._load_share(m)  # noqa: E731
            case Policy.ROUND_ROBIN:
                score = lambda m, _: self.traffic.last_sent(m.id)  # noqa: E731
            case Policy.RANDOM:
                score = lambda _m, _o: self.rng.random()  # noqa: E731
            case _:
                assert_never(self.policy)
        weights = self.weights if self.policy in _WEIGHTED else {}
        return [
            Candidate(member=m, offer=o.profile, score=score(m, o.profile) / weights.get(o.profile.name, 1.0))
            for m, o in zip(members, offers, strict=True)
        ]

    def estimate(self, member: Member, offer: ProfileOffer, speeds: Speeds) -> Estimate:
        local = member.id == self.index.view.local
        return estimate(self.need, member, offer.name, self.traffic.unreported(member), speeds, local=local)

    def _load_share(self, member: Member) -> float:
        load = member.load
        return (load.running + load.queued + self.traffic.unreported(member).requests) / max(1, load.slots)

    def rank(self, offers: Sequence[Offer]) -> list[Candidate]:
        """The offers' nodes, best first; those whose context is too short for the prompt last."""
        candidates = self.scores(offers)
        if not candidates:
            return []
        if self.policy is Policy.EXPECTED_TIME:
            best = min(c.score for c in candidates)
            equal = best * ABOUT_EQUAL_FACTOR + ABOUT_EQUAL_S
        else:
            equal = min(c.score for c in candidates)
        local = self.index.view.local

        def key(candidate: Candidate) -> tuple[float, ...]:
            fits = candidate.offer.context_tokens >= self.need.prompt_tokens
            if candidate.score > equal:
                return (not fits, 1, candidate.score, self.rng.random())
            return (not fits, 0, -candidate.offer.tier, candidate.member.id != local, self.rng.random())

        return sorted(candidates, key=key)


def choose(
    need: Need,
    index: Index,
    traffic: Traffic,
    rng: Random,
    *,
    policy: Policy = Policy.EXPECTED_TIME,
    weights: Mapping[str, float] | None = None,
    explain: bool = False,
) -> Decision:
    """Decide who serves a request. ``weights`` (by profile, above 0) divide what expected-time and
    least-loaded rank by: a profile of weight 2 is chosen as if its nodes were twice as fast.

    Raises ProfileNotFound, ModelNotFound, DomainNotFound (nobody ever offered it), NoCandidate (known, but
    nobody can be reached), QueueFull (reachable, but all are full; with ``retry_after_s``), HopLimit
    (somebody could, but the request may not travel further).
    """
    inquiry = _Inquiry(need, index, traffic, rng, policy, weights or {})
    domain = need.domain
    classification = None
    if need.text and index.classifier is not None and not (need.profile or need.model or domain):
        classification = index.classifier.classify(need.text)
        # The classifier may be older than the catalogue: a domain that has gone since is no proposal.
        if classification.domain in index.catalogue.domain_names:
            domain = classification.domain or ""
    groups = index.catalogue.groups(need.profile, need.model, domain)
    full: list[Offer] = []
    for group in groups:
        accepting, group_full = inquiry.sample(group)
        full.extend(group_full)
        if accepting:
            ranked = inquiry.rank(accepting)
            spare = inquiry.rank(group_full)
            return Decision(
                policy=policy,
                candidates=(*ranked, *spare),
                domain=domain,
                fallback=group.fallback,
                classification=classification,
                considered=_explained(inquiry, groups, ranked, spare) if explain else (),
            )
    raise _refusal(inquiry, groups, full)


def _explained(
    inquiry: _Inquiry, groups: Sequence[Group], ranked: Sequence[Candidate], spare: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """Everyone who was or might have been considered, in words: the ranked, the full, then the others."""
    speeds = Speeds.among([c.member.load for c in (*ranked, *spare)])
    first = [replace(c, reason=_in_words(inquiry, c, speeds, is_full=False)) for c in ranked]
    first += [replace(c, reason=_in_words(inquiry, c, speeds, is_full=True)) for c in spare]
    seen = {c.member.id for c in first}
    others: list[Candidate] = []
    for offer in (o for group in groups for o in group.offers):
        member = inquiry.index.view.members[offer.position]
        if member.id in seen or len(first) + len(others) >= EXPLAINED_CANDIDATES_MAX:
            continue
        seen.add(member.id)
        reason = inquiry.obstacle(member)
        if not reason:
            sampled = any(o.position == offer.position for g in groups[:1] for o in g.offers)
            reason = (
                "it was not in this decision's random sample" if sampled else "others are nearer to the wish"
            )
        others.append(Candidate(member=member, offer=offer.profile, score=0.0, eligible=False, reason=reason))
    return (*first, *others)


def _in_words(inquiry: _Inquiry, candidate: Candidate, speeds: Speeds, *, is_full: bool) -> str:
    member = candidate.member
    words = []
    match inquiry.policy:
        case Policy.EXPECTED_TIME:
            e = inquiry.estimate(member, candidate.offer, speeds)
            words.append(
                f"done in {e.total_s:.2f} s (network {e.network_s * 1000:.0f} ms, waiting {e.wait_s:.2f} s, "
                f"prompt {e.prefill_s:.2f} s, answer {e.decode_s:.2f} s)"
            )
        case Policy.LEAST_LOADED:
            words.append(f"{candidate.score:.2f} requests a slot")
        case Policy.ROUND_ROBIN:
            words.append(f"its last turn was {candidate.score:.0f}")
        case Policy.RANDOM:
            words.append("drawn at random")
        case _:
            assert_never(inquiry.policy)
    if load_s := member.load.load_s(candidate.offer.name):
        words.append(f"its model is loaded first, about {load_s:.1f} s")
    if not member.load.decode_tokens_per_s:
        words.append("its speed is not measured yet")
    weight = inquiry.weights.get(candidate.offer.name, 1.0) if inquiry.policy in _WEIGHTED else 1.0
    if weight != 1.0:
        words.append(f"weight {weight:g}")
    if candidate.offer.tier != 1:
        words.append(f"tier {candidate.offer.tier}")
    if member.id == inquiry.index.view.local:
        words.append("local")
    if candidate.offer.context_tokens < inquiry.need.prompt_tokens:
        words.append(f"its context of {candidate.offer.context_tokens} tokens may be too short")
    if is_full:
        words.append("full: asked only if no other accepts")
    return "; ".join(words)


def _refusal(inquiry: _Inquiry, groups: Sequence[Group], full: Sequence[Offer]) -> FieldmeshError:
    """Why nobody can serve this now."""
    members = inquiry.index.view.members
    if full:
        speeds = Speeds.among([members[o.position].load for o in full])
        wait_s = min(inquiry.estimate(members[o.position], o.profile, speeds).wait_s for o in full)
        return QueueFull(
            f"All {len(full)} reachable nodes that could serve this have full queues; ask again later.",
            retry_after_s=min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, wait_s)),
        )
    offers = {o.position: o for group in groups for o in group.offers}
    if not offers:
        return NoCandidate(
            "No node of the mesh offers a profile yet; they may still be starting.",
            retry_after_s=NO_CANDIDATE_RETRY_AFTER_S,
        )
    obstacles = [(members[p], inquiry.obstacle(members[p])) for p in offers]
    if any("no hops left" in reason for _, reason in obstacles):
        return HopLimit("The request may not be forwarded any further, and this node cannot serve it.")
    shown = "; ".join(
        f"{m.name[:NAME_SHOWN_CHARS_MAX]}: {reason}" for m, reason in obstacles[:NAMES_SHOWN_MAX]
    )
    more = f"; and {len(obstacles) - NAMES_SHOWN_MAX} more" if len(obstacles) > NAMES_SHOWN_MAX else ""
    return NoCandidate(
        f"No node that offers this can serve it now ({shown}{more}).",
        retry_after_s=NO_CANDIDATE_RETRY_AFTER_S,
    )
