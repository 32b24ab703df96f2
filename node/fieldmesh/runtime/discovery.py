"""How a node finds others to join. Owns: its announcement by multicast DNS, listening for those of others,
and looking up the seeds.

All it gives are hints (an address and its source); whether anybody lives there is for the mesh to find out.
Hints are given again from time to time, so that two halves of a mesh that have forgotten each other meet
again. A box without multicast, or without any network, keeps its seeds and tries again when its addresses
change. Must not: decide who is a member.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncZeroconf

from fieldmesh.client.discovery import Announcement, Listener, to_service
from fieldmesh.core.joining import HintSource
from fieldmesh.core.model import Address, NodeId
from fieldmesh.runtime import log
from fieldmesh.values import is_loopback

SEED_ADDRESSES_MAX = 16
"""Addresses taken from the look-up of one seed."""
REPEAT_S = 30.0
"""How often known hints are given again, and seeds looked up again."""
REPEAT_ALONE_S = 4.0
LOOKUP_TIMEOUT_S = 5.0
KNOWN_MAX = 1_024

OnHint = Callable[[Address, HintSource], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryStatistics:
    """What was met on the network since the start."""

    announced: bool
    known: int
    foreign: int
    ignored: int


class Multicast:
    """This node's announcement, and the announcements of others in the same mesh.

    ``on_hint`` is called in the event loop. ``update`` starts it, and moves it to other addresses and
    interfaces; failing to multicast is logged once a change and never raised.
    """

    def __init__(self, on_hint: OnHint) -> None:
        self._on_hint = on_hint
        self._said: Announcement | None = None
        self._interfaces: tuple[str, ...] = ()
        self._zeroconf: AsyncZeroconf | None = None
        self._listener: Listener | None = None
        self._known: dict[NodeId, tuple[Address, ...]] = {}
        self._foreign: set[NodeId] = set()
        self._ignored = 0
        self._off_because = ""
        self._lock = asyncio.Lock()
        """Starting and stopping take a moment, and addresses may change while hints are repeated."""
        self._log = log.get()

    async def update(self, said: Announcement, interfaces: Sequence[str]) -> None:
        """Announce ``said`` on the interfaces that have the given IPv4 addresses, and nothing else."""
        if (said, tuple(interfaces)) == (self._said, self._interfaces) and self._zeroconf is not None:
            return
        async with self._lock:
            await self._stop()
            self._said, self._interfaces = said, tuple(interfaces)
            await self._start(said)

    async def repeat(self) -> None:
        """Give every hint that is known again, and try again to multicast where that has failed."""
        async with self._lock:
            if self._zeroconf is None and self._said is not None:
                await self._start(self._said)
        for addresses in list(self._known.values()):
            for address in addresses:
                self._on_hint(address, HintSource.MDNS)

    async def _start(self, said: Announcement) -> None:
        able = [host for host in self._interfaces if _can_multicast(host)]
        if not said.hosts or not able:
            self._off("no interface can multicast")
            return
        try:
            self._zeroconf = AsyncZeroconf(interfaces=able)
            # A name that the operator advertises is no address; what others see there are the interfaces.
            hosts = tuple(host for host in said.hosts if _is_literal(host)) or tuple(able)
            # Others may hold the name: our own ghost, from before a crash. Ids do not collide otherwise.
            await self._zeroconf.async_register_service(
                to_service(replace(said, hosts=hosts)), cooperating_responders=True
            )
            self._listener = Listener(self._zeroconf.zeroconf, self._found, self._gone)
        except (OSError, ZeroconfError) as error:
            await self._stop()
            self._off(f"{type(error).__name__}: {error}"[:200])
            return
        self._off_because = ""
        self._log.info("mdns_on", hosts=hosts, interfaces=able)

    def _off(self, why: str) -> None:
        if why != self._off_because:
            self._off_because = why
            self._log.warning(
                "mdns_off", why=why, interfaces=self._interfaces, remedy="seeds are still tried"
            )

    async def close(self) -> None:
        """Say goodbye, so that others forget the announcement at once. Harmless when repeated."""
        async with self._lock:
            self._said = None
            await self._stop()

    async def _stop(self) -> None:
        listener, self._listener = self._listener, None
        zeroconf, self._zeroconf = self._zeroconf, None
        self._known.clear()  # no goodbye of theirs would be heard any more
        if listener is not None:
            self._ignored += listener.ignored
            await listener.close()
        if zeroconf is not None:
            try:
                await zeroconf.async_close()
            except (OSError, ZeroconfError) as error:  # the network went before us
                self._log.info("mdns_goodbye_failed", why=str(error)[:200])

    def statistics(self) -> DiscoveryStatistics:
        listening = self._listener
        return DiscoveryStatistics(
            announced=self._zeroconf is not None,
            known=len(self._known),
            foreign=len(self._foreign),
            ignored=self._ignored + (listening.ignored if listening is not None else 0),
        )

    def _found(self, other: Announcement) -> None:
        said = self._said
        if said is None or other.id == said.id:
            return
        if other.mesh != said.mesh:
            if other.id not in self._foreign and len(self._foreign) < KNOWN_MAX:
                self._foreign.add(other.id)
                self._log.info("mdns_foreign_mesh", peer=other.id, mesh=other.mesh)
            return
        # Loopback is another box's own: it means something only to a node that is bound there itself.
        here = is_loopback(said.hosts[0])
        addresses = tuple(address for address in other.peer_addresses if is_loopback(address.host) is here)
        if not addresses or (other.id not in self._known and len(self._known) >= KNOWN_MAX):
            self._ignored += 1
            return
        self._known[other.id] = addresses
        self._log.debug("mdns_found", peer=other.id, addresses=[str(address) for address in addresses])
        for address in addresses:
            self._on_hint(address, HintSource.MDNS)

    def _gone(self, node: NodeId) -> None:
        self._known.pop(node, None)


def _can_multicast(host: str) -> bool:
    """Whether the group of multicast DNS (RFC 6762) can be joined here; one interface that cannot would
    otherwise keep the others from it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            membership = socket.inet_aton("224.0.0.251") + socket.inet_aton(host)
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError:
        return False
    return True


