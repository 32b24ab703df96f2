"""Counting: what a node adds up while it works, for whoever reads the sums.

Owns: counts by key of which there are never too many, and histograms. Must not: know what is counted, or who
reads it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Counts(Generic[Key]):
    """Sums by key; they never shrink. Beyond ``keys_max`` keys, everything new is added up under ``rest``."""

    def __init__(self, keys_max: int, rest: Key) -> None:
        self._keys_max = keys_max
        self._rest = rest
        self._sums: dict[Key, int] = {}

    def add(self, key: Key, amount: int = 1) -> None:
        """Add to the sum of ``key``."""
        if key not in self._sums and len(self._sums) >= self._keys_max:
            key = self._rest
        self._sums[key] = self._sums.get(key, 0) + amount

    def items(self) -> Iterator[tuple[Key, int]]:
        """Every key with its sum, in the order in which they first came."""
        return iter(self._sums.items())


class Histogram:
    """How often values fell into each bucket; ``bounds`` are upper bounds, ascending, themselves included."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        assert bounds == tuple(sorted(set(bounds))), "the bounds of a histogram ascend"
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` as often as it occurred."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> tuple[int, ...]:
        """How many values were at most each bound, and last how many there were."""
        sums: list[int] = []
        for count in self._counts:
            sums.append(count + (sums[-1] if sums else 0))
        return tuple(sums)
