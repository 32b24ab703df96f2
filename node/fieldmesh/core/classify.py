"""Which domain a text belongs to, learned from the words of the profiles themselves.

Owns: the features, the linear model, its calibration, and when to abstain. Must not: know nodes or
profiles, perform I/O, or depend on anything outside the standard library.

The model is kernel-free ridge regression on one-of-n targets over TF-IDF features: words, pairs of
neighbouring words, and character n-grams inside words, each block scaled to length one. It is solved
by dual coordinate ascent (Hsieh et al., "A Dual Coordinate Descent Method for Large-scale Linear SVM", 2008;
for squared loss each step is exact). Regression to targets rather than a softmax keeps the scores of
texts unlike anything seen near zero, and the mass of features that training never saw counts towards a
text's length, so unknown words lower every score: that is what makes abstention work.

In scripts written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every two or three
neighbouring characters stand for a word.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter, mul

from fieldmesh.core.background import TEXTS
from fieldmesh.core.model import Domain

TEXT_CHARS_MAX = 1000
"""Only the beginning of a longer text is read."""

EXAMPLES_MAX = 6000
"""Examples learned in all; of more, every domain keeps its first ones in fair share."""

WORD_CHARS_MAX = 40
"""Only the beginning of a longer word is cut into character n-grams (hashes, base64)."""

RIDGE = 0.25
BACKGROUND_RIDGE = 1.0
"""Regularisation of examples and of background texts: the latter count a quarter."""

EPOCHS = 4
EPOCHS_AFTER = 2
"""Passes over the examples, and again when those held out at first are added."""

HELD_OUT_EVERY = 5
"""Every fifth example is kept back at first, to see what scores unseen texts get."""

CHANGE_MIN = 0.002
"""Smaller steps of a weight vector (whose examples have length one) are not taken."""

MIDDLE = 0.4
"""Where the border is on the way from the mean score of unseen texts of no domain to that of unseen texts of
their own domain. Not half-way: the former vary less."""

MIDDLE_MIN = 0.18
"""Score below which no domain is named, whatever the calibration says: a learned example scores about one."""

OUTSIDE = -1
"""Stands for no domain among the columns of the model."""

ABSTAIN_BELOW = 0.5
"""Confidence from which a domain is named: where its texts and others are equally likely."""

_MARKS = re.compile("[\u0300-\u036f\u0640\u064b-\u065f\u0670]")
_SYLLABIC = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_IDEOGRAPHIC = (
    "\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_UNSPACED = _SYLLABIC + _IDEOGRAPHIC
_PUNCTUATION = "!-/:-@\\[-`{-~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f\u060c\u061b\u061f\u0964\u0965"
_TOKEN = re.compile(f"[{_UNSPACED}]+|[^\\s{_PUNCTUATION}{_UNSPACED}]+|[!-/:-@\\[-`{{-~]")
_ALPHABETS_END = "\u0590"
"""Beyond it are scripts that leave out vowels or write syllables: fewer characters say as much."""

_PHRASES = re.compile(r"[^\s,;:.!?、，；：。！？،؛][^,;:.!?\n、，；：。！？،؛]*")
_RUNS = ((re.compile(f"[{_IDEOGRAPHIC}]"), 2), (re.compile(f"[{_SYLLABIC}]"), 3))
"""Scripts without spaces, and how many characters stand for a word in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """What a text is about. ``domain`` is None where the classifier abstains.

    ``confidence`` (0 to 1) is the calibrated probability that the text belongs to the first domain of
    ``ranking``, which lists all domains with their share of it, best first.
    """

    domain: str | None
    confidence: float
    ranking: tuple[tuple[str, float], ...] = ()


# --- features ----------------------------------------------------------------------------

BLOCKS = 3
"""Words, pairs of words, character n-grams."""


def _block_weights(texts: int) -> tuple[float, ...]:
    """How much each block counts; the squares sum to one.

    The more text there is to learn from, the more often pairs of words come again and the less n-grams have
    to stand in for words that were never seen.
    """
    words = 0.57
    pairs = min(0.65, max(0.3, 0.2 * math.log10(1 + texts) - 0.12))
    return words, pairs, math.sqrt(1 - words**2 - pairs**2)


def _normal(text: str) -> str:
    """Compatibility forms made one, case folded, accents and optional vowel signs taken off."""
    folded = unicodedata.normalize("NFKD", text[:TEXT_CHARS_MAX].casefold())
    return unicodedata.normalize("NFKC", _MARKS.sub("", folded))


def _counts(text: str) -> tuple[Counter[str], ...]:
    """How often each feature occurs in the text, block by block."""
    words: list[str] = []
    runs: list[str] = []
    for token in _TOKEN.findall(_normal(text)):
        runs.append(token[:WORD_CHARS_MAX])
        length = next((length for script, length in _RUNS if script.match(token)), len(token))
        words.extend(token[i : i + length] for i in range(max(1, len(token) - length + 1)))
    pairs = Counter(map("{} {}".format, words, words[1:]))
    pairs.update(map("{} _ {}".format, words, words[2:]))
    grams: Counter[str] = Counter()
    for run in runs:
        padded = f"<{run}>"
        for length in (2, 3, 4) if run[0] > _ALPHABETS_END else (3, 4, 5):
            grams.update(padded[i : i + length] for i in range(len(padded) - length + 1))
    return Counter(words), pairs, grams


