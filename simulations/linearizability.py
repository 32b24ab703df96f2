"""Is a history of concurrent operations linearizable? Owns: the search and the register it is held against.

The algorithm is that of Wing and Gong (1993) with Lowe's cache of visited configurations (2017), a key at a
time (linearizability is local: Herlihy and Wing, 1990, theorem 1). Must not: know where a history comes from.

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
    """One operation of one client. ``returned`` None: the outcome is unknown, it may happen at any time.

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


def fits(operation: Operation, register: str | None) -> bool:
    """Whether the operation could return as it did when it meets this value."""
    match operation.kind:
        case Kind.GET:
            return operation.value == register
        case Kind.PUT:
            return True
        case Kind.CAS:
            return operation.done is None or operation.done is (register == operation.expected)


def step(operation: Operation, register: str | None) -> str | None:
    """The register after the operation."""
    if operation.kind is Kind.GET or (operation.kind is Kind.CAS and register != operation.expected):
        return register
    return operation.value


def first_violation(history: Iterable[Operation]) -> str | None:
    """The first key (in order) whose operations cannot be put into one sequence; None if all can."""
    by_key: dict[str, list[Operation]] = {}
    for operation in history:
        if operation.kind is not Kind.GET or operation.returned is not None:
            by_key.setdefault(operation.key, []).append(operation)
    return next((key for key in sorted(by_key) if not linearizable(by_key[key])), None)


def linearizable(operations: list[Operation]) -> bool:
    """Whether operations on one key have an order that respects real time and the register.

    Depth-first over the choice of the next operation among those invoked before the first pending return,
    with two shortcuts: what fits and changes nothing is taken at once, without alternatives; and a value that
    somebody still has to see is not overwritten, for values are unique and it would never come back.
    """
    return _Search(operations).succeeds()


class _Search:
    """The search over one key; sets of operations are bits of an integer."""

    def __init__(self, operations: list[Operation]) -> None:
        self.ordered = sorted(operations, key=lambda o: o.invoked)
        self.ends = [o.returned if o.returned is not None else float("inf") for o in self.ordered]
        self.must = sum(1 << i for i, end in enumerate(self.ends) if end != float("inf"))
        self.observers: dict[str | None, int] = {}
        for index, operation in enumerate(self.ordered):
            if operation.returned is None:
                continue
            if operation.kind is Kind.GET:
                self._observes(operation.value, index)
            elif operation.kind is Kind.CAS and operation.done:
                self._observes(operation.expected, index)

    def _observes(self, value: str | None, index: int) -> None:
        self.observers[value] = self.observers.get(value, 0) | 1 << index

    def succeeds(self) -> bool:
        """Whether some order takes in all operations that returned."""
        seen: set[tuple[int, str | None]] = set()
        # A frame is a configuration (what is done, the register) and its untried next operations.
        stack: list[tuple[int, str | None, list[int]]] = [(0, None, self._choices(0, None))]
        while stack:
            done, register, choices = stack[-1]
            if done & self.must == self.must:
                return True
            if not choices:
                stack.pop()
                continue
            index = choices.pop()
            after = step(self.ordered[index], register)
            configuration = (done | 1 << index, after)
            if configuration not in seen:
                seen.add(configuration)
                stack.append((*configuration, self._choices(*configuration)))
        return False

    def _choices(self, done: int, register: str | None) -> list[int]:
        """Operations that may come next, the best one last."""
        first_end = float("inf")
        candidates: list[int] = []
        lowest = (~done & (done + 1)).bit_length() - 1  # what stands before it is done
        for index in range(lowest, len(self.ordered)):
            if self.ordered[index].invoked > first_end:
                break
            if not done >> index & 1:
                candidates.append(index)
                first_end = min(first_end, self.ends[index])
        choices = []
        for index in candidates:
            operation = self.ordered[index]
            if operation.invoked > first_end or not fits(operation, register):
                continue
            if step(operation, register) == register:
                if operation.returned is not None:
                    return [index]
                continue  # it need not happen at all, and may do more later
            if not self.observers.get(register, 0) & ~done & ~(1 << index):
                choices.append(index)
        return sorted(choices, key=lambda index: -self.ends[index])
