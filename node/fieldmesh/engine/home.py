"""The process that all engines over one model's file live in: its weights are in memory once.

Owns: starting it for the first engine, handing it a channel for each, ending it with the last. Must not:
watch it, restart it or know what is said: that is the host's, for each engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

STDERR_BYTES_MAX = 4096
WAITING = {"GOMP_SPINCOUNT": "300"}
"""How long llama.cpp's threads spin for each other before they sleep (some microseconds; a user's own setting
comes first). By default they spin for milliseconds: where something else wants a core, the one that is waited
for does not run meanwhile, at each of a step's hundreds of meetings."""


@dataclass(slots=True)
class Running:
    """One process. ``engines`` counts those with a channel to it; ``said`` is what it writes on stderr."""

    process: asyncio.subprocess.Process
    door: socket.socket
    said: asyncio.Task[str]
    engines: int = 0

    async def ended(self) -> str:
        """Why the process is gone; returns when it is."""
        status = await self.process.wait()
        said = (await asyncio.shield(self.said)).strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if status == -signal.SIGILL:
            how += ": llama.cpp was built for another processor, build it on this one with make install"
        return f"the engine's process ended ({how})" + (f": {said[-1]}" if said else "")

    def kill(self) -> None:
        """End it at once, with all engines in it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Home:
    """Where the engines over one file are. Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: Running | None = None
        self._turn = asyncio.Lock()

    async def enter(self, exchange_fd: int) -> tuple[Running, asyncio.StreamReader, asyncio.StreamWriter]:
        """A channel for one more engine, in a new process where there is none. Raises OSError."""
        async with self._turn:
            if self._running is None or self._running.process.returncode is not None:
                self._running = await _start()
            running = self._running
            running.engines += 1
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(running.door, [b"+"], [theirs.fileno(), exchange_fd])
            return running, *await asyncio.open_connection(sock=ours)
        except BaseException:  # it has just died, or the engine is closed before it begins
            ours.close()
            await self.leave(running, _nothing)
            raise

    async def leave(self, running: Running, goodbye: Callable[[], Awaitable[None]]) -> None:
        """One engine less: the last one ends the process. Where others stay, ``goodbye`` waits until its
        memory is back."""
        running.engines -= 1
        if running.engines:
            await goodbye()
            return
        if self._running is running:
            self._running = None
        running.door.close()
        running.kill()
        await running.process.wait()
        running.said.cancel()


async def _nothing() -> None:
    pass


async def _start() -> Running:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fieldmesh.engine",
            "--fd", str(theirs.fileno()), "--parent", str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, pass_fds=(theirs.fileno(),),
            env={**WAITING, **os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    return Running(process, ours, asyncio.create_task(_tail(process.stderr), name="engine-stderr"))


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """The last words on a stream that ends."""
    assert stream is not None
    kept = b""
    while data := await stream.read(STDERR_BYTES_MAX):
        kept = (kept + data)[-STDERR_BYTES_MAX:]
    return kept.decode("utf-8", errors="replace")
