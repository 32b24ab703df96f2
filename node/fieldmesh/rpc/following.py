"""Calls about the log as bytes and back: commands to the leader, changes of members, watch streams.

Owns: the bounds of what is taken from a peer. ``*_from_proto`` raise InvalidRequest for what no correct node
sends, and nothing else. Must not: know what a command means. The log's own messages are ``rpc.consensus``'s.
"""

from __future__ import annotations

import math
from typing import Final

from fieldmesh.core import settings
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.following import PIECE_BYTES_MAX, Content, LogView, Piece
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import AddLearner, Change, Members, Promote, Remove, Transfer
from fieldmesh.core.settings import Code, Command, Outcome
from fieldmesh.rpc.consensus import NAME_CHARACTERS_MAX, NUMBER_MAX, members_from_names
from fieldmesh.v1 import consensus_pb2 as pb

COMMANDS_MAX: Final = 256
COMMAND_BYTES_MAX: Final = 256 * 1024
"""The log's own bound (``RaftConfig.entry_bytes_max``); the machine refuses what is larger."""
REQUEST_BYTES_MAX: Final = 2 * 1024 * 1024
STALE_S_MAX: Final = 1e9
INVALID: Final = "invalid"
"""Refusal of a command whose changes the leader does not accept; ``code`` then holds the sentence."""


# --- commands ------------------------------------------------------------------------------


def commands_from_proto(request: pb.SubmitRequest) -> list[Command]:
    """The commands of a SubmitRequest."""
    if not 0 < len(request.commands) <= COMMANDS_MAX:
        raise InvalidRequest(
            f"{len(request.commands)} commands at once; 1 to {COMMANDS_MAX} are accepted", field="commands"
        )
    commands = [settings.decode(data) for data in request.commands]
    if any(settings.version_of(data) != settings.COMMAND_VERSION for data in request.commands):
        raise InvalidRequest(
            f"commands of version {settings.COMMAND_VERSION} are accepted; upgrade the older node",
            field="commands",
        )
    if None in commands:
        raise InvalidRequest("the bytes are no command", field="commands")
    return [command for command in commands if command is not None]


def outcome_to_proto(outcome: Outcome) -> pb.SubmitResult:
    return pb.SubmitResult(
        applied=True, code=outcome.code.value, revision=outcome.revision, session=outcome.session
    )


def outcome_from_proto(result: pb.SubmitResult) -> Outcome:
    try:
        code = Code(result.code)
    except ValueError as error:
        raise InvalidRequest(f"the outcome {result.code[:40]!r} is not known", field="code") from error
    return Outcome(code=code, revision=result.revision, session=result.session)


# --- members -------------------------------------------------------------------------------


def change_to_proto(view: LogView, change: Change | Transfer) -> pb.ChangeMembersRequest:
    request = pb.ChangeMembersRequest(log=view.log, epoch=view.epoch)
    match change:
        case AddLearner(node=node):
            request.add = node
        case Promote(node=node):
            request.promote = node
        case Remove(node=node):
            request.remove = node
        case Transfer(to=to):
            request.transfer = to
    return request


def change_from_proto(request: pb.ChangeMembersRequest) -> Change | Transfer:
    which = request.WhichOneof("change")
    node = NodeId(getattr(request, which)) if which else NodeId("")
    if not 0 < len(node) <= NAME_CHARACTERS_MAX or not node.isalnum():
        raise InvalidRequest("set one of add, promote, remove, transfer to a node id", field="change")
    match which:
        case "add":
            return AddLearner(node=node)
        case "promote":
            return Promote(node=node)
        case "remove":
            return Remove(node=node)
        case _:
            return Transfer(to=node)


# --- watch streams -------------------------------------------------------------------------


def piece_to_proto(piece: Piece, now: float) -> pb.WatchResponse:
    """A piece as a message; ``now`` turns its time into an age."""
    view = piece.view
    age = now - view.current_at
    return pb.WatchResponse(
        view=pb.LogView(
            log=view.log,
            epoch=view.epoch,
            term=view.term,
            leader=view.leader or "",
            members=pb.LogMembers(voters=view.members.voters, learners=view.members.learners),
            commit=view.commit,
            applied=view.applied,
            stale_s=max(0.0, age) if math.isfinite(age) else -1.0,
        ),
        content=pb.WatchContent.ValueType(piece.content.value),
        data=piece.data,
        more=piece.more,
        revision=piece.revision,
    )


def piece_from_proto(response: pb.WatchResponse, now: float) -> Piece:
    """The piece in a message that arrived at ``now``."""
    view = response.view
    if not 0 < len(view.log) <= NAME_CHARACTERS_MAX or len(view.leader) > NAME_CHARACTERS_MAX:
        raise InvalidRequest("a log and a leader have names of at most 128 characters", field="view")
    if max(view.term, view.commit, view.applied, response.revision) > NUMBER_MAX:
        raise InvalidRequest(f"numbers are at most {NUMBER_MAX}", field="view")
    if not -1.0 <= view.stale_s <= STALE_S_MAX or len(response.data) > PIECE_BYTES_MAX:
        raise InvalidRequest(
            f"stale_s is -1 to {STALE_S_MAX:g}, data at most {PIECE_BYTES_MAX} bytes", field="stale_s"
        )
    try:
        content = Content(response.content)
    except ValueError as error:
        raise InvalidRequest(f"content {response.content} is not known", field="content") from error
    members: Members = members_from_names(view.members.voters, view.members.learners)
    return Piece(
        view=LogView(
            log=view.log,
            epoch=view.epoch,
            term=view.term,
            leader=NodeId(view.leader) if view.leader else None,
            members=members,
            commit=view.commit,
            applied=view.applied,
            current_at=now - view.stale_s if view.stale_s >= 0 else float("-inf"),
        ),
        revision=response.revision,
        content=content,
        data=response.data,
        more=response.more,
    )
