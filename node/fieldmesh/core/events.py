"""The shape that every machine of the core shares. Owns: the inputs and outputs common to all.

A machine takes one event at a time, changes its state without I/O, and returns the effects that
its host must perform **in order**: a ``Send`` after a ``Persist`` may leave only when that
``Persist`` is durable. The host asks ``deadline`` for the time at which it must hand in a ``Tick``.

Big machines are small ones of the same shape, stacked: the outer one forwards and wraps. The
messages that travel inside ``Received`` and ``Send`` are frozen dataclasses owned by the machine
that speaks them; ``rpc.wire`` turns each into bytes and back, in the simulator too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fieldmesh.core.model import Address, NodeId

M = TypeVar("M")
E_contra = TypeVar("E_contra", contravariant=True)
F = TypeVar("F")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """The time that ``deadline`` asked for has come (or passed: hosts may be late)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received(Generic[M]):
    """A peer's message arrived. ``sender`` is the identity that the message claims (and, once
    connections are authenticated, the one that the connection proved)."""

    sender: NodeId
    message: M


@dataclass(frozen=True, slots=True, kw_only=True)
class Send(Generic[M]):
    """Hand ``message`` to the network for ``address``; it may be lost, doubled, late or reordered.

    ``to`` is None while the identity behind the address is not known yet (a join hint).
    """

    to: NodeId | None
    address: Address
    message: M


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make ``data`` durable under ``key`` before performing any later effect of the same list."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something a person may want to read in the log; ``event`` is a stable snake_case name."""

    event: str
    fields: tuple[tuple[str, str | int | float], ...] = ()


class Machine(Protocol[E_contra, F]):
    """What Membership, Replica, Raft and Mesh have in common."""

    def handle(self, event: E_contra, now: float) -> list[F]:
        """Take one event at time ``now`` (seconds, monotonic, never decreasing)."""
        ...

    @property
    def deadline(self) -> float | None:
        """When the next ``Tick`` is due, on the same clock as ``now``; None for never."""
        ...

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself (simulations call it after every event)."""
        ...
