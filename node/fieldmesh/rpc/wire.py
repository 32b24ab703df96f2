"""The codec of the control connection and of directory rows: core records to protobuf bytes and back.

Owns: every bound on what a peer may send; what comes out of here is well formed, though not yet true.
Must not: import grpc, or know what a message leads to. ``encode_row`` and ``decode_row`` make this module
a ``core.directory.RowCodec``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, assert_never

from google.protobuf.message import DecodeError

from fieldmesh.core.directory import DOMAINS_PER_PROFILE_MAX, PROFILES_MAX
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.messages import (
    ADDRESSES_MAX,
    GOSSIP_PER_HEARTBEAT_MAX,
    NAME_CHARACTERS_MAX,
    PEERS_PER_WELCOME_MAX,
    ROW_BYTES_MAX,
    RUMORS_PER_MESSAGE_MAX,
    SENTENCE_CHARACTERS_MAX,
    STATE_VECTOR_BYTES_MAX,
    UPDATE_BYTES_MAX,
    ControlMessage,
    DirectoryPull,
    DirectoryPush,
    Goodbye,
    Gossip,
    Heartbeat,
    Hello,
    Introduction,
    Mark,
    PeerHint,
    ProbeReply,
    ProbeRequest,
    Refused,
    Rumor,
    Rumored,
    Welcome,
)
from fieldmesh.core.model import Address, Domain, NodeId, ProfileOffer, Row, Seat, SeatKind
from fieldmesh.rpc.inference import load_from_proto, load_to_proto
from fieldmesh.v1 import mesh_pb2
from fieldmesh.v1 import peer_pb2 as pb

CONTROL_BYTES_MAX: Final = UPDATE_BYTES_MAX + 64 * 1024
"""More than the largest acceptable control message needs."""
NUMBER_MAX: Final = 2**62
HOST_CHARACTERS_MAX: Final = 253
DIGEST_BYTES_MAX: Final = 32
CODE_CHARACTERS_MAX: Final = 64
EXAMPLES_PER_DOMAIN_MAX: Final = 2000
TEXT_CHARACTERS_MAX: Final = 4000
"""One description or example."""
_SEAT_KINDS: Final = {kind.value: kind for kind in SeatKind}

_NODE_ID = re.compile(r"[0-9a-f]{32}")
_RUMORED: Final = {
    Rumored.ALIVE: pb.RUMORED_ALIVE,
    Rumored.SUSPECT: pb.RUMORED_SUSPECT,
    Rumored.DEAD: pb.RUMORED_DEAD,
    Rumored.LEFT: pb.RUMORED_LEFT,
}
_RUMORED_IN: Final = {number: rumored for rumored, number in _RUMORED.items()}


# --- control messages --------------------------------------------------------------------


def encode(sender: NodeId, message: ControlMessage) -> bytes:
    """One control message as bytes of a ControlRequest."""
    return to_proto(sender, message).SerializeToString()


def decode(data: bytes) -> tuple[NodeId, ControlMessage]:
    """The sender and the message in the bytes of a ControlRequest. Raises InvalidRequest."""
    if len(data) > CONTROL_BYTES_MAX:
        raise InvalidRequest(
            f"a control message holds {len(data)} bytes; at most {CONTROL_BYTES_MAX}", field="message"
        )
    request = pb.ControlRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("the bytes are not a ControlRequest", field="message") from error
    return from_proto(request)


def to_proto(sender: NodeId, message: ControlMessage) -> pb.ControlRequest:
    """One control message as a protobuf record."""
    match message:
        case Heartbeat():
            return pb.ControlRequest(sender=sender, heartbeat=_heartbeat_to_proto(message))
        case Hello(who=who, dialed=dialed, rumors=rumors):
            hello = pb.Hello(
                who=_who_to_proto(who),
                dialed=_address_to_proto(dialed),
                rumors=_rumors(rumors),
                wants_peers=message.wants_peers,
            )
            return pb.ControlRequest(sender=sender, hello=hello)
        case Welcome(who=who, dialed=dialed, peers=peers):
            hints = map(_hint_to_proto, peers)
            welcome = pb.Welcome(who=_who_to_proto(who), dialed=_address_to_proto(dialed), peers=hints)
            return pb.ControlRequest(sender=sender, welcome=welcome)
        case Refused(code=code, message=sentence, dialed=dialed):
            refused = pb.Refused(code=code, message=sentence, dialed=_address_to_proto(dialed))
            return pb.ControlRequest(sender=sender, refused=refused)
        case ProbeRequest(target=target, address=address, nonce=nonce):
            request = pb.ProbeRequest(target=target, address=_address_to_proto(address), nonce=nonce)
            return pb.ControlRequest(sender=sender, probe_request=request)
        case ProbeReply():
            reply = pb.ProbeReply(
                target=message.target,
                nonce=message.nonce,
                incarnation=message.incarnation,
                refutations=message.refutations,
            )
            return pb.ControlRequest(sender=sender, probe_reply=reply)
        case Goodbye(incarnation=incarnation, sequence=sequence):
            goodbye = pb.Goodbye(incarnation=incarnation, sequence=sequence)
            return pb.ControlRequest(sender=sender, goodbye=goodbye)
        case DirectoryPull(epoch=epoch, state_vector=state_vector, after_client=after):
            pull = pb.DirectoryPull(epoch=epoch, state_vector=state_vector, after_client=after)
            return pb.ControlRequest(sender=sender, directory_pull=pull)
        case DirectoryPush(epoch=epoch, update=update, next_client=following):
            push = pb.DirectoryPush(epoch=epoch, update=update, next_client=following)
            return pb.ControlRequest(sender=sender, directory_push=push)
        case _:
            assert_never(message)


def from_proto(request: pb.ControlRequest) -> tuple[NodeId, ControlMessage]:
    """The sender and the message, every field within its bounds. Raises InvalidRequest."""
    sender = _node_id(request.sender, "sender")
    kind = request.WhichOneof("message")
    if kind is None:
        raise InvalidRequest("a control message of a kind that this version does not know", field="message")
    return sender, _READERS[kind](getattr(request, kind))


def _heartbeat_to_proto(beat: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        to=beat.to,
        incarnation=beat.incarnation,
        refutations=beat.refutations,
        sequence=beat.sequence,
        sent_s=beat.sent_s,
        load=load_to_proto(beat.load),
        directory=_mark_to_proto(beat.directory),
        wants_answer=beat.wants_answer,
        heard_age_s=beat.heard_age_s,
        echo_sent_s=beat.echo_sent_s,
        echo_held_s=beat.echo_held_s,
        rumors=_rumors(beat.rumors),
        gossip=(
            pb.Gossip(
                about=g.about,
                incarnation=g.incarnation,
                refutations=g.refutations,
                sequence=g.sequence,
                load=load_to_proto(g.load),
            )
            for g in beat.gossip
        ),
    )


def _heartbeat(beat: pb.Heartbeat) -> Heartbeat:
    _bounded(beat.rumors, RUMORS_PER_MESSAGE_MAX, "rumors")
    _bounded(beat.gossip, GOSSIP_PER_HEARTBEAT_MAX, "gossip")
    return Heartbeat(
        to=_node_id(beat.to, "to"),
        incarnation=_number(beat.incarnation, "incarnation"),
        refutations=_number(beat.refutations, "refutations"),
        sequence=_number(beat.sequence, "sequence"),
        sent_s=_finite(beat.sent_s, "sent_s"),
        load=load_from_proto(beat.load),
        directory=_mark(beat.directory),
        wants_answer=beat.wants_answer,
        heard_age_s=_finite(beat.heard_age_s, "heard_age_s") if beat.HasField("heard_age_s") else None,
        echo_sent_s=_finite(beat.echo_sent_s, "echo_sent_s"),
        echo_held_s=_finite(beat.echo_held_s, "echo_held_s"),
        rumors=tuple(map(_rumor, beat.rumors)),
        gossip=tuple(map(_gossip, beat.gossip)),
    )


def _hello(hello: pb.Hello) -> Hello:
    _bounded(hello.rumors, RUMORS_PER_MESSAGE_MAX, "rumors")
    rumors = tuple(map(_rumor, hello.rumors))
    return Hello(
        who=_who(hello.who), dialed=_address(hello.dialed), rumors=rumors, wants_peers=hello.wants_peers
    )


def _welcome(welcome: pb.Welcome) -> Welcome:
    _bounded(welcome.peers, PEERS_PER_WELCOME_MAX, "peers")
    peers = tuple(map(_hint, welcome.peers))
    return Welcome(who=_who(welcome.who), dialed=_address(welcome.dialed), peers=peers)


def _refused(refused: pb.Refused) -> Refused:
    return Refused(
        code=_text(refused.code, "code", CODE_CHARACTERS_MAX),
        message=refused.message[:SENTENCE_CHARACTERS_MAX],
        dialed=_address(refused.dialed),
    )


def _probe_request(request: pb.ProbeRequest) -> ProbeRequest:
    return ProbeRequest(
        target=_node_id(request.target, "target"),
        address=_address(request.address),
        nonce=_number(request.nonce, "nonce"),
    )


def _probe_reply(reply: pb.ProbeReply) -> ProbeReply:
    return ProbeReply(
        target=_node_id(reply.target, "target"),
        nonce=_number(reply.nonce, "nonce"),
        incarnation=_number(reply.incarnation, "incarnation"),
        refutations=_number(reply.refutations, "refutations"),
    )


def _goodbye(goodbye: pb.Goodbye) -> Goodbye:
    return Goodbye(
        incarnation=_number(goodbye.incarnation, "incarnation"),
        sequence=_number(goodbye.sequence, "sequence"),
    )


def _directory_pull(pull: pb.DirectoryPull) -> DirectoryPull:
    return DirectoryPull(
        epoch=_number(pull.epoch, "epoch"),
        state_vector=_bytes(pull.state_vector, "state_vector", STATE_VECTOR_BYTES_MAX),
        after_client=_number(pull.after_client, "after_client"),
    )


def _directory_push(push: pb.DirectoryPush) -> DirectoryPush:
    return DirectoryPush(
        epoch=_number(push.epoch, "epoch"),
        update=_bytes(push.update, "update", UPDATE_BYTES_MAX),
        next_client=_number(push.next_client, "next_client"),
    )


_READERS: Final[dict[str, Callable[..., ControlMessage]]] = {
    "heartbeat": _heartbeat,
    "hello": _hello,
    "welcome": _welcome,
    "refused": _refused,
    "probe_request": _probe_request,
    "probe_reply": _probe_reply,
    "goodbye": _goodbye,
    "directory_pull": _directory_pull,
    "directory_push": _directory_push,
}


# --- parts of messages -------------------------------------------------------------------


def _who_to_proto(who: Introduction) -> pb.Introduction:
    return pb.Introduction(
        mesh=who.mesh,
        name=who.name,
        protocol_min=who.protocol_min,
        protocol_max=who.protocol_max,
        incarnation=who.incarnation,
        refutations=who.refutations,
        sequence=who.sequence,
        nonce=who.nonce,
        addresses=map(_address_to_proto, who.addresses),
        directory=_mark_to_proto(who.directory),
    )


def _who(who: pb.Introduction) -> Introduction:
    return Introduction(
        mesh=_text(who.mesh, "mesh", NAME_CHARACTERS_MAX),
        name=_text(who.name, "name", NAME_CHARACTERS_MAX),
        protocol_min=who.protocol_min,
        protocol_max=who.protocol_max,
        incarnation=_number(who.incarnation, "incarnation"),
        refutations=_number(who.refutations, "refutations"),
        sequence=_number(who.sequence, "sequence"),
        nonce=who.nonce,
        addresses=_addresses(who.addresses),
        directory=_mark(who.directory),
    )


def _hint_to_proto(hint: PeerHint) -> pb.PeerHint:
    return pb.PeerHint(
        id=hint.id,
        name=hint.name,
        incarnation=hint.incarnation,
        refutations=hint.refutations,
        addresses=map(_address_to_proto, hint.addresses),
    )


def _hint(hint: pb.PeerHint) -> PeerHint:
    return PeerHint(
        id=_node_id(hint.id, "id"),
        name=_text(hint.name, "name", NAME_CHARACTERS_MAX),
        incarnation=_number(hint.incarnation, "incarnation"),
        refutations=_number(hint.refutations, "refutations"),
        addresses=_addresses(hint.addresses),
    )


def _rumors(rumors: Iterable[Rumor]) -> list[pb.Rumor]:
    return [
        pb.Rumor(
            about=r.about,
            says=_RUMORED[r.says],
            incarnation=r.incarnation,
            refutations=r.refutations,
            accuser=r.accuser,
            name=r.name,
            addresses=map(_address_to_proto, r.addresses),
        )
        for r in rumors
    ]


def _rumor(rumor: pb.Rumor) -> Rumor:
    says = _RUMORED_IN.get(rumor.says)
    if says is None:
        raise InvalidRequest("a rumor that says nothing known", field="says")
    return Rumor(
        about=_node_id(rumor.about, "about"),
        says=says,
        incarnation=_number(rumor.incarnation, "incarnation"),
        refutations=_number(rumor.refutations, "refutations"),
        accuser=_node_id(rumor.accuser, "accuser"),
        name=rumor.name[:NAME_CHARACTERS_MAX],
        addresses=_addresses(rumor.addresses),
    )


def _gossip(gossip: pb.Gossip) -> Gossip:
    return Gossip(
        about=_node_id(gossip.about, "about"),
        incarnation=_number(gossip.incarnation, "incarnation"),
        refutations=_number(gossip.refutations, "refutations"),
        sequence=_number(gossip.sequence, "sequence"),
        load=load_from_proto(gossip.load),
    )


def _mark_to_proto(mark: Mark) -> pb.DirectoryMark:
    return pb.DirectoryMark(epoch=mark.epoch, digest=mark.digest)


def _mark(mark: pb.DirectoryMark) -> Mark:
    return Mark(epoch=_number(mark.epoch, "epoch"), digest=_bytes(mark.digest, "digest", DIGEST_BYTES_MAX))


def _address_to_proto(address: Address) -> pb.Address:
    return pb.Address(host=address.host, port=address.port)


def _address(address: pb.Address) -> Address:
    if not 1 <= address.port <= 65535:
        raise InvalidRequest(f"port {address.port}: 1 to 65535 are accepted", field="port")
    return Address(host=_text(address.host, "host", HOST_CHARACTERS_MAX), port=address.port)


def _addresses(addresses: Sequence[pb.Address]) -> tuple[Address, ...]:
    _bounded(addresses, ADDRESSES_MAX, "addresses")
    return tuple(map(_address, addresses))


# --- directory rows ----------------------------------------------------------------------


def encode_row(row: Row) -> bytes:
    """A directory row as the payload of an envelope; equal rows give equal bytes."""
    record = mesh_pb2.Row(
        id=row.id,
        name=row.name,
        mesh=row.mesh,
        incarnation=row.incarnation,
        sequence=row.sequence,
        addresses=map(_address_to_proto, row.addresses),
        client_addresses=map(_address_to_proto, row.client_addresses),
        http_addresses=map(_address_to_proto, row.http_addresses),
        profiles=(
            mesh_pb2.Profile(
                name=profile.name,
                model=profile.model,
                fingerprint=profile.fingerprint,
                domains=(
                    mesh_pb2.Domain(name=d.name, description=d.description, examples=d.examples)
                    for d in profile.domains
                ),
                tier=profile.tier,
                context_tokens=profile.context_tokens,
            )
            for profile in row.profiles
        ),
        version=row.version,
        protocol_min=row.protocol_min,
        protocol_max=row.protocol_max,
        seat=_seat_to_proto(row.seat) if row.seat is not None else None,
    )
    return record.SerializeToString(deterministic=True)


def decode_row(data: bytes) -> Row | None:
    """The row in an envelope's payload, or None for what is not an acceptable one."""
    if len(data) > ROW_BYTES_MAX:
        return None
    record = mesh_pb2.Row()
    try:
        record.ParseFromString(data)
        return _row(record)
    except (DecodeError, InvalidRequest):
        return None


