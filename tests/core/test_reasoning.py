"""Reasoning apart from the answer. Goal: the same bytes give the same texts however tokens cut them.

Method: hypothesis cuts texts full of marks, pieces of marks, white space and stop strings.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fieldmesh.core.reasoning import AnswerStream
from fieldmesh.core.text import TextStream

parts = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<",
        "/",
        "think",
        ">",
        "</th",
        "<thi",
        " ",
        "\n",
        "a",
        "bc",
        "é",
        "🙂",
        "STOP",
        "ST",
    ]
)
texts = st.lists(parts, max_size=14).map("".join)
stops = st.sampled_from([(), ("STOP",), ("a",), ("\n",)])
modes = st.sampled_from([(False, False), (True, False), (True, True)])


def whole(data: bytes, stop: tuple[str, ...], mode: tuple[bool, bool]) -> tuple[str, str, str]:
    return cut(data, [], stop, mode)[:3]


def cut(
    data: bytes, places: list[int], stop: tuple[str, ...], mode: tuple[bool, bool]
) -> tuple[str, str, str, int]:
    stream = AnswerStream(stop, thinks=mode[0], inside=mode[1])
    reasoning = answer = ""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    for start, end in pairwise(edges):
        more = stream.push(data[start:end])
        reasoning, answer = reasoning + more[0], answer + more[1]
    more = stream.finish()
    return reasoning + more[0], answer + more[1], stream.matched_stop, stream.reasoning_tokens


@given(texts, st.lists(st.integers(0, 80), max_size=12), stops, modes)
@example("<think> a </think>\n b", [3, 9, 12, 17], (), (True, False))
def test_the_cuts_make_no_difference(
    text: str, places: list[int], stop: tuple[str, ...], mode: tuple[bool, bool]
) -> None:
    data = text.encode()
    assert cut(data, places, stop, mode)[:3] == whole(data, stop, mode)


@given(texts, stops)
def test_a_model_that_does_not_think_is_left_alone(text: str, stop: tuple[str, ...]) -> None:
    plain = TextStream(stop)
    expected = plain.push(text.encode()) + plain.finish()
    assert whole(text.encode(), stop, (False, False)) == ("", expected, plain.matched_stop)


@pytest.mark.parametrize(
    ("text", "mode", "reasoning", "answer"),
    [
        ("<think>why</think>because", (True, False), "why", "because"),
        ("\n<think>\n why \n</think>\n\n because \n", (True, False), "why", "because \n"),
        ("why</think>because", (True, True), "why", "because"),
        ("why, oh why", (True, True), "why, oh why", ""),
        ("because <think>no</think>", (True, False), "", "because <think>no</think>"),
        ("<think></think>because", (True, False), "", "because"),
        ("<thin air", (True, False), "", "<thin air"),
        ("<think>a</think>b</think>c", (True, False), "a", "b</think>c"),
        ("why </thi", (True, True), "why </thi", ""),
        ("", (True, False), "", ""),
    ],
)
def test_reasoning_and_answer_are_told_apart(
    text: str, mode: tuple[bool, bool], reasoning: str, answer: str
) -> None:
    assert whole(text.encode(), (), mode)[:2] == (reasoning, answer)


def test_a_stop_string_counts_in_the_answer_alone() -> None:
    assert whole(b"<think>STOP it</think>go STOP on", ("STOP",), (True, False)) == ("STOP it", "go ", "STOP")


@pytest.mark.parametrize(
    ("pieces", "mode", "tokens"),
    [
        (["<think>", "a", "b", "</think>", "c"], (True, False), 4),
        (["<th", "ink>", "a", "</think>", "c", "d"], (True, False), 4),
        (["a", "b", "</think>", "c"], (True, True), 3),
        (["a", "b"], (True, True), 2),
        (["a", "b"], (True, False), 0),
        (["\n", "a", "b"], (True, False), 0),
        (["<think>a</think>b"], (True, False), 1),
    ],
)
def test_the_tokens_of_the_reasoning_are_counted_marks_included(
    pieces: list[str], mode: tuple[bool, bool], tokens: int
) -> None:
    stream = AnswerStream(thinks=mode[0], inside=mode[1])
    for piece in pieces:
        stream.push(piece.encode())
    assert stream.reasoning_tokens == tokens
