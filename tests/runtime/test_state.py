"""The state folder: who may have it, what survives, and that an incarnation never comes twice."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmesh.core.errors import StateFolderInUse, StateFolderInvalid, StateUnwritable
from fieldmesh.runtime import state
from fieldmesh.runtime.state import StateFolder


def test_a_new_folder_and_its_files_are_private(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path / "a" / "node") as folder:
        folder.write("rows", b"x")
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        modes = {stat.S_IMODE(p.stat().st_mode) for p in folder.path.rglob("*") if p.is_file()}
    assert modes == {0o600}


def test_what_was_written_is_read_by_the_next_holder(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path) as folder:
        folder.write("rows", b"one")
        folder.write("rows", b"two")
    with StateFolder.open(tmp_path) as folder:
        assert folder.read("rows") == b"two"
        assert folder.read("other") is None


def test_a_second_holder_is_refused_and_told_the_process_id(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path), pytest.raises(StateFolderInUse) as refusal:
        StateFolder.open(tmp_path)
    assert str(os.getpid()) in refusal.value.message
    StateFolder.open(tmp_path).close()


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from fieldmesh.runtime.state import StateFolder;"
        "folder = StateFolder.open(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateFolderInUse, match=str(holder.pid)):
            StateFolder.open(tmp_path)
        holder.send_signal(signal.SIGKILL)
    StateFolder.open(tmp_path).close()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    StateFolder.open(tmp_path).close()
    (tmp_path / "format").write_text("2\n")
    with pytest.raises(StateFolderInvalid, match="newer Fieldmesh"):
        StateFolder.open(tmp_path)


@pytest.mark.parametrize("written", [b"", b"one", b"-1", b"\xff", b"9" * 40])
def test_a_damaged_format_is_refused(tmp_path: Path, written: bytes) -> None:
    StateFolder.open(tmp_path).close()
    (tmp_path / "format").write_bytes(written)
    with pytest.raises(StateFolderInvalid):
        StateFolder.open(tmp_path)


def test_a_folder_that_is_somebody_elses_is_left_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateFolderInvalid, match=r"thesis\.tex"):
        StateFolder.open(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StateFolderInvalid, match="not a folder"):
            StateFolder.open(path)


def test_a_crash_between_writing_and_renaming_leaves_the_old_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateFolder.open(tmp_path) as folder:
        folder.write("rows", b"old")
        (tmp_path / "values" / "rows.new").write_bytes(b"ne")  # what the crash left behind
    with StateFolder.open(tmp_path) as folder:
        assert folder.read("rows") == b"old"
        assert not (tmp_path / "values" / "rows.new").exists()


def test_a_full_disk_is_a_coded_error_and_the_old_value_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StateFolder.open(tmp_path) as folder:
        folder.write("rows", b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StateUnwritable, match="free some space"):
            folder.write("rows", b"new")
        monkeypatch.undo()
        assert folder.read("rows") == b"old"
        assert [entry.name for entry in (tmp_path / "values").iterdir()] == ["rows"]


def test_a_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        synced.append("rename")
        return real_replace(self, target)

    with StateFolder.open(tmp_path) as folder:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replace)
        folder.write("rows", b"x")
    assert synced == ["file", "rename", "folder"]


@settings(max_examples=30)
@given(cut=st.integers(0, 40), flipped=st.integers(0, 40))
def test_a_damaged_value_reads_as_absent(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: int
) -> None:
    path = tmp_path_factory.mktemp("state")
    with StateFolder.open(path) as folder:
        folder.write("rows", b"12345678")
        file = path / "values" / "rows"
        content = bytearray(file.read_bytes())
        if flipped < len(content):
            content[flipped] ^= 1
        damaged = bytes(content[:cut])
        file.write_bytes(damaged)
        intact = cut >= 40 and flipped >= 40
        assert folder.read("rows") == (b"12345678" if intact else None)


@pytest.mark.parametrize("key", ["", "A", "../x", "a/b", ".hidden", "x" * 65, "a.new", "a\0"])
def test_a_key_that_is_no_file_name_is_refused(tmp_path: Path, key: str) -> None:
    with StateFolder.open(tmp_path) as folder, pytest.raises(ValueError, match="is no key"):
        folder.write(key, b"")


def test_values_and_their_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "VALUE_BYTES_MAX", 4)
    monkeypatch.setattr(state, "KEYS_MAX", 2)
    with StateFolder.open(tmp_path) as folder:
        with pytest.raises(ValueError, match="at most 4"):
            folder.write("a", b"12345")
        folder.write("a", b"1234")
        folder.write("b", b"")
        folder.write("a", b"")
        with pytest.raises(ValueError, match="more than 2"):
            folder.write("c", b"")


# --- incarnation ---------------------------------------------------------------------------


def test_every_start_has_a_higher_incarnation_even_within_one_second(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        with StateFolder.open(tmp_path) as folder:
            seen.append(folder.raise_incarnation(lambda: 1_000.0))
    assert seen == [1_000, 1_001, 1_002]


def test_a_clock_that_went_back_does_not_lower_the_incarnation(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path) as folder:
        assert folder.raise_incarnation(lambda: 5_000.0) == 5_000
        assert folder.raise_incarnation(lambda: 0.0) == 5_001


@pytest.mark.parametrize("content", [None, b"", b"torn", b"\x00" * 40])
def test_after_the_file_is_lost_or_torn_the_clock_keeps_the_incarnation_rising(
    tmp_path: Path, content: bytes | None
) -> None:
    with StateFolder.open(tmp_path) as folder:
        before = [folder.raise_incarnation(lambda: 1_000.0) for _ in range(5)]
        file = tmp_path / "values" / "incarnation"
        file.unlink() if content is None else file.write_bytes(content)
        assert folder.raise_incarnation(lambda: 1_060.0) > max(before)


def test_a_value_without_room_to_rise_counts_as_damage(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path) as folder:
        folder.write("incarnation", str(2**53).encode())
        assert folder.raise_incarnation(lambda: 7.0) == 7


def test_a_node_does_not_start_with_an_incarnation_that_is_not_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with StateFolder.open(tmp_path) as folder:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StateUnwritable):
            folder.raise_incarnation()
