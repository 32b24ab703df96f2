"""Goal: a model's first start on a box measures what suits it, briefly; later ones take it from the file, as
long as nothing that it depends on has changed. Method: real processes with a tiny model, and the file between
them; the order of trials and the choice are ``tests/core/test_tuning.py``'s."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.core.errors import ConfigError
from fieldmesh.core.tuning import Choice
from fieldmesh.engine.fingerprint import fingerprint
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.llama import LIBRARY_VERSION, LlamaModel
from fieldmesh.engine.measuring import Tuning
from fieldmesh.engine.port import EngineInfo
from fieldmesh.engine.settings import MEASURABLE, EngineSettings
from tests.engine.asking import GREEDY, ask, job

FACTS = {"file": "f", "library": "1"}


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> EngineSettings:
    return EngineSettings(
        model_path=str(tiny_model),
        slots=2,
        context_tokens=512,
        threads=2,
        measured=MEASURABLE,
        measured_file=str(tmp_path / "measured" / "tiny.json"),
    )


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that advances with every look at it."""
    return (n * step_s for n in itertools.count()).__next__


def measured(
    settings: EngineSettings, wall_s: float = 0.001, cpu_s: float = 0.001, facts: dict[str, str] = FACTS
) -> tuple[Choice, list[float]]:
    """Measure in this process, on clocks that advance by so much at every look."""
    model = LlamaModel(settings, lambda share: None)
    shares: list[float] = []
    try:
        tuning = Tuning(settings, facts)
        return tuning.measure(model, ticking(wall_s), ticking(cpu_s * 2), shares.append).choice, shares
    finally:
        model.close()


def edit(settings: EngineSettings, **changes: object) -> None:
    """Change what is kept."""
    path = Path(settings.measured_file)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def is_kept(settings: EngineSettings) -> bool:
    return Path(settings.measured_file).exists()


async def started(settings: EngineSettings) -> EngineInfo:
    engine = EngineProcess(settings)
    info = await engine.start()
    await engine.close()
    return info


async def test_a_first_start_measures_and_says_so(settings: EngineSettings) -> None:
    engine = EngineProcess(settings)
    info = await engine.start()
    assert 1 <= info.threads <= 2
    assert 32 <= info.prefill_tokens <= 256
    assert 2 + 16 <= info.mixed_tokens <= 256
    assert "1 thread: a token" in info.measured
    answer = await ask(engine, job("a"))
    await engine.close()
    fixed = EngineProcess(replace(settings, measured=(), measured_file=""))
    await fixed.start()
    assert (await ask(fixed, job("a"))).token_ids == answer.token_ids, "what is measured changes no answer"
    await fixed.close()


def test_a_later_start_takes_what_is_kept(settings: EngineSettings) -> None:
    tuning = Tuning(settings, FACTS)
    measured(settings)
    edit(settings, choice={"threads": 1, "prefill_tokens": 48, "mixed_tokens": 24})
    found = tuning.recall()
    assert found is not None
    assert tuning.applied(found.choice) == replace(settings, threads=1, prefill_tokens=48, mixed_tokens=24)


async def test_an_engine_uses_what_an_earlier_one_kept(settings: EngineSettings) -> None:
    measured(settings, facts={"file": fingerprint(settings), "library": LIBRARY_VERSION})
    edit(settings, words="kept", choice={"threads": 1, "prefill_tokens": 48, "mixed_tokens": 24})
    info = await started(settings)
    assert (info.threads, info.prefill_tokens, info.mixed_tokens, info.measured) == (1, 48, 24, "kept")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: (replace(s, threads=1), FACTS),
        lambda s: (replace(s, slots=1), FACTS),
        lambda s: (replace(s, kv_type="q8_0"), FACTS),
        lambda s: (replace(s, measured=("threads",)), FACTS),
        lambda s: (s, FACTS | {"file": "g"}),
        lambda s: (s, FACTS | {"library": "2"}),
    ],
)
def test_what_was_measured_under_other_conditions_does_not_count(
    settings: EngineSettings, change: Callable[[EngineSettings], tuple[EngineSettings, dict[str, str]]]
) -> None:
    measured(settings)
    assert Tuning(settings, FACTS).recall() is not None
    assert Tuning(*change(settings)).recall() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: b"not JSON",
        lambda kept: json.dumps(kept)[:-5].encode(),
        lambda kept: json.dumps(kept | {"choice": kept["choice"] | {"threads": 64}}).encode(),
        lambda kept: json.dumps(kept | {"choice": kept["choice"] | {"threads": "2"}}).encode(),
        lambda kept: json.dumps(kept | {"words": "x" * 2000}).encode(),
        lambda kept: b" " * 100_000 + json.dumps(kept).encode(),
    ],
)
def test_a_file_that_is_damaged_or_out_of_bounds_is_measured_anew(
    settings: EngineSettings, damage: Callable[[dict[str, Any]], bytes]
) -> None:
    measured(settings)
    path = Path(settings.measured_file)
    path.write_bytes(damage(json.loads(path.read_bytes())))
    assert Tuning(settings, FACTS).recall() is None


def test_what_a_busy_box_shows_is_used_and_not_kept(settings: EngineSettings) -> None:
    measured(settings, wall_s=0.01, cpu_s=0.001)
    assert not is_kept(settings)


def test_progress_rises_with_the_time_that_passes(settings: EngineSettings) -> None:
    _, shares = measured(settings, wall_s=0.02, cpu_s=0.02)
    assert shares == sorted(shares) and shares[0] == 0.0 and 0.5 < shares[-2] < shares[-1] == 1.0


def test_what_may_not_be_written_is_measured_again_and_fails_nobody(settings: EngineSettings) -> None:
    Path(settings.measured_file).parent.write_text("in the way")
    assert measured(settings)[0].threads >= 1


async def test_fixed_settings_are_not_measured(settings: EngineSettings) -> None:
    info = await started(replace(settings, measured=()))
    assert (info.threads, info.prefill_tokens, info.mixed_tokens, info.measured) == (2, 256, 48, "")
    assert not is_kept(settings)


def test_only_what_changes_no_answer_can_be_measured(settings: EngineSettings) -> None:
    with pytest.raises(ConfigError, match="kv_type"):
        replace(settings, measured=("threads", "kv_type")).validate()


# --- graphics cards ----------------------------------------------------------------------------


async def test_a_build_without_gpu_refuses_layers_for_it_in_words(settings: EngineSettings) -> None:
    engine = EngineProcess(replace(settings, n_gpu_layers=8))
    with pytest.raises(ConfigError, match=r"n_gpu_layers is 8.*CMAKE_ARGS") as refused:
        await engine.start()
    assert refused.value.field == "n_gpu_layers"
    await engine.close()


async def test_cards_and_shares_reach_the_library(settings: EngineSettings) -> None:
    engine = EngineProcess(replace(settings, main_gpu=1, tensor_split=(3.0, 1.0)))
    await engine.start()
    assert (await ask(engine, job("a", sampling=replace(GREEDY, max_tokens=2)))).token_ids
    await engine.close()


@pytest.mark.parametrize("shares", [(0.0, 0.0), (-1.0,), (float("nan"),), (1.0,) * 17])
def test_shares_that_are_none_are_refused(settings: EngineSettings, shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="tensor_split"):
        replace(settings, tensor_split=shares).validate()
