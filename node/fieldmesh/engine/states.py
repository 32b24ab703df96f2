"""A sequence's state as it leaves its engine: what stands before the bytes, and what is checked before they
are believed.

Owns: the envelope (magic, length, SHA-256 of all that follows, header, state), its bounds and its refusals.
Must not: touch a model or a disk.

The library accepts nearly anything as a state (of 60 with a damaged header it took 14), so nothing reaches
it whose fingerprint or SHA-256 is not the right one. The fingerprint names what the bytes depend on: the
model file, the cache's types, flash attention, RoPE, the library's version of the format; not the CPU.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import msgspec

from fieldmesh.core.errors import StateRefused
from fieldmesh.core.model import Prompt, Sampling
from fieldmesh.engine.port import Job

Envelope: TypeAlias = bytes | bytearray | mmap.mmap

MAGIC = b"FMSTATE1"
HEADER_BYTES_MAX = 16 << 20
_LENGTH_BYTES = 4
_TOKEN_BYTES = 4
_DIGEST_BYTES = 32
BLOCK_BYTES = 1 << 18
REST = 3.0
"""Beside streams, how long is rested after each block, in times of what the block took. With 1, they notice
as much as without; with 3, half as much."""
RESTS_S_MAX = 1.0
"""In all, for who waits for a large state would rather compute it again in the end."""
PREFIX_BYTES = len(MAGIC) + _LENGTH_BYTES + _DIGEST_BYTES


class StateHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a state belongs to. ``tokens`` are little-endian 32-bit ids: all that are known, of which the
    state holds the first ``computed``; the first ``prompt_tokens`` are the prompt.

    ``sampling`` and ``seed`` are those of the generation that was exported (None: of a prefix, nobody's).
    """

    fingerprint: str
    adapter: str
    tokens: bytes
    computed: int
    prompt_tokens: int = 0
    sampling: Sampling | None = None
    seed: int = 0
    state_bytes: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        found = array("I")
        found.frombytes(self.tokens)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """An exported sequence: its envelope, and what the header says."""

    header: StateHeader
    envelope: Envelope

    def job(self, generation_id: str, **more: object) -> Job:
        """The job that goes on where this sequence was, on the engine that imported it or any other."""
        header = self.header
        assert header.sampling is not None, "only a generation can be gone on with"
        tokens = header.token_ids
        made = Job(
            generation_id=generation_id,
            prompt=Prompt(token_ids=tokens[: header.prompt_tokens]),
            sampling=replace(header.sampling, seed=header.seed),
            resume_token_ids=tokens[header.prompt_tokens :],
        )
        return replace(made, **more)  # type: ignore[arg-type]


def room(size: int) -> mmap.mmap:
    """Memory for an envelope. Its pages come as they are written, where a bytearray of 23 MB takes 13 ms."""
    return mmap.mmap(-1, size)


def packed(token_ids: Sequence[int]) -> bytes:
    """Token ids as a header has them."""
    return array("I", token_ids).tobytes()


def fingerprint_of(facts: dict[str, object]) -> str:
    """One name for all that a state's bytes depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def alone() -> bool:
    """No streams run beside it."""
    return False


def sealed(header: StateHeader, state: memoryview, beside_streams: Callable[[], bool] = alone) -> bytes:
    """What goes before the state's bytes. Takes 12 ms for 23 MB, without the GIL."""
    body = msgspec.msgpack.encode(header)
    return MAGIC + len(body).to_bytes(_LENGTH_BYTES, "big") + _digest(body, state, beside_streams) + body


class Head(NamedTuple):
    """The beginning of an envelope; the state's bytes begin at ``start``."""

    header: StateHeader
    start: int
    body: bytes
    digest: bytes


def head_bytes(prefix: Envelope | memoryview) -> int:
    """How long the head is whose first PREFIX_BYTES are given. Raises StateRefused where it is none."""
    if bytes(prefix[: len(MAGIC)]) != MAGIC:
        raise StateRefused("this is no saved state, or one of another version")
    length = int.from_bytes(prefix[len(MAGIC) : len(MAGIC) + _LENGTH_BYTES], "big")
    if length > HEADER_BYTES_MAX:
        raise StateRefused(f"the state's header claims {length} bytes; at most {HEADER_BYTES_MAX} are read")
    return PREFIX_BYTES + length


def unpacked(data: Envelope | memoryview, total_bytes: int) -> Head:
    """The head of an envelope of ``total_bytes`` that begins with ``data``. Raises StateRefused where it is
    none, or its sizes contradict each other."""
    start = head_bytes(data)
    body = bytes(data[PREFIX_BYTES:start])
    try:
        header = msgspec.msgpack.decode(body, type=StateHeader)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StateRefused(f"the state's header cannot be read: {error}") from error
    known = len(header.tokens) // _TOKEN_BYTES
    whole = len(header.tokens) % _TOKEN_BYTES == 0 and start + header.state_bytes == total_bytes
    if not whole or not 0 < header.computed <= known or not 0 <= header.prompt_tokens <= known:
        raise StateRefused("the state is cut short, or its header contradicts itself")
    return Head(header, start, body, bytes(data[PREFIX_BYTES - _DIGEST_BYTES : PREFIX_BYTES]))


def demand_fingerprint(header: StateHeader, fingerprint: str) -> None:
    """Raise StateRefused where a state was made under other conditions than these."""
    if header.fingerprint != fingerprint:
        raise StateRefused(
            "the state was made by another model, or with other settings of its cache; compute the prompt "
            "again instead",
            field="fingerprint",
        )


def demand_digest(head: Head, state: memoryview, beside_streams: Callable[[], bool] = alone) -> None:
    """Raise StateRefused where the bytes are not those that were sealed."""
    if _digest(head.body, state, beside_streams) != head.digest:
        raise StateRefused("the state was damaged on its way: its SHA-256 is another one", field="digest")


def blocks(data: memoryview, beside_streams: Callable[[], bool]) -> Iterator[memoryview]:
    """A state in blocks, with a rest after each while streams run beside it, ``RESTS_S_MAX`` in all."""
    left_s = RESTS_S_MAX
    for start in range(0, len(data), BLOCK_BYTES):
        began = time.perf_counter()
        yield data[start : start + BLOCK_BYTES]
        rest_s = min(left_s, REST * (time.perf_counter() - began)) if beside_streams() else 0.0
        left_s -= rest_s
        time.sleep(rest_s)


def _digest(body: bytes, state: memoryview, beside_streams: Callable[[], bool]) -> bytes:
    digest = hashlib.sha256(body)
    for block in blocks(state, beside_streams):
        digest.update(block)
    return digest.digest()