def _row(record: mesh_pb2.Row) -> Row:
    _bounded(record.profiles, PROFILES_MAX, "profiles")
    return Row(
        id=_node_id(record.id, "id"),
        name=_text(record.name, "name", NAME_CHARACTERS_MAX),
        mesh=_text(record.mesh, "mesh", NAME_CHARACTERS_MAX),
        incarnation=_number(record.incarnation, "incarnation"),
        sequence=_number(record.sequence, "sequence"),
        addresses=_addresses(record.addresses),
        client_addresses=_addresses(record.client_addresses),
        http_addresses=_addresses(record.http_addresses),
        profiles=tuple(map(_profile, record.profiles)),
        version=record.version[:NAME_CHARACTERS_MAX],
        protocol_min=record.protocol_min,
        protocol_max=record.protocol_max,
        seat=_seat(record.seat) if record.HasField("seat") else None,
    )


def _seat_to_proto(seat: Seat) -> mesh_pb2.Seat:
    return mesh_pb2.Seat(log=seat.log, epoch=seat.epoch, kind=seat.kind.value)


def _seat(seat: mesh_pb2.Seat) -> Seat | None:
    """None for a kind that only a newer version knows: the rest of the row still counts."""
    if seat.kind not in _SEAT_KINDS:
        return None
    return Seat(
        log=_text(seat.log, "seat.log", NAME_CHARACTERS_MAX), epoch=seat.epoch, kind=_SEAT_KINDS[seat.kind]
    )


