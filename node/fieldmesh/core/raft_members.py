"""Which nodes should vote, and the next single change on the way there. Owns: founding, growth and shrinkage.

Pure functions; the machine (``core.raft``) refuses what is unsafe whatever is asked here. One change at a
time (dissertation §4.1), learners first (§4.2.1), and never an even number of voters for longer than a
promotion takes: a second voter must not be promoted before a third one is caught up, because two voters
survive less than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from fieldmesh.core.model import NodeId
from fieldmesh.core.raft_model import (
    AddLearner,
    Change,
    Entry,
    EntryKind,
    HardState,
    Members,
    Promote,
    Remove,
    Stored,
)


def founded(me: NodeId, group: str) -> Stored:
    """What a founder stores: itself as the only voter. ``group`` names this log and no other, ever."""
    if not group:
        raise ValueError("a log needs a name")
    entry = Entry(index=1, term=1, kind=EntryKind.MEMBERS, data=Members(voters=(me,)).encode())
    return Stored(hard=HardState(term=1, group=group), entries=(entry,))


def recovered(stored: Stored, survivor: NodeId) -> Stored:
    """What the store of a lone survivor must hold to go on without the others: a new epoch with one voter.

    The others may have committed entries that the survivor lacks: they are lost. Entries that it holds and
    that were never committed become so. Members of the old epoch are refused from then on.
    """
    last = stored.entries[-1] if stored.entries else None
    index, term = (last.index, last.term) if last else (stored.snapshot.index, stored.snapshot.term)
    if index == 0:
        raise ValueError("this store holds no log")
    term = max(term, stored.hard.term) + 1
    alone = Entry(
        index=index + 1, term=term, kind=EntryKind.MEMBERS, data=Members(voters=(survivor,)).encode()
    )
    hard = replace(stored.hard, term=term, vote=None, epoch=stored.hard.epoch + 1)
    return replace(stored, hard=hard, entries=(*stored.entries, alone))


def choose_voters(
    members: Members, stable_s: Mapping[NodeId, float], *, target: int, enough_s: float
) -> tuple[NodeId, ...]:
    """Who should vote: an odd number up to ``target``, present voters before others, stable before new ones.

    ``stable_s`` holds the seconds for which each node that is there has been there without a break; a voter
    that is not in it is gone for good. Ties are broken by node id.
    """
    present = [node for node in members.voters if node in stable_s]
    others = [n for n, s in stable_s.items() if n not in members.voters and s >= enough_s]
    ranked = sorted(present, key=lambda n: (-stable_s[n], n)) + sorted(
        others, key=lambda n: (-stable_s[n], n)
    )
    count = min(target, len(ranked))
    if count % 2 == 0:
        count -= 1
    return tuple(sorted(ranked[:count])) if count > 0 else members.voters


def next_change(
    members: Members,
    wanted: tuple[NodeId, ...],
    *,
    learners: tuple[NodeId, ...] = (),
    caught_up: AbstractSet[NodeId],
    present: AbstractSet[NodeId],
    leader: NodeId,
) -> Change | None:
    """The next change towards ``wanted`` voters and ``learners`` beside them, or None if there is none (yet).

    ``caught_up`` learners may be promoted. Voters that are not ``present`` (gone, or without their log) are
    removed before others: each one that stays is a vote that a majority lacks. The leader is removed last;
    it hands over its office before (``Transfer``) if the caller is wise.
    """
    missing = [node for node in wanted if node not in members.voters]
    for node in missing:
        if node not in members.learners:
            return AddLearner(node=node)
    for node in members.learners:
        if node not in wanted and node not in learners:
            return Remove(node=node)
    if missing:
        return Promote(node=missing[0]) if all(node in caught_up for node in missing) else None
    surplus = [node for node in members.voters if node not in wanted]
    surplus.sort(key=lambda node: (node == leader, node in present, node))
    if surplus:
        return Remove(node=surplus[0])
    standby = [node for node in learners if node not in members.all]
    return AddLearner(node=standby[0]) if standby else None
