"""`status` and `health`. Owns: showing the mesh as one node sees it."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fieldmesh.cli import terminal
from fieldmesh.cli.asking import DEFAULT_NODE, Json, Node, connect
from fieldmesh.cli.voters import summary
from fieldmesh.core.errors import FieldmeshError

if TYPE_CHECKING:
    from rich.console import Group

    from fieldmesh.client import Client, Mesh
    from fieldmesh.client import Node as MeshNode
    from fieldmesh.v1 import admin_pb2 as pb

WATCH_INTERVAL_S: Final = 1.0
COLUMN_GAP: Final = 3
NAME_CHARS_MIN: Final = 11
_NAMES: Final = ("model", "domains", "profile")
_LEFT_OUT: Final = ("rtt", "KV", "tok/s", "queue", "domains", "busy")


def status(
    node: Node = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second.")] = False,
    as_json: Json = False,
) -> None:
    """Show the nodes of the mesh, what they offer, how busy they are, and who leads the configuration."""
    with connect(node) as client:
        if watch and as_json:
            while True:
                document = mesh_json(client.nodes(), agreed(client))
                sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
                sys.stdout.flush()
                time.sleep(WATCH_INTERVAL_S)
        elif watch:
            _watch(client)
        elif as_json:
            terminal.write_json(mesh_json(client.nodes(), agreed(client)))
        else:
            console = terminal.console()
            console.print(mesh_table(client.nodes(), console.width, agreed(client)))


def agreed(client: Client) -> pb.GetRaftStatusResponse | None:
    """What the asked node knows of the configuration's log; None where it does not say."""
    from fieldmesh.client.admin import Admin

    try:
        return Admin(client).status()
    except FieldmeshError:
        return None


def _watch(client: Client) -> None:
    from rich.live import Live

    console = terminal.console()

    def table() -> Group:
        return mesh_table(client.nodes(), console.width, agreed(client))

    with Live(table(), console=console, screen=sys.stdout.isatty()) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            try:
                live.update(table())
            except FieldmeshError as error:
                from rich.text import Text

                live.update(Text(terminal.printable(error.message)))


def mesh_json(mesh: Mesh, log: pb.GetRaftStatusResponse | None = None) -> dict[str, Any]:
    """The mesh as `--json` prints it."""
    from fieldmesh.rpc.admin import status_json

    return {
        "mesh": mesh.name,
        "local_id": mesh.local_id,
        "nodes": [_node_json(node) for node in mesh.nodes],
        "configuration": status_json(log) if log is not None else None,
    }


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


def mesh_table(mesh: Mesh, width: int, log: pb.GetRaftStatusResponse | None = None) -> Group:
    """The mesh as people read it, in ``width`` columns where that is possible; the node that was asked is
    marked."""
    from rich.console import Group
    from rich.text import Text

    rows = [_row(node, asked=node.id == mesh.local_id) for node in mesh.nodes]
    fitted = _fitted(rows, width) if rows else []
    shown = terminal.table(*(fitted[0] if fitted else ()))
    for row in fitted:
        terminal.add_row(shown, *row.values())
    alive = sum(node.state.value == "alive" for node in mesh.nodes)
    head = f"mesh {mesh.name}: {alive} of {len(mesh.nodes)} nodes alive (* was asked)"
    if log is not None:
        head += f"\nconfiguration: {summary(log)}"
    return Group(Text(terminal.printable(head)), shown)


def _row(node: MeshNode, *, asked: bool) -> dict[str, str]:
    load = node.load
    return {
        "node": f"{node.name}{' *' if asked else ''}",
        "state": node.state.value,
        "profile": ", ".join(offer.profile for offer in node.offers) or "–",
        "domains": ", ".join(_union(node, "domains")) or "–",
        "model": ", ".join(dict.fromkeys(offer.model for offer in node.offers)) or "–",
        "engine": "draining" if load.draining else load.engine.value,
        "busy": f"{load.running}/{load.slots}",
        "queue": f"{load.queued}/{load.queue_max}",
        "KV": f"{load.kv_pressure:.0%}",
        "tok/s": f"{load.decode_tokens_per_s:.0f}" if load.decode_tokens_per_s else "–",
        "rtt": f"{node.rtt_s * 1000:.1f} ms" if node.rtt_s else "–",
        "address": str(node.addresses[0]) if node.addresses else "–",
    }


def _fitted(rows: list[dict[str, str]], width: int) -> list[dict[str, str]]:
    """The rows in ``width`` columns: some are left out where they must, and long names lose their middle."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}

    def excess() -> int:
        return sum(widths.values()) + COLUMN_GAP * len(widths) - 1 - width

    def spare() -> int:
        return sum(max(0, widths[name] - NAME_CHARS_MIN) for name in _NAMES if name in widths)

    for name in _LEFT_OUT:
        if excess() > spare():
            del widths[name]
    for name in _NAMES:
        if name in widths:
            widths[name] -= max(0, min(excess(), widths[name] - NAME_CHARS_MIN))
    return [{name: terminal.shortened(row[name], size) for name, size in widths.items()} for row in rows]


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
