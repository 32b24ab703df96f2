"""What is kept for a while in memory. Owns: its bounds in count, bytes, age. Must not: know what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Kept]):
    value: Kept
    size_bytes: int
    at: float


class Shelf(Generic[Kept]):
    """Values by name; what was put there first is thrown away first. Times in seconds, never going back."""

    def __init__(self, *, count_max: int, bytes_max: int, age_max_s: float) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._age_max_s = age_max_s
        self._entries: dict[str, _Entry[Kept]] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, value: Kept, size_bytes: int, now: float) -> None:
        """Keep a value, in place of one of the same name; not at all where it alone is too large."""
        self.drop(name, now)
        if size_bytes > self._bytes_max:
            return
        self._entries[name] = _Entry(value, size_bytes, now)
        self.size_bytes += size_bytes
        while len(self._entries) > self._count_max or self.size_bytes > self._bytes_max:
            self._remove(next(iter(self._entries)))

    def get(self, name: str, now: float) -> Kept | None:
        """The value, if it is there."""
        self._expire(now)
        found = self._entries.get(name)
        return None if found is None else found.value

    def drop(self, name: str, now: float) -> bool:
        """Throw a value away; False where there is none."""
        self._expire(now)
        if name not in self._entries:
            return False
        self._remove(name)
        return True

    def _expire(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries))
            if now - self._entries[oldest].at <= self._age_max_s:
                return
            self._remove(oldest)

    def _remove(self, name: str) -> None:
        self.size_bytes -= self._entries.pop(name).size_bytes
