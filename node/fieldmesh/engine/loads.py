"""The load that an engine reports, and when it is worth reporting. Owns: state, statistics, their waiters."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fieldmesh.core.model import EngineState, Load
from fieldmesh.engine.settings import EngineSettings


class LoadWatch:
    """The latest Load of one engine. An engine that is not ready never looks idle: it reports its state."""

    def __init__(self, settings: EngineSettings) -> None:
        self._empty = Load(
            slots=settings.slots,
            queue_max=settings.queue_max,
            kv_cells_total=settings.slots * settings.context_tokens,
        )
        self.load = self._empty
        self._told: tuple[object, ...] = ()
        self._changed = asyncio.Event()

    @property
    def state(self) -> EngineState:
        return self.load.engine

    def set_state(self, state: EngineState) -> None:
        """The engine changed state; its numbers start from nothing."""
        self._set(replace(self._empty, engine=state))

    def set_statistics(self, load: Load) -> None:
        """New numbers from a running engine."""
        if load.engine is self.state:
            self._set(load)

    def _set(self, load: Load) -> None:
        self.load = load
        if _worth_telling(load) != self._told:
            self._changed.set()

    async def wait_changed(self) -> Load:
        """Return when the load differs, in what routing looks at, from what was returned last."""
        while _worth_telling(self.load) == self._told:
            self._changed.clear()
            await self._changed.wait()
        self._told = _worth_telling(self.load)
        return self.load


def _worth_telling(load: Load) -> tuple[object, ...]:
    """State, counts, tenths of KV pressure: not every token's change of the pending work."""
    return load.engine, load.running, load.queued, load.draining, int(load.kv_pressure * 10)
