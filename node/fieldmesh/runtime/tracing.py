"""Traces requests as they pass through this node. Owns: the clock and the ids of its traces, and what the
spans of a request are called (by OpenTelemetry's conventions for generative AI, as far as those go).

Must not: decide what is kept (``core.tracing`` does), or put anything that was asked or answered into a span.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import Ask, Chunk, Completion, NodeId, Result, Usage
from fieldmesh.core.routing import Candidate, Decision
from fieldmesh.core.tracing import (
    Attributes,
    Ended,
    Kept,
    Span,
    SpanKind,
    Trace,
    TraceBook,
    TraceBounds,
    TraceContext,
)
from fieldmesh.engine.port import JobEvent

PROVIDER = "fieldmesh"
LOAD_SHOWN_S = 0.001
"""A model that is in memory is there sooner."""


class Tracer:
    """The traces of one node; ``ended`` is told of every span when it ends."""

    def __init__(self, rng: Random, ended: Ended | None = None) -> None:
        self._book = TraceBook(TraceBounds(), rng, ended)

    def open(self, context: TraceContext | None, request_id: str) -> Trace:
        """The trace of a request that came with this context, or with none."""
        now = asyncio.get_running_loop().time()
        return self._book.open(context, request_id, now=now, clock_offset_s=time.time() - now)

    def find(self, name: str) -> Kept | None:
        """What is kept of a trace."""
        return self._book.find(name, asyncio.get_running_loop().time())


# --- what spans say ------------------------------------------------------------------------


def operation_of(ask: Ask) -> str:
    """What is done, in the conventions' word for it."""
    return "chat" if ask.prompt.messages else "text_completion"


def asked(ask: Ask) -> Attributes:
    """What is known of a request when it comes."""
    made: Attributes = {
        "gen_ai.operation.name": operation_of(ask),
        "gen_ai.provider.name": PROVIDER,
        "fieldmesh.request_id": ask.request_id,
    }
    if ask.target.model:
        made["gen_ai.request.model"] = ask.target.model
    if ask.sampling.max_tokens is not None:
        made["gen_ai.request.max_tokens"] = ask.sampling.max_tokens
    return made


def finished(completion: Completion) -> Attributes:
    """What is known of a generation when it has ended well."""
    made: Attributes = {"gen_ai.response.finish_reasons": (completion.finish_reason.value,)}
    made.update(_prompt_tokens(completion.usage))
    made["gen_ai.usage.output_tokens"] = completion.usage.completion_tokens
    return made


def answered(result: Result) -> Attributes:
    """What is known of a request when it was answered."""
    made = finished(result.completion)
    made["gen_ai.response.model"] = result.model
    made["gen_ai.response.id"] = result.generation_id
    made["fieldmesh.profile"] = result.profile
    made["fieldmesh.served_by"] = result.served_by_name
    made["fieldmesh.ttft_s"] = result.ttft_s
    if result.domain:
        made["fieldmesh.domain"] = result.domain
    if result.fallback:
        made["fieldmesh.fallback"] = True
    return made


def decided(decision: Decision) -> Attributes:
    """What routing said."""
    return {
        "fieldmesh.routing.policy": decision.policy.value,
        "fieldmesh.routing.candidates": len(decision.candidates),
        "fieldmesh.routing.node": decision.candidates[0].member.name,
    }


def attempt_of(candidate: Candidate, number: int, here: NodeId) -> tuple[str, Attributes, SpanKind]:
    """One try at a request, here or by forwarding it: name, attributes, kind."""
    member, offer = candidate.member, candidate.offer
    about: Attributes = {
        "gen_ai.request.model": offer.model,
        "fieldmesh.profile": offer.name,
        "fieldmesh.node": member.name,
        "fieldmesh.attempt": number,
    }
    if member.id == here:
        return "attempt", about, SpanKind.INTERNAL
    about["server.address"], about["server.port"] = member.address.host, member.address.port
    return f"forward {member.name}", about, SpanKind.CLIENT


def embedding(model: str = "") -> tuple[str, Attributes, SpanKind]:
    """Texts that become vectors: name, attributes, kind."""
    about: Attributes = {"gen_ai.operation.name": "embeddings", "gen_ai.provider.name": PROVIDER}
    if model:
        about["gen_ai.request.model"] = model
    return f"embeddings {model}".rstrip(), about, SpanKind.SERVER


@contextmanager
def stepping(trace: Trace, name: str, about: Attributes, kind: SpanKind) -> Iterator[Trace]:
    """A step that lasts as long as the context; yields the trace for what works under it."""
    clock = asyncio.get_running_loop().time
    span, error = trace.begin(name, clock(), about, kind), ""
    try:
        yield trace.under(span)
    except BaseException as failure:
        error = code_of(failure)
        raise
    finally:
        trace.end(span, clock(), error=error)


def _prompt_tokens(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


class EngineSteps:
    """The steps of one run at this node's engine: ``load``, ``queue``, ``prefill``, ``decode``.

    How long it waited for a slot is known at its end: until then, and where there is no such end, ``queue``
    and ``prefill`` are one.
    """

    def __init__(self, trace: Trace, asked_at: float) -> None:
        self._trace = trace
        self._clock = asyncio.get_running_loop().time
        self._asked_at = asked_at
        self._before: Span | None = None
        self._decode: Span | None = None
        self._first_at = 0.0

    def submitted(self) -> None:
        """The engine is there, and has the job."""
        now = self._clock()
        if now - self._asked_at > LOAD_SHOWN_S:
            self._trace.add("load", self._asked_at, now)
        self._asked_at = now
        self._before = self._trace.begin("queue, prefill", now)

    def saw(self, event: JobEvent) -> None:
        """The engine said something."""
        if self._before is None:
            return
        if isinstance(event, Chunk):
            if not self._first_at:
                self._first_at = self._clock()
                self._decode = self._trace.begin("decode", self._first_at)
        elif isinstance(event, Completion):
            self._completed(event.usage)

    def _completed(self, usage: Usage) -> None:
        now = self._clock()
        first_at = self._first_at or now
        if usage.queue_s is not None and self._before is not None:
            placed_at = min(self._asked_at + usage.queue_s, first_at)
            self._before.name = "queue"
            self._trace.end(self._before, placed_at)
            self._trace.add("prefill", placed_at, first_at, _prompt_tokens(usage))
        self._trace.end(self._before, first_at)
        self._trace.end(self._decode, now, {"gen_ai.usage.output_tokens": usage.completion_tokens})

    def ended(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        now = self._clock()
        code = code_of(error) if error is not None else ""
        self._trace.end(self._before, self._first_at or now, error="" if self._first_at else code)
        self._trace.end(self._decode, now, error=code)


def code_of(error: BaseException) -> str:
    """The error that a span ended with, by its code."""
    if isinstance(error, FieldmeshError):
        return error.code
    return "CANCELLED" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else "INTERNAL"
