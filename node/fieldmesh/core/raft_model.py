"""The nouns of consensus. Owns: entries, members, snapshots, messages, inputs and outputs, and the limits.

Holds no behaviour beyond derived values; the machine is ``core.raft``. Section numbers (§) are those of
D. Ongaro, "Consensus: Bridging Theory and Practice" (2014); "paper" is Ongaro and Ousterhout, "In Search
of an Understandable Consensus Algorithm" (extended version, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.events import Note, Received, Tick
from fieldmesh.core.model import NodeId

ENTRY_OVERHEAD_BYTES = 32
"""What an entry costs beside its data, in windows and limits."""


class EntryKind(Enum):
    """What an entry of the log means to the machine; values are those of the wire and of the store."""

    NOOP = 1
    COMMAND = 2
    MEMBERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One position of the log. ``data`` is a command, or ``Members.encode()``, or empty."""

    index: int
    term: int
    kind: EntryKind
    data: bytes = b""

    @property
    def cost_bytes(self) -> int:
        return len(self.data) + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who votes and who only follows. Both tuples are sorted and disjoint."""

    voters: tuple[NodeId, ...] = ()
    learners: tuple[NodeId, ...] = ()

    @property
    def all(self) -> tuple[NodeId, ...]:
        return tuple(sorted((*self.voters, *self.learners)))

    @property
    def quorum(self) -> int:
        """How many voters make a majority: more than half, also of an even number."""
        return len(self.voters) // 2 + 1

    def encode(self) -> bytes:
        """Canonical bytes: equal members, equal bytes."""
        return f"{','.join(self.voters)};{','.join(self.learners)}".encode("ascii")

    @staticmethod
    def decode(data: bytes) -> Members:
        """The inverse of ``encode``. Raises ValueError for anything that ``encode`` does not make."""
        voters, separator, learners = data.decode("ascii").partition(";")
        members = Members(
            voters=tuple(NodeId(v) for v in voters.split(",")) if voters else (),
            learners=tuple(NodeId(v) for v in learners.split(",")) if learners else (),
        )
        ordered = members.voters == tuple(sorted(set(members.voters)))
        ordered = ordered and members.learners == tuple(sorted(set(members.learners)))
        if not separator or not ordered or set(members.voters) & set(members.learners) or not members.voters:
            raise ValueError("not the encoding of a set of members")
        if not all(members.all):
            raise ValueError("a member without a name")
        return members


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state after applying all entries up to ``index``, in place of those entries. Index 0 is none."""

    index: int = 0
    term: int = 0
    members: Members = field(default_factory=Members)
    data: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardState:
    """What must be durable before anything is said that depends on it (paper, figure 2).

    ``group`` names one log for ever (a mesh founded twice has two); ``epoch`` rises when a lone survivor
    starts it again. An empty group is a node that has not been taken into any log yet.
    """

    term: int = 0
    vote: NodeId | None = None
    group: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All that survives a crash: what a store loads and ``Raft`` starts from."""

    hard: HardState = field(default_factory=HardState)
    snapshot: Snapshot = field(default_factory=Snapshot)
    entries: tuple[Entry, ...] = ()


# --- messages ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PreVote:
    """Would you vote for me in the message's term, which I have not begun (§9.6)?"""

    last_index: int
    last_term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreVoteReply:
    """``granted`` echoes the term that was asked about; a refusal carries the voter's own term."""

    granted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """Vote for me. ``transfer`` says that the leader itself asked for this election (§3.10)."""

    last_index: int
    last_term: int
    transfer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteReply:
    """The answer to Vote."""

    granted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Entries after (``prev_index``, ``prev_term``); none of them is a heartbeat.

    ``round`` counts the leader's broadcasts within its term: an answer to round r proves that the leader
    was the leader when it began round r (§6.4).
    """

    prev_index: int
    prev_term: int
    entries: tuple[Entry, ...] = ()
    commit: int = 0
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendReply:
    """``ok``: all entries up to ``index`` equal the leader's and are durable here.

    Otherwise the entry at ``prev_index`` does not match, and ``index`` with ``hint_term`` is the last
    position that could (paper §5.3, fast backtracking). ``version`` is the newest command version that
    the node can apply.
    """

    ok: bool
    index: int
    prev_index: int = 0
    hint_term: int = 0
    round: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a snapshot (paper §7): ``data`` at ``offset`` of ``total_bytes``."""

    index: int
    index_term: int
    members: Members
    offset: int
    total_bytes: int
    data: bytes
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReply:
    """The node holds ``offset`` bytes of the snapshot at ``index`` and wants what follows."""

    index: int
    offset: int
    round: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutNow:
    """The leader hands over its office: campaign at once (§3.10)."""


Body = PreVote | PreVoteReply | Vote | VoteReply | Append | AppendReply | Chunk | ChunkReply | TimeoutNow


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one member says to another about one log in one term."""

    group: str
    epoch: int
    term: int
    body: Body


# --- inputs ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Append these commands, in this order. Answered by one Proposed or one Refused.

    Hosts gather what arrived while the last Save was written into one Propose: it shares its fsync.
    """

    commands: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Ask for a point up to which the state must be applied to be current (§6.4).

    Ends in one ReadReady, or in one ReadFailed: not the leader, not any more, or too many reads wait.
    """

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AddLearner:
    """Take a node in as a follower without a vote (§4.2.1)."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Promote:
    """Give a caught-up learner a vote (§4.2.1)."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Take a voter or a learner out (§4.2.2)."""

    node: NodeId


