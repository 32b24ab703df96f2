"""Runs one request: performs what ``core.dispatch`` decides, and lets readers follow it.

Owns: the attempt under way, its timer, the chunks delivered so far, and the log of recent requests by which
a repeat is answered and not done again. Must not: decide, or know how a client is spoken to.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import assert_never

from fieldmesh.core.dispatch import (
    MOVED,
    SERVED,
    Arrived,
    Cancel,
    Deliver,
    Dispatch,
    DispatchConfig,
    DispatchEffect,
    DispatchEvent,
    Ended,
    Entry,
    Fail,
    Failed,
    Finish,
    Phase,
    Start,
    Stop,
    ViewMoved,
    Wake,
    explained,
)
from fieldmesh.core.errors import (
    Cancelled,
    Draining,
    FieldmeshError,
    Internal,
    NodeUnreachable,
    RequestIdReused,
)
from fieldmesh.core.model import Ask, Chunk, Completion, NodeId, RequestId, Result
from fieldmesh.core.routing import Candidate, Decision
from fieldmesh.core.tracing import Span, SpanKind, Trace
from fieldmesh.engine.port import Started
from fieldmesh.rpc.snapshot import Flow
from fieldmesh.runtime import log
from fieldmesh.runtime.router import Router, need_of
from fieldmesh.runtime.tracing import answered, asked, attempt_of, decided, operation_of

KEY_CHARACTERS = 12
"""Of a generation's id, for the web page: enough to tell requests apart, too few to repeat one."""

AttemptEvent = Started | Chunk | Completion | Result
"""What an attempt yields: a Result where another node ran it, a Completion where our engine did."""

RunAttempt = Callable[["Generation", Start, Trace], AsyncIterator[AttemptEvent]]
"""What runs one attempt; the trace is for what belongs to it."""

SEED_BITS = 32

