"""The settings of one engine as its box wants them: measured at a model's first start there, then kept.

Owns: running and timing the trials, the file in which their result is kept, and when it no longer counts.
Must not: decide (``core.tuning`` does), or know llama.cpp.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from fieldmesh.core.steps import Place, Slice
from fieldmesh.core.tuning import (
    MEASURE_S_MAX,
    Choice,
    Limits,
    Took,
    Trial,
    choose,
    in_words,
    next_trial,
    undisturbed,
)
from fieldmesh.engine.cores import read_text
from fieldmesh.engine.settings import EngineSettings

FILE_BYTES_MAX = 65_536
WORDS_CHARS_MAX = 1000


class Steps(Protocol):
    """What measuring needs of a model."""

    @property
    def vocabulary_tokens(self) -> int: ...

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        ...

    def place(self, places: Sequence[Place], fetched: memoryview | None) -> list[int]:
        """See ``engine.loop.Model``."""
        ...

    def run(self, slices: Sequence[Slice]) -> Mapping[str, int]:
        """See ``engine.loop.Model``."""
        ...


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was chosen, from what, and under which conditions (``key``)."""

    key: str
    choice: Choice
    words: str


@dataclass(frozen=True, slots=True)
class Tuning:
    """The choice for one engine. ``facts`` are what it depends on besides the settings and the processor."""

    settings: EngineSettings
    facts: Mapping[str, object]

    @property
    def limits(self) -> Limits:
        """What may be chosen: what the settings have as values is the most."""
        settings = self.settings
        most = Choice(
            threads=settings.threads,
            prefill_tokens=settings.prefill_tokens,
            mixed_tokens=settings.mixed_tokens,
        )
        return Limits(most=most, open=frozenset(settings.measured), slots=settings.slots)

    def applied(self, choice: Choice) -> EngineSettings:
        """The settings with what was chosen."""
        return replace(
            self.settings,
            threads=choice.threads,
            prefill_tokens=choice.prefill_tokens,
            mixed_tokens=choice.mixed_tokens,
        )

    def recall(self) -> Measured | None:
        """What an earlier start found; None where there is nothing that counts here and now."""
        path = Path(self.settings.measured_file)
        try:
            if not self.settings.measured_file or path.stat().st_size > FILE_BYTES_MAX:
                return None
            found = msgspec.json.decode(path.read_bytes(), type=Measured)
        except (OSError, msgspec.MsgspecError):
            return None
        good = found.key == self.key and self.limits.allows(found.choice)
        return found if good and len(found.words) <= WORDS_CHARS_MAX else None

    def measure(
        self,
        model: Steps,
        clock: Callable[[], float],
        cpu_clock: Callable[[], float],
        on_progress: Callable[[float], None],
    ) -> Measured:
        """Run trials for ``MEASURE_S_MAX`` at most, or one where that takes longer, and keep what follows.

        ``cpu_clock`` counts what all threads compute; ``on_progress`` hears of the share of the time that has
        passed, before every trial."""
        limits, timings = self.limits, dict[Trial, tuple[Took, ...]]()
        on_progress(0.0)
        run_trial(model, Trial(limits.most.threads, 1, 1))  # the first touches every page of the weights
        began = clock()
        while (passed := clock() - began) < MEASURE_S_MAX:
            trial = next_trial(timings, limits, MEASURE_S_MAX - passed)
            if trial is None:
                break
            on_progress(passed / MEASURE_S_MAX)
            timings[trial] = (*timings.get(trial, ()), self._timed(model, trial, clock, cpu_clock))
        choice = choose(timings, limits)
        model.use_threads(choice.threads)
        found = Measured(key=self.key, choice=choice, words=in_words(timings, choice, limits))
        on_progress(1.0)
        if undisturbed(timings):
            self._keep(found)
        return found

    def _timed(
        self, model: Steps, trial: Trial, clock: Callable[[], float], cpu_clock: Callable[[], float]
    ) -> Took:
        began, cpu_began = clock(), cpu_clock()
        run_trial(model, trial)
        wall_s = clock() - began
        # What a graphics card does costs no time of this process.
        own_s = wall_s if self.settings.n_gpu_layers else (cpu_clock() - cpu_began) / trial.threads
        return Took(wall_s, min(wall_s, own_s))

    @property
    def key(self) -> str:
        """Changes with anything that could change the result."""
        settings, limits = self.settings, self.limits
        parts = {
            **self.facts,
            "processor": _processor(),
            "most": [limits.most.threads, limits.most.prefill_tokens, limits.most.mixed_tokens],
            "open": sorted(limits.open),
            "slots": limits.slots,
            "kv": settings.kv_types,
            "flash_attention": settings.flash_attention,
            "gpu": [settings.n_gpu_layers, settings.main_gpu, settings.tensor_split],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _keep(self, found: Measured) -> None:
        """Whole or not at all; where that fails, the next start measures again."""
        if not self.settings.measured_file:
            return
        path = Path(self.settings.measured_file)
        part = path.with_suffix(".part")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.write_bytes(msgspec.json.encode(found))
            part.replace(path)


def run_trial(model: Steps, trial: Trial) -> None:
    """One step as the trial has it, in an otherwise empty cache that is empty afterwards."""
    model.use_threads(trial.threads)
    tokens = tuple(index % model.vocabulary_tokens for index in range(trial.tokens))
    slots = range(trial.sequences)
    model.run([Slice(id=str(slot), slot=slot, position=0, token_ids=tokens, sample=True) for slot in slots])
    model.place([Place(slot=slot, source=slot, keep_tokens=0) for slot in slots], None)


def _processor(root: Path = Path("/")) -> str:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return ""
