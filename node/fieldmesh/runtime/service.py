"""What a node does for whoever asks: the one object behind gRPC and every other door.

Owns: the life of requests at this node, and questions about the mesh. Must not: know how a client is
spoken to; the doors translate.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from random import Random

from fieldmesh.core.dispatch import MOVES_ON, DispatchConfig, Entry, Phase, Start, ViewMoved
from fieldmesh.core.effective import Rules
from fieldmesh.core.errors import Cancelled, Draining, FieldmeshError, Internal, TooManyStreams
from fieldmesh.core.model import (
    Ask,
    Chunk,
    Embeddings,
    Member,
    MeshView,
    NodeId,
    NodeState,
    Prompt,
    RequestId,
    Result,
    Target,
)
from fieldmesh.core.quota import Quotas
from fieldmesh.core.routing import Candidate, Need
from fieldmesh.core.tally import Histogram
from fieldmesh.core.tracing import Trace, TraceContext
from fieldmesh.rpc.snapshot import Flow
from fieldmesh.runtime.forwarding import Forwarder
from fieldmesh.runtime.generation import AttemptEvent, Generation, GenerationConfig, Generations
from fieldmesh.runtime.local import LocalRuns
from fieldmesh.runtime.router import Router, need_of
from fieldmesh.runtime.tracing import Tracer, attempt_of, embedding, stepping

ABORT_TIMEOUT_S = 2.0
EMBED_TIMEOUT_S = 600.0
SWEEP_INTERVAL_S = 10.0
TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LATENCY_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ROUTES = ("local", "forwarded", "for_peer")
_WORTH_ASKING = (NodeState.ALIVE, NodeState.SUSPECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Bounds of a node's service."""

    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    generations: GenerationConfig = field(default_factory=GenerationConfig)


class Latencies:
    """How long requests took that were answered, by route: asked and answered here, asked here and answered
    elsewhere, answered here for a peer. Seconds from their arrival at this node."""

    def __init__(self) -> None:
        self.ttft_s = {route: Histogram(TTFT_BOUNDS_S) for route in ROUTES}
        self.duration_s = {route: Histogram(LATENCY_BOUNDS_S) for route in ROUTES}

    def observe(self, route: str, ttft_s: float, duration_s: float) -> None:
        """Count one answer; ``ttft_s`` is 0 where it had no token."""
        if ttft_s:
            self.ttft_s[route].observe(ttft_s)
        self.duration_s[route].observe(duration_s)


