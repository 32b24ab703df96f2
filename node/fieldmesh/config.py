"""What an operator can set. Owns: every option of a node, its default, its bounds, where its value came from.

Precedence: flag > environment > one file > default. The file is the one given, else ``FIELDMESH_CONFIG``,
else the first that exists of ``./fieldmesh.toml``, the user's configuration folder and ``/etc/fieldmesh``;
files are not merged, so what a node runs with can be read in one place. In the file an option is
``section.key``; in the environment it is ``FIELDMESH_SECTION_KEY``, and options of ``[node]`` have no section
in their name (``FIELDMESH_NAME``, ``FIELDMESH_MODEL``). A variable that is empty is not set.

Everything unknown, malformed or out of bounds is refused with a ``ConfigError`` that names the option, its
source and what would be accepted. Must not: know any machine's inner constants (those sit beside the
machines), import anything but core, or touch the network.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import platformdirs

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.model import Address
from fieldmesh.values import (
    VALUE_CHARS_SHOWN_MAX,
    Between,
    Many,
    Name,
    OrOff,
    Port,
    Refused,
    Text,
    Url,
    is_loopback,
    read,
    shown,
)

CLIENT_PORT: Final = 7420
PEER_PORT: Final = 7421
CLIENT_ADDRESS: Final = Address(host="127.0.0.1", port=CLIENT_PORT)
PEER_ADDRESS: Final = Address(host="127.0.0.1", port=PEER_PORT)
METRICS_PORT: Final = 7419
METRICS_ADDRESS: Final = Address(host="127.0.0.1", port=METRICS_PORT)
HTTP_PORT: Final = 7480
HTTP_ADDRESS: Final = Address(host="127.0.0.1", port=HTTP_PORT)
FILE_BYTES_MAX: Final = 1_000_000
PROFILES_MAX: Final = 16
BATCH_TOKENS_MIN: Final = 32
FILE_NAME: Final = "fieldmesh.toml"

# What OpenTelemetry calls an option of ours; our own variable comes before it.
STANDARD_VARIABLES: Final = {"OTEL_EXPORTER_OTLP_ENDPOINT": "trace.otlp_endpoint"}
# Variables of the client, the build and the tests: not options of a node.
FOREIGN_VARIABLES: Final = frozenset(
    {"FIELDMESH_CONFIG", "FIELDMESH_NODE", "FIELDMESH_DEBUG", "FIELDMESH_BENCH_DATA"}
)
# Kubernetes sets these in every pod of a namespace that has a Service called fieldmesh or fieldmesh-….
_SERVICE_LINK = re.compile(
    r"FIELDMESH(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|FIELDMESH(_\w+)?_PORT=(tcp|udp|sctp)://.*"
)


# --- the options -------------------------------------------------------------------------


def host_name() -> str:
    """This host's name, reduced to what a node's name may contain."""
    short = socket.gethostname().split(".")[0]
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", short)[:63].strip("._-")
    return cleaned or "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSlice:
    """Who this node is."""

    name: Annotated[str, Name(), "Name of this node; default: the host's name"] = field(
        default_factory=host_name
    )
    mesh: Annotated[str, Name(), "Nodes of one mesh name find each other; others are ignored"] = "fieldmesh"
    profile: Annotated[
        str,
        Text(4096, "names of profiles or paths of profile files, separated by commas"),
        "Profiles that this node serves, separated by commas; the first is loaded at once",
    ] = "general"
    model: Annotated[
        str,
        Text(4096, "the path of a GGUF file, or nothing for the profile's own model"),
        "GGUF file to load in place of the profile's model",
    ] = ""
    state_folder: Annotated[
        str,
        Text(4096, "a path, or nothing for the user's state folder"),
        "Folder of identity and incarnation; one node at a time may hold it",
    ] = ""
    drain_timeout_s: Annotated[
        float, Between(0, 3600, "seconds"), "How long running generations may go on after SIGTERM"
    ] = 20.0

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles one by one."""
        return tuple(dict.fromkeys(part.strip() for part in self.profile.split(",") if part.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSlice:
    """Where this node can be reached."""

    client: Annotated[Address, Port(CLIENT_PORT, least=0), "Listener for clients"] = CLIENT_ADDRESS
    peer: Annotated[Address, Port(PEER_PORT, least=0), "Listener for other nodes"] = PEER_ADDRESS
    metrics: Annotated[
        Address | None, Port(METRICS_PORT, least=0), OrOff(), "Listener for Prometheus (/metrics), or off"
    ] = METRICS_ADDRESS
    http: Annotated[
        Address | None, Port(HTTP_PORT, least=0), OrOff(), "Listener for HTTP (OpenAI's API), or off"
    ] = HTTP_ADDRESS
    http_origins: Annotated[
        str,
        Text(4096, "origins as https://host:port with commas between, or *, or nothing"),
        "Web pages of other origins that may ask over HTTP, with commas between; *: all",
    ] = ""
    advertise: Annotated[
        str,
        Text(253, "a host name or IP address without port, or nothing to find it out"),
        "Host that others should use; default: the address that routes to each of them",
    ] = ""
    insecure: Annotated[
        bool, "Allow listeners beyond loopback without certificates: anyone who reaches them can ask and join"
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySlice:
    """How this node finds others."""

    mdns: Annotated[bool, "Announce this node and look for others by multicast DNS"] = True
    seeds: Annotated[
        tuple[Address, ...],
        Many(64),
        Port(PEER_PORT),
        "Peer listeners to join through, where multicast is dropped",
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSlice:
    """How this node runs its model. A zero leaves the choice to the profile or the box."""

    threads: Annotated[
        int,
        Between(0, 1024),
        "Threads that compute; 0: as many of the cores that this process may use as are fastest (measured)",
    ] = 0
    slots: Annotated[int, Between(0, 256), "Generations that run at once; 0: the profile's"] = 0
    context_tokens: Annotated[
        int,
        Between(0, 1_048_576, "tokens"),
        "Tokens that prompt and answer may have together; 0: the profile's",
    ] = 0
    batch_tokens: Annotated[
        int,
        Between(0, 8192, "tokens"),
        "Tokens of prompts that one step may compute while nobody is answered; 0: measured, at most 256",
    ] = 0
    prefill_chunk_tokens: Annotated[
        int,
        Between(0, 8192, "tokens"),
        "Tokens that one step may compute while others are answered; 0: measured",
    ] = 0
    queue_max: Annotated[int, Between(0, 10_000), "Requests that may wait for a slot"] = 32
    slow_reader_timeout_s: Annotated[
        float, Between(0.1, 3600, "seconds"), "How long a stream whose reader has stopped is kept"
    ] = 30.0
    slow_reader_tokens_max: Annotated[
        int, Between(1, 100_000, "tokens"), "Tokens kept for a slow reader before its generation pauses"
    ] = 256
    memory_mib_max: Annotated[
        int,
        Between(0, 16_777_216, "MiB"),
        "Memory that models may take; 0: what is free when the node starts",
    ] = 0
    states_mib_max: Annotated[
        int,
        Between(0, 1_048_576, "MiB"),
        "Disk for computed conversations that may come back, in the state folder; 0: none are kept",
    ] = 256
    restarts_max: Annotated[
        int, Between(0, 1000), "Restarts of a lost engine in ten minutes before it is given up"
    ] = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSlice:
    """What this node takes at most."""

    message_bytes_max: Annotated[int, Between(65_536, 67_108_864, "bytes"), "Size of one message"] = 4_194_304
    prompt_bytes_max: Annotated[int, Between(1, 67_108_864, "bytes"), "Size of a prompt's text"] = 1_048_576
    prompt_tokens_max: Annotated[int, Between(1, 1_048_576, "tokens"), "Length of a prompt"] = 131_072
    messages_max: Annotated[int, Between(1, 100_000), "Messages of one chat request"] = 1024
    streams_max: Annotated[int, Between(1, 100_000), "Client streams open at once"] = 256
    peers_max: Annotated[int, Between(1, 10_000), "Nodes of the mesh that this node keeps track of"] = 1024
    hops_max: Annotated[int, Between(0, 8), "How often a request may be forwarded"] = 2
    attempts_max: Annotated[int, Between(1, 16), "Nodes that may be tried for one request"] = 16
    request_log_entries_max: Annotated[
        int, Between(16, 1_000_000), "Finished requests whose repeats are still answered"
    ] = 1024
    request_log_s: Annotated[float, Between(1, 86_400, "seconds"), "How long repeats are still answered"] = (
        300.0
    )
    request_timeout_s: Annotated[
        float, Between(1, 86_400, "seconds"), "Deadline of a request that brings none"
    ] = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSlice:
    """How this node chooses who answers."""

    policy: Annotated[
        Literal["expected-time", "round-robin", "least-loaded", "random"], "How candidates are ranked"
    ] = "expected-time"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusSlice:
    """This node's part in the replicated configuration."""

    found: Annotated[
        bool,
        "Found the configuration of the mesh here, unless this node or one that it can see has it already; "
        "say so on one node of a mesh",
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSlice:
    """Where traces of requests go, beside this node's own memory."""

    otlp_endpoint: Annotated[
        str,
        Url(),
        "Collector that gets traces by OTLP over HTTP (https://host:4318), or nothing; needs fieldmesh[otel]",
    ] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSlice:
    """What this node writes to stderr."""

    format: Annotated[
        Literal["auto", "json", "console"], "auto: coloured lines on a terminal, JSON elsewhere"
    ] = "auto"
    level: Annotated[Literal["debug", "info", "warning", "error"], "Least severe lines to write"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Everything that one node is told. ``load`` makes it from flags, environment and file.

    Made by hand (tests), call ``validate`` for the rules that span several options.
    """

    node: NodeSlice = field(default_factory=NodeSlice)
    listen: ListenSlice = field(default_factory=ListenSlice)
    discovery: DiscoverySlice = field(default_factory=DiscoverySlice)
    engine: EngineSlice = field(default_factory=EngineSlice)
    limits: LimitsSlice = field(default_factory=LimitsSlice)
    routing: RoutingSlice = field(default_factory=RoutingSlice)
    consensus: ConsensusSlice = field(default_factory=ConsensusSlice)
    trace: TraceSlice = field(default_factory=TraceSlice)
    log: LogSlice = field(default_factory=LogSlice)

    @property
    def state_folder(self) -> Path:
        """Where identity and incarnation live: as set, else ``<user state folder>/<mesh>/<name>``."""
        if self.node.state_folder:
            return _expanded(Path(self.node.state_folder), "node.state_folder")
        return platformdirs.user_state_path("fieldmesh") / self.node.mesh / self.node.name

    def validate(self) -> None:
        """Raise ConfigError where options contradict each other."""
        _ = self.state_folder  # a home folder that does not exist is refused here
        if not 1 <= len(self.node.profiles) <= PROFILES_MAX:
            raise ConfigError(
                f"node.profile names {len(self.node.profiles)} profiles: it must name 1 to {PROFILES_MAX}.",
                field="node.profile",
            )
        listen = self.listen
        for key, address in (
            ("listen.client", listen.client),
            ("listen.peer", listen.peer),
            ("listen.metrics", listen.metrics),
            ("listen.http", listen.http),
        ):
            if address is not None and not listen.insecure and not is_loopback(address.host):
                raise ConfigError(
                    f"{key} is {address}, which others can reach, and this node has no certificates: bind to "
                    "127.0.0.1, or say --insecure (listen.insecure = true) where you trust the network.",
                    field=key,
                )
        if listen.client == listen.peer and listen.client.port != 0:
            raise ConfigError(
                f"listen.peer is {listen.peer}, the same as listen.client: two ports are needed.",
                field="listen.peer",
            )
        taken = [listen.client, listen.peer]
        for key, address in (("listen.metrics", listen.metrics), ("listen.http", listen.http)):
            if address in taken and address.port != 0:
                raise ConfigError(
                    f"{key} is {address}, as another listener: it needs a port of its own.", field=key
                )
            if address is not None:
                taken.append(address)
        if 0 < self.engine.batch_tokens < BATCH_TOKENS_MIN:
            raise ConfigError(
                f"engine.batch_tokens is {self.engine.batch_tokens}: it must be 0 or at least "
                f"{BATCH_TOKENS_MIN}.",
                field="engine.batch_tokens",
            )
        if self.engine.prefill_chunk_tokens > self.engine.batch_tokens > 0:
            raise ConfigError(
                f"engine.prefill_chunk_tokens is {self.engine.prefill_chunk_tokens}: it may be at most "
                f"engine.batch_tokens, which is {self.engine.batch_tokens}.",
                field="engine.prefill_chunk_tokens",
            )
        if self.limits.prompt_bytes_max > self.limits.message_bytes_max:
            raise ConfigError(
                f"limits.prompt_bytes_max is {self.limits.prompt_bytes_max}: it may be at most "
                f"limits.message_bytes_max, which is {self.limits.message_bytes_max}.",
                field="limits.prompt_bytes_max",
            )


# --- the table of options ----------------------------------------------------------------

_FLAGS: Final = {
    "listen.client": "--listen",
    "listen.peer": "--peer-listen",
    "listen.metrics": "--metrics-listen",
    "listen.http": "--http-listen",
    "discovery.seeds": "--seed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: its key (``section.key``), its variable, its type with its rules, and what it is for."""

    key: str
    variable: str
    kind: Any
    rules: tuple[object, ...]
    doc: str

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        return self.key.partition(".")[2]

    @property
    def flag(self) -> str:
        """How `fieldmesh serve` calls it, if it has a flag."""
        return _FLAGS.get(self.key, f"--{self.name.replace('_', '-')}")


@cache
def options() -> dict[str, Option]:
    """Every option by its key, in the order in which they are documented."""
    table: dict[str, Option] = {}
    for section in fields(NodeConfig):
        slice_type = get_type_hints(NodeConfig)[section.name]
        for name, hint in get_type_hints(slice_type, include_extras=True).items():
            kind, *extras = get_args(hint)
            prefix = "" if section.name == "node" else f"{section.name.upper()}_"
            key = f"{section.name}.{name}"
            table[key] = Option(
                key=key,
                variable=f"FIELDMESH_{prefix}{name.upper()}",
                kind=kind,
                rules=tuple(extras[:-1]),
                doc=extras[-1],
            )
    return table


# --- loading -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration with the source of every value (by ``section.key``) and the file that was read."""

    config: NodeConfig
    sources: Mapping[str, str]
    file: Path | None

    def values(self) -> dict[str, Any]:
        """Effective values by ``section.key``, as TOML and JSON would write them."""
        return {key: _plain(_get(self.config, key)) for key in options()}


def load(
    flags: Mapping[str, object] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Loaded:
    """The configuration of a node, from ``flags`` (by ``section.key``; None values are not set), the
    environment, and ``file`` or the first file found from ``folder`` (default: the working directory).

    Raises ConfigError, naming the option and its source.
    """
    environ = os.environ if environ is None else environ
    path = find_file(file, environ, Path.cwd() if folder is None else folder)
    given: dict[str, tuple[object, str]] = {}
    if path is not None:
        given.update(_from_file(path))
    given.update(_from_environment(environ))
    for key, value in (flags or {}).items():
        if value is not None:
            if key not in options():
                raise _unknown(key, list(options()), "flag")
            given[key] = (value, f"flag {options()[key].flag}")
    parsed = {key: _parse(options()[key], value, source) for key, (value, source) in given.items()}
    slices: dict[str, Any] = {}
    for section in fields(NodeConfig):
        chosen = {
            o.name: parsed[o.key] for o in options().values() if o.section == section.name and o.key in parsed
        }
        slices[section.name] = get_type_hints(NodeConfig)[section.name](**chosen)
    config = NodeConfig(**slices)
    config.validate()
    sources = {key: given[key][1] if key in given else "default" for key in options()}
    return Loaded(config=config, sources=sources, file=path)


def find_file(file: Path | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    """The one configuration file to read; None where there is none. A file that is named must exist."""
    named = file or (Path(environ["FIELDMESH_CONFIG"]) if environ.get("FIELDMESH_CONFIG") else None)
    if named is not None:
        return _expanded(named, "config")
    for parent in (folder, platformdirs.user_config_path("fieldmesh"), Path("/etc/fieldmesh")):
        candidate = parent / FILE_NAME
        try:
            if candidate.is_file():
                return candidate
        except OSError:  # a folder that may not be searched holds no file for us
            continue
    return None


def _from_file(path: Path) -> dict[str, tuple[object, str]]:
    try:
        with path.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"The configuration file {path} cannot be read: {reason}.", field="config"
        ) from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{path} is larger than {FILE_BYTES_MAX} bytes: that is no configuration.", field="config"
        )
    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path} is not valid TOML: {reason}.", field="config") from error
    found: dict[str, tuple[object, str]] = {}
    sections = [section.name for section in fields(NodeConfig)]
    for section, table in tables.items():
        if section not in sections:
            raise _unknown(section, sections, f"file {path}")
        if not isinstance(table, dict):
            raise ConfigError(f"[{section}] in {path} must be a table of options.", field=section)
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in options():
                raise _unknown(
                    key,
                    [k for k in options() if k.startswith(f"{section}.")] + list(options()),
                    f"file {path}",
                )
            found[key] = (value, f"file {path}")
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    by_variable = {option.variable: option.key for option in options().values()}
    found: dict[str, tuple[object, str]] = {
        key: (environ[variable], f"environment {variable}")
        for variable, key in STANDARD_VARIABLES.items()
        if environ.get(variable)
    }
    for variable in sorted(environ):
        value = environ[variable]
        if not variable.startswith("FIELDMESH_") or variable in FOREIGN_VARIABLES or not value:
            continue
        if _SERVICE_LINK.fullmatch(f"{variable}={value}"):
            continue
        if variable not in by_variable:
            raise _unknown(variable, list(by_variable), "environment")
        found[by_variable[variable]] = (value, f"environment {variable}")
    return found


def _unknown(name: str, valid: list[str], source: str) -> ConfigError:
    name = name[:VALUE_CHARS_SHOWN_MAX]
    tail = name.partition(".")[2]
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6) or [
        key for key in valid if tail and key.partition(".")[2] == tail
    ]
    hint = f"did you mean {near[0]}?" if near else "`fieldmesh config check` lists the valid ones."
    return ConfigError(f"There is no option {shown(name)} ({source}): {hint}", field=name)


def _parse(option: Option, value: object, source: str) -> object:
    try:
        return read(option.kind, option.rules, value)
    except Refused as refused:
        raise ConfigError(
            f"{option.key} is {shown(value)} ({source}): it must be {refused.accepted}.", field=option.key
        ) from None


def _expanded(path: Path, key: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} is {shown(str(path))}: that home folder is not known.", field=key
        ) from error


def _get(config: NodeConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _plain(value: object) -> object:
    if value is None:
        return "off"
    if isinstance(value, Address):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value
