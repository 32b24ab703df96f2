"""Traces that go to a collector. Goal: they arrive as OpenTelemetry has them, at no request's expense.

Method: a small OTLP receiver on loopback, and whole nodes with fake engines.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fieldmesh.config import TraceSlice, load
from fieldmesh.core.errors import ConfigError, PromptTooLong
from fieldmesh.core.tracing import Span, SpanKind, TraceContext
from fieldmesh.runtime import otlp
from tests.runtime.test_node import new_site, tiny

__all__ = ["tiny"]


class Collector(HTTPServer):
    """Takes what is sent to it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.taken: list[ExportTraceServiceRequest] = []
        super().__init__(("127.0.0.1", 0), _Taking)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> dict[str, tuple[Any, dict[str, str]]]:
        """Every span by the name of its node and its own, with what is said of the node."""
        found = {}
        for request in self.taken:
            for of in request.resource_spans:
                about = {entry.key: entry.value.string_value for entry in of.resource.attributes}
                for scope in of.scope_spans:
                    for span in scope.spans:
                        found[f"{about['fieldmesh.node']}: {span.name}"] = span, about
        return found


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.append(self.path)
        self.server.taken.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


async def test_a_forwarded_request_arrives_as_one_trace(
    tmp_path: Path, tiny: Path, collector: Collector
) -> None:
    watched = {"trace": TraceSlice(otlp_endpoint=collector.endpoint)}
    async with new_site(tmp_path, tiny) as site:
        general = await site.start("general", "general", **watched)
        await site.start("code", "code", **watched)
        await site.formed()
        async with site.client("general") as client:
            result = await client.chat("the secret", profile="code", max_tokens=5, ignore_eos=True).result()
            with pytest.raises(PromptTooLong):
                await client.generate("x" * 5000, profile="general").result()
        node_id = general.key.id
    # The nodes have ended, and with them everything that was left to send.
    assert set(collector.paths) == {"/v1/traces"}
    found = collector.spans()
    root, about = found["general: chat tiny"]
    names = ("general: route", "general: forward code", "code: chat tiny", "code: prefill", "code: decode")
    assert {span.trace_id.hex() for span, _ in (found[name] for name in names[1:])} == {result.trace_id}
    assert root.trace_id.hex() == result.trace_id
    assert about["service.name"] == "fieldmesh"
    assert (about["service.instance.id"], about["fieldmesh.mesh"]) == (node_id, "test")
    forward, serve, decode = (found[name][0] for name in (names[1], names[2], names[4]))
    assert forward.parent_span_id == root.span_id
    assert serve.parent_span_id == forward.span_id
    assert decode.parent_span_id == serve.span_id
    assert (root.kind, forward.kind, decode.kind) == (2, 3, 1)  # server, client, internal
    assert root.start_time_unix_nano <= forward.start_time_unix_nano <= serve.start_time_unix_nano
    attributes = {entry.key: entry.value for entry in root.attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    reasons = attributes["gen_ai.response.finish_reasons"].array_value.values
    assert [reason.string_value for reason in reasons] == ["length"]
    failed = found["general: text_completion tiny"][0]
    assert (failed.status.code, failed.status.message) == (2, "PROMPT_TOO_LONG")
    assert "PROMPT_TOO_LONG" in {entry.value.string_value for entry in failed.attributes}
    assert "secret" not in repr(collector.taken)


async def test_a_collector_that_is_not_there_costs_requests_nothing(tmp_path: Path, tiny: Path) -> None:
    async with new_site(tmp_path, tiny) as site:
        # Port 9 (discard) of loopback: nobody listens.
        await site.start("general", trace=TraceSlice(otlp_endpoint="http://127.0.0.1:9"))
        await site.formed()
        async with site.client("general") as client, asyncio.timeout(20):
            for _ in range(20):
                await client.chat("hello", max_tokens=2).result()


async def test_what_a_collector_does_not_take_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "QUEUE_SPANS_MAX", 8)
    monkeypatch.setattr(otlp, "BATCH_SPANS_MAX", 4)
    monkeypatch.setattr(otlp, "CLOSE_TIMEOUT_S", 0.1)
    taken: list[int] = []
    stuck = threading.Event()

    def export(_: object, batch: list[object]) -> None:
        taken.append(len(batch))
        stuck.wait()

    monkeypatch.setattr(otlp.OTLPSpanExporter, "export", export)
    context = TraceContext(trace_id="a" * 32, state="vendor=1")
    async with otlp.exporting("http://127.0.0.1:9", {"fieldmesh.node": "general"}) as ended:
        for number in range(1000):
            ended(
                context,
                Span(
                    span_id=f"{number + 1:016x}",
                    parent_id="b" * 16,
                    name="step",
                    kind=SpanKind.INTERNAL,
                    started_at=1.0,
                    ended_at=2.0,
                ),
            )
    stuck.set()
    assert sum(taken) <= 4 + 8


def test_opentelemetrys_own_variable_is_honoured() -> None:
    def endpoint(flag: str | None = None, **environ: str) -> tuple[str, str]:
        loaded = load({"trace.otlp_endpoint": flag}, environ=environ, folder=Path("/nowhere"))
        return loaded.config.trace.otlp_endpoint, loaded.sources["trace.otlp_endpoint"]

    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://standard:4318"}
    ours = {"FIELDMESH_TRACE_OTLP_ENDPOINT": "http://ours:4318"}
    assert endpoint() == ("", "default")
    assert endpoint(**standard) == ("http://standard:4318", "environment OTEL_EXPORTER_OTLP_ENDPOINT")
    assert endpoint(**standard, **ours)[0] == "http://ours:4318"
    assert endpoint("https://flag/otlp", **standard, **ours) == ("https://flag/otlp", "flag --otlp-endpoint")
    with pytest.raises(ConfigError) as caught:
        endpoint("collector:4318")
    assert caught.value.field == "trace.otlp_endpoint"
    assert "http://127.0.0.1:4318" in caught.value.message


async def test_without_the_extra_a_node_says_what_to_install(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fieldmesh.runtime.otlp")
    monkeypatch.delattr("fieldmesh.runtime.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    async with new_site(tmp_path, tiny) as site:
        with pytest.raises(ConfigError, match=r"fieldmesh\[node,otel\]") as caught:
            await site.start("general", trace=TraceSlice(otlp_endpoint="http://127.0.0.1:4318"))
    assert caught.value.field == "trace.otlp_endpoint"
