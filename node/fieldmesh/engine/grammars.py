"""Constraints on what is drawn: JSON Schema, regex and Lark grammars, through llguidance.

Owns: what a constraint becomes, the limits on its cost, compiling off the step loop, the walk of one
generation through it. Must not: draw, or know llama.cpp beyond handing its vocabulary on.

llguidance bounds most of what it does, but not all: 16 kB of ``.?`` in a regex cost it 12 s and 0.9 GB under
the limits below, and rules that name each other in a chain of some thousands overflow its stack. So every
constraint is first compiled in a process that may fail (``engine.trial``), and here only if that went well.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fieldmesh.core.errors import ConstraintInvalid, FieldmeshError, Internal, InvalidRequest, QueueFull
from fieldmesh.core.model import Constraint, ConstraintKind
from fieldmesh.core.tools import OPEN

Allowed: TypeAlias = np.ndarray[tuple[int], np.dtype[np.bool_]]

MASK_CPU_S_MAX = 0.05
"""What one token's mask may cost; ordinary schemas need 0.0001 s. It is time that every stream waits."""
COMPILED_MAX = 32
"""Constraints that are kept compiled (some 20 kB to some MB each), and refusals that are remembered."""
WAITING_MAX = 16
STACK_BYTES = 64 << 20
"""Far above the trial's own: what passed there cannot overflow here. Only what is used becomes memory."""
REASON_CHARACTERS_MAX = 300
# At most so much white space between two parts of a document: a small model would otherwise go on with it.
_JSON_OPTIONS = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}
# Where schemas are within a schema, and what says that an object may hold more than it names itself.
_SCHEMAS_IN = frozenset({"items", "anyOf", "oneOf"})
_NAMED_SCHEMAS_IN = frozenset({"properties", "$defs", "definitions"})
_OPENING = frozenset({"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"})
_LIMITS = LLParserLimits(
    verbose_errors=False,
    initial_lexer_fuel=400_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
)


def compiled(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """The constraint, ready to be copied. Raises ConstraintInvalid with the reason."""
    matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS)
    started = time.thread_time()
    matcher.compute_bitmask()
    spent_s = time.thread_time() - started
    if matcher.is_error():
        raise _refused(constraint, matcher.get_error())
    if spent_s > MASK_CPU_S_MAX:
        raise too_costly(constraint)
    return matcher


def _grammar(constraint: Constraint) -> str:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return _json_grammar(constraint, constraint.source)
        case ConstraintKind.JSON_OBJECT:
            return _json_grammar(constraint, '{"type": "object"}')
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.source)
        case ConstraintKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(constraint.source)
        case ConstraintKind.TOOLS:
            try:
                return LLMatcher.grammar_from_lark(_calls(constraint))
            except RecursionError:
                raise _refused(constraint, "a schema is nested too deeply") from None


