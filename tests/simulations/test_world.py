"""The world itself: what it promises to the machines that are tried in it.

A small machine of its own (it counts, echoes and persists) keeps these tests free of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fieldmesh.core.events import Persist, Received, Send, Tick
from fieldmesh.core.model import Address, NodeId
from simulations.world import DiskSpeed, Host, IdentityCodec, InvariantBroken, Link, World

A, B = Address(host="a", port=1), Address(host="b", port=1)


class Recorder:
    """Records what it gets and when; does what ``script`` says for an event."""

    def __init__(self, script: dict[Any, list[Any]] | None = None, period_s: float | None = None) -> None:
        self.seen: list[tuple[float, Any]] = []
        self.script = script or {}
        self.period_s = period_s
        self.deadline: float | None = None if period_s is None else 0.0

    def handle(self, event: Any, now: float) -> list[Any]:
        key = event.message if isinstance(event, Received) else event
        self.seen.append((now, key))
        if isinstance(event, Tick):
            assert self.period_s is not None
            self.deadline = now + self.period_s
            return []
        return self.script.get(key, [])

    def check(self) -> None:
        assert not any(key == "poison" for _, key in self.seen), "poisoned"

    @property
    def messages(self) -> list[Any]:
        return [key for _, key in self.seen]


def send(address: Address, message: Any) -> Send[Any]:
    return Send(to=None, address=address, message=message)


def make(a: Recorder, b: Recorder, *, seed: int = 1, link: Link | None = None, **options: Any) -> World:
    world = World(seed, IdentityCodec(), link=link, **options)

    def boot(machine: Recorder) -> Any:
        def start(host: Host) -> tuple[Recorder, Iterable[Any]]:
            return machine, ()

        return start

    world.add_host("a", NodeId("a"), (A,), boot(a), disk_speed=DiskSpeed(sync_s_min=0.1, sync_s_max=0.1))
    world.add_host("b", NodeId("b"), (B,), boot(b))
    world.start("a")
    world.start("b")
    return world


def test_a_send_behind_a_persist_leaves_only_when_it_is_durable() -> None:
    a, b = Recorder({"go": [send(B, "early"), Persist(key="k", data=b"v"), send(B, "late")]}), Recorder()
    world = make(a, b)
    world.post("a", "go")
    world.run(0.05)
    assert b.messages == ["early"] and world.hosts["a"].disk.durable == {}
    world.run(1.0)
    assert b.messages == ["early", "late"] and world.hosts["a"].disk.durable == {"k": b"v"}


@pytest.mark.parametrize("lists_wait", [True, False])
def test_a_later_list_waits_for_an_earlier_persist_only_where_asked(lists_wait: bool) -> None:
    a, b = Recorder({"go": [Persist(key="k", data=b"v"), send(B, 1)], "then": [send(B, 2)]}), Recorder()
    world = make(a, b, lists_wait=lists_wait)
    world.post("a", "go")
    world.post("a", "then")
    world.run(1.0)
    assert b.messages == ([1, 2] if lists_wait else [2, 1])


def test_a_crash_keeps_a_prefix_of_the_unsynced_writes_and_sends_nothing_behind_them() -> None:
    kept = set()
    for seed in range(30):
        writes = [Persist(key=f"k{i}", data=b"v") for i in range(3)]
        a, b = Recorder({"go": [*writes, send(B, "done")]}), Recorder()
        world = make(a, b, seed=seed)
        world.post("a", "go")
        world.run(0.05)
        world.crash("a")
        world.run(2.0)
        durable = sorted(world.hosts["a"].disk.durable)
        assert durable == [f"k{i}" for i in range(len(durable))]
        assert b.messages == []
        kept.add(len(durable))
    assert kept == {0, 1, 2, 3}


def test_a_frozen_machine_gets_everything_late_and_in_order() -> None:
    b = Recorder(period_s=0.5)
    world = make(Recorder(), b)
    world.run(1.2)
    world.freeze("b", 3.0)
    world.post("b", "x", 0.1)
    world.post("b", "y", 0.2)
    before = len(b.seen)
    world.run(4.1)
    assert len(b.seen) == before
    world.run(4.3)
    late = b.seen[before:]
    assert [key for _, key in late if key in ("x", "y")] == ["x", "y"]
    assert late[0][0] == pytest.approx(4.2) and any(key == Tick() for _, key in late)


def test_links_keep_order_unless_told_otherwise() -> None:
    a = Recorder({"go": [send(B, i) for i in range(50)]})
    b = Recorder()
    world = make(a, b, link=Link(jitter_s=0.05))
    world.post("a", "go")
    world.run(10)
    assert b.messages == list(range(50))
    a, b = Recorder({"go": [send(B, i) for i in range(50)]}), Recorder()
    world = make(a, b, link=Link(jitter_s=0.05, reorder=0.5, duplicate=0.3, loss=0.2))
    world.post("a", "go")
    world.run(10)
    assert b.messages != sorted(b.messages)
    assert min(world.counts[kind] for kind in ("lost", "duplicated", "reordered")) > 0


def test_a_one_way_cut_drops_one_direction_until_healed() -> None:
    a, b = Recorder({"go": [send(B, "ab")]}), Recorder({"go": [send(A, "ba")]})
    world = make(a, b)
    world.cut(["a"], ["b"], both=False)
    for label in ("a", "b"):
        world.post(label, "go")
    world.run(1)
    assert "ab" not in b.messages and "ba" in a.messages
    world.heal()
    world.post("a", "go")
    world.run(2)
    assert "ab" in b.messages


def test_senders_learn_of_a_killed_process_but_not_of_a_power_loss() -> None:
    for power in (False, True):
        a = Recorder({"go": [send(B, "hello")]})
        world = make(a, Recorder(), refused=lambda effect: ("refused", effect.address))
        world.post("a", "go")
        world.run(1)
        world.crash("b", power=power)
        world.post("a", "go")
        world.run(2)
        assert (("refused", B) in a.messages) is not power


def test_a_clock_with_an_offset_and_a_rate_ticks_on_its_own_time() -> None:
    machine = Recorder(period_s=1.0)
    world = World(1, IdentityCodec())
    world.add_host("a", NodeId("a"), (A,), lambda host: (machine, ()), clock_offset_s=100.0, clock_rate=2.0)
    world.start("a")
    world.run(10.1)
    assert len(machine.seen) == 21
    assert machine.seen[0][0] == pytest.approx(100.0) and machine.seen[-1][0] == pytest.approx(
        120.0, abs=1e-3
    )


def test_a_machine_whose_deadline_never_moves_is_called_a_timer_storm() -> None:
    machine = Recorder(period_s=0.0)
    world = World(1, IdentityCodec())
    world.add_host("a", NodeId("a"), (A,), lambda host: (machine, ()))
    world.start("a")
    with pytest.raises(InvariantBroken, match="stays in the past"):
        world.run(1.0)


def test_a_failed_check_names_the_time_and_the_host() -> None:
    world = make(Recorder(), Recorder())
    world.post("b", "poison", 0.25)
    with pytest.raises(InvariantBroken, match=r"t=0\.250000 b .*poisoned"):
        world.run(1)


def test_equal_seeds_make_equal_runs_and_other_seeds_do_not() -> None:
    def digest(seed: int) -> str:
        a, b = Recorder({"go": [send(B, i) for i in range(20)]}, period_s=0.3), Recorder(period_s=0.2)
        world = make(a, b, seed=seed, link=Link(loss=0.3, jitter_s=0.2))
        world.post("a", "go")
        world.run(5)
        return world.digest

    assert digest(1) == digest(1) != digest(2)
