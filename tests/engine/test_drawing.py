"""What is drawn from logits, beside the plainest way to say the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.model import Sampling
from fieldmesh.engine.drawing import PENALTY_WINDOW_TOKENS, Sampler, Window, choose, fraction
from fieldmesh.engine.likelihood import Logits, logprobs

WARM = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = Sampling(temperature=0)
END = 2
PROMPT = (5, 6, 7, 5)


def random_logits(size: int, seed: int = 1, spread: float = 2.0) -> Logits:
    logits: Logits = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
    return logits


class OneRow:
    """A model that computes the same logits for ever."""

    end_tokens = frozenset({END})

    def __init__(self, logits: Logits) -> None:
        self._logits = logits

    def logits(self, row: int) -> Logits:
        assert row == 0
        return self._logits.copy()

    def piece(self, token: int) -> bytes:
        return b"%d" % token


SMALL = random_logits(300)
LARGE = random_logits(5000)
both = pytest.mark.parametrize("logits", [SMALL, LARGE], ids=["300 tokens", "5,000 tokens"])


def draws(
    logits: Logits,
    sampling: Sampling,
    count: int,
    *,
    start: int = 0,
    seed: int = 3,
    said: tuple[int, ...] = (),
) -> list[int]:
    sampler = Sampler(OneRow(logits), sampling, seed, said, PROMPT, None)
    return [sampler.draw(0, index).token_id for index in range(start, start + count)]


# --- what is left ------------------------------------------------------------------------


def plain_order(logits: Logits) -> list[int]:
    return np.argsort(-logits, kind="stable").tolist()


def plainly_left(logits: Logits, sampling: Sampling, slack: float) -> set[int]:
    """What top-k, top-p and min-p leave, one after the other; a little more or less by ``slack``."""
    ids = plain_order(logits)
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    weights = np.exp(logits[ids].astype(np.float64) - float(logits.max()))
    if sampling.top_p < 1.0:
        before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
        ids = [i for i, b in zip(ids, before, strict=True) if b < sampling.top_p + slack or i == ids[0]]
        weights = weights[: len(ids)]
    if sampling.min_p > 0.0:
        ids = [i for i, w in zip(ids, weights, strict=True) if w >= sampling.min_p - slack or i == ids[0]]
    return set(ids)


settings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 2.0),
    top_k=st.sampled_from([0, 1, 2, 40, 999, 6000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.05, 0.5, 1.0]),
)
rows = st.builds(
    random_logits,
    st.sampled_from([1, 3, 300, 1024, 1025, 3000, 5000]),
    st.integers(0, 99),
    st.floats(0.0, 9.0),
)


@given(
    logits=rows, sampling=settings, at=st.floats(0.0, 1.0, exclude_max=True), forbidden=st.integers(0, 400)
)
def test_what_is_drawn_is_left_by_top_k_top_p_and_min_p(
    logits: Logits, sampling: Sampling, at: float, forbidden: int
) -> None:
    logits[: min(forbidden, len(logits) - 1)] = -np.inf
    token = choose(logits, sampling, at)
    assert token in plainly_left(logits, sampling, 1e-4)
    assert logits[token] > -np.inf


@both
@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 5},
        {"top_p": 0.2},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.5, "min_p": 0.05},
        {"top_p": 0.9},
    ],
)
def test_all_that_is_left_is_drawn_as_often_as_it_is_likely(logits: Logits, cut: dict[str, float]) -> None:
    """By walking through the distribution in equal steps."""
    sampling = replace(WARM, temperature=0.8, **cut)  # type: ignore[arg-type]
    left = sorted(plainly_left(logits, sampling, 0.0))
    weights = np.exp((logits[left].astype(np.float64) - float(logits.max())) / 0.8)
    steps = 20_000
    drawn = np.bincount(
        [choose(logits, sampling, (i + 0.5) / steps) for i in range(steps)], minlength=len(logits)
    )
    assert drawn[left].sum() == steps
    assert drawn[left] / steps == pytest.approx(weights / weights.sum(), abs=1.01 / steps)


@both
def test_without_cuts_every_token_comes_as_often_as_it_is_likely(logits: Logits) -> None:
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / 1.5)
    steps = 20_000
    drawn = np.bincount(
        [choose(logits, WARM, (i + 0.5) / steps) for i in range(steps)], minlength=len(logits)
    )
    assert drawn / steps == pytest.approx(weights / weights.sum(), abs=1.01 / steps)


def test_of_equals_top_k_leaves_the_first() -> None:
    logits = np.zeros(3000, dtype=np.float32)
    assert {choose(logits, replace(WARM, top_k=2), at / 10) for at in range(10)} == {0, 1}


@both
def test_a_model_that_computes_no_numbers_still_answers(logits: Logits) -> None:
    broken = np.full_like(logits, np.nan)
    for sampling in (Sampling(), WARM, GREEDY, replace(WARM, top_p=0.5), replace(WARM, min_p=0.5)):
        assert 0 <= draws(broken, sampling, 1)[0] < len(logits)


@both
def test_temperature_zero_and_top_k_one_take_the_likeliest(logits: Logits) -> None:
    assert draws(logits, GREEDY, 3) == [int(logits.argmax())] * 3
    assert draws(logits, replace(WARM, top_k=1), 8) == [int(logits.argmax())] * 8


# --- chance ------------------------------------------------------------------------------


@both
def test_a_draw_depends_on_seed_and_index_only(logits: Logits) -> None:
    ten = draws(logits, WARM, 10)
    assert len(set(ten)) > 3
    assert draws(logits, WARM, 4, start=6) == ten[6:]
    assert draws(logits, WARM, 10, seed=4) != ten


def test_chance_is_spread_evenly_over_seeds_and_indices() -> None:
    drawn = [fraction(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(drawn)) == 10_000
    assert all(0.0 <= value < 1.0 for value in drawn)
    tenths = np.bincount([int(10 * value) for value in drawn], minlength=10)
    assert tenths == pytest.approx([1000] * 10, abs=5 * 1000**0.5)


# --- penalties, bias, ends ---------------------------------------------------------------


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    likeliest = int(SMALL.argmax())
    penalised = replace(GREEDY, presence_penalty=2.0, frequency_penalty=1.5)
    assert draws(SMALL, penalised, 1, said=()) == [likeliest]
    expected = SMALL.copy()
    expected[likeliest] -= 2 * 1.5 + 2.0
    assert draws(SMALL, penalised, 1, said=(likeliest, likeliest)) == [int(expected.argmax())]
    logits = SMALL.copy()
    logits[5] = logits.max() + 1  # it is in the prompt
    assert draws(logits, penalised, 1) == [5]


def test_what_is_drawn_counts_in_the_next_draw() -> None:
    logits = np.zeros(20, dtype=np.float32)
    logits[[4, 9]] = 3.0, 2.5
    assert draws(logits, replace(GREEDY, presence_penalty=1.0), 3) == [4, 9, 4]


def test_a_repetition_penalty_counts_the_prompt_too() -> None:
    seen = np.array(sorted(set(PROMPT)))
    logits = SMALL.copy()
    logits[seen] = 9.0, 8.0, -8.0
    expected = logits.copy()
    expected[seen] = 9.0 / 5, 8.0 / 5, -8.0 * 5
    assert draws(logits, replace(GREEDY, repetition_penalty=5.0), 1) == [int(expected.argmax())]


def test_only_the_last_tokens_count() -> None:
    window = Window([1, 2])
    for token in [3] * (PENALTY_WINDOW_TOKENS - 1):
        window.add(token)
    tokens, times = window.counts
    assert dict(zip(tokens.tolist(), times.tolist(), strict=True)) == {2: 1, 3: PENALTY_WINDOW_TOKENS - 1}


def test_a_long_prompt_counts_by_its_last_tokens() -> None:
    window = Window(range(PENALTY_WINDOW_TOKENS + 10))
    tokens, times = window.counts
    assert tokens.tolist() == list(range(10, PENALTY_WINDOW_TOKENS + 10))
    assert set(times.tolist()) == {1}


@pytest.mark.parametrize(
    ("sampling", "index", "may_end"),
    [
        (Sampling(temperature=0, ignore_eos=True), 50, False),
        (Sampling(temperature=0, min_tokens=5), 4, False),
        (Sampling(temperature=0, min_tokens=5), 5, True),
        (Sampling(temperature=1, top_k=1, ignore_eos=True), 50, False),
        (Sampling(temperature=1, top_k=1, min_tokens=5), 4, False),
        (Sampling(temperature=1, top_k=1, min_tokens=5), 5, True),
    ],
)
def test_the_end_is_never_drawn_where_it_is_ignored_nor_too_early(
    sampling: Sampling, index: int, may_end: bool
) -> None:
    logits = SMALL.copy()
    logits[END] = 1000.0
    assert (draws(logits, sampling, 1, start=index) == [END]) is may_end


def test_a_bias_makes_a_token_certain_or_impossible() -> None:
    likeliest, other = int(SMALL.argmax()), int(SMALL.argmin())
    assert draws(SMALL, replace(GREEDY, logit_bias=((other, 100.0),)), 2) == [other] * 2
    assert likeliest not in draws(SMALL, replace(WARM, logit_bias=((likeliest, -100.0),)), 50)


# --- log-probabilities -------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, logprobs=5),
        replace(WARM, logprobs=5, repetition_penalty=2.0),
        Sampling(temperature=0, logprobs=5, logit_bias=((77, 100.0),), ignore_eos=True),
    ],
)
def test_logprobs_are_the_models_own_whatever_is_done_to_the_draw(sampling: Sampling) -> None:
    expected = SMALL.astype(np.float64) - SMALL.max()
    expected -= np.log(np.exp(expected).sum())
    order = plain_order(SMALL)
    drawn = Sampler(OneRow(SMALL), sampling, 1, (), PROMPT, None).draw(0, 0)
    assert drawn.logprobs is not None
    assert drawn.logprobs.drawn.token_id == drawn.token_id
    assert drawn.logprobs.drawn.piece == b"%d" % drawn.token_id
    assert drawn.logprobs.drawn.logprob == pytest.approx(expected[drawn.token_id], abs=1e-4)
    assert [entry.token_id for entry in drawn.logprobs.top] == order[:5]
    assert [entry.logprob for entry in drawn.logprobs.top] == pytest.approx(expected[order[:5]], abs=1e-4)


def test_logprobs_of_equals_come_in_the_order_of_their_ids() -> None:
    logits = np.zeros(50, dtype=np.float32)
    logits[40] = 1.0
    found = logprobs(logits, 3, 4, lambda _: b"")
    assert [entry.token_id for entry in found.top] == [40, 0, 1, 2]
    assert logprobs(logits, 3, 0, lambda _: b"").top == ()
