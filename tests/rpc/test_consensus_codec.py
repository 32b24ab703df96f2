"""The log's messages as bytes: what goes in comes out, and bytes of strangers are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import (
    Append,
    AppendReply,
    Chunk,
    ChunkReply,
    Entry,
    EntryKind,
    Members,
    Message,
    PreVote,
    PreVoteReply,
    RaftConfig,
    TimeoutNow,
    Vote,
    VoteReply,
)
from fieldmesh.rpc import consensus
from fieldmesh.v1 import consensus_pb2 as pb

numbers = st.integers(0, consensus.NUMBER_MAX)
versions = st.integers(0, 2**32 - 1)
names = st.text("0123456789abcdef", min_size=1, max_size=32).map(NodeId)


@st.composite
def appends(draw: Any) -> Append:
    prev_index = draw(st.integers(0, 2**60))
    items = draw(st.lists(st.tuples(numbers, st.sampled_from(EntryKind), st.binary(max_size=20)), max_size=5))
    return Append(
        prev_index=prev_index,
        prev_term=draw(numbers),
        entries=tuple(
            Entry(index=prev_index + i, term=term, kind=kind, data=data)
            for i, (term, kind, data) in enumerate(items, start=1)
        ),
        commit=draw(numbers),
        round=draw(numbers),
    )


@st.composite
def members(draw: Any) -> Members:
    voters = draw(st.sets(names, min_size=1, max_size=5))
    learners = draw(st.sets(names, max_size=5)) - voters
    return Members(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))


bodies = st.one_of(
    st.builds(PreVote, last_index=numbers, last_term=numbers),
    st.builds(PreVoteReply, granted=st.booleans()),
    st.builds(Vote, last_index=numbers, last_term=numbers, transfer=st.booleans()),
    st.builds(VoteReply, granted=st.booleans()),
    appends(),
    st.builds(
        AppendReply,
        ok=st.booleans(),
        index=numbers,
        prev_index=numbers,
        hint_term=numbers,
        round=numbers,
        version=versions,
    ),
    st.builds(
        Chunk,
        index=numbers,
        index_term=numbers,
        members=members(),
        offset=numbers,
        total_bytes=numbers,
        data=st.binary(max_size=30),
        round=numbers,
    ),
    st.builds(ChunkReply, index=numbers, offset=numbers, round=numbers, version=versions),
    st.just(TimeoutNow()),
)
messages = st.builds(
    Message, group=st.text(max_size=40), epoch=st.integers(0, 2**32 - 1), term=numbers, body=bodies
)


@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert consensus.decode(consensus.encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        consensus.decode(data)
    except InvalidRequest as error:
        assert error.field


@given(messages, st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_message_is_a_message_or_refused(message: Message, place: int, value: int) -> None:
    data = bytearray(consensus.encode(message))
    if data:
        data[place % len(data)] = value
    try:
        consensus.decode(bytes(data))
    except InvalidRequest as error:
        assert error.field


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.DeliverRequest(group="g", term=1), "body"),
        (pb.DeliverRequest(group="g" * 200, vote=pb.Vote()), "group"),
        (pb.DeliverRequest(term=2**63, vote=pb.Vote()), "term"),
        (pb.DeliverRequest(append=pb.Append(entries=[pb.Entry(term=1)])), "entries.kind"),
        (pb.DeliverRequest(append=pb.Append(prev_index=2**64 - 1)), "prev_index"),
        (pb.DeliverRequest(chunk=pb.SnapshotChunk(index=1)), "members"),
        (pb.DeliverRequest(chunk=pb.SnapshotChunk(members=pb.LogMembers(voters=["b", "a"]))), "members"),
        (pb.DeliverRequest(chunk=pb.SnapshotChunk(members=pb.LogMembers(voters=["a,b"]))), "members"),
        (pb.DeliverRequest(chunk=pb.SnapshotChunk(members=pb.LogMembers(voters=["é"]))), "members"),
        (
            pb.DeliverRequest(
                chunk=pb.SnapshotChunk(members=pb.LogMembers(voters=[f"n{i:03}" for i in range(65)]))
            ),
            "members",
        ),
    ],
)
def test_what_no_member_sends_names_its_field(request_: pb.DeliverRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        consensus.decode(request_.SerializeToString())
    assert caught.value.field == field


def test_a_message_over_the_limit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        consensus.decode(b"\x00" * (consensus.MESSAGE_BYTES_MAX + 1))


def test_the_largest_messages_that_the_limits_allow_fit() -> None:
    config = RaftConfig()
    entry = Entry(index=1, term=1, kind=EntryKind.COMMAND, data=b"x" * config.entry_bytes_max)
    small = tuple(
        Entry(index=i, term=2**62, kind=EntryKind.COMMAND, data=b"x" * (config.append_bytes_max // 512 - 32))
        for i in range(1, config.append_entries_max + 1)
    )
    chunk = Chunk(
        index=1,
        index_term=1,
        members=Members(voters=(NodeId("a"),)),
        offset=0,
        total_bytes=config.snapshot_bytes_max,
        data=b"x" * config.chunk_bytes_max,
    )
    for body in (
        Append(prev_index=0, prev_term=0, entries=(entry,)),
        chunk,
        Append(prev_index=0, prev_term=0, entries=small),
    ):
        message = Message(group="g", epoch=0, term=1, body=body)
        assert consensus.decode(consensus.encode(message)) == message
