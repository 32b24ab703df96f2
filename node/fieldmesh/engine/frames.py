"""What the engine's two processes say to each other, and how it looks on the socket.

Owns: the message structs, framing (4 bytes big-endian length, then one msgpack array of messages), its
bounds. Must not: do anything on a socket beyond cutting frames out of bytes.

A job travels under an integer ``key`` that the host never uses twice: a late message about a cancelled
job can never be taken for one about its successor of the same generation id.
"""

from __future__ import annotations

import msgspec

from fieldmesh.core.errors import FieldmeshError, Internal, by_code
from fieldmesh.core.model import Completion, Load, Logprobs, Prompt, ToolCallPart
from fieldmesh.engine.port import EngineInfo, Job
from fieldmesh.engine.settings import EngineSettings

FRAME_BYTES_MAX = 16 << 20
LENGTH_BYTES = 4


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


# --- host to engine ----------------------------------------------------------------------


class Configure(_Message, frozen=True):
    """First message: what to load. ``fingerprint`` is known from an earlier load, or empty."""

    settings: EngineSettings
    fingerprint: str


class Submit(_Message, frozen=True):
    """Run a job; ``deadline`` is a CLOCK_MONOTONIC time, which both processes share."""

    key: int
    job: Job
    deadline: float | None


class Cancel(_Message, frozen=True):
    """Stop a job; nothing more is said about it."""

    key: int


class Pause(_Message, frozen=True):
    """Compute nothing for a job until ``Resume``."""

    key: int


class Resume(_Message, frozen=True):
    """Undo ``Pause``."""

    key: int


class Tokenize(_Message, frozen=True):
    """Ask for a prompt's token ids."""

    key: int
    prompt: Prompt


class Embed(_Message, frozen=True):
    """Ask for the vectors of texts; ``deadline`` as in ``Submit``."""

    key: int
    texts: tuple[str, ...]
    deadline: float | None


class Export(_Message, frozen=True):
    """Put the state of the running job ``generation`` into the shared memory."""

    key: int
    generation: int


class Import(_Message, frozen=True):
    """Take in the state of ``size`` bytes that is in the shared memory."""

    key: int
    size: int


class Ping(_Message, frozen=True):
    """Ask for ``Statistics``, to see whether the engine still moves."""


Command = Configure | Submit | Cancel | Pause | Resume | Tokenize | Embed | Export | Import | Ping


# --- engine to host ----------------------------------------------------------------------


class Loading(_Message, frozen=True):
    """Sign of life while loading."""

    share: float


class Ready(_Message, frozen=True):
    """The model is loaded."""

    info: EngineInfo


class Failed(_Message, frozen=True):
    """A job, a tokenize request, or (key 0) loading ended with an error."""

    key: int
    code: str
    message: str
    field: str
    retry_after_s: float | None
    metadata: dict[str, str]


class Accepted(_Message, frozen=True):
    """The job's prompt was tokenised and fits."""

    key: int
    prompt_tokens: int


class Tokens(_Message, frozen=True):
    """New tokens of a job; ``text`` may lag behind."""

    key: int
    first_token_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()


class Done(_Message, frozen=True):
    """A job ended well."""

    key: int
    completion: Completion


class Tokenized(_Message, frozen=True):
    """The answer to ``Tokenize``."""

    key: int
    token_ids: tuple[int, ...]


class Exported(_Message, frozen=True):
    """The answer to ``Export``: ``size`` bytes are there."""

    key: int
    size: int


class Imported(_Message, frozen=True):
    """The answer to ``Import``."""

    key: int


class StepTiming(_Message, frozen=True):
    """One step: ``decoded`` sequences got their next token ``interval_s`` after the one before, ``prefilled``
    tokens of prompts were computed, ``sampled`` tokens drawn, all in ``duration_s``."""

    duration_s: float
    interval_s: float
    decoded: int
    prefilled: int
    sampled: int


class Embedded(_Message, frozen=True):
    """The answer to ``Embed``: a vector of length 1 for each text."""

    key: int
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


class Statistics(_Message, frozen=True):
    """Sent with every step: how busy the engine is, how many steps it has made, and how the last one went
    (None where this is no step's report)."""

    load: Load
    steps: int
    timing: StepTiming | None = None


Report = (
    Loading
    | Ready
    | Failed
    | Accepted
    | Tokens
    | Done
    | Tokenized
    | Embedded
    | Exported
    | Imported
    | Statistics
)

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(list[Command])
_reports = msgspec.msgpack.Decoder(list[Report])


def encode(messages: list[Command] | list[Report]) -> bytes:
    """One frame of one or more messages. Raises Internal if it would exceed FRAME_BYTES_MAX."""
    body = _encoder.encode(messages)
    if len(body) > FRAME_BYTES_MAX:
        raise Internal(f"a frame of {len(body)} bytes exceeds {FRAME_BYTES_MAX}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def frame_length(head: bytes) -> int:
    """Length of the body that follows ``head``. Raises Internal if it is out of bounds."""
    length = int.from_bytes(head, "big")
    if length > FRAME_BYTES_MAX:
        raise Internal(f"a frame claims {length} bytes; at most {FRAME_BYTES_MAX} are accepted")
    return length


def decode_commands(body: bytes) -> list[Command]:
    """Commands of one frame. Raises Internal if it is none."""
    try:
        return _commands.decode(body)
    except msgspec.MsgspecError as error:
        raise Internal(f"the host sent a frame that is none: {error}") from error


def decode_reports(body: bytes) -> list[Report]:
    """Reports of one frame. Raises Internal if it is none."""
    try:
        return _reports.decode(body)
    except msgspec.MsgspecError as error:
        raise Internal(f"the engine sent a frame that is none: {error}") from error


def failed(key: int, error: FieldmeshError) -> Failed:
    """An error as it travels."""
    return Failed(key, error.code, error.message, error.field, error.retry_after_s, error.metadata)


_ERRORS = by_code()


def rebuilt(report: Failed) -> FieldmeshError:
    """The typed error that ``failed`` took apart."""
    kind = _ERRORS.get(report.code, Internal)
    return kind(
        report.message, field=report.field, retry_after_s=report.retry_after_s, metadata=report.metadata
    )