@dataclass(frozen=True, slots=True)
class _Vector:
    """A text as sparse features. Begins with two empty entries, so that ``itemgetter`` gives a tuple."""

    ids: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def known(self) -> bool:
        return len(self.ids) > 2


class _Vocabulary:
    """The features of the training texts and their weights (inverse document frequency)."""

    def __init__(self, texts: Sequence[tuple[Counter[str], ...]]) -> None:
        self._ids: tuple[dict[str, int], ...] = tuple({} for _ in range(BLOCKS))
        self._block_weights = _block_weights(len(texts))
        self._idf = [0.0]
        documents = len(texts)
        self._unknown_idf = math.log(1 + documents) + 1
        for block, ids in enumerate(self._ids):
            frequency: Counter[str] = Counter()
            for counts in texts:
                frequency.update(counts[block].keys())
            for feature, count in frequency.items():
                ids[feature] = len(self._idf)
                self._idf.append(math.log((1 + documents) / (1 + count)) + 1)

    def __len__(self) -> int:
        return len(self._idf)

    def vector(self, counts: tuple[Counter[str], ...]) -> _Vector:
        """Each block at its weight's length, of which unknown features take their part."""
        all_ids = [0, 0]
        values = [0.0, 0.0]
        for ids, weight, block in zip(self._ids, self._block_weights, counts, strict=True):
            squares = 0.0
            found: list[float] = []
            for feature, count in block.items():
                frequency = 1 + math.log(count)
                index = ids.get(feature)
                if index is None:
                    squares += (frequency * self._unknown_idf) ** 2
                else:
                    value = frequency * self._idf[index]
                    squares += value * value
                    all_ids.append(index)
                    found.append(value)
            if found:
                scale = weight / math.sqrt(squares)
                values.extend([value * scale for value in found])
        return _Vector(tuple(all_ids), tuple(values))


# --- the model ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Example:
    """A text of a domain (by column), or of none, and its dual variables, one a column."""

    vector: _Vector
    column: int
    ridge: float
    curvature: float
    duals: list[float]