def _calls(constraint: Constraint) -> str:
    """A call of one of the tools, as ``core.tools`` reads it, or the answer that is wanted otherwise.

    The mark before the object is what tells the two apart from the first character on. Each schema is a
    document of its own, so that its references hold.
    """
    wanted = json.loads(constraint.source)
    rules = []
    for index, (name, parameters) in enumerate(wanted["tools"]):
        head = json.dumps(f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": ')
        # Of what allOf puts together, each names only its own: that stays open.
        arguments = _schema(constraint, parameters or '{"properties": {}}')
        schema = _inlined(arguments if '"allOf"' in parameters else _closed(arguments))
        rules.append(f'call_{index}: {head} arguments_{index} "}}"\narguments_{index}: %json {schema}')
    choices = [f"call_{index}" for index in range(len(rules))]
    if "answer" in wanted:
        choices.append("answer")
        rules.append(f"answer: %json {_inlined(_schema(constraint, wanted['answer'] or '{}'))}")
    return "\n".join([f"start: {' | '.join(choices)}", *rules])


def _inlined(schema: dict[str, Any]) -> str:
    """The schema of an object, with our own options for it."""
    return json.dumps({"type": "object", **schema, "x-guidance": _JSON_OPTIONS})


def _closed(schema: Any) -> Any:
    """The schema with no properties in its objects but those that it names, where it leaves that open.

    Others would be valid too, and a small model goes on inventing them until it is cut off.
    """
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {**schema, **{key: _closed(schema[key]) for key in _SCHEMAS_IN & schema.keys()}}
    for key in _NAMED_SCHEMAS_IN & schema.keys():
        if isinstance(schema[key], dict):
            closed[key] = {name: _closed(named) for name, named in schema[key].items()}
    if "properties" in schema and not _OPENING & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _schema(constraint: Constraint, source: str) -> dict[str, Any]:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _refused(constraint, f"it is not a JSON document: {error}") from error
    if not isinstance(schema, dict):
        raise _refused(constraint, "a schema must be a JSON object")
    return schema


def _json_grammar(constraint: Constraint, source: str) -> str:
    _schema(constraint, source)
    try:
        return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise _refused(constraint, str(error)) from error


def _refused(constraint: Constraint, reason: str) -> ConstraintInvalid:
    said = " ".join(reason.replace("<non-verbose/>", "").split())[:REASON_CHARACTERS_MAX]
    return ConstraintInvalid(f"{constraint.field} cannot be enforced: {said}", field=constraint.field)


def too_costly(constraint: Constraint) -> ConstraintInvalid:
    """The refusal of what is too expensive to enforce."""
    return _refused(constraint, "it costs too much time or memory; make it smaller or less ambiguous")


class Matcher:
    """Where one generation stands in its constraint."""

    def __init__(self, inner: LLMatcher, constraint: Constraint) -> None:
        self._inner = inner
        self._constraint = constraint

    @property
    def ended(self) -> bool:
        """Whether the text is complete and can only end."""
        return self._inner.is_stopped()

    def allowed(self) -> Allowed:
        """Which tokens may come next, the end of the text among them where it is complete. There may be more
        entries than the vocabulary has tokens.

        Raises ConstraintInvalid where that cannot be found out within its limits.
        """
        started = time.thread_time()
        mask = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        if self._inner.is_error():
            raise _refused(self._constraint, self._inner.get_error())
        if time.thread_time() - started > MASK_CPU_S_MAX:
            raise too_costly(self._constraint)
        bits: Allowed = np.unpackbits(mask, bitorder="little").view(np.bool_)
        return bits

    def take(self, token: int) -> None:
        """Go on by a token that was allowed. Raises ConstraintInvalid."""
        if not self._inner.consume_token(token):
            raise _refused(self._constraint, self._inner.get_error())

    def replay(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were delivered before. Raises InvalidRequest where they do not match."""
        if tokens and not self._inner.consume_tokens(list(tokens)):
            raise InvalidRequest(
                f"the tokens to resume do not match {self._constraint.field}; resume what was made under it",
                field="resume_token_ids",
            )


class Judge(Protocol):
    """Tries a constraint where nothing can be harmed by it."""

    def judge(self, constraint: Constraint) -> None:
        """Return where it can be compiled at a bearable cost; raises ConstraintInvalid."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: LLMatcher | None
    error: FieldmeshError | None = None


class Grammars:
    """Compiles constraints in a thread of its own; ``on_done`` is called there after each.

    ``vocabulary`` is read and ``judge`` made in that thread when the first constraint comes.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        judge: Callable[[Vocabulary], Judge],
        on_done: Callable[[], None],
    ) -> None:
        self._read_vocabulary = vocabulary
        self._make_judge = judge
        self._on_done = on_done
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._wanted: deque[Constraint] = deque()
        self._done: deque[tuple[Constraint, _Compiled]] = deque()  # bounded by what is wanted
        self._pending: set[Constraint] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def matcher(self, constraint: Constraint) -> Matcher | None:
        """A fresh walk through a constraint; None while it is not compiled (``want`` it then).

        Raises ConstraintInvalid for what was refused before, and once what went wrong otherwise.
        """
        found = self._compiled.get(constraint)
        if found is None:
            return None
        self._compiled.move_to_end(constraint)
        if found.matcher is None:
            assert found.error is not None
            if not isinstance(found.error, ConstraintInvalid):
                del self._compiled[constraint]
            raise type(found.error)(found.error.message, field=found.error.field)
        return Matcher(found.matcher.deep_copy(), constraint)

    def want(self, constraint: Constraint) -> None:
        """Have it compiled; ``finished`` tells when it is. Raises QueueFull."""
        if constraint in self._pending:
            return
        if len(self._pending) >= WAITING_MAX:
            raise QueueFull("too many schemas and grammars wait to be compiled", retry_after_s=1.0)
        self._pending.add(constraint)
        if self._thread is None:
            self._thread = self._start()
        with self._changed:
            self._wanted.append(constraint)
            self._changed.notify()

    def finished(self) -> list[Constraint]:
        """What was compiled or refused since the last call: ``matcher`` knows it from now on."""
        found = []
        while self._done:
            constraint, outcome = self._done.popleft()
            self._pending.discard(constraint)
            self._compiled[constraint] = outcome
            found.append(constraint)
        while len(self._compiled) > max(COMPILED_MAX, len(found)):
            self._compiled.popitem(last=False)
        return found

    def close(self) -> None:
        """End the thread and the trial."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> threading.Thread:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
        return thread

    def _work(self) -> None:
        tokenizer: LLTokenizer | None = None
        judge: Judge | None = None
        while True:
            with self._changed:
                while not (self._wanted or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                constraint = self._wanted.popleft()
            try:
                if tokenizer is None or judge is None:
                    vocabulary = self._read_vocabulary()
                    tokenizer, judge = vocabulary.tokenizer(), self._make_judge(vocabulary)
                judge.judge(constraint)
                outcome = _Compiled(compiled(tokenizer, constraint))
            except ConstraintInvalid as error:
                outcome = _Compiled(None, error)
            except Exception as defect:  # noqa: BLE001 - a thread that ends would leave its jobs waiting
                outcome = _Compiled(None, Internal(f"the constraint could not be tried: {defect!r}"))
            self._done.append((constraint, outcome))
            self._on_done()
        if judge is not None:
            judge.close()


class Vocabulary(msgspec.Struct, frozen=True):
    """A model's tokens as bytes; ``special`` are control tokens, ``ends`` those that end a text."""

    tokens: list[bytes]
    special: list[int]
    ends: list[int]

    def tokenizer(self) -> LLTokenizer:
        """llguidance's own view of it (0.3 s for 49,000 tokens)."""
        return LLTokenizer(_Tokens(self), eos_token=self.ends)  # type: ignore[arg-type]


class _Tokens:
    """What llguidance asks of a tokenizer. Text that a constraint forces is cut greedily: the longest token
    first, which any model reads."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.eos_token_id = vocabulary.ends[0]
        special = set(vocabulary.special)
        self._ids = {piece: i for i, piece in enumerate(self.tokens) if piece and i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, data: bytes | str) -> list[int]:
        data, start, ids = data.encode() if isinstance(data, str) else data, 0, []
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((e for e in ends if data[start:e] in self._ids), None)
            if end is not None:
                ids.append(self._ids[data[start:end]])
            start = end or start + 1
        return ids
