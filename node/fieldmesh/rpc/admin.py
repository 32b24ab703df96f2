"""The codec of the configuration and its log: requests, settings, changes and records, to protobuf and back.

Owns: the bounds of what an operator may send, and how answers are cut into pages. What values mean is
``core.settings_schema``'s. Must not: import grpc.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.settings import CHANGES_MAX, KEY_CHARACTERS_MAX, NUMBER_MAX, Change, Record, State
from fieldmesh.v1 import admin_pb2 as pb

AUTHOR_CHARACTERS_MAX = 100
NODE_CHARACTERS_MAX = 128
PAGE_BYTES_MAX = 1024 * 1024
"""Text on one page of an answer; the longest value fits with room to spare."""

Item = TypeVar("Item")


class Sized(Protocol):
    """Anything that knows its size on the wire."""

    def ByteSize(self) -> int: ...


SizedItem = TypeVar("SizedItem", bound=Sized)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Which write of which session: the same ticket is never done twice. As text: ``SESSION.SEQUENCE``."""

    session: int
    sequence: int
    acknowledged: int = 0

    def __str__(self) -> str:
        return f"{self.session}.{self.sequence}"

    @staticmethod
    def parse(text: str) -> Ticket:
        """The inverse of ``str``. Raises InvalidRequest."""
        session, _, sequence = text.partition(".")
        if not (session.isdecimal() and sequence.isdecimal() and text.isascii() and len(text) <= 40):
            raise InvalidRequest(
                f"{text[:40]!r} is no ticket; one looks like 17.1, as it was printed with the unknown write",
                field="ticket",
            )
        return ticket_from_proto(pb.WriteTicket(session=_whole(session), sequence=_whole(sequence)))


def _whole(digits: str) -> int:
    return min(int(digits), NUMBER_MAX + 1)


# --- requests in -------------------------------------------------------------------------


def changes_from_proto(changes: Sequence[pb.SettingChange]) -> tuple[Change, ...]:
    """What is to change. Raises InvalidRequest for what no state could hold."""
    if not 0 < len(changes) <= CHANGES_MAX:
        raise InvalidRequest(
            f"{len(changes)} changes at once; 1 to {CHANGES_MAX} are accepted", field="changes"
        )
    return tuple(
        Change(
            key=change.key,
            value=change.value if change.HasField("value") else None,
            expected_revision=(
                number(change.expected_revision, "expected_revision")
                if change.HasField("expected_revision")
                else None
            ),
        )
        for change in changes
    )


def ticket_from_proto(ticket: pb.WriteTicket) -> Ticket:
    """Which write it is. Raises InvalidRequest."""
    found = Ticket(
        session=number(ticket.session, "ticket.session"),
        sequence=number(ticket.sequence, "ticket.sequence"),
        acknowledged=number(ticket.acknowledged, "ticket.acknowledged"),
    )
    if not found.session:
        raise InvalidRequest("ticket.session comes from OpenSession; 0 is none", field="ticket.session")
    if not found.acknowledged < found.sequence:
        raise InvalidRequest(
            "ticket.sequence counts from 1 and is above ticket.acknowledged", field="ticket.sequence"
        )
    return found


def author(name: str) -> str:
    """Who writes, as the caller says. Raises InvalidRequest."""
    if len(name) > AUTHOR_CHARACTERS_MAX:
        raise InvalidRequest(f"author is longer than {AUTHOR_CHARACTERS_MAX} characters", field="author")
    return name


def key(name: str, field: str) -> str:
    """A key or the beginning of one; empty is accepted. Raises InvalidRequest."""
    if len(name) > KEY_CHARACTERS_MAX:
        raise InvalidRequest(f"{field} is longer than {KEY_CHARACTERS_MAX} characters", field=field)
    return name


def node(name: str) -> str:
    """A node's id or name; empty is accepted. Raises InvalidRequest."""
    if len(name) > NODE_CHARACTERS_MAX:
        raise InvalidRequest(f"node is longer than {NODE_CHARACTERS_MAX} characters", field="node")
    return name


