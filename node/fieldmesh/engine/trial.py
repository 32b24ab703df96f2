"""A process in which a constraint may do its worst: ``python -m fieldmesh.engine.trial``.

Owns: bounds that only a process has (its memory, its time, its stack), on both sides of the pipe. Must not:
serve anything but this question. It is started with the first constraint and again after each that ended it.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

from fieldmesh.core.errors import ConstraintInvalid
from fieldmesh.core.model import Constraint
from fieldmesh.engine.frames import FRAME_BYTES_MAX, LENGTH_BYTES
from fieldmesh.engine.grammars import MASK_CPU_S_MAX, Matcher, Vocabulary, compiled, too_costly

CPU_S_MAX = 2
WALL_S_MAX = 10
"""Ends what computes nothing and does not answer; on a busy box an honest trial waits for its turn."""
MEMORY_BYTES_MAX = 128 << 20
STACK_BYTES = 4 << 20
WALK_TOKENS = 16
START_TIMEOUT_S = 30.0
VOCABULARY_BYTES_MAX = 256 << 20


class Verdict(msgspec.Struct, frozen=True):
    """``refusal`` is empty where the constraint is bearable."""

    refusal: str = ""


class Trial:
    """The engine's side: one process, asked one constraint at a time. Blocks; for a thread of its own."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = msgspec.msgpack.encode(vocabulary)
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, constraint: Constraint) -> None:
        """Return where it can be compiled at a bearable cost. Raises ConstraintInvalid."""
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            _write(process.stdin, msgspec.msgpack.encode(constraint))
            verdict = msgspec.msgpack.decode(_answer(process, WALL_S_MAX + 1.0), type=Verdict)
        except (OSError, EOFError):  # it was ended by its bounds, or overflowed its stack
            self.close()
            raise too_costly(constraint) from None
        if verdict.refusal:
            raise ConstraintInvalid(verdict.refusal, field=constraint.field)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "fieldmesh.engine.trial"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None
        _write(process.stdin, self._vocabulary)
        msgspec.msgpack.decode(_answer(process, START_TIMEOUT_S), type=Verdict)
        return process


def _answer(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        raise EOFError
    return _read(process.stdout, FRAME_BYTES_MAX)


def _write(pipe: IO[bytes], body: bytes) -> None:
    pipe.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    pipe.flush()


def _read(pipe: IO[bytes], bytes_max: int) -> bytes:
    length = int.from_bytes(pipe.read(LENGTH_BYTES), "big")
    body = pipe.read(length) if 0 < length <= bytes_max else b""
    if not body or len(body) < length:
        raise EOFError
    return body


# --- the process ---------------------------------------------------------------------------------


def main() -> None:
    """Read a vocabulary, then judge constraints until the pipe closes (EOFError)."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = msgspec.msgpack.decode(_read(requests, VOCABULARY_BYTES_MAX), type=Vocabulary).tokenizer()
    _write(answers, msgspec.msgpack.encode(Verdict()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = _memory_bytes() + MEMORY_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while True:
        constraint = msgspec.msgpack.decode(_read(requests, FRAME_BYTES_MAX), type=Constraint)
        # Both end the process wherever it is, and also when nobody waits any more.
        signal.setitimer(signal.ITIMER_PROF, CPU_S_MAX)
        signal.alarm(WALL_S_MAX)
        verdict = Verdict()
        try:
            _walk(Matcher(compiled(tokenizer, constraint), constraint), constraint)
        except ConstraintInvalid as error:
            verdict = Verdict(refusal=error.message)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        _write(answers, msgspec.msgpack.encode(verdict))


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _walk(matcher: Matcher, constraint: Constraint) -> None:
    """Some tokens' way into it: what is cheap to compile may be dear to follow."""
    for step in range(WALK_TOKENS):
        started = time.thread_time()
        possible = matcher.allowed().nonzero()[0]
        if not possible.size:
            return
        matcher.take(int(possible[(step * 7919) % possible.size]))
        if time.thread_time() - started > MASK_CPU_S_MAX:
            raise too_costly(constraint)
        if matcher.ended:
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which then closes the pipe
    threading.stack_size(STACK_BYTES)
    judging = threading.Thread(target=main, daemon=True)
    judging.start()
    judging.join()
