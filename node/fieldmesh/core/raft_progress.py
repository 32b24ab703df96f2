"""What a leader knows of one follower. Owns: the position, the pace and the bounded window of sends.

Must not: look into the log or build messages. Three paces, in the manner of etcd's raft:

    PROBE      the match is unknown: one Append at a time until one is answered
    REPLICATE  the match is known: a window of Appends under way, each assumed to arrive
    SNAPSHOT   the follower needs entries that are gone: chunks, one at a time
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from fieldmesh.core.raft_model import Snapshot


class Pace(Enum):
    """How a follower is being served; the module's head says what each means."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


@dataclass(slots=True, kw_only=True)
class Progress:
    """``match`` is the last entry known to be durable there, ``next`` the first to be sent.

    ``contact`` is when it last answered, ``round`` the newest broadcast that it answered, ``version`` the
    newest command version that it says it can apply (0: it has not said), ``commit`` what it was last told to
    be committed. ``waiting``: the one message of a probe or of a snapshot is under way;
    ``answered``: it has answered a heartbeat that followed the chunk under way; ``lost``: it is a voter and
    its log is gone.
    """

    next: int
    contact: float
    match: int = 0
    pace: Pace = Pace.PROBE
    round: int = 0
    version: int = 0
    commit: int = 0
    lost: bool = False
    waiting: bool = False
    answered: bool = False
    snapshot: Snapshot | None = None
    offset: int = 0
    window: deque[tuple[int, int]] = field(default_factory=deque)
    window_bytes: int = 0

    def sent(self, last_index: int, cost_bytes: int) -> None:
        """Entries up to ``last_index`` were sent without waiting for an answer."""
        self.window.append((last_index, cost_bytes))
        self.window_bytes += cost_bytes
        self.next = last_index + 1

    def acknowledged(self, index: int) -> None:
        """Everything up to ``index`` is durable there. May come late, twice or out of order."""
        self.match = max(self.match, index)
        while self.window and self.window[0][0] <= index:
            self.window_bytes -= self.window.popleft()[1]
        if self.pace is Pace.PROBE or (self.snapshot is not None and index >= self.snapshot.index):
            self._restart(Pace.REPLICATE, self.match + 1)
        self.next = max(self.next, self.match + 1)

    def probe(self, next_index: int) -> None:
        """Search for the match from ``next_index`` down, never below what is known to match."""
        self._restart(Pace.PROBE, max(next_index, self.match + 1))

    def send_snapshot(self, snapshot: Snapshot) -> None:
        """The entries that it needs are gone; begin with the snapshot's first chunk."""
        self._restart(Pace.SNAPSHOT, snapshot.index + 1)
        self.snapshot = snapshot

    def _restart(self, pace: Pace, next_index: int) -> None:
        self.pace, self.next = pace, next_index
        self.window.clear()
        self.window_bytes = 0
        self.waiting = self.answered = False
        self.snapshot = None
        self.offset = 0

    def check(self, last_index: int) -> None:
        """Raise AssertionError where the record contradicts itself or the leader's log."""
        assert self.match < self.next
        assert self.match <= last_index
        assert self.next <= last_index + 1
        assert self.window_bytes == sum(cost for _, cost in self.window)
        assert not self.window or self.pace is Pace.REPLICATE
        assert (self.snapshot is not None) == (self.pace is Pace.SNAPSHOT)
