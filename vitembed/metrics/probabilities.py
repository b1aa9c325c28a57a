"""Metrics of probabilities: does "70 % sure" come true 70 times in a hundred?

A probability is that of a pair being a match. Sets of pairs for verification hold far fewer matching pairs than
non-matching ones, or as many of each, because of how they were drawn and not because the world is so: `prior` reweighs
both kinds so that matching pairs have that share, each kind keeping its own distribution. Without it every pair counts
once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, VectorError
from vitembed.metrics.checks import Bools, Ints, checked_pairs

CLIP = float(np.finfo(np.float64).eps)
"""Where `log_loss` cuts probabilities: 2.2e-16 from 0 and 1, as scikit-learn does for float64."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """Probabilities in bins, beside what came true; bins without a pair are left out.

    Attributes:
        predicted: (B,) float64, the mean probability in each bin, strictly rising.
        observed: (B,) float64 in [0, 1], the share of matching pairs in it.
        counts: (B,) int64 >= 1, how many pairs it holds.
        shares: (B,) float64, the weight of the bin, 1 in all: `counts` / P, unless a prior reweighs the kinds.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    counts: Ints
    shares: NDArray[np.float64]


def brier_score(probabilities: ArrayLike, is_match: ArrayLike, *, prior: float | None = None) -> float:
    """Return the mean squared distance of the probability from what came true, in [0, 1]; 0 is best.

    This is the form of Brier (1950) that is usual for two outcomes, half of his own sum over both.

    Args:
        probabilities: (P,) in [0, 1], that each pair matches.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        prior: the share that matching pairs shall have, in (0, 1); None leaves it as it is.

    Raises:
        VectorError: the probabilities are no (P,) array in [0, 1].
        DataError: `is_match` does not fit, or has one kind of pair only.
        ConfigError: `prior` is out of range.

    >>> brier_score([1.0, 0.5, 0.5, 0.0], [True, True, False, False])
    0.125
    """
    p, matching, weights = _checked(probabilities, is_match, prior)
    return float(weights @ np.square(p - matching))


def log_loss(probabilities: ArrayLike, is_match: ArrayLike, *, prior: float | None = None, clip: float = CLIP) -> float:
    """Return the mean of -ln(the probability given to what came true), in nats; 0 is best, ln 2 a coin's.

    Arguments and errors are as in `brier_score`.

    Args:
        probabilities: (P,) in [0, 1].
        is_match: (P,) booleans (or 0 and 1).
        prior: the share that matching pairs shall have.
        clip: probabilities are brought into [clip, 1 - clip] first, so that one sure mistake does not make the result
            infinite (at most 36.04 nats a pair by default); in [0, 0.5), 0 to leave them.

    >>> round(log_loss([0.5, 0.5], [True, False]), 4)
    0.6931
    """
    if not 0 <= clip < 0.5:
        raise ConfigError(f"clip must be at least 0 and below 0.5; got {clip}")
    p, matching, weights = _checked(probabilities, is_match, prior)
    given = np.clip(np.where(matching, p, 1 - p), clip, 1 - clip)
    with np.errstate(divide="ignore"):
        return float(weights @ -np.log(given))


def expected_calibration_error(
    probabilities: ArrayLike,
    is_match: ArrayLike,
    bins: int = 15,
    *,
    equal_mass: bool = False,
    prior: float | None = None,
) -> float:
    """Return the mean gap between predicted and observed in the bins of `reliability_curve`, in [0, 1]; 0 is best.

    Each bin counts by its share (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 3, with the probability of
    a match in place of the confidence in the chosen class). A finite set has a gap by chance alone, the wider the fewer
    pairs a bin holds: compare it only between equal sets and bins.

    Arguments and errors are as in `reliability_curve`.

    >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 0, 0])
    0.25
    """
    curve = reliability_curve(probabilities, is_match, bins, equal_mass=equal_mass, prior=prior)
    return float(curve.shares @ np.abs(curve.observed - curve.predicted))


def reliability_curve(
    probabilities: ArrayLike,
    is_match: ArrayLike,
    bins: int = 15,
    *,
    equal_mass: bool = False,
    prior: float | None = None,
) -> ReliabilityCurve:
    """Return predicted and observed shares of matches, bin by bin: the points of a reliability diagram.

    Args:
        probabilities: (P,) in [0, 1], that each pair matches.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        bins: how many bins, at least 1. Bin b of B covers (b / B, (b + 1) / B], the first one 0 too.
        equal_mass: bins of as equal numbers of pairs as equal probabilities allow (these stay together), in place of
            bins of equal width.
        prior: the share that matching pairs shall have, in (0, 1); None leaves it as it is.

    Raises:
        VectorError: the probabilities are no (P,) array in [0, 1].
        DataError: `is_match` does not fit, or has one kind of pair only.
        ConfigError: `bins` or `prior` is out of range.

    >>> curve = reliability_curve([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 0], bins=2)
    >>> curve.predicted.round(3).tolist(), curve.observed.tolist(), curve.counts.tolist()
    ([0.15, 0.85], [0.0, 0.5], [2, 2])
    """
    if bins < 1:
        raise ConfigError(f"bins must be at least 1; got {bins}")
    p, matching, weights = _checked(probabilities, is_match, prior)
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.unique(np.quantile(p, shares, method="inverted_cdf")) if equal_mass else shares
    at = np.searchsorted(edges, p, side="left")  # an edge belongs to the bin below it
    counts = np.bincount(at, minlength=edges.size + 1)
    filled = np.flatnonzero(counts)

    def total(weight: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(at, weight, minlength=counts.size)[filled].astype(np.float64)

    mass = total(weights)
    return ReliabilityCurve(
        total(weights * p) / mass, total(weights * matching) / mass, counts[filled].astype(np.int64), mass
    )


def _checked(
    probabilities: ArrayLike, is_match: ArrayLike, prior: float | None
) -> tuple[NDArray[np.float64], Bools, NDArray[np.float64]]:
    """Return probabilities, flags and weights (P,) of sum 1."""
    checked, matching = checked_pairs(probabilities, is_match)
    p = checked.astype(np.float64)
    outside = np.flatnonzero((p < 0) | (p > 1))
    if outside.size:
        at = int(outside[0])
        raise VectorError(f"probabilities must lie in [0, 1]; {p[at]:g} at position {at} does not. Are these scores?")
    if prior is None:
        return p, matching, np.full(p.size, 1 / p.size)
    if not 0 < prior < 1:
        raise ConfigError(f"a prior must be above 0 and below 1, like 0.5; got {prior}")
    count = int(np.count_nonzero(matching))
    return p, matching, np.where(matching, prior / count, (1 - prior) / (p.size - count))
