"""The real engine: a child process behind the port.

Owns: having the process started, watched, restarted and ended; its state; translating its loss into errors.
Must not: compute anything, or import llama.cpp.

    start ──> LOADING ──ready──> READY ──exit, stuck──> LOST ──backoff──> LOADING
                 └──────refused (a bad file), or too many crashes──────> FAILED
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable

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
from fieldmesh.engine.home import Home, Running
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings

LEFT_OVER_BYTES = 1 << 16
LOADING_CRASHES_MAX = 5
"""Crashes in a row before a model was ever there: it is likely to be the file, and the next try would be the
same. One that the kernel kills for memory does not count: there may be more of it later."""
WATCHDOG_TICKS = 4
"""Pings within ``watchdog_s``. Silence is counted in ticks, not read from a clock: a host that was itself
frozen counts one tick, however long it slept."""


def sharing() -> Callable[[EngineSettings], EngineProcess]:
    """What makes the engines of one node: those over one file share a process, and so its weights."""
    homes: dict[tuple[str, int], Home] = {}

    def make(settings: EngineSettings) -> EngineProcess:
        home = homes.setdefault((settings.model_path, settings.n_gpu_layers), Home())
        return EngineProcess(settings, home)

    return make


class EngineProcess(EngineFront):
    """One engine in a process of its own, or with others in the one of ``home``. Implements
    ``engine.port.Engine``."""

    def __init__(self, settings: EngineSettings, home: Home | None = None) -> None:
        super().__init__(settings)
        self._home = home or Home()
        self._writer: asyncio.StreamWriter | None = None
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
        running, reader, writer = await self._home.enter(self._exchange.fd)
        self.pid, self._writer = running.process.pid, writer
        watchdog = asyncio.create_task(self._kill_when_stuck(running), name="engine-watchdog")
        try:
            self._send(Configure(self.settings, self._known_fingerprint()))
            await self._read_reports(reader)
            why = await running.ended()
            killed = running.process.returncode == -signal.SIGKILL
            self._loading_crashes += self.state is EngineState.LOADING and not killed
            return why
        finally:
            watchdog.cancel()
            self._writer = None
            await self._home.leave(running, lambda: self._goodbye(running, reader, writer))
            writer.transport.abort()  # what is unsent has no reader any more
            self.pid = None

    async def _goodbye(
        self, running: Running, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Return when the process, in which others live on, has given back what this engine had."""

        async def given_back() -> None:
            writer.write_eof()
            while await reader.read(LEFT_OVER_BYTES):
                pass

        try:
            # Not asyncio.timeout: while the task is being cancelled, that is of no use in Python 3.11.2.
            await asyncio.wait_for(given_back(), self.settings.watchdog_s)
        except TimeoutError:  # a process that is stuck is of no use to the others either
            running.kill()
        except OSError:  # it is gone
            pass

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

    async def _kill_when_stuck(self, running: Running) -> None:
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
                running.kill()
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
