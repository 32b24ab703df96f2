"""Embeddings. Goal: vectors are the model's, however the work is cut, and streams flow on meanwhile.
Method: the queue over made-up rows; the default model against llama-cpp-python's own embeddings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama

from fieldmesh.core.errors import InvalidRequest, PromptTooLong, QueueFull
from fieldmesh.core.model import Chunk
from fieldmesh.core.steps import Slice
from fieldmesh.engine.embeddings import PASS_TEXTS_MAX, REQUESTS_MAX, EmbeddingQueue, Pooling
from fieldmesh.engine.frames import Embedded, Failed, Report
from fieldmesh.engine.host import EngineProcess
from fieldmesh.engine.port import Engine
from fieldmesh.engine.settings import EngineSettings
from tests.engine.asking import GREEDY, job
from tests.engine.tiny_model import default_model_path

WIDTH = 8


class Compute:
    """A row that depends on a token and its place, as long as each slot's text is computed in order."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.passes: list[int] = []

    def __call__(self, slices: Sequence[Slice]) -> np.ndarray:
        assert len({piece.slot for piece in slices}) == len(slices) <= PASS_TEXTS_MAX
        going_on = {piece.slot: self.seen[piece.slot] for piece in slices if piece.position}
        rows = []
        for piece in slices:
            assert going_on.get(piece.slot, 0) == piece.position
            going_on[piece.slot] = piece.position + len(piece.token_ids)
            rows += [row(token, piece.position + i) for i, token in enumerate(piece.token_ids)]
        self.seen = going_on
        self.passes.append(len(rows))
        return np.array(rows)


def row(token: int, position: int) -> np.ndarray:
    return np.random.default_rng((token, position)).normal(size=WIDTH)


def expected(tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
    rows = np.array([row(token, i) for i, token in enumerate(tokens)])
    pooled = {Pooling.MEAN: rows.mean(axis=0), Pooling.CLS: rows[0], Pooling.LAST: rows[-1]}[pooling]
    return pooled / np.linalg.norm(pooled)


def run(queue: EmbeddingQueue, tokens_max: int) -> list[Report]:
    reports: list[Report] = []
    for _ in range(10_000):
        if not queue:
            return reports
        reports += queue.step(tokens_max, 0.0)
    raise AssertionError("it never ends")


texts = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40).map(tuple), min_size=1, max_size=6)


@given(st.lists(texts, min_size=1, max_size=4), st.integers(1, 64), st.sampled_from(Pooling))
def test_the_vectors_are_the_same_however_the_work_is_cut(
    requests: list[list[tuple[int, ...]]], tokens_max: int, pooling: Pooling
) -> None:
    compute = Compute()
    queue = EmbeddingQueue(compute, pooling)
    for key, request in enumerate(requests):
        queue.add(key, request, None)
    reports = run(queue, tokens_max)
    assert [report.key for report in reports] == list(range(len(requests)))
    for report, request in zip(reports, requests, strict=True):
        assert isinstance(report, Embedded)
        assert report.prompt_tokens == sum(map(len, request))
        for vector, tokens in zip(report.vectors, request, strict=True):
            assert vector == pytest.approx(expected(tokens, pooling), abs=1e-6)
    assert max(compute.passes) <= tokens_max


def test_short_texts_share_a_pass() -> None:
    compute = Compute()
    queue = EmbeddingQueue(compute, Pooling.MEAN)
    queue.add(1, [(1, 2)] * 10, None)
    run(queue, 64)
    assert compute.passes == [20]


def test_a_cancelled_request_is_not_computed_further() -> None:
    compute = Compute()
    queue = EmbeddingQueue(compute, Pooling.MEAN)
    queue.add(1, [(1,) * 40], None)
    queue.add(2, [(2,) * 4], None)
    queue.step(16, 0.0)
    queue.cancel(1)
    (report,) = run(queue, 16)
    assert report.key == 2  # type: ignore[union-attr]
    assert compute.passes == [16, 4]


def test_a_request_past_its_deadline_is_told_so() -> None:
    queue = EmbeddingQueue(Compute(), Pooling.MEAN)
    queue.add(1, [(1,) * 40], 5.0)
    assert queue.step(16, 4.0) == []
    (report,) = queue.step(16, 5.0)
    assert isinstance(report, Failed) and report.code == "DEADLINE_EXCEEDED"
    assert not queue


def test_few_requests_may_wait() -> None:
    queue = EmbeddingQueue(Compute(), Pooling.MEAN)
    for key in range(REQUESTS_MAX):
        queue.add(key, [(1,)], None)
    with pytest.raises(QueueFull):
        queue.add(REQUESTS_MAX, [(1,)], None)


# --- the real model ----------------------------------------------------------------------------

TEXTS = (
    "A nosebleed usually stops within ten minutes.",
    "Sort a list in Python.",
    "é 中文 🙂",
    "the river runs by the mill and the mill turns " * 30,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineProcess]:
    made = EngineProcess(EngineSettings(model_path=str(default_model_path()), slots=2, context_tokens=1024))
    await made.start()
    yield made
    await made.close()


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_vectors_are_those_that_llama_gives(engine: Engine) -> None:
    judge = Llama(
        str(default_model_path()), n_ctx=1024, n_batch=1024, n_ubatch=1024, n_threads=1, n_threads_batch=1,
        verbose=False, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN,
    )  # fmt: skip
    wanted = np.array(judge.embed(list(TEXTS), normalize=True))
    tokens = sum(len(judge.tokenize(text.encode(), special=True)) for text in TEXTS)
    judge.close()
    found = await engine.embed(TEXTS)
    vectors = np.array(found.vectors)
    assert found.prompt_tokens == tokens
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    cosines = (vectors * wanted).sum(axis=1)
    assert cosines == pytest.approx(np.ones(len(TEXTS)), abs=2e-3)
    crossed = vectors @ wanted.T
    assert (crossed.argmax(axis=1) == np.arange(len(TEXTS))).all()


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_a_running_stream_says_the_same_and_flows_on_beside_embeddings(engine: Engine) -> None:
    sampling = replace(GREEDY, max_tokens=40)
    alone = [
        e async for e in engine.submit(job("alone", "Once upon a time", sampling)) if isinstance(e, Chunk)
    ]
    embedding = asyncio.create_task(engine.embed(TEXTS * 4))
    ids: list[int] = []
    during = 0
    async for event in engine.submit(job("beside", "Once upon a time", sampling)):
        if isinstance(event, Chunk):
            ids += event.token_ids
            during += 0 if embedding.done() else len(event.token_ids)
    assert ids == [token for chunk in alone for token in chunk.token_ids]
    assert during >= 8
    assert len((await embedding).vectors) == 16


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_texts_are_bounded_by_name(engine: Engine) -> None:
    with pytest.raises(PromptTooLong) as long:
        await engine.embed(("short", "word " * 2000))
    assert long.value.field == "inputs[1]"
    with pytest.raises(InvalidRequest) as many:
        await engine.embed(("x",) * 129)
    assert many.value.field == "inputs"
    with pytest.raises(InvalidRequest) as empty:
        await engine.embed(("x", ""))
    assert empty.value.field == "inputs[1]"
