"""The records of membership: its events and effects, its configuration, and what is known of one peer.

Owns: the shapes, and the rules that a configuration must satisfy. Must not: decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fieldmesh.core.events import Note, Received, Send, Tick
from fieldmesh.core.joining import HintSource
from fieldmesh.core.messages import GOSSIP_PER_HEARTBEAT_MAX, ControlMessage, MembershipMessage, Rumor
from fieldmesh.core.model import Address, Load, NodeId, NodeState


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinHint:
    """Somebody of our mesh may live at ``address``."""

    address: Address
    source: HintSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFailed:
    """A connection was refused or broke: its process is probably gone."""

    address: Address
    to: NodeId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadChanged:
    """How busy this node is now."""

    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressesChanged:
    """This node's peer listener is to be reached at other addresses from now on, best first."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRequested:
    """Say goodbye to everybody; the node stops soon."""


MembershipEvent = (
    Tick
    | Received[MembershipMessage]
    | JoinHint
    | LinkFailed
    | LoadChanged
    | AddressesChanged
    | LeaveRequested
)
MembershipEffect = Send[ControlMessage] | Note


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """Times in seconds. With these a fault is noticed 1.0 to 1.5 s after it happened.

    ``suspect_after_s`` less ``beat_s`` is how late another node's loop may be before it is suspected.
    ``vouch_s`` is how long the word of another node holds; it spans three rounds of probes.
    ``suspicion_s_min`` and ``_max`` bound the time to refute, with ``confirmations_wanted`` accusers and
    with one (Lifeguard 3.2). ``late_s`` of lateness of our own is ordinary; ``frozen_s`` is a freeze.
    ``rumor_factor`` x log2(nodes) is how often one node passes a rumor on (SWIM 4.1; 3 suffices there).
    """

    beat_s: float = 0.5
    probe_after_s: float = 1.0
    suspect_after_s: float = 1.5
    probe_interval_s: float = 0.5
    vouch_s: float = 1.8
    suspicion_s_min: float = 2.0
    suspicion_s_max: float = 6.0
    confirmations_wanted: int = 3
    indirect_probes: int = 3
    link_failed_grace_s: float = 0.4
    late_s: float = 0.15
    frozen_s: float = 1.0
    forget_after_s: float = 24 * 3600.0
    direct_max: int = 50
    random_probes: int = 3
    gossip_per_heartbeat: int = 16
    rumor_factor: int = 4
    peers_max: int = 2048
    helping_max: int = 256
    addresses_welcomed_max: int = 4

    def __post_init__(self) -> None:
        if not self.beat_s < self.probe_after_s < self.suspect_after_s:
            raise ValueError("beat_s < probe_after_s < suspect_after_s is required")
        if self.suspicion_s_min > self.suspicion_s_max:
            raise ValueError("suspicion_s_min must not exceed suspicion_s_max")
        if self.vouch_s <= 2 * self.probe_interval_s:
            raise ValueError("vouch_s must span more than two probe intervals")
        if self.gossip_per_heartbeat > GOSSIP_PER_HEARTBEAT_MAX:
            raise ValueError(f"gossip_per_heartbeat must be at most {GOSSIP_PER_HEARTBEAT_MAX}")


@dataclass(slots=True, eq=False)
class Peer:
    """What is known and believed of one other node. Mutable; owned by Membership."""

    id: NodeId
    name: str
    incarnation: int
    refutations: int
    addresses: tuple[Address, ...]
    state: NodeState
    since: float
    sequence: int = 0
    """The latest message of this incarnation, heard or gossiped."""
    nonce: int = 0
    """Tells two lives under one incarnation apart; 0 before the peer introduced itself."""
    load: Load = field(default_factory=Load)
    rtt_s: float = 0.0
    rtt_shown_s: float = 0.0
    address_index: int = 0
    heard_at: float = float("-inf")
    waiting_since: float | None = None
    """From when its silence counts; None while nothing is expected of it."""
    vouched_at: float = float("-inf")
    deaf: bool = False
    """It says that it does not hear us."""
    doubted: bool = False
    probe_at: float = float("-inf")
    tell_stale_at: float = float("-inf")
    probes: int = 0
    confirmers: dict[NodeId, None] = field(default_factory=dict)
    retries: int = 0
    retry_at: float = 0.0
    echo_sent_s: float = 0.0
    echo_at: float = 0.0
    accused: Rumor | None = None
    """What somebody says of it, to be passed on to it so that it can refute."""

    @property
    def address(self) -> Address | None:
        return self.addresses[self.address_index % len(self.addresses)] if self.addresses else None

    @property
    def standing(self) -> tuple[int, int]:
        return (self.incarnation, self.refutations)

    @property
    def gone(self) -> bool:
        return self.state is NodeState.DEAD or self.state is NodeState.LEFT
