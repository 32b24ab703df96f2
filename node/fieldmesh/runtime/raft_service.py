"""What this node does for others about the log: the server side of ``ConsensusService``.

Owns: who is listened to (nodes that speak of this node's own log), the bounds of what is taken, the pace of
watch streams. Must not: decide anything about the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any, Final

import grpc
import grpc.aio

from fieldmesh.core import settings_schema
from fieldmesh.core.errors import (
    Draining,
    FieldmeshError,
    InvalidRequest,
    LogMismatch,
    LogNotFounded,
    NotLeader,
    OutcomeUnknown,
    TooManyStreams,
)
from fieldmesh.core.following import LogView, pieces
from fieldmesh.core.model import NodeId, SeatKind
from fieldmesh.core.raft_model import Append, Chunk, Message, Refusal, Transfer
from fieldmesh.core.settings import Command, Kind, Outcome, State
from fieldmesh.rpc import consensus as codec
from fieldmesh.rpc import following as wire
from fieldmesh.runtime import log
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import refusal_error
from fieldmesh.runtime.door import Context, guarded, guarded_stream, handlers
from fieldmesh.runtime.gate import caller_of, refuse
from fieldmesh.runtime.raft_host import RefusedHere, Unsettled
from fieldmesh.runtime.raft_links import DELIVER_METHOD
from fieldmesh.v1 import consensus_pb2 as pb

STREAMS_MAX: Final = 64
WATCHERS_MAX: Final = 256
WATCH_BEAT_S: Final = 1.0
ENCODED_S_MAX: Final = 0.1
"""How old the age of a state may be told."""
WATCH_PACE_S: Final = 0.01
"""A watcher hears of what changed in so long a time at once."""

logger = log.get()


class RaftService:
    """The calls of ``ConsensusService``, answered by this node's council."""

    def __init__(self, council: Council) -> None:
        self.malformed = 0
        self._council = council
        self._closed = False
        self._streams: dict[NodeId, asyncio.Task[Any]] = {}
        self._watchers = 0
        self._encoded_of: tuple[State, LogView] | None = None
        self._encoded_at = 0.0
        self._encoded: dict[int | None, list[pb.WatchResponse]] = {}

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What the peer's server is given: messages of the log stay bytes, everything else is guarded."""
        service, _, method = DELIVER_METHOD[1:].partition("/")
        deliver: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._deliver)
        return (
            grpc.method_handlers_generic_handler(service, {method: deliver}),
            handlers(pb.DESCRIPTOR.services_by_name["ConsensusService"], self),
        )

    def close(self) -> None:
        """End all streams, and take no more: this node is leaving."""
        self._closed = True
        while self._streams:
            self._streams.popitem()[1].cancel()

    # --- messages of the log -------------------------------------------------------------------

    async def _deliver(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes:
        caller = caller_of(context.invocation_metadata())
        task = asyncio.current_task()
        assert task is not None
        if caller is None:
            await refuse(context, InvalidRequest("The log is for nodes only", field="user-agent"))
            return b""
        if self._closed:
            await refuse(context, _ended(True))
        elif caller.node in self._streams:
            self._streams.pop(
                caller.node
            ).cancel()  # the newer stream of a member takes the place of the older
        elif len(self._streams) >= STREAMS_MAX:
            await refuse(context, TooManyStreams(f"{STREAMS_MAX} members are listened to already"))
            return b""
        self._streams[caller.node] = task
        try:
            async for data in messages:
                error = self._take(caller.node, data)
                if error is not None:
                    await refuse(context, error)
        except asyncio.CancelledError:
            if self._streams.get(caller.node) is task:
                raise
            task.uncancel()  # it is we who end this stream, and its sender must learn why
            await refuse(context, _ended(self._closed))
        finally:
            if self._streams.get(caller.node) is task:
                del self._streams[caller.node]
        return b""

    def _take(self, sender: NodeId, data: bytes) -> FieldmeshError | None:
        """Hand a message to the machine; what ends the stream instead, or None."""
        try:
            message = codec.decode(data)
        except InvalidRequest as error:
            self.malformed += 1
            logger.warning("log_message_malformed", peer=sender, why=error.message)
            return None
        foreign = self._foreign(message)
        if foreign is None:
            self._council.host.received(sender, message)
        return foreign

    def _foreign(self, message: Message) -> FieldmeshError | None:
        """A node listens to its own log; one that has followed none takes the first that it is taken into."""
        own = self._council.log
        if own == message.group or (not own and isinstance(message.body, Append | Chunk)):
            return None
        return _mismatch(own, message.group)

    # --- calls to the leader -------------------------------------------------------------------

    @guarded
    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitResponse:
        self._expect_leader(request.log, request.epoch)
        commands = wire.commands_from_proto(request)
        results = await asyncio.gather(*(self._submit(command) for command in commands))
        return pb.SubmitResponse(results=results)

    async def _submit(self, command: Command) -> pb.SubmitResult:
        try:
            if command.kind is Kind.WRITE:
                settings_schema.validate(command.changes)
            outcome: Outcome = await self._council.host.submit(command)
        except RefusedHere as refused:
            reason = refused.reason or Refusal.NOT_LEADER  # its place was taken: certainly not done
            return pb.SubmitResult(refusal=reason.value)
        except InvalidRequest as error:
            return pb.SubmitResult(refusal=wire.INVALID, code=error.message)
        except Unsettled:
            return pb.SubmitResult()
        return wire.outcome_to_proto(outcome)

    @guarded
    async def ReadIndex(self, request: pb.ReadIndexRequest, context: Context) -> pb.ReadIndexResponse:
        self._expect_leader(request.log, request.epoch)
        try:
            return pb.ReadIndexResponse(index=await self._council.host.read())
        except (RefusedHere, Unsettled):
            raise self._not_leader() from None

    @guarded
    async def ChangeMembers(
        self, request: pb.ChangeMembersRequest, context: Context
    ) -> pb.ChangeMembersResponse:
        self._expect_leader(request.log, request.epoch)
        change = wire.change_from_proto(request)
        try:
            if isinstance(change, Transfer):
                self._council.host.transfer(change.to)
            else:
                await self._council.host.change(change)
        except RefusedHere as refused:
            if refused.reason in (None, Refusal.NOT_LEADER, Refusal.TRANSFERRING):
                raise self._not_leader() from None
            raise refusal_error(refused.reason) from None
        except Unsettled:
            raise OutcomeUnknown(
                "The leader was lost while the members changed; look at them before asking again"
            ) from None
        return pb.ChangeMembersResponse()

    def _expect_leader(self, log_name: str, epoch: int) -> None:
        view = self._council.view
        if view is None or (view.log, view.epoch) != (log_name, epoch):
            raise _mismatch(view.log if view is not None else "", log_name)
        if not self._council.leading:
            raise self._not_leader()

    def _not_leader(self) -> NotLeader:
        view = self._council.view
        leader = view.leader if view is not None and view.leader != self._council.me else None
        return NotLeader("This node does not lead the log", metadata={"leader": leader or ""})

    # --- those who follow ----------------------------------------------------------------------

    @guarded_stream
    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.WatchResponse, None]:
        council = self._council
        seat = council.seat
        if seat is None or seat.kind is SeatKind.OBSERVER:
            raise LogNotFounded("This node is no member of a log; follow a voter")
        if request.log and request.log != seat.log:
            raise _mismatch(seat.log, request.log)
        if self._watchers >= WATCHERS_MAX:
            raise TooManyStreams(f"{WATCHERS_MAX} nodes follow this one already", retry_after_s=1.0)
        self._watchers += 1
        try:
            seen = request.revision if request.resume and request.epoch == seat.epoch else None
            while not self._closed:
                news = council.news
                for response in self._responses(seen):
                    yield response
                    if not response.more:
                        seen = response.revision
                try:
                    async with asyncio.timeout(WATCH_BEAT_S):
                        await asyncio.sleep(WATCH_PACE_S)
                        await news.wait()
                except TimeoutError:
                    continue
        finally:
            self._watchers -= 1

    def _responses(self, seen: int | None) -> list[pb.WatchResponse]:
        """What a follower that has ``seen`` is told now; encoded once for all that have seen as much."""
        held, now, seat = self._council.member, asyncio.get_running_loop().time(), self._council.seat
        if held is None or seat is None or seat.kind is SeatKind.OBSERVER:
            raise LogNotFounded("This node is a member no longer; follow another")
        basis = (held.state, replace(held.view, current_at=0.0))
        if self._encoded_of != basis or now - self._encoded_at > ENCODED_S_MAX:
            self._encoded_of, self._encoded_at, self._encoded = basis, now, {}
        if seen not in self._encoded:
            told = pieces(held.view, held.state, seen)
            self._encoded[seen] = [wire.piece_to_proto(piece, now) for piece in told]
        return self._encoded[seen]


def _ended(closed: bool) -> FieldmeshError:
    if closed:
        return Draining("This node is leaving")
    return TooManyStreams("A newer stream of this member took the place of this one")


def _mismatch(own: str, theirs: str) -> LogMismatch:
    if not own:
        return LogMismatch("This node belongs to no log yet", metadata={"log": ""})
    return LogMismatch(
        f"This node belongs to the log {own}, the caller to {theirs or 'none'}: a mesh founded twice has two "
        "logs. Choose one; on every node of the other, move the state folder away and start it again",
        metadata={"log": own},
    )
