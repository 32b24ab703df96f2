"""Replication, commits and snapshots, held to the paper and the dissertation."""

from __future__ import annotations

import pytest
from raft_bench import Bench, log, members, of_kind

from fieldmesh.core.events import Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import (
    AddLearner,
    Append,
    AppendReply,
    Apply,
    Chunk,
    ChunkReply,
    Compact,
    Post,
    Propose,
    Proposed,
    RaftConfig,
    Restore,
    Role,
    Save,
    Saved,
)

ABC = members("abc")


class TestAppend:
    """Paper, figure 2, AppendEntries."""

    def test_entries_whose_predecessor_differs_are_refused_with_a_hint(self) -> None:
        bench = Bench(logs={"b": "1122"})
        effects = bench.give("b", "a", 5, Append(prev_index=7, prev_term=4, entries=()))
        assert bench.replies(effects, AppendReply)[0] == AppendReply(
            ok=False, index=5, prev_index=7, hint_term=2, version=1
        )

    def test_a_late_message_with_a_prefix_costs_nothing(self) -> None:
        """Rule 3: only a conflict removes entries; the tail may be acknowledged already."""
        bench = Bench(logs={"b": "11"})
        entries = log("1133", ABC)
        bench.give("b", "a", 3, Append(prev_index=3, prev_term=1, entries=entries[3:]))
        effects = bench.give("b", "a", 3, Append(prev_index=1, prev_term=1, entries=entries[1:3]))
        assert bench.nodes["b"].log.last_index == 5
        assert of_kind(effects, Save) == []
        assert bench.replies(effects, AppendReply)[0].index == 3

    def test_a_conflict_removes_what_follows(self) -> None:
        bench = Bench(logs={"b": "1122"})
        bench.give("b", "a", 3, Append(prev_index=3, prev_term=1, entries=log("113", ABC)[3:]))
        assert [entry.term for entry in bench.stores["b"].entries] == [1, 1, 1, 3]

    def test_an_answer_comes_after_its_save(self) -> None:
        effects = Bench().give("b", "a", 3, Append(prev_index=1, prev_term=1, entries=log("3", ABC)[1:]))
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Save) < kinds.index(Post)

    def test_only_what_was_verified_is_acknowledged(self) -> None:
        bench = Bench(logs={"b": "1122"})
        effects = bench.give("b", "a", 5, Append(prev_index=2, prev_term=1))
        assert bench.replies(effects, AppendReply)[0].index == 2

    def test_entries_do_not_commit_an_unverified_tail(self) -> None:
        """Rule 5: the tail after the last new entry may not be the leader's."""
        bench = Bench(logs={"b": "1122"})
        bench.give("b", "a", 5, Append(prev_index=1, prev_term=1, entries=log("1", ABC)[1:], commit=5))
        assert bench.nodes["b"].log.commit == 2

    def test_a_heartbeat_does_not_commit_an_unverified_tail(self) -> None:
        bench = Bench(logs={"b": "1122"})
        bench.give("b", "a", 5, Append(prev_index=1, prev_term=1, commit=5))
        assert bench.nodes["b"].log.commit == 1

    def test_entries_are_applied_once_and_in_order(self) -> None:
        bench = Bench(logs={"b": "1122"})
        bench.give("b", "a", 2, Append(prev_index=5, prev_term=2, commit=3))
        bench.give("b", "a", 2, Append(prev_index=5, prev_term=2, commit=2))
        bench.give("b", "a", 2, Append(prev_index=5, prev_term=2, commit=5))
        applied = [entry.index for apply in of_kind(bench.effects["b"], Apply) for entry in apply.entries]
        assert applied == [1, 2, 3, 4, 5]


class TestBacktracking:
    """Paper §5.3 and figure 7: every follower comes to the leader's log."""

    @pytest.mark.parametrize(
        "terms", ["11445566", "114", "1144556666", "11445566677", "114444", "1122233333"], ids=list("abcdef")
    )
    def test_every_log_of_figure_7_converges(self, terms: str) -> None:
        bench = Bench(logs={"a": "114455666", "b": "11445566", "c": terms}, term=7)
        bench.elect("a", "ab")
        bench.pass_time(1.0)
        assert bench.stores["c"].entries == bench.stores["a"].entries
        assert bench.nodes["c"].log.commit == bench.nodes["a"].log.last_index

    def test_whole_terms_are_skipped(self) -> None:
        bench = Bench(
            "abc", logs={"a": "1" + "5" * 50, "b": "1" + "5" * 50, "c": "1" + "2" * 25 + "3" * 25}, term=6
        )
        bench.elect("a", "ab")
        bench.wire.clear()
        bench.pass_time(0.3)
        refusals = [body for body in bench.replies(bench.effects["c"], AppendReply) if not body.ok]
        assert 1 <= len(refusals) <= 4
        assert bench.nodes["c"].log.last_index == bench.nodes["a"].log.last_index


