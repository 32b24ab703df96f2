"""Answers of the OpenAI API: what a generation yields, as events of a stream or as one document; and errors.

A frame is joined from bytes that are made once for each stream and the JSON of the text alone. Owns: the
shapes that clients read. Must not: perform I/O, or know HTTP beyond the bytes of a body.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from fieldmesh.core.errors import FieldmeshError, Status
from fieldmesh.core.model import (
    Chunk,
    Completion,
    Embeddings,
    Logprobs,
    Result,
    TokenLogprob,
    ToolCallPart,
)
from fieldmesh.core.tools import Calls
from fieldmesh.rpc.errors import METADATA_VALUE_CHARS_MAX, clipped

DONE: Final = b"data: [DONE]\n\n"
LOGPROB_LEAST: Final = -9999.0
"""What the API says where a probability is 0: JSON has no infinity."""

encode: Final = msgspec.json.encode

# Where the API has a word of its own for what happened, clients look for that.
_CODES: Final = {
    "MODEL_NOT_FOUND": "model_not_found",
    "PROFILE_NOT_FOUND": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
    "TOO_MANY_STREAMS": "rate_limit_exceeded",
    "QUOTA_EXCEEDED": "rate_limit_exceeded",
}
_TYPES: Final = {
    Status.RESOURCE_EXHAUSTED: "rate_limit_error",
    Status.UNAVAILABLE: "server_error",
    Status.INTERNAL: "server_error",
    Status.UNKNOWN: "server_error",
    Status.DEADLINE_EXCEEDED: "server_error",
}


def envelope(message: str, *, kind: str, code: str, param: str | None = None) -> bytes:
    """The document that says what went wrong."""
    return encode({"error": {"message": message, "type": kind, "param": param or None, "code": code}})


def error_document(error: FieldmeshError) -> bytes:
    """``error`` in the API's words: parameters by the names that its clients use."""
    return envelope(
        clipped(told(error.message)),
        kind=_TYPES.get(error.status, "invalid_request_error"),
        code=_CODES.get(error.code, error.code.lower()),
        param=clipped(told(error.field), METADATA_VALUE_CHARS_MAX),
    )


def told(text: str) -> str:
    """``text`` without the prefixes that fields have in our own protocol."""
    return text.replace("sampling_params.", "").replace("target.", "").replace("tools.named", "tool_choice")


def error_event(error: FieldmeshError) -> bytes:
    """The event that ends a stream which had begun."""
    return b"data: " + error_document(error) + b"\n\n"


def usage_of(result: Result) -> dict[str, Any]:
    """Token counts."""
    usage = result.completion.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def finish_reasons(completion: Completion) -> dict[int, str]:
    """Why each completion ended, by its index."""
    if not completion.choices:
        return {0: completion.finish_reason.value}
    return {choice.index: choice.finish_reason.value for choice in completion.choices}


def embeddings_document(made: Embeddings, model: str, *, base64: bool) -> bytes:
    """Vectors as numbers, or as the base64 of little-endian 32-bit floats."""
    entries = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if base64 else vector}
        for index, vector in enumerate(made.vectors)
    ]
    usage = {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens}
    return encode({"object": "list", "data": entries, "model": model, "usage": usage})


