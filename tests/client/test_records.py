"""What arrives is read without trust: a node may say anything that protobuf can carry."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.cli.looking import mesh_json
from fieldmesh.client import Mesh, as_json
from fieldmesh.client.records import Reply, mesh_from_proto
from fieldmesh.core.errors import Internal
from fieldmesh.core.model import Address, EngineState, NodeState
from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1 import mesh_pb2


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7420", Address(host="10.0.0.1", port=7420)),
        ("[fe80::1]:7420", Address(host="fe80::1", port=7420)),
        ("box.local:1", Address(host="box.local", port=1)),
        ("box", None),
        (":7420", None),
        ("box:0", None),
        ("box:65536", None),
        ("box:" + "9" * 5000, None),
        ("box:７４２０", None),
    ],
)
def test_addresses_that_nodes_tell_are_taken_or_left(text: str, address: Address | None) -> None:
    told = mesh_pb2.ListNodesResponse(nodes=[mesh_pb2.NodeInfo(addresses=[text])])
    assert mesh_from_proto(told).nodes[0].addresses == ((address,) if address else ())


_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
_ports = st.one_of(_text, st.integers().map(lambda port: f"h:{port}"))
_numbers = st.integers(0, 2**32 - 1)
_floats = st.floats()


@given(
    addresses=st.lists(_ports, max_size=4),
    name=_text,
    state=st.integers(-5, 50),
    engine=st.integers(-5, 50),
    count=_numbers,
    speed=_floats,
)
def test_any_node_that_is_told_becomes_a_record_and_json(
    addresses: list[str], name: str, state: int, engine: int, count: int, speed: float
) -> None:
    load = pb.Load(engine=engine, slots=count, decode_tokens_per_s=speed)  # type: ignore[arg-type]
    node = mesh_pb2.NodeInfo(name=name, addresses=addresses, state=state, load=load, rtt_s=speed)  # type: ignore[arg-type]
    (record,) = mesh_from_proto(mesh_pb2.ListNodesResponse(nodes=[node])).nodes
    assert isinstance(record.state, NodeState)
    assert isinstance(record.load.engine, EngineState)
    assert all(0 < address.port < 65_536 for address in record.addresses)
    json.dumps(as_json(record), allow_nan=False)
    json.dumps(mesh_json(Mesh(name="", local_id="", nodes=(record,))), allow_nan=False)


def test_a_message_of_an_unknown_kind_is_an_error_and_not_an_answer() -> None:
    with pytest.raises(Internal, match="does not know"):
        Reply().take(pb.ChatResponse())


def test_text_that_comes_after_its_tokens_is_part_of_the_answer() -> None:
    reply = Reply()
    for chunk in (pb.Chunk(token_ids=[1, 2]), pb.Chunk(first_token_index=2, text="é")):
        reply.take(pb.ChatResponse(chunk=chunk))
    reply.take(pb.ChatResponse(complete=pb.Complete(served_by="a")))
    assert reply.result is not None
    assert (reply.result.text, reply.result.token_ids) == ("é", (1, 2))
