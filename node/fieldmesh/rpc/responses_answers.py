"""Answers of OpenAI's Responses API: what a generation yields, as typed events or as one document.

A response is a list of items: what was thought, what was said, what was called, each opened, gone on with and
closed by events that are numbered through. Owns: the shapes that clients read. Must not: perform I/O, or know
HTTP beyond the bytes of a body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import Chunk, FinishReason, Logprobs, Message, Result, ToolCall
from fieldmesh.rpc import openai_answers
from fieldmesh.rpc.errors import clipped
from fieldmesh.rpc.openai_answers import encode, likelihoods, told

_STATUSES: Final = {
    FinishReason.STOP: "completed",
    FinishReason.TOOL_CALLS: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.ABORT: "cancelled",
    FinishReason.ERROR: "cancelled",
}
_EVENT_OF: Final = {"completed": "response.completed", "failed": "response.failed"}


def error_document(error: FieldmeshError) -> bytes:
    """``error`` in the API's words, which has one of its own for the most tokens."""
    return openai_answers.error_document(error).replace(b"max_tokens", b"max_output_tokens")


class _Item:
    """One item. ``kind`` begins its id, ``delta`` names the events that it goes on by."""

    kind = ""
    delta = ""

    def __init__(self, answer_id: str, index: int) -> None:
        self.id = f"{self.kind}_{answer_id}_{index}"
        self.where = {"item_id": self.id, "output_index": index}
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.status = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def document(self) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def part(self) -> dict[str, Any] | None:
        """The one part of its content as it is now; None where it has none."""
        return None

    def last(self) -> dict[str, Any]:
        """What the event says that ends its text."""
        return {"text": self.text}


class _Said(_Item):
    kind = "msg"
    delta = "response.output_text"

    def __init__(self, answer_id: str, index: int) -> None:
        super().__init__(answer_id, index)
        self.where["content_index"] = 0

    def document(self) -> dict[str, Any]:
        content = [self.part()] if self.pieces or self.status != "in_progress" else []
        about = {"id": self.id, "type": "message", "status": self.status, "role": "assistant"}
        return {**about, "content": content}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def last(self) -> dict[str, Any]:
        return {"text": self.text, "logprobs": self.logprobs}


class _Thought(_Item):
    kind = "rs"
    delta = "response.reasoning_text"

    def __init__(self, answer_id: str, index: int) -> None:
        super().__init__(answer_id, index)
        self.where["content_index"] = 0

    def document(self) -> dict[str, Any]:
        content = [self.part()] if self.pieces else []
        about = {"id": self.id, "type": "reasoning", "status": self.status, "summary": []}
        return {**about, "content": content}

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class _Called(_Item):
    kind = "fc"
    delta = "response.function_call_arguments"

    def __init__(self, answer_id: str, index: int, call_id: str, name: str) -> None:
        super().__init__(answer_id, index)
        self.call_id, self.name = call_id, name

    def document(self) -> dict[str, Any]:
        about = {"id": self.id, "type": "function_call", "status": self.status}
        return {**about, "call_id": self.call_id, "name": self.name, "arguments": self.text}

    def last(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.text}


