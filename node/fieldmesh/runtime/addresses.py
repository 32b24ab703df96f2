"""Which addresses of this box other nodes should use. Owns: listing interfaces, and ranking their addresses.

The kernel knows best: the source address that it would use towards a peer is the one that the peer can
answer. Without peers it is the address of the default route, then those of the other networks. Loopback is
never told to others when the listener is open to them, nor a bridge that containers or virtual machines hang
on, unless a peer that answers is reached through it. Must not: resolve names, or know sockets of others.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

HOSTS_MAX = 4
"""Addresses that one listener is announced under: enough for two networks with two families each."""
POLL_S = 2.0
PEERS_ASKED_MAX = 64
"""Peers whose route is looked up; a mesh has more nodes than networks."""
INTERFACE_ADDRESSES_MAX = 256

_BRIDGE = re.compile(
    r"docker\d+|docker_gwbridge|br-[0-9a-f]{12}|veth.*|virbr\d+.*|vnet\d+|cni.*|cbr\d+|cali.*|flannel.*|cilium.*"
    r"|lxc.*|lxdbr.*|incusbr.*|podman\d+|kube.*|weave.*|nerdctl\d*|vmnet\d+|vboxnet\d+|hassio"
)
_BEYOND = ("203.0.113.1", "2001:db8::1")
"""Documentation addresses (RFC 5737, RFC 3849): nothing is sent to them, they only take the default route."""

_LOCALHOST = {"localhost": "127.0.0.1"}
"""The one name that needs no look-up (RFC 6761), and that means another box to every other box."""

# From linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h and linux/if.h.
_RTM_GETADDR, _NLMSG_ERROR, _NLMSG_DONE = 22, 2, 3
_NLM_F_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_UNFIT = 0x01 | 0x08 | 0x20 | 0x40  # temporary, duplicate, deprecated, tentative
_IFF_UP, _IFF_LOOPBACK, _IFF_MULTICAST = 0x1, 0x8, 0x1000
_SIOCGIFFLAGS = 0x8913


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceAddress:
    """One address of one interface that is up. ``host`` is an IP literal."""

    interface: str
    host: str
    loopback: bool = False
    multicast: bool = True

    @property
    def bridge(self) -> bool:
        """Whether containers or virtual machines of this box hang on the interface, by its name."""
        return _BRIDGE.fullmatch(self.interface) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the kernel knows: its interfaces, and the source address that it would use towards a host."""

    interfaces: Callable[[], Sequence[InterfaceAddress]]
    source: Callable[[str], str | None]


def hosts_to_announce(
    bound_host: str, peers: Iterable[str], network: Network | None = None
) -> tuple[str, ...]:
    """Hosts under which a listener bound to ``bound_host`` is reached, best first, at most HOSTS_MAX.

    ``peers`` are IP literals of peers that answer. A listener bound to one address has that one; the
    answer is empty where the box has no network (yet).
    """
    network = network or KERNEL
    version = _unspecified_version(bound_host)
    if version is None:
        return (_LOCALHOST.get(bound_host, bound_host),)
    towards_peers = {network.source(peer) for peer in sorted(set(peers))[:PEERS_ASKED_MAX]}
    by_default = {network.source(host) for host in _BEYOND}
    ranked = [
        (_rank(found, towards_peers, by_default), found.host)
        for found in network.interfaces()
        if not found.loopback and (version == 6 or ":" not in found.host)
    ]
    known = sorted((order, host) for order, host in ranked if order is not None)
    best = known[0][0] if known else 0
    # Link-local addresses serve two boxes on one cable; beside a real network they only mislead.
    hosts = [host for order, host in known if order < _LINK_LOCAL or best == _LINK_LOCAL]
    return tuple(dict.fromkeys(hosts))[:HOSTS_MAX]


