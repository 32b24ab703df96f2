"""How much memory this process may still take. Owns: reading what the box has free and what cgroups (v1 and
v2) leave of it, and what another process takes, and giving pages back. Must not: decide what to do with it.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from fieldmesh.engine.cores import own_groups, read_text

_UNKNOWN = 1 << 62
_libc = ctypes.CDLL(None)


def memory_free_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping: the smaller of what is free on the box and what is left of the
    limit of every cgroup above this process; very many where neither is known. ``root`` is where /proc and
    /sys are found. Pages of files that could be dropped count as free."""
    return max(0, min([_box(root), *_cgroups(root)]))


def resident_bytes(pid: int, root: Path = Path("/")) -> int:
    """Bytes of a process that are in memory; 0 where it is gone or this is not Linux."""
    for line in read_text(root / f"proc/{pid}/status").splitlines():
        name, _, rest = line.partition(":")
        if name == "VmRSS" and (words := rest.split()) and words[0].isdigit():
            return int(words[0]) << 10
    return 0


def advise(address: int, length_bytes: int, advice: int) -> None:
    """madvise(2), from a page's beginning; advice that the kernel does not know changes nothing."""
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length_bytes), advice)


def give_back_file(path: str) -> None:
    """Let go of the pages of a mapped file that was read: they count for this process no more, and come back
    from the page cache when they are used."""
    real = str(Path(path).resolve())
    for line in read_text(Path("/proc/self/maps")).splitlines():
        addresses, *_, mapped = line.split(maxsplit=5)
        if mapped == real:
            start, end = (int(address, 16) for address in addresses.split("-"))
            advise(start, end - start, mmap.MADV_DONTNEED)


def _box(root: Path) -> int:
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and (words := rest.split()) and words[0].isdigit():
            return int(words[0]) << 10
    return _UNKNOWN


def _cgroups(root: Path) -> list[int]:
    left: list[int] = []
    for folder in own_groups(root, "memory"):
        for limit_file, used_file, dropped in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = read_text(folder / limit_file).strip(), read_text(folder / used_file).strip()
            if limit.isdigit() and used.isdigit():  # not "max", not absent
                left.append(int(limit) - int(used) + _statistic(folder, dropped))
    return left


def _statistic(folder: Path, name: str) -> int:
    for line in read_text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0
