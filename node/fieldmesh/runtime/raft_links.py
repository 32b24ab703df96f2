"""What this node says to others about the log: the client side of ``ConsensusService``.

Owns: one stream a member for messages of the log (bounded; what does not fit is dropped, which the machine
expects of a network), and calls to the leader, commands gathered so that many share one call. Must not:
decide who leads, or try again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import grpc
import grpc.aio

from fieldmesh.core import settings
from fieldmesh.core.errors import (
    DeadlineExceeded,
    FieldmeshError,
    InvalidRequest,
    LogMismatch,
    NodeUnreachable,
)
from fieldmesh.core.following import LogView, Piece
from fieldmesh.core.model import Address, MeshView, NodeId, NodeState, Seat
from fieldmesh.core.raft_model import Change, Message, Refusal, Transfer
from fieldmesh.core.settings import Command, Outcome
from fieldmesh.rpc import consensus as codec
from fieldmesh.rpc import following as wire
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime import log
from fieldmesh.runtime.raft_host import RefusedHere, Unsettled
from fieldmesh.v1 import consensus_pb2 as pb
from fieldmesh.v1 import consensus_pb2_grpc as grpc_pb

DELIVER_METHOD: Final = "/fieldmesh.v1.ConsensusService/Deliver"
OUTGOING_MESSAGES_MAX: Final = 1024
OUTGOING_BYTES_MAX: Final = 16 * 1024 * 1024
STREAMS_MAX: Final = 32
RETRY_PAUSE_S: Final = 0.1
CONNECT_TIMEOUT_S: Final = 0.5
CALLS_MAX: Final = 4
"""Calls with commands under way to one leader; what comes meanwhile is gathered for the next."""
WAITING_MAX: Final = 8192
CALL_TIMEOUT_S: Final = 5.0
WATCH_SILENCE_S_MAX: Final = 3.0

logger = log.get()

_BEFORE_SENDING = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED})


class RaftLinks:
    """This node's connections to others about the log. Belongs to one event loop.

    ``view`` is the mesh as it is seen now, ``channel`` a connection to a peer's listener.
    """

    def __init__(self, view: Callable[[], MeshView], channel: Callable[[Address], grpc.aio.Channel]) -> None:
        self.dropped = 0
        self._view = view
        self._channel = channel
        self._streams: dict[NodeId, _Stream] = {}
        self._gatherers: dict[NodeId, _Gatherer] = {}
        self._closed = False

    async def close(self) -> None:
        """End all streams and calls."""
        self._closed = True
        tasks = [stream.task for stream in self._streams.values()]
        for gatherer in self._gatherers.values():
            tasks += gatherer.calls
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the mesh ----------------------------------------------------------------------------

    def seats(self) -> Mapping[NodeId, Seat]:
        """What living nodes say that they are to a log."""
        return {
            member.id: member.row.seat
            for member in self._view().members
            if member.row is not None and member.row.seat is not None and member.state is NodeState.ALIVE
        }

    def address(self, node: NodeId) -> Address | None:
        """Where a node listens for others, as far as is known."""
        for member in self._view().members:
            if member.id == node and member.address.port:
                return member.address
        return None

    # --- messages of the log -------------------------------------------------------------------

    def send(self, to: NodeId, message: Message) -> None:
        """Send one message, perhaps; never waits, never raises."""
        address = self.address(to)
        if self._closed or address is None:
            self.dropped += 1
            return
        stream = self._streams.get(to)
        if stream is None or stream.address != address or stream.task.done():
            if stream is not None:
                stream.task.cancel()
            elif len(self._streams) >= STREAMS_MAX:
                self._streams.pop(next(iter(self._streams))).task.cancel()
            stream = self._streams[to] = _Stream(address, self._channel)
        if not stream.put(codec.encode(message)):
            self.dropped += 1

    # --- calls ---------------------------------------------------------------------------------

    async def submit(self, leader: NodeId, view: LogView, command: Command, timeout_s: float) -> Outcome:
        """Have the leader do a command. Raises RefusedHere and what ``_call`` raises."""
        gatherer = self._gatherers.get(leader)
        if gatherer is None:
            self._gatherers = {node: g for node, g in self._gatherers.items() if not g.idle}
            gatherer = self._gatherers[leader] = _Gatherer(self, leader)
        async with asyncio.timeout(timeout_s):
            return await gatherer.submit(view, settings.encode(command))

    async def read_index(self, leader: NodeId, view: LogView, timeout_s: float) -> int:
        """Up to where this node must have applied the log for a read to be current."""
        stub = await self._stub(leader)
        request = pb.ReadIndexRequest(log=view.log, epoch=view.epoch)
        try:
            return (await stub.ReadIndex(request, timeout=timeout_s)).index
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def change(
        self, leader: NodeId, view: LogView, change: Change | Transfer, timeout_s: float
    ) -> None:
        """Have the leader change the members."""
        stub = await self._stub(leader)
        try:
            await stub.ChangeMembers(wire.change_to_proto(view, change), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from None

    async def watch(
        self, node: NodeId, log_name: str, epoch: int, revision: int | None
    ) -> AsyncGenerator[Piece, None]:
        """Follow the configuration at a member until the stream ends or falls silent.

        Raises NodeUnreachable, LogMismatch, InvalidRequest and other coded refusals.
        """
        loop = asyncio.get_running_loop()
        stub = await self._stub(node)
        request = pb.WatchRequest(
            log=log_name, epoch=epoch, revision=revision or 0, resume=revision is not None
        )
        call = stub.Watch(request)
        try:
            while True:
                async with asyncio.timeout(WATCH_SILENCE_S_MAX):
                    response = await call.read()
                if not isinstance(response, pb.WatchResponse):
                    raise NodeUnreachable("The watch stream has ended")
                yield wire.piece_from_proto(response, loop.time())
        except TimeoutError:
            raise NodeUnreachable(f"Nothing was heard for {WATCH_SILENCE_S_MAX:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        finally:
            call.cancel()

    async def _stub(self, node: NodeId) -> grpc_pb.ConsensusServiceAsyncStub:
        """A stub over a connection that stands. Raises NodeUnreachable: then nothing was asked."""
        address = self.address(node)
        if address is None or self._closed:
            raise NodeUnreachable(f"No address of node {node} is known")
        channel = self._channel(address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await channel.channel_ready()
        except TimeoutError:
            raise NodeUnreachable(f"Node {node} at {address} does not answer") from None
        return grpc_pb.ConsensusServiceStub(channel)


class _Stream:
    """Messages to one member, in order, over one call after another."""

    def __init__(self, address: Address, channel: Callable[[Address], grpc.aio.Channel]) -> None:
        self.address = address
        self._channel = channel
        self._outgoing: deque[bytes] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._refused = ""
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"log to {address}")

    def put(self, data: bytes) -> bool:
        """False where there is no room."""
        if len(self._outgoing) >= OUTGOING_MESSAGES_MAX or self._bytes + len(data) > OUTGOING_BYTES_MAX:
            return False
        self._outgoing.append(data)
        self._bytes += len(data)
        self._wake.set()
        return True

    async def _run(self) -> None:
        while True:
            while not self._outgoing:
                await self._wait()
            try:
                await self._stream()
            except grpc.aio.AioRpcError as error:
                self._note(error_from_call(error))
            except asyncio.InvalidStateError:
                pass  # written to a call that had just ended
            # What waited may be old by now; the machine says again what matters.
            self._outgoing.clear()
            self._bytes = 0
            await asyncio.sleep(RETRY_PAUSE_S)
            self._outgoing.clear()
            self._bytes = 0

    async def _stream(self) -> None:
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = self._channel(self.address).stream_unary(
            DELIVER_METHOD
        )()
        call.add_done_callback(lambda _: self._wake.set())
        try:
            await call.wait_for_connection()
            while not call.done():
                while self._outgoing:
                    data = self._outgoing.popleft()
                    self._bytes -= len(data)
                    await call.write(data)
                await self._wait()
            await call
        finally:
            call.cancel()

    def _note(self, error: FieldmeshError) -> None:
        """Say once why the other side does not listen, where that is more than being away."""
        if isinstance(error, LogMismatch) and error.message != self._refused:
            self._refused = error.message
            logger.warning("log_refused", address=str(self.address), code=error.code, why=error.message)

    async def _wait(self) -> None:
        await self._wake.wait()
        self._wake.clear()


@dataclass(slots=True)
class _Gatherer:
    """Commands on their way to one leader."""

    links: RaftLinks
    leader: NodeId
    calls: set[asyncio.Task[None]] = field(default_factory=set)
    _waiting: deque[tuple[LogView, bytes, asyncio.Future[Outcome]]] = field(default_factory=deque)

    @property
    def idle(self) -> bool:
        return not self.calls and not self._waiting

    async def submit(self, view: LogView, command: bytes) -> Outcome:
        if len(self._waiting) >= WAITING_MAX:
            raise RefusedHere(Refusal.BUSY, self.leader)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append((view, command, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._begin)
        return await future

    def _begin(self) -> None:
        """Send what waits, unless as many calls as may be are under way."""
        while self._waiting and len(self.calls) < CALLS_MAX:
            batch: list[tuple[LogView, bytes, asyncio.Future[Outcome]]] = []
            size = 0
            while self._waiting and len(batch) < wire.COMMANDS_MAX:
                if batch and size + len(self._waiting[0][1]) > wire.REQUEST_BYTES_MAX:
                    break
                entry = self._waiting.popleft()
                if not entry[2].done():
                    batch.append(entry)
                    size += len(entry[1])
            if batch:
                task = asyncio.get_running_loop().create_task(self._call(batch), name="submit")
                self.calls.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.calls.discard(task)
        self._begin()

    async def _call(self, batch: list[tuple[LogView, bytes, asyncio.Future[Outcome]]]) -> None:
        view = batch[-1][0]
        request = pb.SubmitRequest(log=view.log, epoch=view.epoch, commands=[data for _, data, _ in batch])
        failure: Exception = Unsettled()
        try:
            stub = await self.links._stub(self.leader)
            response = await stub.Submit(request, timeout=CALL_TIMEOUT_S)
            for (_, _, future), result in zip(batch, response.results, strict=False):
                if not future.done():
                    _settle(future, result, self.leader)
        except grpc.aio.AioRpcError as error:
            failure = _translated(error)
        except FieldmeshError as error:
            failure = error
        finally:
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(failure)


def _settle(future: asyncio.Future[Outcome], result: pb.SubmitResult, leader: NodeId) -> None:
    if result.applied:
        try:
            future.set_result(wire.outcome_from_proto(result))
        except InvalidRequest:
            future.set_exception(Unsettled())
    elif result.refusal == wire.INVALID:
        future.set_exception(InvalidRequest(result.code, field="changes"))
    elif result.refusal in _REFUSALS:
        future.set_exception(RefusedHere(_REFUSALS[result.refusal], None))
    else:
        future.set_exception(Unsettled())


_REFUSALS = {refusal.value: refusal for refusal in Refusal}


def _translated(error: grpc.aio.AioRpcError) -> Exception:
    """A coded refusal of the other side as it is; the loss of a call that was sent as Unsettled."""
    if error.code() in _BEFORE_SENDING:
        return NodeUnreachable(f"The other node does not know this call: {error.details()}")
    translated = error_from_call(error)
    coded = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if coded and not isinstance(translated, NodeUnreachable | DeadlineExceeded):
        return translated
    return Unsettled()
