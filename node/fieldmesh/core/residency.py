"""Where computed tokens are: in the slots of the cache, parked beside it, and in states that were saved.

Owns: which slot holds which tokens, which saved state holds which, what is worth saving or loading, and the
one transfer that may be under way between the two. Must not: know requests, priorities, files or bytes.

A retired sequence stays in its slot until that is needed. Then it moves to an empty slot, or to a *parking*
slot, which is memory that nothing runs in (numbers from ``config.slots`` on), or over what was retired before
it. Where there is no such place, and for what has to leave a parking slot, there are saved states::

    slot ──save──> SAVING ──saved──> stored ──fetch──> FETCHING ──fetched──> FETCHED ──place──> slot
                      └──failed           └──evicted       └──failed             └──let go──> stored

One transfer at a time: the host has one buffer for it, and a state is large. Saving takes the state out of
its slot before the slot's next tokens are computed; to write it down takes its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b

from fieldmesh.core.radix import RadixTree
from fieldmesh.core.steps import BatcherConfig, Place, Save

NAME_BYTES = 16
MOVED_TOKENS_MAX = 512
"""Longer sequences stay until they are saved: to copy them would hold up a step (10 ms with SmolLM2)."""


class Phase(Enum):
    """What the host's one buffer is used for."""

    FREE = "free"
    SAVING = "saving"
    FETCHING = "fetching"
    FETCHED = "fetched"
    PLACING = "placing"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Source:
    """Where ``keep`` leading tokens can be had: a slot, a saved state (``name``), or nowhere (keep 0)."""

    keep: int = 0
    slot: int = -1
    name: str = ""


NOWHERE = Source()


