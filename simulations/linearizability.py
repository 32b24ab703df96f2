"""Is a history of concurrent operations linearizable? Owns: the search and the register it is held against.

The algorithm is that of Wing and Gong (1993) with Lowe's cache of visited configurations (2017), a key at
a time (linearizability is local: Herlihy and Wing, 1990, theorem 1). Must not: know where histories come from.

Every operation is on one register that holds a value, None at first. Written values are unique.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an operation does to its key."""

    GET = "get"
    PUT = "put"
    CAS = "cas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of one client. ``returned`` None: the outcome is unknown, it may happen at any later time.

    GET: ``value`` is what was read. PUT: ``value`` is written. CAS: ``value`` is written if the register
    holds ``expected``; ``done`` says whether it was (None: unknown).
    """

    client: int
    key: str
    kind: Kind
    invoked: float
    returned: float | None
    value: str | None
    expected: str | None = None
    done: bool | None = None


def step(register: str | None, operation: Operation) -> tuple[bool, str | None]:
    """Whether the operation could return as it did when it meets this value, and the value afterwards."""
    match operation.kind:
        case Kind.GET:
            return operation.value == register, register
        case Kind.PUT:
            return True, operation.value
        case Kind.CAS:
            holds = register == operation.expected
            if operation.done is not None and operation.done is not holds:
                return False, register
            return True, operation.value if holds else register


def first_violation(history: Iterable[Operation]) -> str | None:
    """The first key (in order) whose operations cannot be put into one sequence; None if all can."""
    by_key: dict[str, list[Operation]] = {}
    for operation in history:
        if operation.kind is not Kind.GET or operation.returned is not None:
            by_key.setdefault(operation.key, []).append(operation)
    return next((key for key in sorted(by_key) if not linearizable(by_key[key])), None)


def linearizable(operations: list[Operation]) -> bool:
    """Whether operations on one key have an order that respects real time and the register.

    Depth-first over the choice of the next operation among those invoked before the first pending return.
    """
    ordered = sorted(operations, key=lambda o: o.invoked)
    ends = [o.returned if o.returned is not None else float("inf") for o in ordered]
    must = sum(1 << i for i, end in enumerate(ends) if end != float("inf"))
    seen: set[tuple[int, str | None]] = set()
    # A frame is a configuration (what is done, the register) and its untried next operations.
    stack = [_frame(ordered, ends, 0, None)]
    while stack:
        done, register, choices = stack[-1]
        if done & must == must:
            return True
        if not choices:
            stack.pop()
            continue
        index = choices.pop()
        possible, after = step(register, ordered[index])
        configuration = (done | 1 << index, after)
        if possible and configuration not in seen:
            seen.add(configuration)
            stack.append(_frame(ordered, ends, *configuration))
    return False


def _frame(
    ordered: list[Operation], ends: list[float], done: int, register: str | None
) -> tuple[int, str | None, list[int]]:
    first_end = float("inf")
    candidates: list[int] = []
    for index, operation in enumerate(ordered):
        if operation.invoked > first_end:
            break
        if not done >> index & 1:
            candidates.append(index)
            first_end = min(first_end, ends[index])
    choices = [index for index in candidates if ordered[index].invoked <= first_end]
    choices.sort(key=lambda index: -ends[index])  # tried from the end: the earliest return first
    return done, register, choices
