"""Texts to vectors, a pass at a time between the steps of running streams.

Owns: the queue of requests, what each pass computes, pooling and normalising. Must not: know llama.cpp, wait,
or read a clock. Short texts share a pass; a long one takes as many as it needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from fieldmesh.core.errors import DeadlineExceeded, FieldmeshError, QueueFull
from fieldmesh.core.steps import Slice
from fieldmesh.engine.frames import Embedded, Report, failed

PASS_TEXTS_MAX = 32
PASS_TOKENS_MAX = 128
"""A pass between steps must not hold streams up for long, and its buffers hold a row of the vocabulary's size
for each token."""
REQUESTS_MAX = 64


class Pooling(Enum):
    """How the rows of a text's tokens become one vector."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


Compute = Callable[[Sequence[Slice]], Any]
"""Slices to an array with a row for each of their tokens, in order."""


@dataclass(slots=True)
class _Text:
    """``pooled``: the sum of the rows so far (its direction is the mean's), or the row that counts."""

    tokens: tuple[int, ...]
    done: int = 0
    slot: int = 0
    pooled: Any = None

    def add(self, rows: Any, pooling: Pooling) -> None:
        """Take the rows of the next tokens."""
        match pooling:
            case Pooling.MEAN:
                self.pooled = rows.sum(axis=0) + (0.0 if self.pooled is None else self.pooled)
            case Pooling.CLS:
                self.pooled = rows[0] if self.pooled is None else self.pooled
            case Pooling.LAST:
                self.pooled = rows[-1]
        self.done += len(rows)


@dataclass(slots=True)
class _Request:
    key: int
    texts: list[_Text]
    deadline: float | None
    vectors: list[tuple[float, ...]] = field(default_factory=list)


class EmbeddingQueue:
    """The requests of one engine, first come, first served."""

    def __init__(self, compute: Compute, pooling: Pooling) -> None:
        self._compute = compute
        self._pooling = pooling
        self._requests: OrderedDict[int, _Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, key: int, texts: Sequence[tuple[int, ...]], deadline: float | None) -> None:
        """Queue the token ids of some texts. Raises QueueFull."""
        if len(self._requests) >= REQUESTS_MAX:
            raise QueueFull("too many texts wait to be embedded; ask again later", retry_after_s=1.0)
        self._requests[key] = _Request(key, [_Text(tokens) for tokens in texts], deadline)

    def cancel(self, key: int) -> None:
        """Forget a request (unknown keys are ignored)."""
        self._requests.pop(key, None)

    def step(self, tokens_max: int, now: float) -> list[Report]:
        """One pass over at most ``tokens_max`` tokens; the requests that it completes."""
        reports: list[Report] = []
        for request in list(self._requests.values()):
            if request.deadline is not None and request.deadline <= now:
                del self._requests[request.key]
                late = DeadlineExceeded(f"the deadline passed after {len(request.vectors)} texts")
                reports.append(failed(request.key, late))
        planned = self._plan(min(tokens_max, PASS_TOKENS_MAX))
        if planned:
            try:
                self._take(planned, self._compute([piece for _, _, piece in planned]))
            except FieldmeshError as error:
                reports += [failed(key, error) for key in self._requests]
                self._requests.clear()
        for request in list(self._requests.values()):
            if len(request.vectors) < len(request.texts):
                break
            del self._requests[request.key]
            tokens = sum(len(text.tokens) for text in request.texts)
            reports.append(Embedded(request.key, tuple(request.vectors), tokens))
        return reports

    def _plan(self, tokens_max: int) -> list[tuple[_Request, _Text, Slice]]:
        """The next tokens, text by text: only the last one of a pass may be left unfinished."""
        planned: list[tuple[_Request, _Text, Slice]] = []
        for request in self._requests.values():
            for text in request.texts[len(request.vectors) :]:
                if tokens_max == 0 or len(planned) == PASS_TEXTS_MAX:
                    return planned
                if not text.done:  # one that goes on comes first, and keeps its slot
                    taken = {piece.slot for _, _, piece in planned}
                    text.slot = next(slot for slot in range(PASS_TEXTS_MAX) if slot not in taken)
                tokens = text.tokens[text.done : text.done + tokens_max]
                piece = Slice(id="", slot=text.slot, position=text.done, token_ids=tokens, sample=False)
                planned.append((request, text, piece))
                tokens_max -= len(tokens)
        return planned

    def _take(self, planned: Sequence[tuple[_Request, _Text, Slice]], rows: Any) -> None:
        start = 0
        for request, text, piece in planned:
            end = start + len(piece.token_ids)
            text.add(np.asarray(rows[start:end], dtype=np.float64), self._pooling)
            start = end
            if text.done == len(text.tokens):
                request.vectors.append(normalised(text.pooled))


def normalised(vector: Any) -> tuple[float, ...]:
    """The vector at length 1 (zero stays zero), in single precision."""
    length = float(np.linalg.norm(vector))
    return tuple((vector / length if length else vector).astype(np.float32).tolist())
