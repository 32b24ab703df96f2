"""Messages of the log as bytes and back. Owns: the mapping of ``core.raft_model`` to ``consensus.proto``.

Must not: judge more than the wire needs (sizes, ranges, known kinds); ``core.raft_checks`` and the machine do
the rest. ``decode`` raises InvalidRequest for anything that ``encode`` does not make, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from google.protobuf.message import DecodeError

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
    TimeoutNow,
    Vote,
    VoteReply,
)
from fieldmesh.v1 import consensus_pb2 as pb

MESSAGE_BYTES_MAX = 1024 * 1024
"""More than any message of ``RaftConfig``'s limits needs."""

NUMBER_MAX = 2**62
MEMBERS_MAX = 64
NAME_CHARACTERS_MAX = 128


def encode(message: Message) -> bytes:
    """One message as bytes of a DeliverRequest."""
    return to_proto(message).SerializeToString()


def decode(data: bytes) -> Message:
    """The message in the bytes of a DeliverRequest. Raises InvalidRequest."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise InvalidRequest(
            f"a message holds {len(data)} bytes; at most {MESSAGE_BYTES_MAX}", field="message"
        )
    request = pb.DeliverRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("the bytes are not a DeliverRequest", field="message") from error
    return from_proto(request)


def to_proto(message: Message) -> pb.DeliverRequest:
    """One message as a DeliverRequest."""
    request = pb.DeliverRequest(group=message.group, epoch=message.epoch, term=message.term)
    body = message.body
    match body:
        case PreVote():
            request.pre_vote.SetInParent()
            request.pre_vote.last_index, request.pre_vote.last_term = body.last_index, body.last_term
        case PreVoteReply():
            request.pre_vote_reply.SetInParent()
            request.pre_vote_reply.granted = body.granted
        case Vote():
            request.vote.SetInParent()
            request.vote.last_index, request.vote.last_term = body.last_index, body.last_term
            request.vote.transfer = body.transfer
        case VoteReply():
            request.vote_reply.SetInParent()
            request.vote_reply.granted = body.granted
        case Append():
            request.append.CopyFrom(_append_to_proto(body))
        case AppendReply():
            request.append_reply.CopyFrom(
                pb.AppendReply(
                    ok=body.ok,
                    index=body.index,
                    prev_index=body.prev_index,
                    hint_term=body.hint_term,
                    round=body.round,
                    version=body.version,
                )
            )
        case Chunk():
            request.chunk.CopyFrom(_chunk_to_proto(body))
        case ChunkReply():
            request.chunk_reply.CopyFrom(
                pb.SnapshotChunkReply(
                    index=body.index, offset=body.offset, round=body.round, version=body.version
                )
            )
        case TimeoutNow():
            request.timeout_now.SetInParent()
        case _:
            assert_never(body)
    return request


def _append_to_proto(body: Append) -> pb.Append:
    return pb.Append(
        prev_index=body.prev_index,
        prev_term=body.prev_term,
        entries=[
            pb.Entry(term=entry.term, kind=pb.EntryKind.ValueType(entry.kind.value), data=entry.data)
            for entry in body.entries
        ],
        commit=body.commit,
        round=body.round,
    )


def _chunk_to_proto(body: Chunk) -> pb.SnapshotChunk:
    return pb.SnapshotChunk(
        index=body.index,
        index_term=body.index_term,
        members=pb.LogMembers(voters=body.members.voters, learners=body.members.learners),
        offset=body.offset,
        total_bytes=body.total_bytes,
        data=body.data,
        round=body.round,
    )


def from_proto(request: pb.DeliverRequest) -> Message:
    """The message in a DeliverRequest. Raises InvalidRequest."""
    if len(request.group) > NAME_CHARACTERS_MAX:
        raise InvalidRequest(f"group is longer than {NAME_CHARACTERS_MAX} characters", field="group")
    return Message(
        group=request.group,
        epoch=request.epoch,
        term=_number(request.term, "term"),
        body=_body(request),
    )


def _body(
    request: pb.DeliverRequest,
) -> PreVote | PreVoteReply | Vote | VoteReply | Append | AppendReply | Chunk | ChunkReply | TimeoutNow:
    match request.WhichOneof("body"):
        case "pre_vote":
            return PreVote(
                last_index=_number(request.pre_vote.last_index, "last_index"),
                last_term=_number(request.pre_vote.last_term, "last_term"),
            )
        case "pre_vote_reply":
            return PreVoteReply(granted=request.pre_vote_reply.granted)
        case "vote":
            return Vote(
                last_index=_number(request.vote.last_index, "last_index"),
                last_term=_number(request.vote.last_term, "last_term"),
                transfer=request.vote.transfer,
            )
        case "vote_reply":
            return VoteReply(granted=request.vote_reply.granted)
        case "append":
            return _append(request.append)
        case "append_reply":
            return _append_reply(request.append_reply)
        case "chunk":
            return _chunk(request.chunk)
        case "chunk_reply":
            return ChunkReply(
                index=_number(request.chunk_reply.index, "index"),
                offset=_number(request.chunk_reply.offset, "offset"),
                round=_number(request.chunk_reply.round, "round"),
                version=request.chunk_reply.version,
            )
        case "timeout_now":
            return TimeoutNow()
        case _:
            raise InvalidRequest("the message says nothing that this version knows", field="body")


def _append(append: pb.Append) -> Append:
    prev_index = _number(append.prev_index, "prev_index")
    return Append(
        prev_index=prev_index,
        prev_term=_number(append.prev_term, "prev_term"),
        entries=tuple(
            Entry(
                index=prev_index + position,
                term=_number(entry.term, "entries.term"),
                kind=_kind(entry.kind),
                data=entry.data,
            )
            for position, entry in enumerate(append.entries, start=1)
        ),
        commit=_number(append.commit, "commit"),
        round=_number(append.round, "round"),
    )


def _append_reply(reply: pb.AppendReply) -> AppendReply:
    return AppendReply(
        ok=reply.ok,
        index=_number(reply.index, "index"),
        prev_index=_number(reply.prev_index, "prev_index"),
        hint_term=_number(reply.hint_term, "hint_term"),
        round=_number(reply.round, "round"),
        version=reply.version,
    )


def _chunk(chunk: pb.SnapshotChunk) -> Chunk:
    return Chunk(
        index=_number(chunk.index, "index"),
        index_term=_number(chunk.index_term, "index_term"),
        members=members_from_names(chunk.members.voters, chunk.members.learners),
        offset=_number(chunk.offset, "offset"),
        total_bytes=_number(chunk.total_bytes, "total_bytes"),
        data=chunk.data,
        round=_number(chunk.round, "round"),
    )


def members_from_names(voters: Iterable[str], learners: Iterable[str]) -> Members:
    members = Members(
        voters=tuple(NodeId(voter) for voter in voters), learners=tuple(NodeId(node) for node in learners)
    )
    try:
        known = len(members.all) <= MEMBERS_MAX and Members.decode(members.encode()) == members
    except ValueError:
        known = False
    if not known:
        raise InvalidRequest(
            f"members must be 1 to {MEMBERS_MAX} distinct sorted node ids, one voter at least",
            field="members",
        )
    return members


def _kind(value: int) -> EntryKind:
    try:
        return EntryKind(value)
    except ValueError as error:
        raise InvalidRequest(f"entry kind {value} is not known", field="entries.kind") from error


def _number(value: int, field: str) -> int:
    if value > NUMBER_MAX:
        raise InvalidRequest(f"{field} is {value}; at most {NUMBER_MAX}", field=field)
    return value
