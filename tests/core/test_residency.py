"""Goal: saved states and slots never claim the host's one buffer at once. Method: examples against the record
keeper alone; tests/core/test_batching.py drives it with random work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fieldmesh.core.residency import NOWHERE, Residency, Source, state_name
from fieldmesh.core.steps import BatcherConfig, Place, Save

A, B, C = tuple(range(100)), tuple(range(500, 600)), tuple(range(900, 1000))
NAME = state_name("", A)


@pytest.fixture
def cache() -> Iterator[Residency]:
    """Two slots; state A is saved, slot 1 holds what is left of B."""
    config = BatcherConfig(
        slots=2, context_tokens=256, cells_total=512, stored_cells=1000, store_tokens_min=50
    )
    made = Residency(config)
    assert made.adopt("", A)
    made.place(1, "", B, NOWHERE, 120)
    made.retire(1, "", B)
    yield made
    made.check()


def test_nothing_is_saved_in_the_step_that_places_a_fetched_state(cache: Residency) -> None:
    assert not cache.fetch(NAME)
    assert cache.take_orders() == ((), None, NAME)
    cache.fetched(NAME, ok=True)
    source = cache.best("", (*A, 1, 2, 3), 101)
    assert source == Source(100, name=NAME)
    assert cache.fetch(NAME)
    assert cache.place(0, "", (*A, 1, 2, 3), source, 120)[-1].state == NAME
    cache.place(1, "", C, NOWHERE, 120)  # overwrites B, which would be worth saving
    assert cache.take_orders() == ((), None, "")


def test_who_is_retired_moves_to_an_empty_slot(cache: Residency) -> None:
    moved, own = cache.place(1, "", C, NOWHERE, 120)
    assert moved == Place(slot=0, source=1, keep_tokens=100)
    assert own == Place(slot=1, source=1, keep_tokens=0)
    assert cache.best("", B, 99) == Source(99, slot=0)
    assert cache.take_orders()[1] is None


def test_what_moved_in_this_plan_is_not_saved_from_where_it_will_be(cache: Residency) -> None:
    cache.place(1, "", C, NOWHERE, 120)
    cache.place(0, "", A, NOWHERE, 120)
    assert cache.take_orders()[1] is None


def test_what_did_not_arrive_where_it_moved_is_known_nowhere(cache: Residency) -> None:
    cache.place(1, "", C, NOWHERE, 120)
    cache.lose(0)
    assert cache.best("", B, 99) == NOWHERE


def test_where_all_slots_are_taken_what_was_retired_is_parked() -> None:
    one = Residency(BatcherConfig(slots=1, context_tokens=256, cells_total=256, parked_cells=250))
    one.place(0, "", A, NOWHERE, 120)
    one.retire(0, "", A)
    assert one.place(0, "", B, NOWHERE, 120)[0] == Place(slot=1, source=0, keep_tokens=100)
    one.retire(0, "", B)
    source = one.best("", (*A, 1), 100)
    assert source == Source(100, slot=1)
    assert one.place(0, "", (*A, 1), source, 120) == (
        Place(slot=2, source=0, keep_tokens=100),
        Place(slot=0, source=1, keep_tokens=100),
    )
    one.retire(0, "", (*A, 1))
    one.place(0, "", C, NOWHERE, 120)  # there is room for two: over what was retired first
    assert one.best("", (*A, 1, 2), 102) == Source(101, slot=1)
    one.check()


def test_for_a_longer_one_several_that_were_parked_leave() -> None:
    one = Residency(BatcherConfig(slots=1, context_tokens=256, cells_total=256, parked_cells=250))
    for tokens in (A, B, tuple(range(1000, 1200))):
        one.place(0, "", tokens, NOWHERE, 220)
        one.retire(0, "", tokens)
    assert one.place(0, "", C, NOWHERE, 120) == (
        Place(slot=2, source=2, keep_tokens=0),
        Place(slot=1, source=0, keep_tokens=200),
        Place(slot=0, source=0, keep_tokens=0),
    )
    one.check()


def full(cache: Residency) -> Save | None:
    """Overwrite the only retired sequence while the other slot is taken."""
    cache.place(0, "", A, NOWHERE, 120)
    cache.begin_plan()
    cache.place(1, "", C, NOWHERE, 120)
    return cache.take_orders()[1]


def test_what_is_overwritten_is_saved_first_where_the_buffer_is_free(cache: Residency) -> None:
    save = full(cache)
    assert save is not None
    assert (save.slot, save.token_ids) == (1, B)
    assert not cache.claim()
    cache.saved(save.name, ok=True)
    assert cache.claim()


def test_a_state_that_was_fetched_for_nobody_gives_way(cache: Residency) -> None:
    cache.fetch(NAME)
    cache.fetched(NAME, ok=True)
    assert cache.claim()
    assert not cache.fetch(NAME)
    cache.unclaim()
    assert not cache.fetch(NAME)
    assert cache.take_orders()[2] == NAME


def test_states_of_another_adapter_are_not_offered(cache: Residency) -> None:
    assert cache.best("medical", (*A, 1, 2), 100) == NOWHERE


def test_a_state_too_large_for_the_budget_is_not_taken(cache: Residency) -> None:
    assert not cache.adopt("", tuple(range(1001)))
