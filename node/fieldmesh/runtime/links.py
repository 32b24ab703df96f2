"""Connections between nodes. Owns: channels to peers, the streams of control messages on them, their bounds.

Each peer address has up to four connections, so that none waits behind another: control (one stream of small
messages, all the time), tokens (forwarded requests; kept warm), and, made when first asked for, log (the
replicated log and those who follow it) and bulk. Control
messages are datagrams to those who send them: ``send`` never waits, and what a slow or dead peer does not
take is dropped, oldest first, and counted. That a connection ended is told at once; silence is for the core
to notice. Must not: know what messages mean, or who is a member.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import grpc
import grpc.aio

from fieldmesh.core.errors import Draining
from fieldmesh.core.model import Address, NodeId
from fieldmesh.core.tally import Counts
from fieldmesh.rpc.wire import CONTROL_BYTES_MAX
from fieldmesh.runtime.gate import CONTROL_METHOD, Caller

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksConfig:
    """Bounds and times of connections.

    A cut that the core does not notice first is noticed after ``keepalive_s`` + ``keepalive_timeout_s``.
    Reconnecting backs off to ``reconnect_s_max``: gRPC's own two minutes would make an outage of half a
    minute cost 15 seconds more. ``connect_timeout_s`` bounds one try; after a cut the next begins soon.
    """

    message_bytes_max: int = 4 * 1024 * 1024
    control_message_bytes_max: int = CONTROL_BYTES_MAX
    outgoing_messages_max: int = 256
    outgoing_bytes_max: int = 4 * 1024 * 1024
    peers_max: int = 1024
    warm_peers_max: int = 64
    streams_per_peer_max: int = 4
    received_per_s_max: int = 1000
    idle_close_s: float = 300.0
    idle_sweep_s: float = 30.0
    grace_s: float = 600.0
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 3.0
    reconnect_s_min: float = 0.2
    reconnect_s_max: float = 1.0
    connect_timeout_s: float = 1.0


class Lane(Enum):
    """What a connection is for."""

    CONTROL = "control"
    TOKENS = "tokens"
    LOG = "log"
    BULK = "bulk"


PEERS_COUNTED_MAX = 64


class PeerBytes:
    """Bytes of messages to and from other nodes, by node id and lane; ``other`` beyond the first 64 nodes."""

    def __init__(self) -> None:
        self.sent = _no_bytes()
        self.received = _no_bytes()


def _no_bytes() -> Counts[tuple[str, str]]:
    return Counts(PEERS_COUNTED_MAX * len(Lane), ("other", "other"))


OnFailed = Callable[[Address, NodeId | None, str], None]
"""The connection to this address (and the node last written to there) ended, or none came about; why."""


def channel_options(config: LinksConfig, lane: Lane, local: Caller) -> Options:
    """What a client connection of this kind is made with."""
    return (
        ("grpc.primary_user_agent", local.user_agent()),
        ("grpc.use_local_subchannel_pool", 1),  # else equal options would share one connection
        ("grpc.initial_reconnect_backoff_ms", int(config.reconnect_s_min * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(config.connect_timeout_s * 1000)),  # this is what it does
        ("grpc.max_reconnect_backoff_ms", int(config.reconnect_s_max * 1000)),
        *_keepalive(config),
        ("grpc.keepalive_permit_without_calls", 0 if lane is Lane.BULK else 1),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_receive_message_length", config.message_bytes_max),
        ("grpc.client_idle_timeout_ms", 2**31 - 1),  # warm is warm: letting go is our own decision
        ("grpc.enable_http_proxy", 0),  # peers are neighbours, whatever the environment says
        ("grpc.enable_retries", 0),  # dispatch decides what is tried again
    )


def server_options(config: LinksConfig) -> Options:
    """What the peer listener is made with."""
    return (
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a share of the calls
        ("grpc.max_allowed_incoming_connections", config.peers_max * len(Lane)),
        ("grpc.server_handshake_timeout_ms", 10_000),
        *_keepalive(config),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(config.keepalive_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_receive_message_length", config.message_bytes_max),
    )


def _keepalive(config: LinksConfig) -> Options:
    return (
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
    )


class Links:
    """This node's connections to others, by address. All methods belong to one event loop."""

    def __init__(
        self,
        local: Caller,
        on_failed: OnFailed,
        config: LinksConfig | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.config = config or LinksConfig()
        self.local = local
        self.credentials = credentials
        self.on_failed = on_failed
        self.sent = self.dropped = self.failures = 0
        self.bytes = PeerBytes()
        self._links: dict[Address, _Link] = {}
        self._closing: dict[asyncio.Task[None], _Link] = {}
        self._closed = False
        self._sweep: asyncio.TimerHandle | None = None

    def send(self, address: Address, to: NodeId | None, data: bytes) -> None:
        """Send one control message, perhaps; never waits, never raises."""
        if self._closed or len(data) > self.config.control_message_bytes_max:
            self.dropped += 1
            return
        self._link(address).send(to, data)

    def tokens(self, address: Address) -> grpc.aio.Channel:
        """The channel for forwarded requests to ``address``, warm where that node is a member.

        Raises Draining once the links are closed.
        """
        return self._link(address).channel(Lane.TOKENS)

    def log(self, address: Address) -> grpc.aio.Channel:
        """The channel for what concerns the replicated log to ``address``. Raises Draining."""
        return self._link(address).channel(Lane.LOG)

    def bulk(self, address: Address) -> grpc.aio.Channel:
        """The channel for what is large to ``address``. Raises Draining."""
        return self._link(address).channel(Lane.BULK)

    def forget(self, address: Address) -> None:
        """Let the connections to ``address`` go, once the requests on them have ended."""
        link = self._links.pop(address, None)
        if link is not None:
            task = asyncio.get_running_loop().create_task(link.close(self.config.grace_s))
            self._closing[task] = link
            task.add_done_callback(lambda _: self._closing.pop(task, None))

    def reconnect(self) -> None:
        """Begin all connections anew: they led from an address that this box has no longer.

        Without a word from the other side it would take gRPC some seconds to find out.
        """
        for address in list(self._links):
            self.forget(address)

    async def flush(self, timeout_s: float) -> None:
        """Wait until what was sent to connected peers has left, for a goodbye; at most ``timeout_s``."""
        waits = [
            asyncio.ensure_future(link.drained.wait()) for link in self._links.values() if link.connected
        ]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=timeout_s)
            for wait in pending:
                wait.cancel()

    async def close(self) -> None:
        """End all connections and what runs on them."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        links = [*self._links.values(), *self._closing.values()]
        self._links.clear()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await asyncio.gather(*(link.close(None) for link in links))

    @property
    def warms(self) -> bool:
        """Whether channels for tokens are connected before somebody asks; a large mesh makes too many."""
        return len(self._links) <= self.config.warm_peers_max

    def addresses(self) -> tuple[Address, ...]:
        """Addresses that have connections, the longest unused first."""
        return tuple(self._links)

    def _link(self, address: Address) -> _Link:
        """The link to ``address``; making one may cost the link that was unused for longest."""
        if self._closed:
            raise Draining("This node is leaving and opens no connections")
        link = self._links.pop(address, None)
        if link is None:
            if len(self._links) >= self.config.peers_max:
                self.forget(next(iter(self._links)))
            link = _Link(self, address)
            if self._sweep is None:
                self._sweep_unused()
        self._links[address] = link  # to the end: the most recently used
        link.used_at = asyncio.get_running_loop().time()
        return link

    def _sweep_unused(self) -> None:
        """Let go what was unused for ``idle_close_s``, and come back."""
        loop = asyncio.get_running_loop()
        for address, link in list(self._links.items()):
            if loop.time() - link.used_at < self.config.idle_close_s:
                break
            self.forget(address)
        self._sweep = loop.call_later(self.config.idle_sweep_s, self._sweep_unused)


class _Link:
    """The connections to one address, and what waits to be sent there."""

    def __init__(self, links: Links, address: Address) -> None:
        self.connected = False
        self.used_at = 0.0
        self.drained = asyncio.Event()
        self._links = links
        self._address = address
        self._channels: dict[Lane, grpc.aio.Channel] = {}
        self._outgoing: deque[bytes] = deque()
        self._outgoing_bytes = 0
        self._to: NodeId | None = None
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link {address}")

    def send(self, to: NodeId | None, data: bytes) -> None:
        config = self._links.config
        self._to = to or self._to
        self._outgoing.append(data)
        self._outgoing_bytes += len(data)
        while (
            len(self._outgoing) > config.outgoing_messages_max
            or self._outgoing_bytes > config.outgoing_bytes_max
        ):
            self._outgoing_bytes -= len(self._outgoing.popleft())
            self._links.dropped += 1
        self.drained.clear()
        self._wake.set()

    def channel(self, lane: Lane) -> grpc.aio.Channel:
        channel = self._channels.get(lane)
        if channel is None:
            options = channel_options(self._links.config, lane, self._links.local)
            target, credentials = _target(self._address), self._links.credentials
            if credentials is None:
                channel = grpc.aio.insecure_channel(target, options=options)
            else:
                channel = grpc.aio.secure_channel(target, credentials, options=options)
            self._channels[lane] = channel
        return channel

    async def close(self, grace_s: float | None) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(channel.close(grace_s) for channel in self._channels.values()))

    async def _run(self) -> None:
        """One stream after the other, each begun when there is something to say."""
        while True:
            while not self._outgoing:
                await self._wait()
            try:
                why = await self._stream()
            finally:
                self.connected = False
            # What waited was meant for a connection that is gone; the core says it again if it matters.
            self._links.dropped += len(self._outgoing)
            self._outgoing.clear()
            self._outgoing_bytes = 0
            self.drained.set()
            self._links.failures += 1
            self._links.on_failed(self._address, self._to, why)

    async def _stream(self) -> str:
        """Write what is to be sent until the stream ends; returns why it did."""
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = self.channel(Lane.CONTROL).stream_unary(
            CONTROL_METHOD
        )()
        call.add_done_callback(lambda _: self._wake.set())
        try:
            await call.wait_for_connection()
            self.connected = True
            if self._to is not None and self._links.warms:
                self.channel(Lane.TOKENS).get_state(try_to_connect=True)
            while not call.done():
                while self._outgoing:
                    data = self._outgoing.popleft()
                    self._outgoing_bytes -= len(data)
                    await call.write(data)
                    self._links.sent += 1
                    if self._to is not None:
                        self._links.bytes.sent.add((self._to, Lane.CONTROL.value), len(data))
                self.drained.set()
                await self._wait()
        except grpc.aio.AioRpcError as error:
            return _why(error.code(), error.details())
        except asyncio.InvalidStateError:
            pass  # written to a stream that had just ended; its status says why
        finally:
            call.cancel()
        return _why(await call.code(), await call.details())

    async def _wait(self) -> None:
        """Return when there may be something to do, at once where that came up since the last time."""
        await self._wake.wait()
        self._wake.clear()


def _target(address: Address) -> str:
    """What gRPC is to dial. IP literals pass by its resolver, which may wait for a DNS server."""
    try:
        return f"ipv{ipaddress.ip_address(address.host).version}:{address}"
    except ValueError:
        return f"dns:///{address}"


def _why(code: grpc.StatusCode, details: str | None) -> str:
    return f"{code.name}: {(details or '')[:200]}"
