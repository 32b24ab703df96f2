"""What both clients have in common. Owns: requests from arguments, channel options, errors translated.

Must not: open a channel or wait for anything.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypedDict

import grpc

from fieldmesh.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FieldmeshError,
    Internal,
    InvalidRequest,
    NodeUnreachable,
    ProtocolMismatch,
)
from fieldmesh.core.model import (
    Address,
    Ask,
    Constraint,
    ConstraintKind,
    Message,
    Priority,
    Prompt,
    SamplingOverrides,
    Target,
    Tool,
    Tools,
)
from fieldmesh.core.tracing import TraceContext
from fieldmesh.rpc import inference as codec
from fieldmesh.rpc.errors import DETAILS_KEY, PUSHBACK_KEY, error_from_status
from fieldmesh.rpc.tracing import TRACEPARENT, context_from
from fieldmesh.v1 import inference_pb2
from fieldmesh.values import address

CLIENT_PORT: Final = 7420
MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
# Calls that are no generations answer from what a node knows: one that takes longer met a frozen node, and
# the next is asked.
UNARY_TIMEOUT_S: Final = 15.0
UNARY_ATTEMPT_TIMEOUT_S: Final = 3.0
DISCOVERY_TIMEOUT_S: Final = 3.0
TIMEOUT_MAX_S: Final = 86_400.0
# A connection that was silent for longer is probed when a call begins on it: a frozen node takes a call and
# says nothing, and keepalive needs 13 s to notice. A node under full load answers a health check in
# milliseconds.
SILENCE_S: Final = 2.0
PROBE_TIMEOUT_S: Final = 3.0
HEALTH_METHOD: Final = "/grpc.health.v1.Health/Check"
REFRESH_TIMEOUT_S: Final = 2.0
CHANNELS_MAX: Final = 32

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    # With the defaults a node that comes back after 30 s is found 15 s late. The least backoff also bounds
    # how long one connection attempt may take, so that a frozen host costs a second and no more.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A cut link is silent; pings find it in 13 s instead of never.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    # Nodes are on loopback and on LANs, where a proxy from the environment is only in the way; attempts are
    # counted by failover, not by the library.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

Turns = str | Sequence[Message | Mapping[str, str] | tuple[str, str]]
"""A question, or the turns of a conversation: ``Message``, ``{"role", "content"}`` or ``(role, content)``."""


class Options(TypedDict, total=False):
    """What ``generate`` and ``chat`` accept by keyword. What is left out is up to the mesh and the profile.

    Who answers: ``profile`` and ``model`` are demands (nobody offers it: ProfileNotFound, ModelNotFound),
    ``domain`` is a wish (its owners are gone: a generalist answers, and ``Result.fallback`` says so).

    How tokens are drawn: ``temperature`` 0 (greedy) to 5, ``top_p`` above 0 to 1, ``top_k`` 0 (all) to 1000,
    ``min_p`` 0 to 1, ``frequency_penalty`` and ``presence_penalty`` -2 to 2, ``repetition_penalty`` above 0
    to 5, ``seed`` 0 to 2**32-1, ``max_tokens`` at least 1, ``min_tokens``, ``stop`` at most 16 strings of
    256 bytes, ``stop_token_ids`` at most 64, ``ignore_eos``, ``logit_bias`` at most 300 token ids with -100
    to 100.

    What comes back: ``logprobs`` 0 to 20 tells how likely each token and so many others at its place were
    (``Choice.logprobs``), ``n`` 1 to 16 makes so many completions (``Result.choices``, ``Chunk.index``).

    Thinking models: ``enable_thinking`` (``chat`` alone; default: as the model's template has it) switches
    the reasoning, which comes apart from the answer (``Chunk.reasoning``); ``reasoning_tokens_max`` ends it.

    What it may ask for: ``tools`` (``chat`` alone), several ``Tool``, or one ``Tools`` that also says whether
    a call is required, of which, and whether one is enough (``Result.tool_calls``).

    What the answer must match (one of them, at most 64 kB): ``json_schema`` (text or a mapping), ``regex``
    (Rust's syntax), ``grammar`` (Lark as llguidance reads it), ``json_object`` (True: any JSON object). What
    cannot be enforced raises ConstraintInvalid with the reason.

    The call: ``priority`` (default ``normal``), ``tenant`` (whose it is: a full node serves its tenants in
    equal shares; up to 64 of ``[A-Za-z0-9._:-]``), ``explain`` (the result carries the routing decision),
    ``request_id`` (1 to 64 of ``[A-Za-z0-9._:-]``; default: a random one; a repeat is answered, not done
    again), ``traceparent`` (of W3C Trace Context: the span of yours that this call belongs to), ``timeout_s``
    (for the whole call, all attempts and the stream included; default: the client's).
    """

    profile: str
    model: str
    domain: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    n: int
    enable_thinking: bool
    reasoning_tokens_max: int
    tools: Tools | Sequence[Tool]
    json_schema: str | Mapping[str, Any]
    regex: str
    grammar: str
    json_object: bool
    priority: Literal["interactive", "normal", "batch"]
    tenant: str
    explain: bool
    request_id: str
    traceparent: str
    timeout_s: float | None


class TargetOptions(TypedDict, total=False):
    """Whose model ``tokenize`` and ``embed`` use; see ``Options``."""

    profile: str
    model: str
    domain: str


def messages(turns: Turns) -> tuple[Message, ...]:
    """``turns`` as messages; a bare string is what a user says. Raises InvalidRequest."""
    if isinstance(turns, str):
        return (Message(role="user", content=turns),)
    found = tuple(_message(index, turn) for index, turn in enumerate(turns))
    if not found:
        raise InvalidRequest("messages is empty; send at least one message", field="messages")
    return found


def _message(index: int, turn: object) -> Message:
    match turn:
        case Message():
            return turn
        case {"role": str(role), "content": str(content)} | (str(role), str(content)):
            return Message(role=role, content=content)
        case _:
            raise InvalidRequest(
                f"messages[{index}] must be a Message, a (role, content) pair or a mapping with the two",
                field=f"messages[{index}]",
            )


def prompt_of_turns(turns: Turns, options: Options) -> Prompt:
    """A conversation to continue."""
    tools = options.get("tools") or None
    if tools is not None and not isinstance(tools, Tools):
        tools = Tools(offered=tuple(tools))
    return Prompt(messages=messages(turns), thinking=options.get("enable_thinking"), tools=tools)


def prompt_of_text(continued: str | Sequence[int]) -> Prompt:
    """Text, or token ids of the model that is demanded."""
    return Prompt(text=continued) if isinstance(continued, str) else Prompt(token_ids=tuple(continued))


_SAMPLING: Final = frozenset(SamplingOverrides.__dataclass_fields__) - {"constraint"}
_CONSTRAINTS: Final = tuple(kind for kind in ConstraintKind if kind is not ConstraintKind.TOOLS)
_PRIORITIES: Final = {priority.name.lower(): priority for priority in Priority}


def ask(prompt: Prompt, options: Options) -> Ask:
    """The request that ``options`` describe. Raises InvalidRequest for what no node has to be asked about."""
    given: dict[str, Any] = dict(options)
    unknown = [name for name in given if name not in Options.__annotations__]
    if unknown:
        raise InvalidRequest(f"{unknown[0]} is not an option; see fieldmesh.client.Options", field=unknown[0])
    sampling: dict[str, Any] = {name: value for name, value in given.items() if name in _SAMPLING}
    for name in ("stop", "stop_token_ids"):
        if isinstance(sampling.get(name), str):
            raise InvalidRequest(f"{name} must be a list, not one string", field=name)
        if sampling.get(name) is not None:
            sampling[name] = tuple(sampling[name])
    if sampling.get("logit_bias") is not None:
        sampling["logit_bias"] = tuple(sorted(dict(sampling["logit_bias"]).items()))
    sampling["constraint"] = _constraint(given)
    for name in ("enable_thinking", "tools"):
        if given.get(name) is not None and not prompt.messages:
            raise InvalidRequest(
                f"{name} is for conversations; plain text is continued as it stands", field=name
            )
    priority = given.get("priority", "normal")
    if priority not in _PRIORITIES:
        raise InvalidRequest(f"priority must be one of {', '.join(_PRIORITIES)}", field="priority")
    return Ask(
        request_id=codec.request_id(given.get("request_id") or secrets.token_hex(16)),
        prompt=prompt,
        target=target(given),
        sampling=SamplingOverrides(**sampling),
        priority=_PRIORITIES[priority],
        tenant=codec.tenant(given.get("tenant", "")),
        explain=bool(given.get("explain", False)),
    )


def _constraint(given: Mapping[str, Any]) -> Constraint | None:
    wanted = [kind for kind in _CONSTRAINTS if given.get(kind.value) not in (None, False, "")]
    if len(wanted) > 1:
        names = " and ".join(kind.value for kind in wanted)
        raise InvalidRequest(f"{names} exclude each other: an answer matches one", field=wanted[1].value)
    for kind in wanted:
        value = given[kind.value]
        if kind is ConstraintKind.JSON_OBJECT:
            return Constraint(kind=kind)
        try:
            source = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{kind.value} is no JSON document: {error}", field=kind.value) from error
        return Constraint(kind=kind, source=source)
    return None


def target(options: Mapping[str, Any]) -> Target:
    """Who should answer."""
    return Target(**{name: options.get(name) or "" for name in ("profile", "model", "domain")})


def trace_context(options: Options) -> TraceContext:
    """The trace of one call, over all nodes that are asked for it. Raises InvalidRequest."""
    given = options.get(TRACEPARENT)
    if given is None:
        return TraceContext(trace_id=secrets.token_hex(16), span_id=secrets.token_hex(8))
    found = context_from([(TRACEPARENT, given)])
    if found is None:
        raise InvalidRequest(
            "traceparent must be as W3C Trace Context has it: 00-, 32 hex digits, -, 16 hex digits, -01",
            field=TRACEPARENT,
        )
    return found


def request(asked: Ask) -> inference_pb2.GenerateRequest | inference_pb2.ChatRequest:
    """The message that says ``asked``. Raises InvalidRequest for values that the wire cannot hold."""
    try:
        return codec.chat_from_ask(asked) if asked.prompt.messages else codec.generate_from_ask(asked)
    except (TypeError, ValueError) as error:  # wrong types, numbers beyond 32 bits, text that is not Unicode
        raise InvalidRequest(f"The request cannot be sent as it is: {error}") from error


def method(sent: inference_pb2.GenerateRequest | inference_pb2.ChatRequest) -> str:
    """The method of InferenceService that takes this message."""
    return "Chat" if isinstance(sent, inference_pb2.ChatRequest) else "Generate"


def tokenize_request(turns_or_text: Turns, options: TargetOptions) -> inference_pb2.TokenizeRequest:
    """The message that asks for token ids of plain text, or of a conversation."""
    try:
        sent = inference_pb2.TokenizeRequest(target=codec.target_to_proto(target(options)))
        if isinstance(turns_or_text, str):
            sent.prompt = turns_or_text
        else:
            sent.messages.extend(codec.messages_to_proto(messages(turns_or_text)))
        return sent
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"The request cannot be sent as it is: {error}") from error


def embed_request(texts: str | Sequence[str], options: TargetOptions) -> inference_pb2.EmbedRequest:
    """The message that asks for the vectors of texts."""
    inputs = [texts] if isinstance(texts, str) else list(texts)
    try:
        return inference_pb2.EmbedRequest(target=codec.target_to_proto(target(options)), inputs=inputs)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"The request cannot be sent as it is: {error}") from error


# What the library says before the reason why it could not connect.
_CONNECTING: Final = re.compile(
    r"^failed to connect to all addresses; last error: (\w+: )?(\S+: )?(Failed to connect to remote host: )?"
)


class Failure(Protocol):
    """What the synchronous and the asynchronous library tell of a failed call."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def translated(failure: Failure, asked: Address) -> FieldmeshError:
    """The typed error behind a failed call to ``asked``."""
    code, said = failure.code(), failure.details() or ""
    trailing = dict(failure.trailing_metadata() or ())
    details = trailing.get(DETAILS_KEY)
    if not isinstance(details, bytes):
        if code is grpc.StatusCode.UNAVAILABLE:
            reason = _CONNECTING.sub("", said) or "it is gone"
            return NodeUnreachable(f"{asked} cannot be reached: {reason}", metadata={"address": str(asked)})
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolMismatch(
                f"{asked} is no client listener of a node: it may be the peer listener, or another program.",
                metadata={"address": str(asked)},
            )
        if code is grpc.StatusCode.UNKNOWN:
            return Internal(f"{asked} failed on this request: {said}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("The answer did not come in the time given for it.", field="timeout_s")
        if code is grpc.StatusCode.CANCELLED:
            return Cancelled("The call was cancelled.")
        details = None
    number: int = code.value[0]
    error = error_from_status(number, said, details)
    if error.retry_after_s is None:
        error.retry_after_s = _pushback_s(trailing.get(PUSHBACK_KEY))
    return error


def _pushback_s(value: str | bytes | None) -> float | None:
    """What servers of other make say in metadata alone; a negative number means not to ask again."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value or ""
    return int(text) / 1000 if text.isascii() and text.isdigit() and len(text) < 10 else None


def deadline(timeout_s: float | None, now: float) -> float | None:
    """When a call that begins now must have ended. Raises InvalidRequest."""
    if timeout_s is None:
        return None
    if not (math.isfinite(timeout_s) and 0 < timeout_s <= TIMEOUT_MAX_S):
        raise InvalidRequest(
            f"timeout_s is {timeout_s}; accepted is above 0 to {TIMEOUT_MAX_S:g} seconds, or None",
            field="timeout_s",
        )
    return now + timeout_s


def unary_timeout_s(left_s: float | None) -> float:
    """How long one attempt at a short call may take."""
    return UNARY_ATTEMPT_TIMEOUT_S if left_s is None else min(left_s, UNARY_ATTEMPT_TIMEOUT_S)


def unary_error(error: FieldmeshError, asked: Address, left_s: float | None) -> FieldmeshError:
    """``error``, or that the node is frozen where only this attempt's time has passed."""
    if isinstance(error, DeadlineExceeded) and left_s is not None and left_s > UNARY_ATTEMPT_TIMEOUT_S:
        return NodeUnreachable(
            f"{asked} did not answer within {UNARY_ATTEMPT_TIMEOUT_S:g} s.", metadata={"address": str(asked)}
        )
    return error


def seeds(given: str | Address | Iterable[str | Address]) -> tuple[Address, ...]:
    """Addresses of client listeners; the port may be left out. Raises ConfigError."""
    listed = (given,) if isinstance(given, (str, Address)) else given
    return tuple(
        entry if isinstance(entry, Address) else address(entry, default_port=CLIENT_PORT, field_name="seeds")
        for entry in listed
    )


def silent(asked: Address) -> NodeUnreachable:
    """The error of a call on a connection whose node answers nothing any more."""
    return NodeUnreachable(
        f"{asked} did not answer a health check within {PROBE_TIMEOUT_S:g} s.",
        metadata={"address": str(asked)},
    )


def cut_short(asked: Address) -> NodeUnreachable:
    """The error of a stream that ended without its end."""
    return NodeUnreachable(f"{asked} closed the stream before its end.", metadata={"address": str(asked)})
