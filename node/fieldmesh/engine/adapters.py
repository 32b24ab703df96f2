"""LoRA adapter files, looked at before llama.cpp sees them.

Owns: telling an adapter that fits a model from one that does not, in words. Must not: load tensors.
"""

from __future__ import annotations

from fieldmesh.core.errors import ModelFileInvalid
from fieldmesh.engine.gguf import GgufHeader, read_header
from fieldmesh.engine.settings import EngineSettings

RANK_MAX = 1024


def check_adapters(settings: EngineSettings, model: GgufHeader) -> int:
    """The size of all adapters in bytes. Raises ModelFileInvalid for one that does not fit the model."""
    return sum(_check(adapter.path, model) for adapter in settings.adapters)


def _check(path: str, model: GgufHeader) -> int:
    try:
        header = read_header(path)
    except ModelFileInvalid as error:
        raise ModelFileInvalid(f"the adapter cannot be used: {error.message}", field="adapters") from None
    kind = header.keys.get("general.type"), header.keys.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise _unfit(path, "is a model or another kind of file and no LoRA adapter")
    if header.architecture != model.architecture:
        raise _unfit(path, f"was made for the architecture {header.architecture}, not {model.architecture}")
    for name in header.shapes:
        if not name.endswith((".lora_a", ".lora_b")):
            raise _unfit(path, f"holds the tensor {name}, which corrects no weight of a model")
    for name in {name.rpartition(".")[0] for name in header.shapes}:
        problem = _mismatch(
            model.shapes.get(name), header.shapes.get(f"{name}.lora_a"), header.shapes.get(f"{name}.lora_b")
        )
        if problem:
            raise _unfit(path, f"does not fit at {name}: {problem}")
    return header.weights_bytes


def _mismatch(
    weight: tuple[int, ...] | None, down: tuple[int, ...] | None, up: tuple[int, ...] | None
) -> str:
    """Why a pair of tensors cannot correct a weight; all shapes are (inputs, outputs)."""
    if weight is None:
        return "the model has no such weight"
    if down is None or up is None:
        return "one of its two tensors is missing"
    if len(weight) != 2 or len(down) != 2 or len(up) != 2:
        return f"shapes {down} and {up} for a weight of {weight}"
    if down[0] != weight[0] or up[1] != weight[1]:
        return f"it corrects a weight of {(down[0], up[1])}, the model's is {weight}"
    if down[1] != up[0] or not 1 <= down[1] <= RANK_MAX:
        return f"its two tensors have the ranks {down[1]} and {up[0]}"
    return ""


def _unfit(path: str, problem: str) -> ModelFileInvalid:
    return ModelFileInvalid(
        f"the adapter file {path} {problem}; use a LoRA adapter in GGUF format, trained on this model",
        field="adapters",
    )