class _Ridge:
    """One-of-n ridge regression, one column of weights a domain; examples may be added between epochs."""

    def __init__(self, features: int, domains: int) -> None:
        self.weights = [[0.0] * features for _ in range(domains)]
        self._examples: list[_Example] = []

    def learn(self, texts: Sequence[tuple[_Vector, int]], epochs: int) -> None:
        """Add texts with their columns, then pass over all texts that often."""
        for vector, column in texts:
            ridge = BACKGROUND_RIDGE if column == OUTSIDE else RIDGE
            squares = sum(map(mul, vector.values, vector.values))
            duals = [0.0] * len(self.weights)
            self._examples.append(_Example(vector, column, ridge, squares + ridge, duals))
        count = len(self._examples)
        # Neighbours in the list are alike: steps of about the golden section visit them far apart.
        stride = next(s for s in range(int(count * 0.618) + 1, count + 2) if math.gcd(s, count) == 1)
        for epoch in range(epochs):
            for step in range(count):
                self._step(self._examples[(step * stride + epoch) % count])

    def _step(self, example: _Example) -> None:
        ids, values = example.vector.ids, example.vector.values
        pick = itemgetter(*ids)
        for column, weights in enumerate(self.weights):
            target = float(column == example.column)
            score = sum(map(mul, pick(weights), values))
            change = (target - score - example.ridge * example.duals[column]) / example.curvature
            if abs(change) < CHANGE_MIN:
                continue
            example.duals[column] += change
            for index, value in zip(ids, values, strict=True):
                weights[index] += change * value

    def scores(self, vector: _Vector) -> list[float]:
        pick = itemgetter(*vector.ids)
        return [sum(map(mul, pick(weights), vector.values)) for weights in self.weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calibration:
    """Turns the highest score into the probability that the text is of that domain.

    Two normal distributions, of the scores of texts of a domain and of texts of none, make a logistic curve
    of the score; ``middle`` is where it is one half.
    """

    middle: float
    slope: float

    @classmethod
    def of(cls, inside: Sequence[float], outside: Sequence[float]) -> _Calibration:
        inside_mean = _mean(inside, 0.3)
        outside_mean = _mean(outside, 0.0)
        inside_variance = _mean([(x - inside_mean) ** 2 for x in inside], 0.01)
        outside_variance = _mean([(x - outside_mean) ** 2 for x in outside], 0.01)
        gap = max(0.05, inside_mean - outside_mean)
        slope = gap / max(0.01, (inside_variance + outside_variance) / 2)
        return cls(middle=max(MIDDLE_MIN, outside_mean + gap * MIDDLE), slope=slope)

    def probability(self, score: float) -> float:
        return 1 / (1 + math.exp(-max(-40.0, min(40.0, self.slope * (score - self.middle)))))


def _mean(values: Sequence[float], prior: float) -> float:
    """The mean, drawn towards a prior that weighs as much as two values."""
    return (sum(values) + 2 * prior) / (len(values) + 2)


class Classifier:
    """A trained classifier: immutable, and the same for the same domains on every machine."""

    def __init__(
        self,
        names: tuple[str, ...],
        digest: str,
        vocabulary: _Vocabulary,
        ridge: _Ridge,
        calibration: _Calibration,
    ) -> None:
        self.names = names
        self.digest = digest
        self._vocabulary = vocabulary
        self._weights = [array("f", column) for column in ridge.weights]
        self._calibration = calibration

    @classmethod
    def train(cls, domains: Sequence[Domain]) -> Classifier:
        """Learn from the domains' names, descriptions and examples.

        Takes about half a second for 10 domains of 30 examples and 3 s for 300: call it off the event loop.
        """
        ordered = sorted(domains, key=lambda d: d.name)
        share = max(1, EXAMPLES_MAX // max(1, len(ordered)))
        phrases = [(_counts(t), column) for column, domain in enumerate(ordered) for t in _phrases(domain)]
        examples = [
            (_counts(t), column) for column, domain in enumerate(ordered) for t in domain.examples[:share]
        ]
        background = [(_counts(t), OUTSIDE) for t in TEXTS]
        vocabulary = _Vocabulary([counts for counts, _ in phrases + examples + background])
        texts = [(vocabulary.vector(counts), column) for counts, column in examples + background]
        held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        texts += [(vocabulary.vector(counts), column) for counts, column in phrases]
        ridge = _Ridge(len(vocabulary), len(ordered))
        ridge.learn(texts, EPOCHS)
        calibration = _calibrate(ridge, held_out)
        ridge.learn(held_out, EPOCHS_AFTER)
        return cls(tuple(d.name for d in ordered), training_digest(domains), vocabulary, ridge, calibration)

    def classify(self, text: str) -> Classification:
        """What a text is about; abstains where it is like none of the domains, or says too little."""
        vector = self._vocabulary.vector(_counts(text))
        if not self.names or not vector.known:
            return Classification(domain=None, confidence=0.0, ranking=tuple((n, 0.0) for n in self.names))
        pick = itemgetter(*vector.ids)
        scores = [sum(map(mul, pick(weights), vector.values)) for weights in self._weights]
        best = max(scores)
        confidence = self._calibration.probability(best)
        odds = [math.exp(max(-40.0, self._calibration.slope * (score - best))) for score in scores]
        total = sum(odds)
        ranking = sorted(
            ((n, o / total) for n, o in zip(self.names, odds, strict=True)), key=lambda r: (-r[1], r[0])
        )
        domain = ranking[0][0] if confidence >= ABSTAIN_BELOW else None
        return Classification(domain=domain, confidence=confidence, ranking=tuple(ranking))

    def __repr__(self) -> str:
        return f"Classifier({len(self.names)} domains, {len(self._vocabulary)} features, {self.digest[:12]})"


def _phrases(domain: Domain) -> Iterable[str]:
    """A domain's name, and each phrase of its description: single words here are strong evidence."""
    yield domain.name.replace("_", " ").replace("-", " ")
    yield from _PHRASES.findall(domain.description)


def _calibrate(ridge: _Ridge, held_out: Sequence[tuple[_Vector, int]]) -> _Calibration:
    """What texts score that were not learned: those of a domain in it, those of none at best."""
    inside: list[float] = []
    outside: list[float] = []
    for vector, column in held_out:
        scores = ridge.scores(vector)
        if column == OUTSIDE:
            outside.append(max(scores, default=0.0))
        else:
            inside.append(scores[column])
    return _Calibration.of(inside, outside)


def merged(domains: Iterable[Domain]) -> tuple[Domain, ...]:
    """Domains by name; where several profiles declare one, their words are put together."""
    descriptions: dict[str, dict[str, None]] = {}
    examples: dict[str, dict[str, None]] = {}
    for domain in dict.fromkeys(domains):
        descriptions.setdefault(domain.name, {})[domain.description] = None
        examples.setdefault(domain.name, {}).update(dict.fromkeys(domain.examples))
    return tuple(
        Domain(
            name=name,
            description="\n".join(sorted(descriptions[name])),
            examples=tuple(sorted(examples[name])),
        )
        for name in sorted(descriptions)
    )


def training_digest(domains: Sequence[Domain]) -> str:
    """Names a set of domains by what a classifier would learn from it."""
    digest = hashlib.sha256()
    for domain in sorted(domains, key=lambda d: d.name):
        for text in (domain.name, domain.description, *domain.examples):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        digest.update(b"\xff\xff\xff\xff")
    return digest.hexdigest()
