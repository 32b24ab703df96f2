"""What the programs that test with containers share: commands with a limit, clean ends.

Owns how docker is called. It must not know what is tested, and runs with nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 120.0
OUTPUT_CHARS_SHOWN_MAX = 4000


class CommandFailed(Exception):
    """A command ended with another code than 0, or did not end in time. The message says what it wrote."""


def run(
    *command: str,
    timeout_s: float = COMMAND_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    shown: bool = False,
) -> str:
    """What the command writes to stdout; ``shown`` lets it write to the terminal instead.

    Raises CommandFailed.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=not shown,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{' '.join(command)}: not done after {timeout_s:.0f} s") from error
    except OSError as error:
        raise CommandFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        said = f"{done.stdout or ''}{done.stderr or ''}".strip()[-OUTPUT_CHARS_SHOWN_MAX:]
        raise CommandFailed(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout or ""


def attempt(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str | None:
    """Like ``run``, for what may fail: None then."""
    try:
        return run(*command, timeout_s=timeout_s)
    except CommandFailed:
        return None


def require_engine() -> None:
    """Ends the program with a sentence where no docker engine answers."""
    if attempt("docker", "version", "--format", "{{.Server.Version}}", timeout_s=20) is None:
        sys.exit("no docker engine answers here: install one, or add yourself to the group docker")


def compose_command() -> Sequence[str]:
    """The plugin where it is there, else the program of its own."""
    if attempt("docker", "compose", "version", timeout_s=20) is not None:
        return ("docker", "compose")
    if shutil.which("docker-compose"):
        return ("docker-compose",)
    sys.exit("neither `docker compose` nor `docker-compose` is installed")


@contextmanager
def bounded(limit_s: int, what: str) -> Iterator[None]:
    """Ends the block with TimeoutError after ``limit_s``; SIGTERM ends it as Ctrl-C does."""

    def expired(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"{what}: not done after {limit_s} s")

    def interrupted(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, expired), signal.signal(signal.SIGTERM, interrupted)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])
