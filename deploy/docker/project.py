"""A compose project of one test run: its containers, networks, packet rules, and that nothing is left of it.

Owns everything that the run makes in docker and in the packet filter. It must not know what is expected of
the mesh.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from deploy.docker.docker_tools import ROOT, CommandFailed, attempt, compose_command, run

NODES = ("general", "code", "health")
CLIENT_PORT = 7420
UP_TIMEOUT_S = 300.0
# Where to look for a network that nothing on this host uses yet.
SUBNETS = [f"10.213.{third}.0/24" for third in range(64, 80)]
STOP_GRACE_S = 25


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _used_subnets() -> list[ipaddress.IPv4Network]:
    used = []
    names = run("docker", "network", "ls", "--quiet").split()
    for network in json.loads(run("docker", "network", "inspect", *names)):
        used += [
            entry["Subnet"]
            for entry in network["IPAM"]["Config"] or []
            if ":" not in entry.get("Subnet", ":")
        ]
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        _, destination, _, _, _, _, _, mask, *_ = line.split()
        if destination != "00000000":
            low, bits = (int.from_bytes(bytes.fromhex(part), "little") for part in (destination, mask))
            used.append(f"{ipaddress.IPv4Address(low)}/{ipaddress.IPv4Address(bits)}")
    return [ipaddress.IPv4Network(text, strict=False) for text in used]


def _free_subnet() -> ipaddress.IPv4Network:
    used = _used_subnets()
    for text in SUBNETS:
        candidate = ipaddress.IPv4Network(text)
        if not any(candidate.overlaps(other) for other in used):
            return candidate
    raise CommandFailed(f"none of {SUBNETS[0]} to {SUBNETS[-1]} is free for a network of containers")


class Project:
    """docker-compose.yml, brought up under a name and on addresses of its own. ``remove`` leaves nothing."""

    def __init__(self, name: str, image: str) -> None:
        self.name = name
        free = _free_ports(2 * len(NODES))
        self.ports = dict(zip(NODES, free, strict=False))
        self.http_ports = dict(zip(NODES, free[len(NODES) :], strict=True))
        self.subnet = _free_subnet()
        self.network = f"{name}_mesh"
        self.second_network = f"{name}-second"
        self._folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        override = self._folder / "override.yml"
        # Addresses are chosen here, so that a node can be given another; restarts are the test's business.
        pool = {"ipam": {"config": [{"subnet": str(self.subnet)}]}}
        services = {node: {"restart": "no"} for node in NODES}
        override.write_text(json.dumps({"networks": {"mesh": pool}, "services": services}), encoding="utf-8")
        self._compose = (
            *compose_command(),
            "-p",
            name,
            "-f",
            str(ROOT / "docker-compose.yml"),
            "-f",
            str(override),
        )
        self._env = {
            "MESH_IMAGE": image,
            **{f"MESH_PORT_{node.upper()}": str(port) for node, port in self.ports.items()},
            **{f"MESH_HTTP_{node.upper()}": str(port) for node, port in self.http_ports.items()},
        }
        self._ids: dict[str, str] = {}

    def compose(self, *arguments: str, timeout_s: float = UP_TIMEOUT_S) -> str:
        """Runs one compose command for this project."""
        return run(*self._compose, *arguments, timeout_s=timeout_s, env=self._env)

    def up(self) -> None:
        """Starts the containers from the image as it is."""
        self.compose("up", "--no-build", "-d")
        self._ids = {node: self.compose("ps", "-q", node).strip() for node in NODES}

    def container(self, node: str) -> str:
        """The id of the node's container."""
        return self._ids[node]

    def inspect(self, node: str, form: str) -> str:
        """One value of the node's container, by a template of docker's."""
        return run("docker", "inspect", "--format", form, self.container(node)).strip()

    def healthy(self, node: str) -> bool:
        """Whether the container's own health check passes."""
        return self.inspect(node, "{{.State.Health.Status}}") == "healthy"

    def address(self, node: str) -> str:
        """The node's address on the mesh's network."""
        return self.inspect(node, f'{{{{(index .NetworkSettings.Networks "{self.network}").IPAddress}}}}')

    def execute(self, node: str, *command: str, timeout_s: float) -> str:
        """What a command in the node's container writes to stdout."""
        return run("docker", "exec", self.container(node), *command, timeout_s=timeout_s)

    def disconnect(self, node: str) -> None:
        """Pulls the node's cable."""
        run("docker", "network", "disconnect", self.network, self.container(node))

    def connect(self, node: str, address: str | None = None) -> None:
        """Plugs the cable in again, under the compose file's name, at ``address`` if one is named."""
        at = ("--ip", address) if address else ()
        run("docker", "network", "connect", "--alias", node, *at, self.network, self.container(node))

    def other_address(self) -> str:
        """An address of the network that no container has."""
        taken = {self.address(other) for other in NODES}
        return next(str(ip) for ip in reversed(list(self.subnet.hosts())) if str(ip) not in taken)

    def add_second_network(self, *nodes: str) -> None:
        """Puts nodes on one more network."""
        run("docker", "network", "create", self.second_network)
        for node in nodes:
            run("docker", "network", "connect", self.second_network, self.container(node))

    def remove_second_network(self, *nodes: str) -> None:
        """Takes them off it again."""
        for node in nodes:
            run("docker", "network", "disconnect", "--force", self.second_network, self.container(node))
        run("docker", "network", "rm", self.second_network)

    # --- packet rules ------------------------------------------------------------------

    def drop(self, source: str, target: str) -> None:
        """Loses every packet from one node to another, in this direction only."""
        self._iptables("-I", "DOCKER-USER", *self._rule(source, target))

    def allow(self, source: str, target: str) -> None:
        """Takes that rule away."""
        self._iptables("-D", "DOCKER-USER", *self._rule(source, target))

    def _rule(self, source: str, target: str) -> Sequence[str]:
        ends = ("-s", self.address(source), "-d", self.address(target))
        return (*ends, "-m", "comment", "--comment", self.name, "-j", "DROP")

    @staticmethod
    def _iptables(*arguments: str) -> str:
        found = shutil.which("iptables") or "/usr/sbin/iptables"
        as_root = () if os.geteuid() == 0 else ("sudo", "-n")
        return run(*as_root, found, "--wait", "10", *arguments)

    # --- the end -----------------------------------------------------------------------

    def stop(self) -> dict[str, int]:
        """Asks all nodes to end (SIGTERM) and gives the exit code of each."""
        self.compose("stop", "-t", str(STOP_GRACE_S), timeout_s=STOP_GRACE_S * 2 + 30)
        return {node: int(self.inspect(node, "{{.State.ExitCode}}")) for node in NODES}

    def remove(self) -> list[str]:
        """Removes everything, whatever state it is in, and names what is left all the same."""
        for node in self._ids.values():
            attempt("docker", "unpause", node)
        with suppress(CommandFailed):
            for line in self._iptables("-S", "DOCKER-USER").splitlines():
                if f"--comment {self.name} " in line or f'--comment "{self.name}"' in line:
                    self._iptables("-D", *line.replace('"', "").split()[1:])
        with suppress(CommandFailed):
            self.compose("down", "--volumes", "--remove-orphans", "-t", "5")
        attempt("docker", "network", "rm", self.second_network)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._left()

    def _left(self) -> list[str]:
        label = f"label=com.docker.compose.project={self.name}"
        left = []
        for kind, command in {
            "container": ("ps", "-aq", "--filter", label),
            "volume": ("volume", "ls", "-q", "--filter", label),
            "network": ("network", "ls", "-q", "--filter", f"name={self.name}"),
        }.items():
            left += [f"{kind} {one}" for one in run("docker", *command).split()]
        with suppress(CommandFailed):
            left += [f"rule {line}" for line in self._iptables("-S").splitlines() if self.name in line]
        return left
