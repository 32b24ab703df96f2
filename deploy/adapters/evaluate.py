"""Perplexity with and without an adapter, through llama.cpp, on texts that were held out.

Owns: the measurement and its table. Must not: train. Runs where the node runs:

    python deploy/adapters/evaluate.py health [--adapter FILE] [--json]

The base is the shipped quantised model. A perplexity is exp of the mean negative log-likelihood of all marked
tokens of a kind. The exit status is 1 where the adapter misses an aim.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import llama_cpp
import numpy as np

from fieldmesh import profiles
from fieldmesh.engine.cores import cpu_budget

FOLDER = Path(".run/adapters")
CONTEXT_TOKENS = 1024
AIMS = {"domain, as asked": -10.0, "domain, running text": -10.0, "general, running text": 5.0}
"""Largest change of the perplexity, in percent."""


def likelihoods(model: llama_cpp.Llama, sequence: dict[str, list[int]]) -> tuple[float, int]:
    """Summed negative log-likelihood of the marked tokens, in nats, and how many they are."""
    ids, marks = sequence["ids"][:CONTEXT_TOKENS], sequence["marks"]
    model.reset()
    model.eval(ids)
    places = [i for i in range(1, len(ids)) if marks[i]]
    logits = np.asarray(model.scores[: len(ids)])[[i - 1 for i in places]].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(places)), [ids[i] for i in places]]
    return float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum()), len(places)


def measure(texts: dict[str, list[dict[str, list[int]]]], adapter: Path | None) -> dict[str, float]:
    """Perplexity of every kind of held-out text."""
    model = llama_cpp.Llama(
        str(profiles.builtin_model()),
        n_ctx=CONTEXT_TOKENS,
        n_threads_batch=cpu_budget(),
        flash_attn=False,
        logits_all=True,
        lora_path=str(adapter) if adapter else None,
        verbose=False,
    )
    made = {}
    for kind, sequences in texts.items():
        sums = [likelihoods(model, s) for s in sequences]
        made[kind] = math.exp(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
    model.close()
    return made


def main() -> int:
    """Measure, print, and say whether the aims are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("profile", choices=["code", "health"])
    parser.add_argument("--adapter", type=Path, help="[default: what train.py wrote]")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    texts = json.loads((FOLDER / f"{given.profile}.json").read_text())["held_out"]
    base = measure(texts, None)
    adapted = measure(texts, given.adapter or FOLDER / f"{given.profile}.gguf")
    rows = [
        {
            "text": kind,
            "tokens": sum(sum(s["marks"]) for s in texts[kind]),
            "base": base[kind],
            "adapted": adapted[kind],
            "change_percent": 100 * (adapted[kind] / base[kind] - 1),
            "aim_percent_max": AIMS.get(kind),
        }
        for kind in texts
    ]
    if given.json:
        print(json.dumps({"profile": given.profile, "perplexities": rows}, indent=2))
    else:
        print(f"{'held-out text':24} {'tokens':>7} {'base':>8} {'adapted':>8} {'change':>8}  aim")
        for row in rows:
            aim = f"at most {row['aim_percent_max']:+.0f} %" if row["aim_percent_max"] is not None else ""
            print(
                f"{row['text']:24} {row['tokens']:7} {row['base']:8.2f} {row['adapted']:8.2f} "
                f"{row['change_percent']:+7.1f}%  {aim}"
            )
    return int(any(row["change_percent"] > AIMS.get(row["text"], math.inf) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
