"""One generation in the scheduler: while it waits, and while it runs.

Owns: the two records. Must not: decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fieldmesh.core.lookup import Lookup
from fieldmesh.core.model import Usage
from fieldmesh.core.steps import Work


@dataclass(slots=True, kw_only=True)
class Running:
    """A running generation. ``tokens`` are known, the first ``computed`` of them are in the KV cache."""

    work: Work
    arrived: float
    order: int
    slot: int
    tokens: list[int]
    computed: int
    cached: int
    queue_s: float = 0.0
    paused: bool = False
    ended: bool = False
    lookup: Lookup = field(default_factory=Lookup)

    @property
    def outstanding(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt_token_ids)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.work.prompt_token_ids),
            cached_tokens=self.cached,
            completion_tokens=self.generated,
            queue_s=self.queue_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """``cached``, ``queue_s`` and ``state`` are set for those that ran before: reused prompt tokens, how
    long they waited then, saved state."""

    work: Work
    arrived: float
    order: int
    tokens: list[int]
    cached: int | None = None
    queue_s: float = 0.0
    state: str = ""

    @property
    def keep_max(self) -> int:
        """How many tokens may be reused: the logits after the last are needed."""
        return len(self.tokens) - 1
