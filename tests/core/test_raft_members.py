"""Membership changes, reads and what is dropped or refused; held to the dissertation's chapters 4 and 6."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raft_bench import Bench, log, members, of_kind, stored

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.events import Note, Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import choose_voters, founded, next_change, recovered
from fieldmesh.core.raft_model import (
    AddLearner,
    Append,
    AppendReply,
    Change,
    Chunk,
    Compact,
    Entry,
    EntryKind,
    Members,
    Promote,
    Propose,
    Proposed,
    RaftConfig,
    Read,
    ReadFailed,
    ReadReady,
    Refusal,
    Refused,
    Remove,
    Role,
    Saved,
    Stored,
)

A, B, C, D, E, X, Y = (NodeId(name) for name in "abcdexy")


def refusals(effects: list[object]) -> list[Refusal]:
    return [effect.reason for effect in effects if isinstance(effect, Refused)]


class TestChanges:
    """Dissertation §4.1 to §4.2, with the correction of July 2015."""

    def test_one_change_at_a_time(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.handle("a", AddLearner(node=X))
        assert refusals(bench.handle("a", AddLearner(node=Y))) == [Refusal.CHANGE_PENDING]
        bench.settle()
        assert of_kind(bench.handle("a", AddLearner(node=Y)), Proposed)

    def test_no_change_before_an_entry_of_the_term_is_committed(self) -> None:
        bench = Bench()
        bench.lead_alone("a", "b")
        assert refusals(bench.handle("a", Remove(node=C))) == [Refusal.TERM_NOT_COMMITTED]
        bench.pass_time(0.3)
        assert of_kind(bench.handle("a", Remove(node=C)), Proposed)

    def test_a_change_counts_as_soon_as_it_is_in_the_log(self) -> None:
        bench = Bench("ab")
        leader = bench.elect("a")
        bench.handle("a", Remove(node=B))
        assert leader.log.members == members("a")
        assert leader.log.commit == leader.log.last_index

    def test_a_change_that_is_removed_from_the_log_counts_no_more(self) -> None:
        bench = Bench()
        entries = (
            *log("", members("abc")),
            Entry(index=2, term=2, kind=EntryKind.MEMBERS, data=members("ab").encode()),
        )
        bench.give("b", "c", 2, Append(prev_index=1, prev_term=1, entries=entries[1:]))
        assert bench.nodes["b"].log.members == members("ab")
        bench.give("b", "a", 3, Append(prev_index=1, prev_term=1, entries=log("3", members("abc"))[1:]))
        assert bench.nodes["b"].log.members == members("abc")

    def test_a_learner_is_promoted_only_when_caught_up(self) -> None:
        bench = Bench("abc", "x", config=RaftConfig(catch_up_entries_max=5))
        bench.elect("a", "abc")
        bench.handle("a", Propose(commands=(b"c",) * 10))
        bench.settle("abc")
        assert refusals(bench.handle("a", Promote(node=X))) == [Refusal.NOT_CAUGHT_UP]
        bench.pass_time(1.0)
        assert of_kind(bench.handle("a", Promote(node=X)), Proposed)

    def test_a_leader_that_is_removed_leads_until_that_is_committed(self) -> None:
        """§4.2.2: it does not count itself in majorities meanwhile."""
        bench = Bench()
        leader = bench.elect("a")
        bench.handle("a", Remove(node=A))
        commit = leader.log.commit
        bench.settle("ab")
        assert (leader.role, leader.log.commit) == (Role.LEADER, commit)
        bench.pass_time(0.3)
        assert leader.role is Role.FOLLOWER
        assert leader.deadline is None
        bench.pass_time(5.0, "bc")
        assert {bench.nodes[n].role for n in "bc"} == {Role.LEADER, Role.FOLLOWER}

    def test_a_voter_that_its_own_log_removes_campaigns_until_that_is_committed(self) -> None:
        """§4.2.2: a removes itself from two voters and falls; b lacks the entry, so only a can be elected."""
        bench = Bench("ab")
        leader = bench.elect("a")
        bench.handle("a", Remove(node=A))
        bench.wire.clear()
        bench.pass_time(1.0, "a")
        assert leader.role is Role.FOLLOWER
        bench.pass_time(20.0)
        assert bench.nodes["b"].log.members == members("b")
        assert (bench.nodes["b"].role, leader.deadline) == (Role.LEADER, None)

    def test_a_change_that_the_voters_who_are_there_could_not_commit_is_refused(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.pass_time(2.0, "ab")
        assert refusals(bench.handle("a", Remove(node=B))) == [Refusal.NO_MAJORITY_AFTERWARDS]
        assert of_kind(bench.handle("a", Remove(node=C)), Proposed)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (AddLearner(node=B), Refusal.ALREADY_MEMBER),
            (Promote(node=B), Refusal.NOT_LEARNER),
            (Promote(node=X), Refusal.NOT_LEARNER),
            (Remove(node=X), Refusal.NOT_MEMBER),
        ],
    )
    def test_a_change_that_makes_no_sense_is_refused(self, change: Change, reason: Refusal) -> None:
        bench = Bench()
        bench.elect("a")
        assert refusals(bench.handle("a", change)) == [reason]

    def test_the_last_voter_stays(self) -> None:
        bench = Bench("a")
        bench.elect("a")
        assert refusals(bench.handle("a", Remove(node=A))) == [Refusal.LAST_VOTER]

    def test_a_follower_refuses_and_names_the_leader(self) -> None:
        bench = Bench()
        bench.elect("a")
        for event in (Propose(commands=(b"x",)), AddLearner(node=X)):
            assert bench.handle("b", event) == [Refused(reason=Refusal.NOT_LEADER, leader=A)]

    def test_a_fresh_node_becomes_a_voter(self) -> None:
        bench = Bench("a", fresh="x")
        leader = bench.elect("a")
        bench.handle("a", AddLearner(node=X))
        bench.pass_time(1.0)
        assert bench.nodes["x"].log.last_index == leader.log.last_index
        bench.handle("a", Promote(node=X))
        bench.pass_time(1.0)
        assert bench.nodes["x"].electable


class TestPlan:
    """Growth and shrinkage, a change at a time."""

    def plan(self, now: Members, wanted: str, caught_up: str = "", gone: str = "") -> Change | None:
        present = {node for node in now.all if node not in gone}
        voters = tuple(NodeId(node) for node in wanted)
        return next_change(now, voters, caught_up={NodeId(n) for n in caught_up}, present=present, leader=A)

    def test_growth_from_one_to_three_has_two_caught_up_learners_first(self) -> None:
        assert self.plan(members("a"), "abc") == AddLearner(node=B)
        assert self.plan(members("a", "b"), "abc", "b") == AddLearner(node=C)
        assert self.plan(members("a", "bc"), "abc", "b") is None
        assert self.plan(members("a", "bc"), "abc", "bc") == Promote(node=B)
        assert self.plan(members("ab", "c"), "abc", "c") == Promote(node=C)
        assert self.plan(members("abc"), "abc") is None

    def test_the_leader_is_removed_last(self) -> None:
        assert self.plan(members("abc"), "c") == Remove(node=B)
        assert self.plan(members("ac"), "c") == Remove(node=A)

    def test_who_is_gone_is_removed_before_others(self) -> None:
        """Else a shrinking log may end with two voters of which one will never answer."""
        assert self.plan(members("abcde"), "a", gone="d") == Remove(node=D)

    def test_a_lost_voter_is_replaced_before_it_is_removed(self) -> None:
        assert self.plan(members("abc", "d"), "abd", "d", gone="c") == Promote(node=D)
        assert self.plan(members("abcd"), "abd", gone="c") == Remove(node=C)

    def test_two_nodes_are_one_voter(self) -> None:
        assert choose_voters(members("a"), {A: 9.0, B: 9.0}, target=3, enough_s=1.0) == (A,)

    def test_unstable_nodes_are_not_chosen(self) -> None:
        stable = {A: 9.0, B: 9.0, C: 0.5}
        assert choose_voters(members("a"), stable, target=3, enough_s=1.0) == (A,)
        assert choose_voters(members("a"), {**stable, C: 2.0}, target=3, enough_s=1.0) == (A, B, C)

    def test_present_voters_are_kept(self) -> None:
        stable = {A: 1.0, B: 1.0, C: 1.0, D: 99.0, E: 99.0}
        assert choose_voters(members("abc"), stable, target=3, enough_s=1.0) == (A, B, C)

    def test_voters_that_are_gone_are_replaced(self) -> None:
        assert choose_voters(members("abc"), {A: 5.0, B: 5.0, D: 5.0}, target=3, enough_s=1.0) == (A, B, D)

    @given(
        voters=st.sets(st.sampled_from([A, B, C, D, E]), min_size=1),
        learners=st.sets(st.sampled_from([X, Y]), max_size=2),
        wanted=st.sets(st.sampled_from([A, B, C, D, E, X, Y]), min_size=1),
    )
    def test_every_plan_ends_at_what_is_wanted(
        self, voters: set[NodeId], learners: set[NodeId], wanted: set[NodeId]
    ) -> None:
        now = Members(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))
        for _ in range(20):
            change = next_change(
                now,
                tuple(sorted(wanted)),
                caught_up=set(now.learners),
                present=voters,
                leader=now.voters[0],
            )
            if change is None:
                break
            now = applied(now, change)
            assert now.voters
        assert now == Members(voters=tuple(sorted(wanted)))


def applied(now: Members, change: Change) -> Members:
    voters, learners = set(now.voters), set(now.learners)
    voters.discard(change.node)
    learners.discard(change.node)
    if isinstance(change, AddLearner):
        learners.add(change.node)
    if isinstance(change, Promote):
        voters.add(change.node)
    return Members(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))


class TestAVoterThatLostItsLog:
    """A wiped disk under an old name is no voter: what it had acknowledged and voted for is forgotten."""

    def wiped(self) -> Bench:
        bench = Bench(logs={"a": "11", "b": "11"})
        bench.stores["b"] = Stored()
        bench.boot("b")
        return bench

    def test_it_is_not_filled_again(self) -> None:
        bench = self.wiped()
        leader = bench.elect("a", "ac")
        bench.pass_time(2.0)
        assert bench.nodes["b"].log.last_index == 0
        assert leader.status.lost_voters == (B,)

    def test_it_gives_no_majority_to_a_log_that_lacks_what_it_had_acknowledged(self) -> None:
        """Entries 2 and 3 were committed by a and b; b was wiped; c must not be elected by it, ever."""
        bench = self.wiped()
        bench.pass_time(10.0, "bc")
        assert bench.nodes["c"].role is not Role.LEADER
        bench.elect("a", "ac")
        bench.pass_time(1.0)
        bench.pass_time(10.0, "bc")
        assert bench.nodes["b"].log.last_index == 0

    def test_it_comes_back_as_a_learner(self) -> None:
        bench = self.wiped()
        leader = bench.elect("a", "ac")
        bench.pass_time(1.0)
        for change in (Remove(node=B), AddLearner(node=B), Promote(node=B)):
            assert of_kind(bench.handle("a", change), Proposed)
            bench.pass_time(1.0)
        assert bench.nodes["b"].electable
        assert bench.nodes["b"].log.commit == leader.log.last_index
        assert leader.status.lost_voters == ()


class TestReads:
    """Dissertation §6.4: no clock is trusted."""

    def ready(self, effects: list[object]) -> list[int]:
        return [effect.id for effect in effects if isinstance(effect, ReadReady)]

    def test_a_read_waits_for_a_majority_to_answer_a_later_broadcast(self) -> None:
        bench = Bench()
        leader = bench.elect("a")
        assert leader.leadership is not None
        before = leader.leadership.round
        effects = bench.handle("a", Read(id=1))
        bench.wire.clear()
        early = bench.give("a", "b", leader.term, AppendReply(ok=True, index=2, round=before))
        late = bench.give("a", "b", leader.term, AppendReply(ok=True, index=2, round=before + 1))
        assert [self.ready(e) for e in (effects, early, late)] == [[], [], [1]]

    def test_a_new_leader_answers_no_read_before_it_has_committed(self) -> None:
        """Step 1: it does not know yet what is committed."""
        bench = Bench()
        leader = bench.lead_alone("a", "b")
        effects = bench.handle("a", Read(id=1))
        assert leader.leadership is not None
        effects += bench.give(
            "a", "b", leader.term, AppendReply(ok=True, index=1, round=leader.leadership.round)
        )
        assert self.ready(effects) == []
        bench.pass_time(0.5)
        assert self.ready(bench.effects["a"]) == [1]

    def test_reads_share_a_broadcast(self) -> None:
        bench = Bench()
        leader = bench.elect("a")
        assert leader.leadership is not None
        before = leader.leadership.round
        for read in range(50):
            bench.handle("a", Read(id=read))
        bench.settle()
        assert self.ready(bench.effects["a"]) == list(range(50))
        assert leader.leadership.round == before + 2

    def test_a_sole_voter_answers_at_once(self) -> None:
        bench = Bench("a", "x")
        bench.elect("a")
        assert self.ready(bench.handle("a", Read(id=1))) == [1]

    def test_a_follower_answers_none(self) -> None:
        bench = Bench()
        bench.elect("a")
        assert bench.handle("b", Read(id=3)) == [ReadFailed(id=3)]

    def test_too_many_reads_are_refused(self) -> None:
        bench = Bench(config=RaftConfig(reads_max=2))
        bench.elect("a")
        for read in range(3):
            bench.handle("a", Read(id=read))
        assert ReadFailed(id=2) in bench.effects["a"]


class TestRemoteNonsense:
    """What no correct member says is dropped and counted; the machine lives."""

    @pytest.mark.parametrize(
        "body",
        [
            Append(prev_index=1, prev_term=9),
            Append(prev_index=1, prev_term=1, entries=log("2222", members("abc"))[2:]),
            Append(prev_index=1, prev_term=1, entries=log("9", members("abc"))[1:]),
            Append(prev_index=2, prev_term=3, entries=log("12", members("abc"))[2:]),
            Append(
                prev_index=1,
                prev_term=1,
                entries=(Entry(index=2, term=2, kind=EntryKind.MEMBERS, data=b"junk"),),
            ),
            Append(
                prev_index=1,
                prev_term=1,
                entries=(Entry(index=2, term=2, kind=EntryKind.COMMAND, data=b"x" * 300_000),),
            ),
            Chunk(index=5, index_term=2, members=members("a"), offset=5, total_bytes=6, data=b"xx"),
            Chunk(index=5, index_term=9, members=members("a"), offset=0, total_bytes=1, data=b"x"),
            Chunk(index=5, index_term=2, members=members("a"), offset=0, total_bytes=1, data=b""),
            Chunk(index=5, index_term=2, members=Members(), offset=0, total_bytes=1, data=b"x"),
            Chunk(index=5, index_term=2, members=members("a"), offset=0, total_bytes=2**40, data=b"x"),
        ],
    )
    def test_a_malformed_message_is_dropped(self, body: Append | Chunk) -> None:
        bench = Bench()
        assert bench.give("b", "a", 3, body) == []
        assert bench.nodes["b"].dropped["malformed"] == 1
        assert bench.nodes["b"].term == 1

    def test_acknowledgements_of_what_does_not_exist_are_dropped(self) -> None:
        bench = Bench()
        leader = bench.elect("a")
        bench.give("a", "b", leader.term, AppendReply(ok=True, index=99))
        bench.give("a", "b", leader.term, AppendReply(ok=True, index=2, round=99))
        assert leader.dropped["malformed"] == 2

    def test_a_stranger_is_not_counted(self) -> None:
        bench = Bench()
        leader = bench.lead_alone("a", "b")
        bench.give("a", "z", leader.term, AppendReply(ok=True, index=2))
        assert (leader.log.commit, leader.dropped["stranger"]) == (0, 1)

    @pytest.mark.parametrize(("group", "epoch"), [("other", 0), ("bench", 1)])
    def test_another_log_is_refused_by_name(self, group: str, epoch: int) -> None:
        bench = Bench()
        effects = bench.give("b", "a", 9, Append(prev_index=0, prev_term=0), group=group, epoch=epoch)
        assert [effect.event for effect in of_kind(effects, Note)] == ["foreign_log"]
        assert (bench.nodes["b"].term, bench.nodes["b"].dropped["foreign"]) == (1, 1)
        assert bench.give("b", "a", 9, Append(prev_index=0, prev_term=0), group=group, epoch=epoch) == []


class TestLocalMisuse:
    """The host's own mistakes raise."""

    def test_time_does_not_run_backwards(self) -> None:
        bench = Bench()
        bench.now = -1.0
        with pytest.raises(ValueError, match="backwards"):
            bench.handle("a", Tick())

    @pytest.mark.parametrize("commands", [(), (b"x" * 300_000,)])
    def test_commands_have_limits(self, commands: tuple[bytes, ...]) -> None:
        with pytest.raises(ValueError, match="commands"):
            Bench().handle("a", Propose(commands=commands))

    def test_a_saved_answers_a_save(self) -> None:
        with pytest.raises(ValueError, match="Saved"):
            Bench().handle("a", Saved(sequence=1))

    def test_a_snapshot_has_a_limit(self) -> None:
        bench = Bench("a", config=RaftConfig(snapshot_bytes_max=10))
        bench.elect("a")
        with pytest.raises(ValueError, match="cannot compact"):
            bench.handle("a", Compact(index=2, data=b"x" * 11))

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"heartbeat_s": 0.0}, "heartbeat_s"),
            ({"heartbeat_s": 0.5}, "heartbeat_s"),
            ({"append_bytes_max": 1000}, "append_bytes_max"),
            ({"window_bytes_max": 1000}, "window_bytes_max"),
            ({"trailing_entries_max": -1}, "trailing_entries_max"),
            ({"voters_max": 0}, "voters_max"),
        ],
    )
    def test_inconsistent_limits_are_refused(self, change: dict[str, float], field: str) -> None:
        with pytest.raises(ConfigError) as caught:
            RaftConfig(**change).validate()  # type: ignore[arg-type]
        assert caught.value.field == field


