"""Goal: what the scheduler decides about the cache is right in the real one: shared prefixes are computed
once, answers do not change.

Method: the engine's loop over tiny random models in this process, stepped by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fieldmesh.core.model import Priority, Prompt, Sampling, Usage
from fieldmesh.engine.frames import Done, Report, Submit, Tokens
from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.loop import EngineLoop
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from tests.engine.tiny_model import write_tiny_model

GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.5, seed=11)


def tokens_from(first: int, count: int) -> tuple[int, ...]:
    return tuple(3 + (first + 7 * i) % 290 for i in range(count))


@dataclass
class Bench:
    """The loop, its answers, and how many tokens it had the model compute."""

    model: LlamaModel
    loop: EngineLoop
    computed: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)
    usages: dict[int, Usage] = field(default_factory=dict)
    keys: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    clock: Iterator[int] = field(default_factory=itertools.count)

    def ask(self, prompt: tuple[int, ...], sampling: Sampling = GREEDY, **more: object) -> int:
        key = next(self.keys)
        job = Job(generation_id=str(key), prompt=Prompt(token_ids=prompt), sampling=sampling, **more)  # type: ignore[arg-type]
        self.answers[key] = []
        self.take(self.loop.handle(Submit(key, job, None), next(self.clock)))
        return key

    def step(self) -> bool:
        plan, reports = self.loop.plan(next(self.clock))
        self.take(reports)
        if plan.slices:
            self.computed += plan.tokens
            self.take(self.loop.run(plan, lambda: next(self.clock)))
        return bool(plan.slices)

    def run(self) -> None:
        """Until nothing runs, waits or is being moved."""
        while self.step() or self.loop.batcher.load().queued or not self.idle():
            pass

    def idle(self) -> bool:
        cache = self.loop.batcher.cache
        return cache.transfer_free

    def close(self) -> None:
        self.loop.close()
        self.model.close()

    def take(self, reports: list[Report]) -> None:
        for report in reports:
            if isinstance(report, Tokens):
                self.answers[report.key].extend(report.token_ids)
            elif isinstance(report, Done):
                self.usages[report.key] = report.completion.usage

    def answer(self, prompt: tuple[int, ...], sampling: Sampling = GREEDY) -> list[int]:
        key = self.ask(prompt, sampling)
        self.run()
        return self.answers[key]


def make_bench(path: Path, **more: object) -> Bench:
    settings = EngineSettings(model_path=str(path), context_tokens=1024, slots=4, ageing_s=1000.0)
    settings = replace(settings, **more)  # type: ignore[arg-type]
    model = LlamaModel(settings, lambda _: None)
    bench = Bench(model, EngineLoop(settings, model, lambda: 1))
    bench.loop.warm_up(lambda: next(bench.clock))
    if settings.state_bytes_max:
        bench.loop.keep_states(model, model.state_facts(), -1, wake=lambda: None)
    return bench


@pytest.fixture(scope="module")
def quiet(tiny_model: Path) -> Iterator[Bench]:
    """What an answer is without neighbours, prefixes or states."""
    made = make_bench(tiny_model, slots=1, reuse_prefixes=False)
    yield made
    made.close()


def test_sixteen_who_arrive_together_compute_their_shared_600_tokens_once(
    tiny_model: Path, quiet: Bench
) -> None:
    bench = make_bench(tiny_model, slots=16)
    shared = tokens_from(0, 600)
    prompts = [(*shared, *tokens_from(1000 + i, 20)) for i in range(16)]
    keys = [bench.ask(prompt) for prompt in prompts]
    bench.run()
    assert sum(bench.usages[k].prompt_tokens - bench.usages[k].cached_tokens for k in keys) == 600 + 16 * 20
    assert bench.computed == 600 + 16 * 20 + 16 * (GREEDY.max_tokens - 1)
    assert [bench.answers[k] for k in keys] == [quiet.answer(p) for p in prompts]
    bench.close()


@pytest.mark.parametrize(
    "kept",
    [{"reuse_prefixes": False}, {}, {"state_bytes_max": 1 << 24}],
    ids=["computed again", "parked", "saved"],
)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_preempted_stream_draws_what_it_would_have_drawn(
    tiny_model: Path, quiet: Bench, sampling: Sampling, kept: dict[str, Any]
) -> None:
    long = replace(sampling, max_tokens=60)
    bench = make_bench(tiny_model, slots=1, **kept)
    batch = bench.ask(tokens_from(0, 100), long, priority=Priority.BATCH)
    while len(bench.answers[batch]) < 20:
        bench.step()
    interactive = bench.ask(tokens_from(50, 100), sampling, priority=Priority.INTERACTIVE)
    bench.run()
    assert list(bench.usages) == [interactive, batch]
    assert bench.answers[batch] == quiet.answer(tokens_from(0, 100), long)
    assert bench.answers[interactive] == quiet.answer(tokens_from(50, 100), sampling)
    again = 0 if kept.get("reuse_prefixes", True) else 119
    assert bench.computed == 100 + 59 + again + 100 + 11
    bench.close()


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_other_architectures_reuse_what_their_cache_allows(tmp_path: Path, kind: str) -> None:
    """Sliding windows: any prefix. Recurrent layers: a conversation goes on, another question begins anew."""
    path = write_tiny_model(
        tmp_path / "tiny.gguf", window=16 if kind == "window" else 0, recurrent=kind == "recurrent"
    )
    bench, alone = make_bench(path), make_bench(path, reuse_prefixes=False)
    first = tokens_from(0, 100)
    said = bench.answer(first)
    assert said == alone.answer(first)
    cached = []
    for prompt in [(*first, *said, *tokens_from(77, 30)), (*first[:80], *tokens_from(500, 30))]:
        key = bench.ask(prompt)
        bench.run()
        assert bench.answers[key] == alone.answer(prompt)
        cached.append(bench.usages[key].cached_tokens)
    assert cached == ([111, 80] if kind == "window" else [111, 0])
    bench.close()
    alone.close()


# --- saved states ------------------------------------------------------------------------------

KEPT = 1 << 26
STORY, OTHER = tokens_from(0, 400), tokens_from(100, 400)


def ask_three(bench: Bench) -> int:
    """A story, something else in the same slot, the story again; the cached tokens of the last."""
    for prompt in (STORY, OTHER):
        bench.answer(prompt)
    key = bench.ask((*STORY, 5, 6, 7))
    bench.run()
    return bench.usages[key].cached_tokens


@pytest.mark.parametrize("folder", ["", "states"])
def test_a_retired_sequence_comes_back_as_it_was(
    tiny_model: Path, quiet: Bench, tmp_path: Path, folder: str
) -> None:
    where = str(tmp_path / folder) if folder else ""
    bench = make_bench(tiny_model, slots=1, state_bytes_max=KEPT, state_folder=where)
    assert ask_three(bench) == 400
    assert bench.answers[max(bench.answers)] == quiet.answer((*STORY, 5, 6, 7))
    bench.close()


def test_saved_states_outlive_the_engine(tiny_model: Path, quiet: Bench, tmp_path: Path) -> None:
    for cached in (0, 402):
        bench = make_bench(tiny_model, slots=1, state_bytes_max=KEPT, state_folder=str(tmp_path))
        key = bench.ask((*STORY, 5, 6, 7))
        bench.run()
        assert bench.usages[key].cached_tokens == cached
        assert bench.answers[key] == quiet.answer((*STORY, 5, 6, 7))
        bench.close()


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b"something else"),
        lambda path: path.rename(path.with_name("0" * 32 + ".state")),
        lambda path: path.rename(path.with_name(path.name + ".part")),
    ],
    ids=["damaged", "torn", "foreign", "misnamed", "unfinished"],
)
def test_a_bad_file_is_removed_and_its_tokens_are_computed(
    tiny_model: Path, quiet: Bench, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    bench = make_bench(tiny_model, slots=1, state_bytes_max=KEPT, state_folder=str(tmp_path))
    bench.answer(STORY)
    bench.close()
    (path,) = tmp_path.iterdir()
    harm(path)
    (bad,) = (p.name for p in tmp_path.iterdir())
    bench = make_bench(tiny_model, slots=1, state_bytes_max=KEPT, state_folder=str(tmp_path))
    key = bench.ask((*STORY, 5, 6, 7))
    bench.run()
    assert bench.usages[key].cached_tokens == 0
    assert bench.answers[key] == quiet.answer((*STORY, 5, 6, 7))
    bench.close()
    assert bad == path.name or bad not in {p.name for p in tmp_path.iterdir()}


def test_states_made_with_other_arithmetic_are_removed(tiny_model: Path, tmp_path: Path) -> None:
    for flash in (True, False):
        bench = make_bench(
            tiny_model, slots=1, state_bytes_max=KEPT, state_folder=str(tmp_path), flash_attention=flash
        )
        key = bench.ask((*STORY, 5, 6, 7))
        bench.run()
        assert bench.usages[key].cached_tokens == 0
        bench.close()


def test_files_of_others_in_the_folder_are_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    make_bench(tiny_model, state_bytes_max=KEPT, state_folder=str(tmp_path)).close()
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_the_folder_stays_within_its_bytes(tiny_model: Path, tmp_path: Path) -> None:
    bench = make_bench(tiny_model, slots=1, state_bytes_max=300_000, state_folder=str(tmp_path))
    for first in range(6):
        bench.answer(tokens_from(37 * first, 400))
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 300_000
    assert len(list(tmp_path.iterdir())) >= 1
    bench.close()
