"""Calls of tools in an answer, as a pure function of its text.

Owns: where a call begins and ends, which tool it names, when that has become certain. Must not: know
templates, or run a tool: the caller does.

Two ways of writing a call are read, which most models were trained on: an object with ``name`` and
``arguments`` (or ``parameters``) between OPEN and CLOSE, anywhere in the answer; and the bare object, where
the answer, or what follows a call, begins with it. An object that names no tool on offer is text. As in
``core.text``, what has been released after n characters depends on these alone, never on how they were cut.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Final

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Chunk, Constraint, ConstraintKind, ToolCall, ToolCallPart, Tools
from fieldmesh.core.text import held_back_length

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_KEYS: Final = ("name", "arguments", "parameters", "type", "id", "function")
"""What a call's object may begin with; of these the first three tell a call."""
_STRING: Final = r'"(?:[^"\\]|\\.)*"'
_HEAD: Final = re.compile(
    rf'\{{\s*"name"\s*:\s*(?P<name>{_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)', re.DOTALL
)
_FIRST_KEY: Final = re.compile(rf"\{{\s*(?P<key>{_STRING})", re.DOTALL)
_NO_KEY: Final = re.compile(r'\{\s*[^"\s]')


class _At(Enum):
    TEXT = "text"
    OPENED = "opened"
    OBJECT = "object"
    ARGUMENTS = "arguments"
    REST = "rest"
    CLOSING = "closing"


class _Nesting:
    """How deep in objects and lists a JSON text is, a character at a time."""

    __slots__ = ("_escaped", "_quoted", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str, start: int, depth: int) -> int:
        """Index behind the character that brings the depth down to ``depth``; -1 where none does."""
        for index in range(start, len(text)):
            character = text[index]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= depth:
                    return index + 1
        return -1


