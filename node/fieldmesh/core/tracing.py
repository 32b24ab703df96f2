"""What requests did at this node, step by step: the spans of their traces, and which of them are kept.

Owns: the records (named as W3C Trace Context and OpenTelemetry name them), a bounded book of the latest
traces, and finding one again. Must not: read a clock, hold what was asked or answered, or know how a trace
travels.

A part of the node is given a ``Trace``: what it begins there is a child of the span that it works under.
Where the caller asked not to be sampled, and where a trace is full, ``begin`` gives None and costs next to
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random

ID_CHARS_MIN = 8
"""How much of a trace id names it."""
VALUE_CHARS_MAX = 200
SPAN_BYTES = 700
"""What a span takes beside the text of its attributes (measured: 680)."""

Value = str | int | float | bool | tuple[str, ...]
Attributes = dict[str, Value]


class SpanKind(Enum):
    """Where a span's work came from: the node itself, a call to it, a call of its own."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """Which trace a request belongs to, and under which span of its caller's (empty: under none)."""

    trace_id: str
    span_id: str = ""
    sampled: bool = True
    state: str = ""


@dataclass(slots=True, kw_only=True)
class Span:
    """One step. Times are Unix seconds; ``ended_at`` is None while it runs, ``error`` is the code that ended
    it."""

    span_id: str
    parent_id: str
    name: str
    kind: SpanKind
    started_at: float
    ended_at: float | None = None
    error: str = ""
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBounds:
    """What a node keeps of its traces; the oldest go first. ``spans_max`` is for each trace."""

    traces_max: int = 512
    spans_max: int = 256
    bytes_max: int = 8 << 20
    kept_s: float = 1800.0


@dataclass(slots=True, kw_only=True)
class Kept:
    """One trace at this node. ``clock_offset_s`` makes Unix seconds of the node's own clock;
    ``spans_dropped`` were too many."""

    trace_id: str
    opened_at: float
    clock_offset_s: float
    request_ids: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    spans_dropped: int = 0
    size_bytes: int = 0


Ended = Callable[[TraceContext, Span], None]
"""Told of every span when it ends; the context is that of its trace."""


class TraceBook:
    """The latest traces of one node. ``rng`` makes ids."""

    def __init__(self, bounds: TraceBounds, rng: Random, ended: Ended | None = None) -> None:
        self.bounds = bounds
        self.ended = ended
        self._rng = rng
        self._kept: dict[str, Kept] = {}
        self._by_request: dict[str, str] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """About what the book takes."""
        return self._size_bytes

    def open(
        self, context: TraceContext | None, request_id: str, *, now: float, clock_offset_s: float
    ) -> Trace:
        """The trace that a request brought, or a new one."""
        if context is None:
            context = TraceContext(trace_id=self.new_id(128))
        if not context.sampled:
            return Trace(context, None, self)
        kept = self._kept.get(context.trace_id)
        if kept is None:
            kept = Kept(trace_id=context.trace_id, opened_at=now, clock_offset_s=clock_offset_s)
            self._kept[kept.trace_id] = kept
            self._forget(now)
        if request_id and len(kept.request_ids) < self.bounds.spans_max:
            kept.request_ids.append(request_id)
            self._by_request[request_id] = kept.trace_id
        return Trace(context, kept, self)

    def find(self, name: str, now: float) -> Kept | None:
        """A trace by its id, by ``ID_CHARS_MIN`` or more of that, or by the id of one of its requests."""
        found = self._kept.get(self._by_request.get(name, name))
        if found is None and len(name) >= ID_CHARS_MIN:
            alike = (kept for trace_id, kept in self._kept.items() if trace_id.startswith(name.lower()))
            found = max(alike, key=lambda kept: kept.opened_at, default=None)
        return None if found is None or now - found.opened_at > self.bounds.kept_s else found

    def new_id(self, bits: int) -> str:
        """A random id that is not zero, in hex."""
        return f"{self._rng.getrandbits(bits) or 1:0{bits // 4}x}"

    def weigh(self, kept: Kept, size_bytes: int) -> None:
        """A trace has grown."""
        kept.size_bytes += size_bytes
        if kept.trace_id in self._kept:  # one that was forgotten while it runs counts no more
            self._size_bytes += size_bytes

    def _forget(self, now: float) -> None:
        """Drop the oldest, down to the bounds."""
        for kept in list(self._oldest(now)):
            del self._kept[kept.trace_id]
            self._size_bytes -= kept.size_bytes
            for request_id in kept.request_ids:
                if self._by_request.get(request_id) == kept.trace_id:
                    del self._by_request[request_id]

    def _oldest(self, now: float) -> Iterator[Kept]:
        bounds, traces, size_bytes = self.bounds, len(self._kept), self._size_bytes
        for kept in self._kept.values():
            if (
                traces <= bounds.traces_max
                and size_bytes <= bounds.bytes_max
                and now - kept.opened_at <= bounds.kept_s
            ):
                return
            traces, size_bytes = traces - 1, size_bytes - kept.size_bytes
            yield kept


class Trace:
    """A request's trace as one part of the node works on it. ``context`` is what to hand on to others."""

    __slots__ = ("_book", "_kept", "context")

    def __init__(self, context: TraceContext, kept: Kept | None, book: TraceBook) -> None:
        self.context = context
        self._kept = kept
        self._book = book

    def under(self, span: Span | None) -> Trace:
        """The same trace, for what works under ``span``."""
        if span is None:
            return self
        return Trace(replace(self.context, span_id=span.span_id), self._kept, self._book)

    def begin(
        self,
        name: str,
        now: float,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span | None:
        """A step begins; ``now`` is on the node's clock."""
        kept = self._kept
        if kept is None:
            return None
        if len(kept.spans) >= self._book.bounds.spans_max:
            kept.spans_dropped += 1
            return None
        span = Span(
            span_id=self._book.new_id(64),
            parent_id=self.context.span_id,
            name=name,
            kind=kind,
            started_at=now + kept.clock_offset_s,
            attributes=attributes or {},
        )
        kept.spans.append(span)
        self._book.weigh(kept, SPAN_BYTES)
        return span

    def end(
        self, span: Span | None, now: float, attributes: Attributes | None = None, *, error: str = ""
    ) -> None:
        """It has ended; with an ``error``'s code where it failed. What has ended stays as it is."""
        kept = self._kept
        if span is None or kept is None or span.ended_at is not None:
            return
        span.ended_at = max(now + kept.clock_offset_s, span.started_at)
        span.error = error
        if attributes:
            span.attributes.update(attributes)
        size_bytes = 0
        for name, value in span.attributes.items():
            if isinstance(value, str):
                span.attributes[name] = value = value[:VALUE_CHARS_MAX]
                size_bytes += len(value)
        self._book.weigh(kept, size_bytes)
        if self._book.ended is not None:
            self._book.ended(self.context, span)

    def add(
        self, name: str, began: float, now: float, attributes: Attributes | None = None, *, error: str = ""
    ) -> None:
        """A step that is over already."""
        self.end(self.begin(name, began, attributes), now, error=error)
