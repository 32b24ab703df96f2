"""The checker itself: it accepts what has an order and refuses what has none."""

from __future__ import annotations

import random
import time

import pytest

from simulations.linearizability import Kind, Operation, first_violation, linearizable


def get(begin: float, end: float | None, value: str | None, client: int = 0, key: str = "k") -> Operation:
    return Operation(client=client, key=key, kind=Kind.GET, invoked=begin, returned=end, value=value)


def put(begin: float, end: float | None, value: str, client: int = 1, key: str = "k") -> Operation:
    return Operation(client=client, key=key, kind=Kind.PUT, invoked=begin, returned=end, value=value)


def cas(
    begin: float, end: float | None, old: str | None, new: str, done: bool | None, client: int = 2
) -> Operation:
    return Operation(
        client=client, key="k", kind=Kind.CAS, invoked=begin, returned=end, value=new, expected=old, done=done
    )


@pytest.mark.parametrize(
    "history",
    [
        [],
        [get(0, 1, None)],
        [put(0, 1, "a"), get(2, 3, "a")],
        [put(0, 10, "a"), get(2, 3, "a"), get(4, 5, "a")],
        [put(0, 10, "a"), get(2, 3, None), get(4, 5, "a")],
        [put(0, 10, "a"), put(0, 10, "b"), get(2, 3, "b"), get(4, 5, "a")],
        [put(0, None, "a"), get(5, 6, None), get(7, 8, "a")],
        [put(0, None, "a"), get(5, 6, None)],
        [put(0, 1, "a"), cas(2, 3, "a", "b", True), get(4, 5, "b")],
        [put(0, 1, "a"), cas(2, 3, "x", "b", False), get(4, 5, "a")],
        [put(0, 1, "a"), cas(2, None, "a", "b", None), get(4, 5, "a"), get(6, 7, "b")],
        [cas(0, 5, None, "a", True), cas(0, 5, None, "b", False), get(6, 7, "a")],
        [cas(0, None, "a", "b", None), put(2, 3, "a"), get(4, 5, "b")],
    ],
)
def test_a_history_that_has_an_order_is_accepted(history: list[Operation]) -> None:
    assert first_violation(history) is None


@pytest.mark.parametrize(
    "history",
    [
        [put(0, 1, "a"), get(2, 3, None)],
        [put(0, 1, "a"), put(2, 3, "b"), get(4, 5, "a")],
        [put(0, 10, "a"), get(2, 3, "a"), get(4, 5, None)],
        [put(0, 10, "a"), put(0, 10, "b"), get(2, 3, "a"), get(4, 5, "b"), get(6, 7, "a")],
        [put(0, None, "a"), get(5, 6, "a"), get(7, 8, None)],
        [get(0, 1, "a"), put(2, 3, "a")],
        [put(0, 1, "a"), cas(2, 3, "x", "b", True)],
        [put(0, 1, "a"), cas(2, 3, "a", "b", False)],
        [cas(0, 5, None, "a", True), cas(0, 5, None, "b", True)],
    ],
)
def test_a_history_that_has_none_is_refused(history: list[Operation]) -> None:
    """The second is the stale read: acknowledged, overwritten, read again."""
    assert first_violation(history) == "k"


def test_keys_are_judged_one_by_one() -> None:
    good = [put(0, 1, "a", key="good"), get(2, 3, "a", key="good")]
    bad = [put(0, 1, "a", key="bad"), get(2, 3, None, key="bad")]
    assert first_violation(good + bad) == "bad"


def generated(seed: int, operations: int, stale: bool) -> list[Operation]:
    """A history of a real register: every operation takes effect at a moment between its ends."""
    chance, register, history = random.Random(seed), None, []
    clock = [0.0] * 6
    moments = []
    for number in range(operations):
        client = chance.randrange(6)
        begin = clock[client] + chance.random()
        end = begin + chance.random() * 3
        clock[client] = end
        moments.append((begin + chance.random() * (end - begin), client, begin, end, number))
    values: list[str | None] = [None]
    for _, client, begin, end, number in sorted(moments):
        if chance.random() < 0.5:
            history.append(get(begin, end, register, client))
        else:
            register = f"v{number}"
            values.append(register)
            lost = chance.random() < 0.1
            history.append(put(begin, None if lost else end, register, client))
    if stale:
        reads = [i for i, o in enumerate(history) if o.kind is Kind.GET and o.invoked > max(clock) * 0.8]
        chosen = history[reads[0]]
        history[reads[0]] = get(chosen.invoked, chosen.returned, values[1], chosen.client)
    return history


@pytest.mark.parametrize("seed", range(10))
def test_histories_of_a_register_are_accepted_and_one_stale_read_in_them_is_found(seed: int) -> None:
    assert linearizable(generated(seed, 150, stale=False))
    assert not linearizable(generated(seed, 150, stale=True))


def test_a_long_history_is_judged_in_seconds() -> None:
    begin = time.process_time()
    assert linearizable(generated(99, 1500, stale=False))
    assert time.process_time() - begin < 10
