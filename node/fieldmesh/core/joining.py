"""Where to knock. Owns: addresses that might belong to members, and when each is tried next.

Hints come from seeds (kept for ever), from mDNS (given up after some tries; mDNS will hint again) and
from members that are gone (tried at a bounded rate for ever, so that halves of a mesh find each other).
Must not: know who lives behind an address; ``membership`` decides that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random

from fieldmesh.core.model import Address


class HintSource(Enum):
    """Who said that somebody may live there."""

    SEED = "seed"
    MDNS = "mdns"
    EXCHANGE = "exchange"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinConfig:
    """Backoff of one address (doubling between the two), and how many may be tried at one beat."""

    retry_s_min: float = 0.2
    retry_s_max: float = 5.0
    refused_retry_s: float = 30.0
    tries_without_seed_max: int = 10
    tries_per_beat_max: int = 8
    hints_max: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.retry_s_min <= self.retry_s_max:
            raise ValueError("retry_s_min must be above 0 and at most retry_s_max")


@dataclass(slots=True)
class _Hint:
    source: HintSource
    tries: int = 0
    next_at: float = 0.0


class Joining:
    """The list of addresses to try. ``due`` is asked at every beat."""

    def __init__(self, rng: Random, config: JoinConfig | None = None) -> None:
        self.config = config or JoinConfig()
        self._rng = rng
        self._hints: dict[Address, _Hint] = {}

    def __repr__(self) -> str:
        return f"Joining(hints={len(self._hints)})"

    def add(self, address: Address, source: HintSource, now: float) -> bool:
        """Note a hint; returns whether it is worth an attempt at once."""
        hint = self._hints.get(address)
        if hint is not None:
            if source is HintSource.SEED:
                hint.source = source
            if hint.tries:
                hint.next_at = min(hint.next_at, now + self.config.retry_s_min)
            return False
        if len(self._hints) >= self.config.hints_max and source is not HintSource.SEED:
            return False
        self._hints[address] = _Hint(source=source, next_at=now)
        return True

    def due(self, now: float) -> list[Address]:
        """Addresses to say Hello to now; each is backed off as it is handed out."""
        chosen = [a for a, hint in self._hints.items() if hint.next_at <= now]
        chosen = chosen[: self.config.tries_per_beat_max]
        for address in chosen:
            self._tried(address, now)
        return chosen

    @property
    def next_at(self) -> float | None:
        return min((hint.next_at for hint in self._hints.values()), default=None)

    def answered(self, address: Address, now: float) -> None:
        """Somebody of our mesh lives there: no more need to knock, except at seeds, seldom."""
        hint = self._hints.get(address)
        if hint is None:
            return
        if hint.source is HintSource.SEED:
            hint.tries, hint.next_at = 0, now + self.config.refused_retry_s
        else:
            del self._hints[address]

    def refused(self, address: Address, now: float) -> None:
        """Somebody of another mesh or protocol lives there: look again later."""
        hint = self._hints.get(address)
        if hint is not None:
            hint.next_at = now + self.config.refused_retry_s

    def lost(self, address: Address, now: float) -> None:
        """The member that lived at this address is gone: a seed there is tried again soon."""
        hint = self._hints.get(address)
        if hint is not None:
            hint.next_at = min(hint.next_at, now + self.config.retry_s_min)

    def forget(self, address: Address) -> None:
        """It is our own address."""
        self._hints.pop(address, None)

    def _tried(self, address: Address, now: float) -> None:
        hint = self._hints[address]
        hint.tries += 1
        hint.next_at = now + backoff_s(self.config, self._rng, hint.tries)
        if hint.source is not HintSource.SEED and hint.tries >= self.config.tries_without_seed_max:
            del self._hints[address]


def backoff_s(config: JoinConfig, rng: Random, tries: int) -> float:
    """Full range doubling with jitter of a quarter, so that nodes that failed together spread out."""
    base = min(config.retry_s_max, config.retry_s_min * 2.0 ** min(tries - 1, 16))
    return base * rng.uniform(0.75, 1.0)
