"""Tools in OpenAI's words: what is on offer, what was called, what must be called.

Owns: the shapes of tools that its APIs and Ollama's share. Bounds are those of ``rpc.tools``. Must not:
perform I/O, or know HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fieldmesh.core.errors import InvalidRequest, Unsupported
from fieldmesh.v1 import inference_pb2 as pb


class Function(msgspec.Struct):
    """A function on offer."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"")


class Tool(msgspec.Struct):
    """One of ``tools``."""

    type: str
    function: Function | None = None


class CalledFunction(msgspec.Struct):
    """What an assistant called; the arguments are JSON within JSON."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """One of an assistant's ``tool_calls``."""

    function: CalledFunction
    id: str = ""


class NamedFunction(msgspec.Struct):
    """The one function that ``tool_choice`` demands."""

    name: str


class NamedTool(msgspec.Struct):
    """``tool_choice`` where it demands one function."""

    type: str
    function: NamedFunction | None = None


def offered_function(tool: Tool, field: str) -> pb.Tool:
    """One of ``tools``, where ``field`` says. Raises Unsupported for what is no function."""
    if tool.type != "function" or tool.function is None:
        raise no_function(tool.type, field)
    function = tool.function
    return function_offered(function.name, function.description, bytes(function.parameters))


def function_offered(name: str, description: str | None, parameters: bytes) -> pb.Tool:
    """A function whose schema may be left out."""
    schema = "" if parameters in (b"", b"null") else parameters.decode()
    return pb.Tool(name=name, description=description or "", parameters=schema)


def no_function(kind: str, field: str) -> Unsupported:
    """The refusal of a tool that the API would run itself."""
    return Unsupported(f"{field} is of type {kind[:40]!r}; this mesh knows functions", field=f"{field}.type")


def tools_wanted(
    offered: Sequence[pb.Tool], choice: object, named: str, *, parallel: bool | None
) -> pb.Tools | None:
    """The tools on offer and how they are to be used; None where the model is to call none.

    ``choice`` is ``tool_choice``, and ``named`` the function that it demands. Raises InvalidRequest.
    """
    if not named and choice not in (None, "auto", "none", "required"):
        raise InvalidRequest(
            "tool_choice is none of auto, none, required, and an object of type function that names one",
            field="tool_choice",
        )
    if not offered and (named or choice == "required"):
        raise InvalidRequest("tool_choice demands a call, and tools offers none", field="tool_choice")
    if not offered or choice == "none":
        return None
    return pb.Tools(offered=offered, required=choice == "required", named=named, single=parallel is False)
