"""Goal: an adapter changes what its model says, by its scale; one that does not fit is refused in words.
Method: random adapters for the tiny model, in this process and in the engine's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldmesh.core.errors import ModelFileInvalid
from fieldmesh.core.model import Adapter
from fieldmesh.core.steps import Slice
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.gguf import read_header
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.settings import EngineSettings
from tests.engine.tiny_model import EMBEDDING, write_tiny_adapter

PROMPT = tuple(3 + (7 * i) % 290 for i in range(40))


def settings(model: Path, *adapters: Adapter) -> EngineSettings:
    return EngineSettings(model_path=str(model), context_tokens=64, slots=1, adapters=adapters)


def logits(model: Path, *adapters: Adapter) -> np.ndarray:
    """What the model says after the prompt."""
    loaded = LlamaModel(settings(model, *adapters), lambda _share: None)
    rows = loaded.run([Slice(id="a", slot=0, position=0, token_ids=PROMPT, sample=True)])
    found = loaded.logits(rows["a"]).copy()
    loaded.close()
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter.gguf")


def test_an_adapter_changes_what_is_said_and_again_in_the_same_way(tiny_model: Path, adapter: Path) -> None:
    plain = logits(tiny_model)
    adapted = logits(tiny_model, Adapter(path=str(adapter)))
    assert np.abs(adapted - plain).max() > 0.1
    assert np.array_equal(logits(tiny_model, Adapter(path=str(adapter))), adapted)


def test_the_scale_weighs_the_adapter(tiny_model: Path, adapter: Path) -> None:
    plain = logits(tiny_model)
    near, far = (
        np.abs(logits(tiny_model, Adapter(path=str(adapter), scale=s)) - plain).max() for s in (0.1, 1.0)
    )
    assert 0 < near < far / 2
    assert np.array_equal(logits(tiny_model, Adapter(path=str(adapter), scale=0.0)), plain)


def test_two_adapters_work_together(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other.gguf", seed=8, weight="blk.0.attn_q.weight")
    both = logits(tiny_model, Adapter(path=str(adapter)), Adapter(path=str(other)))
    assert not np.array_equal(both, logits(tiny_model, Adapter(path=str(adapter))))
    assert not np.array_equal(both, logits(tiny_model, Adapter(path=str(other))))


# --- refusals ----------------------------------------------------------------------------------


def refusal(model: Path, adapter: Path) -> str:
    with pytest.raises(ModelFileInvalid) as error:
        check_adapters(settings(model, Adapter(path=str(adapter))), read_header(str(model)))
    assert error.value.field == "adapters"
    assert str(adapter) in error.value.message
    return error.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, "architecture qwen2, not llama"),
        ({"kind": "control_vector"}, "no LoRA adapter"),
        ({"inputs": 2 * EMBEDDING}, r"corrects a weight of \(128, 64\), the model's is \(64, 64\)"),
        ({"up_rank": 3}, "have the ranks 2 and 3"),
        ({"weight": "blk.9.attn_output.weight"}, "the model has no such weight"),
    ],
)
def test_an_adapter_for_something_else_is_refused_and_told_what_would_fit(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    message = refusal(tiny_model, write_tiny_adapter(tmp_path / "a.gguf", **changes))
    assert re.search(words, message)
    assert "trained on this model" in message


def test_a_model_is_no_adapter(tiny_model: Path) -> None:
    assert "no LoRA adapter" in refusal(tiny_model, tiny_model)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + b"x" * 100])
def test_a_foreign_file_is_refused(tiny_model: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    assert "not a GGUF file" in refusal(tiny_model, tmp_path / "a.gguf")


def test_a_cut_and_a_missing_file_are_told_apart(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(adapter.read_bytes()[:-40])
    assert "incomplete" in refusal(tiny_model, cut)
    assert "does not exist" in refusal(tiny_model, tmp_path / "none.gguf")


def test_what_llama_cpp_itself_refuses_is_told_in_words(tiny_model: Path, tmp_path: Path) -> None:
    wrong = write_tiny_adapter(tmp_path / "a.gguf", up_rank=3)
    with pytest.raises(ModelFileInvalid, match=r"a\.gguf.*trained on this model"):
        LlamaModel(settings(tiny_model, Adapter(path=str(wrong))), lambda _share: None)


# --- the engine's process ----------------------------------------------------------------------


async def fingerprint(engine_settings: EngineSettings) -> str:
    engine = EngineProcess(engine_settings)
    try:
        return (await engine.start()).fingerprint
    finally:
        await engine.close()


@pytest.mark.engine
async def test_the_fingerprint_names_model_adapter_and_scale(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = write_tiny_adapter(tmp_path / "other.gguf", seed=8)
    variants = [
        (),
        (Adapter(path=str(adapter)),),
        (Adapter(path=str(adapter), scale=0.5),),
        (Adapter(path=str(other)),),
    ]
    found = [await fingerprint(settings(tiny_model, *variant)) for variant in variants]
    assert len(set(found)) == len(found)
    moved = write_tiny_adapter(tmp_path / "moved.gguf")
    assert await fingerprint(settings(tiny_model, Adapter(path=str(moved)))) == found[1]


@pytest.mark.engine
async def test_the_engine_says_why_it_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    wrong = write_tiny_adapter(tmp_path / "a.gguf", architecture="qwen2")
    with pytest.raises(ModelFileInvalid, match="architecture qwen2"):
        await fingerprint(settings(tiny_model, Adapter(path=str(wrong))))
