"""The listening side of control streams. Owns: how many streams there are, how fast they are read, and who
is named as the sender of a message. Must not: know what messages mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from fieldmesh.core.errors import Draining, FieldmeshError, InvalidRequest, TooManyStreams
from fieldmesh.core.model import NodeId
from fieldmesh.runtime.gate import CONTROL_METHOD, Context, caller_of, refuse
from fieldmesh.runtime.links import Lane, LinksConfig, PeerBytes

OnReceived = Callable[[NodeId, bytes], None]
"""A message came on a stream that this node opened."""


class Receiver:
    """The server side of control streams: hands every message to ``on_received``, in order.

    A node has one stream here, and for a moment several where its network changed; beyond
    ``streams_per_peer_max`` the oldest is ended.
    """

    def __init__(
        self, on_received: OnReceived, config: LinksConfig | None = None, counted: PeerBytes | None = None
    ) -> None:
        self.config = config or LinksConfig()
        self.received = self.refused = 0
        self.bytes = counted or PeerBytes()
        self._closed = False
        self._on_received = on_received
        self._streams: dict[NodeId, list[asyncio.Task[Any]]] = {}

    @property
    def streams(self) -> int:
        """How many are open."""
        return sum(len(tasks) for tasks in self._streams.values())

    def handler(self) -> grpc.GenericRpcHandler:
        """What the peer's server is given, before the generated service: messages stay bytes here."""
        service, _, method = CONTROL_METHOD[1:].partition("/")
        receive: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._receive)
        return grpc.method_handlers_generic_handler(service, {method: receive})

    def close(self) -> None:
        """End all streams and take no more: the others know by a goodbye that this node is leaving."""
        self._closed = True
        for tasks in self._streams.values():
            while tasks:
                tasks.pop().cancel()

    async def _receive(self, messages: AsyncIterator[bytes], context: Context) -> bytes:
        caller = caller_of(context.invocation_metadata())
        if self._closed:
            await self._refuse(context, Draining("This node is leaving"))
        elif caller is None:
            await self._refuse(
                context, InvalidRequest("Control messages come from nodes only", field="user-agent")
            )
        elif caller.node not in self._streams and len(self._streams) >= self.config.peers_max:
            await self._refuse(
                context,
                TooManyStreams(
                    f"This node listens to {self.config.peers_max} peers already", retry_after_s=5.0
                ),
            )
        else:
            await self._listen(caller.node, messages, context)
        return b""

    async def _listen(self, sender: NodeId, messages: AsyncIterator[bytes], context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks = self._streams.setdefault(sender, [])
        tasks.append(task)
        if len(tasks) > self.config.streams_per_peer_max:
            tasks.pop(0).cancel()
        try:
            pace = _Pace(self.config.received_per_s_max)
            async for message in messages:
                await pace.keep()
                if len(message) > self.config.control_message_bytes_max:
                    self.refused += 1
                else:
                    self.received += 1
                    self.bytes.received.add((sender, Lane.CONTROL.value), len(message))
                    self._on_received(sender, message)
        except asyncio.CancelledError:
            if task in tasks:
                raise
            task.uncancel()  # it is we who end this stream, and its sender must learn why
            await self._refuse(context, Draining("This node is leaving") if self._closed else _replaced())
        finally:
            if task in tasks:
                tasks.remove(task)
            if not tasks and self._streams.get(sender) is tasks:
                del self._streams[sender]

    async def _refuse(self, context: Context, error: FieldmeshError) -> None:
        self.refused += 1
        await refuse(context, error)


class _Pace:
    """Holds a stream to so many messages a second by reading no faster: gRPC's flow control does the rest."""

    def __init__(self, messages_per_s_max: int) -> None:
        self._messages_per_s_max = messages_per_s_max
        self._time = asyncio.get_running_loop().time
        self._window_ends = self._time() + 1.0
        self._messages = 0

    async def keep(self) -> None:
        now = self._time()
        if now >= self._window_ends:
            self._window_ends, self._messages = now + 1.0, 0
        self._messages += 1
        if self._messages > self._messages_per_s_max:
            await asyncio.sleep(self._window_ends - now)


def _replaced() -> FieldmeshError:
    return TooManyStreams("A newer stream of this node took the place of this one")
