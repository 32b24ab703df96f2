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
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import assert_never

from fieldmesh.core.errors import Cancelled, EngineLost, EngineNotReady, FieldmeshError, Internal, QueueFull
from fieldmesh.core.model import EngineState, Load, Prompt
from fieldmesh.engine.checks import check_job, check_prompt
from fieldmesh.engine.frames import (
    LENGTH_BYTES,
    Accepted,
    Command,
    Configure,
    Done,
    Failed,
    Loading,
    Ping,
    Ready,
    Report,
    Statistics,
    Tokenize,
    Tokenized,
    Tokens,
    decode_reports,
    encode,
    frame_length,
    rebuilt,
)
from fieldmesh.engine.loads import LoadWatch
from fieldmesh.engine.port import EngineInfo, Job, JobEvent
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.streams import Streams

TOKENIZE_WAITING_MAX = 64
STDERR_BYTES_MAX = 4096
WATCHDOG_TICKS = 4
"""A process is stuck when it said nothing for this many pings. Ticks, not time: a host that was itself
frozen counts one tick, however long it slept."""


class EngineProcess:
    """One model in a process of its own. Implements ``engine.port.Engine``."""

    def __init__(self, settings: EngineSettings) -> None:
        settings.validate()
        self.settings = settings
        self.info: EngineInfo | None = None
        self.last_loss = ""
        self.steps = 0
        self._streams = Streams(
            self._send,
            jobs_max=settings.slots + settings.queue_max,
            stream_tokens_max=settings.stream_tokens_max,
            slow_reader_timeout_s=settings.slow_reader_timeout_s,
        )
        self._watch = LoadWatch(settings)
        self._tokenizing: dict[int, asyncio.Future[tuple[int, ...]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first: asyncio.Future[EngineInfo] | None = None
        self._crashes: deque[float] = deque(maxlen=settings.crashes_max)
        self._frames = 0
        self._fingerprints: dict[tuple[str, int, int], str] = {}

    def __repr__(self) -> str:
        return f"EngineProcess({self.state.value}, pid={self.pid}, jobs={len(self._streams)})"

    # --- the port ---------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        return self._watch.state

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        """Load the model. Raises ModelFileInvalid, ConfigError, EngineNotReady (too many crashes)."""
        if self._supervisor is not None:
            raise Internal("an engine is started once")
        self._first = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return await self._first

    async def submit(self, job: Job) -> AsyncIterator[JobEvent]:
        """Run one job; see the port."""
        check_job(job)
        self._demand_ready()
        deadline = None if job.deadline_s is None else time.monotonic() + job.deadline_s
        events = self._streams.run(job, deadline)
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield event

    def abort(self, generation_id: str) -> bool:
        """End a running job from outside: its iterator raises Cancelled. False if it is not here."""
        return self._streams.abort(generation_id, Cancelled("the generation was aborted"))

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt (messages pass through the chat template first)."""
        check_prompt(prompt)
        self._demand_ready()
        if len(self._tokenizing) >= TOKENIZE_WAITING_MAX:
            raise QueueFull("too many prompts wait for the tokenizer; ask again later", retry_after_s=1.0)
        key = self._streams.next_key()
        future = self._tokenizing[key] = asyncio.get_running_loop().create_future()
        try:
            self._send(Tokenize(key, prompt))
            token_ids: tuple[int, ...] = await future
            return token_ids
        finally:
            del self._tokenizing[key]

    def load(self) -> Load:
        """The latest statistics; never blocks."""
        return self._watch.load

    async def wait_load_changed(self) -> Load:
        """Return when state, queue, or pressure differ from what the last call returned."""
        return await self._watch.wait_changed()

    async def close(self) -> None:
        """End the process and free everything; running jobs end with EngineLost."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor
        self._lose(EngineState.LOST, "the engine was closed")
        if self._first is not None and not self._first.done():
            self._first.set_exception(EngineNotReady("the engine was closed while it was loading"))

    def _demand_ready(self) -> None:
        if self.state is EngineState.READY:
            return
        if self.state is EngineState.FAILED:
            raise EngineNotReady(f"the engine was given up: {self.last_loss}")
        raise EngineNotReady(f"the engine is {self.state.value}; ask again shortly", retry_after_s=0.5)

    # --- the process ------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep one process running until told otherwise, refused, or it crashed too often."""
        assert self._first is not None
        while True:
            self._watch.set_state(EngineState.LOADING)
            try:
                reason = await self._run_process()
            except FieldmeshError as refused:
                self._lose(EngineState.FAILED, refused.message)
                if not self._first.done():
                    self._first.set_exception(refused)
                return
            now = time.monotonic()
            self._crashes.append(now)
            recent = sum(now - t < self.settings.crash_window_s for t in self._crashes)
            if recent >= self.settings.crashes_max:
                reason = f"{reason}; {recent} crashes without a finished generation between them"
                self._lose(EngineState.FAILED, reason)
                if not self._first.done():
                    self._first.set_exception(EngineNotReady(f"the engine was given up: {reason}"))
                return
            self._lose(EngineState.LOST, reason)
            delay = self.settings.restart_backoff_s * 2 ** (recent - 1)
            await asyncio.sleep(min(delay, self.settings.restart_backoff_max_s))

    async def _run_process(self) -> str:
        """One process from spawn to end; returns why it ended. Raises where it refused to load."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fieldmesh.engine", "--fd", str(theirs.fileno()),
                "--parent", str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, pass_fds=(theirs.fileno(),),
                env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self._process = process
        reader, self._writer = await asyncio.open_connection(sock=ours)
        watchdog = asyncio.create_task(self._kill_when_stuck(process), name="engine-watchdog")
        stderr = asyncio.create_task(_tail(process.stderr), name="engine-stderr")
        try:
            self._send(Configure(self.settings, self._known_fingerprint()))
            await self._read_reports(reader)
            status = await process.wait()
            said = (await stderr).strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return f"the engine's process ended ({how})" + (f": {said[-1]}" if said else "")
        finally:
            watchdog.cancel()
            self._writer.close()
            self._writer = None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            stderr.cancel()
            self._process = None

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
        """Ping; kill a process that says nothing. Loading has its own, longer, limit."""
        seen, silent = -1, 0
        while True:
            limit_s = (
                self.settings.watchdog_s if self.state is EngineState.READY else self.settings.load_timeout_s
            )
            await asyncio.sleep(limit_s / WATCHDOG_TICKS)
            silent = 0 if self._frames != seen else silent + 1
            seen = self._frames
            if silent >= WATCHDOG_TICKS:
                process.kill()
                return
            self._send(Ping())

    def _take(self, report: Report) -> None:
        match report:
            case Accepted() | Tokens():
                self._streams.take(report)
            case Done():
                self._crashes.clear()
                self._streams.take(report)
            case Statistics():
                self.steps = report.steps
                self._watch.set_statistics(report.load)
            case Tokenized():
                if (future := self._tokenizing.get(report.key)) and not future.done():
                    future.set_result(report.token_ids)
            case Failed():
                self._take_failure(report)
            case Ready():
                self._take_ready(report.info)
            case Loading():
                pass  # a sign of life: counted as a frame
            case _:
                assert_never(report)

    def _take_failure(self, report: Failed) -> None:
        if report.key == 0:
            raise rebuilt(report)
        if future := self._tokenizing.get(report.key):
            if not future.done():
                future.set_exception(rebuilt(report))
            return
        self._streams.take(report)

    def _take_ready(self, info: EngineInfo) -> None:
        self.info = info
        if identity := _file_identity(self.settings.model_path):
            self._fingerprints = {identity: info.fingerprint}
        self._watch.set_state(EngineState.READY)
        assert self._first is not None
        if not self._first.done():
            self._first.set_result(info)

    def _known_fingerprint(self) -> str:
        identity = _file_identity(self.settings.model_path)
        return self._fingerprints.get(identity, "") if identity else ""

    def _lose(self, state: EngineState, reason: str) -> None:
        self.last_loss = reason
        self._watch.set_state(state)
        self._streams.fail_all(lambda: EngineLost(f"{reason}; the generation can be asked for again"))
        for future in self._tokenizing.values():
            if not future.done():
                future.set_exception(EngineLost(reason))

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


def _file_identity(path: str) -> tuple[str, int, int] | None:
    """What changes when a file's content does, short of reading it."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return path, status.st_size, status.st_mtime_ns