class Response:
    """One response. ``told`` is what it repeats of its request, ``created`` a Unix time in seconds.
    ``on_end`` is called with it before its end is told."""

    content_type = "text/event-stream; charset=utf-8"

    def __init__(
        self,
        *,
        answer_id: str,
        model: str,
        created: int,
        told: dict[str, Any],
        on_end: Callable[[Response], None],
    ) -> None:
        self.id = f"resp_{answer_id}"
        self.status = "in_progress"
        self._answer_id = answer_id
        self._about = {"id": self.id, "object": "response", "created_at": created, "model": model, **told}
        self._on_end = on_end
        self._items: list[_Item] = []
        self._sequence = 0
        self._head = b""
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, str] | None = None

    # --- as it is made ---------------------------------------------------------------------

    def event(self, chunk: Chunk) -> bytes:
        """The events of one chunk."""
        events = [] if self._sequence else self._begun()
        if chunk.reasoning:
            events += self._go_on(_Thought, chunk.reasoning)
        if chunk.text or (chunk.logprobs and not chunk.tool_calls and not chunk.reasoning):
            events += self._go_on(_Said, chunk.text, chunk.logprobs)
        for part in chunk.tool_calls:
            if part.name:
                called = _Called(self._answer_id, len(self._items), chunk.call_id(part), part.name)
                events += self._open(called)
            if part.arguments:
                events.append(self._more(part.arguments))
        return b"".join(events)

    def end(self, result: Result) -> bytes:
        """The events that end the stream."""
        events = [] if self._sequence else self._begun()
        events += self._close(result)
        return b"".join([*events, self._told()])

    def failed(self, error: FieldmeshError) -> bytes:
        """The event that ends a stream which had begun."""
        self.status = "failed"
        self._error = {"code": "server_error", "message": clipped(told(error.message))}
        return self._told()

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk for ``document``."""
        self.event(chunk)

    def document(self, result: Result) -> bytes:
        """The whole response."""
        self._close(result)
        return encode(self.state())

    def state(self) -> dict[str, Any]:
        """The response as it is now."""
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._about,
            "status": self.status,
            "error": self._error,
            "incomplete_details": cut,
            "output": [item.document() for item in self._items],
            "usage": self._usage,
        }

    def turn(self) -> Message:
        """What was answered, as a turn of the conversation."""
        said = [item.text for item in self._items if isinstance(item, _Said)]
        calls = [item for item in self._items if isinstance(item, _Called)]
        return Message(
            role="assistant",
            content="\n".join(said),
            tool_calls=tuple(ToolCall(id=c.call_id, name=c.name, arguments=c.text) for c in calls),
        )

    # --- items -----------------------------------------------------------------------------

    def _begun(self) -> list[bytes]:
        names = ("response.created", "response.in_progress")
        return [self._event(name, {"response": self.state()}) for name in names]

    def _go_on(
        self, kind: type[_Said] | type[_Thought], text: str, logprobs: tuple[Logprobs, ...] = ()
    ) -> list[bytes]:
        opened = self._items[-1] if self._items else None
        events = [] if isinstance(opened, kind) else self._open(kind(self._answer_id, len(self._items)))
        return [*events, self._more(text, likelihoods(logprobs))]

    def _open(self, item: _Item) -> list[bytes]:
        events = self._shut("completed")
        self._items.append(item)
        index = item.where["output_index"]
        events.append(
            self._event("response.output_item.added", {"output_index": index, "item": item.document()})
        )
        if (part := item.part()) is not None:
            events.append(self._event("response.content_part.added", {**item.where, "part": part}))
        constant = encode({"type": f"{item.delta}.delta", **item.where})[:-1]
        self._head = b"event: %s.delta\ndata: %s" % (item.delta.encode(), constant)
        return events

    def _more(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        """What the item that is open goes on by: joined from bytes, for there is one for every few tokens."""
        item = self._items[-1]
        item.pieces.append(text)
        item.logprobs += logprobs or ()
        likely = b',"logprobs":' + encode(logprobs or []) if isinstance(item, _Said) else b""
        number = b',"sequence_number":%d,"delta":' % self._sequence
        self._sequence += 1
        return b"".join((self._head, likely, number, encode(text), b"}\n\n"))

    def _shut(self, status: str) -> list[bytes]:
        """Close the item that is open."""
        if not self._items or (item := self._items[-1]).status != "in_progress":
            return []
        item.status = status
        events = [self._event(f"{item.delta}.done", {**item.where, **item.last()})]
        if (part := item.part()) is not None:
            events.append(self._event("response.content_part.done", {**item.where, "part": part}))
        index = item.where["output_index"]
        return [
            *events,
            self._event("response.output_item.done", {"output_index": index, "item": item.document()}),
        ]

    def _close(self, result: Result) -> list[bytes]:
        events: list[bytes] = []
        if not self._items:
            events += self._open(_Said(self._answer_id, 0))
        self.status = _STATUSES[result.completion.finish_reason]
        events += self._shut("completed" if self.status == "completed" else "incomplete")
        usage = result.completion.usage
        self._usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        self._on_end(self)
        return events

    def _told(self) -> bytes:
        name = _EVENT_OF.get(self.status, "response.incomplete")
        return self._event(name, {"response": self.state()})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        document = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode(document))
