"""How fast a batch runs, learnt from its steps.

Owns: smoothed step times by number of decoding sequences, and prefill speed. Must not: read a clock.
"""

from __future__ import annotations

_WEIGHT_OF_NEWEST = 0.1
"""Share of the newest observation in a smoothed value (a guess: about the last ten steps count)."""

DRAFT_PRICE = 0.5
"""What a guessed token costs until it is measured, in steps of one token (SmolLM2, two cores: 0.4 to 0.6)."""


class Pace:
    """Speeds of one engine (0 means not yet known), and what a guessed token costs in steps of one token."""

    __slots__ = ("_decode_step_s", "draft_price", "prefill_tokens_per_s")

    def __init__(self, slots: int) -> None:
        self._decode_step_s = [0.0] * (slots + 1)
        self.prefill_tokens_per_s = 0.0
        self.draft_price = DRAFT_PRICE

    def observe(self, *, decoding: int, prefill_tokens: int, duration_s: float) -> None:
        """Learn from one step that decoded ``decoding`` sequences and prefilled ``prefill_tokens``."""
        if duration_s <= 0:
            return
        if not prefill_tokens:
            self._decode_step_s[decoding] = _smooth(self._decode_step_s[decoding], duration_s)
            return
        # What the decoders of a mixed step would have taken alone is not prefill's time.
        beside_s = min(self._step_s(decoding), duration_s / 2) if decoding else 0.0
        # Short prompts say little about speed: they pay the whole price of a step for few tokens.
        share = min(1.0, prefill_tokens / 64)
        self.prefill_tokens_per_s = _smooth(
            self.prefill_tokens_per_s, prefill_tokens / (duration_s - beside_s), share
        )

    def observe_draft(self, *, drafted: int, duration_s: float) -> None:
        """Learn from one step that computed so many guessed tokens beside the next one of a lone sequence."""
        if step_s := self._step_s(1):
            self.draft_price = _smooth(self.draft_price, max(0.0, duration_s / step_s - 1) / drafted)

    def decode_tokens_per_s(self, decoding: int) -> float:
        """One stream's speed with ``decoding`` streams in the batch (0 counts as 1)."""
        step_s = self._step_s(max(1, decoding))
        return 1 / step_s if step_s else 0.0

    def _step_s(self, decoding: int) -> float:
        """The step time measured at the nearest number of streams."""
        known = [n for n, step_s in enumerate(self._decode_step_s) if step_s]
        return self._decode_step_s[min(known, key=lambda n: abs(n - decoding))] if known else 0.0


def _smooth(old: float, new: float, share: float = 1.0) -> float:
    return new if not old else old + _WEIGHT_OF_NEWEST * share * (new - old)
