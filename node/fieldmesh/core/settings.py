"""What a committed command means. Owns: the configuration's state, its revisions, sessions and history.

``apply`` is pure and total: it depends on the state and the command alone, never on a clock, a schema or the
version of a library, so every replica computes the same state and the same outcome. A command that cannot
be done has an outcome that says so. What values mean is checked before proposal (``core.settings_schema``);
here they are texts. Must not: raise for any bytes of a known version; a newer version raises UpgradeNeeded,
because skipping a command would split the replicas.

Sessions are those of the dissertation (§6.3): opened in the log, one outcome kept a sequence number until the
client says that it has it, bounded in number, and expired by the time that the commands carry. A command of
an expired session is refused, never done a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import msgspec

from fieldmesh.core.errors import InvalidRequest, UpgradeNeeded

COMMAND_VERSION = 1
"""The newest version of commands that this code can apply; it is the first byte of every command."""

SESSIONS_MAX = 1024
SESSION_IDLE_MS_MAX = 3_600_000
SESSION_OUTCOMES_MAX = 64
KEYS_MAX = 4096
KEY_CHARACTERS_MAX = 200
VALUE_CHARACTERS_MAX = 64 * 1024
VALUES_CHARACTERS_MAX = 2 * 1024 * 1024
CHANGES_MAX = 256
HISTORY_RECORDS_MAX = 1000
HISTORY_CHARACTERS_MAX = 2 * 1024 * 1024
LABEL_CHARACTERS_MAX = 200
NUMBER_MAX = 2**62

KEY = re.compile(rf"[a-z][A-Za-z0-9._:/-]{{0,{KEY_CHARACTERS_MAX - 1}}}")


class Kind(Enum):
    """What a command does."""

    OPEN_SESSION = "open_session"
    WRITE = "write"


class Code(Enum):
    """How a command ended. Values never change: they are part of the replicated state."""

    DONE = "done"
    REVISION_CONFLICT = "revision_conflict"
    SESSION_EXPIRED = "session_expired"
    SEQUENCE_PASSED = "sequence_passed"
    TOO_MANY_IN_FLIGHT = "too_many_in_flight"
    STATE_FULL = "state_full"
    COMMAND_INVALID = "command_invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Set ``key`` to ``value``, or remove it (None).

    ``expected_revision`` makes it conditional on the revision of the key's last change (0: no such key).
    """

    key: str
    value: str | None
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command. ``changes`` are done together or not at all.

    ``acknowledged``: the client has the outcomes of all sequence numbers up to this one. ``time_ms`` is the
    leader's clock (milliseconds since 1970) when it was proposed; ``author`` and ``origin``: who, where.
    """

    kind: Kind
    time_ms: int = 0
    session: int = 0
    sequence: int = 0
    acknowledged: int = 0
    changes: tuple[Change, ...] = ()
    author: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a command. ``revision``: of the write, or the one that conflicted; ``session``: opened."""

    code: Code
    revision: int = 0
    session: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A key's value and the revision of its last change."""

    text: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One key's change: ``before`` and ``after`` are None where there was or is no value."""

    revision: int
    key: str
    before: str | None
    after: str | None
    author: str
    origin: str
    time_ms: int

    @property
    def characters(self) -> int:
        return len(self.key) + len(self.before or "") + len(self.after or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A client's memory of what it asked for: outcomes by sequence number above ``acknowledged``."""

    active_ms: int
    acknowledged: int = 0
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The configuration after some command. Never changed in place; old states stay valid.

    ``history`` holds every change after revision ``history_floor``. ``sessions`` is ordered by activity.
    """

    revision: int = 0
    time_ms: int = 0
    values: dict[str, Value] = field(default_factory=dict)
    values_characters: int = 0
    sessions: dict[int, Session] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    history_characters: int = 0
    history_floor: int = 0


_decoder = msgspec.json.Decoder(Command, strict=True)
_state_decoder = msgspec.json.Decoder(State, strict=True)
_records_decoder = msgspec.json.Decoder(tuple[Record, ...], strict=True)


# --- bytes -------------------------------------------------------------------------------


def encode(command: Command) -> bytes:
    """A command as an entry's data."""
    return bytes((COMMAND_VERSION,)) + msgspec.json.encode(command)


def version_of(data: bytes) -> int:
    """The version of a command; 0 for no command at all."""
    return data[0] if data else 0


def decode(data: bytes) -> Command | None:
    """The command in an entry's data; None for what is none of this version."""
    try:
        return _decoder.decode(data[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def snapshot(state: State) -> bytes:
    """A state as a snapshot's data: equal states that came about equally have equal bytes."""
    return bytes((COMMAND_VERSION,)) + msgspec.json.encode(state)


def restore(data: bytes) -> State:
    """The state in a snapshot; no bytes are the first state. Raises UpgradeNeeded, ValueError."""
    if not data:
        return State()
    _known(version_of(data), "a snapshot")
    return _state_decoder.decode(data[1:])


def for_observers(state: State) -> State:
    """The state without what only members of the log need."""
    return replace(state, sessions={}) if state.sessions else state


def encode_records(records: tuple[Record, ...]) -> bytes:
    """Changes as bytes for those who follow."""
    return bytes((COMMAND_VERSION,)) + msgspec.json.encode(records)


def decode_records(data: bytes) -> tuple[Record, ...]:
    """The inverse. Raises UpgradeNeeded, ValueError."""
    _known(version_of(data), "a change")
    return _records_decoder.decode(data[1:])


def _known(version: int, what: str) -> None:
    if version > COMMAND_VERSION:
        raise UpgradeNeeded(
            f"the log holds {what} of version {version}; this node knows up to {COMMAND_VERSION}: "
            "install the version of Fieldmesh that the other voters run",
            metadata={"version": str(version)},
        )


# --- apply -------------------------------------------------------------------------------


def apply(state: State, index: int, data: bytes) -> tuple[State, Outcome]:
    """The state after the command at ``index`` of the log, and its outcome. Raises UpgradeNeeded only."""
    _known(version_of(data), "a command")
    command = decode(data)
    if command is None or not _well_formed(command):
        return state, Outcome(code=Code.COMMAND_INVALID)
    state = _at_time(state, command.time_ms)
    if command.kind is Kind.OPEN_SESSION:
        return _open_session(state, index)
    return _once(state, command)


def _well_formed(command: Command) -> bool:
    numbers = (command.time_ms, command.session, command.sequence, command.acknowledged)
    labels = (command.author, command.origin)
    if not all(0 <= number <= NUMBER_MAX for number in numbers):
        return False
    if any(len(label) > LABEL_CHARACTERS_MAX for label in labels):
        return False
    if command.kind is Kind.OPEN_SESSION:
        return not command.changes
    keys = [change.key for change in command.changes]
    return (
        0 < len(keys) <= CHANGES_MAX
        and len(set(keys)) == len(keys)
        and command.acknowledged < command.sequence
        and all(KEY.fullmatch(key) for key in keys)
        and all(len(change.value or "") <= VALUE_CHARACTERS_MAX for change in command.changes)
    )


def _at_time(state: State, time_ms: int) -> State:
    """Move time on (never back) and expire sessions; the least active ones stand first."""
    time_ms = max(state.time_ms, time_ms)
    expired = []
    for session_id, session in state.sessions.items():
        if time_ms - session.active_ms <= SESSION_IDLE_MS_MAX:
            break
        expired.append(session_id)
    if time_ms == state.time_ms and not expired:
        return state
    return replace(state, time_ms=time_ms, sessions=_without(state.sessions, expired))


def _without(sessions: dict[int, Session], gone: Iterable[int]) -> dict[int, Session]:
    gone = set(gone)
    return {key: value for key, value in sessions.items() if key not in gone} if gone else sessions


def _open_session(state: State, index: int) -> tuple[State, Outcome]:
    """The index of the command names the session; the least active one gives way when there are too many."""
    full = len(state.sessions) >= SESSIONS_MAX
    sessions = dict(_without(state.sessions, [next(iter(state.sessions))] if full else ()))
    sessions[index] = Session(active_ms=state.time_ms)
    return replace(state, sessions=sessions), Outcome(code=Code.DONE, session=index, revision=state.revision)


def _once(state: State, command: Command) -> tuple[State, Outcome]:
    """Do a write unless its session knows the outcome already (§6.3)."""
    session = state.sessions.get(command.session)
    if session is None:
        return state, Outcome(code=Code.SESSION_EXPIRED)
    known = session.outcomes.get(command.sequence)
    if known is not None:
        return state, known
    if command.sequence <= session.acknowledged:
        return state, Outcome(code=Code.SEQUENCE_PASSED)
    acknowledged = max(session.acknowledged, command.acknowledged)
    outcomes = {s: o for s, o in session.outcomes.items() if s > acknowledged}
    if len(outcomes) >= SESSION_OUTCOMES_MAX:
        return state, Outcome(code=Code.TOO_MANY_IN_FLIGHT)
    state, outcome = _write(state, command)
    outcomes[command.sequence] = outcome
    sessions = dict(state.sessions)
    del sessions[command.session]  # and in again at the end: the order is that of activity
    sessions[command.session] = Session(active_ms=state.time_ms, acknowledged=acknowledged, outcomes=outcomes)
    return replace(state, sessions=sessions), outcome


def _write(state: State, command: Command) -> tuple[State, Outcome]:
    """Do all changes or none."""
    for change in command.changes:
        present = revision_of(state, change.key)
        if change.expected_revision is not None and change.expected_revision != present:
            return state, Outcome(code=Code.REVISION_CONFLICT, revision=present)
    revision = state.revision + 1
    values, characters, records = dict(state.values), state.values_characters, []
    for change in command.changes:
        before = values.pop(change.key, None)
        if before is not None:
            characters -= len(change.key) + len(before.text)
        if change.value is not None:
            values[change.key] = Value(text=change.value, revision=revision)
            characters += len(change.key) + len(change.value)
        if before is not None or change.value is not None:
            records.append(
                Record(
                    revision=revision,
                    key=change.key,
                    before=before.text if before else None,
                    after=change.value,
                    author=command.author,
                    origin=command.origin,
                    time_ms=state.time_ms,
                )
            )
    if len(values) > KEYS_MAX or characters > VALUES_CHARACTERS_MAX:
        return state, Outcome(code=Code.STATE_FULL)
    state = replace(state, revision=revision, values=values, values_characters=characters)
    return _remember(state, records), Outcome(code=Code.DONE, revision=revision)


def _remember(state: State, records: list[Record]) -> State:
    """Add to the history, and forget its oldest revisions where it grows too long."""
    history = (*state.history, *records)
    characters = state.history_characters + sum(record.characters for record in records)
    floor, start = state.history_floor, 0
    while len(history) - start > HISTORY_RECORDS_MAX or characters > HISTORY_CHARACTERS_MAX:
        floor = history[start].revision
        while start < len(history) and history[start].revision == floor:
            characters -= history[start].characters
            start += 1
    return replace(state, history=history[start:], history_characters=characters, history_floor=floor)


# --- questions ---------------------------------------------------------------------------


def revision_of(state: State, key: str) -> int:
    """The revision of a key's last change; 0 if there is no such key."""
    value = state.values.get(key)
    return value.revision if value is not None else 0


def changes_since(state: State, revision: int) -> tuple[Record, ...] | None:
    """What changed after ``revision``, oldest first; None if that is forgotten (a watcher then needs all)."""
    if revision < state.history_floor:
        return None
    return tuple(record for record in state.history if record.revision > revision)


def follow(state: State, records: tuple[Record, ...], revision: int) -> State:
    """The state at ``revision``, after changes that were done elsewhere. Raises ValueError where they do not
    go on from it (a revision without changes is possible: a key that was not there was deleted)."""
    values, characters, newest = dict(state.values), state.values_characters, state.revision
    for record in records:
        before = values.pop(record.key, None)
        continues = (before.text if before is not None else None) == record.before
        if not continues or not max(newest, state.revision + 1) <= record.revision <= revision:
            raise ValueError(
                f"the change of {record.key} in revision {record.revision} does not go on from here"
            )
        newest = record.revision
        characters -= len(record.key) + len(before.text) if before is not None else 0
        if record.after is not None:
            values[record.key] = Value(text=record.after, revision=newest)
            characters += len(record.key) + len(record.after)
    if revision < newest:
        raise ValueError(f"revision {revision} is older than {newest}")
    time_ms = max(state.time_ms, records[-1].time_ms) if records else state.time_ms
    followed = replace(state, revision=revision, time_ms=time_ms, values=values, values_characters=characters)
    return _remember(followed, list(records))


def values_at(state: State, revision: int) -> Mapping[str, str]:
    """Every key's text as of ``revision``. Raises InvalidRequest for one that is forgotten or to come."""
    if not state.history_floor <= revision <= state.revision:
        raise InvalidRequest(
            f"revision {revision} is not known; revisions {state.history_floor} to {state.revision} are",
            field="revision",
        )
    values = {key: value.text for key, value in state.values.items()}
    for record in reversed(state.history):
        if record.revision <= revision:
            break
        if record.before is None:
            values.pop(record.key, None)
        else:
            values[record.key] = record.before
    return values


def rollback(state: State, revision: int) -> tuple[Change, ...]:
    """The changes that bring every key back to ``revision``, conditional on nobody changing them meanwhile.

    Raises InvalidRequest if the revision is forgotten or to come. No changes: nothing differs.
    """
    then, now = values_at(state, revision), state.values
    keys = sorted({record.key for record in state.history if record.revision > revision})
    return tuple(
        Change(key=key, value=then.get(key), expected_revision=revision_of(state, key))
        for key in keys
        if then.get(key) != (now[key].text if key in now else None)
    )


def difference(state: State, older: int, newer: int) -> tuple[tuple[str, str | None, str | None], ...]:
    """Keys with their texts at two revisions, where they differ. Raises InvalidRequest like ``values_at``."""
    before, after = values_at(state, older), values_at(state, newer)
    keys = sorted({*before, *after})
    return tuple((k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k))


def check(state: State) -> None:
    """Raise AssertionError where a state contradicts itself."""
    assert len(state.values) <= KEYS_MAX
    assert len(state.sessions) <= SESSIONS_MAX
    assert len(state.history) <= HISTORY_RECORDS_MAX
    assert state.values_characters == sum(len(k) + len(v.text) for k, v in state.values.items())
    assert state.history_characters == sum(record.characters for record in state.history)
    assert all(value.revision <= state.revision for value in state.values.values())
    activity = [session.active_ms for session in state.sessions.values()]
    assert activity == sorted(activity)
    assert all(len(session.outcomes) <= SESSION_OUTCOMES_MAX for session in state.sessions.values())
