"""Connections between nodes, on real sockets: messages flow, ends are told, nothing grows without bound."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fieldmesh.core.errors import Draining
from fieldmesh.core.model import Address, NodeId
from fieldmesh.runtime.gate import CONTROL_METHOD, Caller
from fieldmesh.runtime.links import (
    Lane,
    Links,
    LinksConfig,
    channel_options,
    server_options,
)
from fieldmesh.runtime.receiver import Receiver

ANNA, BERT = NodeId("a" * 32), NodeId("b" * 32)
NOWHERE = Address(host="127.0.0.1", port=1)
Failure = tuple[Address, NodeId | None, str]
Message = tuple[NodeId, bytes]


class Peer:
    """A node's two sides: what it received, and the failures that its own links told."""

    def __init__(self, node: NodeId, config: LinksConfig | None = None) -> None:
        self.config = config or LinksConfig()
        self.messages: asyncio.Queue[Message] = asyncio.Queue(100_000)
        self.failures: asyncio.Queue[Failure] = asyncio.Queue(1_000)
        caller = Caller(node=node, mesh="linked")
        self.links = Links(caller, lambda *failure: self.failures.put_nowait(failure), self.config)
        self.receiver = Receiver(lambda *message: self.messages.put_nowait(message), self.config)
        self.address = NOWHERE
        self.server: grpc.aio.Server | None = None

    async def serve(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=server_options(self.config))
        self.server.add_generic_rpc_handlers((self.receiver.handler(),))
        bound = self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()
        self.address = Address(host="127.0.0.1", port=bound)

    async def stop_serving(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    async def message(self) -> Message:
        async with asyncio.timeout(10):
            return await self.messages.get()

    async def failure(self) -> Failure:
        async with asyncio.timeout(10):
            return await self.failures.get()


@asynccontextmanager
async def peers(config: LinksConfig | None = None) -> AsyncIterator[tuple[Peer, Peer]]:
    anna, bert = Peer(ANNA, config), Peer(BERT, config)
    await anna.serve()
    await bert.serve()
    try:
        yield anna, bert
    finally:
        for peer in (anna, bert):
            await peer.links.close()
            await peer.stop_serving()


async def test_messages_arrive_in_order_with_their_sender() -> None:
    async with peers() as (anna, bert):
        for n in range(200):
            anna.links.send(bert.address, BERT, b"%d" % n)
        bert.links.send(anna.address, None, b"to whom it may concern")
        assert [await bert.message() for _ in range(200)] == [(ANNA, b"%d" % n) for n in range(200)]
        assert await anna.message() == (BERT, b"to whom it may concern")
        assert bert.receiver.streams == 1
        assert anna.links.dropped == 0


async def test_a_refused_connection_is_told_within_a_tenth_of_a_second() -> None:
    async with peers() as (anna, _):
        began = time.monotonic()
        anna.links.send(NOWHERE, BERT, b"x")
        address, node, why = await anna.failure()
        assert (address, node) == (NOWHERE, BERT)
        assert why.startswith("UNAVAILABLE")
        assert time.monotonic() - began < 0.1
        assert anna.links.dropped == 1


async def test_the_death_of_a_peers_process_is_told_at_once() -> None:
    program = (
        "import asyncio, grpc.aio\n"
        "from fieldmesh.runtime.receiver import Receiver\n"
        "async def main():\n"
        "    server = grpc.aio.server()\n"
        "    server.add_generic_rpc_handlers((Receiver(lambda *_: print('heard', flush=True)).handler(),))\n"
        "    print(server.add_insecure_port('127.0.0.1:0'), flush=True)\n"
        "    await server.start()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert process.stdout is not None
    address = Address(host="127.0.0.1", port=int(await process.stdout.readline()))
    anna = Peer(ANNA)
    anna.links.send(address, BERT, b"x")
    assert await process.stdout.readline() == b"heard\n"
    began = time.monotonic()
    process.kill()
    assert (await anna.failure())[:2] == (address, BERT)
    assert time.monotonic() - began < 0.25  # under 10 ms on a quiet box
    await anna.links.close()
    await process.wait()


async def test_a_peer_that_restarts_is_reached_again_within_a_second_or_so() -> None:
    async with peers() as (anna, bert):
        anna.links.send(bert.address, BERT, b"before")
        await bert.message()
        await bert.stop_serving()
        await anna.failure()
        await bert.serve(bert.address.port)
        began = time.monotonic()
        heard = asyncio.create_task(bert.message())
        while not heard.done():  # as heartbeats do
            anna.links.send(bert.address, BERT, b"after")
            await asyncio.wait([heard], timeout=0.05)
        assert heard.result() == (ANNA, b"after")
        assert time.monotonic() - began < 3


async def test_what_cannot_leave_in_time_is_dropped_oldest_first() -> None:
    config = LinksConfig(outgoing_messages_max=8)
    async with peers(config) as (anna, bert):
        anna.links.send(bert.address, BERT, b"first")
        await bert.message()
        # Nothing here awaits, so the link's task cannot run in between.
        for n in range(20):
            anna.links.send(bert.address, BERT, b"%d" % n)
        assert [(await bert.message())[1] for _ in range(8)] == [b"%d" % n for n in range(12, 20)]
        assert anna.links.dropped == 12


async def test_what_waits_is_bounded_in_bytes_too() -> None:
    config = LinksConfig(outgoing_bytes_max=1_000, control_message_bytes_max=600)
    async with peers(config) as (anna, bert):
        anna.links.send(bert.address, BERT, b"x" * 601)
        assert anna.links.dropped == 1
        for letter in (b"a", b"b", b"c"):
            anna.links.send(bert.address, BERT, letter * 500)
        assert [(await bert.message())[1][:1] for _ in range(2)] == [b"b", b"c"]


async def test_a_stream_that_does_not_say_who_speaks_is_refused_with_a_code() -> None:
    async with peers() as (_, bert):
        async with grpc.aio.insecure_channel(str(bert.address)) as channel:
            call: grpc.aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary(CONTROL_METHOD)()
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert bert.receiver.refused == 1
        assert bert.messages.empty()


async def test_more_peers_than_allowed_are_refused_with_a_code() -> None:
    config = LinksConfig(peers_max=1)
    async with peers(config) as (anna, bert):
        anna.links.send(bert.address, BERT, b"x")
        await bert.message()
        carl = Peer(NodeId("c" * 32))
        carl.links.send(bert.address, BERT, b"x")
        assert "RESOURCE_EXHAUSTED" in (await carl.failure())[2]
        await carl.links.close()


async def test_a_message_that_is_too_large_for_the_receiver_ends_nothing_else() -> None:
    small = LinksConfig(control_message_bytes_max=100)
    anna, bert = Peer(ANNA), Peer(BERT, small)
    await bert.serve()
    anna.links.send(bert.address, BERT, b"x" * 101)
    anna.links.send(bert.address, BERT, b"fits")
    assert await bert.message() == (ANNA, b"fits")
    assert bert.receiver.refused == 1
    await anna.links.close()
    await bert.stop_serving()


async def test_a_peer_has_few_streams_and_the_newest_lives() -> None:
    config = LinksConfig(streams_per_peer_max=1)
    async with peers(config) as (anna, bert):
        anna.links.send(bert.address, BERT, b"old network")
        await bert.message()
        again = Peer(ANNA)
        again.links.send(bert.address, BERT, b"new network")
        assert await bert.message() == (ANNA, b"new network")
        await anna.failure()
        again.links.send(bert.address, BERT, b"goes on")
        assert await bert.message() == (ANNA, b"goes on")
        assert bert.receiver.streams == 1
        await again.links.close()


async def test_the_three_connections_of_a_peer_are_three() -> None:
    async with peers() as (anna, bert):
        anna.links.send(bert.address, BERT, b"x")
        await bert.message()
        channels = [anna.links.tokens(bert.address), anna.links.bulk(bert.address)]
        async with asyncio.timeout(10):
            for channel in channels:
                await channel.channel_ready()
        assert _connections_to(bert.address.port) == 3
        assert anna.links.tokens(bert.address) is channels[0]


async def test_the_tokens_channel_of_a_member_is_warm_before_it_is_asked_for() -> None:
    async with peers() as (anna, bert):
        anna.links.send(bert.address, BERT, b"x")
        await bert.message()
        warm = anna.links._links[bert.address]._channels[Lane.TOKENS]
        async with asyncio.timeout(10):
            while (state := warm.get_state()) is not grpc.ChannelConnectivity.READY:
                await warm.wait_for_state_change(state)


async def test_in_a_large_mesh_channels_are_not_warmed_for_everybody() -> None:
    config = LinksConfig(warm_peers_max=1)
    async with peers(config) as (anna, bert):
        anna.links.send(NOWHERE, None, b"x")
        anna.links.send(bert.address, BERT, b"x")
        await bert.message()
        assert Lane.TOKENS not in anna.links._links[bert.address]._channels


async def test_goodbyes_leave_before_the_links_close() -> None:
    async with peers() as (anna, bert):
        anna.links.send(bert.address, BERT, b"hello")
        await bert.message()
        anna.links.send(bert.address, BERT, b"goodbye")
        await anna.links.flush(5)
        await anna.links.close()
        assert await bert.message() == (ANNA, b"goodbye")
        anna.links.send(bert.address, BERT, b"too late")
        assert anna.links.addresses() == ()
        with pytest.raises(Draining):
            anna.links.tokens(bert.address)


async def test_flush_does_not_wait_for_the_dead() -> None:
    async with peers() as (anna, _):
        anna.links.send(NOWHERE, None, b"x")
        async with asyncio.timeout(5):
            await anna.links.flush(60)


async def test_the_number_of_links_is_bounded_and_the_longest_unused_goes() -> None:
    config = LinksConfig(peers_max=2)
    async with peers(config) as (anna, bert):
        third = Address(host="127.0.0.1", port=2)
        anna.links.send(NOWHERE, None, b"x")
        anna.links.send(bert.address, BERT, b"x")
        anna.links.send(third, None, b"x")
        assert anna.links.addresses() == (bert.address, third)


async def test_unused_links_are_let_go() -> None:
    ended = asyncio.Event()

    async def listen(messages: AsyncIterator[bytes], _: object) -> bytes:
        try:
            async for _message in messages:
                pass
        finally:
            ended.set()
        return b""

    config = LinksConfig(idle_close_s=0.0, idle_sweep_s=0.01, grace_s=0.0)
    anna, server = Peer(ANNA, config), grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(listen)
    service, _, method = CONTROL_METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    address = Address(host="127.0.0.1", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    anna.links.send(address, BERT, b"x")
    async with asyncio.timeout(10):
        await ended.wait()
    assert anna.links.addresses() == ()
    await anna.links.close()
    await server.stop(None)


async def test_after_reconnecting_messages_flow_and_running_requests_end_in_peace() -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def answer(_: bytes, __: object) -> bytes:
        began.set()
        await go_on.wait()
        return b"answer"

    async with peers() as (anna, bert):
        assert bert.server is not None
        await bert.stop_serving()
        bert.server = grpc.aio.server()
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)
        service = grpc.method_handlers_generic_handler("test.Slow", {"Answer": handler})
        bert.server.add_generic_rpc_handlers((bert.receiver.handler(), service))
        assert bert.server.add_insecure_port(str(bert.address)) == bert.address.port
        await bert.server.start()
        anna.links.send(bert.address, BERT, b"before")
        await bert.message()
        channel: Any = anna.links.tokens(bert.address)
        running = asyncio.ensure_future(channel.unary_unary("/test.Slow/Answer")(b""))
        await began.wait()
        anna.links.reconnect()
        anna.links.send(bert.address, BERT, b"after")
        assert await bert.message() == (ANNA, b"after")
        go_on.set()
        async with asyncio.timeout(10):
            assert await running == b"answer"


async def test_a_reader_that_has_stopped_costs_a_bounded_amount_of_memory() -> None:
    reading = asyncio.Event()

    async def never_read(_: AsyncIterator[bytes], __: object) -> bytes:
        reading.set()
        await asyncio.Event().wait()
        return b""

    config = LinksConfig(outgoing_bytes_max=1_000_000)
    anna, server = Peer(ANNA, config), grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(never_read)
    service, _, method = CONTROL_METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    address = Address(host="127.0.0.1", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    try:
        anna.links.send(address, BERT, b"x" * 100_000)
        await reading.wait()
        async with asyncio.timeout(10):
            while anna.links.dropped < 100:  # gRPC's own windows fill first
                anna.links.send(address, BERT, b"x" * 100_000)
                await asyncio.sleep(0)
        assert anna.links._links[address]._outgoing_bytes <= config.outgoing_bytes_max
    finally:
        await anna.links.close()
        await server.stop(None)


async def test_a_receiver_that_closes_ends_its_streams_and_the_server_stops_at_once() -> None:
    async with peers() as (anna, bert):
        anna.links.send(bert.address, BERT, b"x")
        await bert.message()
        bert.receiver.close()
        assert "This node is leaving" in (await anna.failure())[2]
        anna.links.send(bert.address, BERT, b"x")
        assert "This node is leaving" in (await anna.failure())[2]
        assert bert.server is not None
        async with asyncio.timeout(5):
            await bert.server.stop(60)


async def test_a_flood_is_read_no_faster_than_allowed_and_nothing_of_it_is_lost() -> None:
    config = LinksConfig(received_per_s_max=50)
    async with peers(config) as (anna, bert):
        began = time.monotonic()
        for n in range(60):
            anna.links.send(bert.address, BERT, b"%d" % n)
        assert [(await bert.message())[1] for _ in range(60)] == [b"%d" % n for n in range(60)]
        assert time.monotonic() - began > 0.8


@pytest.mark.parametrize("lane", list(Lane))
def test_no_option_is_given_twice(lane: Lane) -> None:
    caller = Caller(node=ANNA, mesh="m")
    for options in (channel_options(LinksConfig(), lane, caller), server_options(LinksConfig())):
        names = [name for name, _ in options]
        assert len(names) == len(set(names))


async def test_an_ipv6_peer_is_reached() -> None:
    if not _has_ipv6():
        pytest.skip("no ::1 here")
    bert, anna = Peer(BERT), Peer(ANNA)
    bert.server = grpc.aio.server()
    bert.server.add_generic_rpc_handlers((bert.receiver.handler(),))
    port = bert.server.add_insecure_port("[::1]:0")
    await bert.server.start()
    anna.links.send(Address(host="::1", port=port), BERT, b"x")
    assert await bert.message() == (ANNA, b"x")
    await anna.links.close()
    await bert.stop_serving()


def _connections_to(port: int) -> int:
    """Established connections of this box to a port of its own loopback (gRPC's sockets are IPv6, mapped)."""
    tables = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
    rows = [
        line.split() for table in tables if table.exists() for line in table.read_text("ascii").splitlines()
    ]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
