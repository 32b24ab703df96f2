"""Runs one long command quietly: a line that tells the time, the output in a file, its end shown on failure.

    python3 step.py "building llama.cpp" --usual "3 to 8 minutes" --log FILE -- COMMAND [ARGUMENT...]

Owns how the installation looks to a person: a line that counts on a terminal, a line every half minute
elsewhere. It must not know what the command does, nor need more than the standard library of Python 3.11.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LINE_EVERY_TERMINAL_S = 1.0
LINE_EVERY_ELSEWHERE_S = 30.0
GRACE_S = 5.0  # between asking a stopped command's processes to end and ending them
TAIL_LINES = 40
TAIL_BYTES_MAX = 64 * 1024
_COUNT = re.compile(rb"\[(\d+)/(\d+)\]")  # how ninja says where it is


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES_MAX))
        return file.read()


def _spent(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _progress(what: str, log: Path, seconds: float) -> str:
    counts = _COUNT.findall(_tail(log))
    where = f"{int(counts[-1][0])} of {int(counts[-1][1])}, " if counts else ""
    return f"  … {what}: {where}{_spent(seconds)}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and everything that it started (it leads a process group of its own)."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run(what: str, usual: str, log: Path, command: Sequence[str]) -> int:
    """The command's exit code; 130 when interrupted, 127 when there is no such command."""
    terminal = sys.stdout.isatty()
    pause_s = LINE_EVERY_TERMINAL_S if terminal else LINE_EVERY_ELSEWHERE_S
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  … {what}" + (f" (usually {usual})" if usual else ""), end="" if terminal else "\n", flush=True)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            print(f"\n  ✗ {what}: {error}", file=sys.stderr)
            return 127
        try:
            while True:
                try:
                    code = process.wait(pause_s)
                    break
                except subprocess.TimeoutExpired:
                    line = _progress(what, log, time.monotonic() - begun)
                    print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)
        except KeyboardInterrupt:
            _end(process)
            print(f"\n  ✗ {what}: interrupted", file=sys.stderr)
            return 130
    start = "\r\033[K" if terminal else ""
    if code == 0:
        print(f"{start}  ✓ {what} ({_spent(time.monotonic() - begun)})", flush=True)
        return 0
    print(
        f"{start}  ✗ {what}: failed after {_spent(time.monotonic() - begun)}; its last words:\n",
        file=sys.stderr,
    )
    for line in _tail(log).decode(errors="replace").splitlines()[-TAIL_LINES:]:
        print(f"    {line}", file=sys.stderr)
    print(f"\n    all of it: {log}", file=sys.stderr)
    return code if code > 0 else 128 - code


def main() -> int:
    """Reads the command line; SIGTERM counts as an interruption."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", help="what is being done, for the person who waits")
    parser.add_argument("--usual", default="", help="how long it usually takes")
    parser.add_argument("--log", type=Path, required=True, help="where the command's output goes")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    if not command:
        parser.error("-- and a command are missing")

    def interrupted(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    return run(given.what, given.usual, given.log, command)


if __name__ == "__main__":
    sys.exit(main())
