"""The border of every HTTP route: one request in, one answer or one coded error out.

Owns: reading a body within its bounds, request ids, cancelling the work of a caller who left, translating
what a handler raises, counting requests by how they ended, and refusing web pages of other origins, those too
that made their own name point here. Must not: know any API.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from email.utils import formatdate
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from fieldmesh.core.errors import Cancelled, FieldmeshError, Internal
from fieldmesh.core.model import RequestId
from fieldmesh.rpc.errors import HTTP_STATUSES
from fieldmesh.rpc.inference import REQUEST_ID
from fieldmesh.rpc.openai_answers import envelope
from fieldmesh.runtime import log
from fieldmesh.runtime.door import OK, Calls, new_request_id

BODY_TIMEOUT_S = 60.0
"""How long a body may take to arrive."""

TRACE_HEADER = "x-fieldmesh-trace"
TOLD_HEADERS = (
    *("x-request-id", "x-fieldmesh-served-by", "x-fieldmesh-profile", "x-fieldmesh-attempts"),
    TRACE_HEADER,
)
JSON = "application/json"
_ECHOED_CHARS_MAX = 40
_OUT_OF_PUBLIC_DNS = (".localhost", ".local", ".internal", ".home.arpa", ".lan")
"""Ends of names that only a box of the site can have (RFC 6761, 6762, 8375, and what ICANN keeps free)."""

logger = log.get()


class Refusal(Exception):
    """What HTTP itself has a status for, and our errors have not. ``code`` is stable; ``headers`` explain."""

    def __init__(self, status: int, code: str, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = tuple(headers)


class Exchange:
    """One request, and its answer. ``request_id`` is the mesh's; ``echoed`` the caller's, if it has one."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.method: str = scope["method"]
        self.headers = Headers(scope=scope)
        self.parameters: dict[str, Any] = {}
        self.body = b""
        self.started = False
        self.failing: Told | None = None
        """How this one answer, once begun, says an error; None: as its endpoint does."""
        self._send = send
        theirs = self.headers.get("x-request-id", "")
        self.echoed = theirs if REQUEST_ID.fullmatch(theirs) else ""
        self.request_id = _mesh_request_id(self.headers.get("idempotency-key", ""), self.echoed)

    @property
    def caller(self) -> str:
        """Who asks, as far as its key tells: a name for fair shares, which lets nobody in or out."""
        key = self.headers.get("authorization", "").removeprefix("Bearer ").strip()
        return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else ""

    async def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: str = JSON,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """The whole answer."""
        bodiless = self.method == "HEAD" or status == 304
        await self._begin(status, content_type, (*headers, ("content-length", str(len(body)))))
        await self._send(
            {"type": "http.response.body", "body": b"" if bodiless else body, "more_body": False}
        )

    async def begin(self, content_type: str, headers: Iterable[tuple[str, str]]) -> None:
        """Start an answer that comes in parts."""
        await self._begin(200, content_type, (*headers, ("cache-control", "no-store")))

    async def write(self, part: bytes) -> None:
        """Send a part; returns when the connection can take more."""
        if part:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self, part: bytes = b"") -> None:
        """Send the last part."""
        await self._send({"type": "http.response.body", "body": part, "more_body": False})

    async def _begin(self, status: int, content_type: str, headers: Iterable[tuple[str, str]]) -> None:
        self.started = True
        told = [
            ("content-type", content_type),
            ("date", formatdate(time.time(), usegmt=True)),
            ("x-request-id", self.echoed or self.request_id),
            ("x-content-type-options", "nosniff"),
            *headers,
        ]
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in told]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def _mesh_request_id(key: str, echoed: str) -> RequestId:
    """The id of a request in the mesh: the same for a repeat under one ``Idempotency-Key``, and otherwise
    its own, beginning with the caller's, for that may name more than one request."""
    if key:
        return RequestId("idem-" + hashlib.sha256(key.encode()).hexdigest()[:32])
    made = new_request_id()
    return RequestId(f"{echoed[:_ECHOED_CHARS_MAX]}-{made[:16]}" if echoed else made)


Handler = Callable[[Exchange], Awaitable[None]]
Told = Callable[[FieldmeshError], bytes]
"""An error as bytes of an API's answer."""


