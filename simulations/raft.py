"""The log under faults: scenarios, seeds, and what must hold. Owns: one run of one scenario with one seed.

A run has three parts: trouble (faults and clients), peace (everything healed and running, clients go on),
and rest (clients stop; within CONVERGENCE_S_MAX of healing every member must hold and have applied the same
log). The oracle looks after every event; the clients' history must be linearizable. Must not: contain what a
scenario says; scenarios are files (``scenarios/raft_*.toml``).

    python -m simulations sweep raft --seeds 100
"""

from __future__ import annotations

import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldmesh.core.consensus import Consensus
from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_members import choose_voters, next_change
from fieldmesh.core.raft_model import Doubt, EntryKind, Members, RaftConfig, Transfer
from simulations.linearizability import first_violation
from simulations.raft_clients import Clients
from simulations.raft_cluster import Cluster, Watched
from simulations.world import DiskSpeed, InvariantBroken, Link

SCENARIOS = Path(__file__).parent / "scenarios"
CONVERGENCE_S_MAX = 60.0
DISK_SLOW = DiskSpeed(sync_s_min=0.1, sync_s_max=1.2)
FAULT_KINDS = (
    "kill",
    "kill_in_save",
    "power_loss",
    "partition",
    "one_way",
    "freeze",
    "disk_full",
    "slow_disk",
    "transfer",
    "doubt",
    "wipe",
    "resize",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a file says. ``faults`` gives for each kind the mean seconds between two; ``must`` names the
    counts that a sweep must have seen at least once."""

    name: str
    founders: int
    spares: int = 0
    trouble_s: float = 20.0
    peace_s: float = 4.0
    clients: int = 4
    keys: int = 3
    think_s: float = 0.15
    fault_s_max: float = 4.0
    clock_skew: float = 0.0
    link: Link = field(default_factory=Link)
    config: RaftConfig = field(default_factory=RaftConfig)
    faults: dict[str, float] = field(default_factory=dict)
    must: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened in one run."""

    scenario: str
    seed: int
    counts: Counter[str]
    digest: str
    violation: str | None


def scenarios(prefix: str = "raft") -> list[Scenario]:
    """All scenarios on file whose names begin so, by name."""
    return [load(path) for path in sorted(SCENARIOS.glob(f"{prefix}*.toml"))]


def load(path: Path) -> Scenario:
    """One scenario. Raises TypeError for a word that no scenario knows."""
    data: dict[str, Any] = tomllib.loads(path.read_text())
    data["link"] = Link(**data.get("link", {}))
    data["config"] = RaftConfig(**data.get("config", {}))
    data["must"] = tuple(data.get("must", ()))
    scenario = Scenario(name=path.stem, **data)
    unknown = set(scenario.faults) - set(FAULT_KINDS)
    if unknown:
        raise TypeError(f"{path.name}: unknown faults {sorted(unknown)}")
    return scenario


def run(
    scenario: Scenario, seed: int, *, machine: Callable[..., Consensus] = Watched, record: bool = False
) -> Report:
    """One run; a broken property is in the report, not raised."""
    trial = Trial(scenario, seed, machine=machine, record=record)
    violation = None
    try:
        trial.run()
    except AssertionError as error:
        where = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        violation = f"{error} [{Path(where.filename).name}:{where.lineno} {where.line}]"
    return trial.report(violation)


class Trial:
    """One run of one scenario with one seed."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        machine: Callable[..., Consensus] = Watched,
        record: bool = False,
    ) -> None:
        self.scenario = scenario
        self.seed = seed
        self.cluster = Cluster(
            seed,
            founders=scenario.founders,
            spares=scenario.spares,
            config=scenario.config,
            link=scenario.link,
            record=record,
            machine=machine,
        )
        self.world = self.cluster.world
        self.random = self.world.random
        self.counts = self.cluster.counts
        self.clients = Clients(
            self.cluster, count=scenario.clients, keys=scenario.keys, think_s=scenario.think_s
        )
        self.troubled = True
        self.wanted_voters = scenario.founders
        self.wiped: str | None = None
        for label in self.cluster.labels:
            host = self.world.hosts[label]
            skew = scenario.clock_skew
            host.clock_rate = 1.0 + self.random.uniform(-skew, skew)
            host.clock_offset_s = self.random.uniform(0.0, 1000.0)

    def run(self) -> None:
        """Trouble, peace, rest. Raises AssertionError where a property is broken."""
        for label in self.cluster.labels:
            self.world.start(label)
        self.clients.start()
        for kind, mean_s in self.scenario.faults.items():
            self._schedule(kind, mean_s)
        self.world.run(self.scenario.trouble_s)
        self._heal()
        healed = self.world.time
        self.world.run(healed + self.scenario.peace_s)
        self.clients.stop()
        self.world.run(
            healed + CONVERGENCE_S_MAX, stop=lambda: self.world.events_done % 50 == 0 and self.converged()
        )
        if not self.converged():
            raise InvariantBroken(f"not converged {CONVERGENCE_S_MAX} s after healing: {self._positions()}")
        self._final_checks()

    def _final_checks(self) -> None:
        for label in self._members():
            node = self.cluster.node(label)
            assert node is not None
            self.cluster.oracle.state_of(label, node.consensus.applied, node.consensus.state)
        key = first_violation(self.clients.history)
        assert key is None, f"not linearizable: key {key}"

    def report(self, violation: str | None) -> Report:
        counts = Counter(self.counts)
        counts.update(self.world.counts)
        counts.update({f"note_{name}": number for name, number in self.world.notes.items()})
        return Report(
            scenario=self.scenario.name,
            seed=self.seed,
            counts=counts,
            digest=self.world.digest,
            violation=violation,
        )

    # --- convergence ---

    def _members(self) -> tuple[str, ...]:
        leader = self.cluster.leader
        node = self.cluster.node(leader) if leader is not None else None
        return node.consensus.raft.log.members.all if node is not None else ()

    def converged(self) -> bool:
        """Whether the leader's whole log is committed and every member of it has applied it."""
        leader = self.cluster.leader
        node = self.cluster.node(leader) if leader is not None else None
        if node is None:
            return False
        last = node.consensus.raft.log.last_index
        others = [self.cluster.node(member) for member in node.consensus.raft.log.members.all]
        return all(other is not None and other.consensus.applied == last for other in others)

    def _positions(self) -> str:
        parts = []
        for label in self.cluster.labels:
            node = self.cluster.node(label)
            parts.append(f"{label}: {node.consensus.raft.status if node else 'down'}")
        return "; ".join(parts)

    # --- faults ---

    def _schedule(self, kind: str, mean_s: float) -> None:
        delay = self.random.expovariate(1.0 / mean_s)
        self.world.at(self.world.time + delay, kind, lambda: self._cause(kind, mean_s))

    def _cause(self, kind: str, mean_s: float) -> None:
        operator = kind == "resize" and "wipe" in self.scenario.faults  # goes on repairing in peace
        if not self.troubled and not operator:
            return
        getattr(self, f"_cause_{kind}")()
        self._schedule(kind, mean_s)

    def _later(self, what: str, function: Callable[[], None]) -> None:
        """Undo a fault after a while (healing undoes all of them at once)."""
        delay = self.random.uniform(0.05, self.scenario.fault_s_max)
        self.world.at(self.world.time + delay, what, lambda: function() if self.troubled else None)

    def _victim(self) -> str:
        """Somebody; the leader twice as often as chance would have it."""
        leader = self.cluster.leader
        if leader is not None and self.random.random() < 0.3:
            return leader
        return self.random.choice(self.cluster.labels)

    def _start(self, label: str) -> None:
        if self.world.hosts[label].machine is None:
            self.world.start(label)

    def _cause_kill(self) -> None:
        label = self._victim()
        self.world.crash(label)
        self._later("start", lambda: self._start(label))

    def _cause_kill_in_save(self) -> None:
        """Somebody dies while a Save is under way: what comes before its end must not have been said."""
        label = self._victim()
        self.cluster.doomed.add(label)
        self._later("start", lambda: self._start(label))

    def _cause_power_loss(self) -> None:
        """All boxes at once."""
        for label in self.cluster.labels:
            self.world.crash(label, power=True)
            self._later("start", lambda label=label: self._start(label))  # type: ignore[misc]

    def _sides(self) -> tuple[list[str], list[str]]:
        """Two halves of any size; often the leader alone, who does not know yet that another may lead."""
        leader = self.cluster.leader
        if leader is not None and self.random.random() < 0.4:
            return [leader], [label for label in self.cluster.labels if label != leader]
        labels = self.random.sample(self.cluster.labels, len(self.cluster.labels))
        middle = self.random.randint(1, max(1, len(labels) - 1))
        return labels[:middle], labels[middle:]

    def _cause_partition(self) -> None:
        self.world.cut(*self._sides())
        self._later("heal", self.world.heal)

    def _cause_one_way(self) -> None:
        self.world.cut(*self._sides(), both=False)
        self._later("heal", self.world.heal)

    def _cause_freeze(self) -> None:
        self.world.freeze(self._victim(), self.random.uniform(0.3, self.scenario.fault_s_max))

    def _cause_disk_full(self) -> None:
        label = self._victim()
        self.cluster.disk_full.add(label)

        def again() -> None:
            self.cluster.disk_full.discard(label)
            self._start(label)

        self._later("disk has room", again)

    def _cause_slow_disk(self) -> None:
        host = self.world.hosts[self._victim()]
        host.disk_speed = DISK_SLOW
        self.counts["slow_disk"] += 1

        def fast() -> None:
            host.disk_speed = DiskSpeed()

        self._later("disk is fast", fast)

    def _cause_transfer(self) -> None:
        leader = self.cluster.leader
        if leader is not None:
            self.counts["transfers_asked"] += 1
            self.world.post(leader, Transfer(to=NodeId(self.random.choice(self.cluster.labels))))

    def _cause_doubt(self) -> None:
        """The hosts of some doubt that the leader is there: often because it is not, as often for nothing."""
        for label in self.cluster.labels:
            node = self.cluster.node(label)
            leader = node.consensus.raft.leader if node is not None else None
            if leader is not None and self.random.random() < 0.7:
                self.counts["doubts"] += 1
                self.world.post(label, Doubt(node=leader), self.random.uniform(0.0, 0.1))

    def _cause_wipe(self) -> None:
        """A box gets a new disk and keeps its name. One at a time, among three voters at least, and in no
        change: more is beyond what any log promises. The operator (resize) takes it out and in again."""
        leader = self.cluster.leader
        node = self.cluster.node(leader) if leader is not None else None
        if node is None or self.wiped is not None:
            return
        log = node.consensus.raft.log
        voters = log.members.voters
        if len(voters) >= 3 and log.members_index <= log.commit:
            label = self.wiped = self.random.choice([voter for voter in voters if voter != leader])
            self.cluster.wipe(label)
            self._later("start", lambda: self._start(label))

    def _committed_members(self) -> tuple[str, ...]:
        """Who is a member by the newest committed entry that says so."""
        committed = self.cluster.oracle.committed
        newest = max(index for index, entry in committed.items() if entry.kind is EntryKind.MEMBERS)
        return Members.decode(committed[newest].data).all

    def _cause_resize(self) -> None:
        """One step towards the wanted number of voters; sometimes the wish changes."""
        leader = self.cluster.leader
        node = self.cluster.node(leader) if leader is not None else None
        if node is None or node.consensus.raft.leadership is None:
            return
        if self.random.random() < 0.1 and "wipe" not in self.scenario.faults:
            self.wanted_voters = self.random.choice((1, 3, 5))
        raft = node.consensus.raft
        leadership, now = raft.leadership, node.host.local(self.world.time)
        assert leadership is not None
        members: Members = raft.log.members
        if self.wiped is not None and self.wiped not in self._committed_members():
            self.wiped = None
        # Who is down will be back; while a disk is lost, nobody else is taken out for that.
        lost = self.wiped is not None
        present = [NodeId(label) for label in self.cluster.labels if lost or self.cluster.node(label)]
        stable = {node_id: self.random.random() for node_id in present if node_id != self.wiped}
        wanted = choose_voters(members, stable, target=self.wanted_voters, enough_s=0.0)
        caught_up = {learner for learner in members.learners if leadership.caught_up(learner, now)}
        change = next_change(members, wanted, caught_up=caught_up, present=stable.keys(), leader=raft.me)
        if change is not None:
            self.counts[f"asked_{type(change).__name__}"] += 1
            self.world.post(raft.me, change)

    def _heal(self) -> None:
        """End all faults: everything runs, is connected, has a fast disk with room, and loses nothing."""
        self.troubled = False
        self.world.heal()
        self.cluster.disk_full.clear()
        self.cluster.doomed.clear()
        self.world.link_default = replace(self.scenario.link, loss=0.0, duplicate=0.0, reorder=0.0)
        for label, host in self.world.hosts.items():
            host.disk_speed = DiskSpeed()
            host.frozen_until = min(host.frozen_until, self.world.time)
            self._start(label)
