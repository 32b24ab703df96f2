"""Ask a mesh from Python: ``Client`` in threads, ``AsyncClient`` in an event loop. Needs no engine.

>>> from fieldmesh.client import Client
>>> with Client("127.0.0.1:7420") as client:
...     print(client.chat("What is a mesh?").result().text)

Errors are the leaves of ``fieldmesh.core.errors``; their root ``FieldmeshError`` is exported here.
"""

from fieldmesh.client.aio import AsyncClient, AsyncStream
from fieldmesh.client.calls import Options
from fieldmesh.client.failover import Persistence
from fieldmesh.client.health import serving
from fieldmesh.client.records import (
    Choice,
    Embedded,
    Mesh,
    Node,
    NodeLoad,
    Offer,
    Result,
    SilentNode,
    Tokens,
    Traced,
    as_json,
)
from fieldmesh.client.sync import Client, Stream
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import Address, Chunk, Message, Tool, ToolCall, Tools

__all__ = [
    "Address",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Chunk",
    "Client",
    "Embedded",
    "FieldmeshError",
    "Mesh",
    "Message",
    "Node",
    "NodeLoad",
    "Offer",
    "Options",
    "Persistence",
    "Result",
    "SilentNode",
    "Stream",
    "Tokens",
    "Tool",
    "ToolCall",
    "Tools",
    "Traced",
    "as_json",
    "serving",
]
