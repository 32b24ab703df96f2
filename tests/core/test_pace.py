"""Goal: speeds are what the steps say. Method: made-up step times."""

from __future__ import annotations

import pytest

from fieldmesh.core.pace import DRAFT_PRICE, Pace


def test_nothing_is_known_before_the_first_step() -> None:
    pace = Pace(4)
    assert pace.prefill_tokens_per_s == pace.decode_tokens_per_s(1) == 0.0


def test_decode_speed_is_kept_by_number_of_streams() -> None:
    pace = Pace(4)
    pace.observe(decoding=1, prefill_tokens=0, duration_s=0.01)
    pace.observe(decoding=4, prefill_tokens=0, duration_s=0.02)
    assert pace.decode_tokens_per_s(1) == pytest.approx(100)
    assert pace.decode_tokens_per_s(4) == pytest.approx(50)


def test_an_unmeasured_number_of_streams_takes_the_nearest() -> None:
    pace = Pace(8)
    pace.observe(decoding=2, prefill_tokens=0, duration_s=0.01)
    assert pace.decode_tokens_per_s(0) == pace.decode_tokens_per_s(8) == pytest.approx(100)


def test_prefill_beside_decoders_is_charged_its_own_time_only() -> None:
    pace = Pace(4)
    pace.observe(decoding=2, prefill_tokens=0, duration_s=0.02)
    pace.observe(decoding=2, prefill_tokens=64, duration_s=0.22)
    assert pace.prefill_tokens_per_s == pytest.approx(320)
    assert pace.decode_tokens_per_s(2) == pytest.approx(50)


def test_newer_steps_move_the_speed_slowly() -> None:
    pace = Pace(1)
    pace.observe(decoding=1, prefill_tokens=0, duration_s=0.01)
    pace.observe(decoding=1, prefill_tokens=0, duration_s=0.02)
    assert pace.decode_tokens_per_s(1) == pytest.approx(1 / 0.011)


def test_a_short_prompt_says_little_about_speed() -> None:
    pace = Pace(1)
    pace.observe(decoding=0, prefill_tokens=64, duration_s=0.2)
    pace.observe(decoding=0, prefill_tokens=2, duration_s=0.1)
    assert pace.prefill_tokens_per_s == pytest.approx(320, rel=0.01)


def test_a_step_without_duration_is_ignored() -> None:
    pace = Pace(1)
    pace.observe(decoding=1, prefill_tokens=0, duration_s=0.0)
    assert pace.decode_tokens_per_s(1) == 0.0


def test_the_price_of_a_draft_is_what_a_step_with_it_takes_longer() -> None:
    pace = Pace(1)
    pace.observe_draft(drafted=10, duration_s=0.09)
    assert pace.draft_price == DRAFT_PRICE  # nothing to compare with
    pace.observe(decoding=1, prefill_tokens=0, duration_s=0.01)
    for _ in range(60):
        pace.observe_draft(drafted=10, duration_s=0.09)
    assert pace.draft_price == pytest.approx(0.8, rel=0.01)
    assert pace.prefill_tokens_per_s == 0
