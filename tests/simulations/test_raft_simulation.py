"""The log under faults: a fixed set of seeds of every scenario, and what makes the sweep worth running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.linearizability import Kind, Operation, first_violation
from simulations.raft import SCENARIOS, Scenario, Trial, load, run, scenarios

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
