"""One node's access to the replicated configuration. Goal: what a caller is told is true whatever happens to
the log, the leader or the disk. Method: real stores in a temporary folder, the real machine, real time with
short timeouts; here a single voter, in ``test_council_mesh`` several nodes with real connections.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fieldmesh.core.errors import (
    ChangeRefused,
    FieldmeshError,
    InvalidRequest,
    LogNotFounded,
    NodeUnreachable,
    NoQuorum,
    OutcomeUnknown,
    StateUnwritable,
)
from fieldmesh.core.model import NodeId, Seat, SeatKind
from fieldmesh.core.raft_model import RaftConfig, Save
from fieldmesh.core.settings import Change, Code, Outcome
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.council_model import Changed, CouncilConfig, Whole
from fieldmesh.runtime.raft_store import RaftStore

ME = NodeId("a" * 32)
OTHER = NodeId("b" * 32)
FAST = CouncilConfig(
    raft=RaftConfig(heartbeat_s=0.02, election_timeout_s=0.1),
    timeout_s=2.0,
    leader_patience_s=0.3,
    found_wait_s=0.0,
)


class Nobody:
    """A mesh of one: whoever is called does not answer. ``others`` are seats seen in rows."""

    def __init__(self) -> None:
        self.others: dict[NodeId, Seat] = {}

    def send(self, to: NodeId, message: object) -> None:
        pass

    def seats(self) -> Mapping[NodeId, Seat]:
        return self.others

    async def submit(self, *_: object) -> Any:
        raise AssertionError("nobody is there")

    async def watch(self, *_: object) -> AsyncGenerator[Any, None]:
        raise NodeUnreachable("nobody is there")
        yield

    read_index = change = submit


class Shelf(dict[str, bytes]):
    """Where an observer keeps what it knows."""

    def read(self, key: str) -> bytes | None:
        return self.get(key)

    def write(self, key: str, value: bytes) -> None:
        self[key] = value


class FullDisk(RaftStore):
    """A store whose disk can be filled."""

    full = False

    def save(self, *saves: Save) -> None:
        if self.full:
            raise StateUnwritable("no space left")
        super().save(*saves)


@asynccontextmanager
async def council(
    folder: Path, *, found: bool = True, colleagues: Nobody | None = None
) -> AsyncIterator[Council]:
    made = Council(
        ME,
        open_store=lambda: FullDisk.open(folder / "log.sqlite3", ME),
        shelf=Shelf(),
        colleagues=colleagues or Nobody(),
        rng=Random(1),
        config=FAST,
    )
    await made.start(found=found)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Council]:
    async with council(tmp_path) as made:
        await led(made)
        yield made


async def led(made: Council) -> None:
    async with asyncio.timeout(5):
        while not made.leading or made.status().stale_s is None:
            await made.wait_changed()


async def put(made: Council, key: str, value: object, **condition: int) -> Outcome:
    change = Change(key=key, value=json.dumps(value), **condition)
    outcome, _ = await made.write([change], author="tester", origin="test")
    return outcome


def test_the_times_that_nodes_run_with_are_accepted_by_the_log() -> None:
    CouncilConfig().raft.validate()


async def test_a_write_is_read_back_with_its_revision_author_and_origin(alone: Council) -> None:
    outcome = await put(alone, "app/colour", "green")
    reading = await alone.read(linearizable=True)
    assert (outcome.code, outcome.revision, reading.revision) == (Code.DONE, 1, 1)
    assert reading.state.values["app/colour"].text == '"green"'
    assert reading.stale_s == 0.0
    record = reading.state.history[-1]
    assert (record.author, record.origin, record.time_ms > 0) == ("tester", "test", True)


async def test_a_conditional_write_says_which_revision_is_in_its_way(alone: Council) -> None:
    await put(alone, "app/x", 1)
    outcome = await put(alone, "app/x", 2, expected_revision=0)
    assert (outcome.code, outcome.revision) == (Code.REVISION_CONFLICT, 1)


async def test_what_may_not_be_proposed_is_refused_before_it_is(alone: Council) -> None:
    with pytest.raises(InvalidRequest):
        await put(alone, "limits/streams_max", -1)
    assert (await alone.read()).revision == 0


async def test_the_same_session_and_sequence_are_done_once(alone: Council) -> None:
    change = Change(key="app/x", value="1")
    first, command = await alone.write([change], author="tester", origin="test")
    again = await alone.submit(command)
    assert first == again
    assert (await alone.read(linearizable=True)).revision == 1


async def test_many_writers_share_saves(alone: Council) -> None:
    before = alone.host.saves
    outcomes = await asyncio.gather(*(put(alone, f"app/k{n}", n) for n in range(200)))
    assert sorted(outcome.revision for outcome in outcomes) == list(range(1, 201))
    assert alone.host.saves - before < 60


async def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    async with council(tmp_path) as first:
        await led(first)
        await put(first, "app/x", 1)
        log = first.status().seat
    async with council(tmp_path, found=True) as second:
        await led(second)
        assert second.status().seat == log
        assert (await second.read(linearizable=True)).state.values["app/x"].text == "1"


async def test_a_watch_begins_with_everything_and_goes_on_with_changes(alone: Council) -> None:
    await put(alone, "app/x", 1)
    watch = alone.watch()
    first = await anext(watch)
    assert isinstance(first, Whole)
    await put(alone, "app/x", 2)
    second = await anext(watch)
    assert isinstance(second, Changed)
    assert [(r.key, r.before, r.after) for r in second.records] == [("app/x", "1", "2")]
    await watch.aclose()


async def test_a_watch_goes_on_where_it_was_interrupted(alone: Council) -> None:
    for number in range(3):
        await put(alone, "app/x", number)
    watch = alone.watch(from_revision=1)
    item = await anext(watch)
    assert isinstance(item, Changed)
    assert [record.revision for record in item.records] == [2, 3]
    await watch.aclose()
    with pytest.raises(InvalidRequest):
        await anext(alone.watch(from_revision=99))


async def test_observers_hear_of_every_new_state(alone: Council) -> None:
    seen: list[int] = []
    alone.observe(lambda state: seen.append(state.revision))
    await put(alone, "app/x", 1)
    assert (seen[0], seen[-1]) == (0, 1)


async def test_a_fresh_node_never_elects_and_says_that_nothing_is_founded(tmp_path: Path) -> None:
    async with council(tmp_path, found=False) as fresh:
        assert fresh.host.consensus is not None
        assert fresh.host.consensus.deadline is None
        assert fresh.status().seat is None
        with pytest.raises(LogNotFounded):
            await fresh.read()
        with pytest.raises(LogNotFounded):
            await put(fresh, "app/x", 1)


async def test_a_founder_that_sees_another_log_does_not_found_a_second_one(tmp_path: Path) -> None:
    colleagues = Nobody()
    colleagues.others[OTHER] = Seat(log="older", epoch=0, kind=SeatKind.OBSERVER)
    async with council(tmp_path, colleagues=colleagues) as late:
        assert late._founding is not None
        await late._founding
        assert late.status().seat is None
        assert late.status().other_logs == {"older": (OTHER,)}


async def test_a_founded_node_founds_no_second_log(alone: Council) -> None:
    with pytest.raises(ChangeRefused, match="already"):
        await alone.found()


async def test_a_member_of_another_log_is_not_taken_in(tmp_path: Path) -> None:
    colleagues = Nobody()
    async with council(tmp_path, colleagues=colleagues) as made:
        await led(made)
        colleagues.others[OTHER] = Seat(log="another", epoch=0, kind=SeatKind.VOTER)
        with pytest.raises(ChangeRefused, match="another"):
            await made.add(OTHER)
        assert made.status().other_logs == {"another": (OTHER,)}


async def test_the_last_voter_is_not_removed(alone: Council) -> None:
    with pytest.raises(ChangeRefused) as refused:
        await alone.remove(ME)
    assert refused.value.metadata["reason"] == "last_voter"


async def test_a_learner_that_never_answers_is_not_promoted(alone: Council) -> None:
    await alone.add(OTHER)
    assert alone.status().learners == (OTHER,)
    with pytest.raises(ChangeRefused) as refused:
        await alone.promote(OTHER)
    assert refused.value.metadata["reason"] == "not_caught_up"
    await alone.remove(OTHER)
    assert alone.status().learners == ()


async def test_a_failed_save_stops_consensus_and_a_disk_that_works_again_brings_it_back(
    alone: Council,
) -> None:
    await put(alone, "app/x", 1)
    store = alone.host._store
    assert isinstance(store, FullDisk)
    store.full = True
    with pytest.raises(FieldmeshError) as failed:
        await put(alone, "app/x", 2)
    assert isinstance(failed.value, OutcomeUnknown | NoQuorum) or failed.value.code == "CONSENSUS_STOPPED"
    assert "no space left" in alone.status().stopped_why
    store.full = False
    await led(alone)
    assert alone.status().stopped_why == ""
    assert (await put(alone, "app/x", 3)).code is Code.DONE
