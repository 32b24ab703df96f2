"""Which addresses are announced: the one that routes to peers, never loopback or a bridge by accident."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.runtime.addresses import (
    HOSTS_MAX,
    InterfaceAddress,
    Network,
    _netlink_messages,
    hosts_to_announce,
    interface_addresses,
    multicast_hosts,
    source_towards,
    watch,
)

LOOPBACK = InterfaceAddress(interface="lo", host="127.0.0.1", loopback=True, multicast=False)
LAN = InterfaceAddress(interface="eth0", host="192.168.1.5")
WIFI = InterfaceAddress(interface="wlan0", host="10.0.0.7")
DOCKER = InterfaceAddress(interface="docker0", host="172.17.0.1")
CABLE = InterfaceAddress(interface="eth1", host="169.254.3.4")
LAN6 = InterfaceAddress(interface="eth0", host="2001:db8:1::5")
DEFAULT_ROUTE = "203.0.113.1"


def network(*interfaces: InterfaceAddress, routes: Mapping[str, str] | None = None) -> Network:
    return Network(interfaces=lambda: interfaces, source=lambda host: (routes or {}).get(host))


def test_the_address_that_routes_to_a_peer_comes_before_the_default_route() -> None:
    box = network(LOOPBACK, LAN, WIFI, routes={DEFAULT_ROUTE: LAN.host, "10.0.0.9": WIFI.host})
    assert hosts_to_announce("0.0.0.0", [], box) == (LAN.host, WIFI.host)
    assert hosts_to_announce("0.0.0.0", ["10.0.0.9"], box) == (WIFI.host, LAN.host)


def test_loopback_is_never_announced_by_a_listener_that_is_open_to_others() -> None:
    box = network(LOOPBACK, routes={DEFAULT_ROUTE: "127.0.0.1", "127.0.0.1": "127.0.0.1"})
    assert hosts_to_announce("0.0.0.0", ["127.0.0.1"], box) == ()


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "192.168.1.5", "edge-7.local"])
def test_a_listener_bound_to_one_host_is_announced_as_that(bound: str) -> None:
    assert hosts_to_announce(bound, ["10.0.0.9"], network(LAN, WIFI)) == (bound,)


@pytest.mark.parametrize(
    "interface",
    ["docker0", "docker_gwbridge", "br-0123456789ab", "veth1a2b3c", "virbr0", "cni0", "cali12345", "lxdbr0",
     "flannel.1", "podman0", "vnet3", "vboxnet0"],
)  # fmt: skip
def test_a_bridge_of_containers_is_not_announced_even_by_the_default_route(interface: str) -> None:
    bridge = InterfaceAddress(interface=interface, host="172.17.0.1")
    box = network(bridge, LAN, routes={DEFAULT_ROUTE: bridge.host})
    assert hosts_to_announce("0.0.0.0", [], box) == (LAN.host,)
    assert multicast_hosts("0.0.0.0", box) == (LAN.host,)


@pytest.mark.parametrize("interface", ["br0", "br-lan", "bridge0", "enp3s0", "wg0", "tailscale0", "bond0"])
def test_a_bridge_or_tunnel_that_the_operator_made_is_announced(interface: str) -> None:
    made = InterfaceAddress(interface=interface, host="192.168.1.5")
    assert hosts_to_announce("0.0.0.0", [], network(made)) == (made.host,)


def test_localhost_is_the_loopback_address() -> None:
    box = network(LOOPBACK, LAN)
    assert hosts_to_announce("localhost", [], box) == ("127.0.0.1",)
    assert multicast_hosts("localhost", box) == ("127.0.0.1",)


def test_a_bridge_is_announced_behind_the_others_once_a_peer_answers_through_it() -> None:
    routes = {DEFAULT_ROUTE: LAN.host, "172.17.0.2": DOCKER.host, "192.168.1.9": LAN.host}
    box = network(DOCKER, LAN, routes=routes)
    assert hosts_to_announce("0.0.0.0", ["172.17.0.2", "192.168.1.9"], box) == (LAN.host, DOCKER.host)


def test_a_link_local_address_is_announced_only_when_there_is_nothing_else() -> None:
    assert hosts_to_announce("0.0.0.0", [], network(CABLE)) == (CABLE.host,)
    assert hosts_to_announce("0.0.0.0", [], network(CABLE, LAN)) == (LAN.host,)


def test_only_a_listener_on_both_families_announces_ipv6() -> None:
    box = network(LAN6, LAN)
    assert hosts_to_announce("0.0.0.0", [], box) == (LAN.host,)
    assert set(hosts_to_announce("::", [], box)) == {LAN.host, LAN6.host}


def test_the_answer_is_bounded() -> None:
    many = [InterfaceAddress(interface=f"eth{n}", host=f"10.0.{n}.1") for n in range(50)]
    assert len(hosts_to_announce("0.0.0.0", [], network(*many))) == HOSTS_MAX


def test_multicast_goes_out_where_the_listener_is() -> None:
    box = network(LOOPBACK, LAN, WIFI)
    assert multicast_hosts("127.0.0.1", box) == ("127.0.0.1",)
    assert multicast_hosts("10.0.0.7", box) == ("10.0.0.7",)
    assert multicast_hosts("0.0.0.0", box) == ("10.0.0.7", "192.168.1.5")
    assert multicast_hosts("10.9.9.9", box) == ()


async def test_watch_tells_each_change_once() -> None:
    readings = iter([("a",), ("a",), ("b",), ("b",), (), ("c",)])
    changes = watch(lambda: next(readings), poll_s=0)
    assert [await anext(changes) for _ in range(4)] == [("a",), ("b",), (), ("c",)]


# --- the kernel ----------------------------------------------------------------------------


def test_the_kernel_lists_loopback() -> None:
    found = {address.host: address for address in interface_addresses()}
    assert found["127.0.0.1"].loopback
    assert not any(
        address.loopback for host, address in found.items() if not host.startswith(("127.", "::1"))
    )


def test_the_kernel_names_the_source_towards_a_host_and_names_are_not_looked_up() -> None:
    assert source_towards("127.0.0.1") == "127.0.0.1"
    assert source_towards("localhost") is None
    assert source_towards("") is None


@given(data=st.binary(max_size=256))
def test_netlink_messages_are_cut_without_end_or_overrun(data: bytes) -> None:
    messages = list(itertools.islice(_netlink_messages(data), 100))
    assert sum(16 + len(body) for _, body in messages) <= len(data) + 16
