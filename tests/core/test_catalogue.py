"""What the mesh offers: when the index is made anew, and when its classifier is out of date.

Goal: a load report costs no rebuilding, and nothing that could change an answer is missed. Who may answer a
need is told in ``test_routing``, where it decides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from mesh_views import CODE, CODE_OFFER, GENERAL_OFFER, HEALTH_OFFER, IDLE, member, three, view

from fieldmesh.core.catalogue import Index
from fieldmesh.core.classify import Classifier
from fieldmesh.core.errors import DomainNotFound


def test_a_changed_load_keeps_the_catalogue() -> None:
    a, b, c = three()
    index = Index.of(view(a, b, c))
    later = Index.of(view(a, replace(b, load=replace(IDLE, running=2)), c), index)
    assert later.catalogue is index.catalogue
    assert later.view.members[1].load.running == 2


def test_a_changed_row_a_new_member_and_a_new_local_node_make_a_new_catalogue() -> None:
    a, b, c = three()
    index = Index.of(view(a, b, c))
    assert Index.of(view(a, member("b", HEALTH_OFFER), c), index).catalogue is not index.catalogue
    assert Index.of(view(a, b, c, member("d")), index).catalogue is not index.catalogue
    assert Index.of(view(a, b, c, local="b"), index).catalogue is not index.catalogue


def test_training_is_due_only_when_the_domains_change() -> None:
    index = Index.of(view(*three()))
    assert index.training_due
    index = index.with_classifier(Classifier.train(index.domains))
    assert not index.training_due
    joined = Index.of(view(*three(), member("d", CODE_OFFER)), index)
    assert not joined.training_due
    other = replace(CODE_OFFER, domains=(replace(CODE, examples=("another",)),))
    assert Index.of(view(*three(), member("d", other)), index).training_due


def test_a_mesh_without_domains_never_trains() -> None:
    assert not Index.of(view(member("a", GENERAL_OFFER))).training_due


def test_a_domain_that_several_nodes_declare_is_learned_from_all_their_words() -> None:
    other = replace(CODE_OFFER, domains=(replace(CODE, examples=("Explain this stack trace",)),))
    index = Index.of(view(*three(), member("d", other)))
    programming = next(d for d in index.domains if d.name == "programming")
    assert set(programming.examples) == {*CODE.examples, "Explain this stack trace"}


def test_the_mesh_says_who_owns_a_domain_and_whom_it_prefers() -> None:
    owners = {"first_aid": ("code", "health")}
    index = Index.of(view(*three()), owners=owners)
    groups = index.catalogue.groups("", "", "first_aid")
    names = [([offer.profile.name for offer in group.offers], group.fallback) for group in groups]
    assert names[:3] == [(["code"], False), (["health"], False), (["general"], True)]
    assert index.catalogue.groups("", "", "programming") == Index.of(view(*three())).catalogue.groups(
        "", "", "programming"
    )


def test_a_domain_that_only_the_mesh_knows_can_be_wished_for_if_somebody_offers_its_profile() -> None:
    index = Index.of(view(*three()), owners={"law": ("general",), "art": ("painter",)})
    assert [o.profile.name for o in index.catalogue.groups("", "", "law")[0].offers] == ["general"]
    with pytest.raises(DomainNotFound):
        index.catalogue.groups("", "", "art")


def test_other_owners_make_a_new_catalogue() -> None:
    mesh = view(*three())
    index = Index.of(mesh, owners={"law": ("general",)})
    assert Index.of(mesh, index, {"law": ("general",)}).catalogue is index.catalogue
    assert Index.of(mesh, index).catalogue is not index.catalogue
