"""Settings, changes and records on the wire: what goes in comes out, and nonsense is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.settings import CHANGES_MAX, NUMBER_MAX, Change, Record, State, Value
from fieldmesh.rpc import admin
from fieldmesh.v1 import admin_pb2 as pb

texts = st.text(st.characters(codec="utf-8"), max_size=20)
maybe = st.none() | texts
numbers = st.integers(0, NUMBER_MAX)


@given(st.lists(st.builds(Change, key=texts, value=maybe, expected_revision=st.none() | numbers), min_size=1))
def test_changes_come_out_as_they_went_in(changes: list[Change]) -> None:
    assert admin.changes_from_proto(admin.changes_to_proto(changes)) == tuple(changes)


@given(
    st.builds(
        Record,
        revision=numbers,
        key=texts,
        before=maybe,
        after=maybe,
        author=texts,
        origin=texts,
        time_ms=numbers,
    )
)
def test_records_come_out_as_they_went_in(record: Record) -> None:
    assert admin.record_from_proto(admin.record_to_proto(record)) == record


@given(st.integers(1, NUMBER_MAX), st.integers(1, NUMBER_MAX))
def test_a_ticket_is_read_as_it_was_printed(session: int, sequence: int) -> None:
    ticket = admin.Ticket(session=session, sequence=sequence)
    assert admin.Ticket.parse(str(ticket)) == ticket
    assert admin.ticket_from_proto(admin.ticket_to_proto(ticket)) == ticket


@pytest.mark.parametrize(
    "text", ["", "17", "17.", ".1", "17.0", "0.1", "a.b", "1.1.1", "-1.2", "9" * 30 + ".1"]
)
def test_what_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        admin.Ticket.parse(text)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: admin.changes_from_proto([]), "changes"),
        (lambda: admin.changes_from_proto([pb.SettingChange(key="a")] * (CHANGES_MAX + 1)), "changes"),
        (
            lambda: admin.changes_from_proto([pb.SettingChange(key="a", expected_revision=2**63)]),
            "expected_revision",
        ),
        (lambda: admin.ticket_from_proto(pb.WriteTicket(sequence=1)), "ticket.session"),
        (lambda: admin.ticket_from_proto(pb.WriteTicket(session=1)), "ticket.sequence"),
        (
            lambda: admin.ticket_from_proto(pb.WriteTicket(session=1, sequence=3, acknowledged=3)),
            "ticket.sequence",
        ),
        (lambda: admin.author("x" * 101), "author"),
        (lambda: admin.key("x" * 201, "prefix"), "prefix"),
        (lambda: admin.node("x" * 129), "node"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(make: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make()  # type: ignore[operator]
    assert refused.value.field == field


def test_keys_are_listed_in_order_with_a_prefix_behind_a_key() -> None:
    state = State(values={k: Value(text="1", revision=1) for k in ("b/2", "a/1", "b/1", "b/3")})
    assert [s.key for s in admin.settings_to_proto(state)] == ["a/1", "b/1", "b/2", "b/3"]
    assert [s.key for s in admin.settings_to_proto(state, prefix="b/", after_key="b/1")] == ["b/2", "b/3"]


def records(*sizes: tuple[int, int]) -> list[pb.HistoryRecord]:
    return [pb.HistoryRecord(revision=revision, key="k", after="x" * size) for revision, size in sizes]


def test_a_page_holds_what_a_message_can_carry_and_nothing_is_lost_between_pages() -> None:
    third = admin.PAGE_BYTES_MAX // 3
    items = records(*((n, third) for n in range(1, 8)))
    pages = list(admin.pages(items))
    assert [item for page in pages for item in page] == items
    assert [len(page) for page in pages] == [2, 2, 2, 1]
    assert list(admin.pages([])) == [[]]


def test_a_page_of_history_does_not_part_a_write() -> None:
    half = admin.PAGE_BYTES_MAX // 2
    items = records((1, 10), (2, half), (2, half), (2, 10), (3, 10))
    assert [r.revision for r in admin.history_page(items)] == [1]
    assert [r.revision for r in admin.history_page(items[1:])] == [2, 2, 2]
    assert [r.revision for r in admin.history_page(items[4:])] == [3]
