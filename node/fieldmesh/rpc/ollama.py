"""The API of Ollama: bodies to an ``Ask``, and what a generation yields as lines of JSON.

Owns: the shapes that its clients send and read. What is said about memory (``keep_alive``, ``num_ctx``) is
ignored: the mesh decides it. Bounds are those of ``rpc.inference``. Must not: perform I/O, or know HTTP.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from fieldmesh.core.errors import FieldmeshError, Unsupported
from fieldmesh.core.model import (
    Chunk,
    Constraint,
    ConstraintKind,
    Embeddings,
    EngineState,
    FinishReason,
    MeshView,
    NodeState,
    ProfileOffer,
    Result,
    SamplingOverrides,
)
from fieldmesh.core.tools import Calls
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.errors import clipped
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai import (
    AUTO,
    SEEDS,
    Resolve,
    Wanted,
    parsed,
    schema_constraint,
)
from fieldmesh.rpc.openai_answers import encode, told
from fieldmesh.rpc.openai_tools import Tool, offered_function
from fieldmesh.rpc.sampling import fill_params
from fieldmesh.v1 import inference_pb2 as pb

LATEST: Final = ":latest"
SPOKEN_VERSION: Final = "0.12.0"
"""Whose API this is; clients refuse servers that are too old for them."""
ARCHITECTURE: Final = "fieldmesh"
FOR_EVER_S: Final = 100 * 365 * 86_400.0
_NS: Final = 1_000_000_000


class Options(msgspec.Struct):
    """``options``; those that are not here are ignored."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None


class CalledFunction(msgspec.Struct):
    """What an assistant called."""

    name: str
    arguments: dict[str, Any] = {}


class ToolCall(msgspec.Struct):
    """One of an assistant's ``tool_calls``."""

    function: CalledFunction


