"""The engine's process: sockets to the host, one model for all that run its file, and the loops between them.

Owns: process setup (dies with its host, first to be killed for memory, deaf to Ctrl-C), who comes and goes,
reading commands between steps, one frame of reports a step. Must not: decide anything about generations.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.fingerprint import fingerprint, stamp
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
from fieldmesh.engine.turns import Seat, Turns

if TYPE_CHECKING:
    from fieldmesh.engine.grammars import Grammars
    from fieldmesh.engine.llama import LlamaModel

READ_SHARE = 0.8
"""Of loading, where something is measured afterwards."""
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 18


def main(fd: int, parent_pid: int) -> int:
    """Serve the engines of the host whose channels come through the inherited socket ``fd``, until it closes.
    Returns the exit status."""
    _prepare_process(parent_pid)
    door, turns = _Door(socket.socket(fileno=fd)), Turns(time.monotonic)
    guests: list[_Guest] = []
    while not door.closed:
        sockets = [door.socket, *(s for guest in guests for s in guest.channel.sockets)]
        ready = select.select(sockets, [], [], turns.wait_s())[0]
        if door.socket in ready:
            guests += door.arrivals()
        for guest in guests:
            guest.listen(ready, turns, guests)
        turns.round()
        for guest in [g for g in guests if g.channel.closed]:
            guests.remove(guest)
            guest.leave(turns)
    return 0


class _Door:
    """The socket on which the host hands over a channel and a shared memory for each engine."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.closed = False

    def arrivals(self) -> list[_Guest]:
        """Who has come."""
        data, fds, _flags, _address = socket.recv_fds(self.socket, 1, 2)
        self.closed = not data
        return [_Guest(_Channel(socket.socket(fileno=fds[0])), fds[1])] if data else []


class _Guest:
    """One engine of the host's: a channel; once it is configured a model, a loop, and a seat."""

    def __init__(self, channel: _Channel, exchange_fd: int) -> None:
        self.channel = channel
        self._exchange_fd = exchange_fd
        self._loaded: _Loaded | None = None
        self._seat: Seat | None = None

    def listen(self, ready: Sequence[socket.socket], turns: Turns, guests: Sequence[_Guest]) -> None:
        """Take what the host says."""
        commands = self.channel.commands(ready)
        if self._seat is None and isinstance(configure := next(commands, None), Configure):
            others = [guest._loaded for guest in guests if guest._loaded is not None]
            try:
                self._loaded = _load(configure, self.channel, self._exchange_fd, others)
            except FieldmeshError as error:
                self.channel.send([failed(0, error)])
                self.channel.closed = True
                return
            self._seat = turns.join(self._loaded.loop, self.channel.send)
            self.channel.send([Ready(self._loaded.info), self._loaded.loop.statistics()])
        if self._seat is not None:
            self._seat.handle(commands, time.monotonic())
            self._seat.called |= self.channel.woken(ready)

    def leave(self, turns: Turns) -> None:
        """Give back what it had; the host sees the channel end when that is done."""
        if self._seat is not None and self._loaded is not None:
            turns.leave(self._seat)
            self._loaded.close()
        os.close(self._exchange_fd)
        self.channel.close()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What serves one engine. Those with equal ``weights`` run the same file."""

    weights: str
    info: EngineInfo
    model: LlamaModel
    loop: EngineLoop
    grammars: Grammars

    def close(self) -> None:
        """Free everything."""
        self.grammars.close()
        self.loop.close()
        self.model.close()


def _load(configure: Configure, channel: _Channel, exchange_fd: int, others: Sequence[_Loaded]) -> _Loaded:
    settings = configure.settings
    settings.validate()
    header = read_header(settings.model_path)
    check_adapters(settings, header)
    known = configure.fingerprint or fingerprint(settings, lambda: channel.send([Loading(0.0)]))
    from fieldmesh.engine.grammars import Grammars  # a damaged file is told without loading the libraries
    from fieldmesh.engine.llama import LIBRARY_VERSION, LlamaModel
    from fieldmesh.engine.trial import Trial

    weights = f"{stamp(replace(settings, adapters=()))} {settings.n_gpu_layers}"
    beside = next((other.model for other in others if other.weights == weights), None)
    tuning = Tuning(settings, {"file": known, "library": LIBRARY_VERSION})
    kept = tuning.recall()
    # Beside others that run, nothing can be measured, and they would wait for it.
    to_measure = bool(settings.measured) and kept is None and not others
    read_share = READ_SHARE if to_measure else 1.0
    model = LlamaModel(
        tuning.applied(kept.choice) if kept else settings,
        lambda share: channel.send([Loading(read_share * share)]),
        beside,
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
    try:
        loop = EngineLoop(settings, model, new_seed=lambda: secrets.randbits(32), grammars=grammars)
        loop.warm_up(time.monotonic)
        info = _info(settings, header, known, model, loop, kept.words if kept else "")
        if settings.state_bytes_max:
            facts = model.state_facts() | {"file": known}
            loop.keep_states(model, facts, exchange_fd, wake=channel.wake)
            info = replace(info, state_fingerprint=fingerprint_of(facts))
    except FieldmeshError:
        model.close()
        raise
    return _Loaded(weights, info, model, loop, grammars)


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
    """The socket to one engine's host side: commands as they come, reports as frames."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.closed = False

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """What to wait for."""
        return self._socket, self._woken

    def wake(self) -> None:
        """End a wait for commands; for another thread."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._waker.send(b"w")

    def woken(self, ready: Sequence[socket.socket]) -> bool:
        """Whether another thread has something for the loop."""
        return self._woken in ready and bool(self._woken.recv(_READ_BYTES))

    def send(self, reports: list[Report]) -> None:
        """Blocks while the host does not read: then there is no use in computing more."""
        try:
            self._socket.sendall(encode(reports))
        except OSError:
            self.closed = True

    def commands(self, ready: Sequence[socket.socket]) -> Iterator[Command]:
        """Commands that are there now."""
        if self._socket in ready:
            self._read()
        while (body := self._frame()) is not None:
            yield from decode_commands(body)

    def close(self) -> None:
        """Tell the host that nothing more comes."""
        for each in (self._socket, self._woken, self._waker):
            each.close()

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
