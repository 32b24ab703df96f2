"""What nodes say to each other on the control connection. Owns: the records and their bounds.

``rpc.wire`` turns each into bytes and refuses what exceeds a bound named here. Two counters order what
one node says: ``incarnation`` rises at every start (persisted), ``sequence`` with every message, so
that a late or doubled message is known as such. ``refutations`` rises when a node hears that it is
suspected; ``(incarnation, refutations)`` is its *standing*, and of two rumors the higher standing holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from fieldmesh.core.model import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Address, Load, NodeId

NAME_CHARACTERS_MAX = 64
ADDRESSES_MAX = 8
PEERS_PER_WELCOME_MAX = 64
RUMORS_PER_MESSAGE_MAX = 16
GOSSIP_PER_HEARTBEAT_MAX = 32
UPDATE_BYTES_MAX = 256 * 1024
STATE_VECTOR_BYTES_MAX = 64 * 1024
ROW_BYTES_MAX = 64 * 1024
"""A signed row as it lies in the directory."""
SENTENCE_CHARACTERS_MAX = 400


class Rumored(Enum):
    """What a rumor says of a node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The state of a directory replica: equal marks mean that there is nothing to exchange."""

    epoch: int = 0
    digest: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """Who speaks. ``nonce`` is drawn at every start: it tells a node's own echo from a copy of its key."""

    mesh: str
    name: str
    incarnation: int
    refutations: int
    sequence: int
    nonce: int
    addresses: tuple[Address, ...]
    directory: Mark
    protocol_min: int = PROTOCOL_VERSION_MIN
    protocol_max: int = PROTOCOL_VERSION_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHint:
    """A member as one node tells it to another (peer exchange)."""

    id: NodeId
    name: str
    incarnation: int
    refutations: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rumor:
    """What somebody believes of ``about``. ``accuser`` first said so (SWIM 4.2, Lifeguard 3.2)."""

    about: NodeId
    says: Rumored
    incarnation: int
    refutations: int
    accuser: NodeId
    name: str = ""
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gossip:
    """Third-hand news of a node: the latest heartbeat that anybody on the way has seen."""

    about: NodeId
    incarnation: int
    refutations: int
    sequence: int
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first word to an address. ``dialed`` comes back in the answer; ``wants_peers`` asks to be told of
    others too (where many are met at once, one of them suffices)."""

    who: Introduction
    dialed: Address
    wants_peers: bool = False
    rumors: tuple[Rumor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The answer to a Hello: who lives at ``dialed``, and whom else it knows."""

    who: Introduction
    dialed: Address
    peers: tuple[PeerHint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The other answer: a stable code of core.errors and a sentence for the operator."""

    code: str
    message: str
    dialed: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """I live, this is how busy I am, and this is what I hear of you.

    ``to`` is whom it is meant for (the address may belong to another node by now). ``heard_age_s`` is
    how long ago the sender last heard the addressee, None where it does not watch it; that is how a
    one-way link becomes known on the side that still hears. ``echo_sent_s`` returns the ``sent_s`` of
    the addressee's latest heartbeat after ``echo_held_s``; both are 0 before the first.
    """

    to: NodeId
    incarnation: int
    refutations: int
    sequence: int
    sent_s: float
    load: Load
    directory: Mark
    wants_answer: bool = False
    heard_age_s: float | None = None
    echo_sent_s: float = 0.0
    echo_held_s: float = 0.0
    rumors: tuple[Rumor, ...] = ()
    gossip: tuple[Gossip, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """Please find out whether ``target`` answers you."""

    target: NodeId
    address: Address
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReply:
    """``target`` answered me, with this standing."""

    target: NodeId
    nonce: int
    incarnation: int
    refutations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """I leave; do not look for me."""

    incarnation: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryPull:
    """Send me what I lack. ``after_client`` continues an answer that came in pages; 0 begins."""

    epoch: int
    state_vector: bytes
    after_client: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryPush:
    """Some of the directory. ``next_client`` is where to go on pulling; 0 where this is the end."""

    epoch: int
    update: bytes = field(repr=False)
    next_client: int = 0


MembershipMessage = Hello | Welcome | Refused | Heartbeat | ProbeRequest | ProbeReply | Goodbye
DirectoryMessage = DirectoryPull | DirectoryPush
ControlMessage = MembershipMessage | DirectoryMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What a node says of itself, opened: the signature was good and ``author`` is the key's own id."""

    author: NodeId
    incarnation: int
    sequence: int
    payload: bytes


class Sealer(Protocol):
    """Signs what this node says of itself, and opens what others have signed."""

    def seal(self, incarnation: int, sequence: int, payload: bytes) -> bytes:
        """The bytes of a signed envelope by this node."""
        ...

    def open(self, data: bytes) -> Envelope | None:
        """The envelope, or None where it is malformed, wrongly signed, or the author is not the head of
        SHA-256 over the key that signed. Never raises."""
        ...
