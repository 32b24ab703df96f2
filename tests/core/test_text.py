"""Goal: text depends on bytes and stop strings only. Method: properties over arbitrary cuts of the bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.text import TextStream, held_back_length

STOPS = st.lists(st.text(alphabet="ab\n<é🙂", min_size=1, max_size=4), max_size=3).map(tuple)
BYTES = st.one_of(
    st.binary(max_size=40),
    st.text(alphabet="ab\n<é🙂", max_size=30).map(str.encode),
)


def stream(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[str, str, list[str]]:
    text = TextStream(stops)
    released = [text.push(piece) for piece in pieces]
    released.append(text.finish())
    return "".join(released), text.matched_stop, released


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(BYTES, STOPS, st.lists(st.integers(0, 100), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_text_and_stop(
    data: bytes, stops: tuple[str, ...], cuts: list[int]
) -> None:
    assert stream(cut(data, cuts), stops)[:2] == stream([data], stops)[:2]


@given(BYTES)
def test_without_stops_the_text_is_what_python_decodes(data: bytes) -> None:
    assert stream([bytes([b]) for b in data], ())[0] == data.decode("utf-8", errors="replace")


@given(BYTES, STOPS)
def test_text_ends_before_the_first_stop_string_to_be_completed(data: bytes, stops: tuple[str, ...]) -> None:
    text, matched, _ = stream([bytes([b]) for b in data], stops)
    whole = data.decode("utf-8", errors="replace")
    ends = [whole.find(s) + len(s) for s in stops if s in whole]
    if not ends:
        assert (text, matched) == (whole, "")
    else:
        assert matched in stops
        assert text + matched == whole[: min(ends)]


@given(BYTES, STOPS, st.integers(0, 40))
def test_replaying_delivered_pieces_leaves_exactly_the_rest(
    data: bytes, stops: tuple[str, ...], at: int
) -> None:
    pieces = [bytes([b]) for b in data]
    first = TextStream(stops)
    delivered = "".join(first.push(p) for p in pieces[:at])
    again = TextStream(stops)
    assert "".join(again.push(p) for p in pieces[:at]) == delivered
    rest = "".join(again.push(p) for p in pieces[at:]) + again.finish()
    assert delivered + rest == stream(pieces, stops)[0]


@given(BYTES, STOPS)
def test_what_is_held_back_could_still_become_a_stop(data: bytes, stops: tuple[str, ...]) -> None:
    text = TextStream(stops)
    released = text.push(data)
    decoder_text = data.decode("utf-8", errors="ignore") if not stops else None
    if not stops and decoder_text is not None and data == decoder_text.encode():
        assert released == decoder_text
    if not text.matched_stop:
        whole = released + text.finish()
        held = len(whole) - len(released)
        assert held <= max((len(s) - 1 for s in stops), default=0) + 1


def test_an_emoji_cut_in_four_comes_out_whole() -> None:
    text = TextStream()
    assert [text.push(bytes([b])) for b in "🙂".encode()] == ["", "", "", "🙂"]


def test_a_character_that_never_ends_becomes_one_replacement_character() -> None:
    text = TextStream()
    assert text.push(b"a\xf0\x9f") == "a"
    assert text.finish() == "�"


def test_the_longest_of_two_stops_ending_together_is_the_one_matched() -> None:
    text = TextStream(("END", "THE END"))
    assert text.push(b"so: THE END") + text.finish() == "so: "
    assert text.matched_stop == "THE END"


def test_nothing_is_released_after_a_stop() -> None:
    text = TextStream(("x",))
    assert text.push(b"axb") == "a"
    assert text.push(b"more") == ""
    assert text.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(("",))


def test_the_longest_possible_beginning_is_held() -> None:
    assert held_back_length("aab", ("aabx", "bz")) == 3
    assert held_back_length("zzb", ("aabx", "bz")) == 1
    assert held_back_length("zz", ("aabx",)) == 0
