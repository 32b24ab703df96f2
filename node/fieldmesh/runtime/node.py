"""The composition root: one node, put together, run until it is told to stop.

Owns: the order in which parts start and end, the two listeners, and carrying news between parts that do not
know each other (the engine's load to the mesh, the mesh's view to requests and health). Must not: decide.

    state folder ─ identity ─ mesh core ─ driver ─ peer listener ┐
          council (the log) ─ its calls ─────────────────────────┤
    profile ─ engine process ─ local runs ─┐                     ├─ discovery
                        router ─ service ──┴─ client listener ───┘
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from random import Random, SystemRandom

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fieldmesh import __version__, profiles
from fieldmesh.client.discovery import Announcement
from fieldmesh.config import LimitsSlice, NodeConfig
from fieldmesh.core.dispatch import SETTLE_S, DispatchConfig, Entry
from fieldmesh.core.effective import Rules
from fieldmesh.core.errors import AddressInUse, ConfigError
from fieldmesh.core.joining import HintSource
from fieldmesh.core.loading import Size
from fieldmesh.core.mesh import SNAPSHOT_KEY, Identity, JoinHint, Mesh, MeshConfig, OfferChanged
from fieldmesh.core.model import (
    PROTOCOL_VERSION_MAX,
    PROTOCOL_VERSION_MIN,
    Address,
    MeshView,
    NodeState,
    ProfileOffer,
)
from fieldmesh.core.peers import MembershipConfig
from fieldmesh.core.routing import Policy
from fieldmesh.core.tracing import Ended
from fieldmesh.core.tuning import MIXED_PREFILL_TOKENS_MIN
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.cores import cpu_budget
from fieldmesh.engine.fit import PROCESS_BYTES, demand_fit
from fieldmesh.engine.gguf import read_header
from fieldmesh.engine.host import sharing
from fieldmesh.engine.memory import memory_free_bytes
from fieldmesh.engine.settings import MIXED_TOKENS, PREFILL_TOKENS, EngineSettings
from fieldmesh.profiles import Profile
from fieldmesh.rpc import wire
from fieldmesh.rpc.admin import status_json
from fieldmesh.rpc.inference import RequestLimits
from fieldmesh.runtime import addresses, http_server, inference, log, scrapes
from fieldmesh.runtime.admin import ADMIN
from fieldmesh.runtime.agreement import Agreement
from fieldmesh.runtime.council import Council
from fieldmesh.runtime.discovery import Multicast, Seeds, repeat_hints
from fieldmesh.runtime.door import handlers, no_calls
from fieldmesh.runtime.driver import Driver
from fieldmesh.runtime.forwarding import Forwarder
from fieldmesh.runtime.generation import GenerationConfig
from fieldmesh.runtime.health import Health
from fieldmesh.runtime.http_server import ASGIApplication
from fieldmesh.runtime.identity import EnvelopeSealer
from fieldmesh.runtime.identity import Identity as Key
from fieldmesh.runtime.keeper import MODELS, Keeper
from fieldmesh.runtime.links import LinksConfig, server_options
from fieldmesh.runtime.local import LocalRuns
from fieldmesh.runtime.metrics import Metrics, Sources
from fieldmesh.runtime.models import Hosted, MakeEngine, Models
from fieldmesh.runtime.moving import Moving
from fieldmesh.runtime.peers import Peers
from fieldmesh.runtime.router import Router
from fieldmesh.runtime.service import Service, ServiceConfig
from fieldmesh.runtime.state import StateFolder
from fieldmesh.runtime.traces import TRACES, Traces
from fieldmesh.runtime.tracing import Tracer

CLIENT_CONNECTIONS_MAX = 4096
SERVER_STOP_GRACE_S = 1.0
ADDRESS_POLL_S = 1.0
DRAIN_POLL_S = 0.05
SEQUENCES_FOLDER = "sequences"
MEASURED_FOLDER = "measured"

logger = log.get()


async def serve(config: NodeConfig) -> None:
    """Run one node until SIGTERM or SIGINT; a second one ends it without draining.

    Raises FieldmeshError where it cannot start: ConfigError, ProfileInvalid, ModelFileInvalid,
    StateFolderInUse, StateFolderInvalid, AddressInUse.
    """
    sink = log.set_up(config.log.format, config.log.level)
    try:
        stop, now = asyncio.Event(), asyncio.Event()

        def told() -> None:
            (now if stop.is_set() else stop).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told)
        async with running(config) as node:
            await stop.wait()
            await node.drain(config.node.drain_timeout_s, now)
    finally:
        sink.close()


@asynccontextmanager
async def running(config: NodeConfig, make_engine: MakeEngine | None = None) -> AsyncIterator[Node]:
    """A node that serves; leaving the context ends it. Raises as ``serve`` does."""
    config.validate()
    async with AsyncExitStack() as stack:
        node = Node(config, make_engine or sharing())
        await node.open(stack)
        yield node


class Node:
    """One running node."""

    def __init__(self, config: NodeConfig, make_engine: MakeEngine) -> None:
        self.config = config
        self._make_engine = make_engine
        self.profiles = tuple(profiles.load(name) for name in config.node.profiles)
        self.client_address = config.listen.client
        self.peer_address = config.listen.peer
        self.metrics_address: Address | None = None
        self.http_address: Address | None = None
        self._calls = no_calls()
        self._rng = Random(SystemRandom().getrandbits(64))
        self._draining = False
        self._offered: tuple[ProfileOffer, ...] = ()
        self._able_changed = asyncio.Event()

    async def open(self, stack: AsyncExitStack) -> None:
        """Start every part; ``stack`` ends them in the opposite order."""
        config = self.config
        hosted = [hosted_profile(config, profile) for profile in self.profiles]
        folder = stack.enter_context(StateFolder.open(config.state_folder))
        self.key = Key.load(folder)
        links_config = LinksConfig(
            message_bytes_max=config.limits.message_bytes_max, peers_max=config.limits.peers_max
        )
        self._driver = Driver(
            self._mesh(folder), local=self.key.id, storage=folder, links_config=links_config
        )
        self._agreement = Agreement(
            me=self.key.id,
            name=config.node.name,
            folder=folder,
            driver=self._driver,
            own=own_rules(config),
            rng=self._rng,
        )
        self.models = Models(
            hosted,
            budget_bytes=memory_budget_bytes(config),
            make_engine=self._make_engine,
            folder=folder,
            on_change=self._models_changed,
        )
        links = self._driver.links
        self._moving = Moving(self.models, lambda: self._driver.view, links.bulk, links.bytes)
        self._service = self._make_service(await self._exporting(stack))
        self._health = Health(lambda: {name: self.models.able(name) for name in self.models.hosted})
        client_server = self._client_server()
        peer_server = self._peer_server(links_config)
        self.client_address = _bind(client_server, config.listen.client, "listen.client")
        self.peer_address = _bind(peer_server, config.listen.peer, "listen.peer")
        self._announce_addresses()
        self._models_changed()
        await peer_server.start()
        stack.push_async_callback(peer_server.stop, SERVER_STOP_GRACE_S)
        stack.push_async_callback(self._driver.close)
        self._driver.start()
        await self._agreement.open(stack, found=config.consensus.found, obey=self._service.obey)
        await client_server.start()
        stack.push_async_callback(client_server.stop, SERVER_STOP_GRACE_S)
        stack.push_async_callback(self._service.close)
        stack.push_async_callback(self.models.close)
        self._driver.observe(self._service.view_changed)
        self.metrics_address = await stack.enter_async_context(
            scrapes.listening(config.listen.metrics, self._metrics().page)
        )
        self.http_address = await stack.enter_async_context(
            http_server.listening(config.listen.http, self._http)
        )
        self._announce_addresses()
        await stack.enter_async_context(self._background())
        logger.info(
            "node_started",
            name=config.node.name,
            id=self.key.id,
            mesh=config.node.mesh,
            profile=",".join(profile.name for profile in self.profiles),
            client=str(self.client_address),
            peer=str(self.peer_address),
            metrics=str(self.metrics_address or "off"),
            http=str(self.http_address or "off"),
            page=f"http://{self.http_address}/" if self.http_address else "off",
        )

    @property
    def council(self) -> Council:
        """What the mesh agrees on, as this node reaches it."""
        return self._agreement.council

    @property
    def view(self) -> MeshView:
        """The mesh as this node sees it."""
        return self._driver.view

    async def drain(self, timeout_s: float, now: asyncio.Event) -> None:
        """Take no new requests, and wait for those that run, at most ``timeout_s`` or until ``now``."""
        logger.info("node_draining", running=self.models.node_load().running, timeout_s=timeout_s)
        self._draining = True
        self._service.drain()
        self._models_changed()
        await self._health.update(self.view, draining=True)
        await self._agreement.leave()
        over = asyncio.get_running_loop().time() + timeout_s
        while self._busy and not now.is_set() and asyncio.get_running_loop().time() < over:
            with suppress(TimeoutError):
                await asyncio.wait_for(now.wait(), DRAIN_POLL_S)

    @property
    def _busy(self) -> bool:
        return bool(self._service.running or self.models.node_load().running)

    # --- parts -----------------------------------------------------------------------------

    def _mesh(self, folder: StateFolder) -> Mesh:
        config = self.config
        return Mesh(
            config=MeshConfig(membership=MembershipConfig(peers_max=config.limits.peers_max)),
            identity=Identity(
                id=self.key.id,
                name=config.node.name,
                mesh=config.node.mesh,
                addresses=(),
                incarnation=folder.raise_incarnation(),
                version=__version__,
            ),
            sealer=EnvelopeSealer(self.key, "row"),
            codec=wire,
            rng=self._rng,
            snapshot=folder.read(SNAPSHOT_KEY),
        )

    async def _exporting(self, stack: AsyncExitStack) -> Ended | None:
        """What is told of spans, where the operator wants them sent somewhere. Raises ConfigError."""
        config = self.config
        if not config.trace.otlp_endpoint:
            return None
        try:
            from fieldmesh.runtime import otlp
        except ImportError as error:
            raise ConfigError(
                f"trace.otlp_endpoint is {config.trace.otlp_endpoint}, but what sends traces is not "
                f"installed ({error}): pip install 'fieldmesh[node,otel]', or make otel in a checkout.",
                field="trace.otlp_endpoint",
            ) from error
        about = {
            "service.instance.id": self.key.id,
            "fieldmesh.node": config.node.name,
            "fieldmesh.mesh": config.node.mesh,
        }
        return await stack.enter_async_context(otlp.exporting(config.trace.otlp_endpoint, about))

    def _make_service(self, span_ended: Ended | None) -> Service:
        config = self.config
        router = Router(self.view, rules=self._agreement.rules, rng=self._rng)
        return Service(
            entry=Entry(
                node=self.key.id,
                name=config.node.name,
                settled_at=asyncio.get_running_loop().time() + SETTLE_S,
            ),
            view=lambda: self._driver.view,
            router=router,
            local=LocalRuns(self.models, self._moving),
            forwarder=Forwarder(self._driver.links.tokens, self._driver.links.bytes),
            tracer=Tracer(self._rng, span_ended),
            rules=self._agreement.rules,
            config=service_config(config),
            rng=self._rng,
        )

    def _client_server(self) -> grpc.aio.Server:
        message_bytes_max = self.config.limits.message_bytes_max
        server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a share of the calls
                ("grpc.max_allowed_incoming_connections", CLIENT_CONNECTIONS_MAX),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", message_bytes_max),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            )
        )
        mesh = inference.Mesh(self._service, self.config.node.mesh)
        server.add_generic_rpc_handlers(
            (
                handlers(inference.INFERENCE, inference.Inference(self._service, self._limits), self._calls),
                handlers(inference.MESH, mesh, self._calls),
                handlers(MODELS, Keeper(self.models), self._calls),
                handlers(TRACES, self._traces(), self._calls),
                self._agreement.for_clients(self._calls),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        names = (
            inference.INFERENCE.full_name,
            inference.MESH.full_name,
            ADMIN.full_name,
            MODELS.full_name,
            TRACES.full_name,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        )
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        return server

    def _traces(self) -> Traces:
        return Traces(
            self._service.tracer, self._service.entry, lambda: self._driver.view, self._driver.links.tokens
        )

    def _limits(self) -> RequestLimits:
        return request_limits(self.config.limits, self._agreement.rules)

    def _peer_server(self, links_config: LinksConfig) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=(self._driver.gate,), options=server_options(links_config))
        peers = Peers(self._service, self._limits, self._driver.links.bytes, self._moving)
        server.add_generic_rpc_handlers(
            (
                self._driver.receiver.handler(),
                peers.handler(self._calls),
                handlers(TRACES, self._traces(), self._calls),
                *self._agreement.for_peers(),
            )
        )
        return server

    def _metrics(self) -> Metrics:
        return Metrics(
            Sources(
                view=lambda: self._driver.view,
                models=self.models,
                service=self._service,
                calls=self._calls,
                peer_bytes=self._driver.links.bytes,
            )
        )

    def _http(self) -> ASGIApplication:
        from fieldmesh.runtime.http_door import application
        from fieldmesh.runtime.http_ollama import Ollama
        from fieldmesh.runtime.http_openai import OpenAi
        from fieldmesh.runtime.http_page import Page
        from fieldmesh.runtime.http_responses import Responses

        body_bytes_max = self.config.limits.message_bytes_max
        apis = [
            api(self._service, self._limits, calls=self._calls, body_bytes_max=body_bytes_max)
            for api in (OpenAi, Responses, Ollama)
        ]
        page = Page(
            self._service,
            lambda: status_json(self._agreement.raft_status()),
            mesh=self.config.node.mesh,
            calls=self._calls,
        )
        origins = self.config.listen.http_origins.replace(",", " ").split()
        names = (self.config.node.name, self.config.listen.advertise, socket.gethostname())
        return application([route for part in (*apis, page) for route in part.routes()], origins, names)

    # --- news between parts ------------------------------------------------------------------

    @asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        """Everything that goes on beside requests; a part that fails ends the node, loudly."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.models.run(), name="models"),
                group.create_task(self._follow_models(), name="health"),
                group.create_task(self._follow_view(), name="view"),
                group.create_task(self._agreement.run(), name="agreement"),
                group.create_task(self._discover(), name="discovery"),
            ]
            yield
            for task in tasks:
                task.cancel()

    def _models_changed(self) -> None:
        """Tell the mesh what this node offers, and how busy it is."""
        if (offers := self.models.offers()) != self._offered:
            self._offered = offers
            self._driver.handle(OfferChanged(profiles=offers))
        self._driver.load_changed(replace(self.models.node_load(), draining=self._draining))
        self._able_changed.set()

    async def _follow_models(self) -> None:
        """Tell health of profiles of which the mesh hears nothing new."""
        while True:
            await self._able_changed.wait()
            self._able_changed.clear()
            await self._health.update(self.view, draining=self._draining)

    async def _follow_view(self) -> None:
        view = self.view
        while True:
            await self._health.update(view, draining=self._draining)
            view = await self._driver.wait_view_changed(view.revision)

    # --- addresses and discovery ---------------------------------------------------------------

    def _hosts(self, bound: Address) -> tuple[str, ...]:
        """Hosts under which one of our listeners is reached, best first."""
        if self.config.listen.advertise:
            return (self.config.listen.advertise,)
        peers = [
            m.address.host for m in self.view.members if m.id != self.key.id and m.state is NodeState.ALIVE
        ]
        return addresses.hosts_to_announce(bound.host, peers)

    def _announce_addresses(self) -> None:
        listeners = (self.peer_address, self.client_address, self.http_address)
        self._driver.announce(*(self._announced(bound) if bound else () for bound in listeners))

    def _announced(self, bound: Address) -> list[Address]:
        return [Address(host=host, port=bound.port) for host in self._hosts(bound)]

    async def _discover(self) -> None:
        """Look for others, and follow our own addresses, until cancelled."""

        def hint(address: Address, source: HintSource) -> None:
            self._driver.handle(JoinHint(address=address, source=source))

        multicast = Multicast(hint) if self.config.discovery.mdns else None
        seeds = Seeds(self.config.discovery.seeds, hint)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(repeat_hints(multicast, seeds, self._alone))
                async for hosts in addresses.watch(self._peer_hosts, ADDRESS_POLL_S):
                    self._announce_addresses()
                    if multicast is not None:
                        interfaces = addresses.multicast_hosts(self.peer_address.host)
                        await multicast.update(self._announcement(hosts), interfaces)
        finally:
            if multicast is not None:
                await multicast.close()

    def _peer_hosts(self) -> tuple[str, ...]:
        return self._hosts(self.peer_address)

    def _announcement(self, hosts: Sequence[str]) -> Announcement:
        return Announcement(
            id=self.key.id,
            mesh=self.config.node.mesh,
            protocol_min=PROTOCOL_VERSION_MIN,
            protocol_max=PROTOCOL_VERSION_MAX,
            hosts=tuple(hosts),
            client_port=self.client_address.port,
            peer_port=self.peer_address.port,
        )

    def _alone(self) -> bool:
        return not any(m.state is NodeState.ALIVE for m in self.view.members if m.id != self.key.id)


