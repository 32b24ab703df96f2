"""Join hints: from multicast and from seeds, whatever the network does."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator

import pytest

from fieldmesh.client.discovery import Announcement
from fieldmesh.core.joining import HintSource
from fieldmesh.core.model import Address, NodeId
from fieldmesh.runtime import discovery
from fieldmesh.runtime.discovery import Multicast, Seeds, look_up, repeat_hints

LOOPBACK = ["127.0.0.1"]
RUN = secrets.token_hex(16)[1:]
"""Other runs on this box announce on the same loopback: ids and mesh names must differ from theirs."""
MESH = f"hints-{RUN}"
Hint = tuple[Address, HintSource]
MDNS = HintSource.MDNS


def announcement(
    letter: str, mesh: str = MESH, host: str = "127.0.0.1", peer_port: int = 7421
) -> Announcement:
    return Announcement(
        id=NodeId(letter + RUN),
        mesh=mesh,
        protocol_min=1,
        protocol_max=1,
        hosts=(host,),
        client_port=7420,
        peer_port=peer_port,
    )


class Node:
    """One node's multicast, and the hints that it gave."""

    def __init__(self) -> None:
        self.hints: asyncio.Queue[Hint] = asyncio.Queue(64)
        self.multicast = Multicast(lambda *hint: self.hints.put_nowait(hint))

    async def hint(self) -> Hint:
        async with asyncio.timeout(10):
            return await self.hints.get()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    nodes = Node(), Node()
    yield nodes
    for node in nodes:
        await node.multicast.close()


async def test_two_nodes_of_one_mesh_hear_of_each_other(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await a.multicast.update(announcement("a", peer_port=1), LOOPBACK)
    await b.multicast.update(announcement("b", peer_port=2), LOOPBACK)
    assert await a.hint() == (Address(host="127.0.0.1", port=2), MDNS)
    assert await b.hint() == (Address(host="127.0.0.1", port=1), MDNS)
    assert a.multicast.statistics().known == 1
    assert a.multicast.statistics().announced


async def test_a_node_that_moved_is_hinted_at_again_and_hints_can_be_repeated(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    await a.multicast.update(announcement("a"), LOOPBACK)
    for port in (2, 3):
        await b.multicast.update(announcement("b", peer_port=port), LOOPBACK)
        assert await a.hint() == (Address(host="127.0.0.1", port=port), MDNS)
    await a.multicast.repeat()
    assert await a.hint() == (Address(host="127.0.0.1", port=3), MDNS)


async def test_a_node_that_advertises_a_name_is_announced_by_the_addresses_of_its_interfaces(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    await a.multicast.update(announcement("a"), LOOPBACK)
    await b.multicast.update(announcement("b", host="edge.example", peer_port=4), LOOPBACK)
    assert await a.hint() == (Address(host="127.0.0.1", port=4), MDNS)


async def test_a_foreign_mesh_is_counted_and_ignored(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await b.multicast.update(announcement("b", mesh="not-ours"), LOOPBACK)
    await a.multicast.update(announcement("a"), LOOPBACK)
    await b.multicast.update(announcement("c", peer_port=5), LOOPBACK)
    assert await a.hint() == (Address(host="127.0.0.1", port=5), MDNS)
    assert a.multicast.statistics().foreign >= 1


async def test_a_loopback_address_means_nothing_to_a_node_of_another_box(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await a.multicast.update(announcement("a", host="10.0.0.1"), LOOPBACK)
    await b.multicast.update(announcement("b"), LOOPBACK)
    await b.multicast.update(announcement("b", host="10.0.0.2", peer_port=9), LOOPBACK)
    assert await a.hint() == (Address(host="10.0.0.2", port=9), MDNS)
    assert a.multicast.statistics().ignored == 1


async def test_no_multicast_is_no_failure(monkeypatch: pytest.MonkeyPatch, pair: tuple[Node, Node]) -> None:
    a, b = pair
    with monkeypatch.context() as broken:

        def refused(*_: object, **__: object) -> None:
            raise OSError(19, "No such device")

        broken.setattr(discovery, "AsyncZeroconf", refused)
        await a.multicast.update(announcement("a"), LOOPBACK)
    assert not a.multicast.statistics().announced
    await a.multicast.repeat()  # the network came back
    await b.multicast.update(announcement("b"), LOOPBACK)
    assert await a.hint() == (Address(host="127.0.0.1", port=7421), MDNS)


async def test_an_interface_that_is_gone_does_not_keep_the_others_from_it(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await a.multicast.update(announcement("a"), ["203.0.113.77"])
    assert not a.multicast.statistics().announced
    await a.multicast.update(announcement("a"), ["203.0.113.77", *LOOPBACK])
    await b.multicast.update(announcement("b"), LOOPBACK)
    assert await a.hint() == (Address(host="127.0.0.1", port=7421), MDNS)


async def test_the_number_of_nodes_is_bounded(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Node, Node]
) -> None:
    monkeypatch.setattr(discovery, "KNOWN_MAX", 1)
    a, _ = pair
    await a.multicast.update(announcement("a"), LOOPBACK)
    for letter in "bcd":
        a.multicast._found(announcement(letter))
    assert a.multicast.statistics().known == 1
    assert a.multicast.statistics().ignored == 2


# --- seeds ---------------------------------------------------------------------------------


async def test_an_address_is_not_looked_up_and_a_name_may_have_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def two(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (host, 1)) for host in ("10.0.0.1", "10.0.0.2", "10.0.0.1")]

    assert await look_up(Address(host="2001:DB8::1", port=1)) == (Address(host="2001:db8::1", port=1),)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
    assert await look_up(Address(host="nodes.example", port=7)) == (
        Address(host="10.0.0.1", port=7),
        Address(host="10.0.0.2", port=7),
    )


async def test_seeds_are_looked_up_again_and_a_lost_name_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"moving": ["10.0.0.1"]}

    async def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host not in answers:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (found, 1)) for found in answers[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    hints: list[Hint] = []
    names = [Address(host=host, port=7421) for host in ("gone", "moving", "127.0.0.1")]
    seeds = Seeds(names, lambda *hint: hints.append(hint))
    await seeds.give()
    answers["moving"] = ["10.0.0.2"]
    await seeds.give()
    told = [(address.host, source) for address, source in hints]
    fixed = ("127.0.0.1", HintSource.SEED)
    assert set(told[:2]) == {("10.0.0.1", MDNS), fixed}
    assert set(told[2:]) == {("10.0.0.2", MDNS), fixed}


@pytest.mark.parametrize("host", ["x" * 64 + ".example", "no\x00name", "a..b"])
async def test_a_name_that_is_none_is_survived(host: str) -> None:
    hints: list[Hint] = []
    seeds = Seeds([Address(host=host, port=1)], lambda *hint: hints.append(hint))
    await seeds.give()
    assert hints == []


async def test_hints_come_sooner_while_the_node_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    alone = True

    async def sleep(wait_s: float) -> None:
        nonlocal alone
        waits.append(wait_s)
        alone = len(waits) < 7
        if len(waits) == 9:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    seeds = Seeds([], lambda *_: None)
    with pytest.raises(asyncio.CancelledError):
        await repeat_hints(None, seeds, lambda: alone)
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 30.0, 30.0]
