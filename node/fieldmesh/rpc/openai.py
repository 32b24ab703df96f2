"""Requests of the OpenAI API: bodies of chat and text completions to an ``Ask``.

Owns: the shapes that clients send, and saying which parameter is at fault. The bounds of values are those of
``rpc.inference``: what comes in here is said over again as the protobuf message and checked there, so that
both doors accept the same. Parameters that are not known are ignored, as the API does; one that would change
the answer and cannot be obeyed is refused. Must not: perform I/O, or know HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from fieldmesh.core.errors import InvalidRequest, Unsupported
from fieldmesh.core.model import Ask, Constraint, ConstraintKind, MeshView, SamplingOverrides, Target
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai_tools import NamedTool, Tool, ToolCall, offered_function, tools_wanted
from fieldmesh.rpc.sampling import fill_params
from fieldmesh.v1 import inference_pb2 as pb

AUTO: Final = "auto"
SEEDS: Final = 2**32
TOKEN_IDS: Final = 2**31
LOGPROBS_DEFAULT: Final = 0
_AT = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)

Resolve = Callable[[str], Target]
"""Whom a model's name means."""

Body = TypeVar("Body", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct):
    """``response_format.json_schema``."""

    schema: msgspec.Raw = msgspec.Raw(b"")


class ResponseFormat(msgspec.Struct):
    """``response_format``; ``schema`` is where llama.cpp's clients put it."""

    type: str
    json_schema: JsonSchema | None = None
    schema: msgspec.Raw = msgspec.Raw(b"")


