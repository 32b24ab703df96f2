"""The one rule of precedence: what the mesh has agreed on, else the node's own option."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmesh.core.effective import Rules, effective
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.quota import Quota
from fieldmesh.core.routing import Policy
from fieldmesh.core.settings import Change, State, Value
from fieldmesh.core.settings_schema import LIMITS, QUOTAS, ROUTING_POLICIES, validate

OWN = Rules(policy=Policy.LEAST_LOADED, streams_max=7, hops_max=1)


def state(**values: object) -> State:
    """A configuration; ``__`` in a name stands for the slash."""
    return State(
        values={k.replace("__", "/"): Value(text=json.dumps(v), revision=1) for k, v in values.items()}
    )


def test_where_the_mesh_says_nothing_the_nodes_own_options_count() -> None:
    assert effective(OWN, State()) == OWN


def test_what_the_mesh_has_agreed_on_counts_everywhere() -> None:
    rules = effective(
        OWN,
        state(
            routing__policy="round-robin",
            routing__weights={"code": 2.5},
            limits__streams_max=99,
            limits__prompt_tokens_max=1000,
            domains__law={"profiles": ["legal", "general"]},
        ),
    )
    assert rules == Rules(
        policy=Policy.ROUND_ROBIN,
        weights={"code": 2.5},
        domains={"law": ("legal", "general")},
        prompt_tokens_max=1000,
        streams_max=99,
        hops_max=1,
    )


def test_a_value_of_another_version_counts_as_not_set() -> None:
    assert effective(OWN, state(routing__policy="by-moonlight", limits__hops_max="many")) == OWN
    assert effective(OWN, state(quotas__ann={"tokens_per_moon": 1})) == OWN


def test_every_bound_of_a_quota_that_may_be_agreed_on_is_obeyed() -> None:
    bounds = {name: number for number, name in enumerate(QUOTAS)}
    assert effective(OWN, state(quotas__ann=bounds)).quotas == {"ann": Quota(**bounds)}


def test_every_policy_and_limit_that_may_be_agreed_on_is_obeyed() -> None:
    assert {policy.value for policy in Policy} == set(ROUTING_POLICIES)
    for name in LIMITS:
        assert getattr(effective(OWN, state(**{f"limits__{name}": 3})), name) == 3


@given(
    st.dictionaries(
        st.sampled_from(
            ["routing/policy", "routing/weights", "domains/x", "limits/hops_max", "limits/new", "quotas/x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
            max_leaves=5,
        ).map(json.dumps)
        | st.text(max_size=10),
    )
)
def test_no_configuration_stops_a_node(values: dict[str, str]) -> None:
    rules = effective(OWN, State(values={k: Value(text=v, revision=1) for k, v in values.items()}))
    assert isinstance(rules.policy, Policy)
    assert 0 <= rules.hops_max <= LIMITS["hops_max"]


def test_a_weight_that_would_divide_by_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate([Change(key="routing/weights", value='{"code": 0}')])
    assert refused.value.field == "routing/weights.code"
