"""Many seeds of many scenarios. Owns: the pool of processes, the journal, the table of counts.

Two families of scenarios share it: the mesh (``scenario``) and the log (``raft``, files ``raft_*.toml``).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from simulations import mutants, raft, scenario
from simulations.scenario import FOLDER, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A sweep of one scenario. It holds where nothing broke and nothing that was to happen is missing."""

    scenario: str
    seeds: int
    events: int
    counts: dict[str, int]
    broken: tuple[Outcome, ...]
    missing: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.broken and not self.missing


def names(prefix: str = "") -> list[str]:
    """All scenarios on file whose names begin so."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.toml"))


def expected(name: str) -> tuple[str, ...]:
    """What a sweep of this scenario must have seen at least once."""
    return _raft(name).must if _is_raft(name) else scenario.load(name).expect


def seeds_max(name: str) -> int | None:
    """How many seeds of this scenario a sweep takes at most; None for as many as are asked for."""
    return None if _is_raft(name) else scenario.load(name).seeds_swept


def trial(name: str, seed: int, mutant: str = "") -> Outcome:
    """One seed of one scenario, with a seeded bug where one is named."""
    with mutants.seeded(mutant) if mutant else nullcontext():
        if not _is_raft(name):
            return scenario.run(scenario.load(name), seed)[0]
        report = raft.run(_raft(name), seed)
    return Outcome(
        scenario=name,
        seed=seed,
        digest=report.digest,
        broken=report.violation or "",
        events=0,
        counts=dict(sorted(report.counts.items())),
    )


def trace(name: str, seed: int, mutant: str = "") -> Iterator[str]:
    """What happened in one seed, line by line, and how it ended."""
    with mutants.seeded(mutant) if mutant else nullcontext():
        if _is_raft(name):
            run = raft.Trial(_raft(name), seed, record=True)
            broken = ""
            try:
                run.run()
            except AssertionError as error:
                broken = str(error)
            world = run.world
        else:
            outcome, world = scenario.run(scenario.load(name), seed, record=True)
            broken = outcome.broken
    yield from world.trace or ()
    yield f"broken: {broken}" if broken else "nothing broken"


def replay_command(outcome: Outcome, mutant: str = "") -> str:
    """The one line that shows a run again."""
    with_mutant = f" --mutant {mutant}" if mutant else ""
    return f"python -m simulations replay {outcome.scenario}:{outcome.seed}{with_mutant}"


def sweep(
    name: str, seeds: Iterable[int], *, jobs: int, mutant: str = "", journal: Path | None = None
) -> Iterator[Outcome]:
    """Outcomes as they come, those in the journal (of this very code) first; the rest is added to it."""
    wanted = dict.fromkeys(seeds)
    code = code_digest()
    for outcome in _journaled(journal, name, code):
        if outcome.seed in wanted:
            del wanted[outcome.seed]
            yield outcome
    if jobs <= 1:
        outcomes: Iterable[Outcome] = (trial(name, seed, mutant) for seed in wanted)
        yield from _recorded(outcomes, journal, code)
        return
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        outcomes = pool.map(trial, [name] * len(wanted), wanted, [mutant] * len(wanted), chunksize=4)
        yield from _recorded(outcomes, journal, code)


def summed(name: str, outcomes: Iterable[Outcome]) -> Result:
    """One line of the table."""
    counts: Counter[str] = Counter()
    broken, seeds, events = [], 0, 0
    for outcome in outcomes:
        counts.update(outcome.counts)
        seeds += 1
        events += outcome.events
        if outcome.broken:
            broken.append(outcome)
    return Result(
        scenario=name,
        seeds=seeds,
        events=events,
        counts=dict(sorted(counts.items())),
        broken=tuple(broken),
        missing=tuple(what for what in expected(name) if not counts[what]),
    )


def code_digest() -> str:
    """Names the code under test: a journal of other code is not continued."""
    from hashlib import blake2b

    import fieldmesh

    digest = blake2b(digest_size=8)
    roots = (Path(fieldmesh.__file__).parent / "core", Path(__file__).parent)
    for root in roots:
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.toml"))):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def default_jobs() -> int:
    return os.cpu_count() or 1


# --- inside ------------------------------------------------------------------------------


def _is_raft(name: str) -> bool:
    return Path(name).stem.startswith("raft")


def _raft(name: str) -> raft.Scenario:
    return raft.load(FOLDER / f"{name}.toml")


def _journaled(journal: Path | None, name: str, code: str) -> list[Outcome]:
    if journal is None or not journal.exists():
        return []
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [Outcome(**e["outcome"]) for e in lines if e["code"] == code and e["outcome"]["scenario"] == name]


def _recorded(outcomes: Iterable[Outcome], journal: Path | None, code: str) -> Iterator[Outcome]:
    for outcome in outcomes:
        if journal is not None:
            with journal.open("a") as file:
                file.write(json.dumps({"code": code, "outcome": asdict(outcome)}) + "\n")
        yield outcome
