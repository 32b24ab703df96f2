"""What must hold of a log at every moment. Owns: the truth as it was first committed, and the comparisons.

Looks at machines after each event, and at what leaves them. Must not: influence anything. The properties are
those of the paper's figure 3, and what clients are promised: nothing acknowledged is lost, no read is stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fieldmesh.core import settings
from fieldmesh.core.raft import Raft
from fieldmesh.core.raft_model import Entry, EntryKind, Restore, Role


class Oracle:
    """One log's truth. Every method raises AssertionError where a property is broken."""

    def __init__(self) -> None:
        self.leaders: dict[int, str] = {}
        self.entries: dict[tuple[int, int], tuple[EntryKind, bytes]] = {}
        self.before: dict[tuple[int, int], int] = {}
        self.committed: dict[int, Entry] = {}
        self.committed_in: dict[int, int] = {}
        """The term of whoever was first to know that an entry is committed."""
        self.states: dict[int, settings.State] = {0: settings.State()}
        self.last_committed = 0
        self.sent_term: dict[str, int] = {}
        self.sent_vote: set[tuple[str, int]] = set()
        self.counts: Counter[str] = Counter()

    def after(self, label: str, raft: Raft) -> None:
        """Election safety and leader completeness (figure 3): asked after each event of a machine."""
        if raft.role is not Role.LEADER:
            return
        known = self.leaders.setdefault(raft.term, label)
        assert known == label, f"election safety: {known} and {label} lead term {raft.term}"

    def elected(self, label: str, raft: Raft) -> None:
        """Leader completeness: a new leader holds every entry that was committed in an earlier term.

        One of an older term, whose votes came late, need not know what was committed since: it can commit
        nothing."""
        self.counts["elections"] += 1
        for index in range(raft.log.first_index, self.last_committed + 1):
            if self.committed_in[index] >= raft.term:
                continue
            term = raft.log.term_at(index)
            assert term == self.committed[index].term, (
                f"leader completeness: {label} leads term {raft.term} without the committed entry {index} of "
                f"term {self.committed[index].term} (it holds term {term})"
            )

    def exist(self, label: str, previous: int | None, entries: Iterable[Entry]) -> None:
        """Log matching: equal index and term mean equal entries and equal predecessors.

        Entries exist when they are durable somewhere or were sent to somebody. ``previous`` is the term of
        the entry before the first, None where that is not known.
        """
        for entry in entries:
            at = (entry.index, entry.term)
            content = (entry.kind, entry.data)
            assert self.entries.setdefault(at, content) == content, f"log matching: {label} differs at {at}"
            if previous is not None:
                assert self.before.setdefault(at, previous) == previous, (
                    f"log matching: {label} has another entry before {at}"
                )
            previous = entry.term

    def applied(self, label: str, term: int, entries: tuple[Entry, ...]) -> None:
        """State-machine safety: nobody applies another entry at the same index. ``term``: the applier's."""
        for entry in entries:
            known = self.committed.setdefault(entry.index, entry)
            self.committed_in.setdefault(entry.index, term)
            assert known == entry, (
                f"state-machine safety: {label} applies term {entry.term} at {entry.index}, "
                f"others applied term {known.term}"
            )
            if entry.index > self.last_committed:
                assert entry.index == self.last_committed + 1, f"{label} applies {entry.index} after a gap"
                self._commit(entry)

    def _commit(self, entry: Entry) -> None:
        state = self.states[entry.index - 1]
        if entry.kind is EntryKind.COMMAND:
            state, _ = settings.apply(state, entry.index, entry.data)
        elif entry.kind is EntryKind.MEMBERS and entry.index > 1:
            self.counts["membership_changes"] += 1
        self.states[entry.index] = state
        self.last_committed = entry.index
        self.counts["commits"] += 1

    def restored(self, label: str, effect: Restore) -> None:
        """A snapshot is what its entries make, wherever it was taken."""
        self.counts["snapshots_installed"] += 1
        index = effect.snapshot.index
        assert index in self.states, f"{label} installs a snapshot of {index}, which is not committed"
        assert settings.restore(effect.snapshot.data) == self.states[index], (
            f"{label} installs a snapshot of {index} that differs from what was committed"
        )

    def state_of(self, label: str, applied: int, state: settings.State) -> None:
        """A replica's state is that of its applied entries."""
        assert state == self.states[applied], f"{label} has another state after {applied}"

    def sends(self, label: str, term: int, *, voted: bool) -> None:
        """A message leaves; its term, and that a vote was given in it, may never be forgotten."""
        self.sent_term[label] = max(self.sent_term.get(label, 0), term)
        if voted:
            self.sent_vote.add((label, term))

    def boots(self, label: str, term: int, vote: str | None) -> None:
        """A machine starts from what was durable: nothing that it has said may be forgotten."""
        sent = self.sent_term.get(label, 0)
        assert term >= sent, f"durability: {label} spoke in term {sent} and remembers only {term}"
        assert vote is not None or (label, term) not in self.sent_vote, (
            f"durability: {label} voted in term {term} and forgot it"
        )

    def forget(self, label: str) -> None:
        """A disk was taken: what its host had said is forgotten for good reason."""
        self.sent_term.pop(label, None)
        self.sent_vote = {vote for vote in self.sent_vote if vote[0] != label}

    def acknowledged(self, revision: int, value: str) -> None:
        """A client is told that its write is done: it must stand in the committed log, once."""
        self.counts["writes_acknowledged"] += 1
        records = [r for r in self.states[self.last_committed].history if r.after == value]
        floor = self.states[self.last_committed].history_floor
        if revision > floor:
            assert len(records) == 1, f"the acknowledged write of {value} was done {len(records)} times"
            assert records[0].revision == revision

    def read_proven(self, label: str, index: int, committed_when_asked: int) -> None:
        """A linearizable read must see everything that was committed when it was asked (§6.4)."""
        self.counts["reads_proven"] += 1
        assert index >= committed_when_asked, (
            f"stale read: {label} answers at {index}, but {committed_when_asked} was committed before"
        )
