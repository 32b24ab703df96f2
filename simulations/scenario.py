"""Scenarios: a TOML file says how many nodes live for how long through which faults, and what must have
happened by the end. Owns: reading them, building the world, running one seed, the outcome.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random
from typing import Any

from fieldmesh.core.joining import JoinConfig
from fieldmesh.core.mesh import MeshConfig
from fieldmesh.core.model import Address, ProfileOffer
from fieldmesh.core.peers import MembershipConfig
from fieldmesh.core.replica import ReplicaConfig
from fieldmesh.core.steps import BatcherConfig
from simulations.faults import FAULTS, Playground
from simulations.invariants import Watch
from simulations.node import (
    MeshCodec,
    Settings,
    booter,
    generalist,
    make_key,
    mesh_of,
    node_id,
    profile,
    refused,
)
from simulations.world import InvariantBroken, Link, World

FOLDER = Path(__file__).parent / "scenarios"
MESH = "meadow"
PORT = 7000
END_LOOKS = 4
END_LOOKS_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """One kind of fault: on average once every ``every_s``, lasting between the two of ``for_s``."""

    every_s: float
    for_s: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One file. Times are virtual seconds.

    Faults happen between ``warmup_s`` and ``virtual_s - settle_s`` and are over by then. In the quiet that
    follows views must agree within ``converge_s``. ``notice_s``: how long a dead or unreachable node may
    be taken for alive. ``patience_s``: how long after its last trouble a healthy node may be taken for
    something else. ``expect`` names counts that a sweep must have seen at least once.
    """

    name: str
    says: str
    nodes: int
    virtual_s: float
    start_s: float = 0.5
    warmup_s: float = 5.0
    settle_s: float = 40.0
    converge_s: float = 30.0
    notice_s: float = 2.0
    patience_s: float = 15.0
    seeds_known: int = 2
    mdns: bool = False
    seeds_swept: int | None = None
    checks_alive: bool = True
    checks_notice: bool = True
    checks_end: bool = True
    check_every_events: int = 1
    clock_offset_s_max: float = 1000.0
    clock_rate_error_max: float = 0.0005
    late_nodes: int = 0
    late_probability: float = 0.0
    late_s_max: float = 0.0
    link: Link = field(default_factory=Link)
    faults: dict[str, FaultPlan] = field(default_factory=dict)
    expect: tuple[str, ...] = ()
    batcher: dict[str, Any] = field(default_factory=dict)
    membership: dict[str, Any] = field(default_factory=dict)
    replica: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one seed went. ``broken`` is empty where nothing was violated."""

    scenario: str
    seed: int
    digest: str
    broken: str
    events: int
    counts: dict[str, int]


def load(name: str) -> Scenario:
    """The scenario of this name or path. Raises ValueError for unknown keys, OSError for no file."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Scenario)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(
            f"{path.name}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    plans = table.pop("faults", {})
    for kind in plans:
        if kind not in FAULTS:
            raise ValueError(f"{path.name}: unknown fault {kind!r}; known are {', '.join(sorted(FAULTS))}")
    faults = {
        kind: FaultPlan(every_s=plan["every_s"], for_s=tuple(plan.get("for_s", (0.0, 0.0))))
        for kind, plan in plans.items()
    }
    return Scenario(
        link=Link(**table.pop("link", {})),
        faults=faults,
        expect=tuple(table.pop("expect", ())),
        **table,
    )


