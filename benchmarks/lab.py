"""A small network of our own on one Linux box: a bridge and one namespace for each host.

Owns: making and removing them, and cutting links between them, in one direction or both. The bridge's own
address (the observer's) is never cut. Needs root and iproute2; ``available`` tells why it cannot be had.
Must not: touch any interface, rule or namespace that it did not make.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PREFIX = "10.213.7"


def available() -> str:
    """Why there can be no lab here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
    return f"{', '.join(missing)} not found (apt-get install iproute2 iptables)" if missing else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host of the lab."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words that run a command on this host."""
        return ("ip", "netns", "exec", self.namespace)


class Lab:
    """``hosts`` namespaces on a bridge; leaving the context removes all of it."""

    def __init__(self, hosts: int) -> None:
        self._tag = f"fm{os.getpid() % 100_000}"
        self.bridge = f"{self._tag}b"
        self._through_bridge = ("-i", self.bridge, "-o", self.bridge, "-j", "ACCEPT")
        self.hosts = [
            Host(namespace=f"{self._tag}n{index}", address=f"{PREFIX}.{index + 2}") for index in range(hosts)
        ]

    def __enter__(self) -> Self:
        try:
            self._make()
        except subprocess.CalledProcessError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def cut(self, first: Host, second: Host) -> None:
        """Let nothing pass between two hosts."""
        self.cut_one_way(first, second)
        self.cut_one_way(second, first)

    def cut_one_way(self, source: Host, target: Host) -> None:
        """Let nothing pass from ``source`` to ``target``; the other direction stays."""
        _run(*target.prefix, "iptables", "-A", "INPUT", "-s", source.address, "-j", "DROP")

    def heal(self) -> None:
        """Undo every cut."""
        for host in self.hosts:
            _run(*host.prefix, "iptables", "-F", "INPUT")

    def _make(self) -> None:
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "address", "add", f"{PREFIX}.1/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        # Where Docker runs, bridged packets pass the host's FORWARD chain, and its policy drops them.
        _run("iptables", "-I", "FORWARD", *self._through_bridge)
        for index, host in enumerate(self.hosts):
            outside = f"{self._tag}v{index}"
            _run("ip", "netns", "add", host.namespace)
            _run(
                "ip", "link", "add", outside, "type", "veth",
                "peer", "name", "eth0", "netns", host.namespace,
            )  # fmt: skip
            _run("ip", "link", "set", outside, "master", self.bridge, "up")
            _run(*host.prefix, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            _run(*host.prefix, "ip", "link", "set", "eth0", "up")
            _run(*host.prefix, "ip", "link", "set", "lo", "up")
            _run(*host.prefix, "ip", "route", "add", "default", "via", f"{PREFIX}.1")

    def _remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, capture_output=True)
        rule = ["iptables", "-D", "FORWARD", *self._through_bridge]
        subprocess.run(rule, check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
