"""States between a host and its engine's process, through memory that both have.

Owns: the shared memory (an anonymous file: it is gone with the last of the two processes, however they end),
one transfer at a time. Must not: look into a state beyond its header.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fieldmesh.core.errors import StateRefused
from fieldmesh.engine.frames import Command, Export, Exported, Import
from fieldmesh.engine.states import Envelope, SequenceState, blocks, room, unpacked

_Result = TypeVar("_Result")


class Exchange:
    """The host's side. ``asked`` sends a command under a key of its own and returns the report on it;
    ``running`` says how many streams there are, which a transfer should not be felt by."""

    def __init__(
        self,
        asked: Callable[[Callable[[int], Command]], Awaitable[Any]],
        *,
        bytes_max: int,
        running: Callable[[], int],
    ) -> None:
        self._asked = asked
        self._running = running
        self._bytes_max = bytes_max
        self._fd = -1
        self._turn = asyncio.Lock()

    @property
    def fd(self) -> int:
        """The shared memory, to be inherited by the engine's process."""
        if self._fd < 0:
            self._fd = os.memfd_create("exchange")
        return self._fd

    async def export(self, generation: int) -> SequenceState:
        """The state of the job with this key."""
        return await self._undisturbed(self._export(generation))

    async def import_(self, state: SequenceState) -> None:
        """Hand a state to the engine."""
        if len(state.envelope) > self._bytes_max:
            raise StateRefused(
                f"the state has {len(state.envelope)} bytes; this engine keeps {self._bytes_max} in all"
            )
        await self._undisturbed(self._import(state.envelope))

    def _empty(self) -> None:
        if self._fd >= 0:  # it may have been closed meanwhile
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Give the memory back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _undisturbed(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Finish what was begun even if the caller leaves: the memory must not have two users."""
        task = asyncio.create_task(work, name="state-exchange")
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # a caller who left asks no more
        return await asyncio.shield(task)

    async def _export(self, generation: int) -> SequenceState:
        async with self._turn:
            try:
                answer: Exported = await self._asked(lambda key: Export(key, generation))
                envelope = await asyncio.to_thread(_read, self.fd, answer.size, lambda: self._running() > 1)
            finally:
                self._empty()
        return SequenceState(unpacked(envelope, len(envelope)).header, envelope)

    async def _import(self, envelope: Envelope) -> None:
        async with self._turn:
            try:
                await asyncio.to_thread(_write, self.fd, envelope, lambda: self._running() > 0)
                await self._asked(lambda key: Import(key, len(envelope)))
            finally:
                self._empty()


def _read(fd: int, size: int, beside_streams: Callable[[], bool]) -> Envelope:
    data, start = room(size), 0
    for block in blocks(memoryview(data), beside_streams):
        start += os.preadv(fd, [block], start)
    return data


def _write(fd: int, data: Envelope, beside_streams: Callable[[], bool]) -> None:
    start = 0
    for block in blocks(memoryview(data), beside_streams):
        start += os.pwrite(fd, block, start)
