"""Several nodes and one log. Goal: what was acknowledged is kept and seen everywhere, whoever dies, and what
cannot be done says so soon. Method: councils with real stores and real connections in one process
(``council_lab``); nodes are ended without warning, cut off, founded twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fieldmesh.core.errors import ChangeRefused, LogNotFounded, NoQuorum, OutcomeUnknown, StateUnwritable
from fieldmesh.core.following import Content, Piece
from fieldmesh.core.model import SeatKind
from fieldmesh.core.raft_model import RaftConfig
from fieldmesh.core.settings import Code, Command, Kind
from fieldmesh.runtime.electorate import Electorate
from tests.runtime.council_lab import FAST, Lab, Store, command, open_lab, put


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path) as made:
        yield made


@pytest.fixture
async def three(lab: Lab) -> Lab:
    """Three voters and an observer."""
    await lab.voters("a", "b", "c")
    await lab.box("watcher").start()
    await lab.until(lambda: lab["watcher"].status().following is not None)
    return lab


async def test_a_write_on_any_node_reaches_all(three: Lab) -> None:
    for number, name in enumerate(("a", "b", "c", "watcher"), start=1):
        outcome = await put(three[name], f"app/{name}", name)
        assert (outcome.code, outcome.revision) == (Code.DONE, number)
    await three.have(4)
    for box in three.boxes.values():
        assert sorted(box.council.state.values) == ["app/a", "app/b", "app/c", "app/watcher"]
    assert three["watcher"].status().seat == replace(three["a"].status().seat, kind=SeatKind.OBSERVER)  # type: ignore[type-var]


async def test_a_linearizable_read_anywhere_sees_what_was_acknowledged_anywhere(three: Lab) -> None:
    for number in range(5):
        await put(three["b"], "app/x", number)
        for name in ("a", "c", "watcher"):
            reading = await three[name].read(linearizable=True)
            assert reading.state.values["app/x"].text == str(number)
            assert reading.stale_s == 0.0


async def test_when_the_leader_dies_another_takes_over_and_nothing_acknowledged_is_lost(three: Lab) -> None:
    for number in range(20):
        await put(three["watcher"], f"app/k{number}", number)
    dead = three.leader
    term = three[dead].status().term
    await three.boxes[dead].stop()
    outcome = await put(three["watcher"], "app/after", 1)
    assert outcome.code is Code.DONE
    await three.until(lambda: bool(three.leader))
    assert three[three.leader].status().term > term
    reading = await three["watcher"].read(linearizable=True)
    assert len(reading.state.values) == 21


async def test_without_a_quorum_writes_fail_soon_and_reads_say_how_old_they_are(three: Lab) -> None:
    await put(three["a"], "app/x", 1)
    await three.have(1)
    await three.boxes["a"].stop()
    await three.boxes["b"].stop()
    await three.until(lambda: three["c"].status().leader is None)
    for name in ("c", "watcher"):
        began = asyncio.get_running_loop().time()
        with pytest.raises(NoQuorum, match="nothing was changed"):
            await put(three[name], "app/x", 2)
        assert asyncio.get_running_loop().time() - began < FAST.timeout_s
        with pytest.raises(NoQuorum):
            await three[name].read(linearizable=True, timeout_s=1.0)
        reading = await three[name].read()
        assert reading.state.values["app/x"].text == "1"
        assert reading.stale_s is not None and reading.stale_s > FAST.raft.heartbeat_s


async def test_a_leader_that_is_cut_off_does_not_claim_what_it_cannot_commit(three: Lab) -> None:
    leader = three.leader
    await put(three[leader], "app/x", "before")
    three.cut(leader)
    with pytest.raises(OutcomeUnknown) as unknown:
        await put(three[leader], "app/x", "lost", timeout_s=2.5)
    assert unknown.value.metadata.keys() == {"session", "sequence"}
    await three.until(lambda: bool(three.leader))
    await put(three[three.leader], "app/x", "kept")
    three.cut()
    await three.until(lambda: three[leader].status().leader is not None)
    reading = await three[leader].read(linearizable=True)
    assert reading.state.values["app/x"].text == '"kept"'


async def test_an_unknown_write_asked_again_is_done_once(three: Lab) -> None:
    leader = three.leader
    await put(three[leader], "app/x", 0)
    session = (await three[leader].submit(Command(kind=Kind.OPEN_SESSION))).session
    write = command(session, 1, "app/once", 1)
    first = await three[leader].submit(write)
    await three.boxes[leader].stop()
    again = await three["watcher"].submit(write)
    assert again == first
    assert (await three["watcher"].read(linearizable=True)).revision == first.revision


async def test_three_fresh_nodes_started_at_once_never_elect(lab: Lab) -> None:
    await asyncio.gather(*(lab.box(name).start() for name in ("a", "b", "c")))
    for name in ("a", "b", "c"):
        consensus = lab[name].host.consensus
        assert consensus is not None
        assert consensus.deadline is None, "a timer would lead to an election"
        assert lab[name].status().seat is None
        with pytest.raises(LogNotFounded):
            await put(lab[name], "app/x", 1)


async def test_one_founder_among_three_gives_one_log(lab: Lab) -> None:
    await asyncio.gather(*(lab.box(name).start(found=name == "b") for name in ("a", "b", "c")))
    await lab.until(lambda: all(lab[name].status().seat is not None for name in ("a", "b", "c")))
    assert len({lab[name].status().seat.log for name in ("a", "b", "c")}) == 1  # type: ignore[union-attr]
    assert lab["b"].status().voters == (lab.box("b").id,)
    assert (await put(lab["a"], "app/x", 1)).code is Code.DONE


async def test_two_halves_that_were_founded_apart_refuse_each_other_by_name(lab: Lab) -> None:
    one, two = lab.box("one"), lab.box("two")
    await one.start(found=True)
    await lab.until(lambda: one.council.leading)
    one.cut_off = True
    await two.start(found=True)
    await lab.until(lambda: two.council.leading)
    logs = [box.council.seat.log for box in (one, two)]  # type: ignore[union-attr]
    assert logs[0] != logs[1]
    lab.cut()
    assert one.council.status().other_logs == {logs[1]: (two.id,)}
    with pytest.raises(ChangeRefused, match=logs[1]):
        await one.council.add(two.id)
    await put(one.council, "app/side", 1)
    await put(two.council, "app/side", 2)
    assert one.council.state.values["app/side"].text == "1"
    assert two.council.state.values["app/side"].text == "2"


async def test_an_observer_goes_on_by_revision_at_another_voter(three: Lab) -> None:
    for number in range(5):
        await put(three["a"], f"app/k{number}", number)
    await three.have(5)
    taken: list[Piece] = []
    follower = three["watcher"]._follower
    take = follower._following.take

    def spy(piece: Piece) -> object:
        taken.append(piece)
        return take(piece)

    follower._following.take = spy  # type: ignore[method-assign,assignment]
    followed = three["watcher"].status().following
    name = next(box.name for box in three.boxes.values() if box.id == followed)
    await three.boxes[name].stop()
    await three.until(lambda: bool(three.leader))
    await put(three[three.leader], "app/k5", 5)
    await three.have(6)
    assert Content.SNAPSHOT not in {piece.content for piece in taken}
    assert three["watcher"].state.values["app/k5"].text == "5"


async def test_an_observer_that_restarts_alone_knows_its_last_revision(
    three: Lab,
) -> None:
    await put(three["a"], "app/x", 1)
    await three.have(1)
    await three.boxes["watcher"].stop()
    for name in ("a", "b", "c"):
        await three.boxes[name].stop()
    await three.boxes["watcher"].start()
    reading = await three["watcher"].read()
    assert (reading.revision, reading.stale_s) == (1, None)


async def test_a_restart_of_everybody_keeps_everything(three: Lab) -> None:
    for number in range(10):
        await put(three["watcher"], f"app/k{number}", number)
    log = three["a"].status().seat
    for box in three.boxes.values():
        await box.stop()
    for name in ("a", "b", "c", "watcher"):
        await three.boxes[name].start()
    outcome = await put(three["watcher"], "app/more", 1)
    assert outcome.revision == 11
    assert three["a"].status().seat == log


async def test_a_voter_whose_disk_fails_drops_out_and_comes_back(three: Lab) -> None:
    victim = three.leader
    store = three[victim].host._opened
    assert isinstance(store, Store)
    store.broken = StateUnwritable("no space left")
    outcome = await put(three["watcher"], "app/x", 1)
    assert outcome.code is Code.DONE
    await three.until(lambda: "no space left" in three[victim].status().stopped_why)
    reading = await three[victim].read(linearizable=True)
    assert reading.state.values["app/x"].text == "1"
    store.broken = None
    await three.until(lambda: three[victim].status().stopped_why == "")
    await three.until(lambda: three[victim].host.consensus.state.revision == 1)  # type: ignore[union-attr]


async def test_a_removed_voter_learns_of_it_and_observes(three: Lab) -> None:
    gone = next(name for name in ("a", "b", "c") if name != three.leader)
    await three["watcher"].remove(three.boxes[gone].id)
    await three.until(lambda: three[gone].status().seat.kind is SeatKind.OBSERVER)  # type: ignore[union-attr]
    await put(three["watcher"], "app/x", 1)
    await three.have(1)
    await three["watcher"].add(three.boxes[gone].id)
    await three.until(lambda: three[gone].status().seat.kind is SeatKind.LEARNER)  # type: ignore[union-attr]


async def test_the_office_is_handed_over_without_an_election_timeout(three: Lab) -> None:
    to = next(name for name in ("a", "b", "c") if name != three.leader)
    await three["watcher"].transfer(three.boxes[to].id)
    await three.until(lambda: three.leader == to)
    assert (await put(three["watcher"], "app/x", 1)).code is Code.DONE


async def test_a_leader_that_the_mesh_misses_is_followed_without_an_election_timeout(tmp_path: Path) -> None:
    async with open_lab(tmp_path) as lab:
        await lab.voters("a", "b", "c")
        for name in ("b", "c"):
            consensus = lab[name].host.consensus
            assert consensus is not None
            consensus.raft.config = replace(FAST.raft, heartbeat_s=0.5, election_timeout_s=600.0)
        gone, revision = lab.boxes["a"].id, lab["a"].state.revision
        assert (await put(lab["a"], "app/x", 0)).code is Code.DONE
        await lab.have(revision + 1)  # from the leader they have heard under their new patience
        await lab.boxes["a"].stop()
        for name in ("b", "c"):
            lab[name].host.doubt(gone)
        await lab.until(lambda: lab.leader in ("b", "c"))
        assert (await put(lab["b"], "app/x", 1)).code is Code.DONE


async def test_a_leader_that_leaves_hands_its_office_over_before(three: Lab) -> None:
    leader = three.leader
    term = three[leader].status().term
    await Electorate(three[leader], three.boxes[leader].view).hand_over()
    await three.boxes[leader].stop()
    heir = three.leader
    assert heir not in ("", leader), "somebody leads already when it has left"
    assert three[heir].status().term == term + 1


async def test_a_learner_that_needs_a_snapshot_gets_it_in_pieces(tmp_path: Path) -> None:
    raft = RaftConfig(
        heartbeat_s=0.04,
        election_timeout_s=0.25,
        compact_entries=50,
        trailing_entries_max=0,
        chunk_bytes_max=2000,
    )
    async with open_lab(tmp_path, replace(FAST, raft=raft)) as lab:
        await lab.voters("a")
        await asyncio.gather(*(put(lab["a"], f"app/k{number}", "x" * 100) for number in range(200)))
        consensus = lab["a"].host.consensus
        assert consensus is not None and consensus.raft.log.snapshot.index > 50
        await lab.box("late").start()
        await lab["a"].add(lab.box("late").id)
        await lab.until(lambda: lab.box("late").id in lab["a"].status().caught_up)
        late = lab["late"].host.consensus
        assert late is not None and len(late.state.values) == 200
