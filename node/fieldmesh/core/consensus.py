"""The log and what it means, stacked. Owns: which request waits for which entry, and when to compact.

Wraps ``core.raft`` (agreement) around ``core.settings`` (meaning): the host submits commands and reads, and
gets one answer each, or none if the outcome cannot be known (the office was lost in between: the host's own
timeout then reports *unknown*, and the same session and sequence may be submitted again). Must not: decide
anything about terms or values; both belong to the machines inside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from fieldmesh.core import settings
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft import Raft
from fieldmesh.core.raft_model import (
    Apply,
    Compact,
    EntryKind,
    Propose,
    Proposed,
    RaftConfig,
    RaftEffect,
    RaftEvent,
    Refusal,
    Refused,
    Restore,
    Stored,
)

WAITING_MAX = 8192
"""Commands that wait for their entry to be committed, at one leader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Do these commands; every request number gets an Answered or a NotDone, or stays unknown.

    Commands that may not be proposed (``settings_schema.validate``) must have been refused by the host.
    ``time_ms`` is the wall clock of this node; it is stamped into the commands.
    """

    requests: tuple[tuple[int, settings.Command], ...]
    time_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The command of ``request`` was committed and applied here."""

    request: int
    outcome: settings.Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class NotDone:
    """The command of ``request`` was not done and never will be. ``reason`` None: another leader's entry
    took its place."""

    request: int
    reason: Refusal | None
    leader: NodeId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """``Consensus.state`` is newer; ``applied`` is the index of the log that it stands for."""

    applied: int
    revision: int


ConsensusEvent = RaftEvent | Submit
ConsensusEffect = RaftEffect | Answered | NotDone | StateChanged


class Consensus:
    """One member's replica of the configuration."""

    def __init__(self, me: NodeId, config: RaftConfig, stored: Stored, rng: Random, now: float) -> None:
        self.raft = Raft(me, config, stored, rng, now)
        self.state = settings.restore(stored.snapshot.data)
        self.applied = stored.snapshot.index
        self._waiting: dict[int, tuple[int, int]] = {}  # entry index -> (term, request)

    @property
    def deadline(self) -> float | None:
        """When the next Tick is due."""
        return self.raft.deadline

    def handle(self, event: ConsensusEvent, now: float) -> list[ConsensusEffect]:
        """Take one event. Raises UpgradeNeeded when the log holds what this version cannot apply: the host
        must then stop this node's consensus, for going on would mean to skip it."""
        if isinstance(event, Submit):
            return self._submit(event, now)
        effects = self._interpret(self.raft.handle(event, now))
        if self.raft.compaction_due:
            compact = Compact(index=self.applied, data=settings.snapshot(self.state))
            effects += self._interpret(self.raft.handle(compact, now))
        return effects

    def _submit(self, event: Submit, now: float) -> list[ConsensusEffect]:
        refusal = self._refusal_of(event)
        if refusal is not None:
            return [self._not_done(request, refusal) for request, _ in event.requests]
        effects: list[ConsensusEffect] = []
        requests, commands = list[int](), list[bytes]()
        for request, command in event.requests:
            data = settings.encode(replace(command, time_ms=event.time_ms))
            if len(data) > self.raft.config.entry_bytes_max:
                effects.append(self._not_done(request, Refusal.TOO_LARGE))
                continue
            requests.append(request)
            commands.append(data)
        for effect in self.raft.handle(Propose(commands=tuple(commands)), now) if commands else ():
            if isinstance(effect, Proposed):
                for position, request in enumerate(requests):
                    self._waiting[effect.first_index + position] = (effect.term, request)
            elif isinstance(effect, Refused):
                effects += [self._not_done(request, effect.reason) for request in requests]
            else:
                effects.append(effect)
        return effects

    def _refusal_of(self, event: Submit) -> Refusal | None:
        if self.raft.leadership is None:
            return Refusal.NOT_LEADER
        if len(self._waiting) + len(event.requests) > WAITING_MAX:
            return Refusal.BUSY
        if self.raft.common_version < settings.COMMAND_VERSION:
            return Refusal.VERSION_UNKNOWN
        return None

    def _not_done(self, request: int, reason: Refusal | None) -> NotDone:
        return NotDone(request=request, reason=reason, leader=self.raft.leader)

    def _interpret(self, inner: list[RaftEffect]) -> list[ConsensusEffect]:
        effects: list[ConsensusEffect] = []
        for effect in inner:
            if isinstance(effect, Apply):
                effects += self._apply(effect)
            elif isinstance(effect, Restore):
                effects += self._restore(effect)
            else:
                effects.append(effect)
        return effects

    def _apply(self, effect: Apply) -> list[ConsensusEffect]:
        answers: list[ConsensusEffect] = []
        for entry in effect.entries:
            outcome = None
            if entry.kind is EntryKind.COMMAND:
                self.state, outcome = settings.apply(self.state, entry.index, entry.data)
            self.applied = entry.index
            term, request = self._waiting.pop(entry.index, (0, 0))
            if term == entry.term and outcome is not None:
                answers.append(Answered(request=request, outcome=outcome))
            elif term:
                answers.append(self._not_done(request, None))
        return [self._changed(), *answers]

    def _restore(self, effect: Restore) -> list[ConsensusEffect]:
        self.state = settings.restore(effect.snapshot.data)
        self.applied = effect.snapshot.index
        # The outcome of what was submitted before the jump is not known here any more.
        self._waiting = {index: asked for index, asked in self._waiting.items() if index > self.applied}
        return [self._changed()]

    def _changed(self) -> StateChanged:
        return StateChanged(applied=self.applied, revision=self.state.revision)

    def check(self) -> None:
        """Raise AssertionError where the two machines contradict each other."""
        self.raft.check()
        assert self.applied == self.raft.applied
        assert len(self._waiting) <= WAITING_MAX
