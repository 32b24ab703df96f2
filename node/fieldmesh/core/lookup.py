"""Prompt lookup: what may come next, read from what a sequence has said already.

Owns: where a sequence's last tokens stood before, how many of those that followed there make a draft, and
when drafting pays. Must not: know the model, the step, or a clock.

A text that is edited, quoted or gone on with repeats itself. Where the last tokens of a sequence stood
before, those that followed there are computed along with the next one, in one pass; of the tokens that are
then drawn, those count that equal the draft (Saxena, Prompt Lookup Decoding, 2023). What comes out is what
would have come out without it.

A draft is as long as what agrees before it: four agreeing tokens are a hint, twenty are a copy. Agreement is
seen in tokens that were drawn anyway, so that a text that repeats nothing pays for nothing. Each draft that
cost more than it spared doubles the agreement that the next one needs; one that paid halves it again.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM_TOKENS = 3
"""Earlier places are found by so many tokens; they are then compared further back."""
AGREEMENT_TOKENS_MIN = 4
AGREEMENT_TOKENS_MAX = 64


class Lookup:
    """The drafts of one sequence, whose tokens only ever grow at the end."""

    __slots__ = ("_at", "_followers", "_known", "_needed")

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._at = 0
        self._needed = AGREEMENT_TOKENS_MIN

    def draft(self, tokens: Sequence[int], tokens_max: int) -> tuple[int, ...]:
        """What may follow ``tokens``; nothing where too little speaks for it."""
        going_on = self._at + len(tokens) - self._known
        self._learn(tokens)
        elsewhere = self._followers.get(tuple(tokens[-GRAM_TOKENS:]), 0)
        agreeing, self._at = max((_agreement(tokens, at), at) for at in (going_on, elsewhere))
        if agreeing < self._needed:
            return ()
        period = len(tokens) - self._at  # a draft that reaches the end goes on with its own beginning
        return tuple(tokens[self._at + offset % period] for offset in range(min(agreeing, tokens_max)))

    def _learn(self, tokens: Sequence[int]) -> None:
        """Note what followed every few tokens; the latest place counts."""
        for at in range(max(GRAM_TOKENS, self._known), len(tokens)):
            self._followers[tuple(tokens[at - GRAM_TOKENS : at])] = at
        self._known = len(tokens)

    def judge(self, drafted: int, kept: int, price: float) -> None:
        """How a draft fared. ``price`` is what a drafted token costs, in steps of one token."""
        if kept < drafted * price:
            self._needed = min(2 * self._needed, AGREEMENT_TOKENS_MAX)
        else:
            self._needed = max(self._needed // 2, AGREEMENT_TOKENS_MIN)


def _agreement(tokens: Sequence[int], at: int) -> int:
    """How many tokens before ``at`` equal the last ones."""
    if not 0 < at < len(tokens):
        return 0
    count = 0
    while count < min(at, AGREEMENT_TOKENS_MAX) and tokens[at - 1 - count] == tokens[-1 - count]:
        count += 1
    return count
