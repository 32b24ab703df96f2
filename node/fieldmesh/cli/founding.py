"""`init`. Owns: beginning the replicated configuration of a new mesh in the state folder of one node."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import Json
from fieldmesh.cli.serving import ConfigFile, need_node_packages


def init(
    name: Annotated[str | None, typer.Option(help="Name of the node. [default: the host's]")] = None,
    mesh: Annotated[str | None, typer.Option(help="Mesh that it belongs to. [default: fieldmesh]")] = None,
    state_folder: Annotated[
        str | None, typer.Option(help="Folder of the node's identity. [default: one for each mesh and name]")
    ] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Found the configuration of a new mesh on one node, before it is started. The others follow it.

    Once for each mesh; `fieldmesh serve --found` does the same when the node starts.
    """
    from fieldmesh.config import load

    flags = {"node.name": name, "node.mesh": mesh, "node.state_folder": state_folder}
    loaded = load(flags, file=config).config
    need_node_packages()
    from fieldmesh.core.raft_members import founded
    from fieldmesh.runtime.identity import Identity
    from fieldmesh.runtime.raft_store import LOG_FILE, RaftStore
    from fieldmesh.runtime.state import StateFolder

    log = secrets.token_hex(8)
    with StateFolder.open(loaded.state_folder) as folder:
        node = Identity.load(folder).id
        store = RaftStore.open(folder.path / LOG_FILE, node)
        try:
            store.found(founded(node, log))
        finally:
            store.close()
    if as_json:
        terminal.write_json({"log": log, "node": node, "mesh": loaded.node.mesh})
    else:
        terminal.say(f"Founded the configuration of mesh {loaded.node.mesh} on node {loaded.node.name}.")
        terminal.write(f"{log}\n")
