"""States on their way: between slots and the store, and between this engine and others.

Owns: carrying out what a plan orders about saved states, telling the scheduler how it went, exports and
imports. Must not: decide what to save, or wait: what takes time is done by the store's thread, and a step
pays for one copy out of the model's memory at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from fieldmesh.core.batching import Batcher
from fieldmesh.core.errors import GenerationNotFound, Internal, StateRefused
from fieldmesh.core.residency import state_name
from fieldmesh.core.steps import StepPlan
from fieldmesh.engine.frames import Export, Exported, Import, Imported, Report, failed
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import StateHeader, fingerprint_of, packed
from fieldmesh.engine.store import Finished, StateStore

FOREIGN_WAITING_MAX = 8


class States(Protocol):
    """What moving needs of a model."""

    def state_bytes(self, slot: int) -> int:
        """Size of a slot's state."""
        ...

    def save_state(self, slot: int, into: memoryview) -> None:
        """Copy a slot's state out."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A running generation: where it is, and what its header says besides the state's size."""

    slot: int
    header: StateHeader


class Moves:
    """One engine's transfers. ``snapshot`` finds a running generation by its key; ``exchange_fd`` is the
    memory that this process shares with its host."""

    def __init__(
        self,
        batcher: Batcher,
        model: States,
        store: StateStore,
        *,
        cell_bytes: int,
        exchange_fd: int,
        snapshot: Callable[[int], Snapshot | None],
    ) -> None:
        self._batcher = batcher
        self._cache = batcher.cache
        self._model = model
        self._store = store
        self._cell_bytes = max(1, cell_bytes)
        self._exchange_fd = exchange_fd
        self._snapshot = snapshot
        self._foreign: deque[Export | Import] = deque()
        self._moving: Export | Import | None = None
        self._cache.stored.cells_max = store.bytes_max // self._cell_bytes
        for name, header in store.take_over():
            tokens = header.token_ids[: header.computed]
            if name != state_name(header.adapter, tokens) or not self._cache.adopt(header.adapter, tokens):
                store.drop(name)

    @property
    def loaded(self) -> memoryview:
        """The state that a place of the plan may name."""
        return self._store.loaded

    def ask(self, command: Export | Import) -> list[Report]:
        """Queue a transfer between engines."""
        if len(self._foreign) >= FOREIGN_WAITING_MAX:
            return [failed(command.key, StateRefused("too many states are being moved; ask again later"))]
        self._foreign.append(command)
        return []

    def advance(self) -> list[Report]:
        """Before a plan: take in what finished, begin what was asked for."""
        reports: list[Report] = []
        for done in self._store.finished():
            reports += self._end(done)
        while self._foreign and self._cache.claim():
            self._moving = self._foreign.popleft()
            reports += self._begin(self._moving)
        return reports

    def carry_out(self, plan: StepPlan) -> None:
        """What a plan orders, before its places."""
        others = len(plan.slices) - (1 if isinstance(self._moving, Export) else 0)  # it waits for itself
        self._store.beside_streams = others > 0
        for name in plan.drops:
            self._store.drop(name)
        if (save := plan.save) is not None:
            size = self._copy_out(save.slot)
            if not size:
                self._cache.saved(save.name, ok=False)
            else:
                header = StateHeader(
                    fingerprint=self._store.fingerprint,
                    adapter=save.adapter,
                    tokens=packed(save.token_ids),
                    computed=len(save.token_ids),
                    state_bytes=size,
                )
                self._store.save(save.name, header)
        if plan.fetch:
            self._store.fetch(plan.fetch)
        if plan.slices:
            longest = max(s.position + len(s.token_ids) for s in plan.slices)
            self._store.warm(longest * self._cell_bytes)

    def close(self) -> None:
        """End the store's thread."""
        self._store.close()

    def _copy_out(self, slot: int) -> int:
        """Put a slot's state into the store's buffer; its size, 0 where it is too large."""
        size = self._model.state_bytes(slot)
        buffer = self._store.buffer(size)
        if buffer is None:
            return 0
        try:
            self._model.save_state(slot, buffer)
        except Internal:
            return 0
        return size

    def _begin(self, command: Export | Import) -> list[Report]:
        if isinstance(command, Import):
            for name in self._cache.clear(command.size // self._cell_bytes + 1):
                self._store.drop(name)
            self._store.import_(
                self._exchange_fd,
                command.size,
                lambda header: state_name(header.adapter, header.token_ids[: header.computed]),
            )
            return []
        found = self._snapshot(command.generation)
        size = self._copy_out(found.slot) if found is not None else 0
        if found is None or not size:
            self._moving = None
            self._cache.unclaim()
            error = GenerationNotFound("this generation is not running here, or has computed nothing yet")
            return [failed(command.key, error)]
        header = replace(found.header, fingerprint=self._store.fingerprint, state_bytes=size)
        self._store.export(self._exchange_fd, header)
        return []

    def _end(self, done: Finished) -> list[Report]:
        ok = done.error is None
        match done.kind:
            case "save":
                self._cache.saved(done.name, ok=ok)
                return []
            case "fetch":
                self._cache.fetched(done.name, ok=ok)
                return []
        command, self._moving = self._moving, None
        assert command is not None
        self._cache.unclaim()
        if done.error is not None:
            return [failed(command.key, done.error)]
        if isinstance(command, Export):
            return [Exported(command.key, done.size)]
        assert done.header is not None
        tokens = done.header.token_ids[: done.header.computed]
        if not self._cache.adopt(done.header.adapter, tokens):
            self._store.drop(done.name)
            return [failed(command.key, StateRefused("there is no room for this state"))]
        return [Imported(command.key)]


def make_moves(
    batcher: Batcher,
    model: States,
    settings: EngineSettings,
    facts: dict[str, object],
    cell_bytes: int,
    exchange_fd: int,
    snapshot: Callable[[int], Snapshot | None],
    *,
    wake: Callable[[], None],
    inline: bool = False,
) -> Moves:
    """Transfers with a store as the settings want it. ``facts`` are what a state's bytes depend on, ``wake``
    ends the loop's wait when a transfer did; ``inline`` does without a thread."""
    store = StateStore(
        fingerprint_of(facts),
        bytes_max=settings.state_bytes_max,
        buffer_bytes=min(settings.state_bytes_max, (settings.context_tokens + 1) * cell_bytes),
        folder=Path(settings.state_folder) if settings.state_folder else None,
        wake=wake,
        inline=inline,
    )
    return Moves(batcher, model, store, cell_bytes=cell_bytes, exchange_fd=exchange_fd, snapshot=snapshot)
