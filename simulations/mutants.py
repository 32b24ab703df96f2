"""Seeded bugs of the mesh's machines: what a sweep must find, or it proves nothing.

Owns: the list for membership, directory, routing, dispatch and batching, each with the scenario whose sweep
catches it; the log's own list, and the way a mutant is put in, are in ``raft_mutants``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from simulations import raft_mutants
from simulations.raft_mutants import Mutant

MESH_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="silence-forgiven",
        target="suspicion:Suspicion.judge",
        old="silent = 0.0 if peer.waiting_since is None else now - peer.waiting_since",
        new="silent = 0.0 if peer.waiting_since is None else (now - peer.waiting_since) / 2",
        scenario="churn",
    ),
    Mutant(
        name="freeze-unnoticed",
        target="membership:Membership.handle",
        old="self._notice_lateness(now)",
        new="self.late_now = 0.0",
        scenario="freezer",
    ),
    Mutant(
        name="deafness-ignored",
        target="membership:Membership._hear_of_deafness",
        old="peer.deaf = beat.heard_age_s >= self.config.suspect_after_s",
        new="peer.deaf = False",
        scenario="split",
    ),
    Mutant(
        name="any-word-is-an-answer",
        target="membership:Membership._answers",
        old="self.direct or",
        new="True or",
        scenario="gossip",
    ),
    Mutant(
        name="address-kept-by-the-gone",
        target="handshake:Handshake._take_introduction",
        old="if peer.addresses != who.addresses:",
        new="if not peer.addresses:",
        scenario="records",
    ),
    Mutant(
        name="document-decides",
        target="replica:Replica._consider",
        old="stamp <= held.stamp",
        new="stamp == held.stamp",
        scenario="records",
    ),
    Mutant(
        name="foreign-row-accepted",
        target="directory:open_row",
        old="row.mesh != mesh or ",
        new="",
        scenario="records",
    ),
    Mutant(
        name="damage-unmended",
        target="replica:Replica._mend",
        old="if own is not None and",
        new="if own is None and",
        scenario="records",
    ),
    Mutant(
        name="dead-are-candidates",
        target="routing:_Inquiry.obstacle",
        old="if member.state is not NodeState.ALIVE:",
        new="if member.state is NodeState.LEFT:",
        scenario="requests",
    ),
    Mutant(
        name="view-ignored-by-dispatch",
        target="dispatch:Dispatch._view_moved",
        old="member = self._candidate.member",
        new="return []",
        scenario="requests",
    ),
    Mutant(
        name="refusals-end-requests",
        target="dispatch:Dispatch._failed",
        old="if not moves_on or",
        new="if not moves_on or not isinstance(error, errors.QueueFull) or",
        scenario="requests",
    ),
    Mutant(
        name="cells-overbooked",
        target="batching:Batcher._fits",
        old=" and reserved + cells <= self.config.cells_total",
        new="",
        scenario="requests",
    ),
)


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by name."""
    return {mutant.name: mutant for mutant in (*MESH_MUTANTS, *raft_mutants.MUTANTS)}


def names() -> list[str]:
    return sorted(all_mutants())


def seeded(name: str) -> AbstractContextManager[None]:
    """The core with this bug in it, until the context ends. Raises KeyError for an unknown name."""
    return raft_mutants.seeded(all_mutants()[name])