def multicast_hosts(bound_host: str, network: Network | None = None) -> tuple[str, ...]:
    """IPv4 addresses of the interfaces on which a listener bound to ``bound_host`` should be announced."""
    network = network or KERNEL
    bound_host = _LOCALHOST.get(bound_host, bound_host)
    anywhere = _unspecified_version(bound_host) is not None
    return tuple(
        sorted(
            found.host
            for found in network.interfaces()
            if ":" not in found.host
            and (
                found.multicast and not found.loopback and not found.bridge
                if anywhere
                else found.host == bound_host
            )
        )
    )


async def watch(
    read: Callable[[], tuple[str, ...]], poll_s: float = POLL_S
) -> AsyncIterator[tuple[str, ...]]:
    """Yield what ``read`` says, at once and then at every change; a look costs about 0.2 ms."""
    known = read()
    yield known
    while True:
        await asyncio.sleep(poll_s)
        if (found := read()) != known:
            known = found
            yield known


_TOWARDS_PEERS, _BRIDGE_TOWARDS_PEERS, _BY_DEFAULT, _OTHER, _LINK_LOCAL = range(5)


def _rank(
    found: InterfaceAddress, towards_peers: Container[str | None], by_default: Container[str | None]
) -> int | None:
    """How good an address is (less is better); None for one that must not be told."""
    if found.host in towards_peers:
        return _BRIDGE_TOWARDS_PEERS if found.bridge else _TOWARDS_PEERS
    if found.bridge:
        return None
    if found.host in by_default:
        return _BY_DEFAULT
    return _LINK_LOCAL if ipaddress.ip_address(found.host).is_link_local else _OTHER


def _unspecified_version(host: str) -> int | None:
    """4 or 6 where ``host`` means every address of that family (6: of both); None where it means one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return address.version if address.is_unspecified else None


# --- what the kernel says ------------------------------------------------------------------


def source_towards(host: str) -> str | None:
    """The address that the kernel would use towards the IP literal ``host``, None without a route.

    Nothing is sent.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        ipaddress.ip_address(host)  # a name would be looked up, which blocks
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except (OSError, ValueError):
        return None


def interface_addresses() -> tuple[InterfaceAddress, ...]:
    """Addresses of the interfaces that are up, in the kernel's order, over rtnetlink (RFC 3549).

    IPv6 addresses that are link-local, temporary, deprecated or still being tried are left out. Empty where
    the kernel does not answer.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(1.0)
            header = struct.pack("=IHHII", 24, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0)
            kernel.send(header + struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0))
            found: list[InterfaceAddress] = []
            while len(found) < INTERFACE_ADDRESSES_MAX:
                done = False
                for kind, body in _netlink_messages(kernel.recv(65_536)):
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        done = True
                    elif (address := _parse_address(body)) is not None:
                        found.append(address)
                if done:
                    break
            return tuple(found)
    except (OSError, struct.error):
        return ()


KERNEL = Network(interfaces=interface_addresses, source=source_towards)


def _netlink_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16:
            return
        yield kind, data[16:length]
        data = data[(length + 3) & ~3 :]


def _parse_address(body: bytes) -> InterfaceAddress | None:
    family, _, flags, _, index = struct.unpack_from("=BBBBI", body)
    attributes: dict[int, bytes] = {}
    rest = body[8:]
    while len(rest) >= 4:
        length, kind = struct.unpack_from("=HH", rest)
        if length < 4:
            break
        attributes[kind] = rest[4:length]
        rest = rest[(length + 3) & ~3 :]
    packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
    if packed is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    address = ipaddress.ip_address(packed)
    if _IFA_FLAGS in attributes:
        (flags,) = struct.unpack_from("=I", attributes[_IFA_FLAGS])
    if address.version == 6 and (flags & _IFA_F_UNFIT or address.is_link_local):
        return None
    try:
        interface = socket.if_indextoname(index)
        state = _interface_flags(interface)
    except OSError:  # the interface went away meanwhile
        return None
    if not state & _IFF_UP:
        return None
    return InterfaceAddress(
        interface=interface,
        host=str(address),
        loopback=bool(state & _IFF_LOOPBACK),
        multicast=bool(state & _IFF_MULTICAST),
    )


def _interface_flags(interface: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
    (flags,) = struct.unpack_from("H", answer, 16)
    return int(flags)
