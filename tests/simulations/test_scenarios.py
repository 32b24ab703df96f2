"""The simulator as a judge: every scenario holds for a few seeds, every seeded bug is found, seeds reproduce.

The long sweeps are ``make sweep``; what runs here is small enough for every change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulations import mutants, scenario, sweep
from simulations.__main__ import main

SMALL = [name for name in scenario.names() if not name.startswith("raft") and name != "thousand"]


@pytest.mark.parametrize("name", SMALL)
def test_a_scenario_holds(name: str) -> None:
    outcome = sweep.trial(name, 1)
    assert not outcome.broken, sweep.replay_command(outcome)


@pytest.mark.parametrize("mutant", mutants.MESH_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_is_found(mutant: mutants.Mutant) -> None:
    assert any(sweep.trial(mutant.scenario, seed, mutant.name).broken for seed in range(8))
    assert not sweep.trial(mutant.scenario, 0).broken, "the bug was taken out again"


def test_two_processes_with_different_hash_seeds_make_equal_traces() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-m", "simulations", "run", "records", "--seed", "5", "--json"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(json.loads(process.stdout)["digest"])
    assert len(digests) == 1


def test_a_broken_run_prints_its_replay_command_first(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["run", "records", "--seed", "1", "--mutant", "document-decides"])
    first, *_ = capsys.readouterr().out.splitlines()
    assert status == 1
    assert first == "python -m simulations replay records:1 --mutant document-decides"
    assert main(first.split()[3:]) == 1
    assert "went back to an older row" in capsys.readouterr().out.splitlines()[-1]


def test_a_sweep_fails_where_something_never_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "expected", lambda name: ("joined", "meteorite"))
    assert main(["sweep", "quiet", "--seeds", "1", "--jobs", "1"]) == 1
    assert "NEVER HAPPENED: meteorite" in capsys.readouterr().out


def test_a_sweep_goes_on_from_its_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "journal"
    arguments = ["sweep", "quiet", "--jobs", "1", "--json", "--journal", str(journal)]
    assert main([*arguments, "--seeds", "1"]) == 0
    assert main([*arguments, "--seeds", "2"]) == 0
    assert len(journal.read_text().splitlines()) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["results"][0]["seeds"] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere"],
        ["sweep", "nowhere"],
        ["replay", "churn"],
        ["replay", "churn:x"],
        ["run", "churn", "--mutant", "nothing"],
    ],
)
def test_bad_usage_is_told_apart_from_a_failure(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_a_scenario_with_an_unknown_word_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\nsays = "y"\nnodes = 2\nvirtual_s = 1.0\nnoodles = 2\n')
    with pytest.raises(ValueError, match="noodles"):
        scenario.load(str(path))
    path.write_text('name = "x"\nsays = "y"\nnodes = 2\nvirtual_s = 1.0\n[faults.meteorite]\nevery_s = 1.0\n')
    with pytest.raises(ValueError, match="meteorite"):
        scenario.load(str(path))
