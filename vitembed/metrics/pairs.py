"""Metrics of scored pairs: the receiver operating characteristic and what is read off it.

Matching and non-matching scores are sorted once, each on their own; rates at a threshold are then two binary
searches, so no metric but `roc_curve` itself needs the whole curve.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, VectorError
from vitembed.metrics.checks import Bools, Floats, checked_pairs, checked_scores, label_codes, slabs, unit_rows


@dataclass(frozen=True)
class RocCurve:
    """Every operating point of a set of scored pairs, from "accept none" to "accept all".

    Attributes:
        thresholds: (T,) strictly falling; +inf first, then each distinct score.
        far: (T,) float64, false-accept rate at each threshold, rising from 0 to 1.
        frr: (T,) float64, false-reject rate at each threshold, falling from 1 to 0.
    """

    thresholds: Floats
    far: NDArray[np.float64]
    frr: NDArray[np.float64]


def roc_curve(scores: ArrayLike, is_match: ArrayLike) -> RocCurve:
    """Return FAR and FRR at every threshold that makes a difference; equal scores are one point.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1).

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.

    >>> curve = roc_curve([0.9, 0.4, 0.4], [True, True, False])
    >>> curve.thresholds.tolist(), curve.far.tolist(), curve.frr.tolist()
    ([inf, 0.9, 0.4], [0.0, 0.0, 1.0], [1.0, 0.5, 0.0])
    """
    matches, others = _sorted_sides(scores, is_match)
    distinct = np.unique(np.concatenate([matches, others]))[::-1]
    thresholds = np.concatenate([np.array([np.inf], dtype=distinct.dtype), distinct])
    far = (others.size - np.searchsorted(others, thresholds, side="left")) / others.size
    frr = np.searchsorted(matches, thresholds, side="left") / matches.size
    return RocCurve(thresholds, far, frr)


def equal_error_rate(scores: ArrayLike, is_match: ArrayLike) -> tuple[float, float]:
    """Return the equal error rate in [0, 1] and its threshold (chosen a posteriori, on these very pairs).

    Of the operating points of `roc_curve`, two neighbours bracket FAR = FRR: the last with FAR < FRR and the first
    with FAR >= FRR. Both rates are joined by straight lines between them; the result is where the lines cross, and
    the threshold is interpolated by the same share (it is the lower one where the upper is infinite).

    Arguments and errors are as in `roc_curve`. Memory: one sorted copy of the scores.

    At threshold 0.8 FAR is 0 and FRR 1/2, at 0.6 FAR is 1/2 and FRR 1/2: they meet there.

    >>> equal_error_rate([0.8, 0.4, 0.6, 0.2], [True, True, False, False])
    (0.5, 0.6)
    """
    matches, others = _sorted_sides(scores, is_match)

    # FAR - FRR falls as the threshold rises: on either side, bisection finds where it goes below zero.
    lower, upper = -math.inf, math.inf
    for side in (matches, others):
        k = _first_below(side, matches, others)
        lower = max(lower, float(side[k - 1]) if k else -math.inf)
        upper = min(upper, float(side[k]) if k < side.size else math.inf)
    (far, frr), (far_upper, frr_upper) = _rates(lower, matches, others), _rates(upper, matches, others)
    share = (far - frr) / ((far - frr) + (frr_upper - far_upper))  # of the way from lower to upper
    threshold = lower + share * (upper - lower) if math.isfinite(upper) else lower
    return far + share * (far_upper - far), threshold


def threshold_at_far(impostor_scores: ArrayLike, far: float) -> float:
    """Return the smallest threshold that accepts at most the share `far` of these non-matching pairs.

    It lies one rounding step above the best score that it has to refuse.

    Args:
        impostor_scores: (P,) finite scores of non-matching pairs.
        far: the wanted false-accept rate, in [0, 1).

    Raises:
        VectorError: the scores are no finite (P,) array, or empty.
        ConfigError: `far` is outside [0, 1).

    >>> 0.7 < threshold_at_far([0.9, 0.7, 0.5, 0.3], far=0.25) < 0.7001
    True
    """
    if not 0 <= far < 1:
        raise ConfigError(f"a false-accept rate must be at least 0 and below 1; got {far}")
    scores = checked_scores(impostor_scores)
    if scores.size == 0:
        raise VectorError("a threshold for a false-accept rate needs scores of non-matching pairs; got none")
    allowed = math.floor(far * scores.size)
    if (allowed + 1) / scores.size <= far:  # the product rounded down: 0.29 * 100 is 28.999...
        allowed += 1
    refused = np.partition(scores, scores.size - 1 - allowed)[scores.size - 1 - allowed]
    return float(np.nextafter(refused, np.array(np.inf, dtype=scores.dtype)))


def tar_at_far(scores: ArrayLike, is_match: ArrayLike, far: float) -> float:
    """Return the share of matching pairs that is accepted at `threshold_at_far` of the others, in [0, 1].

    No interpolation: the measured FAR is at most `far`. With fewer than 1 / far non-matching pairs that means no false
    accept at all, so the value says little; reports leave it out.

    Arguments and errors are as in `roc_curve` and `threshold_at_far`.

    >>> tar_at_far([0.9, 0.6, 0.7, 0.1], [True, True, False, False], far=0.1)
    0.5
    """
    matches, others = _sorted_sides(scores, is_match)
    threshold = _like(threshold_at_far(others, far), matches)
    return float(1 - np.searchsorted(matches, threshold, side="left") / matches.size)


def roc_auc(scores: ArrayLike, is_match: ArrayLike) -> float:
    """Return the chance that a matching pair outscores a non-matching one, a tie counting half, in [0, 1].

    This is the area under the ROC curve (Hanley and McNeil 1982). Arguments and errors are as in `roc_curve`.

    >>> roc_auc([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    matches, others = _sorted_sides(scores, is_match)
    below = np.searchsorted(others, matches, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(others, matches, side="right").sum(dtype=np.int64)
    return float((below + not_above) / (2 * matches.size * others.size))


def pair_scores(embeddings: ArrayLike, labels: ArrayLike) -> tuple[Floats, Bools]:
    """Score all pairs i < j of a set.

    Args:
        embeddings: (N, D), of any length but zero.
        labels: (N,) classes; a pair matches when they are equal.

    Returns:
        scores (N (N - 1) / 2,), cosines in [-1, 1], float64 for float64 input and float32 otherwise; and is_match,
        bool, of the same shape. The order is (0, 1), (0, 2) ... (1, 2) ..., that of `np.triu_indices(N, 1)`. Only a
        slab of the product is held beside the result: 597 images give 177,906 pairs.

    Raises:
        VectorError: the embeddings are no finite (N, D) array with N >= 2, or a row is zero.
        DataError: the labels do not fit the embeddings.

    >>> scores, is_match = pair_scores([[1, 0], [0, 2], [0, 3]], ["a", "b", "b"])
    >>> scores.tolist(), is_match.tolist()
    ([0.0, 0.0, 1.0], [False, False, True])
    """
    unit = unit_rows(embeddings)
    codes = label_codes(labels, len(unit), "labels")
    n = len(unit)
    if n < 2:
        raise VectorError(f"pairs need at least 2 embeddings; got {n}")
    scores = np.empty(n * (n - 1) // 2, dtype=unit.dtype)
    is_match = np.empty(scores.size, dtype=np.bool_)
    filled = 0
    for rows in slabs(n, unit):
        product = unit[rows] @ unit[rows.start :].T  # (rows, N - start)
        for i, row in enumerate(product):
            at = slice(filled, filled + row.size - i - 1)
            scores[at] = row[i + 1 :]
            is_match[at] = codes[rows.start + i + 1 :] == codes[rows.start + i]
            filled = at.stop
    return np.clip(scores, -1, 1, out=scores), is_match


def _sorted_sides(scores: ArrayLike, is_match: ArrayLike) -> tuple[Floats, Floats]:
    """Return the scores of matching and of non-matching pairs, each ascending."""
    checked, matching = checked_pairs(scores, is_match)
    matches, others = checked[matching], checked[~matching]
    matches.sort()
    others.sort()
    return matches, others


def _rates(threshold: float, matches: Floats, others: Floats) -> tuple[float, float]:
    """Return FAR and FRR at a threshold; both arrays ascend."""
    refused = np.searchsorted(others, _like(threshold, others), side="left")
    missed = np.searchsorted(matches, _like(threshold, matches), side="left")
    return float((others.size - refused) / others.size), float(missed / matches.size)


def _first_below(side: Floats, matches: Floats, others: Floats) -> int:
    """Return the position of the first of the ascending scores `side` at which FAR < FRR."""

    def below(k: int) -> bool:
        far, frr = _rates(float(side[k]), matches, others)
        return far < frr

    return bisect_left(range(side.size), True, key=below)


def _like(value: float, array: Floats) -> Floats:
    # searchsorted with a value of another type would copy the whole array to the wider one.
    return np.asarray(value, dtype=array.dtype)
