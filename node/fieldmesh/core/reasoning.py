"""Reasoning, answer and calls of tools apart, as a pure function of a generation's bytes.

Owns: where the reasoning of a thinking model begins and ends in its text, and how many tokens it took (calls
are ``core.tools``'s). Must not: know templates, tokenizers or sampling.

As in ``core.text``, what has been released after n bytes depends on these bytes alone, never on how they were
cut; the count of tokens is the one thing that follows the cuts, for tokens are pieces.
"""

from __future__ import annotations

import codecs
from enum import Enum

from fieldmesh.core.model import ToolCallPart
from fieldmesh.core.text import TextStream, held_back_length
from fieldmesh.core.tools import CallStream, merged

OPEN, CLOSE = "<think>", "</think>"


Released = tuple[str, str, tuple[ToolCallPart, ...]]
"""Reasoning, answer, and parts of calls."""


class _At(Enum):
    BEFORE = "before"
    INSIDE = "inside"
    AFTER = "after"


class AnswerStream:
    """Bytes in; reasoning, answer and calls out: ``push`` each token's piece, ``finish`` once at the end.

    ``thinks``: the text may begin with a block between OPEN and CLOSE. ``inside``: the prompt has opened it.
    White space around the reasoning, and between it and the answer, belongs to neither. Stop strings are
    looked for in the answer alone, and before its calls are.
    """

    __slots__ = (
        "_answer",
        "_at",
        "_calls",
        "_decoder",
        "_held",
        "_opened",
        "_pushed",
        "_told",
        "reasoning_tokens",
    )

    def __init__(
        self,
        stops: tuple[str, ...] = (),
        *,
        thinks: bool = False,
        inside: bool = False,
        calls: CallStream | None = None,
    ) -> None:
        self._answer = TextStream(stops)
        self._calls = calls
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = _At.INSIDE if inside else _At.BEFORE if thinks else _At.AFTER
        self._held = ""
        self._told = not (thinks or inside)
        self._opened = inside
        self._pushed = 0
        self.reasoning_tokens = 0

    @property
    def inside(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._at is _At.INSIDE

    @property
    def matched_stop(self) -> str:
        """The stop string that was found; nothing is released after it."""
        return self._answer.matched_stop

    @property
    def calls(self) -> int:
        """Calls whose end was seen."""
        return self._calls.complete if self._calls else 0

    @property
    def called(self) -> bool:
        """Whether a call has begun."""
        return self._calls is not None and self._calls.called

    def push(self, piece: bytes) -> Released:
        """Take a token's bytes; return what can be released now."""
        self._pushed += 1
        was_inside, was_opened = self.inside, self._opened
        reasoning, answer = self._take(self._decoder.decode(piece))
        if was_inside:
            self.reasoning_tokens += 1
        elif self._opened and not was_opened:
            self.reasoning_tokens = self._pushed  # that a block has begun has become certain
        return reasoning, *(self._calls.push(answer) if self._calls else (answer, ()))

    def finish(self) -> Released:
        """The end of the bytes: what was held back is released."""
        reasoning, answer = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        if self._at is _At.INSIDE:
            reasoning += held.rstrip() if held.isspace() else held
        else:
            answer += self._answer.push(held.encode())
        answer += self._answer.finish()
        if self._calls is None:
            return reasoning, answer, ()
        (text, parts), (rest, last) = self._calls.push(answer), self._calls.finish()
        return reasoning, text + rest, merged((*parts, *last))

    def _take(self, characters: str) -> tuple[str, str]:
        text, self._held = self._held + characters, ""
        reasoning = ""
        if self._at is _At.BEFORE:
            start = text.lstrip()
            if start.startswith(OPEN):
                self._at, self._opened, text = _At.INSIDE, True, start[len(OPEN) :]
            elif OPEN.startswith(start):  # nothing but white space and the beginning of the mark, so far
                self._held = text
                return "", ""
            else:
                self._at, self._told = _At.AFTER, True
        if self._at is _At.INSIDE:
            reasoning, text = self._inside(text)
        if self._at is _At.AFTER and not self._told:  # nothing of the answer yet
            text = text.lstrip()
            self._told = bool(text)
        answer = self._answer.push(text.encode()) if self._at is _At.AFTER else ""
        return reasoning, answer

    def _inside(self, text: str) -> tuple[str, str]:
        """The reasoning in ``text``, and what comes behind its end."""
        if not self._told:
            text = text.lstrip()
            self._told = bool(text)
        end = text.find(CLOSE)
        if end >= 0:
            self._at, self._told = _At.AFTER, False
            return text[:end].rstrip(), text[end + len(CLOSE) :]
        keep = held_back_length(text, (CLOSE,))
        keep = len(text) - len(text[: len(text) - keep].rstrip())
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], ""
