"""The listener for Prometheus. Owns: as much HTTP as a scraper needs, and its bounds.

Must not: know a metric.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from fieldmesh.core.model import Address
from fieldmesh.runtime import log

HEAD_BYTES_MAX = 8192
CONNECTIONS_MAX = 16
TIMEOUT_S = 5.0
PATH = "/metrics"

Page = Callable[[str], tuple[bytes, str]]
"""The body for a scraper that accepts these formats, and its content type."""

logger = log.get()


@asynccontextmanager
async def listening(address: Address | None, page: Page) -> AsyncIterator[Address | None]:
    """Serve ``page`` at ``/metrics``; yields where. None, in or out: nowhere.

    Where the port is taken a warning is all that happens: a node that nobody watches still answers.
    """
    server = None
    if address is not None:
        try:
            server = await asyncio.start_server(
                _Scrapes(page).answer, address.host, address.port, limit=HEAD_BYTES_MAX
            )
        except OSError as error:
            logger.warning(
                "metrics_not_served",
                address=str(address),
                why=error.strerror or str(error),
                remedy="choose another port with --metrics-listen, or say --metrics-listen off",
            )
    try:
        yield _bound(address, server) if address is not None and server is not None else None
    finally:
        if server is not None:
            server.close()


def _bound(address: Address, server: asyncio.Server) -> Address:
    return Address(host=address.host, port=server.sockets[0].getsockname()[1])


class _Scrapes:
    """Connections of scrapers: one request each."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._open = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request, write one answer, close."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                async with asyncio.timeout(TIMEOUT_S):
                    writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever speaks no HTTP, or too slowly, gets no answer
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _response(self, request: bytes) -> bytes:
        line, _, rest = request.decode("latin-1").partition("\r\n")
        method, _, target = line.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        if path != PATH:
            return _head(HTTPStatus.NOT_FOUND, "text/plain", 0)
        if method not in ("GET", "HEAD"):
            return _head(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", 0, "Allow: GET, HEAD\r\n")
        body, content_type = self._page(_header(rest, "accept"))
        head = _head(HTTPStatus.OK, content_type, len(body))
        return head if method == "HEAD" else head + body


def _header(lines: str, wanted: str) -> str:
    for line in lines.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == wanted:
            return value.strip()
    return ""


def _head(status: HTTPStatus, content_type: str, length: int, more: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {length}\r\nX-Content-Type-Options: nosniff\r\n{more}Connection: close\r\n\r\n"
    ).encode("latin-1")
