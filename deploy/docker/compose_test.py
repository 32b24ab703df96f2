"""Three containers, six kinds of fault, and an answer after each: ``make compose-test``.

Goal: what docker-compose.yml promises holds on a real network of containers. Method: bring the project up
under a name of its own, ask every node for every domain, then for each fault measure how fast the others
notice, ask every node that can be asked, heal, wait until all see all, and ask again. Prints a table; exit
code 0 only if every row is as it should be and nothing is left behind.

Owns what is expected of the mesh. It must not reach into a node: it sees what a client sees.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import grpc

from deploy.docker.docker_tools import CommandFailed, bounded, require_engine, run
from deploy.docker.image import IMAGE, build_image
from deploy.docker.project import NODES, Project
from fieldmesh.v1 import mesh_pb2
from fieldmesh.v1.mesh_pb2_grpc import MeshServiceStub

WHOLE_TEST_MAX_S = 840
HEALTHY_MAX_S = 90.0
NOTICE_MAX_S = 2.0  # the promise
NOTICE_WAIT_S = 15.0  # how long to look, to be able to say how late it was
CONVERGED_MAX_S = 45.0
STEADY_S = 4.0  # how long a fault lasts at least, so that a false alarm has time to show
SETTLED_S = 3.0  # how long the mesh must have been whole in one go to count as whole
POLL_S = 0.05
VIEW_TIMEOUT_S = 1.0
ASK_TIMEOUT_S = 60.0
TOKENS_MAX = 12
QUESTION = "Say one sentence about your work."

Views = Mapping[str, str]  # what one node believes of the others: state by name


class Unexpected(Exception):
    """The mesh did not do what it promises. The message says what it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens to the containers, who must notice it, and who must not be alarmed.

    ``must_notice`` see ``victim`` in another state than alive within NOTICE_MAX_S; ``must_not_notice`` go on
    seeing it alive; ``askable`` can be asked while it lasts.
    """

    name: str
    victim: str
    begin: Callable[[], None]
    end: Callable[[], None]
    must_notice: tuple[str, ...] = ()
    must_not_notice: tuple[str, ...] = ()
    askable: tuple[str, ...] = NODES


@dataclass(slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    took_s: float = 0.0
    noticed_s: str = "-"
    asked: int = 0
    fallbacks: int = 0
    converged_s: str = "-"
    asked_after: int = 0
    verdict: str = "ok"


def wait_until(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until the condition held. Raises Unexpected after ``limit_s``."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > limit_s:
            raise Unexpected(f"waited {limit_s:.0f} s in vain")
        time.sleep(POLL_S)
    return time.monotonic() - begun


class Mesh:
    """The mesh as a client sees it: through each node's published port, and by the command line inside."""

    def __init__(self, project: Project) -> None:
        self.project = project
        options = [("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]
        self._channels = {
            node: grpc.insecure_channel(f"127.0.0.1:{port}", options) for node, port in project.ports.items()
        }
        self.owners: dict[str, str] = {}

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            channel.close()

    def _list(self, node: str) -> mesh_pb2.ListNodesResponse | None:
        stub = MeshServiceStub(self._channels[node])
        try:
            return stub.ListNodes(mesh_pb2.ListNodesRequest(), timeout=VIEW_TIMEOUT_S)
        except grpc.RpcError:
            return None

    def view(self, node: str) -> Views:
        """What ``node`` believes of the others; empty if it does not answer."""
        answer = self._list(node)
        if answer is None:
            return {}
        # A node that came back may be listed beside its former self: the best state of a name counts.
        ordered = sorted(answer.nodes, key=lambda entry: entry.state, reverse=True)
        return {
            entry.name: mesh_pb2.NodeState.Name(entry.state).removeprefix("NODE_STATE_") for entry in ordered
        }

    def whole(self) -> bool:
        """Whether every node sees every node alive."""
        return all(all(self.view(node).get(other) == "ALIVE" for other in NODES) for node in NODES)

    def settled(self) -> float:
        """Seconds until the mesh was whole and stayed so for SETTLED_S; Unexpected after CONVERGED_MAX_S."""
        begun = since = time.monotonic()
        while (now := time.monotonic()) - since < SETTLED_S:
            if now - begun > CONVERGED_MAX_S:
                raise Unexpected(f"not every node sees every node after {CONVERGED_MAX_S:.0f} s")
            if not self.whole():
                since = time.monotonic()
            time.sleep(POLL_S)
        return since - begun

    def learn_owners(self) -> None:
        """Remembers which node owns which domain, from what the mesh offers."""
        answer = self._list(NODES[0])
        if answer is None:
            raise Unexpected(f"{NODES[0]} does not answer")
        self.owners = {
            domain: node.name for node in answer.nodes for offer in node.offers for domain in offer.domains
        }
        if len(set(self.owners.values())) < len(NODES) - 1:
            raise Unexpected(f"the nodes own too few domains to tell them apart: {self.owners}")

    def ask(self, node: str, domain: str) -> dict[str, Any]:
        """One question through ``node``, by its own command line. Raises CommandFailed, Unexpected."""
        command = ["fieldmesh", "ask", "--json", "--max-tokens", str(TOKENS_MAX)]
        command += ["--domain", domain] if domain else []
        answer: dict[str, Any] = json.loads(
            self.project.execute(node, *command, QUESTION, timeout_s=ASK_TIMEOUT_S)
        )
        if not answer["text"].strip():
            raise Unexpected(f"{node}, asked for {domain or 'nothing'}, said nothing: {answer}")
        if answer["entry_node"] != node:
            raise Unexpected(f"{node} was asked, {answer['entry_node']} says that it was")
        return answer

    def open_door(self, node: str) -> None:
        """The page, and one answer, through the node's published HTTP port. Raises Unexpected."""
        url = f"http://127.0.0.1:{self.project.http_ports[node]}"
        asked = {
            "model": "auto",
            "max_tokens": TOKENS_MAX,
            "messages": [{"role": "user", "content": QUESTION}],
        }
        request = Request(
            f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        try:
            with urlopen(f"{url}/", timeout=VIEW_TIMEOUT_S) as page:
                titled = b"<title>" in page.read()
            with urlopen(request, timeout=ASK_TIMEOUT_S) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
        except OSError as error:
            raise Unexpected(f"{node} cannot be asked over HTTP: {error}") from None
        if not titled or not said.strip():
            raise Unexpected(f"{node} showed no page, or said nothing over HTTP: {said!r}")

    def ask_all(self, nodes: Iterable[str], *, lost: str | None) -> tuple[int, int]:
        """Every domain, and none, through each of the nodes: how many were answered, how many by a fallback.

        A domain's owner answers for it, unless it is the one that is ``lost`` to others. What that one can
        still be held to is its own domains.
        """

        def through(node: str) -> list[dict[str, Any]]:
            domains = (
                sorted(self.owners) if node != lost else [d for d, n in self.owners.items() if n == node]
            )
            return [
                self._checked(node, domain, lost) for domain in (*domains, *([""] if node != lost else []))
            ]

        with ThreadPoolExecutor(len(NODES)) as pool:
            answers = [answer for some in pool.map(through, nodes) for answer in some]
        return len(answers), sum(bool(answer["fallback"]) for answer in answers)

    def _checked(self, node: str, domain: str, lost: str | None) -> dict[str, Any]:
        answer = self.ask(node, domain)
        owner = self.owners.get(domain)
        if (
            owner
            and (owner != lost or owner == node)
            and (answer["served_by"] != owner or answer["fallback"])
        ):
            raise Unexpected(
                f"{node}, asked for {domain}, was served by {answer['served_by']}, not by {owner}"
            )
        return answer


def notice(mesh: Mesh, fault: Fault) -> str:
    """How long each of those who must notice took, since the fault's command had returned."""
    begun = time.monotonic()
    late: dict[str, float] = {}
    while len(late) < len(fault.must_notice):
        for node in fault.must_notice:
            view = mesh.view(node)
            if node not in late and view and view.get(fault.victim) != "ALIVE":
                late[node] = time.monotonic() - begun
        if time.monotonic() - begun > NOTICE_WAIT_S:
            silent = [node for node in fault.must_notice if node not in late]
            raise Unexpected(f"{' and '.join(silent)} did not notice within {NOTICE_WAIT_S:.0f} s")
        time.sleep(POLL_S)
    if max(late.values()) > NOTICE_MAX_S:
        raise Unexpected(f"noticed after {late}: {NOTICE_MAX_S} s were promised")
    return f"{max(late.values()):.2f}"


def steady(mesh: Mesh, fault: Fault) -> None:
    """Looks for a while whether somebody is alarmed who should not be."""
    begun = time.monotonic()
    while time.monotonic() - begun < STEADY_S:
        for node in fault.must_not_notice:
            view = mesh.view(node)
            if view and view.get(fault.victim) != "ALIVE":
                raise Unexpected(
                    f"{node} believes that {fault.victim} is {view.get(fault.victim)}, and it is well"
                )
        time.sleep(POLL_S)


def suffer(mesh: Mesh, fault: Fault) -> Row:
    """One fault from beginning to end; what is not as it should be goes into the row's verdict."""
    row = Row(name=fault.name)
    print(f"  … {fault.name}", flush=True)
    try:
        begun = time.monotonic()
        fault.begin()
        row.took_s = time.monotonic() - begun
        try:
            if fault.must_notice:
                row.noticed_s = notice(mesh, fault)
            steady(mesh, fault)
            if not fault.must_notice:
                row.converged_s = f"{mesh.settled():.1f}"
            row.asked, row.fallbacks = mesh.ask_all(
                fault.askable, lost=fault.victim if fault.must_notice else None
            )
        finally:
            fault.end()
        row.converged_s = f"{mesh.settled():.1f}"
        row.asked_after, _ = mesh.ask_all(NODES, lost=None)
    except (Unexpected, CommandFailed) as error:
        row.verdict = str(error)
        print(f"  ✗ {fault.name}: {error}", file=sys.stderr, flush=True)
    return row


def faults(project: Project) -> list[Fault]:
    """The six kinds of fault. All but the last two take a node away from others."""

    def docker(command: str, node: str) -> Callable[[], None]:
        def act() -> None:
            run("docker", command, project.container(node))

        return act

    def move() -> None:
        address = project.other_address()
        project.disconnect("code")
        project.connect("code", address)

    return [
        Fault(
            name="kill code",
            victim="code",
            begin=docker("kill", "code"),
            end=docker("start", "code"),
            must_notice=("general", "health"),
            askable=("general", "health"),
        ),
        Fault(
            name="freeze health",
            victim="health",
            begin=docker("pause", "health"),
            end=docker("unpause", "health"),
            must_notice=("general", "code"),
            askable=("general", "code"),
        ),
        Fault(
            name="cut off code",
            victim="code",
            begin=lambda: project.disconnect("code"),
            end=lambda: project.connect("code"),
            must_notice=("general", "health"),
        ),
        Fault(
            name="lose code → health",
            victim="code",
            begin=lambda: project.drop("code", "health"),
            end=lambda: project.allow("code", "health"),
            must_notice=("health",),
            must_not_notice=("general",),
        ),
        Fault(name="move code", victim="code", begin=move, end=lambda: None),
        Fault(
            name="second network",
            victim="general",
            begin=lambda: project.add_second_network("general"),
            end=lambda: project.remove_second_network("general"),
            must_not_notice=("code", "health"),
        ),
    ]


def print_table(rows: Iterable[Row]) -> None:
    """One line a fault."""
    form = "{:20} {:>8} {:>9} {:>7} {:>9} {:>11} {:>7}  {}"
    print()
    print(form.format("fault", "took s", "noticed s", "asked", "fallback", "whole in s", "asked", "verdict"))
    for row in rows:
        verdict = row.verdict.splitlines()[0]
        print(
            form.format(
                row.name,
                f"{row.took_s:.2f}",
                row.noticed_s,
                row.asked,
                row.fallbacks,
                row.converged_s,
                row.asked_after,
                verdict,
            )
        )
    print()


def show_logs(project: Project) -> None:
    """The last words of each node, for whoever has to find out what went wrong."""
    for node in NODES:
        print(f"--- {node}", file=sys.stderr)
        with suppress(CommandFailed):
            print(project.compose("logs", "--no-color", "--tail", "25", node), file=sys.stderr)


def test(project: Project, mesh: Mesh, rows: list[Row]) -> None:
    """Brings the mesh up, makes it suffer, lets it end; adds rows. Raises Unexpected, CommandFailed."""
    quiet = Row(name="nothing")
    begun = time.monotonic()
    project.up()
    wait_until(lambda: all(project.healthy(node) for node in NODES), HEALTHY_MAX_S)
    quiet.took_s = time.monotonic() - begun
    quiet.converged_s = f"{mesh.settled():.1f}"
    mesh.learn_owners()
    quiet.asked, quiet.fallbacks = mesh.ask_all(NODES, lost=None)
    for node in NODES:
        mesh.open_door(node)
    print(f"  ✓ three containers are healthy and find each other ({quiet.took_s:.0f} s)", flush=True)
    rows.append(quiet)
    for fault in faults(project):
        rows.append(suffer(mesh, fault))
        if rows[-1].verdict != "ok" and not mesh.whole():
            raise Unexpected(f"the mesh did not come back after: {fault.name}")
    codes = project.stop()
    if any(codes.values()):
        raise Unexpected(f"exit codes after SIGTERM: {codes}")


def main() -> int:
    """0 if everything was as it should be."""
    require_engine()
    print("compose-test: building the image", flush=True)
    build_image()
    project = Project(f"fieldmesh-test-{os.getpid()}", IMAGE)
    mesh = Mesh(project)
    rows: list[Row] = []
    failure = ""
    try:
        with bounded(WHOLE_TEST_MAX_S, "compose-test"):
            test(project, mesh, rows)
    except (Unexpected, CommandFailed, TimeoutError, KeyboardInterrupt) as error:
        failure = str(error) or "interrupted"
    finally:
        if failure or any(row.verdict != "ok" for row in rows):
            show_logs(project)
        mesh.close()
        left = project.remove()
    print_table(rows)
    if left:
        failure = f"{failure}\nleft behind: {', '.join(left)}".strip()
    if failure:
        print(f"compose-test: {failure}", file=sys.stderr)
    good = not failure and all(row.verdict == "ok" for row in rows)
    print(
        "compose-test: all as it should be, nothing left behind" if good else "compose-test: FAILED",
        flush=True,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
