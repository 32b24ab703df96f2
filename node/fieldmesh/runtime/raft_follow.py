"""Follows the configuration at a voter, for a node that is no member of the log or has lost its leader.

Owns: which voter is followed, resuming at another one by revision, the last known state on this node's disk.
Must not: judge what comes (``core.following``), or leave the log that it has followed for another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from random import Random
from typing import Protocol

from fieldmesh.core.errors import FieldmeshError, InvalidRequest, NoQuorum
from fieldmesh.core.following import Following, Held, keep, kept
from fieldmesh.core.model import NodeId, SeatKind
from fieldmesh.runtime import log
from fieldmesh.runtime.council_model import Colleagues

KEPT_KEY = "configuration"
KEEP_INTERVAL_S = 2.0
PAUSE_S_MIN = 0.1
PAUSE_S_MAX = 2.0

logger = log.get()


class Shelf(Protocol):
    """Where the last known state is kept (``StateFolder``)."""

    def read(self, key: str) -> bytes | None: ...

    def write(self, key: str, value: bytes) -> None:
        """Return when durable. Raises FieldmeshError, ValueError. Called from a thread."""
        ...


class Follower:
    """Follows while ``wanted`` says so; ``on_change`` is called when something new is held.

    ``news`` gives an event that is set at the next change of whatever ``wanted`` or the voters depend on.
    A voter that has had no leader for ``leaderless_s`` is left for another.
    """

    def __init__(
        self,
        me: NodeId,
        colleagues: Colleagues,
        shelf: Shelf,
        *,
        rng: Random,
        leaderless_s: float,
        wanted: Callable[[], bool],
        news: Callable[[], asyncio.Event],
        on_change: Callable[[], None],
    ) -> None:
        self.target: NodeId | None = None
        self._me = me
        self._colleagues = colleagues
        self._shelf = shelf
        self._rng = rng
        self._leaderless_s = leaderless_s
        self._wanted = wanted
        self._news = news
        self._on_change = on_change
        self._following = Following(self._read())
        self._kept = self._following.held
        self._anew = False
        self._pause_s = PAUSE_S_MIN
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def held(self) -> Held | None:
        """What is held; None before anything was heard, now or in an earlier life."""
        return self._following.held

    def start(self) -> None:
        """Begin to follow whenever that is wanted."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._run(), name="follow"),
            loop.create_task(self._keep_up(), name="keep configuration"),
        ]

    async def close(self) -> None:
        """End; what is held is on the disk then."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keep()

    # --- following -----------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            news = self._news()
            target = self._choose() if self._wanted() else None
            if target is None:
                await news.wait()
                continue
            try:
                await self._follow(target)
                self._pause_s = PAUSE_S_MIN
            except InvalidRequest as error:  # it does not go on from what is held: begin anew
                self._anew = True
                logger.info("watch_begins_anew", node=target, why=error.message)
            except FieldmeshError as error:
                logger.debug("watch_ended", node=target, code=error.code, why=error.message)
            finally:
                self.target = None
            await asyncio.sleep(self._pause_s * self._rng.uniform(0.5, 1.5))
            self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    async def _follow(self, target: NodeId) -> None:
        """Take what one voter says until it ends or is wanted no longer. Raises FieldmeshError."""
        held = self.held
        name, epoch = (held.view.log, held.view.epoch) if held is not None else (self._choose_log(), 0)
        revision = held.state.revision if held is not None and not self._anew else None
        self._following.begin()
        led_at = asyncio.get_running_loop().time()
        pieces = self._colleagues.watch(target, name, epoch, revision)
        async with aclosing(pieces):
            async for piece in pieces:
                held = self._following.take(piece)
                if held is None:
                    continue
                self.target, self._anew = target, False
                self._on_change()
                now = asyncio.get_running_loop().time()
                if held.view.leader is not None:
                    led_at, self._pause_s = now, PAUSE_S_MIN
                if now - led_at >= self._leaderless_s:
                    raise NoQuorum("the voter has no leader; another may have one")
                if not self._wanted():
                    return

    def _choose(self) -> NodeId | None:
        """A living voter of the log that is followed, or of the first one that is met."""
        name = self.held.view.log if self.held is not None else self._choose_log()
        seats = self._colleagues.seats()
        epoch = max((seat.epoch for seat in seats.values() if seat.log == name), default=0)
        voters = [
            node
            for node, seat in seats.items()
            if seat.log == name and seat.epoch == epoch and seat.kind is SeatKind.VOTER and node != self._me
        ]
        return self._rng.choice(sorted(voters)) if voters else None

    def _choose_log(self) -> str:
        """Of several logs in one mesh the one with most voters, and of equals the first by name."""
        voters = Counter(
            seat.log for seat in self._colleagues.seats().values() if seat.kind is SeatKind.VOTER
        )
        return min(voters, key=lambda name: (-voters[name], name), default="")

    # --- the disk ------------------------------------------------------------------------------

    def _read(self) -> Held | None:
        data = self._shelf.read(KEPT_KEY)
        try:
            return kept(data) if data is not None else None
        except (ValueError, FieldmeshError) as error:
            logger.warning("configuration_not_read", why=str(error))
            return None

    async def _keep_up(self) -> None:
        """Write what is new to the disk, now and then."""
        while True:
            news = self._news()
            await self._keep()
            await asyncio.sleep(KEEP_INTERVAL_S)
            await news.wait()

    async def _keep(self) -> None:
        held, before = self.held, self._kept
        if held is None or (before is not None and _alike(held, before)):
            return
        try:
            await asyncio.to_thread(self._shelf.write, KEPT_KEY, keep(held))
        except (FieldmeshError, ValueError) as error:
            logger.warning("configuration_not_kept", why=str(error))
        else:
            self._kept = held


def _alike(held: Held, other: Held) -> bool:
    """Whether the same would be read back, but for the index."""
    one, two = held.view, other.view
    return (one.log, one.epoch, one.members, held.state.revision) == (
        two.log,
        two.epoch,
        two.members,
        other.state.revision,
    )
