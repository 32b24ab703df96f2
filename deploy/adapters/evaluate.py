"""What an adapter gains and costs, through llama.cpp: perplexity on texts held out, and time of a token.

Owns: the measurements and their tables. Must not: train. Runs where the node runs:

    python deploy/adapters/evaluate.py health [--adapter FILE] [--json]
    python deploy/adapters/evaluate.py health --speed

The base is the shipped quantised model. A perplexity is exp of the mean negative log-likelihood of all marked
tokens of a kind. The exit status is 1 where the adapter misses an aim.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from itertools import takewhile
from pathlib import Path

import llama_cpp
import numpy as np

from fieldmesh import profiles

FOLDER = Path(".run/adapters")
CONTEXT_TOKENS = 1024
SPEED_RUNS, SPEED_TOKENS = 9, 64
AIMS = {"domain, as asked": -10.0, "domain, running text": -10.0, "general, running text": 5.0}
"""Largest change of the perplexity, in percent."""


def likelihoods(model: llama_cpp.Llama, sequence: dict[str, list[int]]) -> tuple[float, int]:
    """Summed negative log-likelihood of the marked tokens, in nats, and how many they are.

    What the sequence before began with too (a system prompt) is not computed again, up to the first mark.
    """
    ids, marks = sequence["ids"][:CONTEXT_TOKENS], sequence["marks"]
    places = [i for i in range(1, len(ids)) if marks[i]]
    kept = zip(model.input_ids[: model.n_tokens], ids[: places[0] - 1], strict=False)
    model.n_tokens = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], kept))
    model.eval(ids[model.n_tokens :])
    logits = model.scores[[i - 1 for i in places]]
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(places)), [ids[i] for i in places]]
    sums = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
    return float((np.log(sums) - chosen).sum()), len(places)


def load(adapter: Path | None, *, logits_all: bool = True) -> llama_cpp.Llama:
    """The shipped model, with the adapter if there is one."""
    return llama_cpp.Llama(
        str(profiles.builtin_model()),
        n_ctx=CONTEXT_TOKENS,
        n_threads=1,  # beside other load, one is faster than more
        n_threads_batch=1,
        flash_attn=False,
        logits_all=logits_all,
        lora_path=str(adapter) if adapter else None,
        verbose=False,
    )


def measure(texts: dict[str, list[dict[str, list[int]]]], adapter: Path | None) -> dict[str, float]:
    """Perplexity of every kind of held-out text."""
    model = load(adapter)
    made = {}
    for kind, sequences in texts.items():
        sums = [likelihoods(model, s) for s in sequences]
        made[kind] = math.exp(sum(nats for nats, _ in sums) / sum(count for _, count in sums))
    model.close()
    return made


def time_tokens(adapter: Path) -> None:
    """Print what a token takes of one core, read in a prompt and written in an answer: processor time, in
    medians of alternating runs."""
    models = {"base": load(None, logits_all=False), "adapted": load(adapter, logits_all=False)}
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(SPEED_RUNS):
        for name, model in models.items():
            model.reset()
            began = time.process_time()
            model.eval(list(range(1000, 1000 + SPEED_TOKENS)))
            read = time.process_time()
            for token in range(1000, 1000 + SPEED_TOKENS):
                model.eval([token])
            written = time.process_time()
            taken.setdefault(("read", name), []).append((read - began) / SPEED_TOKENS)
            taken.setdefault(("written", name), []).append((written - read) / SPEED_TOKENS)
    print(f"{'ms a token':10} {'base':>8} {'adapted':>8} {'change':>8}")
    for what in ("read", "written"):
        base, adapted = (1000 * statistics.median(taken[what, name]) for name in models)
        print(f"{what:10} {base:8.3f} {adapted:8.3f} {100 * (adapted / base - 1):+7.1f}%")


def main() -> int:
    """Measure, print, and say whether the aims are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("profile", choices=["code", "health"])
    parser.add_argument("--adapter", type=Path, help="[default: what train.py wrote]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--speed", action="store_true", help="measure the time of tokens instead")
    given = parser.parse_args()
    adapter = given.adapter or FOLDER / f"{given.profile}.gguf"
    if given.speed:
        time_tokens(adapter)
        return 0
    held_out = json.loads((FOLDER / f"{given.profile}.json").read_text())["held_out"]
    texts = {kind: held_out[kind] for kind in AIMS}
    base = measure(texts, None)
    adapted = measure(texts, adapter)
    changes = {kind: 100 * (adapted[kind] / base[kind] - 1) for kind in texts}
    rows = [
        {
            "text": kind,
            "tokens": sum(sum(s["marks"]) for s in texts[kind]),
            "base": base[kind],
            "adapted": adapted[kind],
            "change_percent": changes[kind],
            "aim_percent_max": AIMS[kind],
        }
        for kind in texts
    ]
    if given.json:
        print(json.dumps({"profile": given.profile, "perplexities": rows}, indent=2))
    else:
        print(f"{'held-out text':24} {'tokens':>7} {'base':>8} {'adapted':>8} {'change':>8}  aim")
        for row in rows:
            print(
                f"{row['text']:24} {row['tokens']:7} {row['base']:8.2f} {row['adapted']:8.2f} "
                f"{row['change_percent']:+7.1f}%  at most {row['aim_percent_max']:+.0f} %"
            )
    return int(any(changes[kind] > AIMS[kind] for kind in texts))


if __name__ == "__main__":
    sys.exit(main())
