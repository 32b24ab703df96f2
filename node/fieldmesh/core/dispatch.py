"""The life of one request: attempts, failover, token continuity, exactly one end.

Owns: which node is tried next and when, what the caller gets to see, and when it is over. Must not:
choose by load (``routing`` does, through the function it is given), move bytes, or read a clock.

    begin ──► WAITING ◄──────────────┐ nobody can be asked now: until someone can,
                 │ route gives one   │ or patience or the deadline ends
                 ▼                   │
              RUNNING ── failed, nothing delivered ──► (next attempt, or WAITING)
                 │  ├─── failed, tokens delivered ───► ENDED: StreamLost
                 │  └─── its node begins to leave ───► RUNNING elsewhere, where that can be
                 ▼
               ENDED: one Finish or one Fail, never both, never neither

The caller's stream is one: chunks of a later attempt are delivered only where they join the earlier ones.

When the serving node begins to leave, another one that has the same profile and model goes on after the
tokens that were delivered. Until it has said something, the old attempt runs on and what it says is held
back: where the other refuses, the stream goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import assert_never

from fieldmesh.core import errors
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import (
    CHOICES_MAX,
    Ask,
    Attempt,
    CandidateNote,
    Chunk,
    Completion,
    Explanation,
    NodeId,
    NodeState,
    Result,
)
from fieldmesh.core.routing import Candidate, Decision

Route = Callable[[frozenset[NodeId], frozenset[NodeId]], Decision]
"""Routing over the present view: given the nodes that failed this request and those that were too full for
it. Raises FieldmeshError where nobody can serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """Bounds of one request's life.

    ``attempts_max``: nodes tried, the same one after a pause included; more than patience has pauses for.
    ``engines_lost_max``: engines that may end over one request before it is taken for the cause.
    ``patience_s``: how long a request waits in all for somebody who can serve it (an engine restarts in
    about a second, a death is noticed in two). ``retry_delay_s``: the first pause before nodes that failed
    are tried again; it doubles up to ``retry_delay_s_max`` and is jittered by half, so that callers of a
    lost node do not return in step. ``timeout_s``: the deadline of requests that came without one.
    """

    attempts_max: int = 16
    engines_lost_max: int = 3
    patience_s: float = 10.0
    retry_delay_s: float = 0.1
    retry_delay_s_max: float = 1.0
    timeout_s: float = 600.0

    def validate(self) -> None:
        """Raise ValueError where the bounds contradict each other."""
        if self.attempts_max < 1:
            raise ValueError("attempts_max must be at least 1")
        if not 0 < self.retry_delay_s <= self.retry_delay_s_max:
            raise ValueError("retry_delay_s must be above 0 and at most retry_delay_s_max")
        if self.patience_s < 0 or self.timeout_s <= 0:
            raise ValueError("patience_s must not be negative, timeout_s must be above 0")


# --- events ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A chunk came from the attempt of this epoch."""

    epoch: int
    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The attempt of this epoch ended well; ``relayed`` is what a node that passed it on further said."""

    epoch: int
    completion: Completion
    relayed: Result | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The attempt of this epoch ended with an error."""

    epoch: int
    error: FieldmeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewMoved:
    """The mesh looks different: states of the nodes that changed, and incarnations of those that restarted.

    A box that lost power and is back may leave a stream to its earlier life open for long. ``draining`` nodes
    have begun to leave.
    """

    states: Mapping[NodeId, NodeState]
    restarted: Mapping[NodeId, int] = field(default_factory=dict)
    draining: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The caller went away or asked for an end; ``error`` is what the stream ends with."""

    error: FieldmeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """The time that ``deadline`` asked for has come."""


DispatchEvent = Arrived | Ended | Failed | ViewMoved | Stop | Wake


# --- effects -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Go on after ``token_ids``, which were delivered. What was computed for them may be had from the attempt
    of ``epoch`` at ``node``, as long as that runs."""

    token_ids: tuple[int, ...]
    node: NodeId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Run the request at this candidate; by the node's own engine where its member is the local one."""

    epoch: int
    candidate: Candidate
    resumption: Resumption | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop the attempt of this epoch; nothing it says matters any more."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Give the caller this chunk."""

    chunk: Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """End the caller's stream well."""

    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """End the caller's stream with an error."""

    error: FieldmeshError


