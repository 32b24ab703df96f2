"""Control messages and rows on the wire: what was said comes out, and nothing malformed does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmesh.core import messages as m
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Address, ColdProfile, Domain, EngineState, Load, NodeId, ProfileOffer, Row
from fieldmesh.rpc import wire
from fieldmesh.v1 import peer_pb2 as pb

SENDER = NodeId("0123456789abcdef" * 2)

ids = st.integers(0, 2**128 - 1).map(lambda n: NodeId(f"{n:032x}"))
numbers = st.integers(0, 2**62)
names = st.text(min_size=1, max_size=m.NAME_CHARACTERS_MAX).filter(lambda t: t.isprintable())
addresses = st.builds(
    Address, host=st.sampled_from(["10.0.0.1", "fd00::1", "box.local"]), port=st.integers(1, 65535)
)
address_lists = st.lists(addresses, max_size=m.ADDRESSES_MAX).map(tuple)
seconds = st.floats(-1e9, 1e9)
counts = st.integers(0, 2**32 - 1)
speeds = st.floats(0.001, 1e6) | st.just(0.0)
loads = st.builds(
    Load,
    engine=st.sampled_from(EngineState),
    slots=counts,
    running=counts,
    queued=counts,
    queue_max=counts,
    kv_cells_used=counts,
    kv_cells_total=counts,
    pending_prefill_tokens=counts,
    pending_decode_tokens=counts,
    prefill_tokens_per_s=speeds,
    decode_tokens_per_s=speeds,
    draining=st.booleans(),
    cold=st.lists(st.builds(ColdProfile, profile=names, load_s=speeds), max_size=16).map(tuple),
)
marks = st.builds(m.Mark, epoch=numbers, digest=st.binary(max_size=32))
introductions = st.builds(
    m.Introduction,
    mesh=names,
    name=names,
    incarnation=numbers,
    refutations=numbers,
    sequence=numbers,
    nonce=numbers,
    addresses=address_lists,
    directory=marks,
    protocol_min=counts,
    protocol_max=counts,
)
rumors = st.lists(
    st.builds(
        m.Rumor,
        about=ids,
        says=st.sampled_from(m.Rumored),
        incarnation=numbers,
        refutations=numbers,
        accuser=ids,
        name=names,
        addresses=address_lists,
    ),
    max_size=3,
).map(tuple)
gossip = st.lists(
    st.builds(m.Gossip, about=ids, incarnation=numbers, refutations=numbers, sequence=numbers, load=loads),
    max_size=3,
).map(tuple)
hints = st.lists(
    st.builds(
        m.PeerHint, id=ids, name=names, incarnation=numbers, refutations=numbers, addresses=address_lists
    ),
    max_size=3,
).map(tuple)
control_messages = st.one_of(
    st.builds(
        m.Heartbeat,
        to=ids,
        incarnation=numbers,
        refutations=numbers,
        sequence=numbers,
        sent_s=seconds,
        load=loads,
        directory=marks,
        wants_answer=st.booleans(),
        heard_age_s=st.none() | seconds,
        echo_sent_s=seconds,
        echo_held_s=seconds,
        rumors=rumors,
        gossip=gossip,
    ),
    st.builds(m.Hello, who=introductions, dialed=addresses, rumors=rumors, wants_peers=st.booleans()),
    st.builds(m.Welcome, who=introductions, dialed=addresses, peers=hints),
    st.builds(m.Refused, code=names, message=names, dialed=addresses),
    st.builds(m.ProbeRequest, target=ids, address=addresses, nonce=numbers),
    st.builds(m.ProbeReply, target=ids, nonce=numbers, incarnation=numbers, refutations=numbers),
    st.builds(m.Goodbye, incarnation=numbers, sequence=numbers),
    st.builds(m.DirectoryPull, epoch=numbers, state_vector=st.binary(max_size=50), after_client=numbers),
    st.builds(m.DirectoryPush, epoch=numbers, update=st.binary(max_size=50), next_client=numbers),
)
rows = st.builds(
    Row,
    id=ids,
    name=names,
    mesh=names,
    incarnation=numbers,
    sequence=numbers,
    addresses=address_lists,
    client_addresses=address_lists,
    http_addresses=address_lists,
    profiles=st.lists(
        st.builds(
            ProfileOffer,
            name=names,
            model=names,
            fingerprint=names,
            domains=st.lists(
                st.builds(
                    Domain, name=names, description=names, examples=st.lists(names, max_size=3).map(tuple)
                ),
                max_size=2,
            ).map(tuple),
            tier=counts,
            context_tokens=counts,
        ),
        max_size=2,
    ).map(tuple),
    version=names,
    protocol_min=counts,
    protocol_max=counts,
)


@settings(max_examples=300)
@given(control_messages)
def test_every_message_comes_out_as_it_went_in(message: m.ControlMessage) -> None:
    assert wire.decode(wire.encode(SENDER, message)) == (SENDER, message)


@settings(max_examples=100)
@given(rows)
def test_every_row_comes_out_as_it_went_in_and_is_always_spelt_the_same(row: Row) -> None:
    data = wire.encode_row(row)
    decoded = wire.decode_row(data)
    assert decoded == row
    assert wire.encode_row(decoded) == data


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_coded_refusal(data: bytes) -> None:
    wire.decode_row(data)
    try:
        wire.decode(data)
    except InvalidRequest as refusal:
        assert refusal.field


@settings(max_examples=200)
@given(control_messages, st.data())
def test_a_spoilt_message_is_another_message_or_a_coded_refusal(
    message: m.ControlMessage, data: st.DataObject
) -> None:
    spoilt = bytearray(wire.encode(SENDER, message))
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        wire.decode(bytes(spoilt))
    except InvalidRequest as refusal:
        assert refusal.field


def heartbeat(**changes: Any) -> pb.ControlRequest:
    beat = pb.Heartbeat(to=SENDER, **changes)
    return pb.ControlRequest(sender=SENDER, heartbeat=beat)


def rumor(**changes: Any) -> pb.Rumor:
    return pb.Rumor(**{"about": SENDER, "accuser": SENDER, "says": pb.RUMORED_DEAD, **changes})


ADDRESS = pb.Address(host="h", port=1)
WHO = pb.Introduction(mesh="m", name="n")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ControlRequest(sender="me", goodbye=pb.Goodbye()), "sender"),
        (pb.ControlRequest(sender=SENDER.upper(), goodbye=pb.Goodbye()), "sender"),
        (pb.ControlRequest(sender=SENDER), "message"),
        (pb.ControlRequest(sender=SENDER, heartbeat=pb.Heartbeat(to="x")), "to"),
        (heartbeat(sent_s=float("nan")), "sent_s"),
        (heartbeat(heard_age_s=float("inf")), "heard_age_s"),
        (heartbeat(sequence=2**63), "sequence"),
        (heartbeat(rumors=[rumor()] * 17), "rumors"),
        (heartbeat(rumors=[rumor(says=9)]), "says"),
        (heartbeat(rumors=[rumor(addresses=[ADDRESS] * 9)]), "addresses"),
        (heartbeat(gossip=[pb.Gossip(about=SENDER)] * 33), "gossip"),
        (heartbeat(directory=pb.DirectoryMark(digest=b"x" * 33)), "digest"),
        (pb.ControlRequest(sender=SENDER, hello=pb.Hello(who=WHO)), "port"),
        (pb.ControlRequest(sender=SENDER, hello=pb.Hello(dialed=ADDRESS)), "mesh"),
        (
            pb.ControlRequest(
                sender=SENDER, hello=pb.Hello(who=WHO, dialed=pb.Address(host="h", port=65536))
            ),
            "port",
        ),
        (
            pb.ControlRequest(
                sender=SENDER,
                welcome=pb.Welcome(who=WHO, dialed=ADDRESS, peers=[pb.PeerHint(id=SENDER)] * 65),
            ),
            "peers",
        ),
        (
            pb.ControlRequest(
                sender=SENDER,
                directory_pull=pb.DirectoryPull(state_vector=b"x" * (m.STATE_VECTOR_BYTES_MAX + 1)),
            ),
            "state_vector",
        ),
        (
            pb.ControlRequest(
                sender=SENDER, directory_push=pb.DirectoryPush(update=b"x" * (m.UPDATE_BYTES_MAX + 1))
            ),
            "update",
        ),
    ],
)
def test_a_field_out_of_bounds_is_named(request_: pb.ControlRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.decode(request_.SerializeToString())
    assert caught.value.field == field


def test_a_message_beyond_the_frame_is_refused_unread() -> None:
    with pytest.raises(InvalidRequest, match=str(wire.CONTROL_BYTES_MAX)):
        wire.decode(b"\0" * (wire.CONTROL_BYTES_MAX + 1))


def test_the_largest_update_fits_its_frame() -> None:
    push = m.DirectoryPush(epoch=1, update=b"x" * m.UPDATE_BYTES_MAX)
    assert wire.decode(wire.encode(SENDER, push))[1] == push
