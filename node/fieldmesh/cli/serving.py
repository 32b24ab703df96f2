"""`serve`. Owns: turning flags into a configuration and running one node with it."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fieldmesh.core.errors import ConfigError

_NODE_PACKAGES: Final = (
    *("cryptography", "grpc_health", "grpc_reflection", "llama_cpp"),
    *("prometheus_client", "pycrdt", "starlette", "structlog", "uvicorn"),
)

FILES_WANTED: Final = 65_536

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file (TOML).")]


def serve(
    profile: Annotated[
        str | None, typer.Option(help="A name or a file; several: a,b. [default: general]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of this node. [default: the host's]")] = None,
    mesh: Annotated[str | None, typer.Option(help="Mesh to belong to. [default: fieldmesh]")] = None,
    model: Annotated[str | None, typer.Option(help="GGUF file in place of the profile's.")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Listener for clients. [default: 127.0.0.1:7420]")
    ] = None,
    peer_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Listener for nodes. [default: 127.0.0.1:7421]")
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Listener for Prometheus, or off. [default: 127.0.0.1:7419]"),
    ] = None,
    http_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Listener for HTTP, or off. [default: 127.0.0.1:7480]"),
    ] = None,
    http_origins: Annotated[
        str | None,
        typer.Option(metavar="ORIGINS", help="Web pages that may ask over HTTP. [default: none]"),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST", help="Host that others should use. [default: found out]")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Allow listeners beyond loopback: anyone can then ask and join."),
    ] = None,
    seed: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Peer listener to join; may be repeated.")
    ] = None,
    mdns: Annotated[bool | None, typer.Option("--mdns/--no-mdns", help="Multicast. [default: on]")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: all cores allowed]")] = None,
    slots: Annotated[int | None, typer.Option(help="Generations at once. [default: the profile's]")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Context. [default: the profile's]")] = None,
    queue_max: Annotated[int | None, typer.Option(help="Requests that may wait. [default: 32]")] = None,
    policy: Annotated[str | None, typer.Option(help="[default: expected-time]")] = None,
    found: Annotated[
        bool | None, typer.Option("--found", help="Found the mesh's configuration here: on one node only.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Collector that gets traces by OTLP. [default: none]")
    ] = None,
    state_folder: Annotated[
        str | None, typer.Option(help="Folder of the node's identity. [default: one for each mesh and name]")
    ] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds that answers may go on after SIGTERM. [default: 20]")
    ] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="auto, json or console.")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning, error.")] = None,
    config: ConfigFile = None,
    end_with_stdin: Annotated[bool, typer.Option("--end-with-stdin", hidden=True)] = False,
) -> None:
    """Run one node in the foreground. SIGTERM lets answers finish; a second one ends it at once.

    Every option can also be set in the environment or a file; `fieldmesh config check` lists them.
    """
    from fieldmesh.config import load

    flags: dict[str, Any] = {
        "node.profile": profile,
        "node.name": name,
        "node.mesh": mesh,
        "node.model": model,
        "node.state_folder": state_folder,
        "node.drain_timeout_s": drain_timeout_s,
        "listen.client": listen,
        "listen.peer": peer_listen,
        "listen.metrics": metrics_listen,
        "listen.http": http_listen,
        "listen.http_origins": http_origins,
        "listen.advertise": advertise,
        "listen.insecure": insecure,
        "discovery.seeds": seed or None,
        "discovery.mdns": mdns,
        "engine.threads": threads,
        "engine.slots": slots,
        "engine.context_tokens": context_tokens,
        "engine.queue_max": queue_max,
        "routing.policy": policy,
        "consensus.found": found,
        "trace.otlp_endpoint": otlp_endpoint,
        "log.format": log_format,
        "log.level": log_level,
    }
    loaded = load(flags, file=config)
    need_node_packages()
    if end_with_stdin:
        _end_with_stdin()
    raise_files_max()
    import asyncio

    from fieldmesh.runtime.node import serve as run

    asyncio.run(run(loaded.config))


def need_node_packages() -> None:
    """Raise ConfigError where this is the base install, which has the client only."""
    missing = [package for package in _NODE_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"This install can ask a mesh but not serve one ({', '.join(missing)} missing): "
            "pip install 'fieldmesh[node]'."
        )


def raise_files_max() -> None:
    """Let this process have the open files that it may: every connection is one, and shells give 1,024."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if most == resource.RLIM_INFINITY else min(FILES_WANTED, most)
    if files != resource.RLIM_INFINITY and files < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _end_with_stdin() -> None:
    """Leave in good order when whoever started this process is gone: its end of the pipe closes with it."""

    def watch() -> None:
        descriptor = sys.stdin.fileno()
        while os.read(descriptor, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-stdin", daemon=True).start()
