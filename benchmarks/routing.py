"""How well, and how fast, the classifier finds the domain of a question.

Measures on CLINC150's ten domains (Larson et al., "An Evaluation Dataset for Intent Classification and
Out-of-Scope Prediction", EMNLP-IJCNLP 2019): accuracy on the in-scope test split, and how well the confidence
tells it from the out-of-scope test split (area under the ROC curve), after learning 30 and 300 examples a
domain, spread evenly over its intents and drawn from the training split only. Nothing was chosen on the test
split. The data is not part of this project: the program says where it is to be had.

    python -m benchmarks.routing [--data DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.report import Row, show
from fieldmesh.core.classify import Classification, Classifier
from fieldmesh.core.model import Domain

DATA_FILE = "clinc150.json"
DOMAINS_FILE = "clinc150-domains.json"
WHERE = f"""\
The routing benchmark needs CLINC150 (Larson et al. 2019, CC BY 3.0), which is not part of this project.

  1. Take data/data_full.json and data/domains.json from https://github.com/clinc/oos-eval
  2. Put them into a folder as {DATA_FILE} and {DOMAINS_FILE}
  3. Run again with --data FOLDER, or with FIELDMESH_BENCH_DATA=FOLDER
"""
DRAWS = {30: 10, 300: 2}
"""Examples a domain, and how many draws of them are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clinc:
    """The set: questions of the training split by intent, of the test split with their domain, and others."""

    intents: dict[str, tuple[str, ...]]
    train: dict[str, tuple[str, ...]]
    test: tuple[tuple[str, str], ...]
    out_of_scope: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Clinc:
        """Read both files. Raises OSError, ValueError, KeyError."""
        data = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
        names = json.loads((folder / DOMAINS_FILE).read_text(encoding="utf-8"))
        intents = {
            _name(domain): tuple(sorted(_name(i) for i in found)) for domain, found in sorted(names.items())
        }
        domain_of = {intent: domain for domain, found in intents.items() for intent in found}
        train: dict[str, list[str]] = {}
        for text, intent in data["train"]:
            train.setdefault(_name(intent), []).append(text)
        return cls(
            intents=intents,
            train={intent: tuple(texts) for intent, texts in train.items()},
            test=tuple((text, domain_of[_name(intent)]) for text, intent in data["test"]),
            out_of_scope=tuple(text for text, _ in data["oos_test"]),
        )

    def draw(self, examples: int, seed: int) -> tuple[Domain, ...]:
        """Domains with that many examples each, evenly over their intents."""
        rng = Random(seed)
        return tuple(
            Domain(name=domain, description=domain.replace("_", " "), examples=tuple(texts))
            for domain, intents in self.intents.items()
            for texts in [[t for i in intents for t in rng.sample(self.train[i], examples // len(intents))]]
        )


def _name(raw: str) -> str:
    return raw.strip().lower().replace(" ", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one draw of examples gave. Times are the processor's; shares are from 0 to 1."""

    accuracy: float
    auroc: float
    train_s: float
    classify_ms: float
    named_in_scope: float
    named_out_of_scope: float


def run(clinc: Clinc, examples: int, seed: int) -> Trial:
    """Learn one draw and answer the whole test split."""
    domains = clinc.draw(examples, seed)
    started = time.process_time()
    classifier = Classifier.train(domains)
    trained = time.process_time()
    inside = [classifier.classify(text) for text, _ in clinc.test]
    outside = [classifier.classify(text) for text in clinc.out_of_scope]
    ended = time.process_time()
    right = [c.ranking[0][0] == domain for c, (_, domain) in zip(inside, clinc.test, strict=True)]
    return Trial(
        accuracy=statistics.mean(right),
        auroc=auroc([c.confidence for c in inside], [c.confidence for c in outside]),
        train_s=trained - started,
        classify_ms=(ended - trained) / (len(inside) + len(outside)) * 1000,
        named_in_scope=_named(inside),
        named_out_of_scope=_named(outside),
    )


def _named(found: Sequence[Classification]) -> float:
    return statistics.mean(c.domain is not None for c in found)


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores higher than a negative; ties count half."""
    ordered = sorted(negatives)
    wins = sum((bisect_left(ordered, p) + bisect_right(ordered, p)) / 2 for p in positives)
    return wins / (len(positives) * len(ordered))


def rows(clinc: Clinc) -> Iterator[Row]:
    """One row a measure, averaged over the draws, with the spread."""
    aims = {
        (30, "accuracy"): 0.80,
        (300, "accuracy"): 0.94,
        (30, "oos_auroc"): 0.80,
        (300, "oos_auroc"): 0.92,
    }
    trials = {n: [run(clinc, n, seed) for seed in range(draws)] for n, draws in DRAWS.items()}
    for n, found in trials.items():
        for measure, values, suffix in (
            ("accuracy", [t.accuracy for t in found], "_examples"),
            ("oos_auroc", [t.auroc for t in found], ""),
        ):
            yield Row(
                measure=f"{measure}_{n}{suffix}",
                unit="share" if measure == "accuracy" else "area",
                ours=statistics.mean(values),
                aim=aims[n, measure],
                higher_is_better=True,
                note=f"{min(values):.3f} to {max(values):.3f} over {len(values)} draws",
            )
    slowest = max(statistics.mean(t.classify_ms for t in found) for found in trials.values())
    yield Row(
        measure="classify_ms", unit="ms", ours=slowest, aim=1, note="processor time, mean of a question"
    )
    for n, found in trials.items():
        yield Row(
            measure=f"train_s_{n}",
            unit="s",
            ours=statistics.mean(t.train_s for t in found),
            note="processor time",
        )
        yield Row(
            measure=f"in_scope_named_{n}",
            unit="share",
            ours=statistics.mean(t.named_in_scope for t in found),
            note="not abstained on; the rest goes to the generalist",
        )
        yield Row(
            measure=f"out_of_scope_named_{n}",
            unit="share",
            ours=statistics.mean(t.named_out_of_scope for t in found),
            note="should have been abstained on",
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data", metavar="DIR", default=os.environ.get("FIELDMESH_BENCH_DATA", ""))
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    folder = Path(arguments.data)
    missing = [name for name in (DATA_FILE, DOMAINS_FILE) if not (folder / name).is_file()]
    if not arguments.data or missing:
        print(
            WHERE + (f"\nNot found in {folder}: {', '.join(missing)}" if arguments.data else ""),
            file=sys.stderr,
        )
        return 2
    try:
        clinc = Clinc.load(folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"{WHERE}\nThe files in {folder} cannot be read as such: {error!r}", file=sys.stderr)
        return 2
    return show(list(rows(clinc)), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