def number(value: int, field: str) -> int:
    """A revision or another number. Raises InvalidRequest."""
    if value > NUMBER_MAX:
        raise InvalidRequest(f"{field} is {value}; at most {NUMBER_MAX}", field=field)
    return value


# --- out and in --------------------------------------------------------------------------


def changes_to_proto(changes: Iterable[Change]) -> list[pb.SettingChange]:
    """What is to change."""
    return [
        pb.SettingChange(key=change.key, value=change.value, expected_revision=change.expected_revision)
        for change in changes
    ]


def ticket_to_proto(ticket: Ticket) -> pb.WriteTicket:
    """Which write it is."""
    return pb.WriteTicket(session=ticket.session, sequence=ticket.sequence, acknowledged=ticket.acknowledged)


def settings_to_proto(state: State, *, prefix: str = "", after_key: str = "") -> list[pb.Setting]:
    """Keys with a prefix behind a key, in order."""
    return [
        pb.Setting(key=name, value=value.text, revision=value.revision)
        for name, value in sorted(state.values.items())
        if name.startswith(prefix) and name > after_key
    ]


def record_to_proto(record: Record) -> pb.HistoryRecord:
    """One key's change."""
    return pb.HistoryRecord(
        revision=record.revision,
        key=record.key,
        before=record.before,
        after=record.after,
        author=record.author,
        origin=record.origin,
        time_ms=record.time_ms,
    )


def record_from_proto(record: pb.HistoryRecord) -> Record:
    """One key's change."""
    return Record(
        revision=record.revision,
        key=record.key,
        before=optional_text(record, "before"),
        after=optional_text(record, "after"),
        author=record.author,
        origin=record.origin,
        time_ms=record.time_ms,
    )


def optional_text(message: Any, field: str) -> str | None:
    """A text that may be left out."""
    return getattr(message, field) if message.HasField(field) else None


def differences_to_proto(
    differences: Iterable[tuple[str, str | None, str | None]],
) -> list[pb.SettingDiff]:
    """Keys with their values before and afterwards."""
    return [pb.SettingDiff(key=name, before=before, after=after) for name, before, after in differences]


# --- pages -------------------------------------------------------------------------------


def pages(items: Sequence[SizedItem]) -> Iterator[Sequence[SizedItem]]:
    """The items in pieces that a message can carry; one empty piece where there are none."""
    start = size = 0
    for position, item in enumerate(items):
        size += item.ByteSize()
        if size > PAGE_BYTES_MAX and position > start:
            yield items[start:position]
            start, size = position, item.ByteSize()
    yield items[start:]


def history_page(records: Sequence[pb.HistoryRecord]) -> Sequence[pb.HistoryRecord]:
    """The first records, without parting those of one revision: 256 keys of one write fit in a message."""
    page = next(pages(records))
    if len(page) == len(records):
        return page
    last = records[len(page)].revision
    whole = [record for record in page if record.revision != last]
    return whole or [record for record in records if record.revision == last]


def status_json(found: pb.GetRaftStatusResponse) -> dict[str, Any]:
    """What one node knows of the log, for programs and for the web page."""
    return {
        "local_id": found.local_id,
        "role": found.role,
        "log": found.group,
        "epoch": found.epoch,
        "term": found.term,
        "leader": {"id": found.leader_id, "name": found.leader_name} if found.leader_id else None,
        "voters": [member.id for member in found.members if member.voter],
        "learners": [member.id for member in found.members if not member.voter],
        "members": [
            {
                "id": member.id,
                "name": member.name,
                "voter": member.voter,
                "here": member.here,
                "match": member.match or None,
                "lost": member.lost,
            }
            for member in found.members
        ],
        "revision": found.revision,
        "commit": found.commit,
        "lag_entries": found.lag_entries,
        "stale_s": found.stale_s if found.HasField("stale_s") else None,
        "advice": found.advice,
        "stopped": found.stopped,
        "other_logs": {other.group: list(other.node_ids) for other in found.other_logs},
    }
