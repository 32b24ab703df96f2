"""How likely tokens are by the model's own word. Owns: log-probabilities from logits. Must not: draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fieldmesh.core.model import Logprobs, TokenLogprob

Logits: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]


def logprobs(logits: Logits, token: int, top: int, piece: Callable[[int], bytes]) -> Logprobs:
    """What softmax over ``logits`` gives ``token`` and the ``top`` likeliest tokens, as natural logarithms.

    Equals are ordered by token id, so that the same logits always give the same answer.
    """
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))

    def entry(token_id: int) -> TokenLogprob:
        return TokenLogprob(token_id=token_id, piece=piece(token_id), logprob=float(logits[token_id]) - total)

    best: list[int] = []
    if top:
        threshold = np.partition(logits, len(logits) - top)[len(logits) - top]
        among = np.flatnonzero(logits >= threshold)
        best = among[np.lexsort((among, -logits[among]))][:top].tolist()
    return Logprobs(drawn=entry(token), top=tuple(entry(token_id) for token_id in best))
