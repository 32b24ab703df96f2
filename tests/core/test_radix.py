"""Goal: the tree finds the longest shared prefix, counts every cell once and forgets in the right order.

Method: random sequences of calls against a plain dictionary of token lists, with ``check`` after each call;
examples for what a reader should know.
"""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fieldmesh.core.radix import Match, RadixTree, common_prefix_length

CELLS_MAX = 60
TOKENS = st.lists(st.integers(0, 2), max_size=14)
KEYS = st.sampled_from(["", "medical"])


class TreeAgainstLists(RuleBasedStateMachine):
    """The model: holder -> (key, tokens, cells, pins), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[int] = RadixTree(CELLS_MAX)
        self.model: OrderedDict[int, tuple[str, list[int], int, int]] = OrderedDict()
        self.next = 0

    def used(self) -> int:
        return sum(cells for _, _, cells, _ in self.model.values())

    def any_holder(self, number: int) -> int:
        return list(self.model)[number % len(self.model)]

    @rule(key=KEYS, tokens=TOKENS, more=st.integers(0, 5), pinned=st.booleans())
    def insert(self, key: str, tokens: list[int], more: int, pinned: bool) -> None:
        cells = len(tokens) + more
        expected, free = [], CELLS_MAX - self.used()
        for holder, (_, _, held, fixed) in self.model.items():
            if free < cells and not fixed:
                expected.append(holder)
                free += held
        gone = self.tree.evict(cells)
        if free < cells:
            assert gone is None
            return
        assert gone == tuple(expected)
        for holder in expected:
            del self.model[holder]
        self.tree.insert(self.next, key, tokens, cells=cells, pinned=pinned)
        self.model[self.next] = (key, tokens, cells, int(pinned))
        self.next += 1

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 50))
    def remove(self, number: int) -> None:
        holder = self.any_holder(number)
        self.tree.remove(holder)
        del self.model[holder]

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 50), pinned=st.booleans())
    def pin_or_unpin(self, number: int, pinned: bool) -> None:
        holder = self.any_holder(number)
        pins = self.model[holder][3]
        if pinned or pins:
            (self.tree.pin if pinned else self.tree.unpin)(holder)
            self.model[holder] = (*self.model[holder][:3], pins + (1 if pinned else -1))

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 50))
    def touch(self, number: int) -> None:
        holder = self.any_holder(number)
        self.tree.touch(holder)
        self.model.move_to_end(holder)

    @rule(key=KEYS, tokens=TOKENS)
    def match(self, key: str, tokens: list[int]) -> None:
        shared = {
            holder: common_prefix_length(held, tokens)
            for holder, (of, held, _, _) in self.model.items()
            if of == key
        }
        matches = self.tree.match(key, tokens)
        lengths = [m.length for m in matches]
        assert lengths == sorted(set(lengths), reverse=True)
        assert max(shared.values(), default=0) == max(lengths, default=0)
        for found in matches:
            assert set(found.holders) == {h for h, length in shared.items() if length >= found.length}
        whole = {h for h, length in shared.items() if length == len(self.model[h][1]) > 0}
        assert set(self.tree.covered(key, tokens)) == whole

    @invariant()
    def nothing_is_lost_and_no_cell_is_counted_twice(self) -> None:
        self.tree.check()
        assert list(self.tree) == list(self.model)
        assert self.tree.cells == self.used() <= CELLS_MAX
        for holder, (key, tokens, _, pins) in self.model.items():
            assert self.tree.tokens(holder) == tuple(tokens)
            assert (self.tree.key(holder), self.tree.pinned(holder)) == (key, pins > 0)


TreeAgainstLists.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestTreeAgainstLists = TreeAgainstLists.TestCase


def test_the_holder_of_the_longest_prefix_comes_first() -> None:
    tree: RadixTree[str] = RadixTree(100)
    tree.insert("short", "", [1, 2, 3])
    tree.insert("long", "", [1, 2, 3, 4, 5])
    tree.insert("other", "", [1, 2, 9])
    assert tree.match("", [1, 2, 3, 4, 7]) == [
        Match(4, ("long",)),
        Match(3, ("short", "long")),
        Match(2, ("short", "long", "other")),
    ]


def test_sequences_of_another_adapter_share_nothing() -> None:
    tree: RadixTree[str] = RadixTree(100)
    tree.insert("a", "medical", [1, 2, 3])
    assert tree.match("", [1, 2, 3]) == []


def test_a_pinned_entry_is_never_evicted() -> None:
    tree: RadixTree[str] = RadixTree(10)
    tree.insert("pinned", "", [1] * 6, pinned=True)
    tree.insert("free", "", [2] * 4)
    assert tree.evict(5) is None
    assert list(tree) == ["pinned", "free"]
    assert tree.evict(4) == ("free",)


def test_inserting_without_room_or_twice_raises() -> None:
    tree: RadixTree[str] = RadixTree(4)
    tree.insert("a", "", [1, 2, 3])
    with pytest.raises(AssertionError, match="already"):
        tree.insert("a", "", [1])
    with pytest.raises(AssertionError, match="not made free"):
        tree.insert("b", "", [1, 2])


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_the_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    length = common_prefix_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
