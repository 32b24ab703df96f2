"""``python -m simulations run | sweep | replay``: the simulator at the command line.

A run that breaks something exits with 1 and prints its replay command first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from simulations import mutants, sweep
from simulations.scenario import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 held, 1 something broke or never happened, 2 bad usage."""
    options = _parser().parse_args(arguments)
    if options.mutant and options.mutant not in mutants.names():
        print(f"unknown mutant {options.mutant!r}; known are {', '.join(mutants.names())}", file=sys.stderr)
        return 2
    match options.command:
        case "run":
            return _run(options)
        case "replay":
            return _replay(options)
        case _:
            return _sweep(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one seed of one scenario; without a scenario: list them")
    run.add_argument("scenario", nargs="?", default="")
    run.add_argument("--seed", type=int, default=1)
    many = commands.add_parser("sweep", help="many seeds; names may be beginnings of names (raft)")
    many.add_argument("scenarios", nargs="*", metavar="scenario")
    many.add_argument("--seeds", type=int, default=500, help="how many, from --first on (500)")
    many.add_argument("--first", type=int, default=0, help="the first seed (0)")
    many.add_argument("--jobs", type=int, default=sweep.default_jobs(), help="processes (all cores)")
    many.add_argument("--journal", type=Path, help="keep outcomes here, and go on from it when started again")
    replay = commands.add_parser("replay", help="show what happens in one seed, line by line")
    replay.add_argument("what", help="SCENARIO:SEED")
    for command in (run, many, replay):
        command.add_argument("--mutant", default="", help="with this seeded bug")
        if command is not replay:
            command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.scenario:
        print("\n".join(sweep.names()))
        return 0
    if not _known([options.scenario]):
        return 2
    outcome = sweep.trial(options.scenario, options.seed, options.mutant)
    if options.json:
        print(json.dumps(asdict(outcome)))
    else:
        _print_broken(outcome, options.mutant)
        print(f"{outcome.scenario} seed {outcome.seed}: {'BROKEN' if outcome.broken else 'holds'}")
        print(f"trace {outcome.digest}, {outcome.events} events")
        for what, times in outcome.counts.items():
            print(f"  {what:28} {times}")
    return 1 if outcome.broken else 0


def _replay(options: argparse.Namespace) -> int:
    name, _, seed = options.what.rpartition(":")
    if not seed.isdigit() or not _known([name]):
        print("replay takes SCENARIO:SEED, such as churn:7", file=sys.stderr)
        return 2
    last = ""
    for last in sweep.trace(name, int(seed), options.mutant):
        print(last)
    return 1 if last.startswith("broken") else 0


def _sweep(options: argparse.Namespace) -> int:
    wanted = options.scenarios or [""]
    if not _known(wanted):
        return 2
    chosen = [
        name for prefix in wanted for name in ([prefix] if prefix in sweep.names() else sweep.names(prefix))
    ]
    seeds = range(options.first, options.first + options.seeds)
    results = []
    for name in dict.fromkeys(chosen):
        started = time.monotonic()
        outcomes = []
        for outcome in sweep.sweep(
            name,
            seeds[: sweep.seeds_max(name)],
            jobs=options.jobs,
            mutant=options.mutant,
            journal=options.journal,
        ):
            outcomes.append(outcome)
            if not options.json:
                _print_broken(outcome, options.mutant)
        result = sweep.summed(name, outcomes)
        results.append(result)
        if not options.json:
            _print_result(result, time.monotonic() - started)
    if options.json:
        print(json.dumps({"results": [asdict(result) for result in results]}))
    return 0 if all(result.holds for result in results) else 1


def _known(prefixes: Sequence[str]) -> bool:
    for prefix in prefixes:
        if not sweep.names(prefix):
            print(f"no scenario {prefix!r}; there are {', '.join(sweep.names())}", file=sys.stderr)
            return False
    return True


def _print_broken(outcome: Outcome, mutant: str) -> None:
    if outcome.broken:
        print(sweep.replay_command(outcome, mutant))
        print(f"  {outcome.broken}", flush=True)


def _print_result(result: sweep.Result, duration_s: float) -> None:
    verdict = "holds" if result.holds else f"{len(result.broken)} BROKEN"
    print(f"{result.scenario}: {result.seeds} seeds in {duration_s:.1f} s, {verdict}")
    wanted = sweep.expected(result.scenario)
    print("  " + ", ".join(f"{what} {result.counts.get(what, 0)}" for what in wanted), flush=True)
    if result.missing:
        print(f"  NEVER HAPPENED: {', '.join(result.missing)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
