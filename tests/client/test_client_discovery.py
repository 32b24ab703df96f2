"""Announcements: what is written is read, everything else is skipped, and looking ends in time."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo, ServiceStateChange
from zeroconf.asyncio import AsyncZeroconf

from fieldmesh.client.discovery import (
    NAMES_MAX,
    SERVICE_TYPE,
    TXT_BYTES_MAX,
    Announcement,
    Listener,
    browse_async,
    from_service,
    to_service,
)
from fieldmesh.core.model import Address, NodeId

LOOPBACK = ["127.0.0.1"]
RUN = secrets.token_hex(16)[1:]
"""Other runs on this box announce on the same loopback: ids and mesh names must differ from theirs."""
MESH = f"browsed-{RUN}"
ID = NodeId("0" + RUN)


def announcement(node: str = ID, mesh: str = MESH, client_port: int = 7420) -> Announcement:
    return Announcement(
        id=NodeId(node),
        mesh=mesh,
        protocol_min=1,
        protocol_max=3,
        hosts=("127.0.0.1",),
        client_port=client_port,
        peer_port=7421,
    )


@pytest.fixture
async def responder() -> AsyncIterator[AsyncZeroconf]:
    zeroconf = AsyncZeroconf(interfaces=LOOPBACK)
    yield zeroconf
    await zeroconf.async_close()


@given(
    mesh=st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True),
    ports=st.tuples(st.integers(1, 65535), st.integers(1, 65535)),
    protocol=st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    hosts=st.lists(st.ip_addresses().map(str), min_size=1, max_size=4, unique=True),
)
def test_what_is_announced_is_read(
    mesh: str, ports: tuple[int, int], protocol: tuple[int, int], hosts: list[str]
) -> None:
    said = Announcement(
        id=ID,
        mesh=mesh,
        protocol_min=protocol[0],
        protocol_max=protocol[1],
        hosts=tuple(hosts),
        client_port=ports[0],
        peer_port=ports[1],
    )
    service = to_service(said)
    heard = from_service(service)
    assert heard is not None
    assert len(service.text) <= TXT_BYTES_MAX
    assert set(heard.hosts) == set(hosts)
    assert {address.port for address in heard.peer_addresses} == {ports[1]}


@given(
    text=st.binary(max_size=600),
    port=st.integers(0, 65535),
    addresses=st.lists(st.binary(min_size=4, max_size=4)),
)
def test_any_bytes_are_an_announcement_or_nothing(text: bytes, port: int, addresses: list[bytes]) -> None:
    service = ServiceInfo(
        SERVICE_TYPE, f"{ID}.{SERVICE_TYPE}", port=port, properties=text, addresses=addresses
    )
    heard = from_service(service)
    assert heard is None or (heard.id == ID and heard.mesh and heard.hosts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", ""), ("id", "z" * 32), ("id", "f" * 32), ("mesh", ""), ("mesh", "a b"), ("mesh", "x" * 64),
        ("protocol", ""), ("protocol", "1"), ("protocol", "0-1"), ("protocol", "1-99999"),
        ("peer", ""), ("peer", "0"), ("peer", "65536"), ("peer", "-1"), ("peer", "１"), ("more", "x" * 250),
    ],
)  # fmt: skip
def test_a_field_out_of_bounds_makes_the_announcement_void(key: str, value: str) -> None:
    fields = {"id": ID, "mesh": "m", "protocol": "1-1", "peer": "7421", "pad": "x" * 120, key: value}
    service = ServiceInfo(
        SERVICE_TYPE, f"{ID}.{SERVICE_TYPE}", port=1, properties=fields, parsed_addresses=["10.0.0.1"]
    )
    assert from_service(service) is None


async def test_browsing_finds_the_nodes_of_one_mesh(responder: AsyncZeroconf) -> None:
    ours = announcement("a" + RUN, client_port=1), announcement("b" + RUN, client_port=2)
    for said in (*ours, announcement("c" + RUN, mesh="not-ours")):
        await responder.async_register_service(to_service(said), cooperating_responders=True)
    found = await browse_async(MESH, 5.0, LOOPBACK)
    assert found == [(Address(host="127.0.0.1", port=1),), (Address(host="127.0.0.1", port=2),)]


async def test_browsing_for_nobody_ends_with_nothing() -> None:
    assert await browse_async("nobody-is-called-so", 0.05, LOOPBACK) == []


async def test_browsing_without_multicast_ends_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("fieldmesh.client.discovery.AsyncZeroconf", refused)
    assert await browse_async("m", 5.0) == []


async def test_a_listener_hears_changes_and_goodbyes(responder: AsyncZeroconf) -> None:
    heard: asyncio.Queue[Announcement | NodeId] = asyncio.Queue(16)

    def found(said: Announcement) -> None:
        if said.id == ID:
            heard.put_nowait(said)

    def gone(node: NodeId) -> None:
        if node == ID:
            heard.put_nowait(node)

    ears = AsyncZeroconf(interfaces=LOOPBACK)
    listener = Listener(ears.zeroconf, found, gone)
    try:
        async with asyncio.timeout(10):
            first = announcement(client_port=1)
            await responder.async_register_service(to_service(first), cooperating_responders=True)
            assert await heard.get() == first
            moved = announcement(client_port=2)
            await responder.async_update_service(to_service(moved))
            assert await heard.get() == moved
            await responder.async_unregister_all_services()
            assert await heard.get() == ID
    finally:
        await listener.close()
        await ears.async_close()


async def test_the_number_of_names_is_bounded(responder: AsyncZeroconf) -> None:
    listener = Listener(responder.zeroconf, lambda _: None, lambda _: None)
    listener._names.update({f"{n:032x}.{SERVICE_TYPE}": None for n in range(NAMES_MAX)})
    listener._changed(responder.zeroconf, SERVICE_TYPE, f"{ID}.{SERVICE_TYPE}", ServiceStateChange.Added)
    assert listener.ignored == 1
    assert not listener._resolving
    await listener.close()


async def test_a_name_of_another_kind_is_ignored(responder: AsyncZeroconf) -> None:
    listener = Listener(responder.zeroconf, lambda _: None, lambda _: None)
    listener._changed(responder.zeroconf, SERVICE_TYPE, "printer._ipp._tcp.local.", ServiceStateChange.Added)
    assert listener.ignored == 1
    await listener.close()
