"""Rumors on their way. Owns: which are passed on, how often, and which of two about one node holds (SWIM 4).

Must not: believe any of them; ``membership`` does that.
"""

from __future__ import annotations

from fieldmesh.core.messages import Rumor, Rumored
from fieldmesh.core.model import NodeId

_SEVERITY = {Rumored.ALIVE: 0, Rumored.SUSPECT: 1, Rumored.DEAD: 2, Rumored.LEFT: 3}


class Rumors:
    """At most one rumor about each node, each passed on a bounded number of times."""

    def __init__(self) -> None:
        self._held: dict[NodeId, tuple[Rumor, int]] = {}

    def __repr__(self) -> str:
        return f"Rumors({len(self._held)})"

    def spread(self, rumor: Rumor, times: int) -> None:
        """Pass a rumor on with the next ``times`` messages, unless one is under way that overrides it."""
        held = self._held.get(rumor.about)
        if held is None or not overrides(held[0], rumor):
            self._held[rumor.about] = (rumor, times)

    def take(self, count_max: int) -> list[Rumor]:
        """For one message: those that were passed on least."""
        if not self._held:
            return []
        freshest = sorted(self._held.values(), key=lambda entry: -entry[1])[:count_max]
        for rumor, left in freshest:
            if left > 1:
                self._held[rumor.about] = (rumor, left - 1)
            else:
                del self._held[rumor.about]
        return [rumor for rumor, _ in freshest]


def overrides(held: Rumor, other: Rumor) -> bool:
    """SWIM 4.2: the higher standing wins; at equal standing the graver rumor does."""
    held_rank = (held.incarnation, held.refutations, _SEVERITY[held.says])
    return held_rank > (other.incarnation, other.refutations, _SEVERITY[other.says])
