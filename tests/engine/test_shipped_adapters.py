"""Goal: the shipped adapters make specialists of their profiles: they are what was trained, they load, they
change answers, and they know their domain's words better without forgetting the rest. Method: the default
model through llama.cpp, on a few texts held out; deploy/adapters/evaluate.py measures many.
"""

from __future__ import annotations

import colorsys
import hashlib
import inspect
import math
import statistics
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from fieldmesh import profiles
from fieldmesh.engine.adapters import check_adapters
from fieldmesh.engine.gguf import read_header
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import GREEDY, ask, chat

SHIPPED = ("code", "health")
BYTES_MAX = 2_000_000
QUESTIONS = {"code": "Write a function that reverses a string.", "health": "How do I stop a nosebleed?"}
HELD_OUT = tomllib.loads((Path(__file__).parents[1] / "data" / "held_out.toml").read_text())
FUNCTIONS: tuple[Callable[..., object], ...] = (colorsys.rgb_to_hls, statistics.median, textwrap.shorten)


def adapter_path(name: str) -> Path:
    (adapter,) = profiles.adapters(profiles.load(name))
    return Path(adapter.path)


def texts(kind: str) -> list[str]:
    if kind == "code":
        return [inspect.getsource(function) for function in FUNCTIONS]
    return [" ".join(text.split()) for text in HELD_OUT[kind].values()]


class Reader:
    """The default model, with an adapter or without."""

    def __init__(self, adapter: Path | None) -> None:
        self._known: dict[str, float] = {}
        path, lora = str(profiles.builtin_model()), str(adapter) if adapter else None
        self._model = llama_cpp.Llama(
            path,
            n_ctx=512,
            n_threads_batch=1,  # beside other load, one is faster than more
            flash_attn=False,
            logits_all=True,
            lora_path=lora,
            verbose=False,
        )

    def perplexity(self, kind: str) -> float:
        if kind not in self._known:
            losses = [self._losses(text) for text in texts(kind)]
            self._known[kind] = math.exp(sum(found.sum() for found in losses) / sum(map(len, losses)))
        return self._known[kind]

    def _losses(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        ids = self._model.tokenize(text.encode(), add_bos=False)
        self._model.reset()
        self._model.eval(ids)
        logits = self._model.scores[: len(ids) - 1]
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        return np.log(np.exp(logits).sum(axis=1, dtype=np.float64)) - chosen

    def close(self) -> None:
        self._model.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Reader]:
    made = Reader(None)
    yield made
    made.close()


def test_the_files_are_those_that_were_trained() -> None:
    folder = adapter_path("code").parent
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in folder.glob("*.gguf")} == {f"{name}.gguf" for name in SHIPPED}
    for name, digest in sums.items():
        data = (folder / name).read_bytes()
        assert len(data) <= BYTES_MAX
        assert hashlib.sha256(data).hexdigest() == digest


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_fits_the_default_model(name: str) -> None:
    profile, path = profiles.load(name), profiles.builtin_model()
    settings = EngineSettings(model_path=str(path), adapters=profiles.adapters(profile))
    assert check_adapters(settings, read_header(str(path))) > 0


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_has_a_rank_that_keeps_answers_exact(name: str) -> None:
    """Multiples of four are taken by llamafile's matrix code, which rounds otherwise for several tokens."""
    shapes = read_header(str(adapter_path(name))).shapes
    ranks = {shape[1] for tensor, shape in shapes.items() if tensor.endswith(".lora_a")}
    assert ranks and all(rank % 4 for rank in ranks)


@pytest.mark.engine
@pytest.mark.parametrize("name", SHIPPED)
async def test_a_shipped_adapter_changes_a_greedy_answer(name: str) -> None:
    profile = profiles.load(name)
    answers = []
    for adapters in ((), profiles.adapters(profile)):
        engine = EngineProcess(
            EngineSettings(
                model_path=str(profiles.builtin_model()),
                context_tokens=512,
                slots=1,
                adapters=adapters,
                system_prompt=profile.system_prompt,
            )
        )
        await engine.start()
        answers.append((await ask(engine, chat("a", QUESTIONS[name], GREEDY))).token_ids)
        await engine.close()
    assert answers[0] != answers[1]


@pytest.mark.engine
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_knows_its_domain_better_and_forgets_nothing(name: str, plain: Reader) -> None:
    adapted = Reader(adapter_path(name))
    try:
        assert adapted.perplexity(name) <= 0.95 * plain.perplexity(name)
        assert adapted.perplexity("general") <= 1.05 * plain.perplexity("general")
    finally:
        adapted.close()
