"""Finding nodes by multicast DNS. Owns: what an announcement says, its bounds, and looking for some.

A node announces one instance of ``_fieldmesh._tcp.local.`` named by its id, so no two ever share a name. SRV
carries the client port and A/AAAA the addresses; TXT carries the rest, under 400 bytes. Everything read is
checked, and what fails is skipped: multicast has no author. Must not: take an announcement for a sign of
life (one stays listed for over an hour after its node was killed).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroconf import BadTypeInNameException, InterfaceChoice, ServiceInfo, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from fieldmesh.core.model import Address, NodeId

SERVICE_TYPE = "_fieldmesh._tcp.local."
TXT_BYTES_MAX = 400
HOSTS_MAX = 4
"""Addresses taken from one announcement."""
NAMES_MAX = 1_024
"""Announcements looked at; what more there is, is ignored until some are withdrawn."""
RESOLVE_TIMEOUT_S = 3.0
RESOLVING_MAX = 32
SETTLE_S = 0.2
"""How long ``browse`` goes on after the first node, to find those that answer about as fast."""

_MESH = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_NODE_ID = re.compile(r"[0-9a-f]{32}")
_PROTOCOL = re.compile(r"([1-9][0-9]{0,3})-([1-9][0-9]{0,3})")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What one node says of itself by multicast: who it is, and where its two listeners are."""

    id: NodeId
    mesh: str
    protocol_min: int
    protocol_max: int
    hosts: tuple[str, ...]
    client_port: int
    peer_port: int

    @property
    def client_addresses(self) -> tuple[Address, ...]:
        return tuple(Address(host=host, port=self.client_port) for host in self.hosts)

    @property
    def peer_addresses(self) -> tuple[Address, ...]:
        return tuple(Address(host=host, port=self.peer_port) for host in self.hosts)


def to_service(said: Announcement) -> AsyncServiceInfo:
    """The DNS records of an announcement. Raises ValueError where TXT would be too large to be seen."""
    service = AsyncServiceInfo(
        SERVICE_TYPE,
        f"{said.id}.{SERVICE_TYPE}",
        port=said.client_port,
        server=f"{said.id}.local.",
        parsed_addresses=list(said.hosts),
        properties={
            "id": said.id,
            "mesh": said.mesh,
            "protocol": f"{said.protocol_min}-{said.protocol_max}",
            "peer": str(said.peer_port),
        },
    )
    if len(service.text) > TXT_BYTES_MAX:
        raise ValueError(f"an announcement of {len(service.text)} bytes; at most {TXT_BYTES_MAX} are sent")
    return service


def from_service(service: ServiceInfo) -> Announcement | None:
    """What the records say; None where anything about them is not as ``to_service`` makes it."""
    if len(service.text) > TXT_BYTES_MAX or service.port is None or not 0 < service.port < 65_536:
        return None
    try:
        said = {
            key.decode("ascii"): (value or b"").decode("ascii") for key, value in service.properties.items()
        }
    except UnicodeDecodeError:
        return None
    node, mesh, peer = said.get("id", ""), said.get("mesh", ""), said.get("peer", "")
    protocol = _PROTOCOL.fullmatch(said.get("protocol", ""))
    hosts = [host for host in service.parsed_addresses() if "%" not in host][:HOSTS_MAX]
    if not (
        _NODE_ID.fullmatch(node)
        and service.name == f"{node}.{SERVICE_TYPE}"
        and _MESH.fullmatch(mesh)
        and _PORT.fullmatch(peer)
        and int(peer) < 65_536
        and protocol
        and hosts
    ):
        return None
    return Announcement(
        id=NodeId(node),
        mesh=mesh,
        protocol_min=int(protocol[1]),
        protocol_max=int(protocol[2]),
        hosts=tuple(hosts),
        client_port=service.port,
        peer_port=int(peer),
    )


class Listener:
    """Follows the announcements on some interfaces, resolves them, and tells of each change.

    ``found`` is called with the announcement whenever it is new or different, ``gone`` with the id when it
    was withdrawn. ``ignored`` counts what was malformed or too much.
    """

    def __init__(
        self, zeroconf: Zeroconf, found: Callable[[Announcement], None], gone: Callable[[NodeId], None]
    ) -> None:
        self.ignored = 0
        self._zeroconf = zeroconf
        self._found = found
        self._gone = gone
        self._names: dict[str, Announcement | None] = {}
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._browser = AsyncServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[self._changed])

    async def close(self) -> None:
        await self._browser.async_cancel()
        for task in list(self._resolving.values()):
            task.cancel()
        await asyncio.gather(*self._resolving.values(), return_exceptions=True)

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            said = self._names.pop(name, None)
            if said is not None:
                self._gone(said.id)
            return
        if name not in self._names and len(self._names) >= NAMES_MAX:
            self.ignored += 1
            return
        try:
            service = AsyncServiceInfo(SERVICE_TYPE, name)
        except BadTypeInNameException:
            self.ignored += 1
            return
        if service.load_from_cache(zeroconf):
            self._take(name, service)
        elif name not in self._resolving and len(self._resolving) < RESOLVING_MAX:
            task = asyncio.get_running_loop().create_task(self._resolve(name, service))
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, name: str, service: AsyncServiceInfo) -> None:
        if await service.async_request(self._zeroconf, RESOLVE_TIMEOUT_S * 1000):
            self._take(name, service)

    def _take(self, name: str, service: ServiceInfo) -> None:
        said = from_service(service)
        if said is None:
            self.ignored += 1
        elif self._names.get(name) != said:
            self._names[name] = said
            self._found(said)


async def browse_async(
    mesh: str, timeout_s: float, interfaces: Sequence[str] | None = None
) -> list[tuple[Address, ...]]:
    """Client addresses of the nodes of ``mesh`` that announce themselves, one tuple a node.

    Returns shortly after the first answer, or with nothing after ``timeout_s``. Looks on every IPv4
    interface of this box, loopback included, unless ``interfaces`` lists addresses. A network without
    multicast gives nothing: name a node there.
    """
    nodes: dict[NodeId, tuple[Address, ...]] = {}
    first = asyncio.Event()

    def found(said: Announcement) -> None:
        if said.mesh == mesh:
            nodes[said.id] = said.client_addresses
            first.set()

    def gone(node: NodeId) -> None:
        nodes.pop(node, None)

    try:
        zeroconf = AsyncZeroconf(interfaces=InterfaceChoice.All if interfaces is None else list(interfaces))
    except OSError:
        return []
    try:
        listener = Listener(zeroconf.zeroconf, found, gone)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await first.wait()
                await asyncio.sleep(SETTLE_S)
        await listener.close()
    finally:
        await zeroconf.async_close()
    return [nodes[node] for node in sorted(nodes)]


def browse(mesh: str, timeout_s: float, interfaces: Sequence[str] | None = None) -> list[tuple[Address, ...]]:
    """``browse_async`` for callers without an event loop."""
    return asyncio.run(browse_async(mesh, timeout_s, interfaces))