class Residency:
    """The tokens in ``config.slots`` slots and ``config.stored_cells`` cells of saved states."""

    def __init__(self, config: BatcherConfig) -> None:
        self._config = config
        self.slots: RadixTree[int] = RadixTree(config.cells_total + config.parked_cells)
        self.stored: RadixTree[str] = RadixTree(config.stored_cells)
        self._places = range(config.slots * (3 if config.parked_cells else 1))
        self.computed = [0] * len(self._places)
        self.freed_order = [0] * len(self._places)
        self._order = 0
        self._phase = Phase.FREE
        self._moving = ""
        self._save: Save | None = None
        self._fetch = ""
        self._drops: list[str] = []
        self._idle_saving = True
        self._real, self._parking = self._places[: config.slots], self._places[config.slots :]
        self._moved_to: set[int] = set()  # slots of which a save would still read what was there before

    def __repr__(self) -> str:
        return f"Residency(slots={self.slots!r}, stored={self.stored!r}, {self._phase.value})"

    # --- questions --------------------------------------------------------------------------

    def best(self, adapter: str, tokens: Sequence[int], keep_max: int) -> Source:
        """Where the longest usable prefix of ``tokens`` is; a saved state only where it spares enough. Ties
        prefer a slot in which nobody runs."""
        if not self._config.reuse_prefixes:
            return NOWHERE
        found = [(0, False, 1)]
        for match in self.slots.match(adapter, tokens):
            for slot in match.holders:
                shared = min(match.length, self.computed[slot])
                usable = self._usable(shared, self.computed[slot], keep_max)
                found.append((usable, not self.slots.pinned(slot), -slot))
        keep, _, negative = max(found)
        name, saved = self._best_stored(adapter, tokens, keep_max)
        if saved >= keep + self._config.restore_tokens_min:
            return Source(saved, name=name)
        return Source(keep, slot=-negative) if keep >= self._config.reuse_tokens_min else NOWHERE

    def _best_stored(self, adapter: str, tokens: Sequence[int], keep_max: int) -> tuple[str, int]:
        for match in self.stored.match(adapter, tokens):
            for name in match.holders:
                if usable := self._usable(match.length, self.stored.length(name), keep_max):
                    return name, usable
        return "", 0

    def _usable(self, shared: int, length: int, keep_max: int) -> int:
        """How much of ``length`` tokens can be kept: all or nothing where the cache cannot be cut."""
        usable = min(shared, keep_max)
        return usable if self._config.cuttable or usable == length else 0

    def coming(self, adapter: str, tokens: Sequence[int], computing: set[int]) -> int:
        """How many leading tokens of ``tokens`` a slot of ``computing`` has or will have."""
        if self._config.reuse_prefixes and self._config.cuttable:
            for match in self.slots.match(adapter, tokens):
                if not computing.isdisjoint(match.holders):
                    return match.length
        return 0

    # --- slots ------------------------------------------------------------------------------

    def place(
        self, slot: int, adapter: str, tokens: Sequence[int], source: Source, cells: int
    ) -> tuple[Place, ...]:
        """Give ``slot`` to a sequence that may need ``cells`` cells and begins with what ``source`` has.
        Who was retired there moves to another slot; others leave where their cells are needed."""
        before: tuple[Place, ...] = ()
        if source.slot == slot:
            self.slots.remove(slot)
        elif slot in self.slots:
            before = self._move_out(slot, source)
        evicted = self.slots.evict(cells)
        assert evicted is not None, "more cells were reserved than there are"
        self.slots.insert(slot, adapter, tokens, cells=cells, pinned=True)
        self.computed[slot] = source.keep
        if source.name:
            assert (self._phase, self._moving) == (Phase.FETCHED, source.name)
            self._phase = Phase.PLACING
            self.stored.touch(source.name)
        where = source.slot if source.slot >= 0 else slot
        return *before, Place(slot=slot, source=where, keep_tokens=source.keep, state=source.name)

    def _move_out(self, slot: int, source: Source) -> tuple[Place, ...]:
        """Move what is retired in ``slot`` to where it is not in the way, or save it. ``source`` is still to
        be read."""
        adapter, tokens = self.slots.key(slot), self.slots.tokens(slot)
        to = self._where_to(slot, source.slot)
        if to is None:
            self._spill(slot)
            self.slots.remove(slot)
            return ()
        emptied = self._clear(to, len(tokens), source.slot)
        self.slots.remove(slot)
        self.slots.insert(to, adapter, tokens)
        self.computed[to], self.freed_order[to] = len(tokens), self.freed_order[slot]
        self._moved_to.add(to)
        return *emptied, Place(slot=to, source=slot, keep_tokens=len(tokens))

    def _where_to(self, slot: int, but: int) -> int | None:
        """An empty slot, else that of what was retired first; None where that is ``slot`` itself, or where
        what it holds is not worth the way."""
        length = self.slots.length(slot)
        if not self._config.reuse_prefixes or not self._config.reuse_tokens_min <= length <= MOVED_TOKENS_MAX:
            return None
        staying = sum(self._length(i) for i in self._parking if i == but or not self._older(i, slot))
        places = self._places if staying + length <= self._config.parked_cells else self._real
        others = [i for i in places if i not in (slot, but) and self._older(i, slot)]
        return min(
            others, key=lambda i: (i in self.slots, i in self._parking, self.freed_order[i]), default=None
        )

    def _clear(self, slot: int, length: int, but: int) -> list[Place]:
        """Make room for ``length`` tokens in ``slot``: of what is parked, the oldest leaves."""
        leaving = [slot] if slot in self.slots else []
        if slot in self._parking:
            parked = sorted((i for i in self._parking if i in self.slots), key=lambda i: self.freed_order[i])
            room = self._config.parked_cells - sum(map(self._length, parked)) + self._length(slot)
            for oldest in parked:
                if room >= length:
                    break
                if oldest not in (slot, but):
                    leaving.append(oldest)
                    room += self._length(oldest)
        for one in leaving:
            self._spill(one)
            self.slots.remove(one)
        return [Place(slot=one, source=one, keep_tokens=0) for one in leaving if one != slot]

    def _length(self, slot: int) -> int:
        return self.slots.length(slot) if slot in self.slots else 0

    def _older(self, slot: int, than: int) -> bool:
        """Whether a slot is empty, or was retired before another."""
        if slot not in self.slots:
            return True
        return not self.slots.pinned(slot) and self.freed_order[slot] < self.freed_order[than]

    def stays(self, slot: int) -> bool:
        """Whether what was retired in a slot is too long to move, and would be lost from memory with it."""
        return self._length(slot) > MOVED_TOKENS_MAX

    def lose(self, slot: int) -> None:
        """What should be in a slot is not there."""
        self.computed[slot] = 0
        if slot in self.slots and not self.slots.pinned(slot):
            self.slots.remove(slot)

    def retire(self, slot: int, adapter: str, tokens: Sequence[int]) -> None:
        """The sequence in ``slot`` ended with ``tokens`` computed: they stay until they have to leave."""
        self.slots.remove(slot)
        if tokens:
            self.slots.insert(slot, adapter, tokens)
        self.computed[slot] = len(tokens)
        self._idle_saving = True
        self._order += 1
        self.freed_order[slot] = self._order

    def _spill(self, slot: int) -> None:
        """Save what ``slot`` holds before it is overwritten, where that is worth it and possible just now."""
        if slot in self.slots and self._phase is Phase.FREE and slot not in self._moved_to:
            adapter, tokens = self.slots.key(slot), self.slots.tokens(slot)
            if self._worth_saving(adapter, tokens):
                self.save(slot, adapter, tokens)

    def spill_idle(self) -> None:
        """With nothing else to do: save one retired sequence, so that a restart does not lose it."""
        for slot in self.slots:
            if self._idle_saving and not self.slots.pinned(slot):
                self._spill(slot)

    def _worth_saving(self, adapter: str, tokens: Sequence[int]) -> bool:
        matches = self.stored.match(adapter, tokens)
        return len(tokens) - (matches[0].length if matches else 0) >= self._config.store_tokens_min

    # --- saved states -----------------------------------------------------------------------

    @property
    def transfer_free(self) -> bool:
        """Whether a transfer can begin. A state that was fetched for nobody is let go."""
        return self._phase in (Phase.FREE, Phase.FETCHED)

    def save(self, slot: int, adapter: str, tokens: Sequence[int]) -> str:
        """Take out the state of ``slot``; its name, or "" where there is no room for it."""
        name = state_name(adapter, tokens)
        if name in self.stored:
            self.stored.touch(name)
            return name
        if not self.transfer_free or not self._make_room(adapter, tokens):
            return ""
        self.stored.insert(name, adapter, tokens)
        self._phase, self._moving = Phase.SAVING, name
        self._save = Save(name=name, slot=slot, adapter=adapter, token_ids=tuple(tokens))
        return name

    def _make_room(self, adapter: str, tokens: Sequence[int]) -> bool:
        """Evict saved states for ``tokens``; first those that know nothing else."""
        if len(tokens) > self.stored.cells_max:
            return False
        if self._config.cuttable:
            for name in self.stored.covered(adapter, tokens):
                if not self.stored.pinned(name):
                    self.stored.remove(name)
                    self._drops.append(name)
        evicted = self.stored.evict(len(tokens))
        self._drops.extend(evicted or ())
        return evicted is not None

    def saved(self, name: str, *, ok: bool) -> None:
        """The host has written a state down, or could not."""
        assert (self._phase, self._moving) == (Phase.SAVING, name)
        self._phase = Phase.FREE
        if not ok:
            self.stored.remove(name)
            self._idle_saving = False  # not again and again on a disk that is full

    def fetch(self, name: str) -> bool:
        """Load a state for a placement to come. True when it is there."""
        if self._moving == name and self._phase is Phase.FETCHED:
            return True
        if self.transfer_free:
            self._phase, self._moving, self._fetch = Phase.FETCHING, name, name
        return False

    def fetched(self, name: str, *, ok: bool) -> None:
        """The host has loaded and verified a state, or could not: then it is gone."""
        assert (self._phase, self._moving) == (Phase.FETCHING, name)
        self._phase = Phase.FETCHED if ok else Phase.FREE
        if not ok:
            self.stored.remove(name)
            self._drops.append(name)

    def claim(self) -> bool:
        """Take the one transfer for something else (a state that comes from or goes to another node)."""
        if not self.transfer_free:
            return False
        self._phase = Phase.FOREIGN
        return True

    def unclaim(self) -> None:
        """Give the transfer back."""
        assert self._phase is Phase.FOREIGN
        self._phase = Phase.FREE

    def clear(self, cells: int) -> tuple[str, ...]:
        """Forget saved states until there is room for ``cells`` more, as far as nobody waits for them."""
        return self.stored.evict(cells) or ()

    def adopt(self, adapter: str, tokens: Sequence[int]) -> bool:
        """Know a state that is already written down; False where there is no room for it."""
        name = state_name(adapter, tokens)
        if name in self.stored:
            self.stored.touch(name)
            return True
        if not self._make_room(adapter, tokens):
            return False
        self.stored.insert(name, adapter, tokens)
        return True

    # --- plans ------------------------------------------------------------------------------

    def begin_plan(self) -> None:
        """The last plan was carried out."""
        if self._phase is Phase.PLACING:
            self._phase = Phase.FREE
        self._moved_to.clear()

    def take_orders(self) -> tuple[tuple[str, ...], Save | None, str]:
        """What the host has to do with saved states: drops, a save, a fetch."""
        orders = tuple(self._drops), self._save, self._fetch
        self._drops, self._save, self._fetch = [], None, ""
        return orders

    def check(self) -> None:
        """Raise AssertionError where the state contradicts itself."""
        self.slots.check()
        self.stored.check()
        for slot in self.slots:
            assert self.slots.pinned(slot) or self.computed[slot] == self.slots.length(slot)
            assert self.slots.length(slot) <= self._config.context_tokens
        if self._phase is Phase.SAVING:
            assert self._moving in self.stored
        for name in self.stored:
            assert name == state_name(self.stored.key(name), self.stored.tokens(name))


def state_name(adapter: str, tokens: Sequence[int]) -> str:
    """The name of a saved state: the same tokens under the same adapter have the same state."""
    data = adapter.encode() + b"\0" + b"".join(token.to_bytes(4, "big") for token in tokens)
    return blake2b(data, digest_size=NAME_BYTES).hexdigest()
