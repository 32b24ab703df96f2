"""Text of a generation as a pure function of its tokens' bytes and its stop strings.

Owns: incremental UTF-8 decoding, hold-back before a possible stop string, the decision that a stop
string has been matched. Must not: know tokenizers, sampling or where the text goes.

What has been released after n bytes depends on these n bytes and on the stop strings only, never on
how the bytes were cut into pieces. So a stream that is resumed elsewhere can replay the pieces already
delivered, throw away what they release, and go on with exactly the text that was still held back.
"""

from __future__ import annotations

import codecs


class TextStream:
    """Bytes in, text out: ``push`` each token's piece, ``finish`` once at the end.

    Invalid bytes become U+FFFD as Python's incremental decoder (errors="replace") has it. Text never
    ends inside a character, nor in what may be the beginning of a stop string. The stop string whose
    last character comes first wins (of several ending there, the longest); it and all after it is
    never released.
    """

    __slots__ = ("_decoder", "_held", "_stops", "matched_stop")

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = stops
        self._held = ""
        self.matched_stop = ""

    def push(self, piece: bytes) -> str:
        """Take the next bytes; return the text that can be released now (often all, sometimes none)."""
        return self._take(self._decoder.decode(piece))

    def finish(self) -> str:
        """The end of the bytes: an incomplete character becomes U+FFFD, held text is released."""
        released = self._take(self._decoder.decode(b"", final=True))
        if self.matched_stop:
            return released
        held, self._held = self._held, ""
        return released + held

    def _take(self, characters: str) -> str:
        if self.matched_stop or not characters:
            return ""
        text = self._held + characters
        found = min(
            ((start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            _, start, self.matched_stop = found
            self._held = ""
            return text[:start]
        keep = held_back_length(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def held_back_length(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that a stop string begins with (the whole stop excluded)."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
