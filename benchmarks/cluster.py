"""Real nodes as real processes, for benchmarks and for the tests that kill them.

Owns: starting ``fieldmesh serve`` on loopback or inside a network namespace, finding the engine's process,
ending everything it started. Must not: know what is measured.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fieldmesh.client import Client, Mesh, Node
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import EngineState, NodeState

POLL_S = 0.02
START_TIMEOUT_S = 60.0


@dataclass(slots=True, kw_only=True)
class Box:
    """One node's process. ``prefix`` runs it elsewhere (``ip netns exec NAME``)."""

    name: str
    profile: str
    client: str
    peer: str
    folder: Path
    prefix: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(default_factory=Path)

    @property
    def pid(self) -> int:
        """The node's process (behind ``ip netns exec``, which becomes it)."""
        assert self.process is not None
        return self.process.pid

    def engine_pids(self) -> list[int]:
        """The children of the node's process."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            return [int(pid) for pid in path.read_text().split()]
        except OSError:
            return []


class Cluster:
    """Some boxes and a folder of theirs; leaving the context ends and removes everything."""

    def __init__(self, *, mesh: str = "", threads: int = 1, mdns: bool = False) -> None:
        self.mesh = mesh or f"bench-{os.getpid()}"
        self.threads = threads
        self.mdns = mdns
        self.boxes: dict[str, Box] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="fieldmesh-"))
        self._logs: list[IO[bytes]] = []
        self._clients: dict[str, Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            client.close()
        for box in self.boxes.values():
            self.stop(box)
        for log in self._logs:
            log.close()
        if error is not None:
            for box in self.boxes.values():
                print(f"--- last log lines of {box.name}", file=sys.stderr)
                print("\n".join(tail(box.log, 15)), file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self,
        name: str,
        profile: str,
        *,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        extra: Sequence[str] = (),
    ) -> Box:
        """A box that is not started yet, on free ports."""
        loopback = host.startswith("127.")
        client_port, peer_port = (free_port(), free_port()) if loopback else (7420, 7421)
        box = Box(
            name=name,
            profile=profile,
            client=f"{host}:{client_port}",
            peer=f"{host}:{peer_port}",
            folder=self.folder / name,
            prefix=tuple(prefix),
            extra=(*(() if loopback else ("--insecure",)), *extra),
        )
        box.log = self.folder / f"{name}.log"
        self.boxes[name] = box
        return box

    def start(self, box: Box) -> None:
        """Start (or restart) the node; its state folder is kept between starts."""
        seeds = [other.peer for other in self.boxes.values() if other is not box]
        command = [
            *box.prefix, sys.executable, "-m", "fieldmesh", "serve",
            "--name", box.name, "--mesh", self.mesh, "--profile", box.profile,
            "--listen", box.client, "--peer-listen", box.peer,
            "--state-folder", str(box.folder), "--threads", str(self.threads),
            "--log-format", "json",
            *(() if self.mdns else ("--no-mdns", *(word for seed in seeds for word in ("--seed", seed)))),
            *box.extra,
        ]  # fmt: skip
        log = box.log.open("ab")
        self._logs.append(log)
        box.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def stop(self, box: Box, timeout_s: float = 15.0) -> None:
        """End a node as an operator would; by force where that does not help."""
        if box.process is None or box.process.poll() is not None:
            return
        box.process.send_signal(signal.SIGCONT)
        box.process.terminate()
        try:
            box.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            box.process.kill()
            box.process.wait()

    def client(self, box: Box) -> Client:
        """A client that knows this box first."""
        if box.name not in self._clients:
            self._clients[box.name] = Client([box.client])
        return self._clients[box.name]

    def seen_by(self, box: Box) -> Mesh | None:
        """The mesh as this box sees it; None where it does not answer."""
        try:
            with Client([box.client]) as client:
                mesh = client.nodes(timeout_s=1.0)
        except FieldmeshError:
            return None
        mine = {node.id: node for node in mesh.nodes}.get(mesh.local_id)
        return mesh if mine is not None and mine.name == box.name else None

    def wait_formed(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every box sees every other one alive with a ready engine."""
        names = {box.name for box in self.boxes.values()}

        def formed() -> bool:
            return all(
                (mesh := self.seen_by(box)) is not None
                and {node.name for node in mesh.nodes if usable(node)} >= names
                for box in self.boxes.values()
            )

        wait_until(formed, timeout_s, "the mesh to form")


def usable(node: Node) -> bool:
    """Whether requests may be sent there."""
    return node.state is NodeState.ALIVE and node.load.engine is EngineState.READY and bool(node.offers)


def node_named(mesh: Mesh | None, name: str) -> Node | None:
    """The youngest node of that name."""
    found = [node for node in (mesh.nodes if mesh else ()) if node.name == name]
    return max(found, key=lambda node: node.incarnation, default=None)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until the condition held. Raises TimeoutError."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(POLL_S)
    return time.monotonic() - begun


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    try:
        return [line[:400] for line in path.read_text(errors="replace").splitlines()[-lines:]]
    except OSError:
        return []
