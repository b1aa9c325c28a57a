"""One score of a questioned image from its cosines with an identity's references: the rules to choose from.

A rule never sees embeddings, only `Evidence`: what the cosines of the questioned image with the n references, and of
the references with each other, come down to. Two rules are fitted to labelled evidence; both are a handful of numbers,
so that they can be learnt from a few dozen identities and read in the verifier's file. Higher scores are more alike, as
everywhere; those of the fitted rules are no cosines and leave [-1, 1].
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import VectorError, VerifierError
from vitembed.verify import fields
from vitembed.verify.regression import logistic_regression

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# A prior this strong decides alone: stands for "identities do not differ".
_ALL_ALIKE = 1e6


@dataclass(frozen=True)
class Evidence:
    """What is known of P questioned images, each against the references of one identity.

    Attributes:
        count: (P,) int64, number n of references, at least 1.
        mean: (P,) mean of the n cosines with the references.
        best: (P,) the highest of them.
        worst: (P,) the lowest of them.
        own: (P,) mean cosine between different references; NaN for n = 1.
        spread: (P,) standard deviation of the n mean cosines of one reference with the others, which is what `mean`
            would be for a genuine image; NaN for n < 3.
    """

    count: NDArray[np.int64]
    mean: Floats
    best: Floats
    worst: Floats
    own: Floats
    spread: Floats

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, at: Any) -> "Evidence":
        return Evidence(*(getattr(self, field.name)[at] for field in dataclasses.fields(self)))

    @classmethod
    def concatenate(cls, parts: "list[Evidence]") -> "Evidence":
        """Return the evidence of all parts, in order."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))


