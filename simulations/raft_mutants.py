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
    function = original.fget if isinstance(original, property) else original
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
    ),
    Mutant(
        name="vote reset on step-down",
        target="raft:Raft._follow",
        old="if self.leadership is not None:",
        new="if term == self.term and self.role is not Role.FOLLOWER: self._set_hard(vote=None)\n    if self.leadership is not None:",
    ),
    Mutant(
        name="even quorum off by one",
        target="raft_model:Members.quorum",
        old="len(self.voters) // 2 + 1",
        new="(len(self.voters) + 1) // 2",
    ),
    Mutant(
        name="unconditional truncation",
        target="raft_log:Log.merge",
        old="if self.term_at(entry.index) == entry.term:",
        new="if False:",
    ),
    Mutant(
        name="commit of an older term's entry",
        target="raft_leader:Leadership.commit_index",
        old=" and self.log.term_at(index) == self.term",
        new="",
    ),
    Mutant(
        name="commit over an unverified tail by append",
        target="raft_follower:Follower.on_append",
        old="min(append.commit, verified)",
        new="min(append.commit, self.log.last_index if entries else verified)",
    ),
    Mutant(
        name="commit over an unverified tail by heartbeat",
        target="raft_follower:Follower.on_append",
        old="min(append.commit, verified)",
        new="min(append.commit, verified if entries else self.log.last_index)",
    ),
    Mutant(
        name="commit over an unverified tail by snapshot",
        target="raft_follower:Follower._install",
        old="self.log.commit_to(snapshot.index)",
        new="self.log.commit_to(self.log.last_index)",
    ),
    Mutant(
        name="no up-to-date check",
        target="raft_log:Log.up_to_date",
        old="return (last_term, last_index) >= (self.last_term, self.last_index)",
        new="return True",
    ),
    Mutant(
        name="read without quorum",
        target="raft_leader:Leadership.proven_reads",
        old="proven = sorted(rounds, reverse=True)[self.log.members.quorum - 1]",
        new="proven = ROUND_MAX",
    ),
    Mutant(
        name="acknowledgements of an older term",
        target="raft:Raft._receive",
        old="if term < self.term:",
        new="if term < self.term and not isinstance(body, AppendReply):",
    ),
    Mutant(
        name="send before sync",
        target="raft:Raft._flush",
        old="early = self.role is Role.LEADER and not self._hard_changed",
        new="early = True",
    ),
    Mutant(
        name="two membership changes at once",
        target="raft_leader:Leadership.refusal_of",
        old="self.log.members_index > self.log.commit",
        new="False",
    ),
    Mutant(
        name="membership change before the term's first commit",
        target="raft_leader:Leadership.refusal_of",
        old="self.log.commit < self.first_index",
        new="False",
    ),
    Mutant(
        name="read before the term's first commit",
        target="raft_leader:Leadership._start_read_round",
        old="self.log.commit < self.first_index or not self._reads_waiting",
        new="not self._reads_waiting",
    ),
    Mutant(
        name="own entry counts before its save",
        target="raft_leader:Leadership._match",
        old="self.log.durable_index",
        new="self.log.last_index",
    ),
    Mutant(
        name="learners count for commits",
        target="raft_leader:Leadership.commit_index",
        old="voters = self.log.members.voters",
        new="voters = self.log.members.all",
    ),
    Mutant(
        name="members of removed entries stay",
        target="raft_log:Log.truncate_after",
        old="while self._members[-1][0] > index:",
        new="while False:",
    ),
    Mutant(
        name="acknowledgement beyond what was verified",
        target="raft_follower:Follower.on_append",
        old="self._matches(verified, append.round)",
        new="self._matches(self.log.last_index, append.round)",
    ),
    Mutant(
        name="snapshot throws away a matching tail",
        target="raft_follower:Follower._install",
        old="self.log.term_at(snapshot.index) == snapshot.term",
        new="False",
    ),
    Mutant(
        name="replaced entries count as saved",
        target="raft_log:Log._not_durable_after",
        old="self.durable_index = min(self.durable_index, index)",
        new="return",
    ),
    Mutant(
        name="a node without a log votes",
        target="raft:Raft._on_vote",
        old="and self.log.last_index > 0",
        new="",
    ),
    Mutant(
        name="snapshot with members of later entries",
        target="raft_log:Log.compact",
        old="members=self.members_at(index)",
        new="members=self.members",
    ),
    Mutant(
        name="votes despite a live leader",
        target="raft:Raft._hears_leader",
        old="self._now - self._heard < self.config.election_timeout_s",
        new="False",
    ),
    Mutant(
        name="leads on without a majority",
        target="raft:Raft._tick",
        old="self._now - leadership.quorum_contact(self._now) >= self.config.election_timeout_s",
        new="False",
    ),
    Mutant(
        name="no search for the last match",
        target="raft_leader:Leadership._backtrack",
        old="return self.log.last_match_candidate(min(reply.index, reply.prev_index - 1), reply.hint_term) + 1",
        new="return reply.prev_index + 1",
    ),
    Mutant(
        name="lost entries that were compacted are never missed",
        target="raft_leader:Leadership._ping",
        old="progress.probe(progress.match + 1)",
        new="pass",
    ),
    Mutant(
        name="a chunk of another term's snapshot",
        target="raft:Raft._follow",
        old="self.follower.forget_chunks()",
        new="pass",
    ),
    Mutant(
        name="a retry is done again",
        target="settings:_once",
        old="known = session.outcomes.get(command.sequence)",
        new="known = None",
    ),
    Mutant(
        name="a stale compare-and-set succeeds",
        target="settings:_write",
        old="change.expected_revision != present",
        new="change.expected_revision > present",
    ),
    Mutant(
        name="an answer for another leader's entry",
        target="consensus:Consensus._apply",
        old="if term == entry.term and outcome is not None:",
        new="if term and outcome is not None:",
    ),
)
