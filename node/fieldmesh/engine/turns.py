"""Whose turn it is where several loops compute with one model: in a round, each that has work makes one step.

Owns: the order of turns, which loop has reason for one, and that a prompt of one does not hold up the streams
of another. Must not: wait, read a clock of its own, or know sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fieldmesh.engine.frames import Command, Report
from fieldmesh.engine.loop import EngineLoop


class Seat:
    """One loop among the others. ``called``: something happened since its last turn."""

    def __init__(self, loop: EngineLoop, send: Callable[[list[Report]], None]) -> None:
        self.loop = loop
        self.send = send
        self.busy = False
        self.called = True
        self.reports: list[Report] = []

    def handle(self, commands: Iterable[Command], now: float) -> None:
        """Take commands; what they give is sent in the next turn."""
        for command in commands:
            self.reports += self.loop.handle(command, now)
            self.called = True

    def has_reason(self, now: float) -> bool:
        """Whether a turn would do anything."""
        return self.busy or self.called or (self.loop.deadline is not None and self.loop.deadline <= now)


class Turns:
    """The loops over one model, in their order of arrival."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._seats: list[Seat] = []
        self._clock = clock

    def join(self, loop: EngineLoop, send: Callable[[list[Report]], None]) -> Seat:
        """A seat for one more loop."""
        self._seats.append(Seat(loop, send))
        return self._seats[-1]

    def leave(self, seat: Seat) -> None:
        """This loop takes no more turns."""
        self._seats.remove(seat)

    def wait_s(self) -> float | None:
        """For how long no loop has reason for a turn; None: until something is said."""
        now = self._clock()
        if any(seat.has_reason(now) for seat in self._seats):
            return 0.0
        deadlines = [seat.loop.deadline for seat in self._seats]
        return min((deadline - now for deadline in deadlines if deadline is not None), default=None)

    def round(self) -> None:
        """One turn for each loop that has reason for one; the others cost nothing."""
        for seat in self._seats:
            if seat.has_reason(self._clock()):
                self._take(seat)

    def _take(self, seat: Seat) -> None:
        loop, clock = seat.loop, self._clock
        beside_streams = any(other.loop.decoding for other in self._seats if other is not seat)
        reports, seat.reports, seat.called = seat.reports, [], False
        reports += loop.collect(clock())
        plan, expired = loop.plan(clock(), beside_streams=beside_streams)
        reports += expired
        if reports:  # what was refused or accepted need not wait for a step
            seat.send(reports)
        streams = bool(plan.slices)
        if streams:
            seat.send(loop.run(plan, clock))
        if loop.embeddings and (done := loop.embed(clock(), beside_streams=streams or beside_streams)):
            seat.send(done)
        seat.busy = streams or bool(loop.embeddings)
