"""What a node obeys: its own options, and over them what the mesh has agreed on. Owns: the rule that
orders them.

The rule: a key that the mesh's configuration holds (``routing/…``, ``limits/…``, ``domains/…``, ``quotas/…``)
counts on every node; where it says nothing, a node's own option counts (flag, else environment, else file,
else default). Must not: hold anything; ``effective`` is a function of the node's options and the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fieldmesh.core.quota import Quota
from fieldmesh.core.routing import Policy
from fieldmesh.core.settings import State
from fieldmesh.core.settings_schema import LIMITS, known_value

DOMAINS = "domains/"
QUOTAS = "quotas/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All that the mesh may decide about how a node serves.

    ``weights``: share of the work that a profile's nodes are given, relative to 1. ``domains``: which
    profiles own a domain, the preferred first; a domain that is not in it is owned by those that declare it.
    ``quotas``: what a tenant may ask of each node; whoever is not in it is only bound by the limits.
    """

    policy: Policy = Policy.EXPECTED_TIME
    weights: Mapping[str, float] = field(default_factory=dict)
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    prompt_tokens_max: int = 131_072
    output_tokens_max: int = 131_072
    request_bytes_max: int = 1_048_576
    streams_max: int = 256
    hops_max: int = 2


def effective(own: Rules, state: State) -> Rules:
    """What a node with these options obeys under this configuration. A value that this version does not
    understand counts as not set."""
    found: dict[str, Any] = {}
    policy = known_value(state, "routing/policy")
    if policy is not None:
        found["policy"] = Policy(policy)
    weights = known_value(state, "routing/weights")
    if weights is not None:
        found["weights"] = weights
    owners = {key: known_value(state, key) for key in state.values if key.startswith(DOMAINS)}
    if owners:
        found["domains"] = {
            key.removeprefix(DOMAINS): tuple(owners[key]["profiles"]) for key in sorted(owners) if owners[key]
        }
    quotas = {key: known_value(state, key) for key in sorted(state.values) if key.startswith(QUOTAS)}
    if quotas:
        found["quotas"] = {key.removeprefix(QUOTAS): Quota(**quota) for key, quota in quotas.items() if quota}
    for name in LIMITS:
        limit = known_value(state, f"limits/{name}")
        if limit is not None:
            found[name] = limit
    return replace(own, **found)
