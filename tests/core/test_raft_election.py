"""Elections, held to the paper and the dissertation: who may vote, for whom, and what must be durable."""

from __future__ import annotations

import pytest
from raft_bench import Bench, of_kind

from fieldmesh.core.events import Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import (
    Append,
    Company,
    Doubt,
    Post,
    PreVote,
    PreVoteReply,
    Read,
    ReadFailed,
    Role,
    RoleChanged,
    Save,
    TimeoutNow,
    Transfer,
    Vote,
    VoteReply,
)


class TestVotes:
    """Paper §5.2 and figure 2, RequestVote."""

    def test_a_vote_is_given_once_a_term(self) -> None:
        bench = Bench()
        first = bench.give("b", "a", 2, Vote(last_index=1, last_term=1))
        second = bench.give("b", "c", 2, Vote(last_index=1, last_term=1))
        again = bench.give("b", "a", 2, Vote(last_index=1, last_term=1))
        granted = [bench.replies(e, VoteReply)[0].granted for e in (first, second, again)]
        assert granted == [True, False, True]

    def test_a_vote_survives_a_crash(self) -> None:
        bench = Bench(term=2)
        bench.give("b", "a", 2, Vote(last_index=1, last_term=1))
        bench.boot("b")
        effects = bench.give("b", "c", 2, Vote(last_index=1, last_term=1))
        assert bench.replies(effects, VoteReply) == [VoteReply(granted=False)]

    def test_a_vote_is_durable_before_it_is_told(self) -> None:
        effects = Bench().give("b", "a", 2, Vote(last_index=1, last_term=1))
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Save) < kinds.index(Post)
        assert of_kind(effects, Save)[0].hard is not None

    def test_the_own_vote_is_durable_before_others_are_asked(self) -> None:
        bench = Bench()
        bench.now = 10.0
        bench.handle("a", Tick())
        effects = bench.give("a", "b", 2, PreVoteReply(granted=True))
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Save) < kinds.index(Post)
        assert bench.replies(effects, Vote)

    def test_the_own_vote_is_kept_when_the_election_fails(self) -> None:
        bench = Bench()
        bench.now = 10.0
        bench.handle("a", Tick())
        bench.give("a", "b", 2, PreVoteReply(granted=True))
        assert bench.nodes["a"].role is Role.CANDIDATE
        bench.now = 20.0
        bench.handle("a", Tick())
        effects = bench.give("a", "c", 2, Vote(last_index=1, last_term=1))
        assert bench.replies(effects, VoteReply) == [VoteReply(granted=False)]

    def test_a_leader_that_steps_down_in_its_term_keeps_its_vote(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.now += 10.0
        bench.handle("a", Tick())
        assert bench.nodes["a"].role is Role.FOLLOWER
        effects = bench.give("a", "c", term, Vote(last_index=9, last_term=term))
        assert bench.replies(effects, VoteReply) == [VoteReply(granted=False)]

    @pytest.mark.parametrize(("last_index", "last_term"), [(2, 1), (9, 1), (2, 2), (1, 1)])
    def test_no_vote_for_a_log_that_may_lack_committed_entries(self, last_index: int, last_term: int) -> None:
        """Paper §5.4.1: the voter's log ends with (3, term 2)."""
        bench = Bench(logs={"b": "12"})
        vote = bench.give("b", "a", 5, Vote(last_index=last_index, last_term=last_term))
        pre_vote = bench.give("b", "a", 6, PreVote(last_index=last_index, last_term=last_term))
        assert bench.replies(vote, VoteReply) == [VoteReply(granted=False)]
        assert bench.replies(pre_vote, PreVoteReply) == [PreVoteReply(granted=False)]

    @pytest.mark.parametrize(("last_index", "last_term"), [(3, 2), (4, 2), (2, 3)])
    def test_a_vote_for_a_log_that_is_up_to_date(self, last_index: int, last_term: int) -> None:
        bench = Bench(logs={"b": "12"})
        effects = bench.give("b", "a", 5, Vote(last_index=last_index, last_term=last_term))
        assert bench.replies(effects, VoteReply) == [VoteReply(granted=True)]

    def test_two_of_four_are_no_majority(self) -> None:
        bench = Bench("abcd")
        bench.now = 10.0
        bench.handle("a", Tick())
        bench.settle("ab")
        assert bench.nodes["a"].role is Role.PRE_CANDIDATE
        assert bench.elect("a", "abc").role is Role.LEADER

    def test_a_sole_voter_elects_itself(self) -> None:
        bench = Bench("a")
        assert bench.elect("a").log.commit == 2


class TestANodeWithoutALog:
    """Nobody founded a log on it: it serves and observes, and never decides."""

    def test_it_never_campaigns(self) -> None:
        assert Bench("abc", fresh="x").nodes["x"].deadline is None

    def test_it_never_votes(self) -> None:
        bench = Bench("abc", fresh="x")
        bench.give("x", "a", 1, Append(prev_index=0, prev_term=0))
        bench.now += 10.0
        effects = bench.give("x", "b", 2, Vote(last_index=0, last_term=0))
        pre_vote = bench.give("x", "c", 3, PreVote(last_index=0, last_term=0))
        assert bench.replies(effects, VoteReply) == [VoteReply(granted=False)]
        assert bench.replies(pre_vote, PreVoteReply) == [PreVoteReply(granted=False)]

    def test_it_takes_the_first_log_that_a_leader_sends_and_no_other(self) -> None:
        bench = Bench("abc", fresh="x")
        bench.give("x", "z", 1, Vote(last_index=1, last_term=1), group="theirs")
        assert bench.nodes["x"].hard.group == ""
        bench.give("x", "a", 1, Append(prev_index=0, prev_term=0), group="ours")
        bench.give("x", "z", 7, Append(prev_index=0, prev_term=0), group="theirs")
        assert (bench.nodes["x"].hard.group, bench.nodes["x"].term) == ("ours", 1)


class TestPreVoteAndLease:
    """Dissertation §9.6 and §4.2.3: a node that cannot win disturbs nobody."""

    def test_a_pre_vote_changes_nothing(self) -> None:
        bench = Bench()
        effects = bench.give("b", "a", 9, PreVote(last_index=1, last_term=1))
        assert bench.replies(effects, PreVoteReply) == [PreVoteReply(granted=True)]
        assert (bench.nodes["b"].term, bench.nodes["b"].hard.vote) == (1, None)
        assert of_kind(effects, Save) == []

    def test_a_node_that_is_cut_off_does_not_raise_its_term(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.pass_time(20.0, "c")
        assert bench.nodes["c"].term == term

    def test_a_node_that_returns_does_not_depose_the_leader(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        for _ in range(10):
            bench.pass_time(0.5, "ab")
        bench.handle("c", Tick())
        assert bench.nodes["c"].role is Role.PRE_CANDIDATE
        bench.settle()
        bench.pass_time(3.0)
        assert (bench.nodes["a"].role, bench.nodes["a"].term) == (Role.LEADER, term)

    def test_a_vote_is_not_even_considered_while_a_leader_is_heard(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        effects = bench.give("b", "c", term + 5, Vote(last_index=9, last_term=term))
        assert effects == []
        assert bench.nodes["b"].term == term

    def test_no_pre_vote_while_a_leader_is_heard(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        effects = bench.give("b", "c", term + 1, PreVote(last_index=9, last_term=term))
        assert bench.replies(effects, PreVoteReply) == [PreVoteReply(granted=False)]

    def test_a_granted_pre_vote_of_another_term_does_not_count(self) -> None:
        bench = Bench()
        bench.now = 10.0
        bench.handle("a", Tick())
        bench.give("a", "b", 7, PreVoteReply(granted=True))
        assert bench.nodes["a"].role is Role.PRE_CANDIDATE


class TestDoubt:
    """A hint of the host that the leader is gone. It shortens the wait of §4.2.3 to one heartbeat, no more:
    the pre-vote (§9.6) still asks the others, and the vote its log and term."""

    def test_the_followers_of_a_leader_that_is_gone_go_on_after_one_heartbeat(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        died = bench.now
        for follower in "bc":
            bench.handle(follower, Doubt(node=NodeId("a")))
        bench.pass_time(2.01 * bench.config.heartbeat_s, "bc")
        assert bench.now - died < bench.config.election_timeout_s
        assert [bench.nodes[n].role for n in "bc"].count(Role.LEADER) == 1
        assert bench.nodes["b"].term == term + 1

    def test_a_leader_that_is_heard_keeps_its_office_whatever_is_thought_of_it(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        for _ in range(200):
            for follower in "bc":
                bench.handle(follower, Doubt(node=NodeId("a")))
            bench.pass_time(0.05)
        assert (bench.nodes["a"].role, bench.nodes["a"].term) == (Role.LEADER, term)

    def test_one_follower_that_doubts_does_not_depose_a_leader_whom_others_hear(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.handle("c", Doubt(node=NodeId("a")))
        for _ in range(40):
            bench.pass_time(0.05, "ab")
            bench.handle("c", Tick())
            bench.settle("bc")
        assert bench.nodes["c"].role is Role.PRE_CANDIDATE
        assert (bench.nodes["a"].role, bench.nodes["b"].term) == (Role.LEADER, term)

    def test_no_vote_for_another_within_a_heartbeat_of_a_doubted_leader(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.handle("b", Doubt(node=NodeId("a")))
        effects = bench.give("b", "c", term + 1, PreVote(last_index=9, last_term=term))
        assert bench.replies(effects, PreVoteReply) == [PreVoteReply(granted=False)]
        bench.now += bench.config.heartbeat_s
        effects = bench.give("b", "c", term + 1, PreVote(last_index=9, last_term=term))
        assert bench.replies(effects, PreVoteReply) == [PreVoteReply(granted=True)]

    def test_a_word_of_the_leader_ends_the_doubt(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.handle("b", Doubt(node=NodeId("a")))
        bench.give("b", "a", term, Append(prev_index=0, prev_term=0))
        bench.now += bench.config.heartbeat_s
        effects = bench.give("b", "c", term + 1, PreVote(last_index=9, last_term=term))
        assert bench.replies(effects, PreVoteReply) == [PreVoteReply(granted=False)]

    @pytest.mark.parametrize("whom", ["a", "c", "nobody"])
    def test_doubt_of_those_who_do_not_lead_changes_nothing(self, whom: str) -> None:
        bench = Bench()
        bench.elect("b")
        due = bench.nodes["a"].deadline
        assert bench.handle("a", Doubt(node=NodeId(whom))) == []
        assert bench.nodes["a"].deadline == due


class TestCompany:
    """A heartbeat may go out early, so that it wakes nobody who is not woken anyway."""

    def test_a_heartbeat_that_is_due_soon_goes_along(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.pass_time(0.0)
        bench.now += 0.9 * bench.config.heartbeat_s
        effects = bench.handle("a", Company())
        assert [post.to for post in of_kind(effects, Post)] == ["b", "c"]
        assert bench.nodes["a"].leadership is not None
        assert bench.nodes["a"].leadership.heartbeat_due == bench.now + bench.config.heartbeat_s

    def test_one_that_has_just_gone_does_not(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.now += bench.config.heartbeat_s
        bench.handle("a", Tick())
        bench.now += 0.4 * bench.config.heartbeat_s
        assert bench.handle("a", Company()) == []

    def test_a_follower_has_none_to_send(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.now += bench.config.heartbeat_s
        assert bench.handle("b", Company()) == []


class TestCheckQuorum:
    """Dissertation §6.2: a leader that cannot reach a majority steps down."""

    def test_a_leader_without_a_majority_steps_down(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.pass_time(1.0, "a")
        assert bench.nodes["a"].role is Role.FOLLOWER

    def test_a_leader_with_a_majority_stays(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.pass_time(10.0, "ab")
        assert bench.nodes["a"].role is Role.LEADER

    def test_its_waiting_reads_fail(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.handle("a", Read(id=7))
        bench.wire.clear()
        bench.pass_time(1.0, "a")
        assert ReadFailed(id=7) in bench.effects["a"]


class TestTerms:
    """Paper §5.1."""

    def test_a_higher_term_makes_a_follower(self) -> None:
        bench = Bench()
        bench.elect("a")
        bench.give("a", "b", 50, Append(prev_index=0, prev_term=0))
        assert (bench.nodes["a"].role, bench.nodes["a"].leader) == (Role.FOLLOWER, "b")

    def test_a_leader_of_an_older_term_learns_the_newer_one(self) -> None:
        bench = Bench(term=5)
        effects = bench.give("b", "a", 3, Append(prev_index=0, prev_term=0))
        assert of_kind(effects, Post)[0].message.term == 5

    def test_two_leaders_of_one_term_are_not_both_followed(self) -> None:
        bench = Bench()
        bench.give("b", "a", 2, Append(prev_index=0, prev_term=0))
        assert bench.give("b", "c", 2, Append(prev_index=0, prev_term=0)) == []
        assert bench.nodes["b"].dropped["second_leader"] == 1

    def test_a_change_of_role_is_told(self) -> None:
        bench = Bench("a")
        bench.elect("a")
        assert of_kind(bench.effects["a"], RoleChanged)[-1] == RoleChanged(
            role=Role.LEADER, term=2, leader="a"
        )


class TestTransfer:
    """Dissertation §3.10."""

    def test_the_target_leads_without_waiting_for_a_timeout(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.handle("a", Transfer(to=bench.nodes["b"].me))
        bench.settle()
        assert (bench.nodes["b"].role, bench.nodes["b"].term) == (Role.LEADER, term + 1)

    def test_the_word_is_given_only_when_the_target_has_everything(self) -> None:
        bench = Bench()
        bench.lead_alone("a", "b")
        effects = bench.handle("a", Transfer(to=bench.nodes["b"].me))
        assert bench.replies(effects, TimeoutNow) == []
        bench.pass_time(0.3)
        assert bench.nodes["b"].role is Role.LEADER

    def test_the_office_is_kept_when_the_target_does_not_take_it(self) -> None:
        bench = Bench()
        leader = bench.elect("a")
        bench.handle("a", Transfer(to=bench.nodes["c"].me))
        bench.wire.clear()
        bench.pass_time(2.0, "ab")
        assert leader.role is Role.LEADER
        assert leader.leadership is not None and leader.leadership.handover is None

    def test_only_the_leader_can_ask_for_it(self) -> None:
        bench = Bench()
        term = bench.elect("a").term
        bench.give("b", "c", term, TimeoutNow())
        assert bench.nodes["b"].role is Role.FOLLOWER