def names() -> list[str]:
    """All scenarios on file."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def build(scenario: Scenario, seed: int, *, record: bool = False) -> tuple[World, Playground, Watch]:
    """The world of one seed, its nodes started, its faults scheduled."""
    world = World(
        seed,
        MeshCodec(),
        link=scenario.link,
        refused=refused,
        lists_wait=False,
        record=record,
        check_every_events=scenario.check_every_events,
    )
    rng = Random(world.random.getrandbits(64))
    config = MeshConfig(
        membership=MembershipConfig(**scenario.membership),
        join=JoinConfig(),
        replica=ReplicaConfig(**scenario.replica),
        **scenario.mesh,
    )
    addresses = [Address(host=f"10.0.0.{index + 1}", port=PORT) for index in range(scenario.nodes)]
    ground = Playground(
        world=world, rng=Random(world.random.getrandbits(64)), settings={}, mesh=MESH, mdns=scenario.mdns
    )
    for index, address in enumerate(addresses):
        label = f"n{index}"
        settings = Settings(
            name=label,
            mesh=MESH,
            key=make_key(f"{seed} {label}"),
            seeds=tuple(addresses[: scenario.seeds_known]),
            profiles=_offers(index, scenario),
            config=config,
            batcher=BatcherConfig(**scenario.batcher) if scenario.batcher else None,
        )
        ground.settings[label] = settings
        world.add_host(
            label,
            node_id(settings.key),
            (address,),
            booter(settings, rng, ground.ledger),
            clock_offset_s=rng.uniform(0, scenario.clock_offset_s_max),
            clock_rate=1 + rng.uniform(-1, 1) * scenario.clock_rate_error_max,
        )
        world.at(rng.uniform(0, scenario.start_s), f"start {label}", lambda label=label: ground.start(label))  # type: ignore[misc]
    for index in range(scenario.late_nodes):
        world.make_late(f"n{index}", scenario.late_probability, scenario.late_s_max)
    watch = Watch(scenario, ground)
    world.invariants.append(watch.after_event)
    schedule(scenario, ground)
    return world, ground, watch


def _offers(index: int, scenario: Scenario) -> tuple[ProfileOffer, ...]:
    """A domain of its own for each node; where requests are served, three domains and two generalists."""
    if not scenario.batcher:
        return (profile(f"p{index}", f"subject {index}"),)
    special = profile(f"p{index % 3}", f"subject {index % 3}")
    return (special, generalist()) if index >= scenario.nodes - 2 else (special,)


def schedule(scenario: Scenario, ground: Playground) -> None:
    """Draw when each fault happens; all are over when the quiet begins."""
    quiet_at = scenario.virtual_s - scenario.settle_s
    for kind in sorted(scenario.faults):
        plan = scenario.faults[kind]
        time = scenario.warmup_s + ground.rng.expovariate(1 / plan.every_s)
        while time < quiet_at:
            lasts_s = min(ground.rng.uniform(*plan.for_s), quiet_at - time)
            ground.world.at(
                time,
                kind,
                lambda kind=kind, lasts_s=lasts_s: FAULTS[kind](ground, lasts_s),  # type: ignore[misc]
            )
            time += ground.rng.expovariate(1 / plan.every_s)
    ground.world.at(quiet_at, "quiet", ground.calm)


def _agree(scenario: Scenario, world: World, watch: Watch) -> None:
    """Everybody agrees at the end; where messages are still being lost then, at one of a few looks, for any
    instant may find a node that is doubted until its next word. Raises InvariantBroken."""
    looks = END_LOOKS if scenario.link.loss else 1
    for look in range(1, looks + 1):
        try:
            watch.at_end()
            return
        except InvariantBroken:
            if look == looks:
                raise
            world.run(scenario.virtual_s + look * END_LOOKS_EVERY_S)


def run(scenario: Scenario, seed: int, *, record: bool = False) -> tuple[Outcome, World]:
    """One seed from start to end."""
    world, ground, watch = build(scenario, seed, record=record)
    broken = ""
    try:
        world.run(scenario.virtual_s)
        if scenario.checks_end:
            _agree(scenario, world, watch)
    except InvariantBroken as error:
        broken = str(error)
    outcome = Outcome(
        scenario=scenario.name,
        seed=seed,
        digest=world.digest,
        broken=broken,
        events=world.events_done,
        counts=dict(sorted(gather(world, ground).items())),
    )
    return outcome, world


def gather(world: World, ground: Playground) -> Counter[str]:
    """Everything that was counted: by the world, by the machines that lived, by those that were killed."""
    counts = world.counts + ground.counts + ground.ledger.counts
    for host in world.hosts.values():
        if host.machine is not None:
            counts += ground.counts_of(mesh_of(host.machine))
    for event, times in world.notes.items():
        counts[f"note_{event}"] += times
    return counts