logger = log.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Bounds of the requests that one node holds.

    A generation pauses its source while its slowest reader is ``lag_tokens_max`` behind; the source then
    ends it when that lasts. Finished ones are kept for repeats, at most ``entries_max`` and ``kept_s`` long.
    """

    lag_tokens_max: int = 512
    entries_max: int = 1024
    kept_s: float = 300.0


class Generation:
    """One request while it runs and as long as repeats of it are answered."""

    def __init__(
        self,
        ask: Ask,
        *,
        generation_id: str,
        entry: Entry,
        router: Router,
        run_attempt: RunAttempt,
        dispatch_config: DispatchConfig,
        lag_tokens_max: int,
        deadline_s: float | None,
        path: tuple[NodeId, ...],
        hops_left: int,
        rng: Random,
        on_end: Callable[[Generation], None],
        trace: Trace,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        # What a change of the mesh starts later still belongs to this request: its log lines say so.
        self._context = contextvars.copy_context()
        self._began_at = now = self._loop.time()
        self.ask = ask
        self.asked = _seeded(ask, rng)
        self.path = path
        self.hops_left = hops_left
        self.outcome: Result | FieldmeshError | None = None
        self.ended_at = 0.0
        self.candidate: Candidate | None = None
        self.attempts = 0
        self.trace_id = trace.context.trace_id
        self._root = trace.begin(operation_of(ask), now, asked(ask), SpanKind.SERVER)
        self._trace = trace.under(self._root)
        self._entry = entry
        self._hops: dict[tuple[int, NodeId], Span | None] = {}
        self._pause: Span | None = None
        self._need = need_of(ask, path=path, hops_left=hops_left)
        self._router = router
        self._on_end = on_end
        self._run_attempt = run_attempt
        self._chunks: list[Chunk] = []
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._lag_tokens_max = lag_tokens_max
        self._readers: dict[object, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._dispatch = Dispatch(
            ask,
            generation_id=generation_id,
            entry=entry,
            route=self._route,
            config=dispatch_config,
            rng=rng,
            now=now,
            deadline_at=None if deadline_s is None else now + deadline_s,
        )

    def __repr__(self) -> str:
        return f"Generation({self._dispatch!r}, readers={len(self._readers)})"

    @property
    def generation_id(self) -> str:
        return self._dispatch.generation_id

    @property
    def phase(self) -> Phase:
        return self._dispatch.phase

    @property
    def tokens_delivered(self) -> int:
        return self._dispatch.tokens_delivered

    @property
    def tokens_used(self) -> int:
        """Tokens of prompt and answer; of one that failed or was left those delivered, and a guess of its
        prompt's where a node had begun on it."""
        if isinstance(self.outcome, Result):
            usage = self.outcome.completion.usage
            return usage.prompt_tokens + usage.completion_tokens
        return self.tokens_delivered + self._need.prompt_tokens * bool(self.attempts)

    @property
    def flow(self) -> Flow:
        """Where this request is, or how it ended."""
        outcome, decision, with_whom = self.outcome, self._dispatch.decision, self.candidate
        failed = isinstance(outcome, FieldmeshError)
        result = outcome if isinstance(outcome, Result) else None
        return Flow(
            key=self.generation_id[:KEY_CHARACTERS],
            entry=self.path[0] if self.path else self._entry.node,
            serving=result.served_by if result else with_whom.member.id if with_whom else None,
            profile=result.profile if result else with_whom.offer.name if with_whom else "",
            domain=decision.domain if decision else "",
            fallback=decision.fallback if decision else False,
            attempts=tuple(self._dispatch.attempts),
            tokens=self.tokens_delivered,
            state="failed" if failed else "done" if result else self.phase.value,
            code=outcome.code if isinstance(outcome, FieldmeshError) else "",
            duration_s=0.0 if outcome is None else self.ended_at - self._began_at,
            explanation=explained(decision) if decision and decision.considered else None,
        )

    def begin(self) -> None:
        """Take the first step."""
        self._perform(self._dispatch.begin(self._loop.time()))

    def stop(self, error: FieldmeshError) -> None:
        """End it with this error, if it has not ended."""
        self._handle(Stop(error=error))

    def view_moved(self, event: ViewMoved) -> None:
        """The mesh looks different."""
        self._handle(event)

    def deadline_left_s(self) -> float:
        """Seconds until the request's deadline."""
        return max(0.0, self._dispatch.deadline_at - self._loop.time())

    async def read(self) -> AsyncGenerator[Chunk | Result, None]:
        """Everything from the first token on, then the result; raises the error that ended it.

        When the last reader leaves before the end, the generation is cancelled.
        """
        me = object()
        self._readers[me] = 0
        position = 0
        try:
            while True:
                while position < len(self._chunks):
                    chunk = self._chunks[position]
                    position += 1
                    yield chunk
                    self._readers[me] += len(chunk.token_ids)
                    self._drained.set()
                if self.outcome is not None:
                    break
                self._changed.clear()
                await self._changed.wait()
            if isinstance(self.outcome, FieldmeshError):
                raise self.outcome
            yield self.outcome
        finally:
            del self._readers[me]
            self._drained.set()
            if not self._readers and self.outcome is None:
                self.stop(Cancelled("The caller went away"))

    async def close(self) -> None:
        """End it because the node stops: another node may be asked, where nothing was delivered yet."""
        self.stop(Draining("The node is stopping; ask another one", retry_after_s=0.0))
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    # --- what dispatch decides -----------------------------------------------------------

    def _route(self, failed: frozenset[NodeId], full: frozenset[NodeId]) -> Decision:
        need = replace(self._need, failed=failed, full=full)
        began = self._loop.time()
        self._end_hops(began)
        try:
            decision = self._router.choose(need, explain=self.ask.explain)
        except FieldmeshError as error:
            if self._pause is None:  # while it waits, this is found again and again
                self._trace.add("route", began, self._loop.time(), error=error.code)
            raise
        self._trace.end(self._pause, began)
        self._pause = None
        self._trace.add("route", began, self._loop.time(), decided(decision))
        return decision

    def _handle(self, event: DispatchEvent) -> None:
        self._perform(self._dispatch.handle(event, self._loop.time()))

    def _perform(self, effects: list[DispatchEffect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    self.candidate = effect.candidate
                    self.attempts += 1
                    self._router.begin(self.generation_id, effect.candidate, self._need)
                    hop = self._trace.under(self._begin_hop(effect))
                    self._tasks[effect.epoch] = asyncio.create_task(
                        self._follow(effect, hop), context=self._context
                    )
                    self._log_start(effect)
                case Cancel():
                    self._tasks[effect.epoch].cancel()
                case Deliver():
                    self._chunks.append(effect.chunk)
                case Finish():
                    self._end(effect.result)
                case Fail():
                    self._end(effect.error)
                case _:
                    assert_never(effect)
        self._end_hops(self._loop.time())
        if self._dispatch.phase is Phase.WAITING and self._pause is None:
            self._pause = self._trace.begin("wait", self._loop.time())
        if effects:
            self._changed.set()
        self._set_timer()

    def _end(self, outcome: Result | FieldmeshError) -> None:
        self.outcome = outcome
        self.ended_at = now = self._loop.time()
        self._router.end(self.generation_id)
        self._on_end(self)
        self._end_hops(now)
        for hop in self._hops.values():  # passed on further: the other node told the attempts
            self._trace.end(hop, now, error="" if isinstance(outcome, Result) else outcome.code)
        self._hops.clear()
        if isinstance(outcome, Result):
            self._trace.end(self._root, now, answered(outcome))
        else:
            self._trace.end(self._pause, now, error=outcome.code)
            self._trace.end(self._root, now, error=outcome.code)
            if self._root is not None:
                outcome.metadata.setdefault("trace_id", self.trace_id)

    def _begin_hop(self, start: Start) -> Span | None:
        name, about, kind = attempt_of(start.candidate, self.attempts, self._entry.node)
        hop = self._trace.begin(name, self._loop.time(), about, kind)
        self._hops[start.epoch, start.candidate.member.id] = hop
        if self._root is not None:
            self._root.name = f"{operation_of(self.ask)} {start.candidate.offer.model}"
        return hop

    def _end_hops(self, now: float) -> None:
        """Attempts that dispatch has on record have ended."""
        for attempt in self._dispatch.attempts if self._hops else ():
            hop = self._hops.pop((attempt.epoch, attempt.node), None)
            self._trace.end(hop, now, error="" if attempt.reason in (SERVED, MOVED) else attempt.reason)

    def _set_timer(self) -> None:
        due = self._dispatch.deadline
        if self._timer is not None and (due is None or self._timer.when() != due):
            self._timer.cancel()
            self._timer = None
        if due is not None and self._timer is None:
            self._timer = self._loop.call_at(due, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._handle(Wake())

    async def _follow(self, start: Start, trace: Trace) -> None:
        """Feed what one attempt yields into dispatch."""
        epoch = start.epoch
        try:
            async with aclosing(self._run_attempt(self, start, trace)) as events:  # type: ignore[type-var]
                async for event in events:
                    match event:
                        case Started():
                            pass
                        case Chunk():
                            self._handle(Arrived(epoch=epoch, chunk=event))
                            await self._readers_keep_up()
                        case Completion():
                            self._handle(Ended(epoch=epoch, completion=event))
                        case Result():
                            self._handle(Ended(epoch=epoch, completion=event.completion, relayed=event))
                        case _:
                            assert_never(event)
            # A no-op after an end: an attempt that stops without one has broken its contract.
            silent = Internal("The attempt ended without saying how")
            self._handle(Failed(epoch=epoch, error=silent))
        except FieldmeshError as error:
            self._log_failure(start.candidate, error)
            self._handle(Failed(epoch=epoch, error=error))
        except asyncio.CancelledError:
            # Where dispatch cancelled it this says nothing new; a channel that closes cancels too.
            lost = NodeUnreachable(f"The connection to {start.candidate.member.name} was closed")
            self._handle(Failed(epoch=epoch, error=lost))
            raise
        except Exception:
            logger.exception("attempt_crashed", node=start.candidate.member.name)
            defect = Internal("A defect of Fieldmesh ended this attempt; the node's log has the details")
            self._handle(Failed(epoch=epoch, error=defect))

    async def _readers_keep_up(self) -> None:
        while self._readers and self.tokens_delivered - min(self._readers.values()) > self._lag_tokens_max:
            self._drained.clear()
            await self._drained.wait()

    def _log_start(self, start: Start) -> None:
        candidate, resumed = start.candidate, len(start.resumption.token_ids) if start.resumption else 0
        logger.info(
            "attempt_started",
            node=candidate.member.name,
            profile=candidate.offer.name,
            epoch=start.epoch,
            resumed_tokens=resumed,
        )

    def _log_failure(self, candidate: Candidate, error: FieldmeshError) -> None:
        logger.warning("attempt_failed", node=candidate.member.name, code=error.code, error=error.message)


def _seeded(ask: Ask, rng: Random) -> Ask:
    """The request with a seed, which every attempt is to draw by: so one can go on where another was."""
    if ask.sampling.seed is not None:
        return ask
    return replace(ask, sampling=replace(ask.sampling, seed=rng.getrandbits(SEED_BITS)))


class Generations:
    """The requests of one node by request id: those that run, and those that ended lately."""

    def __init__(self, config: GenerationConfig) -> None:
        self._config = config
        self._by_id: dict[RequestId, Generation] = {}
        self._swept_to = 0
        self.swept_at = 0.0

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, ask: Ask) -> Generation | None:
        """The generation that this request repeats. Raises RequestIdReused where it differs from it."""
        found = self._by_id.get(ask.request_id)
        if found is None:
            return None
        if isinstance(found.outcome, FieldmeshError):
            return None  # what failed may be tried again under the same id
        if found.ask != ask:
            raise RequestIdReused(
                f"request_id {ask.request_id} was used for another request; make a new id for each request",
                field="request_id",
            )
        return found

    def add(self, generation: Generation, now: float) -> None:
        """Keep it, and forget what ended longest ago where there are too many."""
        self._by_id.pop(generation.ask.request_id, None)
        self._by_id[generation.ask.request_id] = generation
        if len(self._by_id) > self._swept_to + self._config.entries_max // 4 + 1:
            self.sweep(now)

    def sweep(self, now: float) -> None:
        """Forget what ended too long ago, and the oldest of what ended where there is too much."""
        ended = sorted((g for g in self._by_id.values() if g.outcome is not None), key=lambda g: g.ended_at)
        surplus = len(self._by_id) - self._config.entries_max
        for position, old in enumerate(ended):
            if position >= surplus and now - old.ended_at <= self._config.kept_s:
                break
            del self._by_id[old.ask.request_id]
        self._swept_to, self.swept_at = len(self._by_id), now

    def running(self) -> list[Generation]:
        """Those that have not ended."""
        return [g for g in self._by_id.values() if g.outcome is None]

    def get(self, request_id: RequestId) -> Generation | None:
        """By request id."""
        return self._by_id.get(request_id)

    def latest(self, count: int) -> list[Generation]:
        """The last ``count`` that began, the newest first."""
        return list(islice(reversed(self._by_id.values()), count))