def _profile(profile: mesh_pb2.Profile) -> ProfileOffer:
    _bounded(profile.domains, DOMAINS_PER_PROFILE_MAX, "domains")
    return ProfileOffer(
        name=_text(profile.name, "profile.name", 2 * NAME_CHARACTERS_MAX),
        model=_text(profile.model, "profile.model", 4 * NAME_CHARACTERS_MAX),
        fingerprint=profile.fingerprint[: 2 * NAME_CHARACTERS_MAX],
        domains=tuple(map(_domain, profile.domains)),
        tier=profile.tier,
        context_tokens=profile.context_tokens,
    )


def _domain(domain: mesh_pb2.Domain) -> Domain:
    _bounded(domain.examples, EXAMPLES_PER_DOMAIN_MAX, "examples")
    for example in domain.examples:
        _text(example, "example", TEXT_CHARACTERS_MAX)
    return Domain(
        name=_text(domain.name, "domain.name", 2 * NAME_CHARACTERS_MAX),
        description=domain.description[:TEXT_CHARACTERS_MAX],
        examples=tuple(domain.examples),
    )


# --- bounds ------------------------------------------------------------------------------


def _node_id(text: str, field: str) -> NodeId:
    if not _NODE_ID.fullmatch(text):
        raise InvalidRequest("a node id has 32 lower-case hex digits", field=field)
    return NodeId(text)


def _number(number: int, field: str) -> int:
    if number > NUMBER_MAX:
        raise InvalidRequest(f"{field}: at most 2**62 is accepted", field=field)
    return number


def _finite(seconds: float, field: str) -> float:
    if not math.isfinite(seconds):
        raise InvalidRequest(f"{field}: a finite number of seconds is accepted", field=field)
    return seconds


def _text(text: str, field: str, characters_max: int) -> str:
    if not 1 <= len(text) <= characters_max:
        raise InvalidRequest(
            f"{field}: 1 to {characters_max} characters are accepted, not {len(text)}", field=field
        )
    return text


def _bytes(data: bytes, field: str, bytes_max: int) -> bytes:
    if len(data) > bytes_max:
        raise InvalidRequest(f"{field}: at most {bytes_max} bytes are accepted, not {len(data)}", field=field)
    return data


def _bounded(items: Sequence[object], count_max: int, field: str) -> None:
    if len(items) > count_max:
        raise InvalidRequest(f"{field}: at most {count_max} are accepted, not {len(items)}", field=field)