def gather_evidence(questioned: ArrayLike, references: ArrayLike) -> Evidence:
    """Return the evidence for P questioned images against the references of one identity.

    Args:
        questioned: (P, n) cosines of each questioned image with each reference, n >= 1.
        references: (n, n) cosines of the references with each other.

    Raises:
        VectorError: the shapes do not fit, there is no reference, or a cosine is not finite.

    >>> found = gather_evidence([[0.9, 0.5]], [[1.0, 0.8], [0.8, 1.0]])
    >>> round(float(found.mean[0]), 9), float(found.best[0]), float(found.own[0])
    (0.7, 0.9, 0.8)
    """
    scores, among = np.asarray(questioned, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if scores.ndim != 2 or not scores.shape[1] or among.shape != (scores.shape[1],) * 2:
        raise VectorError(
            "expected cosines of shape (questioned, n) and (n, n) for n references, n of at least 1; "
            f"got {scores.shape} and {among.shape}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(among).all()):
        raise VectorError("cosines with references must be finite; got NaN or infinity")
    n = scores.shape[1]
    with_others = (among.sum(axis=1) - among.diagonal()) / max(n - 1, 1)
    own = float(with_others.mean()) if n > 1 else math.nan
    spread = float(with_others.std(ddof=1)) if n > 2 else math.nan  # of two references, both have the same mean
    return Evidence(
        np.full(len(scores), n),
        scores.mean(axis=1),
        scores.max(axis=1),
        scores.min(axis=1),
        np.full(len(scores), own),
        np.full(len(scores), spread),
    )


class Rule(Protocol):
    """Makes one score of the evidence."""

    name: ClassVar[str]

    def __call__(self, evidence: Evidence) -> Floats:
        """Return finite scores (P,), higher is more alike."""


@dataclass(frozen=True)
class Mean:
    """The mean cosine with the references, in [-1, 1]."""

    name: ClassVar[str] = "mean"

    def __call__(self, evidence: Evidence) -> Floats:
        """Return the scores (P,)."""
        return evidence.mean


@dataclass(frozen=True)
class Centre:
    """The cosine with the mean of the references, in [-1, 1].

    The sum of n unit vectors of mean mutual cosine m has the length sqrt(n (1 + (n - 1) m)).
    """

    name: ClassVar[str] = "centre"

    def __call__(self, evidence: Evidence) -> Floats:
        """Return the scores (P,)."""
        n = evidence.count
        squared = (1 + (n - 1) * np.where(n > 1, evidence.own, 0.0)) / n  # length of the mean
        result: Floats = np.clip(evidence.mean / np.sqrt(np.maximum(squared, 1e-12)), -1, 1)
        return result


@dataclass(frozen=True)
class Max:
    """The cosine with the most alike reference, in [-1, 1]."""

    name: ClassVar[str] = "max"

    def __call__(self, evidence: Evidence) -> Floats:
        """Return the scores (P,)."""
        return evidence.best


@dataclass(frozen=True)
class ZNorm:
    """How many of the identity's own standard deviations the mean cosine lies from what its references have.

    (mean - own') / spread', where own' and spread' are the identity's, pulled towards those of all identities the more
    the fewer references there are, by empirical Bayes: own' = (n own + pull centre) / (n + pull), the posterior mean
    for normal means; spread'^2 = ((n - 1) spread^2 + freedom variance) / (n - 1 + freedom), as in Smyth 2004 ("Linear
    models and empirical Bayes methods for assessing differential expression").

    Attributes:
        centre: mean of `own` over identities.
        pull: number of references that weigh as much as the other identities.
        variance: prior of spread^2, above 0.
        freedom: its degrees of freedom.
    """

    name: ClassVar[str] = "znorm"
    centre: float
    pull: float
    variance: float
    freedom: float

    def __post_init__(self) -> None:
        if not (self.pull > 0 and self.variance > 0 and self.freedom > 0):
            raise VerifierError(f"pull, variance and freedom of znorm must be above 0; got {self}")

    def __call__(self, evidence: Evidence) -> Floats:
        """Return the scores (P,), in standard deviations."""
        n = np.where(np.isnan(evidence.own), 0, evidence.count)
        own = (n * np.nan_to_num(evidence.own) + self.pull * self.centre) / (n + self.pull)
        known = np.where(np.isnan(evidence.spread), 0, evidence.count - 1)
        variance = known * np.nan_to_num(evidence.spread) ** 2 + self.freedom * self.variance
        result: Floats = (evidence.mean - own) / np.sqrt(variance / (known + self.freedom))
        return result

    @classmethod
    def fit(cls, evidence: Evidence, identities: NDArray[np.int64]) -> "ZNorm":
        """Learn how identities differ, by the method of moments.

        Args:
            evidence: one row for each set of references; what it says of questioned images is not looked at.
            identities: (S,) whose sets they are; more than one set each serves where sets are of two references.

        Raises:
            VerifierError: fewer than two sets, or sets of one reference.
        """
        own, spread, n = evidence.own, evidence.spread, float(evidence.count.mean())
        if len(own) < 2 or np.isnan(own).any():
            raise VerifierError("znorm is learnt from two sets or more of at least two references each")
        known = spread[np.isfinite(spread)] ** 2
        # `own` is a U-statistic: its variance within an identity is about 4 / n of that of one reference's mean
        # (Hoeffding 1948). Of two references, only other sets of the same identity tell it.
        variance, freedom = (
            _fit_variances(known, n - 1) if known.size else (_within(own, identities) * n / 4, _ALL_ALIKE)
        )
        within = 4 / n * float(known.mean() if known.size else variance)
        between = float(own.var(ddof=1)) - within
        pull = min(n * within / between, _ALL_ALIKE) if between > 0 else _ALL_ALIKE
        return cls(float(own.mean()), max(pull, 1e-9), max(variance, 1e-9), freedom)


def _within(values: Floats, groups: NDArray[np.int64]) -> float:
    """Return the pooled variance of values (S,) within groups (S,); over all where no group has two."""
    codes = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(codes)
    if (sizes > 1).any():
        from_mean = values - (np.bincount(codes, values) / sizes)[codes]
        return float((from_mean**2).sum() / (sizes - 1).sum())
    return float(values.var(ddof=1))


def _fit_variances(known: Floats, freedom: float) -> tuple[float, float]:
    """Return prior variance and degrees of freedom for variances of `freedom` degrees each: F's first two moments."""
    if known.size < 2 or known.mean() <= 0:
        return 0.0, _ALL_ALIKE
    relative = float(known.var(ddof=1) / known.mean() ** 2) * freedom
    if relative <= 2:  # no more than chance makes of equal variances
        return float(known.mean()), _ALL_ALIKE
    prior = min((2 * freedom - 4 + 4 * relative) / (relative - 2), _ALL_ALIKE)
    return float(known.mean()) * (prior - 2) / prior, prior


@dataclass(frozen=True)
class Dichotomy:
    """Log-odds that the questioned image is the identity's, by a logistic regression on the evidence.

    One model for all identities on differences between images, as in Cha and Srihari 2000 ("Writer identification:
    statistical analysis and dichotomizer"). The number of references is no feature: all sets that it is learnt from
    have the same.

    Attributes:
        weights: of mean, best - mean, mean - worst, own and spread.
        offset: added to their sum.
        own: taken in the place of an unknown `Evidence.own`.
        spread: taken in the place of an unknown `Evidence.spread`.
    """

    name: ClassVar[str] = "dichotomy"
    weights: tuple[float, ...]
    offset: float
    own: float
    spread: float

    def __post_init__(self) -> None:
        if len(self.weights) != 5:
            raise VerifierError(f"weights of dichotomy must be 5 numbers; got {len(self.weights)}")

    def __call__(self, evidence: Evidence) -> Floats:
        """Return the scores (P,), log-odds at even prior odds."""
        result: Floats = _features(evidence, self.own, self.spread) @ np.array(self.weights) + self.offset
        return result

    @classmethod
    def fit(cls, evidence: Evidence, is_match: Bools, skilled: Bools) -> "Dichotomy":
        """Fit the weights by penalised maximum likelihood.

        Matches weigh as much as non-matches in all; of the non-matches, skilled forgeries as much as others.

        Args:
            evidence: (P,) questioned images against references.
            is_match: (P,) whether they show the identity.
            skilled: (P,) whether they imitate it.

        Raises:
            VerifierError: one kind alone.
        """
        others = [kind for kind in (skilled & ~is_match, ~skilled & ~is_match) if kind.any()]
        if not (is_match.any() and others):
            raise VerifierError("dichotomy is learnt from matching and non-matching images; got one kind alone")
        weight = np.where(is_match, 0.5 / is_match.sum(), 0.0)
        for kind in others:
            weight[kind] = 0.5 / (len(others) * kind.sum())
        own, spread = _mean_known(evidence.own), _mean_known(evidence.spread)
        features = _features(evidence, own, spread)
        centre = weight @ features
        scale = np.sqrt(weight @ (features - centre) ** 2)
        scale = np.where(scale > 1e-12, scale, 1.0)
        slopes = logistic_regression((features - centre) / scale, is_match.astype(np.float64), weight)
        weights = slopes[:-1] / scale
        return cls(tuple(map(float, weights)), float(slopes[-1] - weights @ centre), own, spread)


def _features(evidence: Evidence, own: float, spread: float) -> Floats:
    """Return (P, 5) features, with the given numbers where the references are too few to tell."""
    columns = (
        evidence.mean,
        evidence.best - evidence.mean,
        evidence.mean - evidence.worst,
        np.where(np.isnan(evidence.own), own, evidence.own),
        np.where(np.isnan(evidence.spread), spread, evidence.spread),
    )
    return np.stack(columns, axis=1)


def _mean_known(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else 0.0


RULES: tuple[type[Rule], ...] = (Mean, Centre, Max, ZNorm, Dichotomy)
"""From the simplest to the most complex."""


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain JSON values: its name and its numbers."""
    values = dataclasses.asdict(rule)  # type: ignore[call-overload]  # every rule is a dataclass
    return {"name": rule.name, **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}}


def rule_from_dict(values: object) -> Rule:
    """Return the rule that `rule_to_dict` described.

    Raises:
        VerifierError: its name is unknown, or a number is missing, unknown, of another type or out of range.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise VerifierError(f"rule must be an object with a name; got {values!r:.80}")
    kinds = {kind.name: kind for kind in RULES}
    kind = kinds[fields.one_of("name of the rule", values["name"], list(kinds))]
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    checked = fields.check_keys(values, ["name", *names], f"the rule {kind.name}")
    numbers: dict[str, Any] = {name: fields.number(name, checked[name]) for name in names if name != "weights"}
    if "weights" in names:
        numbers["weights"] = fields.numbers("weights", checked["weights"])
    return kind(**numbers)
