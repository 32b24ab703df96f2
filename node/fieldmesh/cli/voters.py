"""The commands of `raft`. Owns: showing and changing who votes in the log, and copies of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.agreed import admin_of
from fieldmesh.cli.asking import Json, Node
from fieldmesh.core.errors import ConfigError, StateUnwritable
from fieldmesh.core.model import NodeId

if TYPE_CHECKING:
    from fieldmesh.v1 import admin_pb2 as pb

app = typer.Typer(
    help="The log that carries what the mesh agrees on.", no_args_is_help=True, rich_markup_mode=None
)

Whom = Annotated[str, typer.Argument(metavar="NODE", help="Id or name of a node.")]


@app.callback()
def group() -> None:
    """The log that carries what the mesh agrees on."""


@app.command()
def status(node: Node = None, as_json: Json = False) -> None:
    """Show the leader, the voters, the revision, and how far behind the asked node is."""
    with admin_of(node) as admin:
        found = admin.status()
    if as_json:
        from fieldmesh.rpc.admin import status_json

        terminal.write_json(status_json(found))
        return
    for line in _lines(found):
        terminal.write(line + "\n")
    if not found.members:
        return
    shown = terminal.table("node", "id", "part", "here", "durable up to")
    for member in found.members:
        part = "leader" if member.id == found.leader_id else "voter" if member.voter else "learner"
        terminal.add_row(
            shown,
            f"{member.name or '–'}{' *' if member.id == found.local_id else ''}",
            member.id,
            f"{part}, has lost its log" if member.lost else part,
            "yes" if member.here else "no",
            member.match or "–",
        )
    terminal.console().print(shown)


def summary(found: pb.GetRaftStatusResponse) -> str:
    """One line about the log, as the asked node sees it."""
    if found.role == "none":
        return "no configuration is agreed on yet: start one node with --found, once"
    voters = sum(member.voter for member in found.members)
    leader = found.leader_name or found.leader_id or "none known"
    behind = f", {found.lag_entries} entries behind" if found.lag_entries else ""
    age = _age(found)
    return (
        f"leader {leader}, term {found.term}, {voters} voter{'' if voters == 1 else 's'}, "
        f"revision {found.revision}{behind}{age}; this node is {found.role}"
    )


def _age(found: pb.GetRaftStatusResponse) -> str:
    if not found.HasField("stale_s"):
        return ", of unknown age"
    return f", {found.stale_s:.1f} s old" if found.stale_s >= 1.0 else ""


def _lines(found: pb.GetRaftStatusResponse) -> list[str]:
    lines = [summary(found)]
    if found.group:
        lines.append(f"log {found.group}" + (f", epoch {found.epoch}" if found.epoch else ""))
    if found.stopped:
        lines.append(f"STOPPED here: {found.stopped}")
    if found.advice:
        lines.append(f"voters: {found.advice}")
    lines += [
        f"another log, {other.group}, is kept by {', '.join(other.node_ids)}: end these nodes, move their "
        "state folders away and start them again"
        for other in found.other_logs
    ]
    return lines


@app.command()
def transfer(
    to: Annotated[
        str, typer.Argument(metavar="NODE", help="Id or name of a voter; left out, the one furthest along.")
    ] = "",
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Hand the leader's office to another voter."""
    with admin_of(node) as admin:
        leader = admin.transfer(to)
    _done(as_json, f"{leader} leads now.", leader=leader)


