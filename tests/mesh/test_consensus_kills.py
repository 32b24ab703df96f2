"""Kill -9 of voters under load, and a leader that is stopped and continued.

Goal: no acknowledged write is lost or done twice, no term has two leaders, and no read that claims to be
current is stale. Method: a few rounds of the program that does it at length, ``benchmarks.consensus_kills``:
three real nodes, eight writers, and a watch that must show every acknowledged write under its revision.
"""

from __future__ import annotations

import pytest

from benchmarks.consensus_kills import Ledger, rows
from fieldmesh.client.admin import Setting
from fieldmesh.core.settings import Record

COUNTS = {"writes_lost", "writes_doubled", "terms_with_two_leaders"}


@pytest.mark.mesh
def test_nothing_acknowledged_is_lost_when_leaders_are_killed_under_load() -> None:
    found = {row.measure: row.ours for row in rows(leader=10, everybody=0, compaction=0, pause=0)}
    assert {measure: found[measure] for measure in COUNTS} == dict.fromkeys(COUNTS, 0)


@pytest.mark.mesh
def test_nothing_is_lost_when_all_voters_die_at_once_or_one_in_its_compaction() -> None:
    found = {row.measure: row.ours for row in rows(leader=0, everybody=1, compaction=1, pause=0)}
    assert {measure: found[measure] for measure in COUNTS} == dict.fromkeys(COUNTS, 0)


@pytest.mark.mesh
def test_a_leader_that_was_stopped_and_continued_tells_nothing_stale_as_current() -> None:
    found = {row.measure: row.ours for row in rows(leader=0, everybody=0, compaction=0, pause=2)}
    assert (found["stale_reads"], found["terms_with_two_leaders"]) == (0, 0)


def test_the_ledger_tells_what_was_lost_and_what_was_done_twice() -> None:
    ledger = Ledger()
    ledger.acknowledge("app/x", '"1"', 5)
    ledger.acknowledge("app/x", '"2"', 6)
    for revision in (6, 7):
        ledger.saw(
            Record(revision=revision, key="app/x", before=None, after='"2"', author="", origin="", time_ms=0)
        )
    assert ledger.lost() == [("app/x", '"1"', 5)]
    assert ledger.doubled() == [("app/x", '"2"')]


def test_what_the_watch_missed_is_judged_by_what_stood_there_afterwards() -> None:
    ledger = Ledger()
    for key, revision in (("app/a", 3), ("app/b", 4), ("app/c", 5)):
        ledger.acknowledge(key, '"mine"', revision)
    stood = (
        Setting(key="app/a", text='"mine"', revision=3),
        Setting(key="app/b", text='"later"', revision=6),
        Setting(key="app/c", text='"older"', revision=1),
    )
    ledger.missed(2, 6, stood)
    assert ledger.lost() == [("app/c", '"mine"', 5)]
