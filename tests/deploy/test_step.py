"""What a person sees of an installation step, and what is left of it when it is interrupted.

Goal: failures are shown, not swallowed. Method: the real program, run as make runs it, around small commands.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = [sys.executable, str(ROOT / "deploy" / "setup" / "step.py")]
LIMIT_S = 20


def step(log: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*STEP, "baking", "--usual", "an hour", "--log", str(log), "--", *command],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_a_step_that_succeeds_is_one_line_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    done = step(tmp_path / "log", "echo", "all the crumbs")
    assert done.returncode == 0
    assert "✓ baking" in done.stdout
    assert "crumbs" not in done.stdout
    assert (tmp_path / "log").read_text() == "all the crumbs\n"


def test_a_step_that_fails_shows_its_last_words_and_keeps_its_exit_code(tmp_path: Path) -> None:
    done = step(tmp_path / "log", "sh", "-c", "echo the oven is cold >&2; exit 7")
    assert done.returncode == 7
    assert "✗ baking" in done.stderr
    assert "the oven is cold" in done.stderr
    assert str(tmp_path / "log") in done.stderr


def test_a_command_that_does_not_exist_is_said_so(tmp_path: Path) -> None:
    done = step(tmp_path / "log", "no-such-oven")
    assert done.returncode == 127
    assert "no-such-oven" in done.stderr


def test_a_step_without_a_command_is_refused(tmp_path: Path) -> None:
    assert step(tmp_path / "log").returncode == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_step_ends_everything_that_it_started(tmp_path: Path, sent: signal.Signals) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The grandchild holds the pipe open for as long as it lives; it says its first word once it runs.
    script = f"sh -c 'echo up; exec tail -f /dev/null' >{pipe} & wait"
    started = subprocess.Popen([*STEP, "baking", "--log", str(tmp_path / "log"), "--", "sh", "-c", script])
    with pipe.open() as output:
        assert output.readline() == "up\n"
        started.send_signal(sent)
        assert started.wait(LIMIT_S) == 130
        assert output.read() == ""  # ends only when the grandchild has


def test_progress_is_read_from_what_the_builder_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from deploy.setup import step as module

    log = tmp_path / "log"
    log.write_text("[1/140] one\n[27/140] c++ -o two\nnoise\n")
    assert module._progress("building", log, 75.0) == "  … building: 27 of 140, 1 min 15 s"
