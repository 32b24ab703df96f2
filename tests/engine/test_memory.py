"""Goal: no model is loaded into memory that is not there. Method: made-up /proc and /sys trees."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from fieldmesh.engine.memory import give_back_file, memory_free_bytes

MIB = 1 << 20


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n")
    return tmp_path


def test_without_a_limit_the_box_decides(root: Path) -> None:
    assert memory_free_bytes(root) == 2048 * MIB


def test_a_v2_limit_leaves_what_is_not_used_and_what_can_be_dropped(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/a/b\n")
    write(root, "sys/fs/cgroup/a/memory.max", str(1000 * MIB))
    write(root, "sys/fs/cgroup/a/memory.current", str(300 * MIB))
    write(root, "sys/fs/cgroup/a/memory.stat", f"anon 5\ninactive_file {100 * MIB}\n")
    write(root, "sys/fs/cgroup/a/b/memory.max", "max")
    write(root, "sys/fs/cgroup/a/b/memory.current", str(300 * MIB))
    assert memory_free_bytes(root) == 800 * MIB


def test_a_v1_limit_counts_too(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:memory:/a\n")
    write(root, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", str(500 * MIB))
    write(root, "sys/fs/cgroup/memory/a/memory.usage_in_bytes", str(200 * MIB))
    assert memory_free_bytes(root) == 300 * MIB


def test_a_limit_that_is_exceeded_leaves_nothing(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", "10")
    write(root, "sys/fs/cgroup/memory.current", "20")
    assert memory_free_bytes(root) == 0


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path) -> None:
    assert memory_free_bytes(tmp_path) > 1 << 60


# --- a mapped file -----------------------------------------------------------------------


def mapped_kib(path: Path) -> int:
    """How much of a file is in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(found.split()[1]) for found in lines if found.startswith("Rss:"))
    raise AssertionError(f"{path} is not mapped")


def test_a_file_that_was_read_is_given_back_and_still_there(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "a model.gguf"
    path.write_bytes(b"weights!" * (MIB // 8))
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert bytes(mapped).count(b"weights!") == MIB // 8
        assert mapped_kib(path) == MIB >> 10
        give_back_file(str(link))
        assert mapped_kib(path) == 0
        assert mapped[-8:] == b"weights!"
