"""Which node to ask next, and when. Owns: the address book, and the life of one call over several nodes.

Pure: the time and the jitter are arguments, so both clients (and tests) drive the same decisions.

A call asks one node after the other. What went wrong says what comes next:

* the node cannot serve (gone, draining, no free stream, its engine lost): the next node, at once;
* the mesh cannot serve now (all queues full): the same request again after the time that the mesh named;
* every node of a round failed: a pause that doubles with each round, then the next round;
* the request is at fault, or asking again would repeat delivered tokens: the error goes to the caller.

Rounds, attempts and pauses are bounded, and no pause outlives the call's deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fieldmesh.client.records import Mesh
from fieldmesh.core.errors import (
    DeadlineExceeded,
    FieldmeshError,
    NoCandidate,
    NodeUnreachable,
    QueueFull,
    StreamLost,
)
from fieldmesh.core.model import Address, NodeState
from fieldmesh.values import is_loopback

ADDRESSES_MAX: Final = 256
# How long an address that failed is asked after all others.
FAILED_MEMORY_S: Final = 10.0
# What nodes tell of each other is asked for again when it is older than this and a call is made.
REFRESH_INTERVAL_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Persistence:
    """How long a call tries before the caller hears of it.

    ``pause_max_s`` bounds one pause: a node that asks for a longer one ends the call, and the error says
    how long.
    """

    attempts_max: int = 16
    rounds_max: int = 4
    pause_min_s: float = 0.2
    pause_max_s: float = 10.0


class AddressBook:
    """Client listeners that are known: those given first, then what nodes told; at most ``ADDRESSES_MAX``."""

    def __init__(self, seeds: Iterable[Address]) -> None:
        self._seeds = tuple(dict.fromkeys(seeds))[:ADDRESSES_MAX]
        self._learned: tuple[Address, ...] = ()
        self._failed: dict[Address, float] = {}
        self._current: Address | None = None
        self._refreshed_at = -math.inf
        self._refreshing = False

    def __len__(self) -> int:
        return len(self._all())

    def __contains__(self, address: object) -> bool:
        return address in self._all()

    def refresh_begins(self, now: float) -> bool:
        """Whether a node should be asked for all others now; at most one refresh is under way."""
        if self._refreshing or now - self._refreshed_at < REFRESH_INTERVAL_S:
            return False
        self._refreshing = True
        return True

    def refresh_ends(self, asked: Address, mesh: Mesh | None, now: float) -> None:
        """Take over what the node at ``asked`` told; None where it failed. The seeds stay."""
        self._refreshing = False
        if mesh is None:
            return
        self._refreshed_at = now
        # A loopback address means another box's loopback, unless it was loopback that answered.
        usable = [
            address
            for node in mesh.nodes
            if node.state in (NodeState.ALIVE, NodeState.SUSPECT)
            for address in node.addresses
            if is_loopback(asked.host) or not is_loopback(address.host)
        ]
        self._learned = tuple(dict.fromkeys(usable))[:ADDRESSES_MAX]
        self._failed = {address: at for address, at in self._failed.items() if address in self}

    def answered(self, address: Address) -> None:
        """``address`` works: it is asked first from now on."""
        self._failed.pop(address, None)
        self._current = address

    def failed(self, address: Address, now: float) -> None:
        """``address`` did not work: others are asked before it for a while."""
        if address in self:
            self._failed[address] = now
        if self._current == address:
            self._current = None

    def order(self, now: float) -> tuple[Address, ...]:
        """All addresses, the most promising first."""

        def rank(address: Address) -> tuple[bool, float]:
            failed_at = self._failed.get(address)
            recent = failed_at is not None and now - failed_at < FAILED_MEMORY_S
            return (recent, failed_at or 0.0 if recent else 0.0)

        found = self._all()
        first = (self._current,) if self._current in found else ()
        return tuple(dict.fromkeys((*first, *sorted(found, key=rank))))

    def _all(self) -> tuple[Address, ...]:
        return tuple(dict.fromkeys((*self._seeds, *self._learned)))[:ADDRESSES_MAX]


class Attempts:
    """One call over several nodes: alternate ``next_address`` and ``failed``."""

    def __init__(self, book: AddressBook, persistence: Persistence, deadline: float | None) -> None:
        self._book = book
        self._persistence = persistence
        self._deadline = deadline
        self._tried: dict[Address, None] = {}
        self._tried_ever: dict[Address, None] = {}
        self._count = 0
        self._rounds = 1

    def next_address(self, now: float) -> Address:
        """The node to ask now. Raises NodeUnreachable where no address is known."""
        order = self._book.order(now)
        if not order:
            raise NodeUnreachable(
                "No node is known: name one as host:port, or start one with `fieldmesh up`.", field="seeds"
            )
        address = next((entry for entry in order if entry not in self._tried), order[0])
        self._tried[address] = None
        self._tried_ever[address] = None
        self._count += 1
        return address

    def time_left_s(self, now: float) -> float | None:
        """What is left of the deadline; None where there is none. Raises DeadlineExceeded."""
        if self._deadline is None:
            return None
        if now >= self._deadline:
            raise DeadlineExceeded("The time given for this call has passed.", field="timeout_s")
        return self._deadline - now

    def failed(
        self,
        address: Address,
        error: FieldmeshError,
        now: float,
        *,
        tokens_delivered: int | None,
        jitter: float,
    ) -> float:
        """Seconds to wait before the next attempt. Raises ``error`` (or what it means) when there is none.

        ``tokens_delivered`` is None while nothing was; ``jitter`` is drawn from 0 to 1.
        """
        if isinstance(error, NodeUnreachable):
            self._book.failed(address, now)
        if tokens_delivered is not None:
            raise _after_delivery(error, tokens_delivered) from error.__cause__
        if not error.retryable:
            raise error
        limits = self._persistence
        if self._count >= limits.attempts_max:
            raise self._given_up(error) from error.__cause__
        whole_mesh = isinstance(error, (QueueFull, NoCandidate)) and error.retry_after_s is not None
        if not whole_mesh and any(entry not in self._tried for entry in self._book.order(now)):
            return 0.0
        pause_s = min(limits.pause_max_s, limits.pause_min_s * 2.0 ** (self._rounds - 1))
        if not whole_mesh:
            self._rounds += 1
            if self._rounds > limits.rounds_max:
                raise self._given_up(error) from error.__cause__
        self._tried.clear()
        wait_s = max(pause_s, error.retry_after_s or 0.0) * (1.0 + 0.25 * jitter)
        if (error.retry_after_s or 0.0) > limits.pause_max_s:
            raise error
        if self._deadline is not None and now + wait_s >= self._deadline:
            raise error
        return wait_s

    def _given_up(self, error: FieldmeshError) -> FieldmeshError:
        if not isinstance(error, NodeUnreachable) or len(self._tried_ever) < 2:
            return error
        tried = ", ".join(str(address) for address in self._tried_ever)
        return NodeUnreachable(
            f"No node could be reached; tried {tried}. The last said: {error.message}",
            metadata={"tried": tried},
        )


def _after_delivery(error: FieldmeshError, tokens_delivered: int) -> FieldmeshError:
    """What ``error`` means once tokens have reached the caller: nobody may repeat them."""
    if error.retryable:
        return StreamLost(
            f"The stream broke after {tokens_delivered} tokens: {error.message}",
            metadata={"tokens_delivered": str(tokens_delivered), "cause": error.code},
        )
    error.metadata.setdefault("tokens_delivered", str(tokens_delivered))
    return error