def hosted_profile(config: NodeConfig, profile: Profile) -> Hosted:
    """A profile with its engine's settings. Raises ModelFileInvalid, ModelTooLarge, ConfigError."""
    path = profiles.model_path(profile, config.node.model)
    header = read_header(str(path))  # refuse a bad file now, in words, and not in a process's log
    adapters = profiles.adapters(profile, config.node.model)
    if len(adapters) < len(profile.adapters):
        logger.warning("adapters_left_out", profile=profile.name, why="they were trained on another model")
    engine = config.engine
    slots = engine.slots or profile.slots
    asked = {
        "threads": engine.threads,
        "prefill_tokens": engine.batch_tokens,
        "mixed_tokens": engine.prefill_chunk_tokens,
    }
    settings = EngineSettings(
        model_path=str(path),
        model_name=path.stem,
        context_tokens=engine.context_tokens or profile.context_tokens,
        slots=slots,
        threads=engine.threads or cpu_budget(),
        prefill_tokens=engine.batch_tokens or PREFILL_TOKENS,
        # However many are being answered, a prompt that arrives must get a share of the step.
        mixed_tokens=max(engine.prefill_chunk_tokens or MIXED_TOKENS, slots + MIXED_PREFILL_TOKENS_MIN),
        measured=tuple(name for name, value in asked.items() if not value),
        measured_file=str(config.state_folder / MEASURED_FOLDER / f"{profile.name}.json"),
        n_gpu_layers=profile.n_gpu_layers,
        main_gpu=profile.main_gpu,
        tensor_split=profile.tensor_split,
        queue_max=engine.queue_max,
        kv_type=profile.kv_type,
        adapters=adapters,
        state_bytes_max=engine.states_mib_max << 20,
        state_folder=str(config.state_folder / SEQUENCES_FOLDER / profile.name),
        chat_template=profile.chat_template,
        system_prompt=profile.system_prompt,
        stream_tokens_max=engine.slow_reader_tokens_max,
        slow_reader_timeout_s=engine.slow_reader_timeout_s,
        crashes_max=engine.restarts_max + 1,
        crash_window_s=600.0,
    )
    settings.validate()
    adapted = replace(header, weights_bytes=header.weights_bytes + check_adapters(settings, header))
    fit = demand_fit(adapted, settings, memory_budget_bytes(config))
    common_bytes = header.weights_bytes + PROCESS_BYTES
    size = Size(own_bytes=fit.total - common_bytes, base=settings.model_path, common_bytes=common_bytes)
    return Hosted(profile=profile, settings=settings, size=size)


