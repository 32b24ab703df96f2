"""What the mesh offers. Owns: who may answer what, the index of one view, and the words for names that miss.

Must not: know how busy anybody is, or choose (``routing`` does).

*Who may answer* (``Catalogue.groups``): a profile or model is a demand: nobody else will do. A domain is a
wish: its owners, else a generalist, else anyone, the latter two with ``fallback``. With nothing said a
generalist answers without being a fallback. Who owns a domain is what the profiles declare, unless the mesh's
configuration says otherwise (``owners``: profiles by domain, the preferred first).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fieldmesh.core.classify import Classifier, merged, training_digest
from fieldmesh.core.errors import DomainNotFound, FieldmeshError, ModelNotFound, ProfileNotFound
from fieldmesh.core.model import Domain, MeshView, NodeId, ProfileOffer, Row

NAMES_SHOWN_MAX = 20
NAME_SHOWN_CHARS_MAX = 64
GROUPS_CACHED_MAX = 1024


@dataclass(frozen=True, slots=True)
class Offer:
    """A profile of the member at a position of the view."""

    position: int
    profile: ProfileOffer


@dataclass(frozen=True, slots=True)
class Group:
    """Those who may answer, one profile a node."""

    offers: tuple[Offer, ...]
    local: Offer | None
    fallback: bool


class Catalogue:
    """What all known nodes offer, the dead included: slow facts, rebuilt only when a row changes.

    Telling "owners gone" from "never known" needs the rows of dead members.
    """

    __slots__ = (
        "_groups",
        "_local",
        "_offers",
        "domain_names",
        "domains",
        "models",
        "owners",
        "profiles",
        "rows",
        "training_digest",
    )

    def __init__(self, view: MeshView, owners: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.owners = owners or {}
        self.rows: tuple[tuple[NodeId, Row | None], ...] = tuple((m.id, m.row) for m in view.members)
        self._local = next((i for i, m in enumerate(view.members) if m.id == view.local), -1)
        self._offers = tuple(
            Offer(position, profile)
            for position, (_, row) in enumerate(self.rows)
            if row is not None
            for profile in row.profiles
        )
        self._groups: dict[tuple[str, str, str], tuple[Group, ...]] = {}
        self.profiles = frozenset(o.profile.name for o in self._offers)
        self.models = frozenset(o.profile.model for o in self._offers)
        self.domains: tuple[Domain, ...] = merged(d for o in self._offers for d in o.profile.domains)
        self.domain_names = frozenset(d.name for d in self.domains).union(
            name for name, profiles in self.owners.items() if self.profiles.intersection(profiles)
        )
        self.training_digest = training_digest(self.domains)

    def describes(self, view: MeshView) -> bool:
        """Whether the view has the same members with the same rows (the same objects: this is cheap)."""
        return len(view.members) == len(self.rows) and all(
            m.row is row and m.id == node for m, (node, row) in zip(view.members, self.rows, strict=True)
        )

    def groups(self, profile: str, model: str, domain: str) -> tuple[Group, ...]:
        """Those who may answer, the preferred first. Raises Profile-, Model- and DomainNotFound."""
        key = (profile, model, domain)
        found = self._groups.get(key)
        if found is None:
            found = self._make_groups(profile, model, domain)
            if len(self._groups) < GROUPS_CACHED_MAX:
                self._groups[key] = found
        return found

    def _make_groups(self, profile: str, model: str, domain: str) -> tuple[Group, ...]:
        if profile and profile not in self.profiles:
            raise _not_found(ProfileNotFound, "profile", profile, self.profiles)
        if model and model not in self.models:
            raise _not_found(ModelNotFound, "model", model, self.models)
        if domain and domain not in self.domain_names:
            raise _not_found(DomainNotFound, "domain", domain, self.domain_names)

        def allowed(offer: ProfileOffer) -> bool:
            return (not profile or offer.name == profile) and (not model or offer.model == model)

        demanded = [o for o in self._offers if allowed(o.profile)]
        if not demanded and profile and model:
            raise ProfileNotFound(
                f"Profile {quoted(profile)} is offered, but not with model {quoted(model)}; leave one of the "
                "two out.",
                field="target.profile",
            )
        generalists = [o for o in demanded if o.profile.generalist]
        if domain:
            wishes = [(owners, False) for owners in self._owners(demanded, domain)]
            wishes += [(generalists, True), (demanded, True)]
        elif profile or model:
            wishes = [(demanded, False)]
        else:
            wishes = [(generalists, False), (demanded, True)]
        return tuple(self._group(offers, fallback) for offers, fallback in wishes if offers)

    def _owners(self, offers: Sequence[Offer], domain: str) -> list[list[Offer]]:
        """Those of ``offers`` who own a domain, the preferred first."""
        profiles = self.owners.get(domain)
        if profiles is not None:
            return [[o for o in offers if o.profile.name == profile] for profile in profiles]
        return [[o for o in offers if any(d.name == domain for d in o.profile.domains)]]

    def _group(self, offers: Sequence[Offer], fallback: bool) -> Group:
        """One profile a node: a generalist rather than a specialist, then the highest tier, then by name."""
        best: dict[int, Offer] = {}
        for offer in sorted(
            offers, key=lambda o: (not o.profile.generalist, -o.profile.tier, o.profile.name)
        ):
            best.setdefault(offer.position, offer)
        return Group(tuple(best[p] for p in sorted(best)), best.get(self._local), fallback)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """One view of the mesh, ready for decisions. ``classifier`` may be older than the view, or None."""

    view: MeshView
    catalogue: Catalogue
    classifier: Classifier | None = None

    @classmethod
    def of(
        cls,
        view: MeshView,
        previous: Index | None = None,
        owners: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Index:
        """Index a view; what did not change since ``previous`` is kept."""
        if previous is None:
            return cls(view=view, catalogue=Catalogue(view, owners))
        same = previous.view.local == view.local and previous.catalogue.describes(view)
        same = same and previous.catalogue.owners == (owners or {})
        catalogue = previous.catalogue if same else Catalogue(view, owners)
        return cls(view=view, catalogue=catalogue, classifier=previous.classifier)

    @property
    def domains(self) -> tuple[Domain, ...]:
        """Every declared domain, ordered by name: what a classifier is trained from."""
        return self.catalogue.domains

    @property
    def training_due(self) -> bool:
        """Whether the domains differ from those that the classifier learned (train off the event loop,
        then ``with_classifier``; until then the older one serves)."""
        if self.classifier is None:
            return bool(self.domains)
        return self.classifier.digest != self.catalogue.training_digest

    def with_classifier(self, classifier: Classifier) -> Index:
        return replace(self, classifier=classifier)


# --- naming what exists ------------------------------------------------------------------


def _not_found(error: type[FieldmeshError], kind: str, name: str, names: Collection[str]) -> FieldmeshError:
    return error(
        f"No node of this mesh offers {kind} {quoted(name)}.{what_exists(kind + 's', names, name)}",
        field=f"target.{kind}",
    )


def what_exists(kinds: str, names: Collection[str], wrong: str) -> str:
    """A sentence or two on what exists and what is nearest to a wrong name."""
    if not names:
        return f" There are no {kinds}."
    listed = sorted(names)
    nearest = difflib.get_close_matches(wrong[:NAME_SHOWN_CHARS_MAX], listed, n=1, cutoff=0.5)
    meant = f" Did you mean {quoted(nearest[0])}?" if nearest else ""
    shown = ", ".join(name[:NAME_SHOWN_CHARS_MAX] for name in listed[:NAMES_SHOWN_MAX])
    more = f" and {len(listed) - NAMES_SHOWN_MAX} more" if len(listed) > NAMES_SHOWN_MAX else ""
    return f"{meant} Known {kinds}: {shown}{more}."


def quoted(name: str) -> str:
    """A name that somebody else chose, quoted and cut short."""
    return repr(name[:NAME_SHOWN_CHARS_MAX])
