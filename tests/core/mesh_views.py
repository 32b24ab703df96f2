"""Views of a mesh made by hand: a generalist, a programmer, a nurse, and as many more as a test needs."""

from __future__ import annotations

from fieldmesh.core.model import (
    Address,
    Domain,
    EngineState,
    Load,
    Member,
    MeshView,
    NodeId,
    NodeState,
    ProfileOffer,
    Row,
)

IDLE = Load(
    engine=EngineState.READY, slots=4, queue_max=8, prefill_tokens_per_s=300.0, decode_tokens_per_s=100.0
)
CODE = Domain(
    name="programming",
    description="Writing and reading programs",
    examples=("Write a function that sorts a list", "Why does this Python loop not end?", "Fix my SQL query"),
)
HEALTH = Domain(
    name="first_aid",
    description="Injuries and illness",
    examples=("My child has a fever", "How do I bandage a wound?", "What helps against a burn?"),
)
GENERAL_OFFER = ProfileOffer(name="general", model="smol", fingerprint="f1")
CODE_OFFER = ProfileOffer(name="code", model="smol", fingerprint="f1", domains=(CODE,))
HEALTH_OFFER = ProfileOffer(name="health", model="med", fingerprint="f2", domains=(HEALTH,))


def member(
    name: str,
    *offers: ProfileOffer,
    state: NodeState = NodeState.ALIVE,
    load: Load = IDLE,
    rtt_s: float = 0.001,
) -> Member:
    address = Address(host="127.0.0.1", port=7000)
    row = Row(
        id=NodeId(name),
        name=name,
        mesh="m",
        incarnation=1,
        sequence=1,
        addresses=(address,),
        client_addresses=(address,),
        profiles=offers,
    )
    return Member(
        id=NodeId(name),
        name=name,
        address=address,
        state=state,
        incarnation=1,
        load=load,
        rtt_s=rtt_s,
        row=row,
    )


def view(*members: Member, local: str = "a") -> MeshView:
    return MeshView(local=NodeId(local), members=tuple(sorted(members, key=lambda m: m.id)))


def three() -> tuple[Member, Member, Member]:
    return member("a", GENERAL_OFFER), member("b", CODE_OFFER), member("c", HEALTH_OFFER)
