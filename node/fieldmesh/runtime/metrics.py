"""What a node tells Prometheus. Owns: the names, units and meanings of its metrics, all gathered when asked.

Where a name has a counterpart in vLLM, it means the same (``deploy/METRICS.md`` lists them all). Label
values are few: states, phases, codes, methods, lanes, this node's models, at most ``PEERS_SHOWN_MAX`` peers.
Must not: count (the parts of the node do), listen (``scrapes`` does), or change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from fieldmesh import __version__
from fieldmesh.core.model import PROTOCOL_VERSION_MAX, MeshView, NodeState
from fieldmesh.core.tally import Counts, Histogram
from fieldmesh.runtime.door import Calls
from fieldmesh.runtime.links import PEERS_COUNTED_MAX, PeerBytes
from fieldmesh.runtime.models import STATES, Hosted, Models
from fieldmesh.runtime.service import Service

PEERS_SHOWN_MAX = PEERS_COUNTED_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the numbers are."""

    view: Callable[[], MeshView]
    models: Models
    service: Service
    calls: Calls
    peer_bytes: PeerBytes


class Metrics:
    """The metrics of one node."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that the scraper accepts, and that format's content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Every family with its present values."""
        yield from _engine_families(self._sources.models)
        yield from _request_families(self._sources.service, self._sources.calls)
        yield from _mesh_families(self._sources.view(), self._sources.peer_bytes)
        build = InfoMetricFamily("fieldmesh_build", "Version of this node")
        build.add_metric((), {"version": __version__, "protocol": str(PROTOCOL_VERSION_MAX)})
        yield build


def _engine_families(models: Models) -> Iterator[Metric]:
    label = ("model_name", "profile")
    found = [((e.settings.model_name, name), e) for name, e in models.hosted.items()]

    def each(
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        words: str,
        value: Callable[[Hosted], float],
    ) -> Metric:
        made = family(f"fieldmesh_{name}", words, labels=label)
        for labels, entry in found:
            made.add_metric(labels, value(entry))
        return made

    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    yield each(gauge, "num_requests_running", "Generations in a slot", lambda e: e.load.running)
    yield each(gauge, "num_requests_running_max", "Slots of the engine", lambda e: e.load.slots)
    yield each(gauge, "num_requests_waiting", "Generations that wait for a slot", lambda e: e.load.queued)
    yield each(gauge, "num_requests_waiting_max", "Room of the queue", lambda e: e.load.queue_max)
    yield each(gauge, "kv_cache_usage_perc", "KV cells in use, 0 to 1", lambda e: e.load.kv_pressure)
    yield each(counter, "prompt_tokens", "Tokens of admitted prompts", lambda e: e.tally.prompt_tokens)
    yield each(counter, "generation_tokens", "Tokens generated", lambda e: e.tally.generation_tokens)
    yield each(
        counter,
        "prefix_cache_queries",
        "Prompt tokens of completed generations that were looked up in the cache",
        lambda e: e.tally.prefix_queried_tokens,
    )
    yield each(
        counter,
        "prefix_cache_hits",
        "Prompt tokens of completed generations that were found in the cache",
        lambda e: e.tally.prefix_hit_tokens,
    )
    yield each(
        counter,
        "engine_restarts",
        "Engine processes started in place of a lost one",
        lambda e: e.tally.restarts,
    )
    states = gauge("fieldmesh_engine_state", "1 for the engine's present state", labels=(*label, "state"))
    finished = counter(
        "fieldmesh_request_success", "Generations completed here", labels=(*label, "finished_reason")
    )
    steps = HistogramMetricFamily(
        "fieldmesh_engine_step_seconds",
        "Time of a step, by what it computed: decode, prefill, or both (mixed)",
        labels=(*label, "phase"),
    )
    between = HistogramMetricFamily(
        "fieldmesh_inter_token_latency_seconds", "Time between two tokens of a generation", labels=label
    )
    queued = HistogramMetricFamily(
        "fieldmesh_request_queue_time_seconds",
        "Time that completed generations had waited for a slot",
        labels=label,
    )
    for labels, entry in found:
        present = models.state(entry.profile.name)
        for state in STATES:
            states.add_metric((*labels, state), float(present == state))
        for reason, count in entry.tally.finished.items():
            finished.add_metric((*labels, reason.value), count)
        for phase, histogram in entry.tally.step_s.items():
            _add(steps, (*labels, phase), histogram)
        _add(between, labels, entry.tally.inter_token_s)
        _add(queued, labels, entry.tally.queue_s)
    yield from (states, finished, steps, between, queued)


def _request_families(service: Service, calls: Calls) -> Iterator[Metric]:
    ttft = HistogramMetricFamily(
        "fieldmesh_time_to_first_token_seconds",
        "From a request's arrival at this node to its first token, by route: local, forwarded, for_peer",
        labels=("route",),
    )
    for route, histogram in service.latencies.ttft_s.items():
        _add(ttft, (route,), histogram)
    duration = HistogramMetricFamily(
        "fieldmesh_e2e_request_latency_seconds",
        "From a request's arrival at this node to its end, by route; of requests that were answered",
        labels=("route",),
    )
    for route, histogram in service.latencies.duration_s.items():
        _add(duration, (route,), histogram)
    yield from (ttft, duration)
    yield GaugeMetricFamily(
        "fieldmesh_requests_under_way", "Requests that entered here and have not ended", service.running
    )
    yield _counted(
        "fieldmesh_requests",
        "Calls of this node's API by method and outcome: OK, or the code of the error",
        ("method", "code"),
        calls,
    )
    yield _counted(
        "fieldmesh_routing_decisions",
        "Decisions who should serve, by what they followed and what came of it",
        ("reason", "result"),
        service.router.decisions,
    )


def _mesh_families(view: MeshView, peer_bytes: PeerBytes) -> Iterator[Metric]:
    others = [member for member in view.members if member.id != view.local]
    states = GaugeMetricFamily("fieldmesh_peers", "Other nodes by state", labels=("state",))
    for state in NodeState:
        states.add_metric((state.value,), sum(member.state is state for member in others))
    named = InfoMetricFamily("fieldmesh_peer", "Names of other nodes", labels=("peer",))
    for member in others[:PEERS_SHOWN_MAX]:
        named.add_metric((member.id,), {"peer_name": member.name})
    yield from (states, named)
    yield _counted(
        "fieldmesh_peer_sent_bytes", "Bytes of messages to a peer", ("peer", "lane"), peer_bytes.sent
    )
    yield _counted(
        "fieldmesh_peer_received_bytes",
        "Bytes of messages from a peer",
        ("peer", "lane"),
        peer_bytes.received,
    )


def _counted(
    name: str, words: str, labels: tuple[str, str], counts: Counts[tuple[str, str]]
) -> CounterMetricFamily:
    made = CounterMetricFamily(name, words, labels=labels)
    for key, count in counts.items():
        made.add_metric(key, count)
    return made


def _add(family: HistogramMetricFamily, labels: tuple[str, ...], histogram: Histogram) -> None:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    sums = histogram.cumulative()
    family.add_metric(labels, list(zip(bounds, sums, strict=True)), histogram.total)
