"""Cut networks between real voters.

Goal: two halves of four voters acknowledge and commit nothing, and a link that is lost between the leader and
one follower changes no term. Method: one round each of the program that does it at length,
``benchmarks.consensus_cuts``, in network namespaces.
"""

from __future__ import annotations

import pytest

from benchmarks import lab
from benchmarks.consensus_cuts import partial, split

needs_namespaces = pytest.mark.skipif(bool(lab.available()), reason=lab.available() or "namespaces are there")


@pytest.mark.mesh
@needs_namespaces
def test_two_halves_of_four_voters_commit_nothing_until_they_meet() -> None:
    rows = {row.measure: row.met for row in split(rounds=1, seconds=6.0)}
    assert rows == {
        "split_2_2_acknowledged": True,
        "split_2_2_nodes_that_committed": True,
        "split_2_2_leaders_left": True,
        "split_2_2_healed_s": None,
    }


@pytest.mark.mesh
@needs_namespaces
def test_a_link_lost_between_leader_and_follower_changes_no_term_and_stops_no_write() -> None:
    rows = {row.measure: row.met for row in partial(rounds=1, seconds=6.0)}
    assert rows == {"partial_partition_term_changes": True, "partial_partition_acknowledged": True}