def _packed(vector: Sequence[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class Answer:
    """One answer in one of the API's two dialects, as a stream of events or as one document.

    ``model`` is the name of the model that answers, ``created`` a Unix time in seconds.
    """

    content_type = "text/event-stream; charset=utf-8"

    def __init__(self, *, chat: bool, answer_id: str, model: str, created: int, include_usage: bool) -> None:
        self._chat = chat
        self._about = {"id": answer_id, "created": created, "model": model}
        self._include_usage = include_usage
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._reasoning: defaultdict[int, list[str]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[Logprobs]] = defaultdict(list)
        self._calls = Calls()
        self._offsets: defaultdict[int, int] = defaultdict(int)
        self._begun: set[int] = set()
        self._object = "chat.completion.chunk" if chat else "text_completion"
        opened = encode({**self._about, "object": self._object})[:-1]
        self._head = b"data: " + opened + b',"choices":[{"index":'
        usage = b',"usage":null' if include_usage else b""
        self._tail = b',"finish_reason":null}]' + usage + b"}\n\n"
        self._text = b',"delta":{"content":' if chat else b',"text":'
        self._text_end = b"}" if chat else b""
        self._first_text = b',"delta":{"role":"assistant","content":' if chat else self._text
        self._likelihoods: Callable[[int, tuple[Logprobs, ...]], dict[str, Any]] = (
            self._chat_logprobs if chat else self._text_logprobs
        )

    # --- a stream ------------------------------------------------------------------------

    def event(self, chunk: Chunk) -> bytes:
        """The event of one chunk; nothing where it tells nothing yet."""
        first = chunk.index not in self._begun
        if not (chunk.text or chunk.logprobs or chunk.reasoning or chunk.tool_calls or first):
            return b""
        self._begun.add(chunk.index)
        opening = self._first_text if first else self._text
        index = b"%d" % chunk.index
        logprobs = b',"logprobs":null'
        if chunk.logprobs:
            logprobs = b',"logprobs":' + encode(self._likelihoods(chunk.index, chunk.logprobs))
        text = encode(chunk.text)
        if chunk.reasoning and self._chat:
            text += b',"reasoning_content":' + encode(chunk.reasoning)
        if chunk.tool_calls and self._chat:
            text += b',"tool_calls":' + encode([_call_part(chunk, part) for part in chunk.tool_calls])
        return b"".join((self._head, index, opening, text, self._text_end, logprobs, self._tail))

    def end(self, result: Result) -> bytes:
        """The events that end the stream."""
        empty: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        about = {**self._about, "object": self._object}
        documents = [
            {**about, "choices": [{"index": index, **empty, "logprobs": None, "finish_reason": why}], **usage}
            for index, why in finish_reasons(result.completion).items()
        ]
        if self._include_usage:
            documents.append({**about, "choices": [], "usage": usage_of(result)})
        return b"".join(b"data: " + encode(document) + b"\n\n" for document in documents) + DONE

    # --- one document --------------------------------------------------------------------

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk for ``document``."""
        self._texts[chunk.index].append(chunk.text)
        self._reasoning[chunk.index].append(chunk.reasoning)
        self._calls.add(chunk)
        self._logprobs[chunk.index].extend(chunk.logprobs)

    def document(self, result: Result) -> bytes:
        """The whole answer."""
        choices = [
            {
                "index": index,
                **self._whole(index),
                "logprobs": self._likelihoods(index, tuple(self._logprobs[index]))
                if self._logprobs[index]
                else None,
                "finish_reason": why,
            }
            for index, why in finish_reasons(result.completion).items()
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return encode({**self._about, "object": kind, "choices": choices, "usage": usage_of(result)})

    def _whole(self, index: int) -> dict[str, Any]:
        text, reasoning = "".join(self._texts[index]), "".join(self._reasoning[index])
        if not self._chat:
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls := self._calls.of(index):
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        return {"message": message}

    # --- log-probabilities ---------------------------------------------------------------

    def _chat_logprobs(self, index: int, entries: tuple[Logprobs, ...]) -> dict[str, Any]:
        return {"content": likelihoods(entries), "refusal": None}

    def _text_logprobs(self, index: int, entries: tuple[Logprobs, ...]) -> dict[str, Any]:
        tokens = [_piece(entry.drawn) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_logprob(entry.drawn) for entry in entries],
            "top_logprobs": [{_piece(other): _logprob(other) for other in entry.top} for entry in entries],
            "text_offset": offsets,
        }


def likelihoods(entries: Sequence[Logprobs]) -> list[dict[str, Any]]:
    """How likely each token of an answer was, and the likeliest in its place."""
    return [
        {**_token(entry.drawn), "top_logprobs": [_token(other) for other in entry.top]} for entry in entries
    ]


def _call_part(chunk: Chunk, part: ToolCallPart) -> dict[str, Any]:
    if not part.name:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": chunk.call_id(part), "type": "function", "function": function}


def _piece(entry: TokenLogprob) -> str:
    return entry.piece.decode("utf-8", "replace")


def _logprob(entry: TokenLogprob) -> float:
    return max(entry.logprob, LOGPROB_LEAST)


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": _piece(entry), "logprob": _logprob(entry), "bytes": list(entry.piece)}
