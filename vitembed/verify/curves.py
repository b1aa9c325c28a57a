"""From a score to the probability of a match: three curves as plain values.

Every curve is fitted to labelled scores with both kinds of pair weighing the same, whatever their numbers: a set of
pairs for verification holds as many non-matching pairs as somebody cared to make, which says nothing of how often they
come at the counter. What is fitted is therefore the log-likelihood ratio of the score, and a `prior`, the share of
matching pairs where the curve is used, is added to it by Bayes' rule: log odds = log ratio + log(prior / (1 - prior)).

Invariants: a higher score never has a lower probability; no score has the probability 0 or 1 as long as the prior has
not; fitted curves are values of plain numbers that JSON keeps to the last bit.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, VerifierError
from vitembed.verify import fields

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Logistic:
    """log ratio = slope * score + offset, which rises with the score as slope > 0.

    Attributes:
        slope: of the log-likelihood ratio, above 0.
        offset: the log-likelihood ratio of score 0.
        prior: the share of matching pairs that the probability supposes, in (0, 1).
    """

    slope: float
    offset: float
    prior: float = 0.5

    kind: ClassVar[str] = "logistic"

    def log_ratio(self, scores: ArrayLike) -> Array:
        """Return log(density of a matching pair's score / of a non-matching one's); any shape."""
        result: Array = self.slope * np.asarray(scores, dtype=np.float64) + self.offset
        return result

    def __call__(self, scores: ArrayLike) -> Array:
        """Return the probability, in (0, 1), that a pair of this score matches; any shape."""
        return _probability(self.log_ratio(scores), self.prior)


@dataclass(frozen=True)
class _Knots:
    """A log ratio that is known at some scores: straight lines in between, constant beyond them.

    Attributes:
        scores: K >= 2 of them, strictly rising.
        log_ratios: K of them, not falling.
        prior: the share of matching pairs that the probability supposes, in (0, 1).
    """

    scores: tuple[float, ...]
    log_ratios: tuple[float, ...]
    prior: float = 0.5

    def log_ratio(self, scores: ArrayLike) -> Array:
        """Return log(density of a matching pair's score / of a non-matching one's); any shape."""
        result: Array = np.interp(np.asarray(scores, dtype=np.float64), self.scores, self.log_ratios)
        return result

    def __call__(self, scores: ArrayLike) -> Array:
        """Return the probability, in (0, 1), that a pair of this score matches; any shape."""
        return _probability(self.log_ratio(scores), self.prior)


@dataclass(frozen=True)
class Isotonic(_Knots):
    """The rising steps that fit the pairs best, joined: its points are the steps' mean scores.

    Between points the log ratio is a straight line, and beyond the first and the last it is constant.
    """

    kind: ClassVar[str] = "isotonic"


@dataclass(frozen=True)
class LikelihoodRatio(_Knots):
    """The ratio of two smoothed densities, of the scores of matching and of non-matching pairs, made to rise.

    Between points the log ratio is a straight line, and beyond the first and the last it is constant.
    """

    kind: ClassVar[str] = "likelihood ratio"


Curve: TypeAlias = Logistic | Isotonic | LikelihoodRatio

KINDS: Mapping[str, type[Curve]] = {kind.kind: kind for kind in (Logistic, LikelihoodRatio, Isotonic)}
"""The curves by name, the simplest first."""


def _probability(log_ratio: Array, prior: float) -> Array:
    # Within these log odds, float64 tells the probability from 0 and from 1, and exp does not overflow. This form and
    # not exp(z) / (1 + exp(z)): each of its steps is monotone, so that rounding cannot make the probability fall.
    log_odds = np.clip(log_ratio + math.log(prior / (1 - prior)), -700, 36)
    result: Array = 1 / (1 + np.exp(-log_odds))
    return result


def check_prior(prior: float) -> float:
    """Return a prior in (0, 1).

    Raises:
        ConfigError: it is out of range.
    """
    if not 0 < prior < 1:
        raise ConfigError(f"prior must be above 0 and below 1; got {prior}")
    return float(prior)


# As JSON --------------------------------------------------------------------------------------------------


def curve_to_dict(curve: Curve) -> dict[str, Any]:
    """Return a curve as JSON types: its kind and its numbers."""
    return {"kind": curve.kind, **dataclasses.asdict(curve)}


def curve_from_dict(values: object) -> Curve:
    """Return the curve that `curve_to_dict` wrote.

    Raises:
        VerifierError: a key or a number is not what it must be.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or not isinstance(kind, str) or kind not in KINDS:
        raise VerifierError(f"curve must be an object whose kind is one of {', '.join(KINDS)}; got {values!r}")
    found = KINDS[kind]
    checked = fields.check_keys(values, ["kind", *(field.name for field in dataclasses.fields(found))])
    prior = fields.share("prior", checked["prior"])
    if prior in (0, 1):
        raise VerifierError(f"prior must be above 0 and below 1; got {prior}")
    if found is Logistic:
        slope, offset = (fields.number(key, checked[key]) for key in ("slope", "offset"))
        if slope <= 0:
            raise VerifierError(f"slope must be above 0; got {slope}")
        return Logistic(slope, offset, prior)
    scores = fields.numbers("scores", checked["scores"], rising=True)
    log_ratios = fields.numbers("log_ratios", checked["log_ratios"])
    if len(scores) != len(log_ratios) or any(b < a for a, b in pairwise(log_ratios)):
        raise VerifierError("log_ratios must hold one number for each of scores, none lower than the one before")
    return (Isotonic if found is Isotonic else LikelihoodRatio)(scores, log_ratios, prior)
