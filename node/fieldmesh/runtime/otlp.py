"""Sends finished spans to a collector, by OTLP over HTTP. Owns: the one use of OpenTelemetry's library, which
the extra ``otel`` brings.

A thread sends; whoever ends a span only puts it into a bounded queue, from which the oldest fall out while
the collector does not take them. Headers, certificates and time limits are what OpenTelemetry's own variables
say (``OTEL_EXPORTER_OTLP_HEADERS`` and so on). Must not: know requests, or keep anything else waiting.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from fieldmesh import __version__
from fieldmesh.core.tracing import Ended, Span, TraceContext
from fieldmesh.core.tracing import SpanKind as OurKind

PATH = "/v1/traces"
QUEUE_SPANS_MAX = 4096
BATCH_SPANS_MAX = 512
SEND_INTERVAL_MS = 2_000.0
CLOSE_TIMEOUT_S = 3.0
"""How long a node that stops waits for the last spans to be taken."""

_KINDS = {
    OurKind.INTERNAL: SpanKind.INTERNAL,
    OurKind.SERVER: SpanKind.SERVER,
    OurKind.CLIENT: SpanKind.CLIENT,
}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("fieldmesh", __version__)


@asynccontextmanager
async def exporting(endpoint: str, about: Mapping[str, str]) -> AsyncIterator[Ended]:
    """What is to be told of every span that ends; ``about`` says whose they are."""
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(endpoint=url if url.endswith(PATH) else url + PATH)
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=QUEUE_SPANS_MAX,
        max_export_batch_size=BATCH_SPANS_MAX,
        schedule_delay_millis=SEND_INTERVAL_MS,
    )
    resource = Resource.create({"service.name": "fieldmesh", "service.version": __version__, **about})

    def ended(context: TraceContext, span: Span) -> None:
        processor.on_end(_readable(context, span, resource))

    try:
        yield ended
    finally:
        # A collector that takes nothing must not keep a node from ending, nor its threads the process.
        closing = threading.Thread(target=processor.shutdown, name="otlp-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_TIMEOUT_S)


def _readable(context: TraceContext, span: Span, resource: Resource) -> ReadableSpan:
    trace_id, state = int(context.trace_id, 16), TraceState.from_header([context.state])

    def of(span_id: str, *, is_remote: bool) -> SpanContext:
        return SpanContext(trace_id, int(span_id, 16), is_remote, _SAMPLED, state)

    return ReadableSpan(
        name=span.name,
        context=of(span.span_id, is_remote=False),
        parent=of(span.parent_id, is_remote=span.kind is OurKind.SERVER) if span.parent_id else None,
        resource=resource,
        attributes={**span.attributes, "error.type": span.error} if span.error else dict(span.attributes),
        kind=_KINDS[span.kind],
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
        start_time=int(span.started_at * 1e9),
        end_time=int((span.ended_at or span.started_at) * 1e9),
        instrumentation_scope=_SCOPE,
    )