class CallStream:
    """Text in; text and calls out: ``push`` what an answer goes on with, ``finish`` once at the end.

    ``names`` are the tools on offer. White space around a call belongs to nothing.
    """

    __slots__ = ("_at", "_called", "_held", "_mark", "_names", "_nesting", "_read", "_start", "complete")

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._at = _At.TEXT
        self._start = True  # of the answer, or behind a call: nothing but white space since
        self._held = ""
        self._mark = ""  # what stood before the object that is read, if it is no call after all
        self._nesting = _Nesting()
        self._read = 0  # characters of ``_held`` that the nesting has seen
        self._called = 0
        self.complete = 0
        """Calls whose end was seen."""

    @property
    def called(self) -> bool:
        """Whether a call has begun."""
        return self._called > 0

    def push(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Take more of the answer; return the text and the parts of calls that can be released now."""
        self._held += text
        return self._advance(final=False)

    def finish(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        """The end of the answer: what was held back is released."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> tuple[str, tuple[ToolCallPart, ...]]:
        texts: list[str] = []
        parts: list[ToolCallPart] = []
        while self._step(texts, parts, final):
            pass
        return "".join(texts), merged(parts)

    def _step(self, texts: list[str], parts: list[ToolCallPart], final: bool) -> bool:
        """Go on by one stretch of what is held; False where more of it is needed."""
        match self._at:
            case _At.TEXT:
                return self._text(texts, final)
            case _At.OPENED:
                return self._opened(texts, final)
            case _At.OBJECT:
                return self._object(texts, parts, final)
            case _At.ARGUMENTS:
                return self._arguments(parts)
            case _At.REST:
                return self._rest()
            case _At.CLOSING:
                return self._closing(final)

    def _text(self, texts: list[str], final: bool) -> bool:
        if self._start:
            begun = self._held.lstrip()
            if begun.startswith("{"):
                self._begin(begun, "" if self._called else self._held[: -len(begun)])
                return True
            if not begun and not final:
                return False
        opened = self._held.find(OPEN)
        if opened >= 0:
            before = self._held[:opened].rstrip()
            texts.append(before)
            behind_a_call = self._start and self._called and not before
            self._mark = OPEN if behind_a_call else self._held[len(before) : opened] + OPEN
            self._start = self._start and not before
            self._held, self._at = self._held[opened + len(OPEN) :], _At.OPENED
            return True
        keep = 0 if final else held_back_length(self._held, (OPEN,))
        if not final:  # white space before a call is not told
            keep = len(self._held) - len(self._held[: len(self._held) - keep].rstrip())
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if self._start and self._called:
            told = told.lstrip()
        self._start = self._start and not told.strip()
        texts.append(told)
        return False

    def _opened(self, texts: list[str], final: bool) -> bool:
        inner = self._held.lstrip()
        if inner.startswith("{"):
            self._begin(inner, self._mark + self._held[: -len(inner)])
            return True
        if inner or final:
            self._give_up(texts)
            return True
        return False

    def _begin(self, text: str, mark: str) -> None:
        self._held, self._mark, self._at = text, mark, _At.OBJECT
        self._nesting, self._read = _Nesting(), 0

    def _give_up(self, texts: list[str]) -> None:
        """It was no call: what looked like the beginning of one is text."""
        texts.append(self._mark + self._held[:1])
        self._held, self._at, self._start = self._held[1:], _At.TEXT, False

    def _object(self, texts: list[str], parts: list[ToolCallPart], final: bool) -> bool:
        """The object up to its arguments, or the whole of one that is written in another order."""
        if (head := _HEAD.match(self._held)) is not None:
            if (name := _string(head["name"])) not in self._names:
                self._give_up(texts)
                return True
            parts.append(self._call(name))
            self._held, self._at = self._held[head.end() :], _At.ARGUMENTS
            self._nesting, self._read = _Nesting(), 0
            return True
        first = _FIRST_KEY.match(self._held)
        if _NO_KEY.match(self._held) or (first and _string(first["key"]) not in _KEYS):
            self._give_up(texts)
            return True
        end = self._nesting.end(self._held, self._read, 0)
        self._read = len(self._held)
        if end < 0:
            if final:
                self._give_up(texts)
            return final
        found = parsed_call(self._held[:end], self._names)
        if found is None:
            self._give_up(texts)
            return True
        name, arguments = found
        parts += [self._call(name), ToolCallPart(index=self._called - 1, arguments=arguments)]
        self._held = self._held[end:]
        self._ended()
        return True

    def _call(self, name: str) -> ToolCallPart:
        self._called += 1
        return ToolCallPart(index=self._called - 1, name=name)

    def _ended(self) -> None:
        self.complete += 1
        self._at, self._start = _At.CLOSING, True

    def _arguments(self, parts: list[ToolCallPart]) -> bool:
        end = self._nesting.end(self._held, 0, 0)
        told = self._held if end < 0 else self._held[:end]
        if told:
            parts.append(ToolCallPart(index=self._called - 1, arguments=told))
        self._held = self._held[len(told) :]
        if end < 0:
            return False
        self._at, self._nesting = _At.REST, _Nesting()
        self._nesting.depth = 1
        return True

    def _rest(self) -> bool:
        """What follows the arguments within the object says nothing more."""
        end = self._nesting.end(self._held, 0, 0)
        if end < 0:
            self._held = ""
            return False
        self._held = self._held[end:]
        self._ended()
        return True

    def _closing(self, final: bool) -> bool:
        rest = self._held.lstrip()
        if rest.startswith(CLOSE):
            self._held = rest[len(CLOSE) :]
        elif CLOSE.startswith(rest) and not final:
            return False
        elif final and CLOSE.startswith(rest):
            self._held = ""
        self._at = _At.TEXT
        return True


class Calls:
    """The calls of an answer, put together from their pieces."""

    def __init__(self) -> None:
        self._by_choice: defaultdict[int, dict[int, ToolCall]] = defaultdict(dict)

    def add(self, chunk: Chunk) -> None:
        """Keep the pieces that a chunk holds."""
        calls = self._by_choice[chunk.index]
        for part in chunk.tool_calls:
            begun = calls.get(part.index) or ToolCall(id=chunk.call_id(part), name=part.name, arguments="")
            calls[part.index] = replace(begun, arguments=begun.arguments + part.arguments)

    def of(self, index: int) -> list[ToolCall]:
        """Those of one completion, in order."""
        return list(self._by_choice[index].values())


def parsed_call(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Name and arguments of the call that an object of JSON is, in whatever order; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]
    if not isinstance(found, dict) or not isinstance(name := found.get("name"), str) or name not in names:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI's API has it
        try:
            inner = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
        return (name, arguments or "{}") if isinstance(inner, dict) else None
    if not isinstance(arguments, dict | None):
        return None
    return name, json.dumps(arguments or {}, ensure_ascii=False)


def merged(parts: Sequence[ToolCallPart]) -> tuple[ToolCallPart, ...]:
    """The same parts, those of one call that follow each other as one."""
    made: list[ToolCallPart] = []
    for part in parts:
        if made and made[-1].index == part.index and not part.name:
            last = made.pop()
            made.append(
                ToolCallPart(index=last.index, name=last.name, arguments=last.arguments + part.arguments)
            )
        else:
            made.append(part)
    return tuple(made)


def tools_constraint(tools: Tools, answer: Constraint | None) -> Constraint:
    """What holds an answer to one call where one is required, and else to a call or to ``answer``.

    Its source is what ``engine.grammars`` makes a grammar of. Raises InvalidRequest.
    """
    callable_ = [tool for tool in tools.offered if tools.named in ("", tool.name)]
    source: dict[str, object] = {"tools": [[tool.name, tool.parameters] for tool in callable_]}
    if not tools.required and answer is not None:
        if answer.kind not in (ConstraintKind.JSON_SCHEMA, ConstraintKind.JSON_OBJECT):
            raise InvalidRequest(
                f"{answer.field} cannot hold beside tools: leave one of them out, or use json_schema",
                field=answer.field,
            )
        source["answer"] = answer.source
    return Constraint(kind=ConstraintKind.TOOLS, source=json.dumps(source))


def _string(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""
