"""Health. Goal: a probe hears SERVING exactly when somebody, or this profile, can answer."""

from __future__ import annotations

from dataclasses import replace

from fieldmesh.core.model import Address, EngineState, Load, Member, MeshView, NodeId, NodeState
from fieldmesh.runtime.health import INFERENCE, MESH, statuses

READY = Load(engine=EngineState.READY, slots=1)
LOADING = Load(engine=EngineState.LOADING)
LOST = Load(engine=EngineState.LOST)


def member(name: str, load: Load, state: NodeState = NodeState.ALIVE) -> Member:
    node = NodeId(name * 32)
    return Member(
        id=node, name=name, address=Address(host="h", port=1), state=state, incarnation=1, load=load
    )


def view(local: Load, *others: Member) -> MeshView:
    return MeshView(local=NodeId("a" * 32), members=(member("a", local), *others))


def health(view: MeshView, *, draining: bool = False, settled: bool = True) -> dict[str, bool]:
    able = view.members[0].load.engine is EngineState.READY
    return statuses(view, {"p": able}, draining=draining, settled=settled)


def test_a_ready_node_serves() -> None:
    assert health(view(READY)) == {"": True, INFERENCE: True, MESH: True, f"{INFERENCE}/p": True}


def test_a_node_whose_engine_is_lost_still_serves_through_a_peer_but_not_its_profile() -> None:
    found = health(view(LOST, member("b", READY)))
    assert (found[INFERENCE], found[f"{INFERENCE}/p"]) == (True, False)


def test_a_node_that_nobody_can_help_does_not_serve() -> None:
    dead = member("b", READY, NodeState.DEAD)
    assert not health(view(LOST, dead, member("c", LOADING)))[INFERENCE]


def test_a_node_that_still_loads_for_the_first_time_does_not_serve() -> None:
    assert not health(view(LOADING, member("b", READY)), settled=False)[""]


def test_a_draining_node_does_not_serve() -> None:
    assert not any(health(view(replace(READY, draining=True)), draining=True).values())