@app.command()
def add(
    whom: Whom,
    learner: Annotated[bool, typer.Option("--learner", help="Let it follow without a vote.")] = False,
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Make a node a voter, once it has caught up. (The mesh does so itself unless voters/policy says no.)"""
    with admin_of(node) as admin:
        added = admin.add(whom, learner=learner)
        automatic = not as_json and _automatic(admin)
    _done(as_json, f"{added} is a {'learner' if learner else 'voter'} now.", node=added, voter=not learner)
    if automatic:
        terminal.say(_NOTE)


@app.command()
def remove(whom: Whom, node: Node = None, as_json: Json = False) -> None:
    """Take a voter or learner out of the log; it goes on serving, and follows what is agreed on."""
    with admin_of(node) as admin:
        removed = admin.remove(whom)
        automatic = not as_json and _automatic(admin)
    _done(as_json, f"{removed} votes no more.", node=removed)
    if automatic:
        terminal.say(_NOTE)


_NOTE = (
    "The mesh chooses its voters itself and may change this again; to keep it, "
    "fieldmesh config set voters/policy '{\"automatic\": false}'"
)


def _automatic(admin: Any) -> bool:
    from fieldmesh.core.errors import KeyNotFound

    try:
        return bool(admin.get("voters/policy", level="local").settings[0].value.get("automatic"))
    except KeyNotFound:
        return True


def _done(as_json: bool, words: str, **facts: Any) -> None:
    if as_json:
        terminal.write_json(facts)
    else:
        terminal.say(words)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where to write it; it must not exist.")],
    node: Node = None,
    as_json: Json = False,
) -> None:
    """Write a copy of the asked node's log while it runs; `raft restore` reads it on the same node."""
    if file.exists():
        raise ConfigError(f"{file} exists already; name a file that does not.", field="file")
    partial = file.with_name(file.name + ".new")
    size = 0
    try:
        with admin_of(node) as admin, partial.open("wb") as written:
            for piece in admin.backup():
                size += written.write(piece)
            written.flush()
            os.fsync(written.fileno())
        partial.rename(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.", field="file") from error
    finally:
        partial.unlink(missing_ok=True)
    _done(as_json, f"{size} bytes written to {file}.", file=str(file), bytes=size)


@app.command()
def recover(
    node: Node = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else only show what may be lost.")] = False,
    as_json: Json = False,
) -> None:
    """Let the asked node go on alone after most voters were lost for good; show what may be lost by it."""
    with admin_of(node) as admin:
        found = admin.recover(confirm=yes)
    facts = {
        "done": found.done,
        "epoch": found.epoch,
        "given_up": list(found.given_up),
        "revision": found.revision,
        "stale_s": found.stale_s if found.HasField("stale_s") else None,
        "unconfirmed_keys": list(found.unconfirmed_keys),
    }
    if as_json:
        terminal.write_json(facts)
        return
    since = f"in the last {found.stale_s:.0f} s" if found.HasField("stale_s") else "since this node started"
    lines = [
        f"Voters that are given up: {', '.join(found.given_up) or 'none'}.",
        f"This node goes on from revision {found.revision}; what only the others held is lost: writes that "
        f"they confirmed {since}, if this node was behind.",
    ]
    if found.unconfirmed_keys:
        keys = ", ".join(found.unconfirmed_keys)
        lines.append(f"Writes that may never have been confirmed count from now on: {keys}.")
    terminal.write("\n".join(lines) + "\n")
    if found.done:
        terminal.say(f"This node is the only voter of epoch {found.epoch}; others join again by themselves.")
    else:
        terminal.say(
            "Nothing was done. If the other voters will never come back: the same command with  --yes"
        )


Config = Annotated[Path | None, typer.Option("--config", help="The node's configuration file (TOML).")]
StateFolderOption = Annotated[
    str | None, typer.Option("--state-folder", help="The node's state folder, if it is not in the file.")
]
Name = Annotated[str | None, typer.Option("--name", help="The node's name, if it is not in the file.")]
Mesh = Annotated[str | None, typer.Option("--mesh", help="Its mesh, if it is not in the file.")]


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `raft backup` has written, of this very node.")],
    config: Config = None,
    state_folder: StateFolderOption = None,
    name: Name = None,
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Put a backup in place of a stopped node's log; it goes on alone, as after `recover`."""
    from fieldmesh.runtime import raft_store

    with _stopped(config, state_folder, name, mesh) as (node, log_file):
        stored = raft_store.restore(file, log_file, node)
    _done(
        as_json,
        f"{log_file} holds the log again, epoch {stored.hard.epoch}, with this node as its only voter. Other "
        "voters of before are refused: run `fieldmesh raft forget` on each, and start it again.",
        file=str(log_file),
        epoch=stored.hard.epoch,
    )


@app.command()
def forget(
    config: Config = None,
    state_folder: StateFolderOption = None,
    name: Name = None,
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Move a stopped node's log aside, so that it joins its mesh again without it."""
    with _stopped(config, state_folder, name, mesh) as (_, log_file):
        moved = _move_aside(log_file)
    words = f"The log is now {moved}" if moved else "This node has no log"
    _done(as_json, f"{words}; start the node, and it follows its mesh.", moved=str(moved) if moved else None)


@contextmanager
def _stopped(
    config: Path | None, state_folder: str | None, name: str | None, mesh: str | None
) -> Iterator[tuple[NodeId, Path]]:
    """The id and the log of a node that is not running. Raises StateFolderInUse while it is."""
    from fieldmesh.config import load
    from fieldmesh.runtime.identity import Identity
    from fieldmesh.runtime.raft_store import LOG_FILE
    from fieldmesh.runtime.state import StateFolder

    flags = {"node.state_folder": state_folder, "node.name": name, "node.mesh": mesh}
    folder = load(flags, file=config).config.state_folder
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no state folder; name the node's with --state-folder.", field="node")
    with StateFolder.open(folder) as opened:
        yield Identity.load(opened).id, folder / LOG_FILE


def _move_aside(log_file: Path) -> Path | None:
    """Rename a log with the files that SQLite keeps beside it; where it is now."""
    if not log_file.exists():
        return None
    number = 1
    while (moved := log_file.with_name(f"{log_file.name}.old-{number}")).exists():
        number += 1
    try:
        for suffix in ("-wal", "-shm", ""):
            beside = log_file.with_name(log_file.name + suffix)
            if beside.exists():
                beside.rename(moved.with_name(moved.name + suffix))
    except OSError as error:
        raise StateUnwritable(f"{log_file} cannot be moved: {error.strerror}", field=str(log_file)) from error
    return moved
