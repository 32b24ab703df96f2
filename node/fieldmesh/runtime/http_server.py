"""The HTTP listener. Owns: the socket, and the bounds of a connection.

A head must arrive whole within HEAD_TIMEOUT_S of its first byte and in HEAD_BYTES_MAX, a connection without
a request is closed after IDLE_TIMEOUT_S, and one whose reader has stopped is cut after WRITE_TIMEOUT_S. There
are at most CONNECTIONS_MAX, and never so many that the mesh has no file descriptors left. Must not: know a
route.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fieldmesh.core.model import Address
from fieldmesh.runtime import log

HEAD_BYTES_MAX = 32_768
HEAD_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 75
WRITE_TIMEOUT_S = 60.0
CONNECTIONS_MAX = 4096
REFUSALS_MAX = 64
"""Connections above the most that are told so; those above are cut."""
FILES_KEPT = 512
"""File descriptors that connections leave to the mesh, the engines and the disk."""
BACKLOG = 512
SEND_BUFFER_BYTES = 131_072
"""What the kernel keeps for a reader that is behind, instead of megabytes."""
STOP_GRACE_S = 1.0

ASGIApplication = Any
"""An ASGI application; what defines the type is only imported where one is served."""

logger = log.get()


@asynccontextmanager
async def listening(
    address: Address | None, make_app: Callable[[], ASGIApplication]
) -> AsyncIterator[Address | None]:
    """Serve the application that ``make_app`` makes; yields where. None, in or out: nowhere.

    Where the port is taken a warning is all that happens: the mesh does not need this door.
    """
    listener = None
    if address is not None:
        try:
            listener = _socket(address)
        except OSError as error:
            logger.warning(
                "http_not_served",
                address=str(address),
                why=error.strerror or str(error),
                remedy="choose another port with --http-listen, or say --http-listen off",
            )
    if address is None or listener is None:
        yield None
        return
    # Imported here: a node without this door does not carry it.
    import uvicorn
    from uvicorn.server import ServerState

    from fieldmesh.runtime.http_protocol import BoundedProtocol

    config = uvicorn.Config(
        make_app(),
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",  # whoever speaks no HTTP is answered so; a line each would be a flood
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=connections_max(),
        timeout_keep_alive=IDLE_TIMEOUT_S,
        h11_max_incomplete_event_size=HEAD_BYTES_MAX,
    )
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: BoundedProtocol(config=config, server_state=state, app_state={}),
        sock=listener,
        backlog=BACKLOG,
    )
    try:
        yield Address(host=address.host, port=listener.getsockname()[1])
    finally:
        server.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(list(state.tasks), timeout=STOP_GRACE_S)
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(list(state.tasks))
        for connection in list(state.connections):
            connection.transport.abort()


def connections_max() -> int:
    """How many connections there may be, with the file descriptors that this process may have."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return min(CONNECTIONS_MAX, max(files // 2, files - FILES_KEPT))


def _socket(address: Address) -> socket.socket:
    family, _, _, _, bound = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    # The protocol in words: asyncio sends what is small at once (TCP_NODELAY) only where it reads TCP there.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(bound)
        listener.listen(BACKLOG)  # two that start at once can both bind: here one learns of the other
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
