"""The real engine: a child process behind the port.

Owns: starting, watching, restarting and ending the process; its state; translating its loss into errors.
Must not: compute anything, or import llama.cpp.

    start ──> LOADING ──ready──> READY ──exit, stuck──> LOST ──backoff──> LOADING
                 └──────refused (a bad file), or too many crashes──────> FAILED
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque

from fieldmesh.core.errors import EngineNotReady, FieldmeshError, Internal
from fieldmesh.core.model import EngineState
from fieldmesh.engine.fingerprint import stamp
from fieldmesh.engine.frames import (
    LENGTH_BYTES,
    Command,
    Configure,
    Done,
    Ping,
    Ready,
    Report,
    decode_reports,
    encode,
    frame_length,
)
from fieldmesh.engine.front import EngineFront
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings

STDERR_BYTES_MAX = 4096
LOADING_CRASHES_MAX = 5
"""Crashes in a row before a model was ever there: it is likely to be the file, and the next try would be the
same. One that the kernel kills for memory does not count: there may be more of it later."""
WAITING = {"GOMP_SPINCOUNT": "300"}
"""How long llama.cpp's threads spin for each other before they sleep (some microseconds; a user's own setting
comes first). By default they spin for milliseconds: where something else wants a core, the one that is waited
for does not run meanwhile, at each of a step's hundreds of meetings."""
WATCHDOG_TICKS = 4
"""Pings within ``watchdog_s``. Silence is counted in ticks, not read from a clock: a host that was itself
frozen counts one tick, however long it slept."""


class EngineProcess(EngineFront):
    """One model in a process of its own. Implements ``engine.port.Engine``."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first: asyncio.Future[EngineInfo] | None = None
        self._crashes: deque[float] = deque(maxlen=settings.crashes_max)
        self._loading_crashes = 0
        self._frames = 0
        self._fingerprints: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"EngineProcess({self.state.value}, pid={self.pid}, jobs={len(self._streams)})"

    # --- the port ---------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Load the model. Raises ModelFileInvalid, ConfigError, EngineNotReady (too many crashes)."""
        if self._supervisor is not None:
            raise Internal("an engine is started once")
        self._first = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return await self._first

    async def close(self) -> None:
        """End the process and free everything; running jobs end with EngineLost."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor
        self._lose(EngineState.LOST, "the engine was closed")
        self._exchange.close()
        if self._first is not None and not self._first.done():
            self._first.set_exception(EngineNotReady("the engine was closed while it was loading"))

    # --- the process ------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep one process running until told otherwise, refused, or it crashed too often."""
        assert self._first is not None
        while True:
            self._watch.set_state(EngineState.LOADING)
            try:
                reason = await self._run_process()
            except (Internal, OSError) as error:
                reason = str(error)
            except FieldmeshError as refused:
                self._give_up(refused)
                return
            except Exception as defect:  # noqa: BLE001 - an engine without supervisor would look ready for ever
                reason = f"a defect in talking to the engine: {defect!r}"
            now = time.monotonic()
            self._crashes.append(now)
            recent = sum(now - t < self.settings.crash_window_s for t in self._crashes)
            if recent >= self.settings.crashes_max or self._loading_crashes >= LOADING_CRASHES_MAX:
                done = "generation finished" if self._loading_crashes < recent else "load succeeded"
                self._give_up(
                    EngineNotReady(f"the engine was given up after {recent} crashes and no {done}: {reason}")
                )
                return
            self._lose(EngineState.LOST, reason)
            delay = self.settings.restart_backoff_s * 2 ** (recent - 1)
            await asyncio.sleep(min(delay, self.settings.restart_backoff_max_s))
            self.tally.restarts += 1

    def _give_up(self, error: FieldmeshError) -> None:
        self._lose(EngineState.FAILED, error.message)
        assert self._first is not None
        if not self._first.done():
            self._first.set_exception(error)

    async def _run_process(self) -> str:
        """One process from spawn to end; returns why it ended. Raises the error with which it refused to
        load, Internal where it talks nonsense, OSError where it cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fieldmesh.engine", "--fd", str(theirs.fileno()),
                "--parent", str(os.getpid()), "--exchange", str(self._exchange.fd),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, pass_fds=(theirs.fileno(), self._exchange.fd),
                env={**WAITING, **os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self._process, self.pid = process, process.pid
        watchdog = asyncio.create_task(self._kill_when_stuck(process), name="engine-watchdog")
        stderr = asyncio.create_task(_tail(process.stderr), name="engine-stderr")
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._send(Configure(self.settings, self._known_fingerprint()))
            await self._read_reports(reader)
            status = await process.wait()
            self._loading_crashes += self.state is EngineState.LOADING and status != -signal.SIGKILL
            said = (await stderr).strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return f"the engine's process ended ({how})" + (f": {said[-1]}" if said else "")
        finally:
            watchdog.cancel()
            if self._writer is None:
                ours.close()
            else:
                self._writer.transport.abort()  # what is unsent has no reader any more
            self._writer = None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            stderr.cancel()
            self._process = self.pid = None

    async def _read_reports(self, reader: asyncio.StreamReader) -> None:
        """Take reports until the process is gone."""
        try:
            while True:
                length = frame_length(await reader.readexactly(LENGTH_BYTES))
                reports = decode_reports(await reader.readexactly(length))
                self._frames += 1
                for report in reports:
                    self._take(report)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def _kill_when_stuck(self, process: asyncio.subprocess.Process) -> None:
        """Ping; kill a process that says nothing, or computes nothing though somebody waits for it. Loading
        has its own, longer, limit."""
        settings, silent_s = self.settings, 0.0
        seen: tuple[bool, int] | None = None
        tick_s = settings.watchdog_s / WATCHDOG_TICKS
        while True:
            await asyncio.sleep(tick_s)
            load = self.load()
            steps_due = bool(load.running or load.queued) and self._streams.wanted
            life = steps_due, self.steps if steps_due else self._frames
            silent_s = 0.0 if life != seen else silent_s + tick_s
            seen = life
            ready = self.state is EngineState.READY
            if silent_s >= (settings.watchdog_s if ready else settings.load_timeout_s):
                process.kill()
                return
            if ready:
                self._send(Ping())

    def _take(self, report: Report) -> None:
        super()._take(report)
        if isinstance(report, Done):
            self._crashes.clear()
        elif isinstance(report, Ready):
            self._take_ready(report.info)

    def _take_ready(self, info: EngineInfo) -> None:
        with contextlib.suppress(OSError):
            self._fingerprints = {stamp(self.settings): info.fingerprint}
        self._loading_crashes = 0
        assert self._first is not None
        if not self._first.done():
            self._first.set_result(info)

    def _known_fingerprint(self) -> str:
        try:
            return self._fingerprints.get(stamp(self.settings), self.fingerprint_hint)
        except OSError:
            return ""

    def _now(self) -> float:
        return time.monotonic()

    def _send(self, command: Command) -> None:
        if self._writer is not None:
            self._writer.write(encode([command]))


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """The last words on a stream that ends."""
    assert stream is not None
    kept = b""
    while data := await stream.read(STDERR_BYTES_MAX):
        kept = (kept + data)[-STDERR_BYTES_MAX:]
    return kept.decode("utf-8", errors="replace")
