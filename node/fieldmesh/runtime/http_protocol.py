"""One HTTP connection: uvicorn's, with the times that it does not bound itself.

Owns: how long a head may take to arrive, a silent connection may stay, and a reader may stand still; cutting
those that are too many to be told so. Must not: know a route. Imported only where the HTTP listener is on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fieldmesh.runtime import http_server


class BoundedProtocol(H11Protocol):
    """A connection that cannot be held open by sending slowly, or by not reading."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if (
            self.limit_concurrency
            and len(self.connections) > self.limit_concurrency + http_server.REFUSALS_MAX
        ):
            transport.abort()
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            http_server.IDLE_TIMEOUT_S, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        incomplete = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if incomplete and self._head_timer is None:
            self._head_timer = self.loop.call_later(http_server.HEAD_TIMEOUT_S, self.transport.abort)
        elif not incomplete and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        with suppress(h11.LocalProtocolError):  # an answer has begun, or may have no body: it is cut off
            super().send_400_response(msg)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(http_server.WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = None
