"""Who serves a request: every rule of core/routing, on views made by hand.

Goal: each rule of the module's docstring, and each refusal, fails exactly one test when it breaks. Method:
small views whose best node is plain, larger ones for sampling, fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_views import CODE_OFFER, GENERAL_OFFER, HEALTH_OFFER, IDLE, member, three, view

from fieldmesh.core.catalogue import Index
from fieldmesh.core.classify import Classifier
from fieldmesh.core.errors import (
    ConfigError,
    DomainNotFound,
    FieldmeshError,
    HopLimit,
    ModelNotFound,
    NoCandidate,
    ProfileNotFound,
    QueueFull,
)
from fieldmesh.core.model import (
    ColdProfile,
    EngineState,
    Load,
    Member,
    MeshView,
    NodeId,
    NodeState,
    ProfileOffer,
)
from fieldmesh.core.routing import (
    EXPLAINED_CANDIDATES_MAX,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_MIN_S,
    Candidate,
    Decision,
    Need,
    Policy,
    choose,
)
from fieldmesh.core.traffic import Traffic


def decide(
    mesh: MeshView,
    need: Need | None = None,
    *,
    policy: Policy = Policy.EXPECTED_TIME,
    explain: bool = False,
    traffic: Traffic | None = None,
    seed: int = 0,
    classifier: bool = False,
) -> Decision:
    index = Index.of(mesh)
    if classifier:
        index = index.with_classifier(Classifier.train(index.domains))
    need = need or Need(prompt_tokens=50, max_tokens=100)
    return choose(need, index, traffic or Traffic(), Random(seed), policy=policy, explain=explain)


def send(traffic: Traffic, key: str, candidate: Candidate, need: Need) -> None:
    traffic.begin(key, candidate.member, prompt_tokens=need.prompt_tokens, max_tokens=need.max_tokens)


def served_by(decision: Decision) -> str:
    return decision.candidates[0].member.name


# --- demands and wishes ------------------------------------------------------------------


def test_a_demanded_profile_is_answered_by_its_owner() -> None:
    decision = decide(view(*three()), Need(profile="health"))
    assert [c.member.name for c in decision.candidates] == ["c"]
    assert decision.candidates[0].offer == HEALTH_OFFER
    assert not decision.fallback


def test_a_demanded_model_is_answered_by_a_node_that_has_it() -> None:
    assert {served_by(decide(view(*three()), Need(model="smol"), seed=s)) for s in range(5)} <= {"a", "b"}
    assert served_by(decide(view(*three()), Need(model="med"))) == "c"


def test_profile_and_model_together_demand_both() -> None:
    other = replace(CODE_OFFER, model="big", fingerprint="f3")
    mesh = view(*three(), member("d", other))
    assert served_by(decide(mesh, Need(profile="code", model="big"))) == "d"
    with pytest.raises(ProfileNotFound, match="leave one of the two out"):
        decide(mesh, Need(profile="general", model="big"))


def test_an_unknown_profile_names_what_exists_and_the_nearest() -> None:
    with pytest.raises(ProfileNotFound, match=r"'helth'.*mean 'health'.*code, general, health") as error:
        decide(view(*three()), Need(profile="helth"))
    assert error.value.field == "target.profile"


def test_an_unknown_model_names_what_exists() -> None:
    with pytest.raises(ModelNotFound, match=r"Known models: med, smol\.") as error:
        decide(view(*three()), Need(model="llama-70b"))
    assert error.value.field == "target.model"


def test_a_domain_never_declared_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(DomainNotFound, match=r"mean 'programming'.*first_aid, programming") as error:
        decide(view(*three()), Need(domain="programing"))
    assert error.value.field == "target.domain"


def test_an_unknown_name_is_quoted_only_in_part() -> None:
    with pytest.raises(ProfileNotFound) as error:
        decide(view(*three()), Need(profile="x" * 10_000))
    assert len(error.value.message) < 300


def test_a_demand_whose_owners_are_dead_is_retryable_and_not_unknown() -> None:
    a, b, c = three()
    with pytest.raises(NoCandidate, match="c: it is dead") as error:
        decide(view(a, b, replace(c, state=NodeState.DEAD)), Need(profile="health"))
    assert error.value.retryable
    assert error.value.retry_after_s


def test_a_domain_goes_to_its_owner() -> None:
    decision = decide(view(*three()), Need(domain="first_aid"))
    assert served_by(decision) == "c"
    assert (decision.domain, decision.fallback) == ("first_aid", False)


@pytest.mark.parametrize(
    "state", [NodeState.DEAD, NodeState.LEFT, NodeState.SUSPECT, NodeState.UNREACHABLE], ids=lambda s: s.value
)
def test_a_domain_whose_owner_is_gone_falls_back_to_the_generalist(state: NodeState) -> None:
    a, b, c = three()
    decision = decide(view(a, b, replace(c, state=state)), Need(domain="first_aid"))
    assert [k.member.name for k in decision.candidates] == ["a"]
    assert (decision.domain, decision.fallback) == ("first_aid", True)


def test_a_domain_whose_owner_is_full_spills_to_the_generalist() -> None:
    a, b, c = three()
    full = replace(IDLE, running=4, queued=8)
    decision = decide(view(a, b, replace(c, load=full)), Need(domain="first_aid"))
    assert (served_by(decision), decision.fallback) == ("a", True)


def test_an_answer_from_any_node_beats_none() -> None:
    a, b, c = three()
    dead = replace(a, state=NodeState.DEAD), replace(c, state=NodeState.DEAD)
    decision = decide(view(b, *dead, local="b"), Need(domain="first_aid"))
    assert (served_by(decision), decision.fallback) == ("b", True)
    decision = decide(view(b, *dead, local="b"), Need())
    assert (served_by(decision), decision.fallback) == ("b", True)


def test_a_wish_within_a_demanded_model_stays_with_that_model() -> None:
    a, b, c = three()
    decision = decide(view(a, b, c), Need(model="smol", domain="first_aid"))
    assert (served_by(decision), decision.fallback) == ("a", True)


def test_nothing_asked_goes_to_the_generalist_which_is_no_fallback() -> None:
    decision = decide(view(*three()))
    assert (served_by(decision), decision.fallback, decision.domain) == ("a", False, "")


def test_a_node_with_several_profiles_is_one_candidate() -> None:
    mesh = view(member("a", CODE_OFFER, GENERAL_OFFER, HEALTH_OFFER))
    assert [c.offer.name for c in decide(mesh, Need()).candidates] == ["general"]
    assert [c.offer.name for c in decide(mesh, Need(domain="programming")).candidates] == ["code"]
    assert [c.offer.name for c in decide(mesh, Need(model="smol")).candidates] == ["general"]


# --- the classifier's part ---------------------------------------------------------------


def test_text_is_classified_where_nothing_else_is_given() -> None:
    decision = decide(view(*three()), Need(text="Write a function that sorts numbers"), classifier=True)
    assert (served_by(decision), decision.domain) == ("b", "programming")
    assert decision.classification is not None and decision.classification.confidence > 0.5


def test_text_that_is_like_nothing_goes_to_the_generalist() -> None:
    decision = decide(view(*three()), Need(text="zebra quartz jukebox"), classifier=True)
    assert (served_by(decision), decision.fallback, decision.domain) == ("a", False, "")


def test_a_classified_domain_falls_back_like_a_wished_one() -> None:
    a, b, c = three()
    mesh = view(a, replace(b, state=NodeState.DEAD), c)
    decision = decide(mesh, Need(text="Write a function that sorts numbers"), classifier=True)
    assert (served_by(decision), decision.fallback, decision.domain) == ("a", True, "programming")


def test_text_is_not_classified_where_a_profile_is_demanded() -> None:
    decision = decide(view(*three()), Need(text="Write a function", profile="health"), classifier=True)
    assert (served_by(decision), decision.classification) == ("c", None)


def test_a_classifier_older_than_the_view_proposes_no_domain_that_has_gone() -> None:
    before = Index.of(view(*three()))
    trained = before.with_classifier(Classifier.train(before.domains))
    a, _, c = three()
    after = Index.of(view(a, c), trained)
    assert after.training_due
    decision = choose(Need(text="Write a function that sorts a list"), after, Traffic(), Random(0))
    assert (served_by(decision), decision.domain) == ("a", "")


# --- eligibility -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (replace(IDLE, engine=EngineState.LOADING), "its engine is loading"),
        (replace(IDLE, engine=EngineState.LOST), "its engine is lost"),
        (replace(IDLE, engine=EngineState.FAILED), "its engine is failed"),
        (replace(IDLE, draining=True), "it is draining"),
    ],
)
def test_a_node_that_cannot_work_is_not_chosen(load: Load, words: str) -> None:
    with pytest.raises(NoCandidate, match=words):
        decide(view(member("a", GENERAL_OFFER, load=load)))


def test_nodes_that_failed_or_were_on_the_path_are_not_chosen_again() -> None:
    mesh = view(*(member(n, GENERAL_OFFER) for n in "abc"))
    need = Need(failed=frozenset([NodeId("a")]), path=(NodeId("b"),))
    assert [c.member.name for c in decide(mesh, need).candidates] == ["c"]
    with pytest.raises(NoCandidate, match="a: it failed this request; b: the request came through it"):
        decide(view(*(member(n, GENERAL_OFFER) for n in "ab")), need)


def test_full_nodes_come_after_those_that_accept() -> None:
    full = replace(IDLE, running=4, queued=8)
    slow = replace(IDLE, decode_tokens_per_s=1.0)
    mesh = view(member("a", GENERAL_OFFER, load=full), member("b", GENERAL_OFFER, load=slow))
    assert [c.member.name for c in decide(mesh).candidates] == ["b", "a"]


def test_a_node_that_refused_this_request_counts_as_full() -> None:
    mesh = view(*(member(n, GENERAL_OFFER) for n in "ab"))
    need = Need(full=frozenset([NodeId("a")]))
    assert [c.member.name for c in decide(mesh, need).candidates] == ["b", "a"]


def test_all_full_says_when_to_ask_again() -> None:
    full = replace(IDLE, running=4, queued=8, pending_decode_tokens=6000)
    with pytest.raises(QueueFull) as error:
        decide(view(member("a", GENERAL_OFFER, load=full), member("b", GENERAL_OFFER, load=full)))
    assert error.value.retry_after_s is not None
    assert RETRY_AFTER_MIN_S < error.value.retry_after_s <= RETRY_AFTER_MAX_S


def test_full_with_the_rest_failed_is_reported_as_full() -> None:
    full = replace(IDLE, running=4, queued=8)
    with pytest.raises(QueueFull):
        decide(
            view(member("a", GENERAL_OFFER, load=full), member("b", GENERAL_OFFER)),
            Need(failed=frozenset([NodeId("b")])),
        )


def test_without_hops_only_the_local_node_may_serve() -> None:
    busy = replace(IDLE, running=4)
    mesh = view(member("a", GENERAL_OFFER, load=busy), member("b", GENERAL_OFFER))
    assert [c.member.name for c in decide(mesh, Need(hops_left=0)).candidates] == ["a"]
    with pytest.raises(HopLimit):
        decide(view(*three()), Need(profile="code", hops_left=0))


def test_an_empty_mesh_is_no_candidate() -> None:
    with pytest.raises(NoCandidate, match="offers a profile yet"):
        decide(view(member("a")))


# --- expected time -----------------------------------------------------------------------


def test_the_idle_node_is_preferred_to_the_busy_one() -> None:
    busy = replace(IDLE, running=4, queued=3, pending_decode_tokens=1000)
    mesh = view(member("a", GENERAL_OFFER, load=busy), member("b", GENERAL_OFFER))
    assert served_by(decide(mesh)) == "b"


def test_a_profile_of_higher_weight_is_chosen_as_if_its_node_were_faster() -> None:
    mesh = view(member("a", GENERAL_OFFER), member("b", replace(GENERAL_OFFER, name="big")))
    need = Need(prompt_tokens=50, max_tokens=100)
    for weights, best in (({}, "a"), ({"big": 4.0}, "b"), ({"general": 4.0}, "a")):
        decision = choose(need, Index.of(mesh), Traffic(), Random(0), weights=weights, explain=True)
        assert served_by(decision) == best
        assert ("weight 4" in decision.considered[0].reason) is bool(weights)


def test_the_faster_node_is_preferred() -> None:
    fast = replace(IDLE, decode_tokens_per_s=300.0)
    assert served_by(decide(view(member("a", GENERAL_OFFER), member("b", GENERAL_OFFER, load=fast)))) == "b"


def test_a_long_prompt_goes_where_prefill_is_fast() -> None:
    reader = replace(IDLE, prefill_tokens_per_s=2000.0, decode_tokens_per_s=50.0)
    mesh = view(member("a", GENERAL_OFFER), member("b", GENERAL_OFFER, load=reader))
    assert served_by(decide(mesh, Need(prompt_tokens=2000, max_tokens=16))) == "b"
    assert served_by(decide(mesh, Need(prompt_tokens=10, max_tokens=200))) == "a"


def test_the_local_node_is_preferred_when_about_as_good() -> None:
    slower = replace(IDLE, decode_tokens_per_s=90.0)
    mesh = view(
        member("a", GENERAL_OFFER),
        member("b", GENERAL_OFFER, load=slower),
        member("c", GENERAL_OFFER),
        local="b",
    )
    assert {served_by(decide(mesh, seed=s)) for s in range(20)} == {"b"}


def test_the_local_node_is_passed_over_when_it_is_clearly_worse() -> None:
    slow = replace(IDLE, decode_tokens_per_s=50.0)
    mesh = view(member("a", GENERAL_OFFER), member("b", GENERAL_OFFER, load=slow), local="b")
    assert served_by(decide(mesh)) == "a"


def test_among_equals_the_higher_tier_comes_before_the_local_node() -> None:
    better = replace(GENERAL_OFFER, tier=2)
    assert served_by(decide(view(member("a", GENERAL_OFFER), member("b", better)))) == "b"


def test_among_equal_strangers_chance_decides() -> None:
    mesh = view(member("a", CODE_OFFER), *(member(n, GENERAL_OFFER) for n in "bcd"))
    assert {served_by(decide(mesh, seed=s)) for s in range(40)} == {"b", "c", "d"}


def test_a_distant_node_loses_by_its_round_trip() -> None:
    far = member("b", GENERAL_OFFER, rtt_s=0.8)
    mesh = view(member("a", CODE_OFFER), far, member("c", GENERAL_OFFER))
    assert {served_by(decide(mesh, Need(max_tokens=10), seed=s)) for s in range(10)} == {"c"}


def test_a_newcomer_without_measured_speed_is_taken_to_be_like_the_others() -> None:
    new = replace(IDLE, prefill_tokens_per_s=0.0, decode_tokens_per_s=0.0)
    mesh = view(member("a", CODE_OFFER), member("b", GENERAL_OFFER, load=new), member("c", GENERAL_OFFER))
    assert {served_by(decide(mesh, seed=s)) for s in range(20)} == {"b", "c"}


def test_a_context_too_short_for_the_prompt_comes_last() -> None:
    short = replace(GENERAL_OFFER, context_tokens=512)
    mesh = view(member("a", short), member("b", GENERAL_OFFER))
    assert [c.member.name for c in decide(mesh, Need(prompt_tokens=1000)).candidates] == ["b", "a"]


# --- own traffic -------------------------------------------------------------------------


def test_requests_that_the_load_report_cannot_show_yet_are_counted() -> None:
    mesh = view(member("a", CODE_OFFER), *(member(n, GENERAL_OFFER) for n in "bc"))
    traffic = Traffic()
    counts: Counter[str] = Counter()
    need = Need(prompt_tokens=50, max_tokens=100)
    for i in range(8):
        decision = decide(mesh, need, traffic=traffic, seed=i)
        send(traffic, f"r{i}", decision.candidates[0], need)
        counts[served_by(decision)] += 1
    assert counts == {"b": 4, "c": 4}


def test_unreported_requests_fill_a_node() -> None:
    small = replace(IDLE, slots=1, queue_max=1)
    mesh = view(member("a", GENERAL_OFFER, load=small))
    traffic = Traffic()
    for key in ("r1", "r2"):
        send(traffic, key, decide(mesh, traffic=traffic).candidates[0], Need())
    with pytest.raises(QueueFull):
        decide(mesh, traffic=traffic)


# --- policies ----------------------------------------------------------------------------


def test_round_robin_takes_turns_whatever_the_load() -> None:
    loads = {"b": IDLE, "c": replace(IDLE, running=3), "d": replace(IDLE, decode_tokens_per_s=1.0)}
    mesh = view(member("a", CODE_OFFER), *(member(n, GENERAL_OFFER, load=x) for n, x in loads.items()))
    traffic = Traffic()
    turns = []
    for i in range(9):
        candidate = decide(mesh, policy=Policy.ROUND_ROBIN, traffic=traffic, seed=i).candidates[0]
        send(traffic, f"r{i}", candidate, Need())
        turns.append(candidate.member.name)
    assert sorted(turns[:3]) == ["b", "c", "d"]
    assert turns == turns[:3] * 3


def test_least_loaded_counts_requests_a_slot() -> None:
    busy = replace(IDLE, slots=8, running=3)
    mesh = view(
        member("a", GENERAL_OFFER, load=replace(IDLE, slots=2, running=1)),
        member("b", GENERAL_OFFER, load=replace(busy, decode_tokens_per_s=1.0)),
    )
    assert served_by(decide(mesh, policy=Policy.LEAST_LOADED)) == "b"


def test_random_spreads_evenly() -> None:
    mesh = view(*(member(n, GENERAL_OFFER) for n in "abc"))
    counts = Counter(served_by(decide(mesh, policy=Policy.RANDOM, seed=s)) for s in range(300))
    assert min(counts[n] for n in "abc") > 70


def test_policies_are_parsed_by_name() -> None:
    assert [Policy.parse(p.value) for p in Policy] == list(Policy)
    with pytest.raises(ConfigError, match="mean 'least-loaded'"):
        Policy.parse("least-load")


# --- large meshes ------------------------------------------------------------------------


def large(count: int, *offers: ProfileOffer) -> MeshView:
    members = [member(f"{i:04}", *(offers or (GENERAL_OFFER,))) for i in range(count)]
    return view(*members, local="0000")


def test_in_a_large_mesh_different_entry_nodes_do_not_herd() -> None:
    mesh = replace(large(200), local=NodeId("none"))
    counts = Counter(served_by(decide(mesh, seed=s)) for s in range(400))
    assert max(counts.values()) < 12
    assert len(counts) > 130


def test_in_a_large_mesh_the_local_node_is_always_considered() -> None:
    assert {served_by(decide(large(200), seed=s)) for s in range(20)} == {"0000"}


def test_in_a_large_mesh_the_last_one_alive_is_found() -> None:
    mesh = large(300)
    dead = tuple(m if m.name == "0177" else replace(m, state=NodeState.DEAD) for m in mesh.members)
    assert served_by(decide(replace(mesh, members=dead))) == "0177"


def test_an_explanation_of_a_large_mesh_is_bounded() -> None:
    decision = decide(large(1000), explain=True)
    assert len(decision.considered) == EXPLAINED_CANDIDATES_MAX
    assert {c.member.id for c in decision.considered[:3]} <= {c.member.id for c in decision.candidates}


# --- explanations ------------------------------------------------------------------------


def test_an_explanation_names_everyone_and_why() -> None:
    full = replace(IDLE, running=4, queued=8)
    mesh = view(
        member("a", GENERAL_OFFER),
        member("b", CODE_OFFER),
        member("c", CODE_OFFER, load=full),
        member("d", CODE_OFFER, state=NodeState.DEAD),
        member("e", replace(CODE_OFFER, tier=3), load=replace(IDLE, decode_tokens_per_s=1)),
    )
    decision = decide(mesh, Need(domain="programming", prompt_tokens=30, max_tokens=100), explain=True)
    reasons = {c.member.name: c.reason for c in decision.considered}
    assert [c.member.name for c in decision.considered][:3] == ["b", "e", "c"]
    assert reasons["b"].startswith(
        "done in 1.10 s (network 2 ms, waiting 0.00 s, prompt 0.10 s, answer 1.00 s)"
    )
    assert "tier 3" in reasons["e"]
    assert "full" in reasons["c"]
    assert reasons["d"] == "it is dead"
    assert reasons["a"] == "others are nearer to the wish"
    assert {c.member.name for c in decision.considered if c.eligible} == {"b", "c", "e"}


def cold(load_s: float) -> Load:
    return replace(IDLE, cold=(ColdProfile(profile="code", load_s=load_s),))


def test_a_model_that_is_in_memory_is_preferred_to_one_that_is_loaded_first() -> None:
    mesh = view(member("a", GENERAL_OFFER), member("b", CODE_OFFER, load=cold(4.0)), member("c", CODE_OFFER))
    decision = decide(mesh, Need(domain="programming", prompt_tokens=30, max_tokens=100), explain=True)
    assert [c.member.name for c in decision.candidates] == ["c", "b"]
    assert [round(c.score, 1) for c in decision.candidates] == [1.1, 5.1]
    reasons = {c.member.name: c.reason for c in decision.considered}
    assert "its model is loaded first, about 4.0 s" in reasons["b"]
    assert "loaded first" not in reasons["c"]


def test_a_load_is_worth_it_where_those_in_memory_are_slower_still() -> None:
    slow = replace(IDLE, decode_tokens_per_s=5)
    mesh = view(
        member("a", GENERAL_OFFER),
        member("b", CODE_OFFER, load=cold(4.0)),
        member("c", CODE_OFFER, load=slow),
    )
    decision = decide(mesh, Need(domain="programming", prompt_tokens=30, max_tokens=100))
    assert [c.member.name for c in decision.candidates] == ["b", "c"]


def test_a_cold_model_costs_the_node_s_other_profiles_nothing() -> None:
    both = member("b", CODE_OFFER, HEALTH_OFFER, load=cold(4.0))
    decision = decide(view(member("a", GENERAL_OFFER), both), Need(profile="health", max_tokens=100))
    assert decision.candidates[0].score < 2


def test_explaining_does_not_change_the_decision() -> None:
    mesh = large(100)
    plain, explained = decide(mesh, seed=3), decide(mesh, seed=3, explain=True)
    assert plain.candidates == explained.candidates
    assert plain.considered == ()


@pytest.mark.parametrize("policy", list(Policy), ids=lambda p: p.value)
def test_every_policy_explains_itself(policy: Policy) -> None:
    decision = decide(view(*three()), policy=policy, explain=True)
    assert all(c.reason for c in decision.considered)


# --- whatever the mesh looks like --------------------------------------------------------

LOADS = st.builds(
    Load,
    engine=st.sampled_from(EngineState),
    slots=st.integers(0, 4),
    running=st.integers(0, 5),
    queued=st.integers(0, 5),
    queue_max=st.integers(0, 4),
    pending_prefill_tokens=st.integers(0, 5000),
    pending_decode_tokens=st.integers(0, 5000),
    prefill_tokens_per_s=st.sampled_from([0.0, 0.5, 300.0]),
    decode_tokens_per_s=st.sampled_from([0.0, 0.5, 100.0]),
    draining=st.booleans(),
)
MEMBERS = st.lists(
    st.builds(
        member,
        st.integers(0, 30).map(lambda i: f"{i:02}"),
        st.sampled_from([GENERAL_OFFER, CODE_OFFER, HEALTH_OFFER]),
        state=st.sampled_from(NodeState),
        load=LOADS,
        rtt_s=st.sampled_from([0.0, 0.001, 3.0]),
    ),
    max_size=20,
    unique_by=lambda m: m.id,
)
NEEDS = st.builds(
    Need,
    profile=st.sampled_from(["", "code"]),
    model=st.sampled_from(["", "smol"]),
    domain=st.sampled_from(["", "programming", "first_aid"]),
    prompt_tokens=st.integers(0, 4000),
    max_tokens=st.integers(1, 1000),
    failed=st.frozensets(st.sampled_from([NodeId(f"{i:02}") for i in range(31)]), max_size=5),
    full=st.frozensets(st.sampled_from([NodeId(f"{i:02}") for i in range(31)]), max_size=5),
    hops_left=st.integers(0, 2),
)


@given(MEMBERS, NEEDS, st.sampled_from(Policy), st.integers(0, 5))
@settings(max_examples=300)
def test_whoever_is_chosen_can_serve_and_whoever_refuses_says_why(
    members: list[Member], need: Need, policy: Policy, seed: int
) -> None:
    mesh = view(*members, local="00")
    able = {
        m.id
        for m in members
        if m.state is NodeState.ALIVE
        and m.load.engine is EngineState.READY
        and not m.load.draining
        and m.id not in need.failed
        and (need.hops_left or m.id == mesh.local)
    }
    try:
        decision = decide(mesh, need, policy=policy, explain=True, seed=seed)
    except FieldmeshError as error:
        assert error.message and (not error.retryable or error.retry_after_s)
        return
    chosen = [c.member.id for c in decision.candidates]
    assert set(chosen) <= able
    assert len(set(chosen)) == len(chosen)
    assert chosen[0] not in need.full
    for candidate in decision.candidates:
        offer = candidate.offer
        assert not need.profile or offer.name == need.profile
        assert not need.model or offer.model == need.model
        owns = any(d.name == need.domain for d in offer.domains)
        assert decision.fallback or (owns if need.domain else need.profile or need.model or offer.generalist)
    assert [c.member.id for c in decision.considered[: len(chosen)]] == chosen
    assert all(c.reason for c in decision.considered)
