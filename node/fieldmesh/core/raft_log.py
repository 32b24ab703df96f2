"""The log of one node. Owns: positions and terms, what is committed, which members count at each position.

Must not: decide anything about terms, votes or peers. The tail of the log is in memory (compaction bounds
it); entries behind the snapshot may be kept there for a while so that a follower that lags a little needs
no snapshot. What must become durable is staged here and taken by the machine at the end of an event;
``durable_index`` follows when the host says that it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fieldmesh.core.raft_model import Entry, EntryKind, HardState, Members, Save, Snapshot, Stored


class Log:
    """Entries ``first_index`` to ``last_index``; ``commit`` is the last one known to be committed."""

    def __init__(self, stored: Stored) -> None:
        self.snapshot = stored.snapshot
        self._base_index = stored.snapshot.index
        self._base_term = stored.snapshot.term
        self._entries: list[Entry] = []
        self._members: list[tuple[int, Members]] = [(stored.snapshot.index, stored.snapshot.members)]
        self.commit = stored.snapshot.index
        self.bytes = 0
        self._staged_snapshot: Snapshot | None = None
        self._staged_truncate: int | None = None
        self._staged: list[Entry] = []
        self._sequence = 0
        self._saving: deque[tuple[int, int]] = deque()  # (sequence, last index that is durable after it)
        for entry in stored.entries:
            if entry.index != self.last_index + 1 or entry.term < self.last_term:
                raise ValueError(f"the stored log has a gap or a falling term at entry {entry.index}")
            self._push(entry)
        self.durable_index = self.last_index

    # --- questions ---

    @property
    def first_index(self) -> int:
        return self._base_index + 1

    @property
    def last_index(self) -> int:
        return self._base_index + len(self._entries)

    @property
    def last_term(self) -> int:
        return self._entries[-1].term if self._entries else self._base_term

    @property
    def members(self) -> Members:
        """The newest members in the log, committed or not: they count at once (§4.1)."""
        return self._members[-1][1]

    @property
    def members_index(self) -> int:
        """Where ``members`` stands in the log (or the snapshot's index)."""
        return self._members[-1][0]

    def members_at(self, index: int) -> Members:
        """The members that counted at ``index`` (not before the snapshot)."""
        return next(members for at, members in reversed(self._members) if at <= index)

    def term_at(self, index: int) -> int | None:
        """The term of the entry at ``index``; None where the log does not reach, or no longer does."""
        if index == self._base_index:
            return self._base_term
        if self._base_index < index <= self.last_index:
            return self._entries[index - self._base_index - 1].term
        return self.snapshot.term if index == self.snapshot.index else None

    def up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so holds all that this one may have committed (paper §5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def entries_from(self, index: int, *, bytes_max: int, entries_max: int) -> tuple[Entry, ...]:
        """Entries from ``index`` on: at least one if there is one, else as many as both limits allow."""
        start = index - self._base_index - 1
        end, cost = start, 0
        stop = min(len(self._entries), start + entries_max)
        while end < stop:
            cost += self._entries[end].cost_bytes
            if cost > bytes_max and end > start:
                break
            end += 1
        return tuple(self._entries[start:end])

    def entries_between(self, after: int, last: int) -> tuple[Entry, ...]:
        """Entries after ``after`` up to and including ``last``."""
        return tuple(self._entries[after - self._base_index : last - self._base_index])

    def last_match_candidate(self, index: int, term: int) -> int:
        """The last position at or before ``index`` whose term is at most ``term`` (fast backtracking)."""
        at = min(index, self.last_index)
        while (here := self.term_at(at)) is not None and here > term:
            at -= 1
        return at

    @property
    def uncommitted_bytes(self) -> int:
        return sum(entry.cost_bytes for entry in self._entries[self.commit - self._base_index :])

    # --- changes ---

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries that follow the last one."""
        for entry in entries:
            if entry.index != self.last_index + 1:
                raise AssertionError(f"entry {entry.index} does not follow {self.last_index}")
            self._push(entry)
            self._staged.append(entry)

    def _push(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.bytes += entry.cost_bytes
        if entry.kind is EntryKind.MEMBERS:
            self._members.append((entry.index, Members.decode(entry.data)))

    def commit_to(self, index: int) -> None:
        """Entries up to ``index`` are known to be committed; that never becomes untrue."""
        self.commit = max(self.commit, index)

    def truncate_after(self, index: int) -> None:
        """Remove all entries after ``index``. Committed entries are never removed."""
        if index < self.commit:
            raise AssertionError(f"entry {index + 1} is committed and cannot be removed")
        removed = self._entries[index - self._base_index :]
        del self._entries[index - self._base_index :]
        self.bytes -= sum(entry.cost_bytes for entry in removed)
        while self._members[-1][0] > index:
            self._members.pop()
        self._staged = [entry for entry in self._staged if entry.index <= index]
        self._not_durable_after(index)
        self._staged_truncate = index if self._staged_truncate is None else min(self._staged_truncate, index)

    def merge(self, entries: Sequence[Entry]) -> bool:
        """Add what is new of a leader's entries, whose predecessor matches. True if any of ours had to go.

        Only a conflict removes entries (paper, figure 2, AppendEntries rule 3): a late message that holds a
        prefix of what we have must not cost us the rest.
        """
        for position, entry in enumerate(entries):
            if self.term_at(entry.index) == entry.term:
                continue
            truncated = entry.index <= self.last_index
            if truncated:
                self.truncate_after(entry.index - 1)
            self.append(entries[position:])
            return truncated
        return False

    def compact(self, index: int, data: bytes, *, keep_entries_max: int, keep_bytes_max: int) -> None:
        """Put a snapshot in place of the entries up to ``index`` (paper §7).

        Some of them stay in memory, within both limits, for followers that lag a little.
        """
        term = self.term_at(index)
        if not self.snapshot.index < index <= self.commit or term is None:
            raise ValueError(
                f"cannot compact to {index}: snapshot {self.snapshot.index}, commit {self.commit}"
            )
        self.snapshot = Snapshot(index=index, term=term, members=self.members_at(index), data=data)
        self._staged_snapshot = self.snapshot
        newest = self.members_at(index)
        self._members = [(index, newest), *((at, m) for at, m in self._members if at > index)]
        keep_after = index
        for entry in reversed(self.entries_between(max(self._base_index, index - keep_entries_max), index)):
            keep_bytes_max -= entry.cost_bytes
            if keep_bytes_max < 0:
                break
            keep_after = entry.index - 1
        self._drop_until(keep_after)

    def _drop_until(self, index: int) -> None:
        term = self.term_at(index)
        if term is None:
            raise AssertionError(f"no term at {index}")
        removed = self._entries[: index - self._base_index]
        del self._entries[: index - self._base_index]
        self.bytes -= sum(entry.cost_bytes for entry in removed)
        self._base_index, self._base_term = index, term

    def install(self, snapshot: Snapshot) -> None:
        """Replace the whole log by a snapshot that it does not contain (paper §7, figure 13, step 7)."""
        self.snapshot = self._staged_snapshot = snapshot
        self._base_index, self._base_term = snapshot.index, snapshot.term
        self._entries.clear()
        self._members = [(snapshot.index, snapshot.members)]
        self.bytes = 0
        self.commit = snapshot.index
        self._staged = []
        self._staged_truncate = snapshot.index
        self._not_durable_after(0)

    # --- what is durable ---

    def take_save(self, hard: HardState | None) -> Save | None:
        """All that must become durable since the last call; None if that is nothing."""
        staged = self._staged_snapshot is not None or self._staged_truncate is not None or self._staged
        if hard is None and not staged:
            return None
        self._sequence += 1
        save = Save(
            sequence=self._sequence,
            hard=hard,
            snapshot=self._staged_snapshot,
            truncate_after=self._staged_truncate,
            entries=tuple(self._staged),
        )
        self._staged_snapshot, self._staged_truncate, self._staged = None, None, []
        self._saving.append((save.sequence, self.last_index))
        return save

    def saved(self, sequence: int) -> None:
        """The Save with this number and all before it are durable."""
        if not 0 < sequence <= self._sequence:
            raise ValueError(f"Saved({sequence}) answers no Save; the last one is {self._sequence}")
        while self._saving and self._saving[0][0] <= sequence:
            self.durable_index = max(self.durable_index, self._saving.popleft()[1])

    def _not_durable_after(self, index: int) -> None:
        """What stands after ``index`` was replaced: no Save under way makes the new entries durable."""
        self.durable_index = min(self.durable_index, index)
        self._saving = deque((sequence, min(last, index)) for sequence, last in self._saving)

    def check(self) -> None:
        """Raise AssertionError where the log contradicts itself."""
        assert self._base_index <= self.snapshot.index <= self.commit <= self.last_index
        assert self.bytes >= 0
        assert self.durable_index <= self.last_index
        if self._entries:
            assert self._entries[0].index == self.first_index
            assert self._entries[-1].index == self.last_index
            assert self._entries[0].term >= self._base_term
        assert all(a[0] < b[0] for a, b in zip(self._members, self._members[1:], strict=False))