class TestCommit:
    """Paper §5.3 and §5.4.2."""

    def test_an_entry_of_an_older_term_is_not_committed_by_counting(self) -> None:
        """Figure 8: it commits with an entry of the leader's own term, or never."""
        bench = Bench(logs={"a": "2", "b": "2"}, term=3)
        leader = bench.lead_alone("a", "b")
        bench.give("a", "b", leader.term, AppendReply(ok=True, index=2))
        assert leader.log.commit == 0
        bench.give("a", "b", leader.term, AppendReply(ok=True, index=3))
        assert leader.log.commit == 3

    def test_acknowledgements_of_an_older_term_do_not_count(self) -> None:
        bench = Bench()
        old = bench.lead_alone("a", "b").term
        bench.handle("a", Propose(commands=(b"x",)))
        bench.give("a", "c", old + 1, Append(prev_index=0, prev_term=0))
        leader = bench.lead_alone("a", "b")
        commit = leader.log.commit
        bench.give("a", "b", old, AppendReply(ok=True, index=leader.log.last_index))
        assert leader.log.commit == commit
        assert leader.dropped["stale_term"] == 1

    def test_two_of_four_do_not_commit(self) -> None:
        bench = Bench("abcd")
        leader = bench.elect("a")
        commit = leader.log.commit
        bench.handle("a", Propose(commands=(b"x",)))
        bench.settle("ab")
        assert leader.log.commit == commit

    def test_learners_do_not_count(self) -> None:
        bench = Bench("abc", "de")
        leader = bench.elect("a")
        commit = leader.log.commit
        bench.handle("a", Propose(commands=(b"x",)))
        bench.settle("ade")
        assert leader.log.commit == commit
        bench.pass_time(0.3, "abde")
        assert leader.log.commit == commit + 1

    def test_the_own_entry_counts_when_it_is_durable(self) -> None:
        """Dissertation §10.2.1: Appends go out before the own Save, which may be the slowest."""
        bench = Bench()
        leader = bench.elect("a")
        bench.autosave = False
        effects = bench.handle("a", Propose(commands=(b"x",)))
        save = of_kind(effects, Save)[0]
        kinds = [type(effect) for effect in effects]
        assert kinds.index(Post) < kinds.index(Save)
        index = leader.log.last_index
        bench.give("a", "b", leader.term, AppendReply(ok=True, index=index))
        assert leader.log.commit == index - 1
        bench.handle("a", Saved(sequence=save.sequence))
        assert leader.log.commit == index

    def test_a_majority_commits_without_the_leaders_disk(self) -> None:
        bench = Bench()
        leader = bench.elect("a")
        bench.autosave = False
        bench.handle("a", Propose(commands=(b"x",)))
        for follower in "bc":
            bench.give("a", follower, leader.term, AppendReply(ok=True, index=leader.log.last_index))
        assert leader.log.commit == leader.log.last_index

    def test_a_replaced_entry_is_not_durable_because_its_place_was(self) -> None:
        bench = Bench()
        bench.autosave = False
        first = bench.give("b", "a", 2, Append(prev_index=1, prev_term=1, entries=log("22", ABC)[1:]))
        bench.give("b", "c", 3, Append(prev_index=1, prev_term=1, entries=log("33", ABC)[1:]))
        bench.handle("b", Saved(sequence=of_kind(first, Save)[0].sequence))
        assert bench.nodes["b"].log.durable_index == 1


class TestWindow:
    """Pipelining with a bounded window (dissertation §10.2.1)."""

    CONFIG = RaftConfig(window_messages_max=3, append_entries_max=1)

    def test_at_most_so_many_appends_are_under_way(self) -> None:
        bench = Bench(config=self.CONFIG)
        bench.elect("a")
        for _ in range(10):
            bench.handle("a", Propose(commands=(b"x",)))
        sent = [w for w in bench.wire if w.to == "b" and isinstance(w.message.body, Append)]
        assert len(sent) == 3
        bench.settle()
        assert bench.nodes["b"].log.last_index == bench.nodes["a"].log.last_index

    def test_a_lost_window_is_sent_again(self) -> None:
        bench = Bench(config=self.CONFIG)
        bench.elect("a")
        for _ in range(10):
            bench.handle("a", Propose(commands=(b"x",)))
        bench.wire.clear()
        bench.pass_time(0.5)
        assert bench.nodes["c"].log.commit == bench.nodes["a"].log.last_index

    def test_a_lost_window_that_was_compacted_is_missed(self) -> None:
        bench = Bench(config=RaftConfig(window_messages_max=3, append_entries_max=1, trailing_entries_max=0))
        leader = bench.elect("a")
        for _ in range(10):
            bench.handle("a", Propose(commands=(b"x",)))
            bench.settle("ab")
        bench.handle("a", Compact(index=leader.applied, data=b"state"))
        bench.pass_time(1.0)
        assert bench.nodes["c"].log.commit == leader.log.last_index

    def test_too_much_uncommitted_is_refused(self) -> None:
        bench = Bench(config=RaftConfig(uncommitted_bytes_max=100))
        bench.elect("a")
        first = bench.handle("a", Propose(commands=(b"x" * 100,)))
        second = bench.handle("a", Propose(commands=(b"x",)))
        assert of_kind(first, Proposed)
        assert [effect.reason.value for effect in second] == ["busy"]


