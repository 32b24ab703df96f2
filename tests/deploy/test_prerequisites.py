"""What a machine that lacks something is told before anything is installed.

Goal: the line to type is right. Method: the real script, with a PATH that holds only what the machine has.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "setup" / "check-prerequisites.sh"
ALWAYS = ("sh", "env", "id", "sort", "paste", "head", "mktemp", "rm", "tr", "cat")
LIMIT_S = 60
GOOD_PYTHON = 'case "$2" in *ensurepip*) ;; *) echo 3.11.2 ;; esac'


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder that is the whole PATH: coreutils, apt-get, make and compilers that work; no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (*ALWAYS, "make"):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    for name in ("apt-get", "cc", "c++"):
        put(folder, name, "exit 0")
    return folder


def put(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.unlink(missing_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def check(folder: Path, python: str = "python3") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), python],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_a_machine_with_everything_is_told_nothing(machine: Path) -> None:
    put(machine, "python3", GOOD_PYTHON)
    done = check(machine)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_python_names_both_packages(machine: Path) -> None:
    done = check(machine)
    assert done.returncode == 1
    assert "apt-get install -y python3 python3-venv\n" in done.stderr


def test_an_old_python_is_told_of_the_newer_one_beside_it(machine: Path) -> None:
    put(machine, "python3", "echo 3.9.2; exit 1")
    put(machine, "python3.12", "exit 0")
    done = check(machine)
    assert done.returncode == 1
    assert "python3 is Python 3.9.2" in done.stderr
    assert "PYTHON=python3.12" in done.stderr
    assert "apt-get" not in done.stderr


def test_a_python_without_ensurepip_needs_venv(machine: Path) -> None:
    put(machine, "python3", 'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.11.2 ;; esac')
    done = check(machine)
    assert done.returncode == 1
    assert "apt-get install -y python3-venv\n" in done.stderr


@pytest.mark.parametrize(("missing", "package"), [("c++", "g++"), ("cc", "gcc"), ("make", "make")])
def test_each_missing_tool_names_its_package(machine: Path, missing: str, package: str) -> None:
    put(machine, "python3", GOOD_PYTHON)
    (machine / missing).unlink()
    done = check(machine)
    assert done.returncode == 1
    assert f"apt-get install -y {package}\n" in done.stderr


def test_a_compiler_that_cannot_compile_is_quoted(machine: Path) -> None:
    put(machine, "python3", GOOD_PYTHON)
    put(machine, "c++", "echo 'error: unknown value c++17' >&2; exit 1")
    done = check(machine)
    assert done.returncode == 1
    assert "unknown value c++17" in done.stderr
