"""Going on after most voters were lost for good. Owns: when that is allowed, and what may be lost by it.

A survivor (voter or learner) starts a new epoch of the log with itself as the only voter. What it holds
counts from then on; what only the others held is lost. Members of the old epoch that come back are stopped as
soon as they see that the mesh has gone on (``superseded``), and join again without their old log. Must not:
guess that somebody is gone who still answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldmesh.core import settings
from fieldmesh.core.errors import ChangeRefused, LogNotFounded
from fieldmesh.core.model import MeshView, NodeId, NodeState, Seat
from fieldmesh.core.raft_model import EntryKind
from fieldmesh.runtime.council import Council

_ANSWERS = (NodeState.ALIVE, NodeState.SUSPECT, NodeState.UNREACHABLE)
WAY_BACK = "stop this node, run `fieldmesh raft forget` with its configuration, and start it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a new epoch would mean. ``unconfirmed_keys``: of writes that may never have been acknowledged."""

    epoch: int
    given_up: tuple[NodeId, ...]
    revision: int
    stale_s: float | None
    unconfirmed_keys: tuple[str, ...]


def assess(council: Council, view: MeshView) -> Loss:
    """What would be lost if this node went on alone. Raises LogNotFounded where it holds no log,
    ChangeRefused while the log has a leader or another of its voters answers anybody in the mesh."""
    consensus, seat = council.host.consensus, council.seat
    if consensus is None or seat is None or not consensus.raft.hard.group:
        raise LogNotFounded("This node holds no log to go on with; ask another voter or learner")
    raft = consensus.raft
    members = raft.log.members
    if raft.leader is not None:
        raise ChangeRefused(
            f"The log has a leader, {raft.leader}: nothing needs to be recovered. To take a voter out, use "
            "`fieldmesh raft remove`",
            metadata={"reason": "has_leader"},
        )
    others = [voter for voter in members.voters if voter != council.me]
    answering = [
        f"{m.name} ({m.id}, {m.state.value})" for m in view.members if m.id in others and m.state in _ANSWERS
    ]
    if answering:
        raise ChangeRefused(
            f"Another voter of this log is there: {', '.join(answering)}. Two that both went on would be two "
            "meshes. Wait for it, or end it for good before",
            metadata={"reason": "voter_answers"},
        )
    behind = raft.log.entries_between(raft.log.commit, raft.log.last_index)
    commands = (settings.decode(entry.data) for entry in behind if entry.kind is EntryKind.COMMAND)
    keys = {change.key for command in commands if command is not None for change in command.changes}
    return Loss(
        epoch=raft.hard.epoch + 1,
        given_up=tuple(others),
        revision=consensus.state.revision,
        stale_s=council.status().stale_s,
        unconfirmed_keys=tuple(sorted(keys)),
    )


def superseded(seat: Seat | None, view: MeshView) -> str:
    """Why this node's log counts no more: the mesh went on with a later epoch of it. Empty while it does."""
    if seat is None:
        return ""
    later = [
        member
        for member in view.members
        if member.row is not None
        and member.row.seat is not None
        and member.row.seat.log == seat.log
        and member.row.seat.epoch > seat.epoch
    ]
    if not later:
        return ""
    epoch = max(member.row.seat.epoch for member in later if member.row and member.row.seat)
    return (
        f"the mesh went on without it from epoch {epoch} of the log ({later[0].name} says so), and this one "
        f"is of epoch {seat.epoch}: {WAY_BACK}"
    )
