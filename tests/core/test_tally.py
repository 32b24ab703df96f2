"""Counting. Goal: sums are right, and there are never too many of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.tally import Counts, Histogram


def test_a_value_counts_in_the_first_bucket_that_includes_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == (2, 3, 4)
    assert histogram.total == 12.0


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5))))
def test_a_histogram_agrees_with_the_values_themselves(observed: list[tuple[float, int]]) -> None:
    histogram = Histogram((0.5, 2.0, 5.0))
    for value, times in observed:
        histogram.observe(value, times)
    values = [value for value, times in observed for _ in range(times)]
    expected = [sum(value <= bound for value in values) for bound in histogram.bounds]
    assert histogram.cumulative() == (*expected, len(values))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5))))
def test_counts_lose_nothing_and_keep_to_their_bound(added: list[tuple[int, int]]) -> None:
    counts: Counts[int] = Counts(3, -1)
    for key, amount in added:
        counts.add(key, amount)
    assert sum(count for _, count in counts.items()) == sum(amount for _, amount in added)
    assert len(dict(counts.items())) <= 4
