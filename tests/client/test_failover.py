"""The decisions behind both clients, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.client.failover import (
    ADDRESSES_MAX,
    FAILED_MEMORY_S,
    REFRESH_INTERVAL_S,
    AddressBook,
    Attempts,
    Persistence,
)
from fieldmesh.client.records import Mesh, Node
from fieldmesh.core.errors import (
    DeadlineExceeded,
    Draining,
    EngineLost,
    FieldmeshError,
    InvalidRequest,
    NoCandidate,
    NodeUnreachable,
    QueueFull,
    StreamLost,
    TooManyStreams,
)
from fieldmesh.core.model import Address, Load, NodeState

A, B, C = (Address(host="10.0.0.1", port=port) for port in (1, 2, 3))
LIMITS = Persistence(attempts_max=10, rounds_max=3, pause_min_s=0.2, pause_max_s=10.0)


def mesh(*addresses: Address, state: NodeState = NodeState.ALIVE) -> Mesh:
    nodes = tuple(
        Node(
            id=str(index),
            name=str(index),
            addresses=(address,),
            state=state,
            offers=(),
            load=Load(),
            incarnation=1,
            rtt_s=0.0,
            peer_address="",
            version="",
        )
        for index, address in enumerate(addresses)
    )
    return Mesh(name="m", local_id="0", nodes=nodes)


def fail(
    attempts: Attempts, error: FieldmeshError, now: float = 0.0, delivered: int | None = None
) -> tuple[Address, float]:
    """Ask the next node and have it fail: who was asked, and the pause that follows."""
    address = attempts.next_address(now)
    return address, attempts.failed(address, error, now, tokens_delivered=delivered, jitter=0.0)


def test_every_node_is_asked_once_before_a_pause_that_doubles() -> None:
    attempts = Attempts(AddressBook([A, B]), LIMITS, None)
    error = EngineLost("gone")
    steps = [fail(attempts, error) for _ in range(5)]
    assert steps == [(A, 0.0), (B, 0.2), (A, 0.0), (B, 0.4), (A, 0.0)]
    with pytest.raises(EngineLost):
        fail(attempts, error)


def test_attempts_are_bounded_whatever_the_mesh_says() -> None:
    attempts = Attempts(AddressBook([A]), LIMITS, None)
    for _ in range(LIMITS.attempts_max - 1):
        assert fail(attempts, QueueFull("full", retry_after_s=0.5)) == (A, 0.5)
    with pytest.raises(QueueFull):
        fail(attempts, QueueFull("full", retry_after_s=0.5))


@pytest.mark.parametrize("kind", [QueueFull, NoCandidate])
def test_a_mesh_that_names_a_time_is_not_asked_elsewhere_before_it(kind: type[FieldmeshError]) -> None:
    attempts = Attempts(AddressBook([A, B]), LIMITS, None)
    assert fail(attempts, kind("later", retry_after_s=1.5)) == (A, 1.5)


@pytest.mark.parametrize("kind", [Draining, TooManyStreams, EngineLost])
def test_a_node_that_names_a_time_does_not_hold_up_the_others(kind: type[FieldmeshError]) -> None:
    attempts = Attempts(AddressBook([A, B]), LIMITS, None)
    assert fail(attempts, kind("later", retry_after_s=1.5)) == (A, 0.0)
    assert fail(attempts, kind("later", retry_after_s=1.5)) == (B, 1.5)


def test_jitter_only_lengthens_a_pause() -> None:
    attempts = Attempts(AddressBook([A]), LIMITS, None)
    error = QueueFull("full", retry_after_s=1.0)
    assert attempts.failed(attempts.next_address(0), error, 0, tokens_delivered=None, jitter=1.0) == 1.25


def test_no_pause_outlives_the_deadline() -> None:
    attempts = Attempts(AddressBook([A]), LIMITS, 1.0)
    assert attempts.time_left_s(0.25) == 0.75
    with pytest.raises(QueueFull):
        fail(attempts, QueueFull("full", retry_after_s=1.0))
    with pytest.raises(DeadlineExceeded):
        attempts.time_left_s(1.0)


def test_what_is_the_requests_fault_is_not_tried_again() -> None:
    with pytest.raises(InvalidRequest):
        fail(Attempts(AddressBook([A, B]), LIMITS, None), InvalidRequest("bad"))


@pytest.mark.parametrize("delivered", [0, 3])
def test_nothing_is_repeated_once_it_was_delivered(delivered: int) -> None:
    with pytest.raises(StreamLost) as caught:
        fail(Attempts(AddressBook([A, B]), LIMITS, None), NodeUnreachable("gone"), delivered=delivered)
    assert caught.value.metadata == {"tokens_delivered": str(delivered), "cause": "NODE_UNREACHABLE"}


def test_without_an_address_there_is_a_sentence_that_helps() -> None:
    with pytest.raises(NodeUnreachable, match="host:port"):
        Attempts(AddressBook([]), LIMITS, None).next_address(0)


# --- the book ----------------------------------------------------------------------------


def test_the_node_that_answered_last_is_asked_first() -> None:
    book = AddressBook([A, B, C])
    book.answered(B)
    assert book.order(0) == (B, A, C)


def test_a_node_that_failed_is_asked_last_for_a_while() -> None:
    book = AddressBook([A, B, C])
    book.answered(A)
    book.failed(A, 5.0)
    book.failed(B, 6.0)
    assert book.order(7.0) == (C, A, B)
    assert book.order(6.0 + FAILED_MEMORY_S) == (A, B, C)
    book.answered(B)
    assert book.order(7.0) == (B, C, A)


def test_one_refresh_at_a_time_and_not_too_often() -> None:
    book = AddressBook([A])
    assert book.refresh_begins(0.0)
    assert not book.refresh_begins(0.0)
    book.refresh_ends(A, None, 1.0)
    assert book.refresh_begins(1.0)
    book.refresh_ends(A, mesh(A, B), 1.0)
    assert book.order(1.0) == (A, B)
    assert not book.refresh_begins(0.9 + REFRESH_INTERVAL_S)
    assert book.refresh_begins(1.0 + REFRESH_INTERVAL_S)


def test_what_nodes_told_is_replaced_but_seeds_stay() -> None:
    book = AddressBook([A])
    book.refresh_ends(A, mesh(B), 0.0)
    book.refresh_ends(A, mesh(C), 20.0)
    assert book.order(20.0) == (A, C)


def test_the_dead_are_not_learned() -> None:
    book = AddressBook([A])
    book.refresh_ends(A, mesh(B, state=NodeState.DEAD), 0.0)
    assert book.order(0.0) == (A,)


def test_loopback_of_another_box_is_not_learned() -> None:
    own = Address(host="127.0.0.1", port=9)
    book = AddressBook([A])
    book.refresh_ends(A, mesh(own, B), 0.0)
    assert book.order(0.0) == (A, B)
    book.refresh_ends(own, mesh(own, B), 0.0)
    assert book.order(0.0) == (A, own, B)


def test_the_book_is_bounded() -> None:
    many = [Address(host="10.0.0.1", port=port) for port in range(1, 2 * ADDRESSES_MAX)]
    book = AddressBook(many)
    book.refresh_ends(A, mesh(*many), 0.0)
    assert len(book) == ADDRESSES_MAX


_errors = st.sampled_from(
    [
        NodeUnreachable("x"),
        Draining("x"),
        EngineLost("x"),
        QueueFull("x"),
        QueueFull("x", retry_after_s=0.3),
        NoCandidate("x", retry_after_s=2.0),
        TooManyStreams("x", retry_after_s=100.0),
    ]
)


@given(
    errors=st.lists(_errors, min_size=20, max_size=20),
    count=st.integers(1, 5),
    deadline=st.none() | st.floats(0.1, 60),
    jitter=st.floats(0, 1),
)
def test_every_call_ends_within_its_bounds(
    errors: list[FieldmeshError], count: int, deadline: float | None, jitter: float
) -> None:
    book = AddressBook(Address(host="h", port=port) for port in range(1, count + 1))
    attempts, now, made = Attempts(book, LIMITS, deadline), 0.0, 0
    with pytest.raises(FieldmeshError):
        for error in errors:
            attempts.time_left_s(now)
            address = attempts.next_address(now)
            made += 1
            now += attempts.failed(address, error, now, tokens_delivered=None, jitter=jitter)
            assert deadline is None or now < deadline
    assert made <= LIMITS.attempts_max
    assert now <= LIMITS.attempts_max * LIMITS.pause_max_s * 1.25
