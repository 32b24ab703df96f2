"""Which nodes should vote, over time. Owns: how long who has been there, who flaps, and the next change.

The mesh looks after its own voters: one node is one voter; two are a voter and a learner (two voters survive
less than one); from three on there are three voters, from five on five, as far as ``VoterPolicy`` allows.
A node must have been there for a while before it is taken in, longer after each fall; a voter that is away
keeps its vote until it is gone for good. ``core.raft_members`` knows the single steps, ``core.raft`` refuses
what is unsafe whatever is advised here. Must not: perform a change; the leader's host asks for one advice at
a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import inf

from fieldmesh.core.model import MeshView, NodeId, NodeState
from fieldmesh.core.raft_leader import changed
from fieldmesh.core.raft_members import choose_voters, next_change
from fieldmesh.core.raft_model import AddLearner, Change, Members, Promote, Remove
from fieldmesh.core.settings import State
from fieldmesh.core.settings_schema import VOTERS_POLICY, known_value

FALL_MEMORY_S = 3600.0
FALLS_MAX = 4
"""Each fall within ``FALL_MEMORY_S`` doubles how long a node must have been there; at most these count."""
FLAPPING_FALLS = 3
"""From so many falls on nothing waits for a node to become stable."""
CATCH_UP_S_MAX = 120.0
"""A learner that is there and has not caught up for so long has failed, which is a fall."""
RECORDS_MAX = 4096
_HERE = (NodeState.ALIVE, NodeState.SUSPECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class VoterPolicy:
    """What ``voters/policy`` says. Times are guesses for boxes that are switched off now and then.

    ``stable_s``: seconds for which a node must have been there to be taken in, and for which one that said
    goodbye is waited for. ``gone_s``: seconds of silence after which a voter is gone for good.
    """

    automatic: bool = True
    target: int = 5
    stable_s: float = 30.0
    gone_s: float = 300.0

    @staticmethod
    def of(state: State) -> VoterPolicy:
        """The policy that a configuration holds, or the default one."""
        return VoterPolicy(**(known_value(state, VOTERS_POLICY) or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The next change, or None, and the reason in a sentence."""

    change: Change | None
    why: str


@dataclass(slots=True)
class _Presence:
    """``since``: when the node came (if ``here``) or went."""

    here: bool
    since: float
    incarnation: int
    goodbye: bool = False
    draining: bool = False
    falls: list[float] = field(default_factory=list)
    behind_since: float | None = None


