"""Which token comes next: sampling parameters applied to rows of logits, as llama.cpp's samplers do it.

Owns: what may not be said, penalties, top-k, top-p, min-p, temperature, and the choice. Must not: compute
logits, or know a library of models. NumPy works on the whole row; llama.cpp's own samplers copy it into a
list of candidates first, and take two to three times as long.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fieldmesh.core.model import Sampling
from fieldmesh.engine.likelihood import GROUPS, Ids, Logits, grouped, in_order, likeliest, logprobs
from fieldmesh.engine.loop import Drawn

if TYPE_CHECKING:
    from fieldmesh.engine.loop import Walk

PENALTY_WINDOW_TOKENS = 1024
_FLOORS = (1e-3, 1e-5, 0.0)
"""Tokens less likely than the likeliest by this factor are not even sorted, while the others suffice."""


class Rows(Protocol):
    """What a sampler needs of a model."""

    @property
    def end_tokens(self) -> frozenset[int]: ...

    def logits(self, row: int) -> Logits:
        """One row of the last step, which the sampler may change."""
        ...

    def piece(self, token: int) -> bytes:
        """A token's bytes."""
        ...


class Sampler:
    """Draws tokens for one generation.

    The draw for token ``index`` depends on logits, parameters, seed and index alone, never on how many
    draws were made before in this process: a resumed stream draws what the interrupted one would have.
    """

    def __init__(
        self,
        model: Rows,
        sampling: Sampling,
        seed: int,
        resumed: Sequence[int],
        prompt: Sequence[int],
        walk: Walk | None,
    ) -> None:
        self._model = model
        self._walk = walk
        self._sampling = sampling
        self._seed = seed
        self._banned_always = np.array(
            sorted(model.end_tokens) if sampling.ignore_eos else [], dtype=np.int64
        )
        self._banned_early = np.array(sorted(model.end_tokens | {*sampling.stop_token_ids}), dtype=np.int64)
        self._biased = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)
        counts = bool(sampling.frequency_penalty or sampling.presence_penalty)
        # Repetition counts the prompt too, as in transformers and vLLM, the others the answer alone (OpenAI).
        self._read = Window((*prompt, *resumed)) if sampling.repetition_penalty != 1.0 else None
        self._said = Window(resumed) if counts else None

    def draw(self, row: int, index: int, forced: int | None = None) -> Drawn:
        """The token that follows, from the last step's logits at ``row``. Raises ConstraintInvalid."""
        logits, wanted = self._model.logits(row), self._sampling.logprobs
        raw = None if wanted is None else logits.copy()
        drawn = self._draw(logits, index) if forced is None else Drawn(forced)
        for window in (self._read, self._said):
            if window is not None:
                window.add(drawn.token_id)
        if raw is None or wanted is None:
            return drawn
        return replace(drawn, logprobs=logprobs(raw, drawn.token_id, wanted, self._model.piece))

    def _draw(self, logits: Logits, index: int) -> Drawn:
        if len(self._biased):
            logits[self._biased] += self._biases
        banned = self._banned_early if index < self._sampling.min_tokens else self._banned_always
        if self._walk is None:
            logits[banned] = -np.inf
            return Drawn(self._choose(logits, index))
        allowed = self._walk.allowed()[: len(logits)]
        logits[~allowed] = -np.inf
        if np.count_nonzero(allowed) > np.count_nonzero(allowed[banned]):  # else only the end is left
            logits[banned] = -np.inf
        token = self._choose(logits, index)
        self._walk.take(token)
        return Drawn(token, ends=self._walk.ended)

    def _choose(self, logits: Logits, index: int) -> int:
        sampling = self._sampling
        if self._read is not None:
            repeated, _ = self._read.counts
            seen = logits[repeated]
            penalty = np.float32(sampling.repetition_penalty)
            logits[repeated] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._said is not None:
            said, times = self._said.counts
            logits[said] -= times * sampling.frequency_penalty + sampling.presence_penalty
        if sampling.temperature == 0:
            return int(logits.argmax())
        return choose(logits, sampling, fraction(self._seed, index))


