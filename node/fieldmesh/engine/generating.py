"""One generation of the engine's loop. Owns: its text, reasoning and calls, and what its next token must be.
Must not: draw, or know the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fieldmesh.core.model import Logprobs, Sampling, ToolCallPart
from fieldmesh.core.reasoning import AnswerStream
from fieldmesh.core.tools import merged

if TYPE_CHECKING:
    from fieldmesh.engine.loop import Drawn, Draws


@dataclass(slots=True, kw_only=True)
class Generation:
    """``index`` counts its tokens, ``close_tokens`` end a reasoning that has become too long, a ``single``
    call ends the answer. ``text``, ``reasoning``, ``tool_calls`` and ``logprobs`` are those of one step."""

    key: int
    sampling: Sampling
    seed: int
    stream: AnswerStream
    sampler: Draws
    stop_tokens: frozenset[int]
    index: int
    close_tokens: tuple[int, ...] = ()
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    single: bool = False
    logprobs: tuple[Logprobs, ...] = ()

    @property
    def forced(self) -> int | None:
        """The token that must come next: of the end of the reasoning, once it has its most tokens.

        A function of the text so far alone, so that a resumed generation is forced as the first one was.
        """
        most, stream = self.sampling.reasoning_tokens_max, self.stream
        if most is None or not stream.inside or stream.reasoning_tokens < most:
            return None
        behind = stream.reasoning_tokens - most
        return self.close_tokens[behind] if behind < len(self.close_tokens) else None

    def begin_step(self) -> None:
        """What was taken in the last step is told."""
        self.text = self.reasoning = ""
        self.logprobs, self.tool_calls = (), ()

    def take(self, drawn: Drawn, piece: bytes) -> bool:
        """Add a token's text to that of this step; True if the generation ends with it."""
        self.index += 1
        if drawn.logprobs:
            self.logprobs += (drawn.logprobs,)
        if drawn.token_id in self.stop_tokens:
            return True
        reasoning, text, calls = self.stream.push(piece)
        self.reasoning, self.text = self.reasoning + reasoning, self.text + text
        if calls:
            self.tool_calls = merged((*self.tool_calls, *calls))
        called = self.single and self.stream.calls > 0
        return drawn.ends or called or bool(self.stream.matched_stop)
