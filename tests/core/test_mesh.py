"""The one door: how membership and directory meet, the view, the snapshot. Worlds are simulated."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.events import Persist, Tick
from fieldmesh.core.mesh import (
    INCARNATION_KEY,
    SNAPSHOT_KEY,
    Identity,
    LeaveRequested,
    LoadChanged,
    Mesh,
    MeshConfig,
    OfferChanged,
)
from fieldmesh.core.model import Address, Domain, EngineState, Load, NodeState, ProfileOffer
from fieldmesh.rpc import wire
from simulations.node import KeyedSealer, MeshCodec, Settings, booter, make_key, node_id, profile, refused
from simulations.world import World


def address(index: int) -> Address:
    return Address(host=f"10.0.0.{index + 1}", port=7000)


def world(count: int, *, seed: int = 1, **mesh: Any) -> World:
    made = World(seed, MeshCodec(), refused=refused, lists_wait=False)
    for index in range(count):
        settings = Settings(
            name=f"n{index}",
            mesh="home",
            key=make_key(f"n{index}"),
            seeds=(address(0),),
            profiles=(profile(f"p{index}", f"subject {index}"),),
            config=MeshConfig(**mesh),
        )
        made.add_host(f"n{index}", node_id(settings.key), (address(index),), booter(settings, Random(index)))
        made.start(f"n{index}")
    return made


def mesh_of(made: World, label: str) -> Mesh:
    machine = made.hosts[label].machine
    assert isinstance(machine, Mesh)
    return machine


def test_a_joining_node_is_usable_by_all_others_within_a_second() -> None:
    made = world(4)
    made.run(1.0)
    for label in made.hosts:
        members = mesh_of(made, label).view.members
        assert [m.state for m in members] == [NodeState.ALIVE] * 4
        assert all(m.row is not None and m.row.profiles for m in members)
        assert [m.id for m in members] == sorted(m.id for m in members)


def test_a_quiet_mesh_exchanges_nothing_but_beats() -> None:
    made = world(3)
    made.run(10.0)
    before = made.counts["sent"]
    persisted = made.counts["persist"]
    made.run(70.0)
    per_node_and_s = (made.counts["sent"] - before) / 60 / 3
    assert per_node_and_s == pytest.approx(2 * 2, rel=0.1), "two peers, two beats a second"
    assert made.counts["persist"] == persisted


def test_the_view_is_one_object_until_something_changes_and_then_of_a_higher_revision() -> None:
    made = world(3)
    made.run(5.0)
    mesh = mesh_of(made, "n0")
    before = mesh.view
    assert mesh.view is before
    mesh.handle(Tick(), made.hosts["n0"].local(made.time))
    assert mesh.view is before and not mesh.view_changed
    made.post("n1", LoadChanged(load=Load(engine=EngineState.READY, slots=2)))
    made.run(6.0)
    assert mesh.view_changed
    assert mesh.view.revision > before.revision and not mesh.view_changed


@pytest.mark.parametrize(("probability", "seconds_max"), [(0.3, 0.4), (0.5, 0.5)])
def test_ten_minutes_of_loops_that_are_late_by_hundreds_of_ms_accuse_nobody(
    probability: float, seconds_max: float
) -> None:
    made = world(3)
    made.run(2.0)
    for label in made.hosts:
        made.make_late(label, probability, seconds_max)
    made.run(600.0)
    assert set(made.notes) <= {"peer_alive"}
    made.crash("n2", power=True)
    made.run(604.0)
    assert [m.state for m in mesh_of(made, "n0").view.members if m.name == "n2"] != [NodeState.ALIVE]


def test_a_new_offer_reaches_everybody_within_a_second() -> None:
    made = world(3)
    made.run(3.0)
    made.post("n2", OfferChanged(profiles=(profile("new", "cars"),)))
    made.run(4.0)
    rows = [m.row for m in mesh_of(made, "n0").view.members if m.name == "n2"]
    assert [p.name for row in rows if row is not None for p in row.profiles] == ["new"]


def test_an_offer_that_makes_no_acceptable_row_raises_and_the_old_one_stays() -> None:
    made = world(1)
    made.run(1.0)
    mesh = mesh_of(made, "n0")
    examples = tuple("x" * 1000 for _ in range(70))
    domain = Domain(name="d", description="d", examples=examples)
    huge = ProfileOffer(name="p", model="m", fingerprint="f", domains=(domain,))
    for bad in ((huge,), (profile("p", "w"),) * 40):
        with pytest.raises(InvalidRequest, match="profiles"):
            mesh.handle(OfferChanged(profiles=bad), 2.0)
    mesh.check()
    assert [p.name for m in mesh.view.members if m.row for p in m.row.profiles] == ["p0"]


def test_an_address_that_changes_at_run_time_is_followed() -> None:
    made = world(3)
    made.run(3.0)
    new = Address(host="10.9.9.9", port=7000)
    made.move("n2", (new,))
    made.post("n2", OfferChanged(addresses=(new,)))
    made.run(6.0)
    for label in ("n0", "n1"):
        member = next(m for m in mesh_of(made, label).view.members if m.name == "n2")
        assert (member.address, member.state) == (new, NodeState.ALIVE)


def test_a_node_with_two_addresses_is_reached_by_the_one_that_works() -> None:
    made = world(1)
    settings = Settings(
        name="two",
        mesh="home",
        key=make_key("two"),
        seeds=(address(0),),
        profiles=(),
        config=MeshConfig(),
    )
    dead, good = Address(host="172.17.0.1", port=7000), Address(host="10.0.0.9", port=7000)
    host = made.add_host("two", node_id(settings.key), (dead, good), booter(settings, Random(3)))
    made.start("two")
    made._owners.pop(dead)  # nobody is reached there
    made.run(6.0)
    member = next(m for m in mesh_of(made, "n0").view.members if m.name == "two")
    assert (member.address, member.state) == (good, NodeState.ALIVE)
    assert host.machine is not None


def test_a_restart_keeps_the_id_and_the_old_row_never_wins() -> None:
    made = world(3)
    made.run(3.0)
    made.crash("n2")
    made.run(4.0)
    made.start("n2")
    made.run(6.0)
    member = next(m for m in mesh_of(made, "n0").view.members if m.name == "n2")
    assert member.incarnation == 2 and member.row is not None and member.row.incarnation == 2


def test_the_snapshot_is_an_address_book_when_all_seeds_are_gone() -> None:
    made = world(3)
    made.run(10.0)
    made.crash("n0", power=True)  # the only seed
    made.crash("n2")
    assert SNAPSHOT_KEY in made.hosts["n2"].disk.durable
    made.run(12.0)
    made.start("n2")
    made.run(16.0)
    member = next(m for m in mesh_of(made, "n2").view.members if m.name == "n1")
    assert member.state is NodeState.ALIVE


def test_a_node_restored_from_a_backup_rises_above_its_own_record_and_says_so() -> None:
    made = world(3)
    made.run(3.0)
    made.crash("n2")
    made.hosts["n2"].disk.durable[INCARNATION_KEY] = b"0"
    made.run(4.0)
    made.start("n2")
    made.run(14.0)
    member = next(m for m in mesh_of(made, "n0").view.members if m.name == "n2")
    assert member.state is NodeState.ALIVE and member.incarnation > 1
    assert made.notes["own_id_seen_elsewhere"] == 1
    assert int(made.hosts["n2"].disk.durable[INCARNATION_KEY]) == member.incarnation


def test_rows_of_nodes_that_are_gone_for_long_are_dropped_everywhere() -> None:
    made = world(3, row_keep_s=100.0, compact_check_interval_s=10.0)
    made.run(3.0)
    made.crash("n2", power=True)
    made.run(90.0)
    assert len(mesh_of(made, "n0").replica.rows) == 3
    made.run(200.0)
    assert len(mesh_of(made, "n0").replica.rows) == len(mesh_of(made, "n1").replica.rows) == 2
    assert mesh_of(made, "n0").replica.mark == mesh_of(made, "n1").replica.mark


def test_a_damaged_snapshot_is_told_and_otherwise_ignored() -> None:
    key = make_key("x")
    identity = Identity(id=node_id(key), name="x", mesh="home", addresses=(address(0),))
    mesh = Mesh(identity=identity, sealer=KeyedSealer(key), codec=wire, rng=Random(1), snapshot=b"rubbish")
    notes = [getattr(effect, "event", "") for effect in mesh.handle(Tick(), 1.0)]
    assert "snapshot_damaged" in notes


def test_an_identity_that_makes_no_row_is_refused_at_once() -> None:
    key = make_key("x")
    identity = Identity(id=node_id(key), name="x" * 65, mesh="home", addresses=(address(0),))
    with pytest.raises(InvalidRequest, match="name"):
        Mesh(identity=identity, sealer=KeyedSealer(key), codec=wire, rng=Random(1))


def test_a_node_that_leaves_says_so_and_does_nothing_more() -> None:
    made = world(2)
    made.run(3.0)
    made.post("n1", LeaveRequested())
    made.run(3.1)
    mesh = mesh_of(made, "n1")
    assert mesh.deadline is None and mesh.handle(Tick(), 99_999.0) == []
    assert SNAPSHOT_KEY in made.hosts["n1"].disk.durable, "what it knew was kept for its return"
    assert [m.state for m in mesh_of(made, "n0").view.members if m.name == "n1"] == [NodeState.LEFT]
    mesh.check()


def test_a_war_of_two_copies_of_one_key_is_bounded() -> None:
    key = make_key("x")
    identity = Identity(id=node_id(key), name="x", mesh="home", addresses=(address(0),))
    mesh = Mesh(identity=identity, sealer=KeyedSealer(key), codec=wire, rng=Random(1))
    raises = 0
    for step in range(20):
        mesh.membership.own_incarnation_seen = mesh.membership.incarnation + 5
        raises += sum(
            isinstance(e, Persist) and e.key == INCARNATION_KEY for e in mesh.handle(Tick(), float(step))
        )
    assert raises == MeshConfig().incarnation_raises_max


def test_a_view_can_be_kept_and_compared() -> None:
    made = world(2)
    made.run(3.0)
    view = mesh_of(made, "n0").view
    assert replace(view) == view and view.local == made.hosts["n0"].identity
