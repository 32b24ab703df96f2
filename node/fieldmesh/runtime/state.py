"""The node's state folder. Owns: its lock, its format version, durable writes, the incarnation.

Every file is written whole: a temporary file, fsync, rename, fsync of the folder. So a reader finds the
old content or the new one, never a part, whenever the power goes. Must not: know what the values mean.

The incarnation of a start is ``max(stored + 1, seconds since 1970)``, and is durable before anyone hears
it. Counting alone would repeat incarnations after the file was lost or an old copy of the folder was put
back, and peers would then ignore the node as its own ghost; the clock alone fails on a box without a
battery. Together they go wrong only where both fail at once; then the mesh core meets its own id with a
higher incarnation, and rises above it with ``Persist("incarnation")``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from fieldmesh.core.errors import StateFolderInUse, StateFolderInvalid, StateUnwritable
from fieldmesh.runtime import log

FORMAT_VERSION = 1
VALUE_BYTES_MAX = 8 * 1024 * 1024
KEYS_MAX = 256
INCARNATION_KEY = "incarnation"
INCARNATION_MAX = 2**53
"""Larger values are taken for damage: they would leave no room to rise."""

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CHECKSUM_BYTES = 32
_OWN_FILES = frozenset({"lock", "format", "format.new", "values", "key.pem", "lost+found"})
_TEMPORARY_SUFFIX = ".new"


class StateFolder:
    """An open, locked state folder. One process holds it at a time; ``close`` lets it go.

    All methods block on the disk; ``read`` and ``write`` may be called from any one thread at a time.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._values = path / "values"
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Create or take over the folder at ``path``.

        Raises StateFolderInUse (another process holds it), StateFolderInvalid (not a folder of ours, newer
        than this program, or open to others), StateUnwritable.
        """
        with _unwritable(path, "be created"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _unwritable(path, "be read"):
            _check_ours(path)
        _make_private(path)
        lock_fd = _lock(path)
        try:
            folder = cls(path, lock_fd)
            with _unwritable(path, "be written"):
                if not (path / "format").exists():
                    write_durably(path / "format", f"{FORMAT_VERSION}\n".encode())
                folder._values.mkdir(mode=0o700, exist_ok=True)
                for left_over in path.glob(f"**/*{_TEMPORARY_SUFFIX}"):
                    left_over.unlink()
        except BaseException:
            os.close(lock_fd)
            raise
        return folder

    def close(self) -> None:
        """Let the folder go. Harmless when repeated."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, key: str) -> bytes | None:
        """The value last made durable under ``key``; None where there is none, or it is damaged (logged)."""
        file = self._file(key)
        try:
            with file.open("rb") as opened:
                content = opened.read(_CHECKSUM_BYTES + VALUE_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.get().warning("state_value_unreadable", key=key, why=error.strerror)
            return None
        checksum, value = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if len(value) > VALUE_BYTES_MAX or hashlib.sha256(value).digest() != checksum:
            log.get().warning("state_value_damaged", key=key, bytes=len(content))
            return None
        return value

    def write(self, key: str, value: bytes) -> None:
        """Make ``value`` durable under ``key`` before returning.

        Raises ValueError for a key or size that no caller should use, StateUnwritable where the disk
        refuses; the old value stays then.
        """
        target = self._file(key)
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(
                f"a value of {len(value)} bytes under {key!r}; at most {VALUE_BYTES_MAX} are kept"
            )
        if not target.exists() and len(list(self._values.iterdir())) >= KEYS_MAX:
            raise ValueError(f"{key!r} would be one key more than {KEYS_MAX}")
        with _unwritable(self.path, f"take {len(value)} bytes under {key!r}"):
            write_durably(target, hashlib.sha256(value).digest() + value)

    def raise_incarnation(self, clock_s: Callable[[], float] = time.time) -> int:
        """The incarnation of this start: higher than that of every start before, and durable.

        ``clock_s`` gives seconds since 1970. Raises StateUnwritable: a node must not start with an
        incarnation that the next start might use again.
        """
        incarnation = max(_parse_incarnation(self.read(INCARNATION_KEY)) + 1, int(clock_s()))
        self.write(INCARNATION_KEY, str(incarnation).encode())
        return incarnation

    def _file(self, key: str) -> Path:
        if not _KEY.fullmatch(key) or key.endswith(_TEMPORARY_SUFFIX):
            raise ValueError(f"{key!r} is no key: 1 to 64 characters of [a-z0-9._-], not ending in .new")
        return self._values / key


def write_durably(target: Path, content: bytes) -> None:
    """Replace the content of ``target`` (mode 0600) so that a crash leaves the old one or the new one."""
    temporary = target.with_name(target.name + _TEMPORARY_SUFFIX)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder_fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def _parse_incarnation(stored: bytes | None) -> int:
    if stored is None or not re.fullmatch(rb"[0-9]{1,16}", stored):
        return 0
    incarnation = int(stored)
    return incarnation if incarnation < INCARNATION_MAX else 0


def _make_private(path: Path) -> None:
    """Take away what others may do here; a folder that strangers can write is refused."""
    with contextlib.suppress(PermissionError):  # a mounted volume may belong to somebody else
        path.chmod(0o700)
    if path.stat().st_mode & stat.S_IWOTH:
        raise StateFolderInvalid(
            f"everyone can write to the state folder {path}; make it yours with mode 0700",
            field="node.state_folder",
        )


def _lock(path: Path) -> int:
    """Lock the folder for this process; the lock goes with the process, however it ends."""
    with _unwritable(path, "be locked"):
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise StateFolderInUse(
            f"the state folder {path} is in use by process {holder or 'unknown'}; "
            "stop it, or give this node a folder of its own with --state-folder",
            field="node.state_folder",
            metadata={"pid": holder},
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise StateFolderInvalid(
            f"the state folder {path} cannot be locked ({error.strerror}); use a local file system",
            field="node.state_folder",
        ) from error
    with _unwritable(path, "be written"):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _check_ours(path: Path) -> None:
    """Refuse what is no state folder of this version or an older one, before anything in it is changed."""
    file = path / "format"
    try:
        written = file.read_bytes()[:32].strip()
    except FileNotFoundError:
        names = sorted(entry.name for entry in path.iterdir())
        if strange := [name for name in names if name not in _OWN_FILES]:
            raise StateFolderInvalid(
                f"{path} holds {strange[0]!r} and is no state folder; name an empty folder or a new one",
                field="node.state_folder",
            ) from None
        if "key.pem" in names:
            raise StateFolderInvalid(
                f"the state folder {path} lost its file 'format'; put it back, or name another folder",
                field="node.state_folder",
            ) from None
        return
    if not re.fullmatch(rb"[0-9]{1,9}", written):
        raise StateFolderInvalid(f"{file} is damaged: it should hold a number", field="node.state_folder")
    if int(written) > FORMAT_VERSION:
        raise StateFolderInvalid(
            f"the state folder {path} was written by a newer Fieldmesh (format {int(written)}, "
            f"this one knows {FORMAT_VERSION}); upgrade this node or name another folder",
            field="node.state_folder",
        )


@contextlib.contextmanager
def _unwritable(path: Path, what: str) -> Iterator[None]:
    """Translate what the disk says into StateUnwritable, or StateFolderInvalid where no disk can help."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise StateFolderInvalid(
            f"{path} is not a folder; name another one", field="node.state_folder"
        ) from error
    except OSError as error:
        remedy = (
            "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its owner and disk"
        )
        raise StateUnwritable(
            f"the state folder {path} cannot {what} ({error.strerror}); {remedy}", field="node.state_folder"
        ) from error
