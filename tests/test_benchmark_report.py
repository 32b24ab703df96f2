"""What benchmarks print: the shared row, its aim, and the exit code that a script can rely on."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import EXIT_MISSED, Row, show
from benchmarks.routing import auroc


def test_rows_are_printed_as_json_with_the_derived_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row(
            measure="speed",
            unit="tok/s",
            ours=120,
            peer="other",
            peer_value=60,
            aim=100,
            higher_is_better=True,
        ),
        Row(measure="size", unit="MB", ours=3.5),
    ]
    assert show(rows, as_json=True) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "measure": "speed",
        "unit": "tok/s",
        "ours": 120,
        "peer": "other",
        "peer_value": 60,
        "ratio": 2.0,
        "aim": "≥ 100",
        "met": True,
        "note": "",
    }
    assert (second["peer_value"], second["ratio"], second["aim"], second["met"]) == (None, None, "", None)


def test_a_missed_aim_is_marked_and_ends_with_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert show([Row(measure="delay", unit="ms", ours=3, aim=2)], as_json=False) == EXIT_MISSED
    out = capsys.readouterr().out
    assert "| delay   | 3    | ms   | ≤ 2 | NO  |" in out
    assert "cores" in out


def test_an_aim_of_zero_is_an_aim() -> None:
    assert Row(measure="deaths", unit="", ours=0, aim=0).met is True
    assert Row(measure="deaths", unit="", ours=1, aim=0).met is False


def test_the_area_under_the_curve_counts_ties_half() -> None:
    assert auroc([1.0, 2.0], [0.0, 0.5]) == 1.0
    assert auroc([0.0], [1.0]) == 0.0
    assert auroc([1.0, 1.0], [1.0]) == 0.5
