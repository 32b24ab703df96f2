"""`status` and `health`. Owns: showing the mesh as one node sees it."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import DEFAULT_NODE, Json, Node, connect
from fieldmesh.core.errors import FieldmeshError

if TYPE_CHECKING:
    from rich.console import Group

    from fieldmesh.client import Client, Mesh
    from fieldmesh.client import Node as MeshNode

WATCH_INTERVAL_S: Final = 1.0


def status(
    node: Node = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second.")] = False,
    as_json: Json = False,
) -> None:
    """Show the nodes of the mesh, what they offer and how busy they are."""
    with connect(node) as client:
        if watch and as_json:
            while True:
                sys.stdout.write(json.dumps(mesh_json(client.nodes()), ensure_ascii=False) + "\n")
                sys.stdout.flush()
                time.sleep(WATCH_INTERVAL_S)
        elif watch:
            _watch(client)
        elif as_json:
            terminal.write_json(mesh_json(client.nodes()))
        else:
            terminal.console().print(mesh_table(client.nodes()))


def _watch(client: Client) -> None:
    from rich.live import Live

    with Live(mesh_table(client.nodes()), console=terminal.console(), screen=sys.stdout.isatty()) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            try:
                live.update(mesh_table(client.nodes()))
            except FieldmeshError as error:
                from rich.text import Text

                live.update(Text(terminal.printable(error.message)))


def mesh_json(mesh: Mesh) -> dict[str, Any]:
    """The mesh as `--json` prints it."""
    return {"mesh": mesh.name, "local_id": mesh.local_id, "nodes": [_node_json(node) for node in mesh.nodes]}


def _node_json(node: MeshNode) -> dict[str, Any]:
    from fieldmesh.client import as_json

    return {
        "id": node.id,
        "name": node.name,
        "address": str(node.addresses[0]) if node.addresses else "",
        "state": node.state.value,
        "profile": node.offers[0].profile if node.offers else "",
        "domains": _union(node, "domains"),
        "models": list(dict.fromkeys(offer.model for offer in node.offers)),
        "tier": max((offer.tier for offer in node.offers), default=0),
        "load": as_json(node.load),
        "incarnation": node.incarnation,
        "addresses": [str(address) for address in node.addresses],
        "peer_address": node.peer_address,
        "rtt_s": as_json(node.rtt_s),
        "version": node.version,
        "offers": as_json(node.offers),
    }


def _union(node: MeshNode, field: str) -> list[str]:
    return list(dict.fromkeys(name for offer in node.offers for name in getattr(offer, field)))


def mesh_table(mesh: Mesh) -> Group:
    """The mesh as people read it; the node that was asked is marked."""
    from rich.console import Group
    from rich.text import Text

    shown = terminal.table(
        "node",
        "state",
        "profile",
        "domains",
        "model",
        "engine",
        "busy",
        "queue",
        "KV",
        "tok/s",
        "rtt",
        "address",
    )
    for node in mesh.nodes:
        load = node.load
        terminal.add_row(
            shown,
            f"{node.name}{' *' if node.id == mesh.local_id else ''}",
            node.state.value,
            ", ".join(offer.profile for offer in node.offers) or "–",
            ", ".join(_union(node, "domains")) or "–",
            ", ".join(dict.fromkeys(offer.model for offer in node.offers)) or "–",
            "draining" if load.draining else load.engine.value,
            f"{load.running}/{load.slots}",
            f"{load.queued}/{load.queue_max}",
            f"{load.kv_pressure:.0%}",
            f"{load.decode_tokens_per_s:.0f}" if load.decode_tokens_per_s else "–",
            f"{node.rtt_s * 1000:.1f} ms" if node.rtt_s else "–",
            node.addresses[0] if node.addresses else "–",
        )
    alive = sum(node.state.value == "alive" for node in mesh.nodes)
    head = Text(
        terminal.printable(f"mesh {mesh.name}: {alive} of {len(mesh.nodes)} nodes alive (* was asked)")
    )
    return Group(head, shown)


def health(
    node: Annotated[
        str, typer.Option("--node", metavar="HOST:PORT", envvar="FIELDMESH_NODE", help="Node to ask.")
    ] = DEFAULT_NODE,
    profile: Annotated[
        str, typer.Option(help="A profile of that node, instead of the node as a whole.")
    ] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Exit 0 if the node is serving, 3 if not: for container and load balancer checks."""
    from fieldmesh.client import serving
    from fieldmesh.config import CLIENT_PORT
    from fieldmesh.values import address

    asked = address(node, default_port=CLIENT_PORT, field_name="--node")
    serves = serving(
        asked, f"fieldmesh.v1.InferenceService/{profile}" if profile else "", timeout_s=timeout_s
    )
    if as_json:
        terminal.write_json({"node": node, "profile": profile, "serving": serves})
    else:
        terminal.write("SERVING\n" if serves else "NOT_SERVING\n")
    if not serves:
        raise typer.Exit(terminal.UNAVAILABLE)
