"""Which rows are acceptable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fieldmesh.core import directory
from fieldmesh.core.messages import Envelope
from fieldmesh.core.model import Address, Domain, NodeId, ProfileOffer, Row
from fieldmesh.rpc import wire

ID = NodeId("a" * 32)
ROW = Row(
    id=ID,
    name="kitchen",
    mesh="home",
    incarnation=3,
    sequence=9,
    addresses=(Address(host="10.0.0.1", port=7000),),
    client_addresses=(Address(host="fd00::1", port=7001),),
    profiles=(
        ProfileOffer(
            name="cook", model="m", fingerprint="f", domains=(Domain(name="food", description="d"),)
        ),
        ProfileOffer(name="any", model="m", fingerprint="f"),
    ),
)


def envelope(row: Row, **changes: object) -> Envelope:
    facts: dict[str, object] = {
        "author": ID,
        "incarnation": row.incarnation,
        "sequence": row.sequence,
        "payload": wire.encode_row(row),
    }
    return Envelope(**{**facts, **changes})  # type: ignore[arg-type]


def test_a_row_that_says_what_was_signed_is_opened() -> None:
    assert directory.open_row(envelope(ROW), wire, "home") == ROW


@pytest.mark.parametrize(
    "bad",
    [
        envelope(replace(ROW, mesh="office")),
        envelope(ROW, author=NodeId("b" * 32)),
        envelope(ROW, incarnation=4),
        envelope(ROW, sequence=8),
        envelope(ROW, payload=b"\xff\xff"),
        envelope(ROW, payload=b""),
        envelope(replace(ROW, profiles=ROW.profiles * 17)),
        envelope(replace(ROW, addresses=ROW.addresses * 9)),
        envelope(replace(ROW, http_addresses=ROW.addresses * 9)),
        envelope(replace(ROW, name="x" * 65)),
    ],
    ids=[
        "mesh",
        "author",
        "incarnation",
        "sequence",
        "noise",
        "empty",
        "profiles",
        "addresses",
        "http",
        "name",
    ],
)
def test_a_row_that_says_more_than_its_author_may_is_refused(bad: Envelope) -> None:
    assert directory.open_row(bad, wire, "home") is None


def test_problems_are_sentences_that_begin_with_the_field() -> None:
    assert directory.problem(ROW) == ""
    assert directory.problem(replace(ROW, name="")).startswith("name:")
    assert directory.problem(replace(ROW, profiles=ROW.profiles * 17)).startswith("profiles:")