class TestFoundingAndRecovery:
    """A log is founded once, and can go on from a lone survivor under another epoch."""

    def test_fresh_nodes_never_found_a_log_among_themselves(self) -> None:
        bench = Bench("", fresh="xyz")
        bench.pass_time(30.0)
        assert {(node.role, node.term) for node in bench.nodes.values()} == {(Role.FOLLOWER, 0)}

    def test_two_logs_that_meet_stay_two(self) -> None:
        """Founded in two halves: each goes on, and refuses the other by name."""
        bench = Bench("ab")
        bench.stores = {"a": founded(A, "one"), "b": founded(B, "two")}
        for name in "ab":
            bench.boot(name)
            bench.elect(name, "ab")
        for name, other in (("a", B), ("b", A)):
            bench.handle(name, AddLearner(node=other))
        bench.pass_time(3.0)
        assert [(n.hard.group, n.role) for n in bench.nodes.values()] == [
            ("one", Role.LEADER),
            ("two", Role.LEADER),
        ]
        refused = [note for note in of_kind(bench.effects["b"], Note) if note.event == "foreign_log"]
        assert ("group", "one") in refused[0].fields

    def test_a_founder_is_the_only_voter(self) -> None:
        start = founded(A, "mesh-1")
        assert Members.decode(start.entries[0].data) == members("a")
        assert (start.hard.group, start.hard.epoch) == ("mesh-1", 0)

    def test_a_log_needs_a_name(self) -> None:
        with pytest.raises(ValueError, match="name"):
            founded(A, "")

    def test_a_survivor_goes_on_alone(self) -> None:
        bench = Bench(logs={"a": "112"})
        bench.stores["a"] = recovered(bench.stores["a"], A)
        bench.boot("a")
        leader = bench.elect("a")
        assert leader.log.members == members("a")
        assert leader.log.commit == leader.log.last_index == 6

    def test_the_old_epoch_cannot_speak_to_the_new_one(self) -> None:
        bench = Bench()
        bench.stores["a"] = recovered(bench.stores["a"], A)
        bench.boot("a")
        bench.elect("a", "a")
        bench.pass_time(3.0)
        assert bench.nodes["a"].role is Role.LEADER
        assert "a" not in (bench.nodes["b"].leader, bench.nodes["c"].leader)

    def test_an_empty_store_cannot_be_recovered(self) -> None:
        with pytest.raises(ValueError, match="no log"):
            recovered(Bench("a", fresh="x").stores["x"], X)

    @given(
        voters=st.sets(st.text("abcdef0123", min_size=1, max_size=4), min_size=1, max_size=5),
        learners=st.sets(st.text("abcdef0123", min_size=1, max_size=4), max_size=3),
    )
    def test_members_survive_their_encoding(self, voters: set[str], learners: set[str]) -> None:
        names = Members(
            voters=tuple(NodeId(v) for v in sorted(voters)),
            learners=tuple(NodeId(v) for v in sorted(learners - voters)),
        )
        assert Members.decode(names.encode()) == names

    @given(st.binary(max_size=40))
    @settings(max_examples=200)
    def test_bytes_that_are_no_members_are_refused(self, data: bytes) -> None:
        try:
            decoded = Members.decode(data)
        except ValueError:
            return
        assert decoded.encode() == data

    def test_a_stored_log_with_a_gap_is_refused(self) -> None:
        start = stored("11", members("a"))
        bench = Bench("a")
        bench.stores["a"] = type(start)(hard=start.hard, entries=(start.entries[0], start.entries[2]))
        with pytest.raises(ValueError, match="gap"):
            bench.boot("a")
