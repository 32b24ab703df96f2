"""What others are told about the log. Goal: only those who speak of this node's own log are listened to,
within bounds, and everybody else reads why. Method: councils over real connections (``council_lab``), and
calls made by hand on them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fieldmesh.core.errors import FieldmeshError, InvalidRequest, LogMismatch, LogNotFounded, NotLeader
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import Append, Message, Vote
from fieldmesh.rpc import consensus as codec
from fieldmesh.rpc.errors import error_from_call
from fieldmesh.runtime import raft_links
from fieldmesh.runtime.gate import Caller
from fieldmesh.runtime.raft_links import DELIVER_METHOD
from fieldmesh.v1 import consensus_pb2 as pb
from fieldmesh.v1 import consensus_pb2_grpc as grpc_pb
from tests.runtime.council_lab import Box, Lab, open_lab

STRANGER = NodeId("f" * 32)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path) as made:
        yield made


@pytest.fixture
async def founder(lab: Lab) -> Box:
    box = lab.box("a")
    await box.start(found=True)
    await lab.until(lambda: box.council.leading)
    return box


def channel(box: Box, caller: NodeId = STRANGER) -> grpc.aio.Channel:
    agent = Caller(node=caller, mesh="lab").user_agent()
    return grpc.aio.insecure_channel(str(box.address), options=(("grpc.primary_user_agent", agent),))


async def deliver(box: Box, *messages: bytes) -> FieldmeshError | None:
    """What ends a stream of these messages."""
    async with channel(box) as made:
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = made.stream_unary(DELIVER_METHOD)()
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
            await call
        except grpc.aio.AioRpcError as error:
            return error_from_call(error)
    return None


def append(log: str, term: int = 9) -> bytes:
    return codec.encode(
        Message(group=log, epoch=0, term=term, body=Append(prev_index=0, prev_term=0, commit=0, round=1))
    )


async def test_messages_of_another_log_end_the_stream_by_name(founder: Box) -> None:
    before = founder.council.status()
    error = await deliver(founder, append("another"))
    assert isinstance(error, LogMismatch)
    assert before.seat is not None and before.seat.log in error.message and "another" in error.message
    assert founder.council.status().term == before.term


async def test_a_node_without_a_log_hears_a_leader_and_nobody_else(lab: Lab) -> None:
    box = lab.box("fresh")
    await box.start()
    vote = Message(group="log", epoch=0, term=5, body=Vote(last_index=1, last_term=1))
    assert isinstance(await deliver(box, codec.encode(vote)), LogMismatch)
    assert box.council.seat is None
    assert await deliver(box, append("log")) is None
    assert box.council.view is not None and box.council.view.log == "log"


async def test_malformed_messages_are_counted_and_the_rest_is_heard(founder: Box) -> None:
    seat = founder.council.seat
    assert seat is not None
    assert await deliver(founder, b"\xff\xff", b"", append(seat.log, term=1)) is None
    assert founder.service.malformed == 2


async def test_a_newer_stream_of_a_member_takes_the_place_of_the_older(founder: Box) -> None:
    seat = founder.council.seat
    assert seat is not None
    async with channel(founder) as one, channel(founder) as two:
        first: grpc.aio.StreamUnaryCall[bytes, bytes] = one.stream_unary(DELIVER_METHOD)()
        await first.write(append(seat.log, term=1))
        await founder.lab.until(lambda: len(founder.service._streams) == 1)
        second: grpc.aio.StreamUnaryCall[bytes, bytes] = two.stream_unary(DELIVER_METHOD)()
        await second.write(append(seat.log, term=1))
        assert await first.code() is not grpc.StatusCode.OK
        assert len(founder.service._streams) == 1
        second.cancel()


async def test_there_are_only_so_many_streams(founder: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fieldmesh.runtime.raft_service.STREAMS_MAX", 0)
    async with channel(founder) as made:
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = made.stream_unary(DELIVER_METHOD)()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call  # without a message: grpc calls one that fails INTERNAL, whatever the other side said
    assert error_from_call(refusal.value).code == "TOO_MANY_STREAMS"


async def called(method: str, box: Box, request: object) -> FieldmeshError | None:
    """What a unary call ends with."""
    async with channel(box) as made:
        try:
            await getattr(grpc_pb.ConsensusServiceStub(made), method)(request, timeout=5.0)
        except grpc.aio.AioRpcError as error:
            return error_from_call(error)
    return None


async def test_calls_for_another_log_are_refused(founder: Box) -> None:
    for method, request in (
        ("Submit", pb.SubmitRequest(log="other")),
        ("ReadIndex", pb.ReadIndexRequest(log="other")),
        ("ChangeMembers", pb.ChangeMembersRequest(log="other", add="b")),
    ):
        assert isinstance(await called(method, founder, request), LogMismatch), method


async def test_a_node_that_does_not_lead_names_who_does(lab: Lab) -> None:
    await lab.voters("a", "b", "c")
    other = next(box for name, box in lab.boxes.items() if name != lab.leader)
    seat = other.council.seat
    assert seat is not None
    error = await called("ReadIndex", other, pb.ReadIndexRequest(log=seat.log))
    assert isinstance(error, NotLeader)
    assert error.metadata["leader"] == lab.boxes[lab.leader].id


async def test_commands_out_of_bounds_are_refused_as_a_whole(founder: Box) -> None:
    seat = founder.council.seat
    assert seat is not None
    error = await called("Submit", founder, pb.SubmitRequest(log=seat.log, commands=[b"x"] * 1000))
    assert isinstance(error, InvalidRequest) and error.field == "commands"


async def test_a_watch_at_a_node_that_is_no_member_is_refused(lab: Lab, founder: Box) -> None:
    observer = lab.box("o")
    await observer.start()
    await lab.until(lambda: observer.council.status().following is not None)
    async with channel(observer) as made:
        call = grpc_pb.ConsensusServiceStub(made).Watch(pb.WatchRequest())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
    assert isinstance(error_from_call(ended.value), LogNotFounded)


async def test_what_a_member_does_not_take_is_dropped_and_counted(
    founder: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raft_links, "OUTGOING_MESSAGES_MAX", 3)
    other = founder.lab.box("b")
    await other.start()
    message = codec.decode(append("log"))
    for _ in range(5):
        founder.raft_links.send(other.id, message)
    assert founder.raft_links.dropped == 2
    founder.raft_links.send(STRANGER, message)
    assert founder.raft_links.dropped == 3
