"""What a tenant may ask of a node in a minute, and at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.errors import QuotaExceeded
from fieldmesh.core.quota import NEVER_RETRY_S, Quota, Quotas


def quotas(**bounds: int) -> Quotas:
    made = Quotas()
    made.obey({"ann": Quota(**bounds)})
    return made


def refused(made: Quotas, now: float, *, tenant: str = "ann", streams: int = 0) -> QuotaExceeded | None:
    """The refusal of one request, or None where it was let in."""
    try:
        made.begin(tenant, now, streams=streams)
    except QuotaExceeded as error:
        return error
    finally:
        made.check()
    return None


def test_whoever_has_no_quota_asks_as_much_as_they_like() -> None:
    made = quotas(requests_per_minute=1, tokens_per_minute=1, streams_max=1)
    for _ in range(100):
        assert refused(made, 0.0, tenant="bob", streams=50) is None
        made.spend("bob", 1000, 0.0)


def test_a_minutes_requests_may_come_at_once_and_the_next_ones_evenly() -> None:
    made = quotas(requests_per_minute=6)
    assert [refused(made, 0.0) is None for _ in range(7)] == [True] * 6 + [False]
    error = refused(made, 4.0)
    assert error is not None and error.retry_after_s == pytest.approx(6.0)
    assert refused(made, 10.0) is None
    assert refused(made, 10.1) is not None


def test_a_refused_request_costs_nothing() -> None:
    made = quotas(requests_per_minute=1, streams_max=1)
    for _ in range(5):
        assert refused(made, 0.0, streams=1) is not None
    assert refused(made, 0.0) is None


def test_tokens_are_counted_when_they_are_known_and_a_debt_is_waited_off() -> None:
    made = quotas(tokens_per_minute=60)
    assert refused(made, 0.0) is None
    made.spend("ann", 90, 1.0)
    error = refused(made, 1.0)
    assert error is not None and error.retry_after_s == pytest.approx(31.0)
    assert (error.code, error.field, error.metadata["quota"]) == (
        "QUOTA_EXCEEDED",
        "tenant",
        "tokens_per_minute",
    )
    assert refused(made, 31.9) is not None
    assert refused(made, 32.1) is None


def test_no_more_streams_than_allowed_at_once() -> None:
    made = quotas(streams_max=2)
    assert refused(made, 0.0, streams=1) is None
    error = refused(made, 0.0, streams=2)
    assert error is not None and error.retry_after_s and error.metadata["quota"] == "streams_max"


@pytest.mark.parametrize("bound", ["requests_per_minute", "tokens_per_minute", "streams_max"])
def test_a_quota_of_nothing_allows_nothing(bound: str) -> None:
    error = refused(quotas(**{bound: 0}), 1e6)
    assert error is not None and error.retry_after_s is not None and error.retry_after_s <= NEVER_RETRY_S


def test_another_bound_begins_anew_and_the_same_goes_on() -> None:
    made = quotas(requests_per_minute=1, tokens_per_minute=10)
    assert refused(made, 0.0) is None
    made.obey({"ann": Quota(requests_per_minute=1, tokens_per_minute=20)})
    assert refused(made, 0.0) is not None
    made.obey({"ann": Quota(requests_per_minute=2)})
    assert refused(made, 0.0) is None
    made.obey({})
    assert all(refused(made, 0.0) is None for _ in range(10))


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 40)), max_size=60),
)
def test_over_any_time_no_more_tokens_than_the_rate_one_bucket_and_one_request(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    made, now, spent = quotas(tokens_per_minute=per_minute), 0.0, 0
    for pause_s, tokens in steps:
        now += pause_s
        if refused(made, now) is None:
            made.spend("ann", tokens, now)
            spent += tokens
    assert spent <= per_minute * (1 + now / 60) + 40 + 1e-6
