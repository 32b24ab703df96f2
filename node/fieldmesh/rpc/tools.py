"""The codec of tools: what may be offered and called, to protobuf and back.

Owns: the bounds of tools and calls. Must not: import grpc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Chunk, Tool, ToolCall, ToolCallPart, Tools
from fieldmesh.v1 import inference_pb2 as pb

TOOLS_MAX: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def tools_from_proto(tools: pb.Tools, bytes_max: int) -> Tools:
    """The tools on offer, of ``bytes_max`` bytes together. Raises InvalidRequest."""
    if not 1 <= len(tools.offered) <= TOOLS_MAX:
        raise InvalidRequest(
            f"tools has {len(tools.offered)} entries; accepted are 1 to {TOOLS_MAX}", field="tools"
        )
    offered: dict[str, Tool] = {}
    for index, tool in enumerate(tools.offered):
        _check_name(tool.name, f"tools[{index}].name")
        if tool.name in offered:
            raise InvalidRequest(
                f"tools[{index}].name is {tool.name!r}, as another's", field=f"tools[{index}].name"
            )
        if tool.parameters:
            _check_object(tool.parameters, f"tools[{index}].parameters")
        offered[tool.name] = Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
    size = sum(len(tool.description.encode()) + len(tool.parameters.encode()) for tool in offered.values())
    if size > bytes_max:
        raise InvalidRequest(
            f"tools hold {size} bytes of text; at most {bytes_max} are accepted", field="tools"
        )
    if tools.named and tools.named not in offered:
        raise InvalidRequest(
            f"tools.named is {tools.named[:64]!r}; on offer are {', '.join(offered)}", field="tools.named"
        )
    return Tools(
        offered=tuple(offered.values()),
        required=tools.required or bool(tools.named),
        named=tools.named,
        single=tools.single,
    )


def check_call(call: ToolCall, role: str, field: str) -> None:
    """Raise InvalidRequest for a call that no model can have made."""
    if role != "assistant":
        raise InvalidRequest(f"{field}: only an assistant's turn holds calls", field=field)
    _check_name(call.name, f"{field}.name")
    _check_object(call.arguments, f"{field}.arguments")


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field} must have 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', ':' and '-'", field=field
        )


def _check_object(text: str, field: str) -> None:
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{field} must be the JSON of an object", field=field) from None


def tools_to_proto(tools: Tools) -> pb.Tools:
    """The tools on offer."""
    offered = [
        pb.Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
        for tool in tools.offered
    ]
    return pb.Tools(offered=offered, required=tools.required, named=tools.named, single=tools.single)


def calls_from_proto(calls: Iterable[pb.ToolCall]) -> tuple[ToolCall, ...]:
    """Calls of a turn, unchecked."""
    return tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls)


def calls_to_proto(calls: Iterable[ToolCall]) -> list[pb.ToolCall]:
    """Calls of a turn."""
    return [pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls]


def parts_from_proto(parts: Iterable[pb.ToolCallPart]) -> tuple[ToolCallPart, ...]:
    """Pieces of calls; their ids follow from their chunk."""
    return tuple(ToolCallPart(index=part.index, name=part.name, arguments=part.arguments) for part in parts)


def parts_to_proto(chunk: Chunk) -> list[pb.ToolCallPart]:
    """Pieces of calls with their ids."""
    return [
        pb.ToolCallPart(index=part.index, id=chunk.call_id(part), name=part.name, arguments=part.arguments)
        for part in chunk.tool_calls
    ]
