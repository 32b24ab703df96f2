"""What a follower accepts. Owns: how a leader's entries and snapshots get into the log, and the answers.

Must not: decide who leads or in which term; the machine has checked that the sender leads this term.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldmesh.core.raft_log import Log
from fieldmesh.core.raft_model import Append, AppendReply, Chunk, ChunkReply, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The answer, and what happened to the log."""

    reply: AppendReply | ChunkReply
    truncated_after: int | None = None
    restored: Snapshot | None = None


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A snapshot that arrives in chunks."""

    index: int
    term: int
    data: bytearray


class Follower:
    """The receiving side of one node's log. ``version`` is the newest command version it can apply."""

    def __init__(self, log: Log, *, version: int) -> None:
        self.log = log
        self.version = version
        self._incoming: Incoming | None = None

    def forget_chunks(self) -> None:
        """Another term has begun: another leader's snapshot of the same index may have other bytes."""
        self._incoming = None

    def on_append(self, append: Append) -> Accepted:
        """Take entries if what comes before them matches (paper, figure 2, AppendEntries)."""
        entries, prev_index, prev_term = append.entries, append.prev_index, append.prev_term
        if prev_index < self.log.commit:
            # What is committed here stands in the leader's log too (leader completeness, paper §5.4.3).
            entries = tuple(entry for entry in entries if entry.index > self.log.commit)
            prev_index, prev_term = self.log.commit, self.log.term_at(self.log.commit) or 0
        if self.log.term_at(prev_index) != prev_term:
            return Accepted(reply=self._mismatch(append))
        truncated = self.log.merge(entries)
        verified = prev_index + len(entries)
        self.log.commit_to(min(append.commit, verified))
        return Accepted(
            reply=self._matches(verified, append.round), truncated_after=prev_index if truncated else None
        )

    def _mismatch(self, append: Append) -> AppendReply:
        """Name the last position that could match, so that the leader skips whole terms (paper §5.3)."""
        hint = self.log.last_match_candidate(append.prev_index, append.prev_term)
        return AppendReply(
            ok=False,
            index=hint,
            prev_index=append.prev_index,
            hint_term=self.log.term_at(hint) or 0,
            round=append.round,
            version=self.version,
        )

    def refusal(self) -> AppendReply:
        """The answer to a leader of an older term; it only has to learn the newer one."""
        return AppendReply(ok=False, index=0, version=self.version)

    def _matches(self, index: int, round_: int) -> AppendReply:
        return AppendReply(ok=True, index=index, round=round_, version=self.version)

    def on_chunk(self, chunk: Chunk) -> Accepted:
        """Gather a snapshot; install it when it is whole (paper §7, figure 13)."""
        if chunk.index <= self.log.commit:
            return Accepted(reply=self._matches(self.log.commit, chunk.round))
        incoming = self._incoming
        if incoming is None or (incoming.index, incoming.term) != (chunk.index, chunk.index_term):
            incoming = self._incoming = Incoming(index=chunk.index, term=chunk.index_term, data=bytearray())
        if chunk.offset == len(incoming.data):
            incoming.data += chunk.data
        if len(incoming.data) < chunk.total_bytes:
            offset = len(incoming.data)
            reply = ChunkReply(index=chunk.index, offset=offset, round=chunk.round, version=self.version)
            return Accepted(reply=reply)
        self._incoming = None
        snapshot = Snapshot(
            index=chunk.index, term=chunk.index_term, members=chunk.members, data=bytes(incoming.data)
        )
        restored = self._install(snapshot)
        return Accepted(
            reply=self._matches(chunk.index, chunk.round), restored=snapshot if restored else None
        )

    def _install(self, snapshot: Snapshot) -> bool:
        """Take over a snapshot. A log that holds its last entry keeps what follows it, and is only told
        that more is committed (figure 13, step 6). True if the log was replaced."""
        if self.log.term_at(snapshot.index) == snapshot.term:
            self.log.commit_to(snapshot.index)
            return False
        self.log.install(snapshot)
        return True
