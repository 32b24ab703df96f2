"""Requests in a simulated node: the real routing, dispatch and batching over a cost model.

Owns: what stands between those cores and the world (messages of a forwarded stream, the steps of the
engine, delivery to a caller), and the bookkeeping of every ask. Must not: decide what the cores decide.

A forwarded stream of a real mesh is a gRPC call: it loses nothing in between, and breaks as a whole. Here its
messages travel one by one, so scenarios with requests use links that keep order and lose nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from fieldmesh.core import dispatch, errors
from fieldmesh.core.batching import Batcher
from fieldmesh.core.catalogue import Index
from fieldmesh.core.dispatch import Dispatch, DispatchConfig, DispatchEffect, Entry
from fieldmesh.core.events import Send, Tick
from fieldmesh.core.mesh import LinkFailed, LoadChanged, Mesh
from fieldmesh.core.model import (
    Ask,
    Chunk,
    Completion,
    FinishReason,
    Load,
    MeshView,
    NodeId,
    NodeState,
    Prompt,
    RequestId,
    SamplingOverrides,
    Target,
    Usage,
)
from fieldmesh.core.routing import Candidate, Need, choose
from fieldmesh.core.steps import BatcherConfig, Output, StepPlan, Work
from fieldmesh.core.traffic import Traffic
from fieldmesh.engine.cost import CostModel, prompt_digest, sample_step, token_at

VOCABULARY_TOKENS = 1000
FLUSH_TOKENS = 8
ASK_S_MAX = 20.0
"""More than an answer, a freeze of the node that was asked, and a few failovers take together."""


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Run this; speak to me under this id and epoch."""

    id: str
    epoch: int
    prompt: tuple[int, ...]
    tokens_max: int


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Some tokens of a forwarded request."""

    id: str
    epoch: int
    first_index: int
    tokens: tuple[int, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    """All tokens were sent."""

    id: str
    epoch: int
    tokens: int


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The request ended with an error of this code."""

    id: str
    epoch: int
    code: str


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants it any more."""

    id: str
    epoch: int


ServingMessage = Forward | Tokens | Done | Broken | Stopped
_DECODER: msgspec.msgpack.Decoder[ServingMessage] = msgspec.msgpack.Decoder(ServingMessage)
_ENCODER = msgspec.msgpack.Encoder()
SERVING_MARK = b"\0S"
"""No ControlRequest begins so (field number 0 does not exist)."""


def encode(message: ServingMessage) -> bytes:
    return SERVING_MARK + _ENCODER.encode(message)


def decode(data: bytes) -> ServingMessage:
    return _DECODER.decode(data[len(SERVING_MARK) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class AskArrived:
    """A client asks this node."""

    id: str
    domain: str
    prompt: tuple[int, ...]
    tokens_max: int


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What became of every ask, over all nodes and lives. Wrong tokens are told in ``garbled``."""

    open: dict[str, NodeId] = field(default_factory=dict)
    garbled: list[str] = field(default_factory=list)
    lost_before_first_token: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class _Request:
    """A request at the node it entered."""

    dispatch: Dispatch
    ask: AskArrived
    digest: bytes
    asked_at: float
    delivered: int = 0
    at: Candidate | None = None


@dataclass(slots=True, kw_only=True)
class _Job:
    """A generation in this node's batcher. ``owner`` is who forwarded it, None for our own."""

    id: str
    epoch: int
    owner: NodeId | None
    digest: bytes
    index: int = 0
    flushed: int = 0
    pending: list[int] = field(default_factory=list)


