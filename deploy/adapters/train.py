"""Trains the LoRA adapters of shipped profiles on the quantised model that they run.

Owns: the trained layers, the optimiser, checkpoints, the adapter's file. Must not: choose texts (texts.py) or
judge the result (evaluate.py). Runs in an environment of its own, made from requirements.txt:

    python deploy/adapters/train.py health code --model PATH/SmolLM2-135M-Instruct.Q4_1.gguf

The base is llama.cpp's quantised file, dequantised: the adapter learns to correct the weights that it will
meet. Only the two projections that write into the residual stream are adapted (attention output,
feed-forward down), in the upper layers: on a CPU each adapted projection costs time in every step. Code takes
more of them, for with 16 it gains too little on running text. Computed in bfloat16 with the adapter's own
weights in float32. Ended at any time, it goes on from its last checkpoint; the same seed and the same texts
give the same order of steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

FOLDER = Path(".run/adapters")
SEED = 20
RANK, ALPHA = 9, 16.0  # no multiple of four: so an answer is the same alone and in company (engine.llama)
FIRST_LAYER = {"health": 14, "code": 4}
TARGETS = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
LEARNING_RATE, WARM_UP_STEPS = 2e-3, 4
STEP_TOKENS = 500
CHECKPOINT_STEPS = 2
TOKENS = {
    "health": {
        "domain, as asked": 16_000,
        "domain, running text": 7_000,
        "general, as asked": 3_000,
        "general, running text": 4_000,
    },
    "code": {
        "domain, as asked": 20_000,
        "domain, running text": 24_000,
        "general, as asked": 1_500,
        "general, running text": 2_500,
    },
}
"""How much of each kind a profile learns from, once. General text keeps the model from forgetting it."""


class Lora(torch.nn.Module):  # type: ignore[misc]
    """A frozen linear layer and a trained correction of low rank (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.empty(RANK, base.in_features))
        self.b = torch.nn.Parameter(torch.empty(base.out_features, RANK))

    def reset(self) -> None:
        """Begin as no correction at all."""
        torch.nn.init.normal_(self.a, std=self.base.in_features**-0.5)
        torch.nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        correction = x.float() @ self.a.T @ self.b.T * (ALPHA / RANK)
        return self.base(x) + correction.to(x.dtype)


def load_model(path: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The base, frozen."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def adapt(model: transformers.PreTrainedModel, first_layer: int) -> dict[str, Lora]:
    """Puts adapters into the model; returns them by the name of their tensor in the GGUF file."""
    made = {}
    for number, layer in enumerate(model.model.layers):
        if number < first_layer:
            continue
        for tensor, place in TARGETS.items():
            parent, name = layer.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
            lora = Lora(getattr(parent, name))
            setattr(parent, name, lora)
            made[f"blk.{number}.{tensor}.weight"] = lora
    return made


def steps(
    texts: dict[str, list[dict[str, list[int]]]], most: dict[str, int]
) -> list[list[dict[str, list[int]]]]:
    """Sequences in the order of their steps, each kind spread over all of them."""
    rng = random.Random(SEED)
    chosen = []
    for kind, tokens_max in most.items():
        tokens = 0
        for sequence in texts[kind]:
            if tokens >= tokens_max:
                break
            tokens += len(sequence["ids"])
            chosen.append((tokens / tokens_max + rng.random() / 10, sequence))
    made: list[list[dict[str, list[int]]]] = [[]]
    for _, sequence in sorted(chosen, key=lambda entry: entry[0]):
        if sum(len(s["ids"]) for s in made[-1]) >= STEP_TOKENS:
            made.append([])
        made[-1].append(sequence)
    return made


def loss_of(model: transformers.PreTrainedModel, sequence: dict[str, list[int]]) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood of the marked tokens, in nats, and how many they are."""
    ids = torch.tensor([sequence["ids"]])
    marked = torch.tensor(sequence["marks"][1:]).bool()
    hidden = model.model(input_ids=ids).last_hidden_state[0, :-1][marked]
    logits = model.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:][marked], reduction="sum"), int(marked.sum())


def train(
    model: transformers.PreTrainedModel,
    loras: dict[str, Lora],
    plan: list[list[dict[str, list[int]]]],
    checkpoint: Path,
) -> None:
    """One pass over the plan, from the last checkpoint if there is one."""
    weights = torch.nn.ModuleDict({name.replace(".", "/"): lora for name, lora in loras.items()})
    trained = [p for p in weights.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for parameter, value in zip(trained, saved["trained"], strict=True):
            parameter.data.copy_(value)
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    for number in range(first, len(plan)):
        began = time.monotonic()
        left = (len(plan) - number) / len(plan)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (number + 1) / WARM_UP_STEPS) * left
        total, marked = 0.0, sum(sum(s["marks"][1:]) for s in plan[number])
        for sequence in plan[number]:
            loss, _ = loss_of(model, sequence)
            (loss / marked).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        took_s = time.monotonic() - began
        print(f"step {number + 1}/{len(plan)}: {total / marked:.3f} nats a token, {took_s:.0f} s", flush=True)
        if (number + 1) % CHECKPOINT_STEPS == 0 or number + 1 == len(plan):
            state = {"trained": trained, "optimiser": optimiser.state_dict(), "step": number + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)


def write(path: Path, profile: str, loras: dict[str, Lora]) -> None:
    """The adapter as llama.cpp reads it: float16, each tensor beside the name of the weight it corrects."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    writer.add_name(f"fieldmesh-{profile}")
    writer.add_license("CC-BY-SA-4.0")
    writer.add_description(f"LoRA for SmolLM2-135M-Instruct: the shipped profile {profile}")
    for name, lora in loras.items():
        writer.add_tensor(f"{name}.lora_a", lora.a.detach().numpy().astype(np.float16))
        writer.add_tensor(f"{name}.lora_b", lora.b.detach().numpy().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Train the adapters, one after the other, and write them beside their texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("profiles", nargs="+", choices=["code", "health"])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file that the profile runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--float32",
        action="store_true",
        help="for processors that do not compute in bfloat16: 40 times faster",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for profile in given.profiles:
        model = load_model(given.model, torch.float32 if given.float32 else torch.bfloat16)
        loras = adapt(model, FIRST_LAYER[profile])
        torch.manual_seed(SEED)
        for lora in loras.values():
            lora.reset()
        texts = (FOLDER / f"{profile}.json").read_bytes()
        key = hashlib.sha256(texts + Path(__file__).read_bytes()).hexdigest()[
            :12
        ]  # these alone go on from it
        plan = steps(json.loads(texts)["learnt"], TOKENS[profile])
        train(model, loras, plan, FOLDER / f"{profile}-{key}.checkpoint")
        path = FOLDER / f"{profile}.gguf"
        write(path, profile, loras)
        print(f"{path}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
