"""Seeded bugs: what the sweep and the directed tests must find, or they prove nothing.

Owns: a list of mutants, each one small change of one function of the core, and the means to put it in and
take it out again. A mutant names what catches it: ``sweep`` scenarios, or directed tests by name. Must not:
change the code on disk.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """``old`` occurs once in the source of ``target`` (module of fieldmesh.core, then the name in it)."""

    name: str
    target: str
    old: str
    new: str
    scenario: str = ""
    test: str = ""


@contextmanager
def seeded(mutant: Mutant) -> Iterator[None]:
    """The core with the mutant in it. Raises LookupError where the code has moved on without its mutant."""
    module_name, _, path = mutant.target.partition(":")
    module = import_module(f"fieldmesh.core.{module_name}")
    owner: Any = module
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = vars(owner)[name]
    function: Any = original.fget if isinstance(original, property) else original
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutant.old) != 1:
        raise LookupError(f"{mutant.name}: {mutant.old!r} occurs {source.count(mutant.old)} times")
    changed: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    code = compile(source.replace(mutant.old, mutant.new), f"<{mutant.name}>", "exec", flags)
    exec(code, vars(module), changed)
    setattr(owner, name, changed[name])
    try:
        yield
    finally:
        setattr(owner, name, original)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="vote not persisted",
        target="raft:Raft._on_vote",
        old="self._set_hard(vote=sender)",
        new="self.hard = replace(self.hard, vote=sender)",
        test="test_raft_election:TestVotes.test_a_vote_survives_a_crash",
    ),
    Mutant(
        name="vote reset on step-down",
        target="raft:Raft._follow",
        old="if term > self.term:",
        new="self._set_hard(vote=None)\n    if term > self.term:",
        scenario="raft_disks",
        test="test_raft_election:TestVotes.test_a_leader_that_steps_down_in_its_term_keeps_its_vote",
    ),
    Mutant(
        name="even quorum off by one",
        target="raft_model:Members.quorum",
        old="len(self.voters) // 2 + 1",
        new="(len(self.voters) + 1) // 2",
        scenario="raft_four",
        test="test_raft_replication:TestCommit.test_two_of_four_do_not_commit",
    ),
    Mutant(
        name="unconditional truncation",
        target="raft_log:Log.merge",
        old="if self.term_at(entry.index) == entry.term:",
        new="if False:",
        test="test_raft_replication:TestAppend.test_a_late_message_with_a_prefix_costs_nothing",
    ),
    Mutant(
        name="commit of an older term's entry",
        target="raft_leader:Leadership.commit_index",
        old=" and self.log.term_at(index) == self.term",
        new="",
        test="test_raft_replication:TestCommit.test_an_entry_of_an_older_term_is_not_committed_by_counting",
    ),
    Mutant(
        name="commit over an unverified tail by append",
        target="raft_follower:Follower.on_append",
        old="min(append.commit, verified)",
        new="min(append.commit, self.log.last_index if entries else verified)",
        test="test_raft_replication:TestAppend.test_entries_do_not_commit_an_unverified_tail",
    ),
    Mutant(
        name="commit over an unverified tail by heartbeat",
        target="raft_follower:Follower.on_append",
        old="min(append.commit, verified)",
        new="min(append.commit, verified if entries else self.log.last_index)",
        test="test_raft_replication:TestAppend.test_a_heartbeat_does_not_commit_an_unverified_tail",
    ),
    Mutant(
        name="commit over an unverified tail by snapshot",
        target="raft_follower:Follower._install",
        old="self.log.commit_to(snapshot.index)",
        new="self.log.commit_to(self.log.last_index)",
        test="test_raft_replication:TestSnapshots.test_a_log_that_holds_the_last_entry_keeps_what_follows",
    ),
    Mutant(
        name="no up-to-date check",
        target="raft_log:Log.up_to_date",
        old="return (last_term, last_index) >= (self.last_term, self.last_index)",
        new="return True",
        scenario="raft_four",
    ),
    Mutant(
        name="read without quorum",
        target="raft_leader:Leadership.proven_reads",
        old="proven = sorted(rounds, reverse=True)[self.log.members.quorum - 1]",
        new="proven = ROUND_MAX",
        test="test_raft_members:TestReads.test_a_read_waits_for_a_majority_to_answer_a_later_broadcast",
    ),
    Mutant(
        name="acknowledgements of an older term",
        target="raft:Raft._receive",
        old="if term < self.term:",
        new="if term < self.term and not isinstance(body, AppendReply):",
        test="test_raft_replication:TestCommit.test_acknowledgements_of_an_older_term_do_not_count",
    ),
    Mutant(
        name="send before sync",
        target="raft:Raft._flush",
        old="early = self.role is Role.LEADER and not self._hard_changed",
        new="early = True",
        scenario="raft_disks",
        test="test_raft_election:TestVotes.test_a_vote_is_durable_before_it_is_told",
    ),
    Mutant(
        name="two membership changes at once",
        target="raft_leader:Leadership.refusal_of",
        old="self.log.members_index > self.log.commit",
        new="False",
        test="test_raft_members:TestChanges.test_one_change_at_a_time",
    ),
    Mutant(
        name="membership change before the term's first commit",
        target="raft_leader:Leadership.refusal_of",
        old="self.log.commit < self.first_index",
        new="False",
        test="test_raft_members:TestChanges.test_no_change_before_an_entry_of_the_term_is_committed",
    ),
    Mutant(
        name="a removed voter is silent before that is committed",
        target="raft:Raft.electable",
        old="log.members_index > log.commit and",
        new="False and",
        test="test_raft_members:TestChanges.test_a_voter_that_its_own_log_removes_campaigns_until_that_is_committed",
    ),
    Mutant(
        name="a change that can never be committed",
        target="raft_leader:Leadership._could_commit",
        old="return len(there) >= members.quorum",
        new="return True",
        test="test_raft_members:TestChanges.test_a_change_that_the_voters_who_are_there_could_not_commit_is_refused",
    ),
    Mutant(
        name="read before the term's first commit",
        target="raft_leader:Leadership._start_read_round",
        old="self.log.commit < self.first_index or not self._reads_waiting",
        new="not self._reads_waiting",
        test="test_raft_members:TestReads.test_a_new_leader_answers_no_read_before_it_has_committed",
    ),
    Mutant(
        name="own entry counts before its save",
        target="raft_leader:Leadership._match",
        old="self.log.durable_index",
        new="self.log.last_index",
        test="test_raft_replication:TestCommit.test_the_own_entry_counts_when_it_is_durable",
    ),
    Mutant(
        name="learners count for commits",
        target="raft_leader:Leadership.commit_index",
        old="voters = self.log.members.voters",
        new="voters = self.log.members.all",
        test="test_raft_replication:TestCommit.test_learners_do_not_count",
    ),
    Mutant(
        name="members of removed entries stay",
        target="raft_log:Log.truncate_after",
        old="while self._members[-1][0] > index:",
        new="while False:",
        test="test_raft_members:TestChanges.test_a_change_that_is_removed_from_the_log_counts_no_more",
    ),
    Mutant(
        name="acknowledgement beyond what was verified",
        target="raft_follower:Follower.on_append",
        old="self._matches(verified, append.round)",
        new="self._matches(self.log.last_index, append.round)",
        test="test_raft_replication:TestAppend.test_only_what_was_verified_is_acknowledged",
    ),
    Mutant(
        name="snapshot throws away a matching tail",
        target="raft_follower:Follower._install",
        old="self.log.term_at(snapshot.index) == snapshot.term",
        new="False",
        test="test_raft_replication:TestSnapshots.test_a_log_that_holds_the_last_entry_keeps_what_follows",
    ),
    Mutant(
        name="replaced entries count as saved",
        target="raft_log:Log._not_durable_after",
        old="self.durable_index = min(self.durable_index, index)",
        new="return",
        scenario="raft_three",
        test="test_raft_replication:TestCommit.test_a_replaced_entry_is_not_durable_because_its_place_was",
    ),
    Mutant(
        name="a node without a log votes",
        target="raft:Raft._on_vote",
        old="and self.log.last_index > 0",
        new="",
        test="test_raft_election:TestANodeWithoutALog.test_it_never_votes",
    ),
    Mutant(
        name="snapshot with members of later entries",
        target="raft_log:Log.compact",
        old="members=self.members_at(index)",
        new="members=self.members",
        test="test_raft_replication:TestSnapshots.test_a_snapshot_names_the_members_of_its_time",
    ),
    Mutant(
        name="votes despite a live leader",
        target="raft:Raft._hears_leader",
        old="self._now - self._heard < patience_s",
        new="False",
        test="test_raft_election:TestPreVoteAndLease.test_a_vote_is_not_even_considered_while_a_leader_is_heard",
    ),
    Mutant(
        name="doubt ends the lease",
        target="raft:Raft._hears_leader",
        old="self.config.heartbeat_s if self._doubted",
        new="0.0 if self._doubted",
        test="test_raft_election:TestDoubt.test_no_vote_for_another_within_a_heartbeat_of_a_doubted_leader",
    ),
    Mutant(
        name="doubt outlives a word of the leader",
        target="raft:Raft._follow",
        old="self._doubted = False",
        new="pass",
        test="test_raft_election:TestDoubt.test_a_word_of_the_leader_ends_the_doubt",
    ),
    Mutant(
        name="leads on without a majority",
        target="raft:Raft._tick",
        old="self._now >= self._office_ends(leadership)",
        new="False",
        scenario="raft_clocks",
        test="test_raft_election:TestCheckQuorum.test_a_leader_without_a_majority_steps_down",
    ),
    Mutant(
        name="no search for the last match",
        target="raft_leader:Leadership._backtrack",
        old="min(reply.index, reply.prev_index - 1), reply.hint_term)",
        new="reply.prev_index - 1, self.term)",
        test="test_raft_replication:TestBacktracking.test_whole_terms_are_skipped",
    ),
    Mutant(
        name="lost entries that were compacted are never missed",
        target="raft_leader:Leadership._ping",
        old="progress.probe(progress.match + 1)",
        new="pass",
        test="test_raft_replication:TestWindow.test_a_lost_window_that_was_compacted_is_missed",
    ),
    Mutant(
        name="a chunk of another term's snapshot",
        target="raft:Raft._follow",
        old="self.follower.forget_chunks()",
        new="pass",
        test="test_raft_replication:TestSnapshots.test_chunks_of_two_leaders_are_not_mixed",
    ),
    Mutant(
        name="a voter that lost its log is filled again",
        target="raft_leader:Leadership.on_append_reply",
        old="progress.lost = True",
        new="progress.lost = False",
        test="test_raft_members:TestAVoterThatLostItsLog.test_it_is_not_filled_again",
    ),
    Mutant(
        name="a retry is done again",
        target="settings:_once",
        old="known = session.outcomes.get(command.sequence)",
        new="known = None",
        scenario="raft_compaction",
        test="test_settings:TestSessions.test_a_retry_is_not_done_again",
    ),
    Mutant(
        name="a stale compare-and-set succeeds",
        target="settings:_write",
        old="change.expected_revision != present",
        new="change.expected_revision > present",
        scenario="raft_one",
        test="test_settings:TestWrites.test_a_stale_expectation_changes_nothing",
    ),
    Mutant(
        name="an answer for another leader's entry",
        target="consensus:Consensus._apply",
        old="if term == entry.term and outcome is not None:",
        new="if term and outcome is not None:",
        test="test_consensus:test_a_command_whose_place_was_taken_is_reported_as_not_done",
    ),
)
