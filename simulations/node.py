"""A simulated node: the core of a real one, on a simulated host.

Owns: identities and envelopes without real keys, the codec between worlds and ``rpc.wire``, the boot from
a host's disk. Must not: decide anything that the core decides.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any

from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.events import Send
from fieldmesh.core.mesh import (
    INCARNATION_KEY,
    SNAPSHOT_KEY,
    HintSource,
    Identity,
    JoinHint,
    LinkFailed,
    Mesh,
    MeshConfig,
    OfferChanged,
)
from fieldmesh.core.messages import ControlMessage, Envelope
from fieldmesh.core.model import Address, Domain, NodeId, ProfileOffer
from fieldmesh.core.steps import BatcherConfig
from fieldmesh.rpc import wire
from simulations import serving
from simulations.serving import Ledger, Serving, ServingNode
from simulations.world import Host

KEY_BYTES = 32
_HEAD_BYTES = KEY_BYTES + 16
_NOBODY = NodeId("0" * 32)


def make_key(text: str) -> bytes:
    """A node's "public key"; deterministic, so that a seed names the same nodes every time."""
    return sha256(text.encode()).digest()


def node_id(key: bytes) -> NodeId:
    """As in the real one: the head of SHA-256 over the public key."""
    return NodeId(sha256(key).hexdigest()[:32])


class KeyedSealer:
    """Envelopes sealed with a keyed hash. Everybody could forge them, and nobody in these worlds does."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, incarnation: int, sequence: int, payload: bytes) -> bytes:
        """key, incarnation, sequence, mac, payload."""
        head = self._key + incarnation.to_bytes(8, "big") + sequence.to_bytes(8, "big")
        return head + self._mac(head, payload) + payload

    def open(self, data: bytes) -> Envelope | None:
        """The envelope, or None where a byte of it was changed."""
        head, mac, payload = (
            data[:_HEAD_BYTES],
            data[_HEAD_BYTES : _HEAD_BYTES + 16],
            data[_HEAD_BYTES + 16 :],
        )
        if len(head) < _HEAD_BYTES or mac != self._mac(head, payload):
            return None
        return Envelope(
            author=node_id(head[:KEY_BYTES]),
            incarnation=int.from_bytes(head[KEY_BYTES : KEY_BYTES + 8], "big"),
            sequence=int.from_bytes(head[KEY_BYTES + 8 :], "big"),
            payload=payload,
        )

    @staticmethod
    def _mac(head: bytes, payload: bytes) -> bytes:
        return hmac.digest(head[:KEY_BYTES], head + payload, "sha256")[:16]


class MeshCodec:
    """Control messages through the real wire format; what the wire refuses is not delivered."""

    def encode(self, message: ControlMessage | serving.ServingMessage) -> bytes:
        if isinstance(message, serving.ServingMessage):
            return serving.encode(message)
        return wire.encode(_NOBODY, message)

    def decode(self, data: bytes) -> ControlMessage | serving.ServingMessage | None:
        if data.startswith(serving.SERVING_MARK):
            return serving.decode(data)
        try:
            return wire.decode(data)[1]
        except InvalidRequest:
            return None


@dataclass(slots=True)
class Settings:
    """What an operator gave a node: it survives the loss of the disk. Faults change it between two boots."""

    name: str
    mesh: str
    key: bytes
    seeds: tuple[Address, ...]
    profiles: tuple[ProfileOffer, ...]
    config: MeshConfig
    batcher: BatcherConfig | None = None
    """Set where the node serves requests."""


def mesh_of(machine: object) -> Mesh:
    """The mesh of a running node, whether or not it serves requests."""
    mesh = machine.mesh if isinstance(machine, ServingNode) else machine
    assert isinstance(mesh, Mesh)
    return mesh


def refused(send: Send[ControlMessage]) -> LinkFailed:
    """What a node learns of a broken connection."""
    return LinkFailed(address=send.address, to=send.to)


def booter(
    settings: Settings, rng: Random, ledger: Ledger | None = None
) -> Callable[[Host], tuple[Mesh | ServingNode, Iterable[Any]]]:
    """How a host starts its node: the incarnation rises durably before anything is sent."""

    def boot(host: Host) -> tuple[Mesh | ServingNode, Iterable[Any]]:
        incarnation = int(host.disk.durable.get(INCARNATION_KEY, b"0")) + 1
        host.disk.durable[INCARNATION_KEY] = str(incarnation).encode()
        host.identity = node_id(settings.key)
        mesh = Mesh(
            config=settings.config,
            identity=Identity(
                id=host.identity,
                name=settings.name,
                mesh=settings.mesh,
                addresses=host.addresses,
                client_addresses=tuple(Address(host=a.host, port=a.port + 1) for a in host.addresses),
                incarnation=incarnation,
                version="simulated",
            ),
            sealer=KeyedSealer(settings.key),
            codec=wire,
            rng=Random(rng.getrandbits(64)),
            snapshot=host.disk.durable.get(SNAPSHOT_KEY),
        )
        hints = [JoinHint(address=address, source=HintSource.SEED) for address in settings.seeds]
        events = [OfferChanged(profiles=settings.profiles), *hints]
        if settings.batcher is None or ledger is None:
            return mesh, events
        requests = Serving(mesh, settings.name, ledger, Random(rng.getrandbits(64)), settings.batcher)
        return ServingNode(mesh, requests), events

    return boot


def generalist() -> ProfileOffer:
    """Answers what no specialist owns."""
    return ProfileOffer(name="general", model="tiny", fingerprint="f" * 64)


def profile(name: str, words: str) -> ProfileOffer:
    """A specialist in one domain."""
    domain = Domain(name=name, description=words, examples=(f"{words}?",))
    return ProfileOffer(name=name, model="tiny", fingerprint="f" * 64, domains=(domain,))