DispatchEffect = Start | Cancel | Deliver | Finish | Fail


@dataclass(slots=True, kw_only=True)
class _Leaving:
    """An attempt at a node that leaves, while another is to take over: what it said since then. ``lost``: it
    can say no more."""

    epoch: int
    candidate: Candidate
    first_index: int
    said: list[Arrived] = field(default_factory=list)
    lost: bool = False


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


_UNKNOWN_NAME = (errors.ProfileNotFound, errors.ModelNotFound, errors.DomainNotFound)
# What another node would answer differently. Everything else is the caller's own, or the deadline.
MOVES_ON = (
    errors.QueueFull,
    errors.TooManyStreams,
    errors.NoCandidate,
    errors.EngineLost,
    errors.EngineNotReady,
    errors.NodeUnreachable,
    errors.Draining,
    errors.StreamLost,
    errors.ProfileNotFound,
    errors.ModelNotFound,
    errors.HopLimit,
    errors.Internal,
)
# Before the first token, suspicion is enough to try elsewhere; a stream that flows is given up on proof only.
_GIVEN_UP_SILENT = (NodeState.SUSPECT, NodeState.UNREACHABLE, NodeState.DEAD, NodeState.LEFT)
_GIVEN_UP_STREAMING = (NodeState.UNREACHABLE, NodeState.DEAD)


SERVED = "served"
MOVED = "moved"
"""What an attempt that answered, or that another one took over from, has in place of an error's code."""

SETTLE_S = 5.0
"""How long a node that has just started waits for the owners of names that it does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a request entered: the node that tells the result.

    ``settled_at`` (on the clock of ``now``, ``SETTLE_S`` after the node's start): until then a name that the
    node does not know may belong to somebody whom it has not met yet.
    """

    node: NodeId
    name: str
    settled_at: float = float("-inf")