class Serving:
    """Routing, dispatch and batching of one node."""

    def __init__(self, mesh: Mesh, name: str, ledger: Ledger, rng: Random, batcher: BatcherConfig) -> None:
        self.mesh = mesh
        self.batcher = Batcher(batcher)
        self.requests: dict[str, _Request] = {}
        self._name = name
        self._ledger = ledger
        self._rng = rng
        self._view: MeshView = mesh.view
        self._index = Index.of(self._view)
        self._traffic = Traffic()
        self._cost = CostModel()
        self._jobs: dict[str, _Job] = {}
        self._plan: StepPlan | None = None
        self._step_ends_at = 0.0
        self._load = Load()
        self._now = 0.0
        self._settled_at = float("inf")

    @property
    def deadline(self) -> float | None:
        times = [r.dispatch.deadline for r in self.requests.values() if r.dispatch.deadline is not None]
        if self._plan is not None:
            times.append(self._step_ends_at)
        return min(times, default=None)

    def check(self) -> None:
        """The rules of the cores inside, and of what joins them."""
        self.batcher.check()
        for request in self.requests.values():
            request.dispatch.check()
            age_s = self._now - request.asked_at
            assert age_s <= ASK_S_MAX, f"{request.ask.id} is neither answered nor failed after {age_s:.1f} s"
        assert not self._ledger.garbled, self._ledger.garbled[0]
        assert not self._ledger.lost_before_first_token, self._ledger.lost_before_first_token[0]

    # --- events ----------------------------------------------------------------------------

    def asked(self, ask: AskArrived, now: float) -> list[Any]:
        """A client's request enters the mesh here."""
        self._ledger.counts["asks"] += 1
        self._ledger.open[ask.id] = self._view.local
        need = Need(domain=ask.domain, prompt_tokens=len(ask.prompt), max_tokens=ask.tokens_max)

        def route(failed: frozenset[NodeId], full: frozenset[NodeId]) -> Any:
            wanted = Need(
                domain=need.domain,
                prompt_tokens=need.prompt_tokens,
                max_tokens=need.max_tokens,
                failed=failed,
                full=full,
            )
            return choose(wanted, self._index, self._traffic, self._rng)

        machine = Dispatch(
            Ask(
                request_id=RequestId(ask.id),
                prompt=Prompt(token_ids=ask.prompt),
                target=Target(domain=ask.domain),
                sampling=SamplingOverrides(max_tokens=ask.tokens_max),
            ),
            generation_id=ask.id,
            entry=Entry(node=self._view.local, name=self._name, settled_at=self._settled_at),
            route=route,
            config=DispatchConfig(),
            rng=self._rng,
            now=now,
        )
        self.requests[ask.id] = _Request(
            dispatch=machine, ask=ask, digest=prompt_digest(ask.prompt), asked_at=now
        )
        return self._perform(ask.id, machine.begin(now), now)

    def received(self, sender: NodeId, message: ServingMessage, now: float) -> list[Any]:
        """A message of a forwarded stream."""
        match message:
            case Forward():
                job = f"{sender} {message.id} {message.epoch}"
                try:
                    self._submit(job, message, sender, now)
                except errors.FieldmeshError as error:
                    return self._tell(sender, Broken(message.id, message.epoch, error.code))
                return []
            case Stopped():
                self._drop(f"{sender} {message.id} {message.epoch}")
                return []
            case Tokens():
                chunk = Chunk(
                    generation_id=message.id,
                    epoch=message.epoch,
                    first_token_index=message.first_index,
                    token_ids=message.tokens,
                    text="",
                )
                return self._feed(message.id, dispatch.Arrived(epoch=message.epoch, chunk=chunk), now)
            case Done():
                return self._feed(
                    message.id,
                    dispatch.Ended(epoch=message.epoch, completion=_completion(message.tokens)),
                    now,
                )
            case Broken():
                said = errors.by_code()[message.code](f"the other node said {message.code}")
                return self._feed(message.id, dispatch.Failed(epoch=message.epoch, error=said), now)

    def link_failed(self, node: NodeId, now: float) -> list[Any]:
        """The connection to a node broke, and with it every stream to and from it."""
        effects: list[Any] = []
        for job in [j for j, held in self._jobs.items() if held.owner == node]:
            self._drop(job)
        for request_id, request in list(self.requests.items()):
            if request.at is not None and request.at.member.id == node:
                lost = errors.NodeUnreachable("connection lost")
                epoch = request.dispatch._epoch
                effects += self._feed(request_id, dispatch.Failed(epoch=epoch, error=lost), now)
        return effects

    def look(self, now: float) -> list[Any]:
        """Take in what changed in the view, do what is due, begin the next step."""
        self._now = now
        self._settled_at = min(self._settled_at, now + dispatch.SETTLE_S)
        effects: list[Any] = []
        view = self.mesh.view
        if view is not self._view:
            before = {m.id: m for m in self._view.members}
            self._view, self._index = view, Index.of(view, self._index)
            known = [(m, before[m.id]) for m in view.members if m.id in before]
            moved = dispatch.ViewMoved(
                states={m.id: m.state for m, old in known if m.state is not old.state},
                restarted={m.id: m.incarnation for m, old in known if m.incarnation > old.incarnation},
            )
            if moved.states or moved.restarted:
                for request_id in list(self.requests):
                    effects += self._feed(request_id, moved, now)
        for request_id, request in list(self.requests.items()):
            due = request.dispatch.deadline
            if due is not None and now >= due:
                effects += self._feed(request_id, dispatch.Wake(), now)
        if self._plan is not None and now >= self._step_ends_at:
            effects += self._commit(now)
        if self._plan is None:
            plan = self.batcher.plan(now)
            if plan.slices:
                self._plan, self._step_ends_at = plan, now + self._cost.step_s(plan)
        load = self.batcher.load()
        if load != self._load:
            self._load = load
            effects += self.mesh.handle(LoadChanged(load=load), now)
        return effects

    # --- inside ----------------------------------------------------------------------------

    def _feed(self, request_id: str, event: Any, now: float) -> list[Any]:
        request = self.requests.get(request_id)
        return [] if request is None else self._perform(request_id, request.dispatch.handle(event, now), now)

    def _perform(self, request_id: str, effects: list[DispatchEffect], now: float) -> list[Any]:
        """What dispatch wants done for one request."""
        request = self.requests[request_id]
        out: list[Any] = []
        for effect in effects:
            match effect:
                case dispatch.Start(epoch=epoch, candidate=candidate):
                    out += self._start(request, epoch, candidate, now)
                case dispatch.Cancel(epoch=epoch):
                    out += self._cancel(request, epoch)
                case dispatch.Deliver(chunk=chunk):
                    self._deliver(request, chunk)
                case dispatch.Finish(result=result):
                    self._finish(request, len(result.attempts), [a.reason for a in result.attempts])
                    if result.hops:
                        self._ledger.counts["forwarded"] += 1
                    if result.fallback:
                        self._ledger.counts["fallbacks"] += 1
                case dispatch.Fail(error=error):
                    self._fail(request, error)
        return out

    def _start(self, request: _Request, epoch: int, candidate: Candidate, now: float) -> list[Any]:
        request.at = candidate
        member = candidate.member
        current = next(m for m in self._view.members if m.id == member.id)
        assert current.state is NodeState.ALIVE, (
            f"{request.ask.id} is routed to {member.name}: {current.state}"
        )
        need = Need(prompt_tokens=len(request.ask.prompt), max_tokens=request.ask.tokens_max)
        self._traffic.begin(
            request.ask.id, candidate.member, prompt_tokens=need.prompt_tokens, max_tokens=need.max_tokens
        )
        forward = Forward(request.ask.id, epoch, request.ask.prompt, request.ask.tokens_max)
        if member.id != self._view.local:
            return [Send(to=member.id, address=member.address, message=forward)]
        try:
            self._submit(f"local {request.ask.id} {epoch}", forward, None, now)
        except errors.FieldmeshError as error:
            return self._feed(request.ask.id, dispatch.Failed(epoch=epoch, error=error), now)
        return []

    def _cancel(self, request: _Request, epoch: int) -> list[Any]:
        assert request.at is not None
        if request.at.member.id == self._view.local:
            self._drop(f"local {request.ask.id} {epoch}")
            return []
        return self._tell(request.at.member.id, Stopped(request.ask.id, epoch))

    def _deliver(self, request: _Request, chunk: Chunk) -> None:
        for offset, token in enumerate(chunk.token_ids):
            index = chunk.first_token_index + offset
            right = token_at(request.digest, index, VOCABULARY_TOKENS)
            if index != request.delivered or token != right:
                self._ledger.garbled.append(f"{request.ask.id}: token {index} is {token}, expected {right}")
            request.delivered += 1

    def _finish(self, request: _Request, attempts: int, reasons: list[str]) -> None:
        if request.delivered != request.ask.tokens_max:
            self._ledger.garbled.append(f"{request.ask.id} ended after {request.delivered} tokens")
        self._ledger.counts["answered"] += 1
        self._ledger.counts["retries"] += attempts > 1
        self._ledger.counts["spills"] += errors.QueueFull.code in reasons
        self._ledger.counts["failovers"] += errors.NodeUnreachable.code in reasons
        self._close(request)

    def _fail(self, request: _Request, error: errors.FieldmeshError) -> None:
        self._ledger.counts[f"failed_{error.code}"] += 1
        if not isinstance(error, (errors.StreamLost, errors.QueueFull)):
            self._ledger.lost_before_first_token.append(
                f"{request.ask.id} failed before its first token: {error.code} {error.message}"
            )
        self._close(request)

    def _close(self, request: _Request) -> None:
        if self._ledger.open.pop(request.ask.id, None) is None:
            self._ledger.garbled.append(f"{request.ask.id} ended twice")
        self._traffic.end(request.ask.id)
        del self.requests[request.ask.id]

    def _submit(self, job: str, forward: Forward, owner: NodeId | None, now: float) -> None:
        self.batcher.submit(
            Work(id=job, prompt_token_ids=forward.prompt, tokens_max=forward.tokens_max, tenant=owner or ""),
            now,
        )
        self._jobs[job] = _Job(
            id=forward.id, epoch=forward.epoch, owner=owner, digest=prompt_digest(forward.prompt)
        )

    def _drop(self, job: str) -> None:
        if self._jobs.pop(job, None) is not None:
            self._ledger.counts["cancelled_jobs"] += 1
            self.batcher.cancel(job)

    def _commit(self, now: float) -> list[Any]:
        assert self._plan is not None
        digests = {job: held.digest for job, held in self._jobs.items()}
        indices = {job: held.index for job, held in self._jobs.items()}
        sampled = sample_step(self._plan, digests, indices, VOCABULARY_TOKENS)
        self._plan = None
        effects: list[Any] = []
        for output in self.batcher.commit(sampled, now):
            effects += self._emit(output, now)
        return effects

    def _emit(self, output: Output, now: float) -> list[Any]:
        """The first token goes out at once, then eight at a time, and all of them at the end."""
        job = self._jobs[output.id]
        job.pending.extend(output.token_ids)
        job.index += len(output.token_ids)
        last = output.finish is not None
        if not (last or job.flushed == 0 or len(job.pending) >= FLUSH_TOKENS):
            return []
        tokens = Tokens(job.id, job.epoch, job.flushed, tuple(job.pending))
        job.flushed, job.pending = job.index, []
        said: list[ServingMessage] = [tokens]
        if last:
            del self._jobs[output.id]
            said.append(Done(job.id, job.epoch, job.index))
        if job.owner is not None:
            return [effect for message in said for effect in self._tell(job.owner, message)]
        return [effect for message in said for effect in self.received(self._view.local, message, now)]

    def _tell(self, node: NodeId, message: ServingMessage) -> list[Any]:
        member = next((m for m in self._view.members if m.id == node), None)
        return [] if member is None else [Send(to=node, address=member.address, message=message)]


def _completion(tokens: int) -> Completion:
    return Completion(finish_reason=FinishReason.LENGTH, usage=Usage(completion_tokens=tokens))


class ServingNode:
    """A whole node: the mesh, and what serves requests over its view."""

    def __init__(self, mesh: Mesh, serving: Serving) -> None:
        self.mesh = mesh
        self.serving = serving

    @property
    def deadline(self) -> float | None:
        times = [t for t in (self.mesh.deadline, self.serving.deadline) if t is not None]
        return min(times, default=None)

    def handle(self, event: Any, now: float) -> list[Any]:
        """Hand the event to whom it concerns, then let serving look at what that changed."""
        effects: list[Any] = []
        if isinstance(event, AskArrived):
            effects += self.serving.asked(event, now)
        elif isinstance(getattr(event, "message", None), ServingMessage):
            effects += self.serving.received(event.sender, event.message, now)
        elif not isinstance(event, Tick) or (self.mesh.deadline is not None and now >= self.mesh.deadline):
            effects += self.mesh.handle(event, now)
            if isinstance(event, LinkFailed) and event.to is not None:
                effects += self.serving.link_failed(event.to, now)
        return effects + self.serving.look(now)

    def check(self) -> None:
        self.mesh.check()
        self.serving.check()
