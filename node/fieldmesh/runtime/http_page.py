"""The web page at every node, and the mesh as it draws it.

Owns: the page's files with what browsers are told to keep to (nothing is loaded from elsewhere, nothing runs
that is not one of these files), and the stream of changes with its bounds. Must not: decide anything, or know
what a snapshot holds (``rpc.snapshot`` does).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.routing import Route

from fieldmesh.core.errors import TooManyStreams
from fieldmesh.core.model import RequestId
from fieldmesh.rpc.openai import model_names
from fieldmesh.rpc.openai_answers import encode, error_document, error_event
from fieldmesh.rpc.snapshot import Snapshot, changes, reasons, snapshot
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.http_door import JSON, Endpoint, Exchange, Handler, Refusal
from fieldmesh.runtime.service import Service

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = (
    ("content-security-policy", POLICY),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("x-frame-options", "DENY"),
    ("cache-control", "no-cache"),  # keep it, and ask each time whether it is still the same
)

INTERVAL_S = 0.25
"""How often a page is told what changed, at most; a snapshot serves all that ask within it."""
BEAT_S = 2.0
"""How long nothing may be said: a page takes longer silence for the node's death."""
WATCHERS_MAX = 32
FLOWS_MAX = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    body: bytes
    content_type: str
    tag: str


def _read(path: Path) -> _File:
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    return _File(body=body, content_type=_TYPES[path.suffix], tag=tag)


class Page:
    """The routes of the web page over one service. ``log`` tells what this node knows of the log."""

    def __init__(
        self, service: Service, log: Callable[[], dict[str, Any]], *, mesh: str, calls: Calls
    ) -> None:
        self._service = service
        self._log = log
        self._mesh = mesh
        self._calls = calls
        self._files = {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in _TYPES}
        self._watchers = 0
        self._snapshot: Snapshot = {}
        self._made_at = float("-inf")

    def routes(self) -> list[Route]:
        """Every route."""
        return [
            self._route("/", self._file, "HEAD"),
            self._route("/page/{name}", self._file, "HEAD"),
            self._route("/mesh", self._now, "HEAD"),
            self._route("/mesh/events", self._events),
            self._route("/mesh/requests/{id}", self._request, "HEAD"),
        ]

    def _route(self, path: str, handler: Handler, *methods: str) -> Route:
        endpoint = Endpoint(
            handler,
            name=f"GET {path.partition('/{')[0]}",
            methods=("GET", *methods),
            calls=self._calls,
            body_bytes_max=0,
            document=error_document,
            event=error_event,
        )
        return Route(path, endpoint)

    async def _file(self, exchange: Exchange) -> None:
        found = self._files.get(exchange.parameters.get("name", INDEX))
        if found is None:
            raise Refusal(404, "not_found", "The web page has no such file; it begins at /")
        headers = (*_HEADERS, ("etag", found.tag))
        known = exchange.headers.get("if-none-match", "")
        status = 304 if found.tag in known or known == "*" else 200
        await exchange.reply(found.body, status=status, content_type=found.content_type, headers=headers)

    async def _now(self, exchange: Exchange) -> None:
        await exchange.reply(
            encode(self._latest()), content_type=JSON, headers=(("cache-control", "no-store"),)
        )

    async def _events(self, exchange: Exchange) -> None:
        """Everything, then what changed, until the caller leaves."""
        if self._watchers >= WATCHERS_MAX:
            raise TooManyStreams(
                f"{self._watchers} pages watch this node, its most; open the page of another node",
                retry_after_s=5.0,
            )
        self._watchers += 1
        try:
            await exchange.begin("text/event-stream; charset=utf-8", (("x-accel-buffering", "no"),))
            told: Snapshot = {}
            silent_s = 0.0
            while True:
                now = self._latest()
                news = changes(told, now)
                if news or silent_s >= BEAT_S:
                    await exchange.write(b"data: " + encode(news) + b"\n\n")
                    told, silent_s = now, 0.0
                await asyncio.sleep(INTERVAL_S)
                silent_s += INTERVAL_S
        finally:
            self._watchers -= 1

    async def _request(self, exchange: Exchange) -> None:
        flow = self._service.flow(RequestId(exchange.parameters["id"]))
        if flow is None:
            raise Refusal(404, "request_not_found", "This node remembers no such request")
        await exchange.reply(encode(reasons(flow)), headers=(("cache-control", "no-store"),))

    def _latest(self) -> Snapshot:
        now = asyncio.get_running_loop().time()
        if now - self._made_at >= INTERVAL_S:
            self._made_at = now
            view = self._service.view
            self._snapshot = snapshot(
                view,
                mesh=self._mesh,
                models=model_names(view),
                log=self._log(),
                flows=self._service.flows(FLOWS_MAX),
            )
        return self._snapshot
