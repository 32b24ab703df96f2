"""What an observer holds of a log that it is no member of. Owns: how pieces of a watch stream become a state.

A voter sends the whole configuration once and every change from then on; the stream may break anywhere and
goes on by revision. Changes are taken only where they go on from what is held, so a state here is always one
that the log has had. Must not: choose whom to follow, or forget a newer epoch for an older one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import msgspec

from fieldmesh.core import settings
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import Members
from fieldmesh.core.settings import State

NEVER = float("-inf")
PIECE_BYTES_MAX = 256 * 1024
WHOLE_BYTES_MAX = 48 * 1024 * 1024
"""More than a state within the limits of ``core.settings`` takes."""
KEPT_BYTES_MAX = 8 * 1024 * 1024
"""What an observer writes to its disk; a longer history is left out there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogView:
    """A log as one node sees it. ``applied`` is the index up to which its state stands; ``current_at`` is
    when (local seconds) that was last known to be what the leader had, minus infinity for never."""

    log: str
    epoch: int
    term: int
    leader: NodeId | None
    members: Members
    commit: int
    applied: int
    current_at: float = NEVER


class Content(Enum):
    """What the data of a piece is; values are those of the wire."""

    NOTHING = 0
    SNAPSHOT = 1
    RECORDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One message of a watch stream: the view, and perhaps some of what leads to ``revision``."""

    view: LogView
    revision: int
    content: Content = Content.NOTHING
    data: bytes = b""
    more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A configuration with the log that it belongs to."""

    view: LogView
    state: State = field(default_factory=State)


def pieces(view: LogView, state: State, seen: int | None) -> list[Piece]:
    """What brings a follower that has revision ``seen`` (None: nothing) to ``state``; no pieces where it is
    ahead of it."""
    if seen is not None and seen >= state.revision:
        return [Piece(view=view, revision=seen)] if seen == state.revision else []
    records = settings.changes_since(state, seen) if seen is not None else None
    if records is None:
        content, data = Content.SNAPSHOT, settings.snapshot(settings.for_observers(state))
    else:
        content, data = Content.RECORDS, settings.encode_records(records)
    starts = range(0, len(data), PIECE_BYTES_MAX)
    return [
        Piece(
            view=view,
            revision=state.revision,
            content=content,
            data=data[start : start + PIECE_BYTES_MAX],
            more=start + PIECE_BYTES_MAX < len(data),
        )
        for start in starts
    ]


class Following:
    """What is held, and the pieces of what comes next."""

    def __init__(self, held: Held | None) -> None:
        self.held = held
        self._gathered = bytearray()

    def begin(self) -> None:
        """Another stream begins: pieces of the one before do not count."""
        self._gathered.clear()

    def take(self, piece: Piece) -> Held | None:
        """What is held after this piece; None while more of it is to come.

        Raises InvalidRequest for what does not go on from here (ask again, for everything), UpgradeNeeded."""
        view, held = piece.view, self.held
        if held is not None and (view.log != held.view.log or view.epoch < held.view.epoch):
            raise InvalidRequest(
                f"this node follows the log {held.view.log} (epoch {held.view.epoch}), not {view.log} "
                f"(epoch {view.epoch})",
                field="log",
            )
        self._gathered += piece.data
        if len(self._gathered) > WHOLE_BYTES_MAX:
            raise InvalidRequest(f"more than {WHOLE_BYTES_MAX} bytes at once", field="data")
        if piece.more:
            return None
        data = bytes(self._gathered)
        self._gathered.clear()
        try:
            self.held = Held(view=view, state=self._state(piece, data))
        except ValueError as error:
            raise InvalidRequest(f"the watch does not go on: {error}", field="data") from error
        return self.held

    def _state(self, piece: Piece, data: bytes) -> State:
        if piece.content is Content.SNAPSHOT:
            state = settings.restore(data)
        else:
            state = self.held.state if self.held is not None else State()
            if self.held is not None and piece.view.epoch != self.held.view.epoch:
                raise ValueError("another epoch begins with a snapshot")
            if piece.content is Content.RECORDS:
                state = settings.follow(state, settings.decode_records(data), piece.revision)
        if state.revision != piece.revision:
            raise ValueError(f"revision {state.revision} is not {piece.revision}")
        return state


# --- on the disk ---------------------------------------------------------------------------


class _Kept(msgspec.Struct):
    log: str
    epoch: int
    term: int
    members: bytes
    applied: int
    state: bytes


def keep(held: Held) -> bytes:
    """What an observer writes to its disk, at most KEPT_BYTES_MAX: the oldest history gives way."""
    state = settings.for_observers(held.state)
    view = held.view
    while True:
        kept = _Kept(
            log=view.log,
            epoch=view.epoch,
            term=view.term,
            members=view.members.encode(),
            applied=view.applied,
            state=settings.snapshot(state),
        )
        data = msgspec.msgpack.encode(kept)
        if len(data) <= KEPT_BYTES_MAX or not state.history:
            return data
        state = replace(state, history=(), history_characters=0, history_floor=state.revision)


def kept(data: bytes) -> Held:
    """What ``keep`` wrote. Raises ValueError, UpgradeNeeded."""
    read = msgspec.msgpack.decode(data, type=_Kept)
    return Held(
        view=LogView(
            log=read.log,
            epoch=read.epoch,
            term=read.term,
            leader=None,
            members=Members.decode(read.members),
            commit=read.applied,
            applied=read.applied,
        ),
        state=settings.restore(read.state),
    )
