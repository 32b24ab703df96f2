"""The office of a leader for one term. Owns: followers' progress, commits, reads, a transfer.

Must not: outlive its term (the machine throws the whole object away when it steps down, so nothing of an
older term can count in a newer one), change terms, or decide elections. Methods return what to say to whom.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_log import Log
from fieldmesh.core.raft_model import (
    AddLearner,
    Append,
    AppendReply,
    Body,
    Change,
    Chunk,
    ChunkReply,
    Members,
    Promote,
    RaftConfig,
    Refusal,
    Remove,
    TimeoutNow,
)
from fieldmesh.core.raft_progress import Pace, Progress

Posts = list[tuple[NodeId, Body]]

ROUND_MAX = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A transfer under way (§3.10): to whom, until when, and whether the word was given."""

    to: NodeId
    until: float


class Leadership:
    """One node's leadership in one term, from the election to the step-down."""

    def __init__(self, *, me: NodeId, term: int, config: RaftConfig, log: Log, now: float) -> None:
        self.me = me
        self.term = term
        self.config = config
        self.log = log
        self.first_index = log.last_index + 1
        self.round = 0
        self.handover: Handover | None = None
        self.heartbeat_due = now + config.heartbeat_s
        self.progress: dict[NodeId, Progress] = {}
        self._reads: deque[tuple[int, int, int]] = (
            deque()
        )  # (round that proves it, id, commit index when asked)
        self._reads_waiting: list[int] = []
        self.members_changed(now)

    # --- members ---

    def members_changed(self, now: float) -> None:
        """Follow the newest members of the log (§4.1): forget who left, begin to probe who came."""
        others = [node for node in self.log.members.all if node != self.me]
        self.progress = {
            node: self.progress.get(node) or Progress(next=self.log.last_index + 1, contact=now)
            for node in others
        }
        if self.handover and self.handover.to not in self.log.members.voters:
            self.handover = None

    def refusal_of(self, change: Change, now: float) -> Refusal | None:
        """Why a change of members must wait or cannot be, or None.

        One change at a time (§4.1), and none before an entry of this term is committed (the correction of
        July 2015 to §4.1: otherwise two leaders may commit changes by majorities that do not meet).
        """
        if self.log.commit < self.first_index:
            return Refusal.TERM_NOT_COMMITTED
        if self.log.members_index > self.log.commit:
            return Refusal.CHANGE_PENDING
        members, node = self.log.members, change.node
        refusal = self._refusal_by_members(change, members, node, now)
        if refusal is None and not self._could_commit(changed(members, change), now):
            return Refusal.NO_MAJORITY_AFTERWARDS
        return refusal

    def _could_commit(self, members: Members, now: float) -> bool:
        """Whether a majority of these voters is there now. A change that removes a voter who is there while
        others are not can never be committed, nor undone."""
        there = [
            v for v in members.voters if v == self.me or v not in self.progress or self._is_there(v, now)
        ]
        return len(there) >= members.quorum

    def _is_there(self, node: NodeId, now: float) -> bool:
        progress = self.progress[node]
        return not progress.lost and now - progress.contact <= self.config.election_timeout_s

    def _refusal_by_members(
        self, change: Change, members: Members, node: NodeId, now: float
    ) -> Refusal | None:
        match change:
            case AddLearner():
                if node in members.all:
                    return Refusal.ALREADY_MEMBER
                return Refusal.TOO_MANY_MEMBERS if len(members.learners) >= self.config.learners_max else None
            case Promote():
                if node not in members.learners:
                    return Refusal.NOT_LEARNER
                if len(members.voters) >= self.config.voters_max:
                    return Refusal.TOO_MANY_MEMBERS
                return None if self.caught_up(node, now) else Refusal.NOT_CAUGHT_UP
            case Remove():
                if node not in members.all:
                    return Refusal.NOT_MEMBER
                return Refusal.LAST_VOTER if members.voters == (node,) else None

    def caught_up(self, node: NodeId, now: float) -> bool:
        """Whether a vote for this learner would not hold up commits (§4.2.1)."""
        progress = self.progress.get(node)
        return (
            progress is not None
            and progress.pace is Pace.REPLICATE
            and progress.match >= self.first_index
            and self.log.last_index - progress.match <= self.config.catch_up_entries_max
            and self._is_there(node, now)
        )

    # --- what is committed ---

    def commit_index(self) -> int:
        """The last entry that a majority has made durable, if it is of this term (paper §5.4.2)."""
        voters = self.log.members.voters
        if not voters:
            return self.log.commit
        matches = sorted((self._match(voter) for voter in voters), reverse=True)
        index = matches[self.log.members.quorum - 1]
        if index > self.log.commit and self.log.term_at(index) == self.term:
            return index
        return self.log.commit

    def _match(self, voter: NodeId) -> int:
        return self.log.durable_index if voter == self.me else self.progress[voter].match

    # --- whether it still leads ---

    def quorum_contact(self, now: float) -> float:
        """The last time at which a majority was in touch (§6.2, check-quorum)."""
        contacts = [now if v == self.me else self.progress[v].contact for v in self.log.members.voters]
        return sorted(contacts, reverse=True)[self.log.members.quorum - 1]

    # --- reads (§6.4) ---

    def read(self, ids: Iterable[int]) -> Posts:
        """Begin to prove that this node leads; the answer is in ``proven_reads`` later.

        Reads that come while a broadcast is being answered share the next one.
        """
        self._reads_waiting.extend(ids)
        return [] if self._reads else self._start_read_round()

    @property
    def reads_count(self) -> int:
        return len(self._reads) + len(self._reads_waiting)

    def _start_read_round(self) -> Posts:
        if self.log.commit < self.first_index or not self._reads_waiting:
            return []  # a new leader does not know what is committed before its first commit (§6.4, step 1)
        self.round += 1
        self._reads.extend((self.round, read, self.log.commit) for read in self._reads_waiting)
        self._reads_waiting.clear()
        return [post for node in self.progress for post in self._ping(node)]

    def proven_reads(self) -> tuple[list[tuple[int, int]], Posts]:
        """The reads (id, index) that a majority's answers have proved by now, and the next round's posts."""
        rounds = [ROUND_MAX if v == self.me else self.progress[v].round for v in self.log.members.voters]
        proven = sorted(rounds, reverse=True)[self.log.members.quorum - 1]
        done: list[tuple[int, int]] = []
        while self._reads and self._reads[0][0] <= proven:
            _, read, index = self._reads.popleft()
            done.append((read, index))
        return done, [] if self._reads else self._start_read_round()

    def take_reads(self) -> list[int]:
        """All reads that were not answered, to be failed."""
        reads = [read for _, read, _ in self._reads] + self._reads_waiting
        self._reads.clear()
        self._reads_waiting = []
        return reads

    # --- sending ---

    def heartbeat(self, now: float) -> Posts:
        """Tell everyone that this node leads, and find out what was lost on the way."""
        self.heartbeat_due = now + self.config.heartbeat_s
        posts: Posts = []
        for node, progress in self.progress.items():
            if progress.answered:  # it is there and has not answered the chunk before: that was lost
                progress.waiting = False
            posts += self._ping(node)
            if progress.pace is not Pace.REPLICATE:
                posts += self.replicate(node)
        return posts

    def join_in(self, now: float) -> Posts:
        """A heartbeat ahead of time, if half of its time has passed."""
        early = self.heartbeat_due - now <= self.config.heartbeat_s / 2
        return self.heartbeat(now) if early else []

    def replicate_all(self) -> Posts:
        """Send to everyone what they lack, as far as their windows go."""
        return [post for node in self.progress for post in self.replicate(node)]

    def replicate(self, node: NodeId) -> Posts:
        """Send to ``node`` what it lacks, as far as its window goes."""
        progress, posts = self.progress[node], Posts()
        if progress.lost:
            return []
        while progress.next <= self.log.last_index or progress.pace is not Pace.REPLICATE:
            if self._window_full(progress):
                break
            if progress.pace is Pace.SNAPSHOT:
                posts.append((node, self._chunk(progress)))
                progress.waiting, progress.answered = True, False
                break
            append = self._append(progress)
            if append is None:
                progress.send_snapshot(self.log.snapshot)
                continue
            posts.append((node, append))
            if progress.pace is Pace.PROBE:
                progress.waiting = True
                break
            progress.sent(append.entries[-1].index, sum(entry.cost_bytes for entry in append.entries))
        return posts

    def _window_full(self, progress: Progress) -> bool:
        if progress.pace is not Pace.REPLICATE:
            return progress.waiting
        room_bytes = self.config.window_bytes_max - self.config.append_bytes_max
        return len(progress.window) >= self.config.window_messages_max or progress.window_bytes > room_bytes

    def _append(self, progress: Progress) -> Append | None:
        """The next entries for a follower; None if they, or what comes before them, are gone."""
        prev_term = self.log.term_at(progress.next - 1)
        if prev_term is None or progress.next < self.log.first_index:
            return None
        progress.commit = self.log.commit
        return Append(
            prev_index=progress.next - 1,
            prev_term=prev_term,
            entries=self.log.entries_from(
                progress.next,
                bytes_max=self.config.append_bytes_max,
                entries_max=self.config.append_entries_max,
            ),
            commit=self.log.commit,
            round=self.round,
        )

    def _chunk(self, progress: Progress) -> Chunk:
        snapshot = progress.snapshot
        assert snapshot is not None
        return Chunk(
            index=snapshot.index,
            index_term=snapshot.term,
            members=snapshot.members,
            offset=progress.offset,
            total_bytes=len(snapshot.data),
            data=snapshot.data[progress.offset : progress.offset + self.config.chunk_bytes_max],
            round=self.round,
        )

    def _ping(self, node: NodeId) -> Posts:
        """An Append without entries. It stands at the end of what was sent, so that a refusal reveals a loss
        or leads the search on; while a snapshot is sent, at the log's beginning, where all logs match."""
        progress = self.progress[node]
        prev_index, prev_term = 0, 0
        if progress.pace is not Pace.SNAPSHOT:
            term = self.log.term_at(progress.next - 1)
            if term is None:  # what was sent is gone from here and may never have arrived
                progress.probe(progress.match + 1)
            else:
                prev_index, prev_term = progress.next - 1, term
        progress.commit = self.log.commit
        append = Append(prev_index=prev_index, prev_term=prev_term, commit=self.log.commit, round=self.round)
        return [(node, append)]

    def announce_commit(self) -> Posts:
        """Tell those who have everything that more is committed (the others learn it with their entries)."""
        behind = [
            node
            for node, progress in self.progress.items()
            if progress.pace is Pace.REPLICATE and not progress.window and progress.commit < self.log.commit
        ]
        return [post for node in behind for post in self._ping(node)]

    # --- answers ---

    def on_append_reply(self, sender: NodeId, reply: AppendReply, now: float) -> Posts:
        """A follower has answered. Raises ValueError for an answer that no correct follower gives."""
        progress = self._answered(sender, reply.round, reply.version, now)
        progress.answered = progress.pace is Pace.SNAPSHOT
        if reply.index > self.log.last_index or reply.prev_index > self.log.last_index:
            raise ValueError("acknowledges entries that do not exist")
        if reply.ok:
            progress.acknowledged(reply.index)
            return [*self.replicate(sender), *self._hand_over()]
        if reply.index == 0 and reply.prev_index > 0 and sender in self.log.members.voters:
            progress.lost = True  # only an empty log answers so, and a voter had one when it was promoted
        if progress.lost:
            return []
        if progress.pace is Pace.SNAPSHOT or reply.prev_index <= progress.match:
            return []  # about something that was settled since
        if progress.pace is Pace.REPLICATE:
            progress.probe(progress.match + 1 if progress.match else self._backtrack(reply))
        elif reply.prev_index == progress.next - 1:
            progress.probe(self._backtrack(reply))
        else:
            return []
        return self.replicate(sender)

    def _backtrack(self, reply: AppendReply) -> int:
        """Skip whole terms that cannot match instead of single entries (paper §5.3, at the end)."""
        return self.log.last_match_candidate(min(reply.index, reply.prev_index - 1), reply.hint_term) + 1

    @property
    def lost_voters(self) -> tuple[NodeId, ...]:
        """Voters that came back without their log. They have forgotten what they voted for and acknowledged,
        so they are not filled again: remove them, and add them as learners."""
        return tuple(node for node, progress in self.progress.items() if progress.lost)

    def on_chunk_reply(self, sender: NodeId, reply: ChunkReply, now: float) -> Posts:
        """A follower holds more of a snapshot."""
        progress = self._answered(sender, reply.round, reply.version, now)
        snapshot = progress.snapshot
        if snapshot is None or snapshot.index != reply.index or reply.offset > len(snapshot.data):
            return []
        if reply.offset == progress.offset and progress.waiting:
            return []  # it repeats itself; the chunk under way will be answered or sent again
        progress.offset = reply.offset
        progress.waiting = False
        return self.replicate(sender)

    def _answered(self, sender: NodeId, round_: int, version: int, now: float) -> Progress:
        if round_ > self.round:
            raise ValueError("answers a broadcast that was not begun")
        progress = self.progress[sender]
        progress.contact = now
        progress.round = max(progress.round, round_)
        progress.version = version
        return progress

    # --- transfer (§3.10) ---

    def transfer(self, to: NodeId, now: float) -> Posts:
        """Stop taking proposals, bring ``to`` up to date, and tell it to campaign."""
        self.handover = Handover(to=to, until=now + self.config.election_timeout_s)
        return [*self.replicate(to), *self._hand_over()]

    def _hand_over(self) -> Posts:
        if self.handover is None or self.progress[self.handover.to].match < self.log.last_index:
            return []
        return [(self.handover.to, TimeoutNow())]

    # --- invariants and views ---

    def versions(self) -> Mapping[NodeId, int]:
        """The newest command version of every other member, as it said itself in this term."""
        return {node: progress.version for node, progress in self.progress.items()}

    def check(self) -> None:
        """Raise AssertionError where the office contradicts the log."""
        assert set(self.progress) == set(self.log.members.all) - {self.me}
        assert self.reads_count <= self.config.reads_max
        for progress in self.progress.values():
            progress.check(self.log.last_index)
            assert len(progress.window) <= self.config.window_messages_max
            assert progress.window_bytes <= self.config.window_bytes_max
            assert progress.round <= self.round


def changed(members: Members, change: Change) -> Members:
    """The members after a change that ``refusal_of`` allowed."""
    voters, learners = set(members.voters), set(members.learners)
    match change:
        case AddLearner(node=node):
            learners.add(node)
        case Promote(node=node):
            learners.discard(node)
            voters.add(node)
        case Remove(node=node):
            voters.discard(node)
            learners.discard(node)
    return Members(voters=tuple(sorted(voters)), learners=tuple(sorted(learners)))
