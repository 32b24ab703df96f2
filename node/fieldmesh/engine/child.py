"""The engine's process: a socket to the host, a model, and the loop between them.

Owns: process setup (dies with its host, first to be killed for memory, deaf to Ctrl-C), reading commands
between steps, one frame of reports a step. Must not: decide anything about generations.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.fingerprint import fingerprint
from fieldmesh.engine.frames import (
    LENGTH_BYTES,
    Command,
    Configure,
    Loading,
    Ready,
    Report,
    decode_commands,
    encode,
    failed,
    frame_length,
)
from fieldmesh.engine.gguf import GgufHeader, read_header
from fieldmesh.engine.loop import EngineLoop
from fieldmesh.engine.measuring import Tuning
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.engine.states import fingerprint_of

if TYPE_CHECKING:
    from fieldmesh.engine.grammars import Grammars
    from fieldmesh.engine.llama import LlamaModel

READ_SHARE = 0.8
"""Of loading, where something is measured afterwards."""
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 18


def main(fd: int, parent_pid: int, exchange_fd: int) -> int:
    """Serve the host on the inherited socket ``fd`` until it closes, with states passing through
    ``exchange_fd``. Returns the exit status."""
    _prepare_process(parent_pid)
    channel = _Channel(socket.socket(fileno=fd))
    configure = next(channel.commands(None), None)
    if not isinstance(configure, Configure):
        return 2 if configure else 0
    try:
        loop, info, grammars = _load(configure, channel, exchange_fd)
    except FieldmeshError as error:
        channel.send([failed(0, error)])
        return 3
    channel.send([Ready(info), loop.statistics()])
    _serve(channel, loop)
    grammars.close()
    loop.close()
    return 0


def _serve(channel: _Channel, loop: EngineLoop) -> None:
    """Take commands, plan, run, send: until the host is gone."""
    busy = False
    while not channel.closed:
        wait_s: float | None = 0.0
        if not busy:
            wait_s = None if loop.deadline is None else max(0.0, loop.deadline - time.monotonic())
        reports: list[Report] = []
        for command in channel.commands(wait_s):
            reports += loop.handle(command, time.monotonic())
        reports += loop.collect(time.monotonic())
        plan, expired = loop.plan(time.monotonic())
        reports += expired
        if reports:  # what was refused or accepted need not wait for a step
            channel.send(reports)
        streams = bool(plan.slices)
        if streams:
            channel.send(loop.run(plan, time.monotonic))
        if loop.embeddings and (done := loop.embed(time.monotonic(), beside_streams=streams)):
            channel.send(done)
        busy = streams or bool(loop.embeddings)


def _load(
    configure: Configure, channel: _Channel, exchange_fd: int
) -> tuple[EngineLoop, EngineInfo, Grammars]:
    settings = configure.settings
    settings.validate()
    header = read_header(settings.model_path)
    check_adapters(settings, header)
    known = configure.fingerprint or fingerprint(settings, lambda: channel.send([Loading(0.0)]))
    from fieldmesh.engine.grammars import Grammars  # a damaged file is told without loading the libraries
    from fieldmesh.engine.llama import LIBRARY_VERSION, LlamaModel
    from fieldmesh.engine.trial import Trial

    tuning = Tuning(settings, {"file": known, "library": LIBRARY_VERSION})
    kept = tuning.recall()
    to_measure = bool(settings.measured) and kept is None
    read_share = READ_SHARE if to_measure else 1.0
    model = LlamaModel(
        tuning.applied(kept.choice) if kept else settings,
        lambda share: channel.send([Loading(read_share * share)]),
    )
    if to_measure:
        kept = tuning.measure(
            model,
            time.monotonic,
            time.process_time,
            lambda share: channel.send([Loading(read_share + (1 - read_share) * share)]),
        )
    if kept is not None:
        settings = tuning.applied(kept.choice)
    grammars = Grammars(model.vocabulary, Trial, channel.wake)
    loop = EngineLoop(settings, model, new_seed=lambda: secrets.randbits(32), grammars=grammars)
    loop.warm_up(time.monotonic)
    info = _info(settings, header, known, model, loop, kept.words if kept else "")
    if settings.state_bytes_max:
        facts = model.state_facts() | {"file": known}
        loop.keep_states(model, facts, exchange_fd, wake=channel.wake)
        info = replace(info, state_fingerprint=fingerprint_of(facts))
    return loop, info, grammars


def _info(
    settings: EngineSettings,
    header: GgufHeader,
    fingerprint: str,
    model: LlamaModel,
    loop: EngineLoop,
    measured: str,
) -> EngineInfo:
    return EngineInfo(
        model=settings.model_name or header.name or Path(settings.model_path).stem,
        fingerprint=fingerprint,
        architecture=header.architecture,
        parameters=model.parameters,
        context_tokens=settings.context_tokens,
        slots=settings.slots,
        vocabulary_tokens=model.vocabulary_tokens,
        threads=settings.threads,
        chat_template=loop.has_chat_template,
        prefill_tokens=settings.prefill_tokens,
        mixed_tokens=settings.mixed_tokens,
        measured=measured,
        settings={
            "flash_attention": str(settings.flash_attention).lower(),
            "state_bytes_max": str(settings.state_bytes_max),
            "kv_type": settings.kv_type,
            "reuse_prefixes": str(loop.batcher.config.reuse_prefixes).lower(),
            "n_gpu_layers": str(settings.n_gpu_layers),
            "adapters": ", ".join(Path(adapter.path).stem for adapter in settings.adapters) or "none",
        },
    )


class _Channel:
    """The socket to the host: commands as they come, reports as frames."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.closed = False

    def wake(self) -> None:
        """End a wait for commands; for another thread."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._waker.send(b"w")

    def send(self, reports: list[Report]) -> None:
        """Blocks while the host does not read: then there is no use in computing more."""
        try:
            self._socket.sendall(encode(reports))
        except OSError:
            self.closed = True

    def commands(self, wait_s: float | None) -> Iterator[Command]:
        """Commands that are there now; waits up to ``wait_s`` for the first (None: until one comes)."""
        while not self.closed:
            while (body := self._frame()) is not None:
                yield from decode_commands(body)
                wait_s = 0.0
            ready = select.select([self._socket, self._woken], [], [], wait_s)[0]
            if self._woken in ready:
                self._woken.recv(_READ_BYTES)
            if self._socket not in ready:
                return
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        self._buffer += data
        self.closed = not data

    def _frame(self) -> bytes | None:
        if len(self._buffer) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + frame_length(bytes(self._buffer[:LENGTH_BYTES]))
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]
        return body


def _prepare_process(parent_pid: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which then closes the socket
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before prctl
        sys.exit(0)
    # The kernel takes the engine first for memory: the node without it is still a member of its mesh.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
