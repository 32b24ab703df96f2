"""Constraints. Goal: what may be drawn is what the constraint says; what cannot be enforced is refused with a
reason, and nothing that a stranger sends harms the engine. Method: llguidance itself, tokens that are bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, product
from string import ascii_lowercase

import pytest

from fieldmesh.core.errors import ConstraintInvalid, Internal, InvalidRequest, QueueFull
from fieldmesh.core.model import Constraint, ConstraintKind
from fieldmesh.engine.grammars import WAITING_MAX, Grammars, Matcher, Vocabulary, compiled
from fieldmesh.engine.trial import Trial

END = 256
VOCABULARY = Vocabulary([*(bytes([b]) for b in range(256)), b"</s>", b"true", b'"a"'], [END], [END])
TOKENIZER = VOCABULARY.tokenizer()
TIMEOUT_S = 30.0


def schema(source: str) -> Constraint:
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, source=source)


def regex(source: str) -> Constraint:
    return Constraint(kind=ConstraintKind.REGEX, source=source)


def grammar(source: str) -> Constraint:
    return Constraint(kind=ConstraintKind.GRAMMAR, source=source)


def walk(constraint: Constraint) -> Matcher:
    return Matcher(compiled(TOKENIZER, constraint), constraint)


def possible(matcher: Matcher) -> set[int]:
    return set(matcher.allowed().nonzero()[0].tolist())


def test_only_what_continues_a_match_is_allowed() -> None:
    matcher = walk(regex("(yes|no)"))
    assert possible(matcher) == {ord("y"), ord("n")}
    for letter in b"ye":
        matcher.take(letter)
    assert possible(matcher) == {ord("s")}


def test_the_end_is_allowed_where_the_text_is_complete_and_not_before() -> None:
    matcher = walk(regex("a+"))
    assert possible(matcher) == {ord("a")}
    matcher.take(ord("a"))
    assert possible(matcher) == {ord("a"), END}
    assert not matcher.ended


def test_a_text_that_can_only_end_has_ended() -> None:
    matcher = walk(schema('{"type": "boolean"}'))
    matcher.take(257)
    assert matcher.ended


def test_white_space_between_the_parts_of_a_document_is_bounded() -> None:
    matcher = walk(Constraint(kind=ConstraintKind.JSON_OBJECT))
    matcher.take(ord("{"))
    for _ in range(16):
        matcher.take(ord(" "))
    assert ord(" ") not in possible(matcher)


def test_a_replayed_walk_allows_what_the_first_one_did() -> None:
    first, text = walk(schema('{"type": "object"}')), b'{"a": [1'
    for letter in text:
        first.take(letter)
    second = walk(schema('{"type": "object"}'))
    second.replay(list(text))
    assert possible(second) == possible(first)


def test_tokens_that_do_not_match_cannot_be_replayed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        walk(regex("[0-9]+")).replay(list(b"12x"))
    assert caught.value.field == "resume_token_ids"


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema("{"), "not a JSON document"),
        (schema("[" * 60_000), "not a JSON document"),
        (schema('"text"'), "must be a JSON object"),
        (schema('{"type": "strin"}'), "strin"),
        (schema('{"not": {}}'), "not"),
        (schema('{"x-guidance": {"lenient": true}, "not": {}}'), "not"),
        (schema('{"$ref": "http://127.0.0.1/other.json"}'), "127.0.0.1"),
        (schema('{"allOf": [{"type": "string"}, {"type": "integer"}]}'), "nsatisfiable"),
        (schema('{"oneOf": [{"type": "string"}, {"maxLength": 3}]}'), "oneOf"),
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (grammar("start: missing"), "missing"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(constraint: Constraint, reason: str) -> None:
    with pytest.raises(ConstraintInvalid) as caught:
        walk(constraint)
    assert reason in caught.value.message
    assert caught.value.field == constraint.field


# --- the trial ---------------------------------------------------------------------------------


@pytest.fixture
def trial() -> Iterator[Trial]:
    made = Trial(VOCABULARY)
    yield made
    made.close()


def chain(body: str) -> Constraint:
    """Rules that each name the next one, thousands of them."""
    names = ["".join(letters) for letters in product(ascii_lowercase, repeat=3)][:4000]
    rules = "\n".join(f"{a}: {body.format(b)}" for a, b in pairwise(names))
    return grammar(f'start: {names[0]}\n{rules}\n{names[-1]}: "a"\n')


@pytest.mark.parametrize(
    "constraint",
    [
        regex("a?" * 30_000),
        regex(".?" * 8_000),
        chain("{0} {0}"),
        chain("{0}? {0}"),
        chain('"b" | {0}'),
        schema('{"type": "string", "pattern": "' + ".?" * 30_000 + '"}'),
    ],
    ids=["many optional", "many wild", "rule chain", "ambiguous chain", "choice chain", "schema with regex"],
)
def test_a_hostile_constraint_is_refused_and_the_next_one_served(
    trial: Trial, constraint: Constraint
) -> None:
    with pytest.raises(ConstraintInvalid) as caught:
        trial.judge(constraint)
    assert caught.value.field == constraint.field
    trial.judge(regex("(yes|no)"))


def test_what_the_trial_refuses_for_its_content_is_told_by_its_reason(trial: Trial) -> None:
    with pytest.raises(ConstraintInvalid, match="look-around"):
        trial.judge(regex("(?=a)b"))


# --- compiling beside the loop -----------------------------------------------------------------


class Lenient:
    """A judge that lets everything pass, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.judged: list[Constraint] = []

    def judge(self, constraint: Constraint) -> None:
        assert self.may.wait(TIMEOUT_S)
        self.judged.append(constraint)

    def close(self) -> None:
        """Nothing to free."""