class Service:
    """One node's service. ``view`` gives the mesh as it looks now. Belongs to one event loop."""

    def __init__(
        self,
        *,
        entry: Entry,
        view: Callable[[], MeshView],
        router: Router,
        local: LocalRuns,
        forwarder: Forwarder,
        tracer: Tracer,
        rules: Rules,
        config: ServiceConfig,
        rng: Random,
    ) -> None:
        self.entry = entry
        self.local = local
        self.router = router
        self.tracer = tracer
        self.latencies = Latencies()
        self.guests: dict[str, Flow] = {}
        """What runs here for other nodes, by key."""
        self._view = view
        self._forwarder = forwarder
        self._rules = rules
        self._config = config
        self._rng = rng
        self._generations = Generations(config.generations)
        self._quotas = Quotas()
        self._streams = 0
        self._draining = False
        self._members: dict[NodeId, Member] = {}

    @property
    def view(self) -> MeshView:
        """The mesh as this node sees it."""
        return self._view()

    def obey(self, rules: Rules) -> None:
        """Serve by these rules from now on; requests under way go on as they began."""
        self._rules = rules
        self._quotas.obey(rules.quotas)
        self.router.obey(rules)

    @property
    def running(self) -> int:
        """Requests under way that entered here."""
        return len(self._generations.running())

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests."""
        return self._draining

    def candidate(self, request_id: RequestId) -> tuple[Candidate, int]:
        """Who works on a request that has begun to be answered here, and at which attempt, from 1."""
        found = self._generations.get(request_id)
        if found is None or found.candidate is None:
            raise Internal(f"request {request_id} was never with anybody")
        return found.candidate, found.attempts

    def trace_id(self, request_id: RequestId) -> str:
        """The trace of a request that entered here; empty where it is not known any more."""
        found = self._generations.get(request_id)
        return "" if found is None else found.trace_id

    def flows(self, count: int) -> list[Flow]:
        """``count`` requests: those that run here for other nodes, then those that entered here; the newest
        first."""
        own = (generation.flow for generation in self._generations.latest(count))
        return list(islice(chain(reversed(self.guests.values()), own), count))

    def flow(self, request_id: RequestId) -> Flow | None:
        """One request; None where it is not remembered."""
        found = self._generations.get(request_id)
        return found.flow if found is not None else None

    async def ask(
        self,
        ask: Ask,
        *,
        deadline_s: float | None = None,
        path: tuple[NodeId, ...] = (),
        hops_left: int | None = None,
        trace: TraceContext | None = None,
    ) -> AsyncGenerator[Chunk | Result, None]:
        """Answer a request: chunks, then one Result. Closing the generator cancels it within a step.

        ``trace`` is the one that it came with, ``path`` and ``hops_left`` are set where another node passed
        the request on. Raises FieldmeshError.
        """
        if self._streams >= self._rules.streams_max:
            raise TooManyStreams(
                f"This node holds {self._streams} streams, its most; ask another node, or again shortly",
                retry_after_s=1.0,
            )
        self._streams += 1
        try:
            generation = self._generations.find(ask)
            if generation is None:
                hops = self._rules.hops_max if hops_left is None else hops_left
                await self.router.settled(need_of(ask))
                generation = self._generations.find(ask)  # a repeat may have come while we waited
            if generation is None:
                generation = self._open(ask, deadline_s, path, hops, trace)
            async with aclosing(generation.read()) as items:
                async for item in items:
                    yield item
        finally:
            self._streams -= 1

    def _open(
        self,
        ask: Ask,
        deadline_s: float | None,
        path: tuple[NodeId, ...],
        hops_left: int,
        trace: TraceContext | None,
    ) -> Generation:
        if self._draining:
            raise Draining("This node is leaving; ask another one", retry_after_s=0.0)
        if not path:  # what a peer passes on was counted where it entered
            self._quotas.begin(ask.tenant, asyncio.get_running_loop().time(), streams=self._held(ask.tenant))
        generation = Generation(
            ask,
            generation_id=uuid.uuid4().hex,
            entry=self.entry,
            router=self.router,
            run_attempt=self._run_attempt,
            dispatch_config=self._config.dispatch,
            lag_tokens_max=self._config.generations.lag_tokens_max,
            deadline_s=deadline_s,
            path=path,
            hops_left=hops_left,
            rng=self._rng,
            on_end=self._ended,
            trace=self.tracer.open(trace, ask.request_id),
        )
        self._generations.add(generation, asyncio.get_running_loop().time())
        generation.begin()
        return generation

    def _held(self, tenant: str) -> int:
        """How many requests of a tenant entered here and are under way."""
        return sum(g.ask.tenant == tenant and not g.path for g in self._generations.running())

    def _ended(self, generation: Generation) -> None:
        """Count what a request took."""
        if not generation.path:
            now = asyncio.get_running_loop().time()
            self._quotas.spend(generation.ask.tenant, generation.tokens_used, now)
        if isinstance(result := generation.outcome, Result):
            route = "local" if result.served_by == self.entry.node else "forwarded"
            self.latencies.observe(route, result.ttft_s, result.duration_s)

    def _run_attempt(self, generation: Generation, start: Start, trace: Trace) -> AsyncIterator[AttemptEvent]:
        candidate = start.candidate
        if candidate.member.id == self.entry.node:
            return self.local.run(
                generation.asked,
                profile=candidate.offer.name,
                generation_id=generation.generation_id,
                epoch=start.epoch,
                deadline_s=generation.deadline_left_s(),
                resumption=start.resumption,
                trace=trace,
            )
        return self._forwarder.run(
            generation.asked,
            candidate,
            generation_id=generation.generation_id,
            epoch=start.epoch,
            path=(*generation.path, self.entry.node),
            hops_left=generation.hops_left - 1,
            deadline_s=generation.deadline_left_s(),
            resumption=start.resumption,
            trace=trace.context,
        )

    def view_changed(self, view: MeshView) -> None:
        """Take a new view of the mesh: route by it, and let requests under way react."""
        self.router.update(view)
        before, self._members = self._members, {member.id: member for member in view.members}
        known = [(member, before[member.id]) for member in view.members if member.id in before]
        event = ViewMoved(
            states={new.id: new.state for new, old in known if new.state is not old.state},
            restarted={new.id: new.incarnation for new, old in known if new.incarnation > old.incarnation},
            draining=frozenset(new.id for new, old in known if new.load.draining and not old.load.draining),
        )
        for generation in self._generations.running():
            generation.view_moved(event)
        now = asyncio.get_running_loop().time()
        if now - self._generations.swept_at > SWEEP_INTERVAL_S:
            self._generations.sweep(now)

    async def abort(self, request_id: RequestId, *, everywhere: bool = True) -> bool:
        """End a request here or (``everywhere``) wherever in the mesh it runs; False where none was found."""
        if self.local.abort(request_id):
            return True
        if not everywhere:
            return False
        mine = self._generations.get(request_id)
        if mine is not None and mine.phase is Phase.WAITING:
            mine.stop(Cancelled("The request was aborted before any node had taken it"))
            return True
        peers = [m for m in self.view.members if m.id != self.entry.node and m.state in _WORTH_ASKING]
        calls = [self._forwarder.abort(m, request_id, timeout_s=ABORT_TIMEOUT_S) for m in peers]
        return any(await asyncio.gather(*calls))

    async def tokenize(self, prompt: Prompt, target: Target) -> tuple[tuple[int, ...], str]:
        """Token ids of a prompt at the node that would serve it, and the model whose they are."""
        need = Need(profile=target.profile, model=target.model, domain=target.domain, hops_left=1)
        candidate = self.router.choose(need).candidates[0]
        if candidate.member.id == self.entry.node:
            return await self.local.tokenize(candidate.offer.name, prompt)
        return await self._forwarder.tokenize(candidate, prompt)

    async def embed(
        self,
        texts: tuple[str, ...],
        target: Target,
        *,
        deadline_s: float | None,
        trace: TraceContext | None = None,
    ) -> tuple[Embeddings, Candidate]:
        """Vectors of texts, and who made them. Another node is asked where one is lost or full; raises the
        last one's error, or what routing raises."""
        if self._draining:
            raise Draining("This node is leaving; ask another one", retry_after_s=0.0)
        with stepping(self.tracer.open(trace, ""), *embedding(target.model)) as traced:
            return await self._embed(texts, target, deadline_s, traced)

    async def _embed(
        self, texts: tuple[str, ...], target: Target, deadline_s: float | None, trace: Trace
    ) -> tuple[Embeddings, Candidate]:
        loop = asyncio.get_running_loop()
        until = loop.time() + (EMBED_TIMEOUT_S if deadline_s is None else deadline_s)
        need = Need(profile=target.profile, model=target.model, domain=target.domain, hops_left=1)
        failed: frozenset[NodeId] = frozenset()
        last: FieldmeshError | None = None
        while True:
            try:
                candidate = self.router.choose(replace(need, failed=failed)).candidates[0]
            except FieldmeshError as error:
                raise last or error from None
            left_s = max(0.0, until - loop.time())
            try:
                with stepping(trace, *attempt_of(candidate, len(failed) + 1, self.entry.node)) as hop:
                    if candidate.member.id == self.entry.node:
                        return await self.local.embed(candidate.offer.name, texts, left_s), candidate
                    made = await self._forwarder.embed(candidate, texts, deadline_s=left_s, trace=hop.context)
                    return made, candidate
            except MOVES_ON as error:
                failed, last = failed | {candidate.member.id}, error

    def drain(self) -> None:
        """Take no new requests from now on."""
        self._draining = True

    async def close(self) -> None:
        """End every request under way with an error."""
        await asyncio.gather(*(generation.close() for generation in self._generations.running()))