class Topology:
    """What one node has seen of the others, and what it would advise if it led."""

    def __init__(self, policy: VoterPolicy | None = None) -> None:
        self.policy = policy or VoterPolicy()
        self._seen: dict[NodeId, _Presence] = {}

    def observe(self, view: MeshView, now: float) -> None:
        """Take in who is there. Call it whenever the view changes, and before ``advise``."""
        for member in view.members:
            here = member.state in _HERE
            seen = self._seen.get(member.id)
            if seen is None:
                seen = self._seen[member.id] = _Presence(here, now, member.incarnation)
            elif here is not seen.here or (here and member.incarnation > seen.incarnation):
                if seen.here:
                    self._fall(seen, now)
                seen.here, seen.since = here, now
            seen.incarnation = max(seen.incarnation, member.incarnation)
            seen.goodbye = member.state is NodeState.LEFT
            seen.draining = member.load.draining
        known = {member.id for member in view.members}
        for node, seen in self._seen.items():
            if node not in known and seen.here:
                self._fall(seen, now)
                seen.here, seen.since = False, now
        self._forget(now)

    def advise(
        self,
        members: Members,
        *,
        leader: NodeId,
        caught_up: AbstractSet[NodeId],
        lost: Iterable[NodeId],
        pending: bool,
        now: float,
    ) -> Advice:
        """The next change of ``members``. ``lost``: voters without their log; ``pending``: a change is under
        way. Everything is as the leader knows it."""
        for node in members.all:
            self._seen.setdefault(node, _Presence(here=node == leader, since=now, incarnation=0))
        if not self.policy.automatic:
            return Advice(change=None, why=f"{VOTERS_POLICY} leaves the choice of voters to people")
        if pending:
            return Advice(change=None, why="a change of voters is under way")
        self._watch_catching_up(members, caught_up, now)
        present = self._present(members, leader, frozenset(lost), now)
        settled = {n: s for n, s in present.items() if s >= self._required(n, members, now)}
        wanted = self._choose(members, settled)
        promising = {n: s for n, s in present.items() if n in settled or not self._flaps(n, now)}
        if len(wanted) < len(members.voters) <= len(self._choose(members, promising)):
            awaited = ", ".join(sorted(set(promising) - set(settled)))
            return Advice(change=None, why=f"waits for {awaited} to be stable before voters are given up")
        learners = self._standby(members, settled, wanted, now)
        voting = {node for node in members.voters if node in present and self._seen[node].here} | {leader}
        change = next_change(
            members, wanted, learners=learners, caught_up=caught_up, present=voting, leader=leader
        )
        return self._explained(members, wanted, voting, change)

    # --- who is there ---

    def _present(
        self, members: Members, leader: NodeId, lost: frozenset[NodeId], now: float
    ) -> dict[NodeId, float]:
        """Who could vote, with the seconds for which each has been there. The leader comes before all; a
        voter that is away and not gone after all other voters."""
        present = {leader: inf}
        for node, seen in self._seen.items():
            if node == leader or node in lost:
                continue
            if seen.here and not (seen.draining and node not in members.voters):
                present[node] = now - seen.since
            elif node in members.voters and not self._gone(seen, now):
                present[node] = 0.0
        return present

    def _gone(self, seen: _Presence, now: float) -> bool:
        patience = self.policy.stable_s if seen.goodbye else self.policy.gone_s
        return not seen.here and now - seen.since >= patience

    def _required(self, node: NodeId, members: Members, now: float) -> float:
        """How long ``node`` must have been there; a member was judged when it was added."""
        falls = self._falls(node, now)
        if node in members.voters or (node in members.learners and not falls):
            return 0.0
        return self.policy.stable_s * float(2 ** min(FALLS_MAX, falls))

    def _falls(self, node: NodeId, now: float) -> int:
        return sum(now - fall <= FALL_MEMORY_S for fall in self._seen[node].falls)

    def _flaps(self, node: NodeId, now: float) -> bool:
        return self._falls(node, now) >= FLAPPING_FALLS

    def _fall(self, seen: _Presence, now: float) -> None:
        seen.falls = [*seen.falls, now][-FALLS_MAX:]
        seen.behind_since = None

    def _watch_catching_up(self, members: Members, caught_up: AbstractSet[NodeId], now: float) -> None:
        for node, seen in self._seen.items():
            if node not in members.learners or node in caught_up or not seen.here:
                seen.behind_since = None
            elif seen.behind_since is None:
                seen.behind_since = now
            elif now - seen.behind_since > CATCH_UP_S_MAX:
                self._fall(seen, now)
                seen.since = now

    def _forget(self, now: float) -> None:
        """Keep no record of those who are away longer than anything here remembers."""
        memory_s = max(FALL_MEMORY_S, self.policy.gone_s)
        away = [node for node, seen in self._seen.items() if not seen.here]
        away.sort(key=lambda node: (self._seen[node].since, node))
        surplus = len(self._seen) - RECORDS_MAX
        for position, node in enumerate(away):
            if position < surplus or now - self._seen[node].since > memory_s:
                del self._seen[node]

    # --- who should vote ---

    def _choose(self, members: Members, present: Mapping[NodeId, float]) -> tuple[NodeId, ...]:
        return choose_voters(members, present, target=self.policy.target, enough_s=0.0)

    def _standby(
        self,
        members: Members,
        settled: Mapping[NodeId, float],
        wanted: tuple[NodeId, ...],
        now: float,
    ) -> tuple[NodeId, ...]:
        """The node that is one too many for an odd number of voters, kept ready as a learner."""
        if len(wanted) >= self.policy.target:
            return ()
        spare = [node for node in settled if node not in wanted]
        spare = spare or [
            n for n in members.learners if n not in wanted and not self._gone(self._seen[n], now)
        ]
        spare.sort(key=lambda n: (n not in members.learners, -settled.get(n, 0.0), n))
        return tuple(spare[:1])

    def _explained(
        self, members: Members, wanted: tuple[NodeId, ...], voting: AbstractSet[NodeId], change: Change | None
    ) -> Advice:
        """The change in words, unless a majority would be missing after it."""
        if change is None:
            behind = [node for node in wanted if node in members.learners]
            if behind:
                return Advice(change=None, why=f"waits for {', '.join(behind)} to catch up")
            have = f"{_count(members.voters, 'voter')} and {_count(members.learners, 'learner')}"
            return Advice(change=None, why=f"{have}, as it should be")
        after = changed(members, change)
        if len(voting & set(after.voters) | ({change.node} & set(after.voters))) < after.quorum:
            return Advice(
                change=None, why=f"waits for voters that are away, or {change.node} costs a majority"
            )
        return Advice(change=change, why=_words(change, members, wanted))


def _count(nodes: tuple[NodeId, ...], what: str) -> str:
    return f"{len(nodes) or 'no'} {what}{'' if len(nodes) == 1 else 's'}"


def _words(change: Change, members: Members, wanted: tuple[NodeId, ...]) -> str:
    match change:
        case AddLearner(node=node):
            what = "to vote later" if node in wanted else "to stand by"
            return f"{node} has been stable and is added as a learner, {what}"
        case Promote(node=node):
            return f"{node} has caught up and becomes a voter; there should be {len(wanted)}"
        case Remove(node=node):
            what = "learner" if node in members.learners else "voter"
            return f"{node} is removed as a {what}; there should be {_count(wanted, 'voter')} without it"
