"""How likely tokens are by the model's own word. Owns: which are likeliest, log-probabilities from logits.
Must not: draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from fieldmesh.core.model import Logprobs, TokenLogprob

Logits: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Ids: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

GROUPS = 1024
"""A long row is first looked at in so many groups: one number each is found in a tenth of the time of all."""
_FORBIDDEN = np.finfo(np.float32).min
"""What is below it is minus infinity."""


def logprobs(logits: Logits, token: int, top: int, piece: Callable[[int], bytes]) -> Logprobs:
    """What softmax over ``logits`` gives ``token`` and the ``top`` likeliest tokens, as natural logarithms.

    Equals are ordered by token id, so that the same logits always give the same answer.
    """
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))

    def entry(token_id: int) -> TokenLogprob:
        return TokenLogprob(token_id=token_id, piece=piece(token_id), logprob=float(logits[token_id]) - total)

    best = likeliest(logits, top).tolist() if top else []
    return Logprobs(drawn=entry(token), top=tuple(entry(token_id) for token_id in best))


def in_order(logits: Logits, ids: Ids) -> Ids:
    """The likeliest first, equals by id: the same logits always give the same order."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def likeliest(logits: Logits, count: int) -> Ids:
    """The ``count`` likeliest tokens, the likeliest first; fewer where no more are possible at all."""
    # The count-th highest of the groups is no higher than that of all: few are left to be sorted.
    highs = grouped(logits).max(axis=0) if count <= GROUPS < len(logits) else logits.copy()
    highs.partition(len(highs) - count)
    least = max(highs[-count], _FORBIDDEN)
    return in_order(logits, (logits >= least).nonzero()[0])[:count]


def grouped(row: Logits) -> np.ndarray[Any, Any]:
    """A column for each group, without the few tokens that are left over."""
    return row[: len(row) - len(row) % GROUPS].reshape(-1, GROUPS)
