"""The log under faults: a fixed set of seeds of every scenario, and what makes the sweep worth running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.core import settings
from fieldmesh.core.consensus import Answered, Submit
from fieldmesh.core.raft_model import RaftConfig, Read, ReadFailed
from simulations.linearizability import Kind, Operation, first_violation
from simulations.raft import SCENARIOS, Scenario, Trial, load, run, scenarios
from simulations.raft_cluster import Cluster
from simulations.world import Link

SEEDS = range(3)
ROOT = Path(__file__).parents[2]


def identifier(scenario: Scenario) -> str:
    return scenario.name


@pytest.mark.parametrize("scenario", scenarios(), ids=identifier)
def test_nothing_is_broken(scenario: Scenario) -> None:
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        report = run(scenario, seed)
        assert report.violation is None, f"python -m simulations replay {scenario.name}:{seed}"
        counts += report.counts
    assert counts["elections"] > 0
    assert counts["writes_acknowledged"] > 0
    assert counts["reads_proven"] > 0


def test_the_scenarios_cover_what_was_promised() -> None:
    found = scenarios()
    assert {1, 3, 4, 5} <= {scenario.founders for scenario in found}
    assert any(scenario.clock_skew for scenario in found)
    assert any(scenario.spares for scenario in found)
    seen = {count for scenario in found for count in scenario.must}
    assert {
        "elections",
        "note_log_truncated",
        "snapshots_sent",
        "snapshots_installed",
        "membership_changes",
        "kill",
        "kill_in_save",
        "power_loss",
        "writes_lost",
        "partition",
        "one_way_partition",
        "freeze",
        "disk_full",
        "slow_disk",
        "lost",
        "duplicated",
        "reordered",
    } <= seen


def test_a_seed_says_everything() -> None:
    """Two processes with different hash seeds do the same, event by event."""
    program = (
        "from simulations.raft import *; r = run(load(SCENARIOS / 'raft_five.toml'), 7); print(r.digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_stale_read_in_a_recorded_history_is_found() -> None:
    """The negative control: the history is accepted as it is, and refused with one old value read late."""
    trial = Trial(load(SCENARIOS / "raft_three.toml"), 1)
    trial.run()
    history = trial.clients.history
    assert first_violation(history) is None
    done = sorted((o for o in history if o.returned is not None), key=lambda o: o.invoked)
    late = next(o for o in reversed(done) if o.kind is Kind.GET)
    old = next(o for o in done if o.kind is Kind.PUT and o.key == late.key)
    stale: list[Operation] = [replace(o, value=old.value) if o is late else o for o in history]
    assert first_violation(stale) == late.key


def test_a_log_that_cannot_converge_is_reported() -> None:
    """With every message lost after healing, nothing can converge: the run must say so."""
    scenario = replace(load(SCENARIOS / "raft_three.toml"), trouble_s=2.0, faults={})
    trial = Trial(scenario, 1)
    trial._heal = lambda: trial.world.cut(["n0", "n1", "n2"], ["n0", "n1", "n2"])  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not converged"):
        trial.run()


def test_an_unknown_fault_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "raft_wrong.toml"
    path.write_text("founders = 3\n[faults]\nearthquake = 1.0\n")
    with pytest.raises(TypeError, match="earthquake"):
        load(path)


class TestStories:
    """Single faults whose outcome is known."""

    def cluster(self, founders: int) -> tuple[Cluster, str, list[str]]:
        """A cluster at rest, its leader, and the others."""
        cluster = Cluster(7, founders=founders, spares=0, config=RaftConfig(), link=Link())
        for label in cluster.labels:
            cluster.world.start(label)
        cluster.world.run(5.0)
        leader = cluster.leader
        assert leader is not None
        return cluster, leader, [label for label in cluster.labels if label != leader]

    def term(self, cluster: Cluster) -> int:
        return max(node.consensus.raft.term for label in cluster.labels if (node := cluster.node(label)))

    def submit(self, cluster: Cluster, label: str) -> None:
        command = settings.Command(kind=settings.Kind.OPEN_SESSION)
        cluster.world.post(label, Submit(requests=((1, command),), time_ms=1))

    def test_a_partial_partition_causes_no_churn(self) -> None:
        """One follower cannot reach the leader, and both reach everyone else."""
        cluster, leader, others = self.cluster(5)
        term = self.term(cluster)
        cluster.world.cut([leader], [others[0]])
        cluster.world.cut([others[1]], [others[2]])
        cluster.world.run(65.0)
        assert (cluster.leader, self.term(cluster)) == (leader, term)

    def test_a_one_way_cut_causes_no_churn(self) -> None:
        """A follower that does not hear the leader, and reaches everybody, asks for votes all the time."""
        cluster, leader, others = self.cluster(3)
        term = self.term(cluster)
        cluster.world.cut([leader], [others[0]], both=False)
        cluster.world.run(65.0)
        assert (cluster.leader, self.term(cluster)) == (leader, term)

    def test_half_of_four_commits_nothing(self) -> None:
        cluster, leader, others = self.cluster(4)
        committed = cluster.oracle.last_committed
        cluster.world.cut([leader, others[0]], others[1:])
        for label in cluster.labels:
            self.submit(cluster, label)
        cluster.world.run(25.0)
        assert cluster.oracle.last_committed == committed
        cluster.world.heal()
        cluster.world.run(35.0)
        assert cluster.leader is not None

    def test_a_leader_whose_clock_stands_still_answers_no_read_from_the_past(self) -> None:
        """Cut off, it believes to lead for ever; what others commit meanwhile must not be missing."""
        cluster, leader, others = self.cluster(3)
        answers: list[Any] = []
        cluster.answers = lambda label, effect: answers.append((label, effect))
        host = cluster.world.hosts[leader]
        host.clock_offset_s, host.clock_rate = host.local(cluster.world.time), 1e-9
        cluster.world.cut([leader], others)
        cluster.world.run(10.0)
        successor = next(n for n in others if (node := cluster.node(n)) and node.consensus.raft.leadership)
        self.submit(cluster, successor)
        cluster.world.run(12.0)
        assert [type(effect) for label, effect in answers if label == successor] == [Answered]
        cluster.world.post(leader, Read(id=9))
        cluster.world.run(14.0)
        assert [effect for label, effect in answers if label == leader] == []
        cluster.world.heal()
        host.clock_rate = 1.0
        self.submit(cluster, leader)
        cluster.world.run(20.0)
        assert ReadFailed(id=9) in [effect for label, effect in answers if label == leader]

    def test_a_dead_leader_is_replaced_within_three_timeouts(self) -> None:
        cluster, leader, _ = self.cluster(3)
        cluster.world.crash(leader)
        cluster.world.run(5.0 + 3 * cluster.config.election_timeout_s)
        assert cluster.leader not in (None, leader)
