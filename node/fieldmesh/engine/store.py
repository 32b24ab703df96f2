"""The saved states of one engine: files in a folder, or in memory where there is no folder.

Owns: one buffer through which every state passes, one thread that writes, reads and verifies beside the
steps, what is on the disk and how much of it. Must not: know the model, or decide what is worth keeping.

A file gets its name when it is whole. What an earlier process left is taken over; what is torn, or was made
under other conditions, is removed. Files with names of another form are nobody's business here.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fieldmesh.core.errors import FieldmeshError, StateRefused
from fieldmesh.engine.memory import advise
from fieldmesh.engine.states import (
    BLOCK_BYTES,
    PREFIX_BYTES,
    Head,
    StateHeader,
    blocks,
    demand_digest,
    demand_fingerprint,
    head_bytes,
    sealed,
    unpacked,
)

FILES_MAX = 512
"""Above what any budget of bytes is for; without a folder each is an open file."""
_MADV_POPULATE_WRITE = 23
_NAME = re.compile(r"[0-9a-f]{32}\.state(\.part)?")


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer that ended, well where ``error`` is None."""

    kind: str
    name: str = ""
    header: StateHeader | None = None
    size: int = 0
    error: FieldmeshError | None = None


class StateStore:
    """States under ``bytes_max`` bytes. ``wake`` is called by the thread when something finished; without a
    thread (``inline``) everything is done at once, as a simulation needs it."""

    def __init__(
        self,
        fingerprint: str,
        *,
        bytes_max: int,
        buffer_bytes: int,
        folder: Path | None = None,
        wake: Callable[[], None] = lambda: None,
        inline: bool = False,
    ) -> None:
        self.fingerprint = fingerprint
        self.bytes_max = bytes_max
        self.bytes = 0
        self._folder = folder
        self._wake = wake
        self._thread = None if inline else ThreadPoolExecutor(1, thread_name_prefix="states")
        self._memory = mmap.mmap(-1, max(buffer_bytes, mmap.PAGESIZE))
        self._view = memoryview(self._memory)
        self._warm_bytes = 0
        self._loaded_bytes = 0
        self._sizes: dict[str, int] = {}
        self._fds: dict[str, int] = {}
        self.beside_streams = False
        self._finished: deque[Finished] = deque()  # bounded: one transfer at a time

    # --- the buffer -------------------------------------------------------------------------

    def buffer(self, size: int) -> memoryview | None:
        """Where a state of ``size`` bytes is put before ``save`` or ``export``; None if it is too large."""
        return self._view[:size] if size <= len(self._view) else None

    @property
    def loaded(self) -> memoryview:
        """The state that was fetched last."""
        return self._view[: self._loaded_bytes]

    def warm(self, size: int) -> None:
        """Touch memory for a state of ``size`` beside the steps: fresh pages cost thirty times the copy."""
        size = min(size, len(self._view))
        if size > self._warm_bytes:
            start, self._warm_bytes = self._warm_bytes, size
            self._run(lambda: self._touch(start, size))

    def _touch(self, start: int, end: int) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for offset in range(start - start % mmap.PAGESIZE, end, BLOCK_BYTES):
            length = min(BLOCK_BYTES, len(self._view) - offset)
            # Changes no byte, so that a state may arrive meanwhile; before Linux 5.14 it does nothing.
            advise(base + offset, length, _MADV_POPULATE_WRITE)

    # --- transfers --------------------------------------------------------------------------

    def save(self, name: str, header: StateHeader) -> None:
        """Write what is in the buffer."""
        self._start("save", lambda: self._write(name, header), name)

    def fetch(self, name: str) -> None:
        """Read a state into the buffer, and verify it."""
        self._start("fetch", lambda: self._read(name), name)

    def export(self, fd: int, header: StateHeader) -> None:
        """Write what is in the buffer, and what goes before it, into an open file."""
        self._start("export", lambda: self._copy_out(fd, header))

    def import_(self, fd: int, size: int, name_of: Callable[[StateHeader], str]) -> None:
        """Verify the envelope in an open file and keep its state."""
        self._start("import", lambda: self._take_in(fd, size, name_of))

    def drop(self, name: str) -> None:
        """Forget a state."""
        self._run(lambda: self._remove(name))

    def finished(self) -> list[Finished]:
        """Transfers that ended since the last call."""
        ended = []
        while self._finished:
            ended.append(self._finished.popleft())
        return ended

    def close(self) -> None:
        """End the thread after what it is doing."""
        if self._thread is not None:
            self._thread.shutdown()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _run(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            work()
        else:
            self._thread.submit(work)

    def _start(self, kind: str, work: Callable[[], Finished], name: str = "") -> None:
        def whole() -> None:
            try:
                done = work()
            except FieldmeshError as error:
                done = Finished(kind, name, error=error)
            except (OSError, ValueError) as error:
                done = Finished(kind, name, error=StateRefused(f"a state could not be moved: {error}"))
            self._finished.append(done)
            self._wake()

        self._run(whole)

    # --- in the thread ----------------------------------------------------------------------

    def _beside(self) -> bool:
        return self.beside_streams

    def _write(self, name: str, header: StateHeader) -> Finished:
        state = self._view[: header.state_bytes]
        before = sealed(header, state, self._beside)
        size = len(before) + len(state)
        if self.bytes + size > self.bytes_max or len(self._sizes) >= FILES_MAX:
            raise StateRefused("there is no room for another saved state")
        if self._folder is None:
            fd = os.memfd_create("state")
            self._fds[name] = fd
            _write_all(fd, before, state, self._beside)
        else:
            part = self._folder / f"{name}.state.part"
            try:
                fd = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
                with contextlib.closing(_Fd(fd)):
                    _write_all(fd, before, state, self._beside)
                part.rename(self._folder / f"{name}.state")
            except OSError:
                part.unlink(missing_ok=True)
                raise
        self._sizes[name] = size
        self.bytes += size
        return Finished("save", name, header, size)

    def _read(self, name: str) -> Finished:
        if name not in self._sizes:
            raise StateRefused(f"there is no saved state {name}")
        if self._folder is None:
            return Finished("fetch", name, self._verified(self._fds[name], self._sizes[name]))
        path = self._folder / f"{name}.state"
        fd = os.open(path, os.O_RDONLY)
        with contextlib.closing(_Fd(fd)):
            header = self._verified(fd, os.fstat(fd).st_size)
        os.utime(path)  # the order in which a restart finds them
        return Finished("fetch", name, header)

    def _verified(self, fd: int, size: int) -> StateHeader:
        head = self._head(fd, size)
        header = head.header
        state = self.buffer(header.state_bytes)
        if state is None:
            raise StateRefused(f"a state of {header.state_bytes} bytes does not fit this engine")
        _read_all(fd, state, head.start, self._beside)
        demand_digest(head, state, self._beside)
        self._loaded_bytes = header.state_bytes
        return header

    def _head(self, fd: int, size: int) -> Head:
        length = head_bytes(os.pread(fd, PREFIX_BYTES, 0))
        head = unpacked(os.pread(fd, length, 0), size)
        demand_fingerprint(head.header, self.fingerprint)
        return head

    def _copy_out(self, fd: int, header: StateHeader) -> Finished:
        state = self._view[: header.state_bytes]
        before = sealed(header, state, self._beside)
        _write_all(fd, before, state, self._beside)
        return Finished("export", header=header, size=len(before) + len(state))

    def _take_in(self, fd: int, size: int, name_of: Callable[[StateHeader], str]) -> Finished:
        header = self._verified(fd, size)
        name = name_of(header)
        if name not in self._sizes:
            self._write(name, header)
        return Finished("import", name, header)

    def _remove(self, name: str) -> None:
        self.bytes -= self._sizes.pop(name, 0)
        if self._folder is None:
            if (fd := self._fds.pop(name, None)) is not None:
                os.close(fd)
        else:
            with contextlib.suppress(OSError):
                (self._folder / f"{name}.state").unlink(missing_ok=True)

    # --- what was left ----------------------------------------------------------------------

    def take_over(self) -> list[tuple[str, StateHeader]]:
        """What an earlier process left in the folder, the least recently used first."""
        if self._folder is None:
            return []
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        left = [p for p in self._folder.iterdir() if _NAME.fullmatch(p.name)]
        found: list[tuple[str, StateHeader]] = []
        for path in sorted(left, key=lambda p: p.stat().st_mtime_ns):
            try:
                if path.suffix == ".part":
                    raise StateRefused("it was never finished")
                fd = os.open(path, os.O_RDONLY)
                with contextlib.closing(_Fd(fd)):
                    size = os.fstat(fd).st_size
                    found.append((path.stem, self._head(fd, size).header))
                self._sizes[path.stem] = size
                self.bytes += size
            except (StateRefused, OSError):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        return found


class _Fd:
    """A file descriptor to be closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


def _write_all(fd: int, before: bytes, state: memoryview, beside_streams: Callable[[], bool]) -> None:
    """Write both from the beginning."""
    offset = 0
    for block in chain((memoryview(before),), blocks(state, beside_streams)):
        while len(block):
            count = os.pwrite(fd, block, offset)
            block, offset = block[count:], offset + count


def _read_all(fd: int, into: memoryview, offset: int, beside_streams: Callable[[], bool]) -> None:
    for block in blocks(into, beside_streams):
        while len(block):
            count = os.preadv(fd, [block], offset)
            if not count:
                raise StateRefused("the state is cut short")
            block, offset = block[count:], offset + count
