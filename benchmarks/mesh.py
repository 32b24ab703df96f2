"""What the mesh adds to an engine, and how fast it notices faults.

    python -m benchmarks.mesh [--json] [--only NAME …] [--minutes M]

Real nodes with the built-in model. Direct and forwarded asks are interleaved in one run and compared as
medians; faults are made in network namespaces (they need root), one fault a trial, and timed until every
other node's own view says so. Full load is eight streams that never pause.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil

from benchmarks.cluster import Box, Cluster, node_named, usable, wait_until
from benchmarks.lab import Host, Lab, available
from benchmarks.report import Row, show
from fieldmesh.client import Client, health
from fieldmesh.core.catalogue import Index
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import (
    Address,
    Domain,
    EngineState,
    Load,
    Member,
    MeshView,
    NodeId,
    NodeState,
    ProfileOffer,
)
from fieldmesh.core.model import Row as DirectoryRow
from fieldmesh.core.routing import Need, choose
from fieldmesh.core.traffic import Traffic

PROFILES = ("general", "code", "health")
PROMPT = "Say something about bread."
SETTLE_S = 5.0


# --- what a hop costs --------------------------------------------------------------------


def forwarding(trials: int = 40) -> Iterator[Row]:
    """``code`` asked directly and through ``general``, in turn."""
    with Cluster() as cluster:
        general, code = (cluster.add(name, name) for name in ("general", "code"))
        for box in (general, code):
            cluster.start(box)
        cluster.wait_formed()
        entries = {"direct": Client([code.client]), "hop": Client([general.client])}
        ttft_s: dict[str, list[float]] = {"direct": [], "hop": []}
        for client in entries.values():  # the channels and the prompt's prefix are warm
            ask(client, max_tokens=8)
        for _ in range(trials):
            for way, client in entries.items():
                ttft_s[way].append(first_token_s(client))
        direct_ms, hop_ms = (statistics.median(ttft_s[way]) * 1000 for way in ("direct", "hop"))
        yield Row(
            measure="forwarded_ttft_added_ms",
            unit="ms",
            ours=hop_ms - direct_ms,
            peer="direct",
            peer_value=direct_ms,
            aim=2.0,
        )
        speeds: dict[str, list[float]] = {"direct": [], "hop": []}
        for _ in range(5):
            for way, client in entries.items():
                speeds[way].append(tokens_per_s(client, streams=4, tokens=96))
        direct, hop = (statistics.median(speeds[way]) for way in ("direct", "hop"))
        yield Row(
            measure="forwarded_tokens_ratio",
            unit="ratio",
            ours=hop / direct,
            peer="direct, tokens/s",
            peer_value=direct,
            aim=0.98,
            higher_is_better=True,
        )
        for client in entries.values():
            client.close()


def ask(client: Client, max_tokens: int) -> int:
    stream = client.chat(PROMPT, profile="code", temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return stream.result().completion_tokens


def first_token_s(client: Client) -> float:
    begun = time.perf_counter()
    with client.chat(PROMPT, profile="code", temperature=0.0, max_tokens=2, ignore_eos=True) as stream:
        next(stream)
        elapsed_s = time.perf_counter() - begun
        stream.result()
    return elapsed_s


def tokens_per_s(client: Client, *, streams: int, tokens: int) -> float:
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(ask(client, tokens))) for _ in range(streams)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


# --- what a decision costs ---------------------------------------------------------------


def decisions() -> Iterator[Row]:
    """One routing decision without classification, over meshes of three sizes."""
    for nodes, aim in ((10, None), (100, None), (1000, 100.0)):
        index, traffic, rng = Index.of(view_of(nodes)), Traffic(), Random(1)
        need = Need(domain="d3", prompt_tokens=100, max_tokens=200)
        choose(need, index, traffic, rng)
        samples = []
        for _ in range(9):
            begun = time.perf_counter()
            for _ in range(500):
                choose(need, index, traffic, rng)
            samples.append((time.perf_counter() - begun) / 500 * 1e6)
        yield Row(
            measure=f"routing_decision_us_{nodes}_nodes", unit="µs", ours=statistics.median(samples), aim=aim
        )


def view_of(nodes: int) -> MeshView:
    rng = Random(nodes)
    members = []
    for number in range(nodes):
        node = NodeId(f"{number:032x}")
        domain = Domain(name=f"d{number % 10}", description="", examples=())
        offer = ProfileOffer(name=f"p{number % 10}", model="m", fingerprint="f", domains=(domain,))
        row = DirectoryRow(
            id=node, name=str(number), mesh="m", incarnation=1, sequence=1, addresses=(), client_addresses=(),
            profiles=(offer,),
        )  # fmt: skip
        load = Load(
            engine=EngineState.READY,
            slots=4,
            running=rng.randrange(4),
            queue_max=8,
            prefill_tokens_per_s=200.0,
            decode_tokens_per_s=30.0,
        )
        members.append(
            Member(
                id=node,
                name=str(number),
                address=Address(host="10.0.0.1", port=1),
                state=NodeState.ALIVE,
                incarnation=1,
                load=load,
                rtt_s=0.001,
                row=row,
            )
        )
    return MeshView(local=members[0].id, members=tuple(members))


# --- how fast faults are noticed ---------------------------------------------------------


@contextmanager
def lab_mesh(*, mdns: bool = False, count: int = 3) -> Iterator[tuple[Cluster, Lab, dict[str, Host]]]:
    """Nodes on hosts of their own; the observer reaches all of them whatever is cut."""
    with Lab(count) as lab, Cluster(mdns=mdns) as cluster:
        hosts = dict(zip(PROFILES, lab.hosts, strict=False))
        for profile, host in hosts.items():
            cluster.add(profile, profile, host=host.address, prefix=host.prefix)
        yield cluster, lab, hosts


def faults(trials: int = 3) -> Iterator[Row]:
    """Seconds from a fault until every node that it concerns no longer counts the victim as alive."""
    why = available()
    if why:
        print(f"death_notice_s_*: not measured: {why}", file=sys.stderr)
        return
    with lab_mesh() as (cluster, lab, hosts):
        for box in cluster.boxes.values():
            cluster.start(box)
        cluster.wait_formed()
        victim = cluster.boxes["code"]
        others = [box for box in cluster.boxes.values() if box is not victim]

        def kill() -> Callable[[], None]:
            os.kill(victim.pid, signal.SIGKILL)
            return lambda: revive(cluster, victim)

        def freeze() -> Callable[[], None]:
            os.kill(victim.pid, signal.SIGSTOP)
            return lambda: os.kill(victim.pid, signal.SIGCONT)

        def cut() -> Callable[[], None]:
            for other in others:
                lab.cut(hosts["code"], hosts[other.name])
            return lab.heal

        def one_way() -> Callable[[], None]:
            for other in others:
                lab.cut_one_way(hosts["code"], hosts[other.name])
            return lab.heal

        for name, fault in (("kill", kill), ("freeze", freeze), ("cut", cut), ("one_way", one_way)):
            noticed = []
            for _ in range(trials):
                cluster.wait_formed()
                undo = fault()
                begun = time.monotonic()
                wait_until(lambda: not any(alive(cluster, other, "code") for other in others), 20, name)
                noticed.append(time.monotonic() - begun)
                undo()
            yield Row(measure=f"death_notice_s_{name}", unit="s", ours=max(noticed), aim=2.0)


def alive(cluster: Cluster, observer: Box, name: str) -> bool:
    node = node_named(cluster.seen_by(observer), name)
    return node is not None and node.state is NodeState.ALIVE


def revive(cluster: Cluster, box: Box) -> None:
    assert box.process is not None
    box.process.wait()
    cluster.start(box)


def joins(trials: int = 3) -> Iterator[Row]:
    """Seconds from a new node's health SERVING until the others would send it requests."""
    with loopback_mesh() as (cluster, _, _hosts):
        yield Row(measure="join_seen_s_seeds", unit="s", ours=join_seen_s(cluster, trials), aim=1.0)
    why = available()
    if why:
        print(f"join_seen_s_mdns: not measured: {why}", file=sys.stderr)
        return
    with lab_mesh(mdns=True) as (cluster, _, _hosts):
        yield Row(measure="join_seen_s_mdns", unit="s", ours=join_seen_s(cluster, trials), aim=2.0)