def memory_budget_bytes(config: NodeConfig) -> int:
    """What this node's models may take together."""
    return config.engine.memory_mib_max << 20 or memory_free_bytes()


def own_rules(config: NodeConfig) -> Rules:
    """What this node's own options say where the mesh's configuration says nothing."""
    limits = config.limits
    return Rules(
        policy=Policy.parse(config.routing.policy),
        prompt_tokens_max=limits.prompt_tokens_max,
        request_bytes_max=limits.prompt_bytes_max,
        streams_max=limits.streams_max,
        hops_max=limits.hops_max,
    )


def request_limits(limits: LimitsSlice, rules: Rules) -> RequestLimits:
    """What one request may hold."""
    return RequestLimits(
        prompt_bytes_max=rules.request_bytes_max,
        prompt_tokens_max=rules.prompt_tokens_max,
        messages_max=limits.messages_max,
        max_tokens_max=rules.output_tokens_max,
    )


def service_config(config: NodeConfig) -> ServiceConfig:
    """Bounds of the node's service."""
    limits = config.limits
    return ServiceConfig(
        dispatch=DispatchConfig(attempts_max=limits.attempts_max, timeout_s=limits.request_timeout_s),
        generations=GenerationConfig(entries_max=limits.request_log_entries_max, kept_s=limits.request_log_s),
    )


def _bind(server: grpc.aio.Server, address: Address, field: str) -> Address:
    """Bind a listener; the port that it has. Raises AddressInUse."""
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError as error:
        raise AddressInUse(
            f"{field} cannot listen on {address}: the port is taken, or the address is not this box's. Stop "
            f"the other program, or choose another port with --{'peer-' if 'peer' in field else ''}listen.",
            field=field,
        ) from error
    return Address(host=address.host, port=port)
