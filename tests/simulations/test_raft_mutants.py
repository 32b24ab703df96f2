"""Each seeded bug of the log is found: by the directed test that names its rule, by the sweep, or by both."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from simulations.raft import SCENARIOS, load, run
from simulations.raft_mutants import MUTANTS, Mutant, seeded

SEEDS_MAX = 6
CORE_TESTS = Path(__file__).parents[1] / "core"
NAMED = {
    "vote not persisted",
    "vote reset on step-down",
    "even quorum off by one",
    "unconditional truncation",
    "commit of an older term's entry",
    "commit over an unverified tail by append",
    "commit over an unverified tail by heartbeat",
    "commit over an unverified tail by snapshot",
    "no up-to-date check",
    "read without quorum",
    "acknowledgements of an older term",
    "send before sync",
    "two membership changes at once",
    "membership change before the term's first commit",
}


def directed(name: str) -> None:
    """Run one directed test, named ``module:Class.test`` or ``module:test``."""
    module_name, _, path = name.partition(":")
    *owner, test = path.split(".")
    module = importlib.import_module(module_name)
    target = getattr(module, owner[0])() if owner else module
    getattr(target, test)()


def identifier(mutant: Mutant) -> str:
    return mutant.name.replace(" ", "-")


@pytest.fixture(autouse=True)
def core_tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CORE_TESTS))


def test_the_mutants_that_every_log_must_be_tried_with_are_there() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert set(names) >= NAMED
    assert len(set(names)) == len(names)
    assert all(mutant.test or mutant.scenario for mutant in MUTANTS)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.test], ids=identifier)
def test_a_directed_test_finds_it(mutant: Mutant) -> None:
    directed(mutant.test)
    with seeded(mutant), pytest.raises((AssertionError, ValueError)):
        directed(mutant.test)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.scenario], ids=identifier)
def test_the_sweep_finds_it(mutant: Mutant) -> None:
    scenario = load(SCENARIOS / f"{mutant.scenario}.toml")
    with seeded(mutant):
        assert any(run(scenario, seed).violation for seed in range(SEEDS_MAX))


def test_a_mutant_without_its_place_in_the_code_is_noticed() -> None:
    lost = Mutant(name="lost", target="raft:Raft._tick", old="no such text", new="")
    with pytest.raises(LookupError), seeded(lost):
        pass
