"""`up`: a mesh on this box. Owns: which nodes there are, and what is done while they run."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.core.model import Address

if TYPE_CHECKING:
    from fieldmesh.cli.children import Child, Children, Plan
    from fieldmesh.config import NodeConfig
    from fieldmesh.profile_format import Profile

PROFILES: Final = ("general", "code", "health")
SERVE: Final = (sys.executable, "-m", "fieldmesh", "serve")
NODES_MAX: Final = 30
SAMPLE_QUESTION: Final = "Write a function that adds two numbers"
FIRST_PORT: Final = 7420
WATCH_INTERVAL_S: Final = 0.2


class Terminated(BaseException):
    """SIGTERM or SIGHUP came: leave, ending what was started."""


def up(
    profiles: Annotated[
        list[str] | None,
        typer.Argument(help="One node for each: profile names or files. [default: general code health]"),
    ] = None,
    ask: Annotated[
        str | None, typer.Option(help="Ask this through a node that does not own its domain, and end.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Open a chat, on a terminal.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each node. [default: the cores divided among the nodes]")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Name of the mesh. [default: local]")] = None,
    first_port: Annotated[
        int, typer.Option(min=1024, max=65_000, help="Ports are taken from here on, two for each node.")
    ] = FIRST_PORT,
    start_timeout_s: Annotated[float, typer.Option(min=1, max=3600, help="Seconds to start in.")] = 180.0,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer to --ask at most.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file of all nodes.")] = None,
) -> None:
    """Run a mesh of several nodes on this box, and talk with it. Everything ends with this command.

    Without a terminal to talk on, it asks one question and ends; --no-chat keeps the mesh up.
    """
    from fieldmesh.cli.children import HOST, Children
    from fieldmesh.cli.serving import need_node_packages
    from fieldmesh.config import load
    from fieldmesh.profiles import load as load_profile
    from fieldmesh.profiles import model_path

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    loaded = load({"engine.threads": threads, "node.mesh": mesh}, file=config)
    need_node_packages()
    chosen = list(profiles or PROFILES)
    if len(chosen) > NODES_MAX:
        raise typer.BadParameter(f"At most {NODES_MAX} nodes are started on one box.")
    found = [load_profile(name) for name in chosen]
    for profile in found:
        model_path(profile, loaded.config.node.model)
    plans = _plans(chosen, found, loaded.config, first_port, mesh or "local")
    command = [*SERVE, "--threads", str(loaded.config.engine.threads or _share_of_cores(len(chosen)))]
    command += ["--mesh", plans[0].state_folder.parent.name, "--drain-timeout-s", "2"]
    command += ["--advertise", HOST]
    command += ["--config", str(loaded.file)] if loaded.file else []
    if ask is None and chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
        ask = SAMPLE_QUESTION
    began = time.monotonic()
    with Children(plans, command) as children:
        _wait(children, start_timeout_s)
        terminal.say(f"{len(plans)} nodes are up after {time.monotonic() - began:.1f} s:")
        if not terminal.VERBOSITY.quiet:
            _show(children.running, found)
        terminal.say(f"Web page: http://{plans[0].http}/")
        if ask is not None:
            _ask(ask, children.running, found, max_tokens)
        elif chat:
            _chat(children.running)
        else:
            _stay(children)


def _leave(number: int, frame: object) -> None:
    raise Terminated


def _share_of_cores(nodes: int) -> int:
    """Threads of each node: they spin while they wait, so one too many costs more than one too few."""
    from fieldmesh.engine.cores import cpu_budget

    return max(1, cpu_budget() // nodes)


def _plans(
    chosen: list[str], found: list[Profile], config: NodeConfig, first_port: int, mesh: str
) -> list[Plan]:
    """One plan a node. A mesh on other ports of this box has another name, and so its own state."""
    import platformdirs

    from fieldmesh.cli.children import HOST, HTTP_OFFSET, Plan, free_port_pairs

    pairs = free_port_pairs(len(chosen), first_port)
    label = mesh if pairs[0][0] == FIRST_PORT else f"{mesh}-{pairs[0][0]}"
    base = Path(config.node.state_folder or platformdirs.user_state_path("fieldmesh"))
    names: list[str] = []
    for profile in found:
        same = sum(re.sub(r"-\d+$", "", name) == profile.name for name in names)
        names.append(f"{profile.name}-{same + 1}" if same else profile.name)
    return [
        Plan(
            name=name,
            profile=str(Path(which).resolve()) if which.endswith(".toml") or os.sep in which else which,
            client=Address(host=HOST, port=client),
            peer=Address(host=HOST, port=peer),
            http=Address(host=HOST, port=client + HTTP_OFFSET),
            state_folder=base / label / name,
            log=platformdirs.user_log_path("fieldmesh") / label / f"{name}.log",
        )
        for name, which, (client, peer) in zip(names, chosen, pairs, strict=True)
    ]


def _wait(children: Children, timeout_s: float) -> None:
    """Show how the start goes, until all nodes serve and see each other."""
    from fieldmesh.cli.children import wait_until_together

    looks = wait_until_together(children, timeout_s)
    if terminal.VERBOSITY.quiet or not sys.stderr.isatty():
        terminal.say(f"Starting {len(children.plans)} nodes (logs: {children.plans[0].log.parent})")
        for _ in looks:
            pass
        return
    with terminal.console(stderr=True).status("Starting …") as status:
        for running in looks:
            status.update("Starting " + " · ".join(_progress(child, len(running)) for child in running))


def _progress(child: Child, nodes: int) -> str:
    if not child.serving:
        return f"{child.plan.name}: loading its model"
    how = "ready" if child.seen == nodes else f"sees {child.seen} of {nodes}"
    return f"{child.plan.name}: {how}"


def _show(running: list[Child], found: list[Profile]) -> None:
    shown = terminal.table("node", "profile", "domains", "clients", "nodes", "HTTP", "process", "log")
    for child, profile in zip(running, found, strict=True):
        plan = child.plan
        domains = ", ".join(domain.name for domain in profile.domains) or "– (generalist)"
        terminal.add_row(
            shown,
            plan.name,
            profile.name,
            domains,
            plan.client,
            plan.peer,
            plan.http,
            child.process.pid,
            plan.log,
        )
    terminal.console(stderr=True).print(shown)


def _ask(question: str, running: list[Child], found: list[Profile], max_tokens: int | None) -> None:
    from fieldmesh.cli.asking import given, stream_answer
    from fieldmesh.client import Client

    entry = _entry(question, found)
    others = [child.plan.client for index, child in enumerate(running) if index != entry]
    terminal.say(f"Asking through {running[entry].plan.name}: {question}")
    with Client([running[entry].plan.client, *others]) as client:
        stream_answer(client.chat(question, **given(max_tokens=max_tokens)))


def _entry(question: str, found: list[Profile]) -> int:
    """The node to ask through: one that does not own the question's domain, a generalist if possible."""
    from fieldmesh.profile_checks import try_question

    owners = try_question(found, question).profiles

    def rank(index: int) -> tuple[bool, bool]:
        return (found[index].name in owners, bool(found[index].domains))

    return min(range(len(found)), key=rank)


def _chat(running: list[Child]) -> None:
    from fieldmesh.cli.asking import talk
    from fieldmesh.client import Client

    with Client([child.plan.client for child in running]) as client:
        talk(client, {})


def _stay(children: Children) -> None:
    """Stay until a signal comes or no node is left; say which ended."""
    addresses: Any = [str(child.plan.client) for child in children.running]
    terminal.say(f'Ask with: fieldmesh ask --node {addresses[0]} "…"   (Ctrl-C ends the mesh)')
    while any(child.exit_code is None for child in children.running):
        for child in children.ended():
            terminal.say(f"Node {child.plan.name} has ended (code {child.exit_code}).")
        time.sleep(WATCH_INTERVAL_S)
    terminal.complain("All nodes have ended.")
    raise typer.Exit(terminal.FAILURE)