class Part(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None


class Completion(msgspec.Struct):
    """What chat and text completions have in common. Those behind ``ignore_eos`` are vLLM's additions."""

    model: str = AUTO
    user: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None


class TemplateSwitches(msgspec.Struct):
    """``chat_template_kwargs``, as vLLM and llama.cpp have it."""

    enable_thinking: bool | None = None


class ChatCompletion(Completion):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = []
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateSwitches | None = None


PromptPart = str | int | list[int]
"""What a list of prompts, or of token ids, may hold."""


class TextCompletion(Completion):
    """Body of ``/v1/completions``."""

    prompt: str | list[PromptPart] | None = None
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class EmbeddingsBody(msgspec.Struct):
    """Body of ``/v1/embeddings``."""

    model: str = AUTO
    input: str | list[PromptPart] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedWanted:
    """A request for vectors, its texts unchecked, and whether they are to be packed."""

    request: pb.EmbedRequest
    base64: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request, and how its answer is to be told."""

    ask: Ask
    stream: bool
    include_usage: bool


def parsed(data: bytes, kind: type[Body]) -> Body:
    """The body of a request as ``kind``. Raises InvalidRequest, naming the parameter at fault."""
    try:
        data.decode()  # what is skipped, or kept as it stands, is not read otherwise
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        found = _AT.fullmatch(str(error))
        what, where = (found["what"], found["where"] or "") if found else (str(error), "")
        raise InvalidRequest(f"{where or 'The body'}: {what}", field=where) from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"The body is not JSON in UTF-8: {why}") from None


def target_of(name: str, view: MeshView) -> Target:
    """Whom ``name`` means: a profile, else a model; ``auto`` and nothing leave the choice to the mesh."""
    if name in ("", AUTO):
        return Target()
    offers = (offer for member in view.members if member.row for offer in member.row.profiles)
    return Target(profile=name) if any(offer.name == name for offer in offers) else Target(model=name)


def model_names(view: MeshView) -> list[str]:
    """What may be named in ``model``: ``auto``, then profiles, then models."""
    offers = [offer for member in view.members if member.row for offer in member.row.profiles]
    profiles = sorted({offer.name for offer in offers})
    return list(dict.fromkeys([AUTO, *profiles, *sorted({offer.model for offer in offers})]))


def tenant_of(caller: str, *users: str | None) -> str:
    """Whose request it is: the user that the caller names, else the ``caller`` itself.

    Only for fair shares at a node that is full: nobody is known by it, and nothing is allowed by it.
    """
    user = next((user for user in users if user), "")
    if not user or wire.REQUEST_ID.fullmatch(user):
        return user or caller
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:32]}"


def chat_wanted(data: bytes, request_id: str, resolve: Resolve, limits: RequestLimits, caller: str) -> Wanted:
    """What the body of a chat completion asks for. Raises InvalidRequest."""
    body = parsed(data, ChatCompletion)
    if body.functions or body.function_call:
        field = "functions" if body.functions else "function_call"
        raise Unsupported(f"{field}: OpenAI has replaced functions by tools; send those", field=field)
    if set(body.modalities or ()) - {"text"}:
        raise Unsupported("modalities: this mesh answers in text only", field="modalities")
    tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or LOGPROBS_DEFAULT) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    messages = [_message(message, index) for index, message in enumerate(body.messages)]
    request = pb.ChatRequest(
        request_id=request_id,
        target=wire.target_to_proto(resolve(body.model)),
        messages=messages,
        tenant=tenant_of(caller, body.safety_identifier, body.user),
    )
    thinking = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    if thinking is None and body.reasoning_effort == "none":
        thinking = False
    if thinking is not None:
        request.enable_thinking = thinking
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) and choice.function else ""
    offered = [offered_function(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    tools = tools_wanted(offered, choice, named, parallel=body.parallel_tool_calls)
    if tools is not None:
        request.tools.CopyFrom(tools)
    fill_params(request.sampling_params, _overrides(body, tokens, logprobs))
    return _wanted(wire.ask_from_chat(request, limits), body)


def text_wanted(data: bytes, request_id: str, resolve: Resolve, limits: RequestLimits, caller: str) -> Wanted:
    """What the body of a text completion asks for. Raises InvalidRequest."""
    body = parsed(data, TextCompletion)
    if body.echo:
        raise Unsupported("echo is not supported by this mesh; leave it out", field="echo")
    if body.suffix:
        raise Unsupported("suffix is not supported by this mesh; leave it out", field="suffix")
    if (body.best_of or 1) > (body.n or 1):
        raise Unsupported("best_of is not supported by this mesh; use n", field="best_of")
    request = pb.GenerateRequest(
        request_id=request_id,
        target=wire.target_to_proto(resolve(body.model)),
        tenant=tenant_of(caller, body.safety_identifier, body.user),
    )
    prompt = _one_prompt(body.prompt)
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.token_ids.ids.extend(_token_id(token, "prompt") for token in prompt)
    fill_params(request.sampling_params, _overrides(body, body.max_tokens, body.logprobs))
    return _wanted(wire.ask_from_generate(request, limits), body)


def embed_wanted(data: bytes, resolve: Resolve) -> EmbedWanted:
    """What the body of ``/v1/embeddings`` asks for. Raises InvalidRequest."""
    body = parsed(data, EmbeddingsBody)
    if body.encoding_format not in (None, "float", "base64"):
        raise InvalidRequest(
            f"encoding_format is {body.encoding_format[:40]!r}; accepted are float, base64",
            field="encoding_format",
        )
    if body.dimensions is not None:
        raise Unsupported("dimensions: a vector has as many as its model", field="dimensions")
    inputs = [body.input] if isinstance(body.input, str) else body.input or []
    texts = [entry for entry in inputs if isinstance(entry, str)]
    if len(texts) < len(inputs):
        raise Unsupported(
            "input holds token ids, which mean nothing to another model than theirs; send texts "
            "(langchain-openai: check_embedding_ctx_length=False)",
            field="input",
        )
    request = pb.EmbedRequest(target=wire.target_to_proto(resolve(body.model)), inputs=texts)
    return EmbedWanted(request=request, base64=body.encoding_format == "base64")


def _wanted(ask: Ask, body: Completion) -> Wanted:
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Wanted(ask=ask, stream=bool(body.stream), include_usage=usage)


def _message(message: ChatMessage, index: int) -> pb.ChatMessage:
    field = f"messages[{index}]"
    if message.function_call:
        raise Unsupported(
            f"{field}.function_call: OpenAI has replaced it by tool_calls; send those",
            field=f"{field}.function_call",
        )
    content = message.content or ""
    if not isinstance(content, str):
        for position, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise Unsupported(
                    f"{field}.content[{position}] is of type {part.type[:40]!r}; this mesh reads text only",
                    field=f"{field}.content[{position}].type",
                )
        content = "\n".join(part.text or "" for part in content)
    role = "system" if message.role == "developer" else message.role
    calls = [
        pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments or "{}")
        for call in message.tool_calls or ()
    ]
    return pb.ChatMessage(
        role=role, content=content, tool_calls=calls, tool_call_id=message.tool_call_id or ""
    )


def _one_prompt(prompt: str | list[PromptPart] | None) -> str | Sequence[object]:
    """Text, or token ids that are still to be checked."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise Unsupported("prompt: one prompt at a time; send a request for each", field="prompt")
        return prompt[0]
    return prompt


def _token_id(token: object, field: str) -> int:
    if isinstance(token, int) and 0 <= token < TOKEN_IDS:
        return token
    raise InvalidRequest(f"{field} holds {str(token)[:40]}; token ids are 0 to {TOKEN_IDS - 1}", field=field)


def _overrides(body: Completion, max_tokens: int | None, logprobs: int | None) -> SamplingOverrides:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    token_ids = tuple(_token_id(token, "stop_token_ids") for token in body.stop_token_ids or ())
    return SamplingOverrides(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        # The API takes any whole number; the engine has 32 bits of it.
        seed=None if body.seed is None else body.seed % SEEDS,
        stop=stop or None,
        stop_token_ids=token_ids or None,
        ignore_eos=body.ignore_eos,
        n=body.n,
        logprobs=logprobs,
        logit_bias=_logit_bias(body.logit_bias),
        constraint=_constraint(body.response_format),
    )


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...] | None:
    if not bias:
        return None
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 11):
            raise InvalidRequest(
                f"logit_bias has the key {token[:40]!r}; keys are token ids", field="logit_bias"
            )
    return tuple((_token_id(int(token), "logit_bias"), value) for token, value in bias.items())


def _constraint(wanted: ResponseFormat | None) -> Constraint | None:
    if wanted is None:
        return None
    if wanted.type == "json_schema":
        schema = bytes(wanted.json_schema.schema) if wanted.json_schema else b""
        return format_constraint(wanted.type, schema, "response_format", "json_schema.schema")
    return format_constraint(wanted.type, bytes(wanted.schema), "response_format", "schema")


def format_constraint(kind: str, schema: bytes, field: str, schema_field: str) -> Constraint | None:
    """The constraint that a format of an answer means. Raises InvalidRequest."""
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise InvalidRequest(
            f"{field}.type is {kind[:40]!r}; accepted are text, json_object, json_schema",
            field=f"{field}.type",
        )
    found = schema_constraint(schema)
    if found is None and kind == "json_schema":
        where = f"{field}.{schema_field}"
        raise InvalidRequest(f"{where} is missing; it is an object", field=where)
    return found or Constraint(kind=ConstraintKind.JSON_OBJECT)


def schema_constraint(schema: bytes) -> Constraint | None:
    """The constraint that a JSON Schema means; None where there is none."""
    if schema in (b"", b"null"):
        return None
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, source=schema.decode())
