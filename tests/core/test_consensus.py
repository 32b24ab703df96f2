"""The log and its meaning, stacked: every request has one answer, or none."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from raft_bench import GROUP, members, stored

from fieldmesh.core import settings
from fieldmesh.core.consensus import Answered, Consensus, NotDone, StateChanged, Submit
from fieldmesh.core.errors import UpgradeNeeded
from fieldmesh.core.events import Received, Tick
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import (
    Append,
    AppendReply,
    Chunk,
    Entry,
    EntryKind,
    Message,
    PreVoteReply,
    Propose,
    RaftConfig,
    Refusal,
    Save,
    Saved,
    VoteReply,
)

A, B = NodeId("a"), NodeId("b")
OPEN = settings.Command(kind=settings.Kind.OPEN_SESSION)


def perform(machine: Consensus, event: Any, now: float) -> list[Any]:
    effects = list(machine.handle(event, now))
    for effect in list(effects):
        if isinstance(effect, Save):
            effects += perform(machine, Saved(sequence=effect.sequence), now)
    machine.check()
    return effects


def alone(config: RaftConfig | None = None) -> Consensus:
    machine = Consensus(A, config or RaftConfig(), stored("", members("a")), Random(1), 0.0)
    perform(machine, Tick(), 10.0)
    return machine


def hear(machine: Consensus, term: int, body: Any, now: float = 10.0) -> list[Any]:
    message = Message(group=GROUP, epoch=0, term=term, body=body)
    return perform(machine, Received(sender=B, message=message), now)


def leader_of_three() -> Consensus:
    machine = Consensus(A, RaftConfig(), stored("", members("abc")), Random(1), 0.0)
    perform(machine, Tick(), 10.0)
    hear(machine, 2, PreVoteReply(granted=True))
    hear(machine, 2, VoteReply(granted=True))
    hear(machine, 2, AppendReply(ok=True, index=2))
    return machine


def of(effects: list[Any], kind: Any) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_a_command_is_answered_when_it_is_committed() -> None:
    effects = perform(alone(), Submit(requests=((7, OPEN),), time_ms=5), 11.0)
    done = settings.Outcome(code=settings.Code.DONE, session=3)
    assert of(effects, Answered) == [Answered(request=7, outcome=done)]


def test_commands_of_one_submit_share_a_save() -> None:
    effects = perform(alone(), Submit(requests=tuple((n, OPEN) for n in range(20)), time_ms=5), 11.0)
    assert len(of(effects, Save)) == 1
    assert [answer.request for answer in of(effects, Answered)] == list(range(20))


def test_a_command_that_no_entry_can_hold_is_refused_and_the_others_are_done() -> None:
    changes = tuple(settings.Change(key=f"app/k{n}", value="x" * 60_000) for n in range(6))
    large = settings.Command(kind=settings.Kind.WRITE, session=1, sequence=1, changes=changes)
    effects = perform(alone(), Submit(requests=((7, large), (8, OPEN)), time_ms=5), 11.0)
    assert of(effects, NotDone) == [NotDone(request=7, reason=Refusal.TOO_LARGE, leader=A)]
    assert [answer.request for answer in of(effects, Answered)] == [8]


def test_a_command_carries_the_time_of_its_leader() -> None:
    machine = alone()
    perform(machine, Submit(requests=((7, OPEN),), time_ms=12345), 11.0)
    assert machine.state.time_ms == 12345


def test_a_follower_names_the_leader() -> None:
    machine = Consensus(A, RaftConfig(), stored("", members("ab")), Random(1), 0.0)
    hear(machine, 2, Append(prev_index=0, prev_term=0))
    effects = perform(machine, Submit(requests=((7, OPEN),), time_ms=5), 10.0)
    assert effects == [NotDone(request=7, reason=Refusal.NOT_LEADER, leader=B)]


def test_a_command_whose_place_was_taken_is_reported_as_not_done() -> None:
    machine = leader_of_three()
    perform(machine, Submit(requests=((7, OPEN),), time_ms=5), 10.0)
    other = Entry(index=3, term=4, kind=EntryKind.COMMAND, data=settings.encode(OPEN))
    effects = hear(machine, 4, Append(prev_index=2, prev_term=2, entries=(other,), commit=3))
    assert of(effects, Answered) == []
    assert of(effects, NotDone) == [NotDone(request=7, reason=None, leader=B)]


def test_a_command_that_another_leader_commits_is_answered() -> None:
    machine = leader_of_three()
    perform(machine, Submit(requests=((7, OPEN),), time_ms=5), 10.0)
    effects = hear(machine, 4, Append(prev_index=3, prev_term=2, commit=3))
    assert [answer.request for answer in of(effects, Answered)] == [7]


def test_a_snapshot_leaves_the_outcome_unknown() -> None:
    machine = leader_of_three()
    perform(machine, Submit(requests=((7, OPEN),), time_ms=5), 10.0)
    data = settings.snapshot(settings.State(revision=4))
    chunk = Chunk(index=9, index_term=3, members=members("abc"), offset=0, total_bytes=len(data), data=data)
    effects = hear(machine, 4, chunk)
    assert of(effects, Answered | NotDone) == []
    assert of(effects, StateChanged) == [StateChanged(applied=9, revision=4)]


def test_the_log_is_compacted_when_it_has_grown() -> None:
    machine = alone(RaftConfig(compact_entries=10, trailing_entries_max=2))
    for number in range(25):
        perform(machine, Submit(requests=((number, OPEN),), time_ms=number), 11.0)
    assert machine.raft.log.snapshot.index >= 20
    assert settings.restore(machine.raft.log.snapshot.data).sessions
    assert machine.raft.log.last_index - machine.raft.log.first_index < 15


def test_a_command_that_a_member_cannot_apply_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = leader_of_three()
    monkeypatch.setattr(settings, "COMMAND_VERSION", 2)
    effects = perform(machine, Submit(requests=((7, OPEN),), time_ms=5), 10.0)
    assert effects == [NotDone(request=7, reason=Refusal.VERSION_UNKNOWN, leader=A)]


def test_a_command_of_a_newer_version_stops_the_node_and_is_never_skipped() -> None:
    machine = alone()
    with pytest.raises(UpgradeNeeded, match="version 9"):
        perform(machine, Propose(commands=(b"\x09{}",)), 11.0)