class Turn(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None


class Asked(msgspec.Struct):
    """What ``/api/chat`` and ``/api/generate`` have in common."""

    model: str = AUTO
    stream: bool | None = None
    format: msgspec.Raw = msgspec.Raw(b"")
    options: Options | None = None
    think: bool | str | None = None
    images: list[Any] | None = None


class Chat(Asked):
    """Body of ``/api/chat``."""

    messages: list[Turn] = []
    tools: list[Tool] | None = None


class Generate(Asked):
    """Body of ``/api/generate``."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    raw: bool | None = None


class Warm(msgspec.Struct):
    """As much of a body as tells whether it asks something."""

    model: str = AUTO
    prompt: str | None = None
    messages: list[msgspec.Raw] | None = None


class Embed(msgspec.Struct):
    """Body of ``/api/embed``."""

    model: str = AUTO
    input: str | list[str] | None = None


class EmbedOne(msgspec.Struct):
    """Body of ``/api/embeddings``."""

    model: str = AUTO
    prompt: str = ""


class Show(msgspec.Struct):
    """Body of ``/api/show``; clients use either name."""

    model: str = ""
    name: str = ""


def plain(name: str) -> str:
    """A model's name without the tag that Ollama's clients add."""
    return name.removesuffix(LATEST)


def loads_only(data: bytes) -> str | None:
    """The model that a body without prompt and messages wants to be loaded; None where it asks something.

    Clients send it to warm a model up. Raises InvalidRequest.
    """
    body = parsed(data, Warm)
    return None if body.prompt or body.messages else plain(body.model)


def loaded_document(name: str, *, chat: bool, created: float) -> bytes:
    """The answer to those who only wanted a model to be loaded."""
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    about = {"model": name, "created_at": instant(created)}
    return encode({**about, **said, "done": True, "done_reason": "load"})


def chat_wanted(data: bytes, request_id: str, resolve: Resolve, limits: RequestLimits, caller: str) -> Wanted:
    """What the body of ``/api/chat`` asks for. Raises InvalidRequest."""
    body = parsed(data, Chat)
    messages = []
    for index, turn in enumerate(body.messages):
        if turn.images:
            where = f"messages[{index}].images"
            raise Unsupported(f"{where}: this mesh reads text only", field=where)
        calls = [
            pb.ToolCall(name=call.function.name, arguments=encode(call.function.arguments).decode())
            for call in turn.tool_calls or ()
        ]
        messages.append(pb.ChatMessage(role=turn.role, content=turn.content or "", tool_calls=calls))
    offered = [offered_function(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    tools = pb.Tools(offered=offered) if offered else None
    request = pb.ChatRequest(request_id=request_id, messages=messages, tools=tools, tenant=caller)
    return _chat(body, request, resolve, limits)


def generate_wanted(
    data: bytes, request_id: str, resolve: Resolve, limits: RequestLimits, caller: str
) -> Wanted:
    """What the body of ``/api/generate`` asks for; ``raw``: a prompt as it stands. Raises InvalidRequest."""
    body = parsed(data, Generate)
    if body.suffix:
        raise Unsupported("suffix is not supported by this mesh; leave it out", field="suffix")
    if body.raw:
        request = pb.GenerateRequest(
            request_id=request_id,
            target=wire.target_to_proto(resolve(plain(body.model))),
            prompt=body.prompt or "",
            tenant=caller,
        )
        fill_params(request.sampling_params, _overrides(body))
        return _wanted(wire.ask_from_generate(request, limits), body)
    turns = (("system", body.system), ("user", body.prompt))
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns if content]
    asked = pb.ChatRequest(request_id=request_id, messages=messages, tenant=caller)
    return _chat(body, asked, resolve, limits)


def _chat(body: Asked, request: pb.ChatRequest, resolve: Resolve, limits: RequestLimits) -> Wanted:
    if body.images:
        raise Unsupported("images: this mesh reads text only", field="images")
    request.target.CopyFrom(wire.target_to_proto(resolve(plain(body.model))))
    if body.think is not None:
        request.enable_thinking = bool(body.think)
    fill_params(request.sampling_params, _overrides(body))
    return _wanted(wire.ask_from_chat(request, limits), body)


def _wanted(ask: Any, body: Asked) -> Wanted:
    return Wanted(ask=ask, stream=body.stream is not False, include_usage=True)


def _overrides(body: Asked) -> SamplingOverrides:
    given = body.options or Options()
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    return SamplingOverrides(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repeat_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=None if given.seed is None else given.seed % SEEDS,
        # Below 0 means without a bound of its own.
        max_tokens=None if given.num_predict is None or given.num_predict < 0 else given.num_predict,
        stop=stop or None,
        constraint=_constraint(bytes(body.format)),
    )


def _constraint(wanted: bytes) -> Constraint | None:
    if wanted == b'"json"':
        return Constraint(kind=ConstraintKind.JSON_OBJECT)
    return None if wanted == b'""' else schema_constraint(wanted)


def embed_request(data: bytes, resolve: Resolve) -> pb.EmbedRequest:
    """What the body of ``/api/embed`` asks for, unchecked. Raises InvalidRequest."""
    body = parsed(data, Embed)
    inputs = [body.input] if isinstance(body.input, str) else body.input or []
    return pb.EmbedRequest(target=wire.target_to_proto(resolve(plain(body.model))), inputs=inputs)


def embed_one_request(data: bytes, resolve: Resolve) -> pb.EmbedRequest:
    """What the body of ``/api/embeddings`` asks for, unchecked. Raises InvalidRequest."""
    body = parsed(data, EmbedOne)
    return pb.EmbedRequest(target=wire.target_to_proto(resolve(plain(body.model))), inputs=[body.prompt])


def embeddings_document(made: Embeddings, model: str, duration_s: float) -> bytes:
    """The answer of ``/api/embed``."""
    return encode(
        {
            "model": model,
            "embeddings": made.vectors,
            "total_duration": int(duration_s * _NS),
            "load_duration": 0,
            "prompt_eval_count": made.prompt_tokens,
        }
    )


def error_line(error: FieldmeshError) -> bytes:
    """``error`` as Ollama says one, as a document and as a line."""
    return encode({"error": clipped(told(error.message))}) + b"\n"


def instant(at_s: float) -> str:
    """A Unix time as Ollama writes it."""
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


class Lines:
    """One answer as lines of JSON or as one document. ``created`` is a Unix time in seconds."""

    content_type = "application/x-ndjson"

    def __init__(self, *, chat: bool, model: str, created: float) -> None:
        self._chat = chat
        self._about = {"model": model, "created_at": instant(created)}
        opened = encode(self._about)[:-1]
        self._head = opened + (b',"message":{"role":"assistant","content":' if chat else b',"response":')
        self._tail = b'},"done":false}\n' if chat else b',"done":false}\n'
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls = Calls()

    def event(self, chunk: Chunk) -> bytes:
        """The line of one chunk; nothing where it tells nothing yet. Calls come whole, at the end."""
        self._calls.add(chunk)
        if not (chunk.text or chunk.reasoning):
            return b""
        thinking = b',"thinking":' + encode(chunk.reasoning) if chunk.reasoning else b""
        return b"".join((self._head, encode(chunk.text), thinking, self._tail))

    def end(self, result: Result) -> bytes:
        """The lines that end the stream."""
        calls, unread = self._called()
        called = encode({"role": "assistant", "content": "", "tool_calls": calls})
        line = encode(self._about)[:-1] + b',"message":' + called + b',"done":false}\n' if calls else b""
        return line + self._last({"content": unread}, result) + b"\n"

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk for ``document``."""
        self._text.append(chunk.text)
        self._thinking.append(chunk.reasoning)
        self._calls.add(chunk)

    def document(self, result: Result) -> bytes:
        """The whole answer."""
        calls, unread = self._called()
        said: dict[str, Any] = {"content": "".join(self._text) + unread}
        if thinking := "".join(self._thinking):
            said["thinking"] = thinking
        if calls:
            said["tool_calls"] = calls
        return self._last(said, result)

    def _last(self, message: dict[str, Any], result: Result) -> bytes:
        said: dict[str, Any] = {"message": {"role": "assistant", **message}}
        if not self._chat:
            said = {"response": message.pop("content"), **message}
        usage, why = result.completion.usage, result.completion.finish_reason
        return encode(
            {
                **self._about,
                **said,
                "done": True,
                "done_reason": "stop" if why is FinishReason.TOOL_CALLS else why.value,
                "total_duration": int(result.duration_s * _NS),
                "load_duration": 0,
                "prompt_eval_count": usage.prompt_tokens,
                "prompt_eval_duration": int(result.ttft_s * _NS),
                "eval_count": usage.completion_tokens,
                "eval_duration": int(max(0.0, result.duration_s - result.ttft_s) * _NS),
            }
        )

    def _called(self) -> tuple[list[dict[str, Any]], str]:
        """The calls, and as text those whose arguments are no object, which here they have to be: cut off, or
        badly written."""
        called, unread = [], ""
        for call in self._calls.of(0):
            try:
                msgspec.json.decode(call.arguments, type=dict[str, Any])
            except (msgspec.MsgspecError, RecursionError):
                unread += f'{{"name": {encode(call.name).decode()}, "arguments": {call.arguments}'
                continue
            arguments = msgspec.Raw(call.arguments.encode())
            called.append({"id": call.id, "function": {"name": call.name, "arguments": arguments}})
        return called, unread


# --- what there is -----------------------------------------------------------------------


def offers_by_name(view: MeshView) -> dict[str, ProfileOffer | None]:
    """What can be named, and what it is; ``auto`` is nobody in particular."""
    offers = [offer for member in view.members if member.row for offer in member.row.profiles]
    found: dict[str, ProfileOffer | None] = {AUTO: None}
    for offer in sorted(offers, key=lambda offer: offer.name):
        found.setdefault(offer.name, offer)
    for offer in sorted(offers, key=lambda offer: offer.model):
        found.setdefault(offer.model, offer)
    return found


def loaded_by_name(view: MeshView) -> dict[str, ProfileOffer | None]:
    """What can be named and answers now, without waiting to be loaded."""
    ready = [m for m in view.members if m.state is NodeState.ALIVE and m.load.engine is EngineState.READY]
    found = offers_by_name(replace(view, members=tuple(ready)))
    del found[AUTO]
    return found


def model_entry(name: str, offer: ProfileOffer | None, since: float) -> dict[str, Any]:
    """One line of ``/api/tags`` and ``/api/ps``: sizes stay on the nodes, and are not told here."""
    return {
        "name": name,
        "model": name,
        "modified_at": instant(since),
        "expires_at": instant(since + FOR_EVER_S),
        "size": 0,
        "size_vram": 0,
        "digest": offer.fingerprint if offer else "",
        "context_length": offer.context_tokens if offer else 0,
        "details": _details(offer),
    }


def show_document(offer: ProfileOffer | None, since: float) -> bytes:
    """The answer of ``/api/show``. Clients seek there the context's length under the architecture's name,
    and for tools in the template; the one that is applied is the model's own."""
    about: dict[str, Any] = {"general.architecture": ARCHITECTURE}
    if offer is not None:
        about["general.basename"] = offer.model
        about["fieldmesh.profile"] = offer.name
        about[f"{ARCHITECTURE}.context_length"] = offer.context_tokens
    return encode(
        {
            "modelfile": "",
            "parameters": f"num_ctx {offer.context_tokens}" if offer else "",
            "template": "{{ .Messages }}{{ .Tools }}",
            "modified_at": instant(since),
            "details": _details(offer),
            "model_info": about,
            "capabilities": ["completion", "tools", "embedding"],
        }
    )


def _details(offer: ProfileOffer | None) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": offer.model if offer else "",
        "families": [],
        "parameter_size": "",
        "quantization_level": "",
    }