Change = AddLearner | Promote | Remove
"""One change of one member (§4.1). Answered by one Proposed or one Refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Hand the office to ``to`` (§3.10). Nothing is accepted until then, or an election timeout."""

    to: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """The host writes to the others just now: a heartbeat that is due soon goes along, and wakes nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """The host has another reason than silence to think that ``node`` is gone. It may be wrong: where that
    node leads, its followers wait for one heartbeat more instead of an election timeout."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The Save with this sequence number, and all before it, are durable."""

    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """``data`` is the state after applying ``index``: keep it in place of the entries up to there."""

    index: int
    data: bytes


RaftEvent = (
    Tick
    | Received[Message]
    | Propose
    | Read
    | AddLearner
    | Promote
    | Remove
    | Transfer
    | Company
    | Doubt
    | Saved
    | Compact
)


# --- outputs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Make durable in one transaction, in this order, before any later effect of this list or of later ones:

    the hard state if given; the snapshot if given, and with it remove all entries up to its index;
    remove the entries after ``truncate_after`` if given; add ``entries``. Then hand in ``Saved``.
    A host that cannot do so must stop this machine and start another from what is durable.
    """

    sequence: int
    hard: HardState | None = None
    snapshot: Snapshot | None = None
    truncate_after: int | None = None
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """Hand ``message`` to the network for ``to``; it may be lost, doubled, late or reordered."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """These entries are committed; each comes once a life, in order and without gaps."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Replace the state by this snapshot's; the next Apply goes on after it."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """The entries were appended from ``first_index`` on; they are *not* committed yet, and may never be."""

    first_index: int
    term: int


class Refusal(Enum):
    """Why a Propose, Change or Transfer was refused; nothing was appended."""

    NOT_LEADER = "not_leader"
    TRANSFERRING = "transferring"
    BUSY = "busy"
    TOO_LARGE = "too_large"
    VERSION_UNKNOWN = "version_unknown"
    TERM_NOT_COMMITTED = "term_not_committed"
    CHANGE_PENDING = "change_pending"
    ALREADY_MEMBER = "already_member"
    NOT_MEMBER = "not_member"
    NOT_LEARNER = "not_learner"
    NOT_CAUGHT_UP = "not_caught_up"
    LAST_VOTER = "last_voter"
    NO_MAJORITY_AFTERWARDS = "no_majority_afterwards"
    TOO_MANY_MEMBERS = "too_many_members"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Nothing was done. ``leader`` is who might do it, as far as is known."""

    reason: Refusal
    leader: NodeId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadReady:
    """State applied up to ``index`` (it already is, by the Apply before this) answers read ``id``."""

    id: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailed:
    """The read could not be proved current here; ask the leader (again)."""

    id: int


class Role(Enum):
    """What a node is in its term. A learner is a follower that no majority counts."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre_candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """Role, term or known leader changed."""

    role: Role
    term: int
    leader: NodeId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersChanged:
    """The members that count from now on; ``index`` is where the log says so (it may not be committed)."""

    members: Members
    index: int


RaftEffect = (
    Save
    | Post
    | Apply
    | Restore
    | Proposed
    | Refused
    | ReadReady
    | ReadFailed
    | RoleChanged
    | MembersChanged
    | Note
)


# --- limits ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftConfig:
    """Times and limits. Times are guesses for a LAN; the rest follows from message and memory sizes.

    An election timeout is drawn anew from [``election_timeout_s``, 2 × ``election_timeout_s``) (§3.4).
    ``command_version`` is the newest command version that this node can apply.
    """

    heartbeat_s: float = 0.25
    election_timeout_s: float = 0.75
    entry_bytes_max: int = 256 * 1024
    append_bytes_max: int = 512 * 1024
    append_entries_max: int = 512
    window_messages_max: int = 32
    window_bytes_max: int = 4 * 1024 * 1024
    uncommitted_bytes_max: int = 8 * 1024 * 1024
    reads_max: int = 4096
    chunk_bytes_max: int = 256 * 1024
    snapshot_bytes_max: int = 32 * 1024 * 1024
    compact_entries: int = 4_096
    compact_bytes: int = 4 * 1024 * 1024
    trailing_entries_max: int = 1_000
    catch_up_entries_max: int = 64
    voters_max: int = 7
    learners_max: int = 8
    command_version: int = 1

    def validate(self) -> None:
        """Raises ConfigError naming the first field that cannot work with the others."""
        positive = {name: getattr(self, name) for name in self.__slots__ if name != "trailing_entries_max"}
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0", field=name)
        if self.trailing_entries_max < 0:
            raise ConfigError("trailing_entries_max must be 0 or more", field="trailing_entries_max")
        if self.heartbeat_s * 3 > self.election_timeout_s:
            raise ConfigError(
                f"heartbeat_s is {self.heartbeat_s}; at most a third of election_timeout_s "
                f"({self.election_timeout_s}), or one lost heartbeat costs an election",
                field="heartbeat_s",
            )
        if self.entry_bytes_max + ENTRY_OVERHEAD_BYTES > self.append_bytes_max:
            raise ConfigError(
                f"append_bytes_max is {self.append_bytes_max}; it must hold one entry of entry_bytes_max "
                f"({self.entry_bytes_max}) and {ENTRY_OVERHEAD_BYTES} bytes more",
                field="append_bytes_max",
            )
        if self.append_bytes_max > self.window_bytes_max:
            raise ConfigError(
                f"window_bytes_max is {self.window_bytes_max}; it must hold one append_bytes_max "
                f"({self.append_bytes_max})",
                field="window_bytes_max",
            )