def join_seen_s(cluster: Cluster, trials: int) -> float:
    """The slowest of some joins of ``code`` to the other two."""
    newcomer = cluster.boxes["code"]
    others = [box for box in cluster.boxes.values() if box is not newcomer]
    for box in others:
        cluster.start(box)
    wait_until(
        lambda: all(used(cluster, box, other.name) for box in others for other in others), 60, "the others"
    )
    seen = []
    for _ in range(trials):
        cluster.start(newcomer)
        wait_until(lambda: serving(newcomer), 60, "health SERVING")
        begun = time.monotonic()
        wait_until(lambda: all(used(cluster, other, "code") for other in others), 20, "being seen")
        seen.append(time.monotonic() - begun)
        cluster.stop(newcomer)
    return max(seen)


@contextmanager
def loopback_mesh() -> Iterator[tuple[Cluster, None, None]]:
    with Cluster() as cluster:
        for profile in PROFILES:
            cluster.add(profile, profile)
        yield cluster, None, None


def serving(box: Box) -> bool:
    """Whether the node's health service says SERVING."""
    try:
        return health.serving(box.client)
    except FieldmeshError:
        return False


def used(cluster: Cluster, observer: Box, name: str) -> bool:
    node = node_named(cluster.seen_by(observer), name)
    return node is not None and usable(node)