class Dispatch:
    """One request at the node it entered. See the module's docstring for its states.

    ``deadline_at`` is on the clock of ``now``. Call ``begin`` once, then ``handle``.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        generation_id: str,
        entry: Entry,
        route: Route,
        config: DispatchConfig,
        rng: Random,
        now: float,
        deadline_at: float | None = None,
    ) -> None:
        config.validate()
        self.ask = ask
        self.generation_id = generation_id
        self.phase = Phase.WAITING
        self.tokens_delivered = 0
        self._next_index: dict[int, int] = {}
        self.attempts: list[Attempt] = []
        self._entry = entry
        self._route = route
        self._config = config
        self._rng = rng
        self._begun_at = now
        self._deadline_at = deadline_at if deadline_at is not None else now + config.timeout_s
        self._first_token_at: float | None = None
        self._nodes_failed: set[NodeId] = set()
        self._nodes_full: set[NodeId] = set()
        self._decision: Decision | None = None
        self._candidate: Candidate | None = None
        self._epoch = self._epoch_last = -1
        self._epoch_first_index = 0
        self._delivered: list[int] = []
        self._leaving: _Leaving | None = None
        self._pauses = 0
        self._wait_until: float | None = None
        self._last_error: FieldmeshError | None = None
        self._engines_lost = 0

    def __repr__(self) -> str:
        return (
            f"Dispatch({self.ask.request_id}, {self.phase.value}, epoch={self._epoch}, "
            f"delivered={self.tokens_delivered})"
        )

    @property
    def deadline(self) -> float | None:
        """When a Wake is due; None once the request has ended."""
        if self.phase is Phase.ENDED:
            return None
        if self._wait_until is not None:
            return min(self._wait_until, self._deadline_at)
        return self._deadline_at

    @property
    def decision(self) -> Decision | None:
        """The latest decision who should serve; None before the first."""
        return self._decision

    @property
    def deadline_at(self) -> float:
        """When the request itself is over, on the clock of ``now``."""
        return self._deadline_at

    def begin(self, now: float) -> list[DispatchEffect]:
        """Take the first step."""
        if self._epoch != -1 or self.phase is not Phase.WAITING:
            raise RuntimeError("begin is called once")
        return self._next(now)

    def handle(self, event: DispatchEvent, now: float) -> list[DispatchEffect]:
        """Take one event; an ended request answers everything with nothing."""
        if self.phase is Phase.ENDED:
            return []
        leaving = self._leaving
        if (
            isinstance(event, Arrived | Ended | Failed)
            and leaving is not None
            and event.epoch == leaving.epoch
        ):
            return self._still_said(leaving, event, now)
        match event:
            case Arrived():
                return self._arrived(event, now)
            case Ended():
                return self._ended(event, now)
            case Failed():
                return self._failed(event.error, now) if self._runs(event.epoch) else []
            case ViewMoved():
                return self._view_moved(event, now)
            case Stop():
                return self._stop(event.error)
            case Wake():
                return self._wake(now)
            case _:
                assert_never(event)

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        assert (self.phase is Phase.RUNNING) == (self._candidate is not None), self
        assert (self.phase is Phase.WAITING) or self._wait_until is None, self
        assert len(self.attempts) <= self._config.attempts_max, self
        assert self._epoch_first_index <= self.tokens_delivered, self
        assert self._leaving is None or self.phase is Phase.RUNNING, self
        assert not self._single or len(self._delivered) == self.tokens_delivered, self
        assert (self.tokens_delivered > 0) <= (self._first_token_at is not None), self

    # --- the attempt that runs -----------------------------------------------------------

    def _runs(self, epoch: int) -> bool:
        return self.phase is Phase.RUNNING and epoch == self._epoch

    def _arrived(self, event: Arrived, now: float) -> list[DispatchEffect]:
        if not self._runs(event.epoch):
            return []
        chunk = event.chunk
        expected = self._next_index.get(chunk.index, 0)
        if chunk.first_token_index != expected or chunk.index >= CHOICES_MAX:
            gap = errors.Internal(
                f"tokens of completion {chunk.index} arrived from index {chunk.first_token_index}, "
                f"expected {expected}"
            )
            return [Cancel(epoch=self._epoch), *self._failed(gap, now)]
        if self._first_token_at is None and (chunk.token_ids or chunk.text):
            self._first_token_at = now
        self._next_index[chunk.index] = chunk.next_token_index
        self.tokens_delivered += len(chunk.token_ids)
        if self._single:
            self._delivered += chunk.token_ids
        delivered = replace(chunk, generation_id=self.generation_id, epoch=self._epoch)
        return [*self._taken_over(), Deliver(chunk=delivered)]

    def _ended(self, event: Ended, now: float) -> list[DispatchEffect]:
        if not self._runs(event.epoch):
            return []
        candidate, decision = self._candidate, self._decision
        assert candidate is not None
        assert decision is not None
        taken_over = self._taken_over()
        relayed = event.relayed
        if relayed is None:
            self._record(SERVED)
        else:
            self.attempts.extend(relayed.attempts[: self._config.attempts_max - len(self.attempts)])
        forwarded = candidate.member.id != self._entry.node
        result = Result(
            request_id=self.ask.request_id,
            generation_id=self.generation_id,
            completion=event.completion,
            profile=relayed.profile if relayed else candidate.offer.name,
            model=relayed.model if relayed else candidate.offer.model,
            domain=decision.domain,
            fallback=decision.fallback,
            entry_node=self._entry.node,
            entry_node_name=self._entry.name,
            served_by=relayed.served_by if relayed else candidate.member.id,
            served_by_name=relayed.served_by_name if relayed else candidate.member.name,
            attempts=tuple(self.attempts),
            hops=int(forwarded) + (relayed.hops if relayed else 0),
            ttft_s=(self._first_token_at if self._first_token_at is not None else now) - self._begun_at,
            duration_s=now - self._begun_at,
            explanation=explained(decision) if self.ask.explain else None,
        )
        self._end()
        return [*taken_over, Finish(result=result)]

    def _failed(self, error: FieldmeshError, now: float) -> list[DispatchEffect]:
        assert self._candidate is not None
        self._record(error.code)
        if self._leaving is not None and not self._leaving.lost:
            return self._go_back(self._leaving, now)
        self._last_error = error
        tried = self._nodes_full if isinstance(error, errors.QueueFull) else self._nodes_failed
        tried.add(self._candidate.member.id)
        self._candidate = None
        moves_on = isinstance(error, MOVES_ON)
        if self.tokens_delivered:
            return self._fail(self._lost_midway(error) if moves_on else error)
        self._engines_lost += isinstance(error, errors.EngineLost)
        if not moves_on or self._engines_lost >= self._config.engines_lost_max:
            return self._fail(error)
        return self._next(now)

    def _lost_midway(self, error: FieldmeshError) -> FieldmeshError:
        return errors.StreamLost(
            f"The serving node was lost after {self.tokens_delivered} tokens; ask again to start anew "
            f"({error.code}: {error.message})",
            metadata={"tokens_delivered": str(self.tokens_delivered), "cause": error.code},
        )

    def _view_moved(self, event: ViewMoved, now: float) -> list[DispatchEffect]:
        if self.phase is Phase.WAITING:
            # A pause after failures is not cut short by mere changes of load: it would use up the attempts.
            return self._next(now) if event.states or event.restarted or not self.attempts else []
        assert self._candidate is not None
        member = self._candidate.member
        state = event.states.get(member.id)
        if event.restarted.get(member.id, 0) > member.incarnation:
            why = "restarted"
        elif state is not None and state in (
            _GIVEN_UP_STREAMING if self.tokens_delivered else _GIVEN_UP_SILENT
        ):
            why = f"stopped answering ({state.value})"
        else:
            return self._move() if member.id in event.draining else []
        error = errors.NodeUnreachable(f"{member.name} {why}")
        return [Cancel(epoch=self._epoch), *self._failed(error, now)]

    # --- from a node that leaves to another ----------------------------------------------

    @property
    def _single(self) -> bool:
        """Whether one answer was asked for: several are not moved."""
        return self.ask.sampling.n in (None, 1)

    def _move(self) -> list[DispatchEffect]:
        """Let another node go on, where one has the same profile of the same model. Before the first token
        there is nothing to move, and what runs here cannot go anywhere without its caller."""
        left = self._candidate
        assert left is not None
        spare = self._config.attempts_max - len(self.attempts) >= 2
        if not (self._single and self.tokens_delivered and spare) or self._leaving is not None:
            return []
        if left.member.id == self._entry.node:
            return []
        try:
            decision = self._route(
                frozenset({*self._nodes_failed, left.member.id}), frozenset(self._nodes_full)
            )
        except FieldmeshError:
            return []
        wanted = left.offer.name, left.offer.fingerprint
        same = [c for c in decision.candidates if (c.offer.name, c.offer.fingerprint) == wanted]
        if not same:
            return []
        # The reader waits while it moves: not for a load or a queue, where another can go on at once.
        found = min(same, key=lambda c: (c.member.load.load_s(c.offer.name), not c.member.load.slots_free))
        self._leaving = _Leaving(epoch=self._epoch, candidate=left, first_index=self._epoch_first_index)
        resumption = Resumption(token_ids=tuple(self._delivered), node=left.member.id, epoch=self._epoch)
        return [self._start(found, resumption)]

    def _still_said(
        self, leaving: _Leaving, event: Arrived | Ended | Failed, now: float
    ) -> list[DispatchEffect]:
        """Something came from the attempt that is being left."""
        match event:
            case Arrived():
                leaving.said.append(event)
                return []
            case Ended():  # it was faster
                over = Cancel(epoch=self._epoch)
                self._record(errors.Cancelled.code)
                return [over, *self._go_back(leaving, now), *self.handle(event, now)]
            case Failed():
                leaving.lost = True
                return []

    def _taken_over(self) -> list[DispatchEffect]:
        """The other node goes on: the one that leaves is not needed any more."""
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return []
        self._record_one(
            leaving.candidate, leaving.epoch, leaving.first_index, self._epoch_first_index, MOVED
        )
        return [Cancel(epoch=leaving.epoch)]

    def _go_back(self, leaving: _Leaving, now: float) -> list[DispatchEffect]:
        """The other node cannot go on: the one that leaves does, as long as it may."""
        self._leaving = None
        self._candidate, self._epoch = leaving.candidate, leaving.epoch
        self._epoch_first_index = leaving.first_index
        return [effect for event in leaving.said for effect in self.handle(event, now)]

    def _cancels(self) -> list[DispatchEffect]:
        """Stop whatever runs for this request."""
        leaving = [Cancel(epoch=self._leaving.epoch)] if self._leaving is not None else []
        return [Cancel(epoch=self._epoch), *leaving]

    # --- the next attempt ----------------------------------------------------------------

    def _next(self, now: float) -> list[DispatchEffect]:
        """Start an attempt at the best node that is left, or wait, or give up."""
        self.phase = Phase.WAITING
        self._wait_until = None
        if now >= self._deadline_at:
            return self._fail(self._too_late())
        if len(self.attempts) >= self._config.attempts_max:
            return self._fail(self._last_error or errors.NoCandidate("No node could be asked"))
        try:
            decision = self._route(frozenset(self._nodes_failed), frozenset(self._nodes_full))
        except FieldmeshError as error:
            return self._nobody(error, now)
        self._decision = decision
        return [self._start(decision.candidates[0])]

    def _start(self, candidate: Candidate, resumption: Resumption | None = None) -> Start:
        self._candidate = candidate
        self._epoch = self._epoch_last = self._epoch_last + 1
        self._epoch_first_index = self.tokens_delivered
        self.phase = Phase.RUNNING
        return Start(epoch=self._epoch, candidate=candidate, resumption=resumption)

    def _nobody(self, error: FieldmeshError, now: float) -> list[DispatchEffect]:
        """Nobody is left to try: wait for somebody to come back, where that is likely to help."""
        # A mesh that is merely full says so at once: the caller knows better than we whether to wait.
        # Once somebody was tried, even "nobody offers this" may be the moment between two lives of its owner.
        worth_waiting = isinstance(error, errors.NoCandidate) or self._last_error is not None
        patience_left_s = self._begun_at + self._config.patience_s - now
        if not worth_waiting and isinstance(error, _UNKNOWN_NAME):
            worth_waiting = now < self._entry.settled_at
            patience_left_s = min(patience_left_s, self._entry.settled_at - now)
        if not worth_waiting or patience_left_s <= 0:
            return self._fail(error if error.retryable or self._last_error is None else self._last_error)
        delay_s = min(self._config.retry_delay_s * 2**self._pauses, self._config.retry_delay_s_max)
        self._pauses = min(self._pauses + 1, 16)
        self._nodes_failed.clear()
        self._nodes_full.clear()
        self._wait_until = now + min(delay_s * self._rng.uniform(0.5, 1.0), patience_left_s)
        return []

    def _wake(self, now: float) -> list[DispatchEffect]:
        if now >= self._deadline_at:
            running = self._cancels() if self.phase is Phase.RUNNING else []
            if running:
                self._record(errors.DeadlineExceeded.code)
            return [*running, *self._fail(self._too_late())]
        if self._wait_until is not None and now >= self._wait_until:
            return self._next(now)
        return []

    def _stop(self, error: FieldmeshError) -> list[DispatchEffect]:
        if self.phase is not Phase.RUNNING:
            return self._fail(error)
        self._record(error.code)
        lost = self.tokens_delivered and isinstance(error, MOVES_ON)
        return [*self._cancels(), *self._fail(self._lost_midway(error) if lost else error)]

    def _too_late(self) -> FieldmeshError:
        return errors.DeadlineExceeded(
            f"The request's deadline passed after {self.tokens_delivered} tokens",
            metadata={"tokens_delivered": str(self.tokens_delivered)},
        )

    # --- bookkeeping ---------------------------------------------------------------------

    def _record(self, reason: str) -> None:
        assert self._candidate is not None
        self._record_one(self._candidate, self._epoch, self._epoch_first_index, self.tokens_delivered, reason)

    def _record_one(self, candidate: Candidate, epoch: int, first: int, last: int, reason: str) -> None:
        self.attempts.append(
            Attempt(
                node=candidate.member.id,
                node_name=candidate.member.name,
                model_fingerprint=candidate.offer.fingerprint,
                epoch=epoch,
                first_token_index=first,
                last_token_index=last,
                reason=reason,
            )
        )

    def _fail(self, error: FieldmeshError) -> list[DispatchEffect]:
        self._end()
        return [Fail(error=error)]

    def _end(self) -> None:
        self.phase = Phase.ENDED
        self._candidate = self._leaving = None
        self._wait_until = None


def explained(decision: Decision) -> Explanation:
    """The decision as its asker gets to see it."""
    classification = decision.classification
    return Explanation(
        policy=decision.policy.value,
        classified_domain=(classification.domain or "") if classification else "",
        classified_confidence=classification.confidence if classification else 0.0,
        candidates=tuple(
            CandidateNote(
                node=candidate.member.id,
                node_name=candidate.member.name,
                profile=candidate.offer.name,
                score=candidate.score,
                eligible=candidate.eligible,
                reason=candidate.reason,
            )
            for candidate in decision.considered
        ),
    )
