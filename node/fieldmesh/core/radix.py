"""A radix tree over token ids: which of many sequences share how much with a new one.

Owns: the tree, the cells that its entries hold, and the order in which they were used last. Must not: know
slots, files, a model, or who computes what.

An entry is one holder (a slot, a saved state) of one sequence of tokens; a node is a run of tokens that all
holders below it share, so tokens are kept once however many sequences begin with them. Trees of different
keys (adapters) share nothing: the same tokens under another adapter have other keys and values.

Cells are counted by entry, not by node: every holder has a copy of its own, for that is how the caches
behind it work (one stream of cells a sequence). A pinned entry is never evicted; pins are counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Holder = TypeVar("Holder", bound=Hashable)


@dataclass(slots=True)
class _Node(Generic[Holder]):
    """``tokens`` follow those of ``parent``; every holder in ``holders`` has them all."""

    tokens: tuple[int, ...]
    parent: _Node[Holder] | None
    children: dict[int, _Node[Holder]] = field(default_factory=dict)
    holders: dict[Holder, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry(Generic[Holder]):
    key: str
    end: _Node[Holder]
    length: int
    cells: int
    pins: int


@dataclass(frozen=True, slots=True)
class Match(Generic[Holder]):
    """``holders`` share at least the first ``length`` tokens with what was asked for."""

    length: int
    holders: tuple[Holder, ...]


class RadixTree(Generic[Holder]):
    """Entries within ``cells_max`` cells. Illegal use (a holder unknown, or twice) raises AssertionError."""

    def __init__(self, cells_max: int) -> None:
        self.cells_max = cells_max
        self.cells = 0
        self._roots: dict[str, _Node[Holder]] = {}
        self._entries: OrderedDict[Holder, _Entry[Holder]] = OrderedDict()  # least recently used first

    def __contains__(self, holder: Holder) -> bool:
        return holder in self._entries

    def __iter__(self) -> Iterator[Holder]:
        """Holders, least recently used first."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"RadixTree({len(self)} entries, {self.cells} of {self.cells_max} cells)"

    # --- entries ----------------------------------------------------------------------------

    def insert(
        self, holder: Holder, key: str, tokens: Sequence[int], *, cells: int = 0, pinned: bool = False
    ) -> None:
        """Add a holder of ``tokens`` that takes ``cells`` (at least one for each token), as just used.

        The cells must be there: see ``evict``.
        """
        assert holder not in self._entries, f"{holder!r} holds a sequence already"
        cells = max(cells, len(tokens))
        assert self.cells + cells <= self.cells_max, "cells were not made free"
        self.cells += cells
        node = self._roots.setdefault(key, _Node((), None))
        rest = tuple(tokens)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest, node)
            shared = common_prefix_length(child.tokens, rest)
            if shared < len(child.tokens):
                child = self._split(child, shared)
            child.holders[holder] = None
            node, rest = child, rest[shared:]
        self._entries[holder] = _Entry(key, node, len(tokens), cells, int(pinned))

    def _split(self, node: _Node[Holder], at: int) -> _Node[Holder]:
        """Put a new node before ``node`` that takes its first ``at`` tokens; returns the new one."""
        assert node.parent is not None
        upper = _Node(node.tokens[:at], node.parent, holders=dict(node.holders))
        upper.children[node.tokens[at]] = node
        node.parent.children[node.tokens[0]] = upper
        node.tokens, node.parent = node.tokens[at:], upper
        return upper

    def remove(self, holder: Holder) -> None:
        """Forget a holder; its cells are free."""
        entry = self._entries.pop(holder)
        self.cells -= entry.cells
        node: _Node[Holder] | None = entry.end
        while node is not None and node.parent is not None:
            parent = node.parent
            del node.holders[holder]
            if not node.holders:
                del parent.children[node.tokens[0]]
            elif len(node.children) == 1:
                _join(node)
            node = parent
        root = self._roots[entry.key]
        if not root.children and not any(e.end is root for e in self._entries.values()):
            del self._roots[entry.key]

    def pin(self, holder: Holder) -> None:
        """Keep an entry from being evicted."""
        self._entries[holder].pins += 1

    def unpin(self, holder: Holder) -> None:
        """Undo one ``pin``."""
        entry = self._entries[holder]
        assert entry.pins > 0, f"{holder!r} is not pinned"
        entry.pins -= 1

    def touch(self, holder: Holder) -> None:
        """Count an entry as just used."""
        self._entries.move_to_end(holder)

    def evict(self, cells: int) -> tuple[Holder, ...] | None:
        """Make room for ``cells`` more: the holders that were removed, least recently used first. None where
        the pinned entries leave too little; then nothing is removed."""
        free = self.cells_max - self.cells
        gone: list[Holder] = []
        for holder, entry in self._entries.items():
            if free >= cells:
                break
            if not entry.pins:
                gone.append(holder)
                free += entry.cells
        if free < cells:
            return None
        for holder in gone:
            self.remove(holder)
        return tuple(gone)

    # --- questions --------------------------------------------------------------------------

    def match(self, key: str, tokens: Sequence[int]) -> list[Match[Holder]]:
        """Who shares how much with ``tokens``, the longest first; holders are named again at every shorter
        length."""
        found: list[Match[Holder]] = []
        wanted = tuple(tokens)  # a list and a tuple are never equal
        node, depth = self._roots.get(key), 0
        while node is not None and depth < len(wanted):
            node = node.children.get(wanted[depth])
            if node is not None:
                shared = common_prefix_length(node.tokens, wanted[depth : depth + len(node.tokens)])
                depth += shared
                found.append(Match(depth, tuple(node.holders)))
                if shared < len(node.tokens):
                    break
        return found[::-1]

    def covered(self, key: str, tokens: Sequence[int]) -> list[Holder]:
        """Holders whose whole sequence ``tokens`` begin with: they know nothing that ``tokens`` do not."""
        return [
            holder
            for match in self.match(key, tokens)
            for holder in match.holders
            if self._entries[holder].length == match.length
        ]

    def tokens(self, holder: Holder) -> tuple[int, ...]:
        """The sequence of a holder."""
        parts: list[tuple[int, ...]] = []
        node: _Node[Holder] | None = self._entries[holder].end
        while node is not None:
            parts.append(node.tokens)
            node = node.parent
        return tuple(token for part in reversed(parts) for token in part)

    def length(self, holder: Holder) -> int:
        """How many tokens a holder has."""
        return self._entries[holder].length

    def key(self, holder: Holder) -> str:
        """Under which key a holder has its tokens."""
        return self._entries[holder].key

    def pinned(self, holder: Holder) -> bool:
        """Whether an entry cannot be evicted."""
        return self._entries[holder].pins > 0

    def check(self) -> None:
        """Raise AssertionError where the tree contradicts itself."""
        assert self.cells == sum(e.cells for e in self._entries.values()) <= self.cells_max
        passing: dict[Holder, int] = dict.fromkeys(self._entries, 0)
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for first, child in node.children.items():
                assert child.parent is node
                assert child.tokens[0] == first
                assert child.holders, "a node that nobody holds"
                assert node.parent is None or set(child.holders) <= set(node.holders)
            for holder in node.holders:
                passing[holder] += len(node.tokens)
            if node.parent is not None and len(node.children) == 1:
                (only,) = node.children.values()
                assert set(only.holders) != set(node.holders), "two nodes that could be one"
        for holder, entry in self._entries.items():
            assert passing[holder] == entry.length == len(self.tokens(holder)) <= entry.cells


def _join(node: _Node[Holder]) -> None:
    """Make one of ``node`` and its only child where the same holders have both."""
    (child,) = node.children.values()
    if len(child.holders) < len(node.holders):
        return
    # The lower node stays: entries end there.
    assert node.parent is not None
    child.tokens = node.tokens + child.tokens
    child.parent = node.parent
    node.parent.children[child.tokens[0]] = child


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences of one type (two lists, or two tuples) share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