class Window:
    """How often each of the last ``PENALTY_WINDOW_TOKENS`` tokens was said."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._last = deque(tokens, maxlen=PENALTY_WINDOW_TOKENS)
        self._counts = Counter(self._last)

    def add(self, token: int) -> None:
        """The next token; the first one is forgotten."""
        if len(self._last) == PENALTY_WINDOW_TOKENS:
            self._counts[self._last[0]] -= 1
        self._last.append(token)
        self._counts[token] += 1

    @property
    def counts(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The tokens, and how often each was said."""
        said = +self._counts
        return np.array([*said], dtype=np.int64), np.array([*said.values()], dtype=np.float32)


def choose(logits: Logits, sampling: Sampling, at: float) -> int:
    """The token at ``at`` (from 0 up to, not including, 1) of the distribution over those that ``sampling``
    leaves, at its temperature, which is above 0."""
    total = 0.0
    if 0 < sampling.top_k < len(logits):
        ids = likeliest(logits, sampling.top_k)
    elif sampling.top_p < 1.0 or sampling.min_p > 0.0:
        ids, total = _above_floor(logits, sampling)
    else:
        return _place(np.exp((logits - logits.max()) / np.float32(sampling.temperature)), at)
    if not len(ids):  # a broken model, which computes what is not a number
        return int(logits.argmax())
    among = logits[ids].astype(np.float64)
    among -= among[0]
    left = len(ids)
    if sampling.top_p < 1.0:
        sums = np.exp(among).cumsum()
        left = min(left, int(sums.searchsorted(sampling.top_p * (total or sums[-1]))) + 1)
    if sampling.min_p > 0.0:
        left = min(left, max(1, int((-among).searchsorted(-math.log(sampling.min_p), side="right"))))
    sums = np.exp(among[:left] / sampling.temperature).cumsum()
    return int(ids[_reached(sums, at)[0]])


def _above_floor(logits: Logits, sampling: Sampling) -> tuple[Ids, float]:
    """The tokens that top-p and min-p can leave, the likeliest first, and the sum of all weights."""
    weights = np.exp(logits - logits.max())
    total = float(weights.sum(dtype=np.float64))
    # A little below min-p, for the exponential rounds; where it is 0, as far down as top-p may want.
    floors = (0.99 * sampling.min_p,) if sampling.min_p > 0.0 else _FLOORS
    for floor in floors:
        ids = np.flatnonzero(weights >= floor)
        if float(weights[ids].sum(dtype=np.float64)) >= sampling.top_p * total:
            break
    return in_order(logits, ids), total


def _place(weights: Logits, at: float) -> int:
    """Where ``at`` of the sum of the weights is reached; never at a weight of 0."""
    if len(weights) <= GROUPS:
        return _reached(np.cumsum(weights, dtype=np.float64), at)[0]
    groups = grouped(weights)
    sums = np.append(groups.sum(axis=0), weights[groups.size :].sum())
    group, at = _reached(np.cumsum(sums, dtype=np.float64), at)
    if group == GROUPS:
        return groups.size + _reached(np.cumsum(weights[groups.size :], dtype=np.float64), at)[0]
    return group + GROUPS * _reached(np.cumsum(groups[:, group], dtype=np.float64), at)[0]


def _reached(sums: np.ndarray[Any, Any], at: float) -> tuple[int, float]:
    """The first of growing sums that is above ``at`` of the last, and how far into its own part that is."""
    target = at * sums[-1]
    place = int(np.searchsorted(sums, target, side="right"))
    place = min(place, int(np.searchsorted(sums, sums[-1])))  # rounding may reach the end
    before = sums[place - 1] if place else 0.0
    return place, float((target - before) / (sums[place] - before))


def fraction(seed: int, index: int) -> float:
    """A number from 0 up to, not including, 1: 53 well-mixed bits of (seed, index), by splitmix64's finaliser
    (Steele, Lea, Flood 2014)."""
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return float((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53
