"""What a tenant may still ask of one node. Owns: token buckets by tenant, for those that have a quota.

Each node counts what enters there, for itself: nothing is summed over the mesh. A bucket holds a minute's
worth at most and fills evenly. What a request costs is known when it ends, so the bucket of tokens may be
overdrawn, and the next request waits until it is not. Must not: know who a tenant is (its requests say so),
or what a request does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fieldmesh.core.errors import QuotaExceeded

STREAM_RETRY_S = 1.0
NEVER_RETRY_S = 3600.0
"""What is said instead of "never" where nothing at all is allowed; a quota may be changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Bounds of one tenant at each node; None is no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    streams_max: int | None = None


@dataclass(slots=True)
class _Bucket:
    per_minute: int
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.filled_at) * self.per_minute / 60)
        self.filled_at = now

    def wait_s(self, level: float) -> float:
        """Seconds until it holds so much."""
        if self.level >= level:
            return 0.0
        return (level - self.level) * 60 / self.per_minute if self.per_minute else NEVER_RETRY_S


class Quotas:
    """The tenants' quotas at one node. There are at most two buckets for each quota."""

    def __init__(self) -> None:
        self._quotas: Mapping[str, Quota] = {}
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def __repr__(self) -> str:
        return f"Quotas({sorted(self._quotas)})"

    def obey(self, quotas: Mapping[str, Quota]) -> None:
        """These count from now on. A bound that did not change goes on as it is, a new one begins full."""
        self._buckets = {
            (tenant, what): bucket
            for (tenant, what), bucket in self._buckets.items()
            if tenant in quotas and getattr(quotas[tenant], what) == bucket.per_minute
        }
        self._quotas = quotas

    def begin(self, tenant: str, now: float, *, streams: int) -> None:
        """Count a request of a tenant that has ``streams`` under way here. Raises QuotaExceeded."""
        quota = self._quotas.get(tenant)
        if quota is None:
            return
        if quota.streams_max is not None and streams >= quota.streams_max:
            raise _exceeded(tenant, "streams_max", quota.streams_max, STREAM_RETRY_S)
        requests = self._bucket(tenant, "requests_per_minute", quota.requests_per_minute, now)
        tokens = self._bucket(tenant, "tokens_per_minute", quota.tokens_per_minute, now)
        if requests is not None and (wait_s := requests.wait_s(1.0)):
            raise _exceeded(tenant, "requests_per_minute", requests.per_minute, wait_s)
        if tokens is not None and (wait_s := tokens.wait_s(1.0)):
            raise _exceeded(tenant, "tokens_per_minute", tokens.per_minute, wait_s)
        if requests is not None:
            requests.level -= 1.0

    def spend(self, tenant: str, tokens: int, now: float) -> None:
        """Count the tokens of a request that has ended."""
        quota = self._quotas.get(tenant)
        if quota is None:
            return
        bucket = self._bucket(tenant, "tokens_per_minute", quota.tokens_per_minute, now)
        if bucket is not None:
            bucket.level -= tokens

    def check(self) -> None:
        """Raise AssertionError where a bucket has no quota or holds more than its minute's worth."""
        for (tenant, what), bucket in self._buckets.items():
            assert getattr(self._quotas[tenant], what) == bucket.per_minute
            assert bucket.level <= bucket.per_minute

    def _bucket(self, tenant: str, what: str, per_minute: int | None, now: float) -> _Bucket | None:
        """The bucket, filled up to now; a new one is full."""
        if per_minute is None:
            return None
        bucket = self._buckets.get((tenant, what))
        if bucket is None:
            bucket = self._buckets[tenant, what] = _Bucket(per_minute, float(per_minute), now)
        bucket.fill(now)
        return bucket


def _exceeded(tenant: str, what: str, bound: int, retry_after_s: float) -> QuotaExceeded:
    return QuotaExceeded(
        f"Tenant {tenant} has used up its quota at this node ({what} is {bound}); ask again in "
        f"{retry_after_s:.1f} s, or have quotas/{tenant} raised",
        field="tenant",
        retry_after_s=retry_after_s,
        metadata={"tenant": tenant, "quota": what},
    )
