"""What the council gives and needs. Owns: the records that callers get, its limits, what it asks of others.

Holds no behaviour beyond turning the machine's refusals into coded errors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fieldmesh.core.errors import ChangeRefused, FieldmeshError, InvalidRequest, QueueFull, UpgradeNeeded
from fieldmesh.core.following import LogView, Piece
from fieldmesh.core.model import NodeId, Seat
from fieldmesh.core.raft_model import Change, Message, RaftConfig, Refusal, Role, Transfer
from fieldmesh.core.settings import Command, Outcome, Record, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The configuration, and how old it may be: ``stale_s`` is 0 for a linearizable read, None where this
    node cannot know (it has not heard of a leader since it started)."""

    state: State
    applied: int
    stale_s: float | None

    @property
    def revision(self) -> int:
        return self.state.revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A watch begins, or begins anew, with everything."""

    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A watch goes on: every change after the revision before, up to ``revision``."""

    revision: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CouncilStatus:
    """What a person, a web page or the topology policy wants to know. Lists are sorted by node id.

    ``seat`` is None where no log is known. ``lag_entries`` is how far the applied state is behind what is
    known to be committed. ``stopped_why`` is empty while this node's part in the log runs. The leader alone
    knows ``matches`` (the last durable index of each other member), ``caught_up`` (learners that may be
    promoted now) and ``lost_voters`` (came back without their log: remove them, add them again).
    ``other_logs`` maps every other log that members of this mesh belong to or follow to those nodes.
    """

    seat: Seat | None
    role: Role | None
    term: int
    leader: NodeId | None
    voters: tuple[NodeId, ...]
    learners: tuple[NodeId, ...]
    commit: int
    applied: int
    revision: int
    lag_entries: int
    stale_s: float | None
    stopped_why: str
    following: NodeId | None
    log_bytes: int
    matches: tuple[tuple[NodeId, int], ...]
    caught_up: tuple[NodeId, ...]
    lost_voters: tuple[NodeId, ...]
    other_logs: Mapping[str, tuple[NodeId, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CouncilConfig:
    """Times and limits (seconds). ``leader_patience_s``: how long a write waits for a leader to appear before
    it fails with NO_QUORUM; an election takes up to two. ``found_wait_s``: how long a founder looks for a log
    of this mesh before it founds one; ``follow_after_s``: when a member without a leader asks others what is
    configured. Guesses for a LAN. Most of what an idle log costs are its heartbeats: they are as seldom as
    those of the mesh and go along with them (so their own time is a little longer), and the mesh says sooner
    than an election timeout that a leader is gone."""

    raft: RaftConfig = field(default_factory=lambda: RaftConfig(heartbeat_s=0.55, election_timeout_s=1.7))
    timeout_s: float = 5.0
    leader_patience_s: float = 3.0
    retry_pause_s: float = 0.03
    found_wait_s: float = 2.0
    follow_after_s: float = 2.0


class Colleagues(Protocol):
    """The other nodes, as the transport reaches them. A call raises NotLeader (nothing done), NodeUnreachable
    (nothing done), Unsettled (maybe done), or the coded refusal of the node that was asked."""

    def send(self, to: NodeId, message: Message) -> None: ...

    def seats(self) -> Mapping[NodeId, Seat]:
        """What living nodes say of themselves."""
        ...

    async def submit(self, leader: NodeId, view: LogView, command: Command, timeout_s: float) -> Outcome: ...

    async def read_index(self, leader: NodeId, view: LogView, timeout_s: float) -> int: ...

    async def change(
        self, leader: NodeId, view: LogView, change: Change | Transfer, timeout_s: float
    ) -> None: ...

    def watch(
        self, node: NodeId, log_name: str, epoch: int, revision: int | None
    ) -> AsyncGenerator[Piece, None]: ...


_REFUSALS = {
    Refusal.TERM_NOT_COMMITTED: "the leader has just taken office; ask again in a moment",
    Refusal.CHANGE_PENDING: "another change of members is under way; ask again when it is done",
    Refusal.ALREADY_MEMBER: "the node is a member already",
    Refusal.NOT_MEMBER: "the node is no member, or none that this can be done with",
    Refusal.NOT_LEARNER: "the node is no learner: add it first",
    Refusal.NOT_CAUGHT_UP: "the learner has not caught up yet; ask again later",
    Refusal.LAST_VOTER: "the last voter cannot be removed",
    Refusal.NO_MAJORITY_AFTERWARDS: "no majority of the voters that would be left is there",
    Refusal.TOO_MANY_MEMBERS: "there are as many voters or learners as there may be",
}


def refusal_error(reason: Refusal) -> FieldmeshError:
    """The machine's refusal as a coded error; nothing was done."""
    if reason is Refusal.BUSY:
        return QueueFull("The leader has as many uncommitted commands as it may have", retry_after_s=0.2)
    if reason is Refusal.TOO_LARGE:
        return InvalidRequest("The changes are larger than an entry of the log may be", field="changes")
    if reason is Refusal.VERSION_UNKNOWN:
        return UpgradeNeeded("Not all members of the log know this version of commands: upgrade them first")
    return ChangeRefused(f"Refused: {_REFUSALS.get(reason, reason.value)}", metadata={"reason": reason.value})
