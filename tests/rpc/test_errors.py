"""Errors on the wire. Goal: what a client catches is what the node raised, and nonsense is survived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core import errors
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.rpc.errors import DETAILS_KEY, PUSHBACK_KEY, error_from_status, error_metadata


def details(error: FieldmeshError) -> bytes:
    value = dict(error_metadata(error))[DETAILS_KEY]
    assert isinstance(value, bytes)
    return value


@pytest.mark.parametrize("kind", errors.by_code().values())
def test_every_error_arrives_as_the_kind_it_left(kind: type[FieldmeshError]) -> None:
    error = kind("what to do", field="f", retry_after_s=1.5, metadata={"a": "b"})
    arrived = error_from_status(error.status.value, error.message, details(error))
    assert type(arrived) is kind
    assert (arrived.message, arrived.field) == ("what to do", "f")
    assert (arrived.retry_after_s, arrived.metadata) == (1.5, {"a": "b"})


def test_codes_are_unique() -> None:
    leaves = list(errors.by_code())
    assert len(leaves) == len(set(leaves))
    assert len(leaves) >= 25


def test_a_delay_is_also_sent_as_pushback_that_gRPC_clients_honour() -> None:
    assert dict(error_metadata(errors.QueueFull("full", retry_after_s=0.25)))[PUSHBACK_KEY] == "250"
    assert PUSHBACK_KEY not in dict(error_metadata(errors.QueueFull("full")))


def test_a_huge_message_is_cut_so_that_the_metadata_passes() -> None:
    error = errors.InvalidRequest("x" * 100_000, field="f" * 100_000, metadata={"k": "v" * 100_000})
    assert sum(len(value) for _, value in error_metadata(error)) < 8_000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (14, errors.NodeUnreachable),
        (4, errors.DeadlineExceeded),
        (1, errors.Cancelled),
        (13, errors.Internal),
    ],
)
def test_a_bare_status_becomes_the_kind_that_fits(code: int, kind: type[FieldmeshError]) -> None:
    assert type(error_from_status(code, "message", None)) is kind


@given(st.integers(), st.text(max_size=50), st.binary(max_size=200))
def test_nonsense_becomes_an_error_and_no_crash(code: int, message: str, data: bytes) -> None:
    assert isinstance(error_from_status(code, message, data), FieldmeshError)
