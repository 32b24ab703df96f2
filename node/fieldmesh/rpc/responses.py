"""Requests of OpenAI's Responses API: bodies to an ``Ask``, and what of them is told again in the answer.

Owns: the shapes that clients send, and how the items of a conversation become its turns. Bounds are those of
``rpc.inference``. Must not: perform I/O, know HTTP, or keep anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from fieldmesh.core.errors import InvalidRequest, Unsupported
from fieldmesh.core.model import Message, SamplingOverrides
from fieldmesh.rpc import inference as wire
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.rpc.openai import AUTO, Resolve, Wanted, format_constraint, parsed, tenant_of
from fieldmesh.rpc.openai_tools import function_offered, no_function, tools_wanted
from fieldmesh.rpc.sampling import fill_params
from fieldmesh.v1 import inference_pb2 as pb

LOGPROBS: Final = "message.output_text.logprobs"
"""What ``include`` holds where log-probabilities are wanted."""

Earlier = Callable[[str], tuple[Message, ...]]
"""The conversation up to and with an earlier response. Raises PreviousResponseNotFound."""


class Part(msgspec.Struct):
    """One part of a message's content, or of a call's output."""

    type: str
    text: str | None = None


class Item(msgspec.Struct):
    """One item of a conversation: a message unless ``type`` says otherwise."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[Part] | None = None


class Format(msgspec.Struct):
    """``text.format``."""

    type: str
    name: str | None = None
    schema: msgspec.Raw = msgspec.Raw(b"null")
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """``text``."""

    format: Format | None = None


class Reasoning(msgspec.Struct):
    """``reasoning``."""

    effort: str | None = None
    summary: str | None = None


class FunctionTool(msgspec.Struct):
    """One of ``tools``."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"null")
    strict: bool | None = None


class NamedTool(msgspec.Struct):
    """``tool_choice`` where it demands one function."""

    type: str
    name: str = ""


class Body(msgspec.Struct):
    """Body of ``POST /v1/responses``."""

    model: str = AUTO
    input: str | list[Item] | None = None
    instructions: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseWanted(Wanted):
    """A request, what of it the response tells again, and the turns that a later one goes on from."""

    told: dict[str, Any]
    turns: tuple[Message, ...]
    store: bool


def response_wanted(
    data: bytes, request_id: str, resolve: Resolve, limits: RequestLimits, caller: str, earlier: Earlier
) -> ResponseWanted:
    """What the body of a response asks for. Raises InvalidRequest."""
    body = parsed(data, Body)
    for field in ("background", "conversation", "prompt"):
        if getattr(body, field):
            raise Unsupported(f"{field} is not supported by this mesh; leave it out", field=field)
    given = _turns(body.input)
    if not given:
        raise InvalidRequest("input is empty; send text, or at least one item", field="input")
    before = earlier(body.previous_response_id) if body.previous_response_id else ()
    instructed = [pb.ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    request = pb.ChatRequest(
        request_id=request_id,
        target=wire.target_to_proto(resolve(body.model)),
        messages=[*instructed, *wire.messages_to_proto(before), *given],
        tenant=tenant_of(caller, body.safety_identifier, body.user),
    )
    if body.reasoning is not None and body.reasoning.effort == "none":
        request.enable_thinking = False
    if (tools := _tools(body)) is not None:
        request.tools.CopyFrom(tools)
    fill_params(request.sampling_params, _overrides(body))
    ask = wire.ask_from_chat(request, limits)
    return ResponseWanted(
        ask=ask,
        stream=bool(body.stream),
        include_usage=True,
        told=_told(body),
        turns=ask.prompt.messages[len(instructed) :],
        store=body.store is not False,
    )


def _turns(given: str | list[Item] | None) -> list[pb.ChatMessage]:
    if given is None or isinstance(given, str):
        return [pb.ChatMessage(role="user", content=given)] if given else []
    turns: list[pb.ChatMessage] = []
    for index, item in enumerate(given):
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else item.role
                turns.append(
                    pb.ChatMessage(role=role, content=_text(item.content, f"input[{index}].content"))
                )
            case "function_call":
                call = pb.ToolCall(id=item.call_id, name=item.name, arguments=item.arguments or "{}")
                if not turns or turns[-1].role != "assistant":  # the calls of an answer belong to its turn
                    turns.append(pb.ChatMessage(role="assistant"))
                turns[-1].tool_calls.append(call)
            case "function_call_output":
                content = _text(item.output, f"input[{index}].output")
                turns.append(pb.ChatMessage(role="tool", content=content, tool_call_id=item.call_id))
            case "reasoning":
                pass  # what was thought before is not read again
            case _:
                raise Unsupported(
                    f"input[{index}] is of type {item.type[:40]!r}; this mesh reads messages, function calls "
                    "and their outputs",
                    field=f"input[{index}].type",
                )
    return turns


def _text(content: str | list[Part] | None, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for position, part in enumerate(content):
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise Unsupported(
                f"{field}[{position}] is of type {part.type[:40]!r}; this mesh reads text only",
                field=f"{field}[{position}].type",
            )
    return "\n".join(part.text or "" for part in content)


def _tools(body: Body) -> pb.Tools | None:
    choice, offered = body.tool_choice, []
    named = choice.name if isinstance(choice, NamedTool) and choice.type == "function" else ""
    for index, tool in enumerate(body.tools or ()):
        if tool.type != "function":
            raise no_function(tool.type, f"tools[{index}]")
        offered.append(function_offered(tool.name, tool.description, bytes(tool.parameters)))
    return tools_wanted(offered, choice, named, parallel=body.parallel_tool_calls)


def _overrides(body: Body) -> SamplingOverrides:
    form = (body.text and body.text.format) or Format(type="text")
    wants_logprobs = LOGPROBS in (body.include or ()) or body.top_logprobs is not None
    return SamplingOverrides(
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        constraint=format_constraint(form.type, bytes(form.schema), "text.format", "schema"),
    )


def _told(body: Body) -> dict[str, Any]:
    """What a response repeats of its request."""
    reasoning = body.reasoning or Reasoning()
    form = body.text.format if body.text and body.text.format else None
    named = isinstance(body.tool_choice, NamedTool)
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "safety_identifier": body.safety_identifier,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"} if form is None else _form(form)},
        "tool_choice": _named(body.tool_choice) if named else body.tool_choice or "auto",
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _form(form: Format) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "name": form.name, "schema": form.schema, "strict": form.strict}


def _named(choice: object) -> dict[str, str]:
    assert isinstance(choice, NamedTool)
    return {"type": choice.type, "name": choice.name}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    about = {"type": tool.type, "name": tool.name, "description": tool.description}
    return {**about, "parameters": tool.parameters, "strict": tool.strict}


def size_bytes(turns: Iterable[Message]) -> int:
    """What turns take in memory, roughly."""
    texts: Sequence[str] = [
        text
        for turn in turns
        for text in (
            turn.content,
            *(part for call in turn.tool_calls for part in (call.name, call.arguments)),
        )
    ]
    return sum(len(text) for text in texts)
