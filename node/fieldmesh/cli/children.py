"""Node processes on this box. Owns: their ports, starting, watching and ending: none is left behind.

Each is a real `fieldmesh serve` in a process group of its own, so that Ctrl-C reaches only us. Its stdin is a
pipe that we hold: when we are gone, however that came, it reads the end and leaves by itself. Must not: know
what is asked of them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fieldmesh.core.errors import AddressInUse, EngineNotReady, FieldmeshError, Internal
from fieldmesh.core.model import Address, EngineState, NodeState

if TYPE_CHECKING:
    from fieldmesh.client import Client

HOST: Final = "127.0.0.1"
PORT_PAIRS_TRIED_MAX: Final = 500
HTTP_OFFSET: Final = 60
"""Between the client port and the HTTP port of a node: 7420 goes with 7480."""
POLL_INTERVAL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 8.0
LOG_TAIL_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One node to start."""

    name: str
    profile: str
    client: Address
    peer: Address
    http: Address
    state_folder: Path
    log: Path


@dataclass(slots=True, kw_only=True)
class Child:
    """One node that was started."""

    plan: Plan
    process: subprocess.Popen[bytes]
    serving: bool = False
    seen: int = 0
    reported: bool = False

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal where one ended it."""
        return self.process.poll()


def free_port_pairs(count: int, first: int) -> list[tuple[int, int]]:
    """``count`` pairs (client, peer) of free loopback ports, from ``first`` on, whose HTTP port is free too.

    Raises AddressInUse.
    """
    found: list[tuple[int, int]] = []
    for port in range(first, min(first + 2 * PORT_PAIRS_TRIED_MAX, 65_535 - HTTP_OFFSET), 2):
        if all(_is_free(wanted) for wanted in (port, port + 1, port + HTTP_OFFSET)):
            found.append((port, port + 1))
            if len(found) == count:
                return found
    raise AddressInUse(
        f"There are no {count} free pairs of ports from {first} on; free some or name another first port."
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Ports of connections that ended a moment ago are free for a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@dataclass(slots=True)
class Children:
    """The nodes of one `up`. Use as a context: leaving it ends every process that it started.

    ``command`` is `fieldmesh serve` with the options that all nodes share.
    """

    plans: Sequence[Plan]
    command: Sequence[str]
    running: list[Child] = field(default_factory=list)

    def __enter__(self) -> Children:
        try:
            for plan in self.plans:
                self.running.append(self._start(plan))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _start(self, plan: Plan) -> Child:
        seeds = [str(other.peer) for other in self.plans if other is not plan]
        command = [*self.command, "--end-with-stdin", "--name", plan.name, "--profile", plan.profile]
        command += ["--listen", str(plan.client), "--peer-listen", str(plan.peer)]
        command += ["--http-listen", str(plan.http)]
        command += ["--state-folder", str(plan.state_folder), "--no-mdns"]
        command += ["--found"] if plan is self.plans[0] else ["--metrics-listen", "off"]
        command += [part for seed in seeds for part in ("--seed", seed)]
        try:
            plan.log.parent.mkdir(parents=True, exist_ok=True)
            with plan.log.open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise Internal(f"Node {plan.name} could not be started: {error}.") from error
        return Child(plan=plan, process=process)

    def stop(self) -> None:
        """End all nodes: SIGTERM, a bounded wait, then SIGKILL by id. A second Ctrl-C skips the wait."""
        for child in self.running:
            if child.exit_code is None:
                child.process.terminate()
        try:
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for child in self.running:
                child.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            for child in self.running:
                if child.exit_code is None:
                    child.process.kill()
                child.process.wait()
                if child.process.stdin is not None:
                    child.process.stdin.close()

    def ended(self) -> Iterator[Child]:
        """Nodes that ended since this was last asked."""
        for child in self.running:
            if not child.reported and child.exit_code is not None:
                child.reported = True
                yield child


def wait_until_together(children: Children, timeout_s: float) -> Iterator[list[Child]]:
    """Yield after each look, until every node serves and sees every other ready.

    Raises what stopped a node (its own last words), or EngineNotReady after ``timeout_s``.
    """
    from fieldmesh.client import Client, Persistence

    deadline = time.monotonic() + timeout_s
    once = Persistence(attempts_max=1, rounds_max=1)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(c.plan.client, persistence=once)) for c in children.running]
        while not all(child.serving and child.seen == len(children.running) for child in children.running):
            for child, client in zip(children.running, clients, strict=True):
                if child.exit_code is not None:
                    raise _broke_off(child)
                _look(child, client)
            yield children.running
            if time.monotonic() > deadline:
                waiting = ", ".join(child.plan.name for child in children.running if not child.serving)
                raise EngineNotReady(
                    f"After {timeout_s:g} s not complete: {waiting or 'some do not see each other'}; "
                    f"the logs are in {children.plans[0].log.parent}."
                )
            time.sleep(POLL_INTERVAL_S)


def _look(child: Child, client: Client) -> None:
    """What the node says of itself and of the others. Raises where its engine was given up."""
    from fieldmesh.client import serving

    try:
        child.serving = serving(child.plan.client, timeout_s=1.0)
        nodes = client.nodes(timeout_s=1.0)
    except FieldmeshError:
        return  # not listening yet
    asked = next((node for node in nodes.nodes if node.id == nodes.local_id), None)
    if asked is None or asked.name != child.plan.name:
        return  # another node answered in its place
    if asked.load.engine is EngineState.FAILED:
        raise EngineNotReady(f"The engine of node {child.plan.name} was given up (log: {child.plan.log})")
    child.seen = sum(
        node.state is NodeState.ALIVE and node.load.engine is EngineState.READY and bool(node.offers)
        for node in nodes.nodes
    )


def _broke_off(child: Child) -> FieldmeshError:
    """What a node said last before it ended by itself."""
    try:
        with child.plan.log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES_MAX))
            said = log.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        said = []
    code = child.exit_code or 0
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    last = next((line for line in reversed(said) if line.startswith("fieldmesh: ")), said[-1] if said else "")
    return Internal(
        f"Node {child.plan.name} {how} while it started: {last.removeprefix('fieldmesh: ') or 'no word'} "
        f"(log: {child.plan.log})"
    )