class Bench:
    def __init__(self) -> None:
        self.judge = Lenient()
        self._done = threading.Semaphore(0)
        self.grammars = Grammars(lambda: VOCABULARY, lambda _: self.judge, self._done.release)

    def finished(self, count: int = 1) -> list[Constraint]:
        for _ in range(count):
            assert self._done.acquire(timeout=TIMEOUT_S)
        return self.grammars.finished()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.judge.may.set()
    made.grammars.close()


def test_a_constraint_is_compiled_once_and_walked_by_many(bench: Bench) -> None:
    wanted = regex("[ab]+")
    assert bench.grammars.matcher(wanted) is None
    bench.grammars.want(wanted)
    bench.grammars.want(wanted)
    assert bench.finished() == [wanted]
    one, other = bench.grammars.matcher(wanted), bench.grammars.matcher(wanted)
    assert one is not None and other is not None
    one.take(ord("a"))
    assert (END in possible(one), END in possible(other)) == (True, False)
    assert bench.judge.judged == [wanted]


def test_a_refusal_is_remembered_and_raised_anew_each_time(bench: Bench) -> None:
    wanted = regex("(")
    bench.grammars.want(wanted)
    bench.finished()
    for _ in range(2):
        with pytest.raises(ConstraintInvalid, match="unclosed group"):
            bench.grammars.matcher(wanted)


def test_few_constraints_may_wait(bench: Bench) -> None:
    bench.judge.may.clear()
    for count in range(WAITING_MAX):
        bench.grammars.want(regex(f"a{{{count + 1}}}"))
    with pytest.raises(QueueFull):
        bench.grammars.want(regex("b"))
    bench.judge.may.set()
    assert len(bench.finished(WAITING_MAX)) == WAITING_MAX
    bench.grammars.want(regex("b"))
    assert bench.finished() == [regex("b")]


def test_what_went_wrong_here_is_told_once_and_then_tried_again(bench: Bench) -> None:
    judge, wanted = bench.judge.judge, regex("a")

    def fail(_: Constraint) -> None:
        raise OSError("no process")

    bench.judge.judge = fail  # type: ignore[method-assign]
    bench.grammars.want(wanted)
    bench.finished()
    with pytest.raises(Internal, match="no process"):
        bench.grammars.matcher(wanted)
    bench.judge.judge = judge  # type: ignore[method-assign]
    bench.grammars.want(wanted)
    bench.finished()
    assert bench.grammars.matcher(wanted) is not None


def calls(*tools: tuple[str, str], **answer: str) -> Constraint:
    return Constraint(kind=ConstraintKind.TOOLS, source=json.dumps({"tools": tools, **answer}))


def test_a_call_is_one_of_those_on_offer_or_the_answer() -> None:
    reference = (
        '{"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"enum": [1]}}}'
    )
    either = calls(("f", reference), ("g", ""), answer='{"properties": {"b": {"type": "boolean"}}}')
    for text in (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>\n{"name": "g", "arguments": {}}',
        '{"b": true}',
    ):
        matcher = walk(either)
        for letter in text.encode():
            matcher.take(letter)
        assert END in possible(matcher) or matcher.ended
    for text in ('<tool_call>\n{"name": "h', '<tool_call>\n{"name": "f", "arguments": {"a": 2'):
        matcher = walk(either)
        with pytest.raises(ConstraintInvalid):
            for letter in text.encode():
                matcher.take(letter)


def test_a_call_invents_no_arguments_unless_its_schema_says_that_there_may_be_more() -> None:
    inner = '{"type": "object", "properties": {"b": {"const": 1}}}'
    nested = f'{{"properties": {{"a": {{"type": "array", "items": {inner}}}}}, "required": ["a"]}}'
    opened = '{"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}}'
    for schema, arguments, fits in (
        (nested, '{"a": [{"b": 1}]}', True),
        (nested, '{"a": [{"c": 1', False),
        (nested, '{"a": [], "c"', False),
        (opened, '{"a": 1, "c": 2}', True),
    ):
        matcher = walk(calls(("f", schema)))
        letters = f'<tool_call>\n{{"name": "f", "arguments": {arguments}'.encode()
        taken = 0
        with suppress(ConstraintInvalid):
            for letter in letters:
                matcher.take(letter)
                taken += 1
        assert (taken == len(letters)) is fits


@pytest.mark.parametrize("schema", ["[]", '{"not": {}}', '{"properties": {"a": {"$ref": "#/nowhere"}}}', "{"])
def test_a_tool_that_cannot_be_held_is_refused(schema: str) -> None:
    with pytest.raises(ConstraintInvalid, match="tools cannot be enforced") as caught:
        walk(calls(("f", schema)))
    assert caught.value.field == "tools"