class Seeds:
    """Looks up the seeds, again and again: a name may have several addresses, or move to others."""

    def __init__(self, seeds: Sequence[Address], on_hint: OnHint) -> None:
        self._seeds = tuple(seeds)
        self._on_hint = on_hint
        self._unresolved: set[Address] = set()
        self._log = log.get()

    async def give(self) -> None:
        """Look every seed up and give a hint for each of its addresses."""
        await asyncio.gather(*(self._give(seed) for seed in self._seeds))

    async def _give(self, seed: Address) -> None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await look_up(seed)
        except (OSError, UnicodeError, TimeoutError) as error:
            if seed not in self._unresolved:
                self._unresolved.add(seed)
                self._log.warning("seed_unresolved", seed=str(seed), why=str(error) or "no answer in time")
            return
        if seed in self._unresolved:
            self._unresolved.remove(seed)
            self._log.info("seed_resolved", seed=str(seed))
        # An address that was looked up may be another node's tomorrow: like mDNS, it is hinted at again.
        source = HintSource.SEED if found == (seed,) else HintSource.MDNS
        for address in found:
            self._on_hint(address, source)


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def look_up(address: Address) -> tuple[Address, ...]:
    """The IP addresses behind ``address``, at most SEED_ADDRESSES_MAX. Raises OSError, UnicodeError."""
    if _is_literal(address.host):
        return (Address(host=str(ipaddress.ip_address(address.host)), port=address.port),)
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    hosts = dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found)
    return tuple(Address(host=host, port=address.port) for host in list(hosts)[:SEED_ADDRESSES_MAX])


async def repeat_hints(multicast: Multicast | None, seeds: Seeds, alone: Callable[[], bool]) -> None:
    """Give hints until cancelled: at once, then every REPEAT_S, and sooner while this node is ``alone``."""
    wait_s = 0.25
    while True:
        await seeds.give()
        if multicast is not None:
            await multicast.repeat()
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, REPEAT_ALONE_S) if alone() else REPEAT_S
