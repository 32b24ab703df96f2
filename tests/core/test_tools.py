"""Calls of tools apart from the answer. Goal: the same text gives the same calls however it is cut.

Method: hypothesis cuts texts full of marks, pieces of marks, objects and halves of objects.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Constraint, ConstraintKind, Tool, ToolCallPart, Tools
from fieldmesh.core.reasoning import AnswerStream
from fieldmesh.core.tools import CLOSE, OPEN, CallStream, merged, parsed_call, tools_constraint

NAMES = ("f", "get_weather")
pieces = st.sampled_from(
    [
        *(OPEN, CLOSE, "<", "<tool", "_call>", "</tool", " ", "\n", "a", "é"),
        *(
            '{"name": "f", "arguments": {',
            '{"name":"f","parameters":{}}',
            '{"name": "nobody", "arguments": {}}',
        ),
        *('{"arguments": {"a": 1}, "name": "f"}', '{"city": "Rome"}', '{"name": "f", "arguments": "{}"}'),
        *("{", "}", "[", "]", '"', "\\", ":", ",", '"}"', '{"type": "function", "function": {', "}}"),
    ]
)
texts = st.lists(pieces, max_size=14).map("".join)
Heard = tuple[str, list[tuple[str, str]], int]


def cut(text: str, places: list[int]) -> Heard:
    stream = CallStream(NAMES)
    said, parts = "", list[ToolCallPart]()
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for start, end in pairwise(edges):
        more, calls = stream.push(text[start:end])
        said, parts = said + more, [*parts, *calls]
    more, calls = stream.finish()
    whole = merged((*parts, *calls))
    assert [part.index for part in whole] == list(range(len(whole)))
    assert stream.called == bool(whole)
    return said + more, [(part.name, part.arguments) for part in whole], stream.complete


def heard(text: str) -> Heard:
    return cut(text, [])


@given(texts, st.lists(st.integers(0, 200), max_size=12))
@example(f' {OPEN}\n{{"name": "f", "arguments": {{"a": "}}"}}}}\n{CLOSE}\n', [3, 14, 33, 40, 48, 55])
def test_the_cuts_make_no_difference(text: str, places: list[int]) -> None:
    assert cut(text, places) == heard(text)


@given(texts)
def test_nothing_is_lost_but_calls_and_the_space_around_them(text: str) -> None:
    said, calls, _ = heard(text)
    if not calls:
        assert said == text


@given(st.text(max_size=40).filter(lambda text: OPEN not in text and not text.lstrip().startswith("{")))
def test_an_answer_without_calls_is_told_as_it_is(text: str) -> None:
    assert heard(text) == (text, [], 0)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.lists(st.integers()), max_size=3))
def test_arguments_come_as_they_were_written(arguments: dict[str, object]) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    call = f'{{"name": "f", "arguments": {written}}}'
    assert heard(call) == ("", [("f", written)], 1)
    assert heard(f"So: {OPEN}{call}{CLOSE} {OPEN}\n{call}\n{CLOSE}") == ("So:", [("f", written)] * 2, 2)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{}"}}', "", [("f", "{}")]),
        ('{"name": "f", "arguments": {}, "id": "x"} and more', "and more", [("f", "{}")]),
        ('{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {}}', "", [("f", "{}"), ("f", "{}")]),
        (f'{OPEN}{{"name": "f"}}', "", [("f", "{}")]),
        (f'{OPEN}{{"name": "f", "arguments": {{"a": [1', "", [("f", '{"a": [1')]),
        (f'{OPEN}{{"name": "nobody", "arguments": {{}}}}{CLOSE}', None, []),
        (f"{OPEN} what? {CLOSE}", None, []),
        ('{"name": "Rome", "size": 3}', None, []),
        ('Write {"name": "f", "arguments": {}}', None, []),
        (f'{OPEN}{{"name": "f", "arguments": "no"}}', None, []),
    ],
)
def test_what_is_a_call_and_what_is_text(text: str, said: str | None, calls: list[tuple[str, str]]) -> None:
    assert heard(text)[:2] == (text if said is None else said, calls)


def test_the_name_is_told_before_the_arguments_are_complete() -> None:
    stream = CallStream(NAMES)
    assert stream.push(f'{OPEN}{{"name": "f", "arguments": ') == ("", ())
    assert stream.push('{"city"') == ("", (ToolCallPart(index=0, name="f", arguments='{"city"'),))
    assert stream.push(': "Rome"}') == ("", (ToolCallPart(index=0, arguments=': "Rome"}'),))
    assert (stream.push("}"), stream.complete) == (("", ()), 1)


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    stream = CallStream(NAMES)
    assert stream.push("x <tool")[0] == "x"
    assert stream.push("box> {")[0] == " <toolbox> {"
    assert CallStream(NAMES).push('{"city":')[0] == '{"city":'


def test_calls_come_after_the_reasoning_and_end_at_stop_strings() -> None:
    call = f'{OPEN}{{"name": "f", "arguments": {{}}}}{CLOSE}'
    stream = AnswerStream(("STOP",), thinks=True, calls=CallStream(NAMES))
    told = stream.push(f"<think>{call}</think>{call}STOP{call}".encode())
    assert told == (call, "", (ToolCallPart(index=0, name="f", arguments="{}"),))
    assert (stream.finish(), stream.calls, stream.matched_stop) == (("", "", ()), 1, "STOP")


def test_nesting_without_an_end_is_no_call() -> None:
    deep = '{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert heard(deep) == (deep, [], 0)
    assert parsed_call("[]", NAMES) is None


def test_a_constraint_names_only_what_may_be_called() -> None:
    offered = (Tool(name="f"), Tool(name="g", parameters="{}"))
    answer = Constraint(kind=ConstraintKind.JSON_SCHEMA, source='{"type": "object"}')

    def source(tools: Tools, answer: Constraint | None) -> object:
        return json.loads(tools_constraint(tools, answer).source)

    assert source(Tools(offered=offered, required=True), answer) == {"tools": [["f", ""], ["g", "{}"]]}
    assert source(Tools(offered=offered, required=True, named="g"), None) == {"tools": [["g", "{}"]]}
    assert source(Tools(offered=offered), answer) == {
        "tools": [["f", ""], ["g", "{}"]],
        "answer": answer.source,
    }
    with pytest.raises(InvalidRequest) as caught:
        tools_constraint(Tools(offered=offered), Constraint(kind=ConstraintKind.REGEX, source="a"))
    assert caught.value.field == "sampling_params.regex"
