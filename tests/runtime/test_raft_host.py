"""The order of effects. Goal: nothing that depends on a Save is said or told before it is durable, and many
share one. Method: the real machine over a store whose disk waits until the test lets it go on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest

from fieldmesh.core.errors import StateUnwritable
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import founded
from fieldmesh.core.raft_model import (
    Append,
    AppendReply,
    Entry,
    EntryKind,
    Members,
    Message,
    RaftConfig,
    Save,
    Vote,
    VoteReply,
)
from fieldmesh.core.settings import Command, Kind
from fieldmesh.runtime.raft_host import RaftHost, RefusedHere, Unsettled
from fieldmesh.runtime.raft_store import RaftStore

ME, OTHER = NodeId("a" * 32), NodeId("b" * 32)
OPEN = Command(kind=Kind.OPEN_SESSION)


class SlowStore(RaftStore):
    """A disk that writes only while ``go`` is set, or fails."""

    go: threading.Event
    fails = False
    batches: list[int]

    def save(self, *saves: Save) -> None:
        assert self.go.wait(10)
        if self.fails:
            raise StateUnwritable("no space left")
        self.batches.append(len(saves))
        super().save(*saves)


class Bench:
    """One host, what it sent, and its disk."""

    def __init__(self, folder: Path, *, founder: bool) -> None:
        self.sent: list[tuple[NodeId, Message]] = []
        self.news = asyncio.Event()
        store = RaftStore.open(folder / "log.sqlite3", ME)
        if founder:
            store.found(founded(ME, "log"))
        store.close()
        self.host = RaftHost(
            ME,
            lambda: self._open(folder),
            config=RaftConfig(heartbeat_s=0.02, election_timeout_s=0.1),
            rng=Random(1),
            send=lambda to, message: self.sent.append((to, message)),
            on_change=self._changed,
        )

    def _open(self, folder: Path) -> SlowStore:
        self.store = SlowStore.open(folder / "log.sqlite3", ME)
        self.store.go, self.store.batches = threading.Event(), []
        self.store.go.set()
        return self.store

    def _changed(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.wait((asyncio.ensure_future(self.news.wait()),), timeout=0.005)

    def saving(self) -> bool:
        return self.host._saving is not None


@pytest.fixture
async def follower(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, founder=False)
    await bench.host.start()
    yield bench
    bench.store.go.set()
    await bench.host.close()


@pytest.fixture
async def leader(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, founder=True)
    await bench.host.start()
    await bench.until(lambda: bench.host.consensus is not None and bench.host.consensus.applied >= 2)
    yield bench
    bench.store.go.set()
    await bench.host.close()


def first_entry() -> Message:
    entry = Entry(index=1, term=1, kind=EntryKind.MEMBERS, data=Members(voters=(ME, OTHER)).encode())
    return Message(group="log", epoch=0, term=1, body=Append(prev_index=0, prev_term=0, entries=(entry,)))


async def test_a_follower_acknowledges_entries_only_when_they_are_durable(follower: Bench) -> None:
    follower.store.go.clear()
    follower.host.received(OTHER, first_entry())
    assert follower.saving()
    assert follower.sent == []
    follower.store.go.set()
    await follower.until(lambda: bool(follower.sent))
    (to, message), *_ = follower.sent
    assert to == OTHER
    assert isinstance(message.body, AppendReply) and message.body.index == 1
    assert follower.store.load().entries[0].index == 1


async def test_a_vote_is_given_only_when_it_is_durable(follower: Bench) -> None:
    follower.host.received(OTHER, first_entry())
    await follower.until(lambda: bool(follower.sent))
    follower.store.go.clear()
    follower.sent.clear()
    body = Vote(last_index=1, last_term=1, transfer=True)
    follower.host.received(OTHER, Message(group="log", epoch=0, term=5, body=body))
    assert follower.sent == []
    follower.store.go.set()
    await follower.until(lambda: any(isinstance(m.body, VoteReply) for _, m in follower.sent))
    assert (follower.store.load().hard.term, follower.store.load().hard.vote) == (5, OTHER)


async def test_effects_of_a_later_event_do_not_overtake_a_save(follower: Bench) -> None:
    follower.store.go.clear()
    follower.host.received(OTHER, first_entry())
    heartbeat = Append(prev_index=1, prev_term=1, commit=1, round=1)
    follower.host.received(OTHER, Message(group="log", epoch=0, term=1, body=heartbeat))
    assert follower.sent == [], "the answer to the heartbeat says that the entry is durable"
    follower.store.go.set()
    await follower.until(lambda: len(follower.sent) >= 2)


async def test_commands_that_come_while_the_disk_writes_share_the_next_save(leader: Bench) -> None:
    leader.store.go.clear()
    first = leader.host.submit(OPEN)
    await leader.until(leader.saving)
    before = len(leader.store.batches)
    rest = [leader.host.submit(OPEN) for _ in range(100)]
    await asyncio.sleep(0)
    assert not first.done()
    leader.store.go.set()
    outcomes = await asyncio.gather(first, *rest)
    assert len({outcome.session for outcome in outcomes}) == 101
    assert len(leader.store.batches) - before == 2


async def test_a_sole_voter_tells_an_outcome_only_when_it_is_durable(leader: Bench) -> None:
    leader.store.go.clear()
    future = leader.host.submit(OPEN)
    await leader.until(leader.saving)
    assert leader.host.consensus is not None
    assert not future.done()
    leader.store.go.set()
    session = (await future).session
    assert leader.store.load().entries[-1].index == session


async def test_a_save_that_fails_ends_this_life_and_leaves_what_was_asked_unsettled(leader: Bench) -> None:
    leader.store.fails = True
    future = leader.host.submit(OPEN)
    with pytest.raises(Unsettled):
        await future
    assert leader.host.consensus is None
    assert "no space left" in leader.host.stopped_why
    with pytest.raises(RefusedHere):
        await leader.host.submit(OPEN)
    leader.store.fails = False
    async with asyncio.timeout(10):
        while leader.host.consensus is None:
            await leader.news.wait()
    assert leader.host.stopped_why == ""