class Endpoint:
    """One route as an ASGI application.

    ``document`` says an error as a whole answer, ``event`` as the end of a stream that had begun.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        name: str,
        methods: Sequence[str],
        calls: Calls,
        body_bytes_max: int,
        document: Told,
        event: Told,
    ) -> None:
        self._handler = handler
        self._name = name
        self._methods = methods
        self._calls = calls
        self._body_bytes_max = body_bytes_max
        self._document = document
        self._event = event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, send)
        exchange.parameters = scope.get("path_params", {})
        ending = Cancelled.code
        with log.request(exchange.request_id):
            try:
                ending = await self._answered(exchange, receive)
            except Refusal as refusal:
                ending = refusal.code.upper()
                await refused(exchange, refusal)
            except FieldmeshError as error:
                ending = error.code
                await self._fail(exchange, error)
            except Exception:
                ending = Internal.code
                logger.exception("request_crashed")
                defect = Internal("A defect of Fieldmesh ended this request; the node's log has the details")
                await self._fail(exchange, defect)
            finally:
                self._calls.add((self._name, ending))

    async def _answered(self, exchange: Exchange, receive: Receive) -> str:
        """Do the work unless the caller leaves first; how it ended. Raises what the handler raises."""
        if exchange.method not in self._methods:
            allowed = ", ".join(self._methods)
            raise Refusal(
                405, "method_not_allowed", f"{exchange.method} is not for this; use {allowed}",
                [("allow", allowed)],
            )  # fmt: skip
        exchange.body = await read_body(receive, exchange.headers, self._body_bytes_max)
        work = asyncio.ensure_future(self._handler(exchange))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Cancelled.code
            work.result()
            return OK
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait((work, gone))

    async def _fail(self, exchange: Exchange, error: FieldmeshError) -> None:
        logger.info("request_refused", code=error.code, error=error.message, field=error.field)
        if exchange.started:
            await exchange.end((exchange.failing or self._event)(error))
            return
        headers = []
        if trace_id := error.metadata.get("trace_id"):
            headers.append((TRACE_HEADER, trace_id))
        if error.retry_after_s is not None:
            # Whole seconds is what HTTP knows; OpenAI's own clients look for the finer one first.
            headers.append(("retry-after", str(math.ceil(error.retry_after_s))))
            headers.append(("retry-after-ms", str(math.ceil(error.retry_after_s * 1000))))
        await exchange.reply(self._document(error), status=HTTP_STATUSES[error.status], headers=headers)


async def refused(exchange: Exchange, refusal: Refusal) -> None:
    """Say a refusal of HTTP's own."""
    body = envelope(refusal.message, kind="invalid_request_error", code=refusal.code)
    await exchange.reply(body, status=refusal.status, headers=refusal.headers)


async def read_body(receive: Receive, headers: Headers, bytes_max: int) -> bytes:
    """The body of a request. Raises Refusal where it is too large or too slow."""
    too_large = Refusal(
        413,
        "body_too_large",
        f"The body is larger than {bytes_max} bytes, the most that is accepted",
        [("connection", "close")],
    )
    announced = headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > bytes_max:
        raise too_large
    parts = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                parts += message.get("body", b"")
                if len(parts) > bytes_max:
                    raise too_large
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return bytes(parts)
    except TimeoutError:
        raise Refusal(
            408,
            "body_too_slow",
            f"The body did not arrive within {BODY_TIMEOUT_S:g} s",
            [("connection", "close")],
        ) from None


async def _left(receive: Receive) -> None:
    """Return when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    missing = Refusal(404, "not_found", f"There is nothing at {scope['path'][:200]}; /v1/models is a start")
    await refused(Exchange(scope, send), missing)


def application(routes: Sequence[Route], origins: Sequence[str], names: Iterable[str]) -> ASGIApp:
    """All routes as one application, open to web pages of its own origin and of ``origins`` (``*``: any).

    ``names`` are the node's own, beside those that nobody outside of its site can have; see ``_PageGuard``.
    """
    router = Router(routes, redirect_slashes=False, default=_nowhere)
    guarded = _PageGuard(router, frozenset(origins), names)
    if not origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=TOLD_HEADERS,
    )


class _PageGuard:
    """Refuses what a web page of another origin sends: a browser lets it ask, even where it may not read.

    A page whose own name was made to point here (DNS rebinding) counts as of this origin to the browser, and
    its GETs carry no Origin. So a Host must be what no stranger's page can have: an address, a name without
    dots, one under a domain that public DNS does not know, one of the node's own, a welcome origin's.
    """

    def __init__(self, app: ASGIApp, origins: frozenset[str], names: Iterable[str]) -> None:
        self._app = app
        self._origins = origins
        welcome = (_name(origin.partition("://")[2]) for origin in origins)
        self._names = frozenset((*(name.lower() for name in names), *welcome))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Headers(scope=scope))) is not None:
            await refused(Exchange(scope, send), refusal)
            return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and not self._welcome(origin, host):
            message = f"Web pages of {origin[:200]} may not ask this node; see --http-origins"
            return Refusal(403, "origin_not_allowed", message)
        if "*" not in self._origins and not self._ours(host):
            message = (
                f"This node does not go by the name {host[:200]}; ask it by its address, or name "
                f"http://{host[:200]} in --http-origins"
            )
            return Refusal(403, "host_not_allowed", message)
        return None

    def _ours(self, host: str) -> bool:
        name = _name(host)
        if "." not in name or name in self._names or name.endswith(_OUT_OF_PUBLIC_DNS):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _welcome(self, origin: str, host: str) -> bool:
        return bool(self._origins & {"*", origin}) or origin.partition("://")[2] == host


def _name(host: str) -> str:
    """A host without its port, as names are compared."""
    return re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
