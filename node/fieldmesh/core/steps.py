"""What goes in and out of the batch scheduler: its bounds, its work, one step's plan and results.

Owns: the records between ``core.batching`` and whoever runs the steps. Must not: decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.model import FinishReason, Priority, Usage

_LOWEST = {
    "slots": 1,
    "prefill_tokens": 1,
    "mixed_tokens": 1,
    "reuse_tokens_min": 1,
    "store_tokens_min": 1,
    "restore_tokens_min": 1,
    "preempt_tokens_min": 1,
    "draft_tokens_max": 0,
    "queue_max": 0,
    "stored_cells": 0,
    "parked_cells": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherConfig:
    """Bounds of one Batcher. All token counts are tokens (equal to KV cells).

    ``mixed_tokens`` bounds a step while something decodes: at 48, a step of SmolLM2 on two cores takes
    about 130 ms instead of 25. ``reuse_tokens_min``: a shorter common prefix is not worth the copy.

    ``cuttable`` is False where the cache can keep all of a sequence or nothing (recurrent layers).
    ``parked_cells`` bounds what stays beside the cache when its slot is needed (0: nothing), in twice as
    many places as there are slots. ``stored_cells`` bounds saved states (0: none are kept). A retired
    sequence is saved where it has at least ``store_tokens_min`` tokens that no saved state has, and a state
    is loaded where it spares at least ``restore_tokens_min`` tokens of prefill (both guesses: about a
    second, and a quarter of one, of prefill).
    ``preempt_tokens_min``: who has fewer tokens left to produce is not preempted any more.

    ``draft_tokens_max`` bounds what is guessed for a sequence that is alone (core.lookup; 0: nothing is). 15
    and the token before them are computed in the time of six to eight single steps; twice as many gain little
    more, and who arrives would wait for them.
    """

    slots: int = 4
    context_tokens: int = 2048
    cells_total: int = 4 * 2048
    prefill_tokens: int = 256
    mixed_tokens: int = 48
    queue_max: int = 64
    ageing_s: float = 10.0
    reuse_prefixes: bool = True
    reuse_tokens_min: int = 16
    cuttable: bool = True
    parked_cells: int = 0
    stored_cells: int = 0
    store_tokens_min: int = 256
    restore_tokens_min: int = 64
    preempt_tokens_min: int = 8
    draft_tokens_max: int = 15

    def validate(self) -> None:
        """Raise ConfigError for the first combination that cannot work."""
        for name, low in _LOWEST.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}", field=name)
        if self.context_tokens < 8:
            raise ConfigError(
                f"context_tokens must be at least 8, not {self.context_tokens}", field="context_tokens"
            )
        if not self.context_tokens <= self.cells_total <= self.slots * self.context_tokens:
            raise ConfigError(
                f"cells_total must be between context_tokens ({self.context_tokens}) and slots times "
                f"context_tokens ({self.slots * self.context_tokens}), not {self.cells_total}",
                field="cells_total",
            )
        if self.mixed_tokens <= self.slots:
            raise ConfigError(
                f"mixed_tokens must exceed slots ({self.slots}), or prefill would never get a turn; "
                f"it is {self.mixed_tokens}",
                field="mixed_tokens",
            )
        if self.ageing_s <= 0:
            raise ConfigError(f"ageing_s must be positive, not {self.ageing_s}", field="ageing_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One generation as the batcher sees it.

    ``resume_token_ids`` were delivered before: they follow the prompt and count towards ``tokens_max``.
    ``deadline`` is a time on the clock that is handed to ``plan``; None for never. Only work of one
    ``adapter`` shares prefixes.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    tokens_max: int
    resume_token_ids: tuple[int, ...] = ()
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    deadline: float | None = None
    adapter: str = ""

    @property
    def cells(self) -> int:
        """KV cells that this work needs at most (the last sampled token is never computed)."""
        return len(self.prompt_token_ids) + self.tokens_max - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Before a step: ``slot`` must hold the first ``keep_tokens`` tokens of slot ``source`` and no others;
    of the fetched ``state`` where one is named."""

    slot: int
    source: int
    keep_tokens: int
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Before the places of a step: take the state of ``slot`` out, which holds ``token_ids``; say ``saved``
    when it is written under ``name``."""

    name: str
    slot: int
    adapter: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Compute ``token_ids`` in ``slot`` from ``position``; sample one token after the last if ``sample``.

    ``draft`` may follow: it is computed too, and a token is drawn after each of them as long as they are what
    is drawn. Of those that are not, nothing stays in the slot."""

    id: str
    slot: int
    position: int
    token_ids: tuple[int, ...]
    sample: bool
    draft: tuple[int, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether this is the next token of a generation, and not part of its prompt."""
        return self.position > 0 and len(self.token_ids) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: ``places`` in order, then all ``slices`` at once. ``expired`` ids passed their deadline.

    Before that, and also where there are no slices, the saved states: forget ``drops``, take out ``save``,
    load ``fetch`` (say ``fetched`` when it is there)."""

    expired: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    save: Save | None = None
    fetch: str = ""
    places: tuple[Place, ...] = ()
    slices: tuple[Slice, ...] = ()

    @property
    def tokens(self) -> int:
        """All that is computed, drafts included."""
        return sum(len(s.token_ids) + len(s.draft) for s in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the host drew for one slice: a token, before it those of the draft that were drawn as well.
    ``stop``: the generation ends with the last."""

    id: str
    token_ids: tuple[int, ...]
    stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """New tokens of one generation; ``finish`` is set where they are the last."""

    id: str
    token_ids: tuple[int, ...]
    first_token_index: int
    finish: FinishReason | None = None
    usage: Usage | None = None
