"""Answers do not depend on who else is there, on interruptions, or on guesses.

Goal: the logits behind every token are bit-identical in a crowd and alone, with prefixes computed and reused,
resumed after any token, and where a draft foresaw it.
Method: the engine's loop over the real model in this process; requests join a running batch at random steps,
and every row that is drawn from is compared with that of a quiet run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fieldmesh.core.model import Adapter, Message, Prompt, Sampling
from fieldmesh.engine.drawing import Sampler
from fieldmesh.engine.frames import Submit, Tokens
from fieldmesh.engine.llama import LlamaModel
from fieldmesh.engine.loop import Drawn, EngineLoop, Walk
from fieldmesh.engine.port import Job
from fieldmesh.engine.settings import EngineSettings
from fieldmesh.profiles import builtin_model
from tests.engine.tiny_model import write_tiny_adapter

QUESTIONS = (
    "How do I reverse a list in Python?",
    "How should I clean a small cut?",
    "What are the signs of dehydration?",
    "Write a short note to thank a colleague",
    "Tell me about the city of Lisbon",
)
TOKENS = 24
GREEDY = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SEEDED = Sampling(temperature=0.9, seed=5, max_tokens=TOKENS, ignore_eos=True)
COPIED = (
    "Alder, birch, cedar, elm, hazel, larch, maple, oak, pine, rowan, spruce, willow. " * 2 + "Alder, birch,"
)
SYSTEM_PROMPT = "You are a careful helper. Answer in full sentences, and say so where you are not sure."


class Recorded:
    """A sampler that keeps the logits it draws from."""

    def __init__(self, inner: Sampler, model: LlamaModel, rows: list[bytes]) -> None:
        self._inner, self._model, self._rows = inner, model, rows

    def draw(self, row: int, index: int, forced: int | None = None) -> Drawn:
        self._rows.append(self._model.logits(row).tobytes())
        return self._inner.draw(row, index, forced)


class Bench:
    """The loop, stepped by hand."""

    def __init__(self, settings: EngineSettings) -> None:
        self.model = LlamaModel(settings, lambda _: None)
        self._rows: dict[int, list[bytes]] = {}
        self._keys = itertools.count(1)
        self._clock = itertools.count()
        self._coming = 0
        self.answers: dict[int, list[int]] = {}
        self.drafted = 0
        plain = self.model.sampler

        def sampler(
            sampling: Sampling,
            seed: int,
            resumed: Sequence[int],
            prompt: Sequence[int],
            walk: Walk | None = None,
        ) -> Recorded:
            return Recorded(
                plain(sampling, seed, resumed, prompt, walk), self.model, self._rows[self._coming]
            )

        self.model.sampler = sampler  # type: ignore[method-assign, assignment]
        self.loop = EngineLoop(settings, self.model, lambda: 1)

    def ask(self, question: str) -> list[bytes]:
        """Submit a question; the list fills with the logits of its tokens."""
        return self.submit(Prompt(messages=(Message(role="user", content=question),)), GREEDY)

    def submit(self, prompt: Prompt, sampling: Sampling, resumed: Sequence[int] = ()) -> list[bytes]:
        """The same for any prompt, after tokens that were delivered before."""
        self._coming = next(self._keys)
        self._rows[self._coming], self.answers[self._coming] = [], [*resumed]
        job = Job(
            generation_id=str(self._coming), prompt=prompt, sampling=sampling, resume_token_ids=tuple(resumed)
        )
        self.loop.handle(Submit(self._coming, job, None), next(self._clock))
        return self._rows[self._coming]

    def finish(
        self, prompt: Prompt, sampling: Sampling, resumed: Sequence[int] = ()
    ) -> tuple[list[int], list[bytes]]:
        """An answer that runs alone: all of its tokens, and the logits of those that were drawn."""
        rows = self.submit(prompt, sampling, resumed)
        key = self._coming
        while self.step():
            pass
        return self.answers[key], rows

    def step(self) -> bool:
        plan, _ = self.loop.plan(next(self._clock))
        if plan.slices:
            self.drafted += sum(len(s.draft) for s in plan.slices)
            for report in self.loop.run(plan, lambda: next(self._clock)):
                if isinstance(report, Tokens):
                    self.answers[report.key].extend(report.token_ids)
        return bool(plan.slices)


@pytest.fixture(params=["reused", "computed", "adapted"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    adapter = write_tiny_adapter(
        tmp_path / "adapter.gguf", rank=9, inputs=1536, outputs=576, weight="blk.20.ffn_down.weight"
    )
    settings = EngineSettings(
        model_path=str(builtin_model()),
        slots=4,
        context_tokens=512,
        system_prompt=SYSTEM_PROMPT,
        reuse_prefixes=request.param != "computed",
        adapters=(Adapter(path=str(adapter), scale=0.1),) if request.param == "adapted" else (),
    )
    made = Bench(settings)
    yield made
    made.model.close()


@pytest.mark.engine
def test_an_answer_in_a_crowd_is_bit_identical_to_the_same_answer_alone(bench: Bench) -> None:
    quiet: dict[str, list[bytes]] = {}
    for question in QUESTIONS:
        quiet[question] = bench.ask(question)
        while bench.step():
            pass
    rng = Random(3)
    asked: list[tuple[str, list[bytes]]] = []
    due = sorted((rng.randrange(60), rng.choice(QUESTIONS)) for _ in range(10))
    for now in itertools.count():
        while due and due[0][0] <= now:
            question = due.pop(0)[1]
            asked.append((question, bench.ask(question)))
        if not bench.step() and not due:
            break
    assert all(len(rows) == TOKENS for _, rows in asked)
    different = [
        (question, next(i for i, (a, b) in enumerate(zip(rows, quiet[question], strict=True)) if a != b))
        for question, rows in asked
        if rows != quiet[question]
    ]
    assert different == []
    assert np.isfinite(np.frombuffer(asked[0][1][0], dtype=np.float32)).any()


@pytest.mark.engine
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_stream_that_is_resumed_after_any_token_goes_on_bit_identically(
    bench: Bench, sampling: Sampling
) -> None:
    prompt = Prompt(messages=(Message(role="user", content=QUESTIONS[4]),))
    whole, rows = bench.finish(prompt, sampling)
    for delivered in (1, 2, 9, 17, TOKENS - 1):
        assert bench.finish(prompt, sampling, whole[:delivered]) == (whole, rows[delivered:]), delivered


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_drafts_change_neither_tokens_nor_logits(temperature: float, penalty: float) -> None:
    told = []
    for draft_tokens_max in (0, 15):
        bench = Bench(
            EngineSettings(
                model_path=str(builtin_model()), context_tokens=512, draft_tokens_max=draft_tokens_max
            )
        )
        sampling = Sampling(
            temperature=temperature, seed=3, repetition_penalty=penalty, max_tokens=64, ignore_eos=True
        )
        told.append(bench.finish(Prompt(text=COPIED), sampling))
        assert (bench.drafted > 0) is (draft_tokens_max > 0)
        bench.model.close()
    assert told[0] == told[1]
