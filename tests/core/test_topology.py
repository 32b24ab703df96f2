"""The choice of voters over time: growth, shrinkage, patience, and what holds on every way there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from raft_bench import members

from fieldmesh.core import settings
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Address, Load, Member, MeshView, NodeId, NodeState
from fieldmesh.core.raft_leader import changed
from fieldmesh.core.raft_model import AddLearner, Change, Members, Promote, Remove
from fieldmesh.core.settings_schema import VOTERS_POLICY, validate
from fieldmesh.core.topology import CATCH_UP_S_MAX, RECORDS_MAX, Advice, Topology, VoterPolicy

POLICY = VoterPolicy(stable_s=10.0, gone_s=60.0)
A, B, C, D, E, F, G = (NodeId(name) for name in "abcdefg")


def view(
    here: str,
    *,
    away: str = "",
    left: str = "",
    incarnations: dict[str, int] | None = None,
    draining: str = "",
) -> MeshView:
    states = {
        **dict.fromkeys(here, NodeState.ALIVE),
        **dict.fromkeys(away, NodeState.DEAD),
        **dict.fromkeys(left, NodeState.LEFT),
    }
    return MeshView(
        local=A,
        members=tuple(
            Member(
                id=NodeId(name),
                name=name,
                address=Address(host="10.0.0.1", port=1),
                state=state,
                incarnation=(incarnations or {}).get(name, 1),
                load=Load(draining=name in draining),
            )
            for name, state in sorted(states.items())
        ),
    )


@dataclass
class Story:
    """One leader (a) that looks at the mesh; ``now`` moves as told."""

    now: float = 0.0
    topology: Topology = field(default_factory=lambda: Topology(POLICY))

    def see(self, here: str, for_s: float = 0.0, **others: str) -> None:
        self.topology.observe(view(here, **others), self.now)  # type: ignore[arg-type]
        self.now += for_s

    def advise(self, who: Members, caught_up: str = "", lost: str = "", pending: bool = False) -> Advice:
        return self.topology.advise(
            who,
            leader=A,
            caught_up={NodeId(n) for n in caught_up},
            lost=[NodeId(n) for n in lost],
            pending=pending,
            now=self.now,
        )

    def change(self, who: Members, caught_up: str = "", lost: str = "") -> Change | None:
        return self.advise(who, caught_up, lost).change


class TestGrowth:
    def test_one_node_is_a_mesh(self) -> None:
        story = Story()
        story.see("a", 1000)
        assert story.change(members("a")) is None

    def test_two_nodes_are_a_voter_and_a_learner(self) -> None:
        story = Story()
        story.see("ab", 11)
        assert story.change(members("a")) == AddLearner(node=B)
        assert story.change(members("a", "b"), "b") is None

    def test_a_node_must_have_been_there_for_a_while(self) -> None:
        story = Story()
        story.see("ab", 9)
        assert story.change(members("a")) is None
        story.now += 1
        assert story.change(members("a")) == AddLearner(node=B)

    def test_two_learners_are_caught_up_before_either_votes(self) -> None:
        story = Story()
        story.see("abc", 11)
        assert story.change(members("a", "b"), "b") == AddLearner(node=C)
        assert story.change(members("a", "bc"), "b") is None
        assert "catch up" in story.advise(members("a", "bc"), "b").why
        assert story.change(members("a", "bc"), "bc") == Promote(node=B)
        assert story.change(members("ab", "c"), "c") == Promote(node=C)

    def test_four_nodes_are_three_voters_and_a_learner_and_five_are_five_voters(self) -> None:
        story = Story()
        story.see("abcde", 11)
        assert story.change(members("abc")) == AddLearner(node=D)
        assert story.change(members("abc", "d"), "d") == AddLearner(node=E)
        assert story.change(members("abc", "de"), "de") == Promote(node=D)
        assert story.change(members("abcde")) is None

    def test_the_target_is_not_passed(self) -> None:
        story = Story()
        story.see("abcdefg", 1000)
        assert story.change(members("abcde")) is None

    def test_who_falls_must_be_there_for_longer_each_time(self) -> None:
        story = Story()
        story.see("ab", 11)
        story.see("a", 1, away="b")
        story.see("ab", 19)
        assert story.change(members("a")) is None
        story.now += 1
        assert story.change(members("a")) == AddLearner(node=B)

    def test_a_restart_between_two_looks_is_a_fall(self) -> None:
        story = Story()
        story.see("ab", 11)
        story.topology.observe(view("ab", incarnations={"b": 2}), story.now)
        story.now += 11
        assert story.change(members("a")) is None

    def test_a_learner_that_does_not_catch_up_gives_way(self) -> None:
        story = Story()
        story.see("abcd", 11)
        now = members("a", "bc")
        for _ in range(int(CATCH_UP_S_MAX) + 1):
            assert story.change(now, "b") is None
            story.now += 1
        assert story.change(now, "b") == AddLearner(node=D)

    def test_a_node_that_is_leaving_is_not_taken_in(self) -> None:
        story = Story()
        story.see("ab", 11, draining="b")
        assert story.change(members("a")) is None


class TestShrinkage:
    def test_a_voter_that_is_away_keeps_its_vote_until_it_is_gone_for_good(self) -> None:
        story = Story()
        story.see("abc", 11)
        story.see("ab", 59, away="c")
        assert story.change(members("abc")) is None
        story.now += 1
        assert story.change(members("abc")) == Remove(node=C)
        assert story.change(members("ab")) == Remove(node=B)
        assert story.change(members("a")) == AddLearner(node=B)

    def test_who_said_goodbye_is_not_waited_for_as_long(self) -> None:
        story = Story()
        story.see("abc", 11)
        story.see("ab", 10, left="c")
        assert story.change(members("abc")) == Remove(node=C)

    def test_a_voter_that_nobody_has_ever_seen_is_given_the_same_patience(self) -> None:
        story = Story()
        story.see("ab")
        assert story.change(members("abc")) is None
        story.now += 60
        assert story.change(members("abc")) == Remove(node=C)

    def test_a_stable_node_takes_the_place_of_one_that_is_gone(self) -> None:
        story = Story()
        story.see("abcd", 11)
        story.see("abd", 60, away="c")
        assert story.change(members("abc")) == AddLearner(node=D)
        assert story.change(members("abc", "d"), "d") == Promote(node=D)
        assert story.change(members("abcd")) == Remove(node=C)

    def test_a_vote_is_not_given_up_while_a_successor_becomes_stable(self) -> None:
        story = Story()
        story.see("abc", 11)
        story.see("ab", 55, away="c")
        story.see("abd", 9, away="c")
        advice = story.advise(members("abc"))
        assert advice.change is None
        assert "waits for d" in advice.why
        story.now += 1
        assert story.change(members("abc")) == AddLearner(node=D)

    def test_a_voter_without_its_log_is_taken_out_and_taken_in_again(self) -> None:
        story = Story()
        story.see("abc", 100)
        assert story.change(members("abc"), lost="c") == Remove(node=C)

    def test_nothing_is_advised_that_costs_a_majority(self) -> None:
        story = Story()
        story.see("abcde", 11)
        story.see("abc", 60, away="de")
        story.see("ab", 1, away="cde")  # no majority: a leader would step down; it must not be misled before
        advice = story.advise(members("abcde"))
        assert advice.change is None
        assert "majority" in advice.why


class TestPolicy:
    def test_it_can_be_switched_off(self) -> None:
        story = Story()
        story.topology.policy = VoterPolicy(automatic=False)
        story.see("abc", 1000)
        assert VOTERS_POLICY in story.advise(members("a")).why
        assert story.change(members("a")) is None

    def test_nothing_is_advised_while_a_change_is_under_way(self) -> None:
        story = Story()
        story.see("abc", 1000)
        assert story.advise(members("a"), pending=True).change is None

    def test_a_lower_target_shrinks_the_mesh_and_keeps_its_leader(self) -> None:
        story = Story()
        story.topology.policy = VoterPolicy(target=1, stable_s=10, gone_s=60)
        story.see("abc", 1000)
        assert story.change(members("abc")) in (Remove(node=B), Remove(node=C))
        assert story.change(members("ab")) == Remove(node=B)
        assert story.change(members("a")) is None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (None, VoterPolicy()),
            ('{"automatic": false}', VoterPolicy(automatic=False)),
            (
                '{"automatic": true, "target": 3, "stable_s": 5, "gone_s": 7.5}',
                VoterPolicy(target=3, stable_s=5, gone_s=7.5),
            ),
            ('{"automatic": true, "from_the_future": 1}', VoterPolicy()),
        ],
    )
    def test_it_is_read_from_the_configuration(self, text: str | None, expected: VoterPolicy) -> None:
        values = {VOTERS_POLICY: settings.Value(text=text, revision=1)} if text is not None else {}
        assert VoterPolicy.of(settings.State(values=values)) == expected

    @pytest.mark.parametrize("value", [{}, {"automatic": 1}, {"automatic": True, "gone_s": -1}])
    def test_a_policy_that_cannot_be_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidRequest):
            validate([settings.Change(key=VOTERS_POLICY, value=json.dumps(value))])

    def test_records_are_bounded(self) -> None:
        topology = Topology(POLICY)
        for start in range(3):
            nodes = tuple(
                Member(
                    id=NodeId(f"{start}-{n}"),
                    name="n",
                    address=Address(host="10.0.0.1", port=1),
                    state=NodeState.ALIVE,
                    incarnation=1,
                )
                for n in range(RECORDS_MAX // 2)
            )
            topology.observe(MeshView(local=A, members=nodes), float(start))
        assert len(topology._seen) <= RECORDS_MAX


# --- any story ---------------------------------------------------------------------------

TICK_S = 2.0
NAMES = "abcdefg"


class Model:
    """A mesh in virtual time: nodes come and go, a leader asks for advice, changes take a tick to commit."""

    def __init__(self) -> None:
        self.now = 0.0
        self.up = {"a"}
        self.left: set[str] = set()
        self.incarnations = dict.fromkeys(NAMES, 1)
        self.known: set[str] = {"a"}
        self.members = members("a")
        self.leader: str | None = "a"
        self.topologies = {"a": Topology(POLICY)}
        self.pending: Change | None = None
        self.learner_since: dict[str, float] = {}
        self.even_since: float | None = None
        self.changes = 0

    def set_up(self, name: str, how: str) -> None:
        if how == "up" and name not in self.up:
            self.up.add(name)
            self.known.add(name)
            self.left.discard(name)
            self.incarnations[name] += 1
            self.topologies[name] = Topology(POLICY)
        elif how == "restart" and name in self.up:
            self.incarnations[name] += 1
            self.topologies[name] = Topology(POLICY)
            self.leader = None if self.leader == name else self.leader
        elif how in ("down", "goodbye") and name in self.up:
            self.up.discard(name)
            del self.topologies[name]
            self.left |= {name} if how == "goodbye" else set()

    @property
    def voters_up(self) -> list[str]:
        return [voter for voter in self.members.voters if voter in self.up]

    def tick(self) -> None:
        self.now += TICK_S
        if len(self.voters_up) < self.members.quorum:
            self.leader, self.pending = None, None
        elif self.leader not in self.voters_up:
            self.leader, self.pending = self.voters_up[0], None
        seen = view(
            "".join(sorted(self.up)),
            away="".join(sorted(self.known - self.up - self.left)),
            left="".join(sorted(self.left)),
            incarnations=self.incarnations,
        )
        for topology in self.topologies.values():
            topology.observe(seen, self.now)
        if self.leader is not None:
            self.lead(self.topologies[self.leader], NodeId(self.leader))
        if len(self.members.voters) % 2:
            self.even_since = None
        elif self.even_since is None:
            self.even_since = self.now

    def lead(self, topology: Topology, leader: NodeId) -> None:
        self.learner_since = {n: self.learner_since.get(n, self.now) for n in self.members.learners}
        caught_up = {
            NodeId(n) for n, since in self.learner_since.items() if self.now - since >= 4 and n in self.up
        }
        advice = topology.advise(
            self.members,
            leader=leader,
            caught_up=caught_up,
            lost=(),
            pending=self.pending is not None,
            now=self.now,
        )
        if self.pending is not None:
            assert advice.change is None
            self.members, self.pending = changed(self.members, self.pending), None
            self.changes += 1
        elif advice.change is not None:
            after = changed(self.members, advice.change)
            assert len([voter for voter in after.voters if voter in self.up]) >= after.quorum
            if isinstance(advice.change, Promote):
                assert advice.change.node in caught_up
                if self.members.voters == (leader,):
                    assert len(caught_up) >= 2
            self.pending = advice.change

    def run(self, for_s: float) -> None:
        until = self.now + for_s
        while self.now < until:
            self.tick()


events = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(["up", "up", "down", "goodbye", "restart"]),
        st.sampled_from([2.0, 8.0, 14.0, 40.0, 90.0]),
    ),
    max_size=25,
)


@hypothesis_settings(max_examples=150)
@given(events)
def test_every_story_keeps_its_majority_and_ends_at_the_right_voters_without_flapping(
    story: list[tuple[str, str, float]],
) -> None:
    model = Model()
    for name, how, then_s in story:
        model.set_up(name, how)
        model.run(then_s)
    # Of each life and death come at most: out, in as a learner, promoted; the same for a partner of parity.
    assert model.changes <= 6 * (len(story) + 1)
    model.run(16 * POLICY.stable_s + POLICY.gone_s + 60)
    if model.leader is None:
        return  # too many left at once: only people can decide what to do
    settled, changes = model.members, model.changes
    model.run(400)
    assert (model.members, model.changes) == (settled, changes)
    count = min(POLICY.target, len(model.up))
    count -= 1 - count % 2
    assert len(settled.voters) == count
    assert set(settled.all) <= model.up
    assert len(settled.learners) == (1 if len(model.up) > count < POLICY.target else 0)
    assert model.even_since is None
