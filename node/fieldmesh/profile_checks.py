"""How well profiles can be told apart by the questions they are asked.

Owns: the cross-validated confusion between profiles, and who would get a question. Must not: read files or
know nodes: it says what the classifier says, before any node is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fieldmesh.core.classify import Classification, Classifier, merged
from fieldmesh.core.errors import InvalidRequest
from fieldmesh.core.model import Domain
from fieldmesh.profiles import Profile

FOLDS_MAX = 10
FOLDED_EXAMPLES_MAX = 600
"""Up to this many examples, ten folds are made; beyond, three: each fold is a training of its own."""

EXAMPLES_FOR_A_VERDICT_MIN = 5
QUESTION_CHARS_MAX = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Misrouted:
    """An example that would not reach its own profile, had it not been learned.

    ``to_profiles`` is empty where the classifier abstains: then a generalist answers.
    """

    profile: str
    domain: str
    example: str
    to_domain: str
    to_profiles: tuple[str, ...]
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """What became of every example when it was held out of the training."""

    examples: int
    misrouted: tuple[Misrouted, ...]
    shared_domains: tuple[str, ...]
    too_few: tuple[str, ...]

    @property
    def right(self) -> int:
        return self.examples - len(self.misrouted)

    def between(self) -> dict[tuple[str, str], int]:
        """How many examples of one profile went to another (to "" for none), the most first."""
        counts: dict[tuple[str, str], int] = {}
        for miss in self.misrouted:
            for target in miss.to_profiles or ("",):
                counts[miss.profile, target] = counts.get((miss.profile, target), 0) + 1
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Who would get a question: the owners of its domain, or the generalists where ``domain`` is empty."""

    domain: str
    confidence: float
    profiles: tuple[str, ...]
    ranking: tuple[tuple[str, float], ...]


def check(profiles: Sequence[Profile]) -> Confusion:
    """Which examples of which profile would go where, each judged by a classifier that did not learn it."""
    domains = merged(d for p in profiles for d in p.domains)
    owners = _owners(profiles)
    total = sum(len(d.examples) for d in domains)
    folds = min(total, FOLDS_MAX if total <= FOLDED_EXAMPLES_MAX else 3)
    misrouted: list[Misrouted] = []
    for fold in range(folds):
        classifier = Classifier.train([_without(d, fold, folds) for d in domains])
        for domain in domains:
            for example in domain.examples[fold::folds]:
                verdict = classifier.classify(example)
                if verdict.domain != domain.name:
                    misrouted.extend(_misses(domain, example, verdict, owners))
    return Confusion(
        examples=total,
        misrouted=tuple(sorted(misrouted, key=lambda m: (m.profile, m.domain, m.to_domain, m.example))),
        shared_domains=tuple(d.name for d in domains if len(owners[d.name]) > 1),
        too_few=tuple(d.name for d in domains if len(d.examples) < EXAMPLES_FOR_A_VERDICT_MIN),
    )


def try_question(profiles: Sequence[Profile], text: str) -> Tried:
    """Who would get this question, if every profile had a node. Raises InvalidRequest for an empty one."""
    if not text.strip():
        raise InvalidRequest("The question is empty: give the text to route.", field="text")
    verdict = Classifier.train(merged(d for p in profiles for d in p.domains)).classify(
        text[:QUESTION_CHARS_MAX]
    )
    generalists = tuple(p.name for p in profiles if not p.domains)
    return Tried(
        domain=verdict.domain or "",
        confidence=verdict.confidence,
        profiles=_owners(profiles)[verdict.domain] if verdict.domain else generalists,
        ranking=verdict.ranking,
    )


def _owners(profiles: Sequence[Profile]) -> dict[str, tuple[str, ...]]:
    names = [d.name for p in profiles for d in p.domains]
    return {name: tuple(p.name for p in profiles if any(d.name == name for d in p.domains)) for name in names}


def _without(domain: Domain, fold: int, folds: int) -> Domain:
    kept = tuple(example for i, example in enumerate(domain.examples) if i % folds != fold)
    return replace(domain, examples=kept)


def _misses(
    domain: Domain, example: str, verdict: Classification, owners: dict[str, tuple[str, ...]]
) -> list[Misrouted]:
    """One for each profile that owns the domain but not the one that the example would go to."""
    to_profiles = owners[verdict.domain] if verdict.domain else ()
    return [
        Misrouted(
            profile=owner,
            domain=domain.name,
            example=example,
            to_domain=verdict.domain or "",
            to_profiles=to_profiles,
            confidence=verdict.confidence,
        )
        for owner in owners[domain.name]
        if owner not in to_profiles
    ]