class TestSnapshots:
    """Paper §7 and figure 13."""

    def chunk(self, data: bytes, offset: int, total: int, *, index: int = 3, term: int = 1) -> Chunk:
        return Chunk(index=index, index_term=term, members=ABC, offset=offset, total_bytes=total, data=data)

    def test_a_follower_without_the_entries_gets_chunks(self) -> None:
        bench = Bench(config=RaftConfig(chunk_bytes_max=3, trailing_entries_max=0))
        leader = bench.elect("a", "ab")
        bench.handle("a", Propose(commands=(b"x", b"y")))
        bench.settle("ab")
        bench.handle("a", Compact(index=leader.applied, data=b"the state"))
        bench.pass_time(1.0)
        restored = of_kind(bench.effects["c"], Restore)
        assert [effect.snapshot.data for effect in restored] == [b"the state"]
        assert bench.stores["c"].snapshot.index == bench.stores["a"].snapshot.index
        assert len(bench.replies(bench.effects["c"], ChunkReply)) == 2

    def test_lost_chunks_are_sent_again(self) -> None:
        bench = Bench(config=RaftConfig(chunk_bytes_max=3, trailing_entries_max=0))
        leader = bench.elect("a", "ab")
        bench.handle("a", Compact(index=leader.applied, data=b"the state"))
        for _ in range(3):
            bench.now += 0.2
            bench.handle("a", Tick())
            bench.wire.clear()
            bench.handle("a", Tick())
            bench.pass_time(0.16, "ac")
            bench.wire.clear()
        bench.pass_time(1.0)
        assert bench.nodes["c"].log.commit == leader.log.last_index

    def test_a_log_that_holds_the_last_entry_keeps_what_follows(self) -> None:
        """Step 6: the tail may have been acknowledged, and is not known to be committed."""
        bench = Bench(logs={"b": "1122"})
        effects = bench.give("b", "a", 5, self.chunk(b"s", 0, 1))
        assert of_kind(effects, Restore) == []
        assert (bench.nodes["b"].log.last_index, bench.nodes["b"].log.commit) == (5, 3)

    def test_a_log_that_differs_is_replaced(self) -> None:
        bench = Bench(logs={"b": "1122"})
        effects = bench.give("b", "a", 5, self.chunk(b"s", 0, 1, index=4, term=3))
        assert of_kind(effects, Restore)[0].snapshot.index == 4
        assert bench.stores["b"].entries == ()
        assert bench.replies(effects, AppendReply) == [AppendReply(ok=True, index=4, version=1)]

    def test_chunks_of_two_leaders_are_not_mixed(self) -> None:
        bench = Bench()
        bench.give("b", "a", 5, self.chunk(b"old", 0, 6, index=9, term=4))
        bench.give("b", "c", 6, self.chunk(b"new", 0, 6, index=9, term=4))
        effects = bench.give("b", "c", 6, self.chunk(b"er!", 3, 6, index=9, term=4))
        assert [effect.snapshot.data for effect in of_kind(effects, Restore)] == [b"newer!"]

    def test_a_snapshot_names_the_members_of_its_time(self) -> None:
        bench = Bench("abc")
        leader = bench.elect("a")
        bench.handle("a", AddLearner(node=NodeId("z")))
        assert leader.log.members == members("abc", "z")
        bench.handle("a", Compact(index=leader.applied, data=b"s"))
        assert bench.stores["a"].snapshot.members == members("abc")

    def test_a_node_starts_again_from_its_snapshot(self) -> None:
        bench = Bench("a")
        leader = bench.elect("a")
        bench.handle("a", Compact(index=leader.applied, data=b"s"))
        bench.handle("a", Propose(commands=(b"x",)))
        again = bench.boot("a")
        assert (again.applied, again.log.last_index) == (2, 3)
        assert bench.elect("a").role is Role.LEADER

    def test_what_is_not_committed_does_not_make_compaction_due(self) -> None:
        bench = Bench(config=RaftConfig(compact_bytes=500))
        leader = bench.elect("a")
        bench.handle("a", Propose(commands=(b"x" * 400, b"y" * 400)))
        assert not leader.compaction_due
        bench.settle()
        assert leader.compaction_due
        bench.handle("a", Compact(index=leader.applied, data=b"s"))
        assert not leader.compaction_due

    def test_what_was_not_applied_cannot_be_compacted(self) -> None:
        bench = Bench("a")
        bench.elect("a")
        with pytest.raises(ValueError, match="cannot compact"):
            bench.handle("a", Compact(index=99, data=b"s"))