# --- what it costs to be there -----------------------------------------------------------


def idle(seconds: float = 30.0) -> Iterator[Row]:
    """Memory and CPU of a node that nobody asks, in a mesh of three."""
    with loopback_mesh() as (cluster, _, _hosts):
        for box in cluster.boxes.values():
            cluster.start(box)
        cluster.wait_formed()
        time.sleep(SETTLE_S)  # classifiers are trained, first pages are touched: that is not idling
        box = cluster.boxes["general"]
        processes = [psutil.Process(pid) for pid in (box.pid, *box.engine_pids())]
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        time.sleep(seconds)
        after = sum(sum(process.cpu_times()[:2]) for process in processes)
        beside_mb = processes[0].memory_info().rss / 1e6
    yield Row(measure="idle_node_mb_beside_model", unit="MB", ours=beside_mb, aim=120.0)
    yield Row(measure="idle_node_cpu_percent", unit="%", ours=(after - before) / seconds * 100, aim=1.0)


def full_load(minutes: float) -> Iterator[Row]:
    """Accusations in a mesh where nothing is wrong but the load."""
    deadline = time.monotonic() + minutes * 60
    with loopback_mesh() as (cluster, _, _hosts):
        for box in cluster.boxes.values():
            cluster.start(box)
        cluster.wait_formed()
        asked = [0]

        def load(number: int) -> None:
            rng = Random(number)
            with Client([box.client for box in cluster.boxes.values()]) as client:
                while time.monotonic() < deadline:
                    try:
                        client.chat(
                            PROMPT,
                            profile=rng.choice(PROFILES),
                            max_tokens=64,
                            ignore_eos=True,
                            timeout_s=120,
                        ).result()
                        asked[0] += 1
                    except FieldmeshError as error:
                        print(f"an ask failed: {error!r}", file=sys.stderr)

        threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deaths = sum(false_deaths(box.log) for box in cluster.boxes.values())
    print(f"full load: {asked[0]} asks in {minutes:g} minutes", file=sys.stderr)
    yield Row(measure=f"false_deaths_{minutes:g}_min_full_load", unit="deaths", ours=float(deaths), aim=0.0)


def false_deaths(log: Path) -> int:
    """How often a node's log says that it counted another one as dead."""
    return sum(
        '"event": "peer_dead"' in line or '"event":"peer_dead"' in line for line in log.open(errors="replace")
    )


MEASURES: dict[str, Callable[[], Iterable[Row]]] = {
    "decisions": decisions,
    "forwarding": forwarding,
    "joins": joins,
    "faults": faults,
    "idle": idle,
}


def main() -> int:
    """Measure, print, and say by the exit status whether every aim was met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rows to standard output")
    parser.add_argument("--only", nargs="*", choices=[*MEASURES, "full_load"], help="measure these alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the full load (default: 10)")
    arguments = parser.parse_args()
    wanted = arguments.only or [*MEASURES, "full_load"]
    rows: list[Row] = []
    for name in wanted:
        print(f"measuring {name} …", file=sys.stderr)
        rows += full_load(arguments.minutes) if name == "full_load" else MEASURES[name]()
    return show(rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
