"""Metrics of scored pairs: the receiver operating characteristic, what is read off it, and rates at a threshold.

The functions here are definitions and checks; `ScoreTable` does the work, and where several metrics of the same pairs
are wanted it is the faster way to ask: each function counts the scores anew.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics.checks import Bools, Floats, checked_pairs, checked_scores, label_codes, slabs, unit_rows
from vitembed.metrics.counting import checked_flags
from vitembed.metrics.operating_points import RocCurve
from vitembed.metrics.score_table import ScoreTable
from vitembed.metrics.steps import Steps


@dataclass(frozen=True)
class ErrorRates:
    """Shares of wrong decisions at a threshold, each in [0, 1]; None where no pair of that kind was judged.

    Attributes:
        frr: of the matching pairs, those that score below the threshold.
        far: of the non-matching pairs, those that reach it.
        far_random: the same of random pairs: two identities, neither imitating the other. None too where the kinds of
            non-matching pairs are not known.
        far_skilled: the same of skilled forgeries, likewise.
    """

    frr: float | None
    far: float | None
    far_random: float | None = None
    far_skilled: float | None = None


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
    checked, matching = checked_pairs(scores, is_match)
    steps = Steps.of(checked[matching], checked[~matching])
    thresholds = np.append(np.array(np.inf, dtype=steps.values.dtype), steps.values[::-1])
    return RocCurve(thresholds, np.append(0.0, steps.far[::-1]), np.append(1.0, steps.frr[::-1]))


def det_curve(scores: ArrayLike, is_match: ArrayLike, points: int = 2000) -> RocCurve:
    """Return at most `points` points of `roc_curve`, evenly spread where FAR and FRR have probit axes.

    That is the detection error trade-off's plot (Martin et al. 1997, "The DET curve in assessment of detection task
    performance"), FRR over FAR; it serves a ROC plot too. The ends are always there. Where a stretch of points was left
    out, neither rate changed by more than one step of the axes.

    Raises:
        ConfigError: fewer than 10 points.
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.

    >>> curve = det_curve([0.9, 0.4, 0.4], [True, True, False])
    >>> curve.far.tolist(), curve.frr.tolist()
    ([0.0, 0.0, 1.0], [1.0, 0.5, 0.0])
    """
    return ScoreTable(scores, is_match).det_curve(points)


def equal_error_rate(scores: ArrayLike, is_match: ArrayLike) -> tuple[float, float]:
    """Return the equal error rate in [0, 1] and its threshold (chosen a posteriori, on these very pairs).

    Of the operating points of `roc_curve`, two neighbours bracket FAR = FRR: the last with FAR < FRR and the first
    with FAR >= FRR. Both rates are joined by straight lines between them; the result is where the lines cross, and
    the threshold is interpolated by the same share (it is the lower one where the upper is infinite).

    Arguments and errors are as in `roc_curve`. Memory: a few megabytes beside the scores.

    At threshold 0.8 FAR is 0 and FRR 1/2, at 0.6 FAR is 1/2 and FRR 1/2: they meet there.

    >>> equal_error_rate([0.8, 0.4, 0.6, 0.2], [True, True, False, False])
    (0.5, 0.6)
    """
    return ScoreTable(scores, is_match).equal_error_rate()


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
    return ScoreTable.of_others(impostor_scores).threshold_at_far(far)


def tar_at_far(scores: ArrayLike, is_match: ArrayLike, far: float) -> float:
    """Return the share of matching pairs that is accepted at `threshold_at_far` of the others, in [0, 1].

    No interpolation: the measured FAR is at most `far`. With fewer than 1 / far non-matching pairs that means no false
    accept at all, so the value says little; reports leave it out.

    Arguments and errors are as in `roc_curve` and `threshold_at_far`.

    >>> tar_at_far([0.9, 0.6, 0.7, 0.1], [True, True, False, False], far=0.1)
    0.5
    """
    return ScoreTable(scores, is_match).tar_at_far(far)


def roc_auc(scores: ArrayLike, is_match: ArrayLike) -> float:
    """Return the chance that a matching pair outscores a non-matching one, a tie counting half, in [0, 1].

    This is the area under the ROC curve (Hanley and McNeil 1982). Arguments and errors are as in `roc_curve`.

    >>> roc_auc([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    return ScoreTable(scores, is_match).roc_auc()


def error_rates(
    scores: ArrayLike, is_match: ArrayLike, threshold: float, skilled: ArrayLike | None = None
) -> ErrorRates:
    """Return the shares of pairs that a threshold decides wrongly, those of either kind apart.

    Args:
        scores: (P,) finite, higher is more alike; P >= 1.
        is_match: (P,) booleans (or 0 and 1).
        threshold: a pair is accepted when its score is at least this; not NaN.
        skilled: (P,) booleans, True for the non-matching pairs in which one side imitates the other's identity (skilled
            forgeries, in the words of signature verification); the other non-matching pairs are random ones.

    Raises:
        ConfigError: the threshold is NaN.
        VectorError: scores are no finite (P,) array, or empty.
        DataError: `is_match` or `skilled` does not fit, or a matching pair is called skilled.

    >>> error_rates([0.9, 0.3, 0.7, 0.1], [1, 1, 0, 0], 0.5, skilled=[0, 0, 1, 0])
    ErrorRates(frr=0.5, far=0.5, far_random=0.0, far_skilled=1.0)
    """
    if np.isnan(threshold):
        raise ConfigError("a threshold must be a number; got NaN")
    checked = checked_scores(scores)
    if checked.size == 0:
        raise VectorError("error rates need scores of pairs; got none")
    matching = checked_flags(is_match, checked.size, "is_match")
    accepted = checked >= np.float64(threshold)  # float32 scores are widened; the threshold is not rounded to them
    frr, far = _share(~accepted, matching), _share(accepted, ~matching)
    if skilled is None:
        return ErrorRates(frr, far)
    imitated = _checked_skilled(skilled, matching)
    return ErrorRates(frr, far, _share(accepted, ~matching & ~imitated), _share(accepted, imitated))


def impostor_kinds(is_match: ArrayLike, skilled: ArrayLike) -> dict[str, Bools]:
    """Return which pairs to judge for each kind of non-matching pair: these, and all matching pairs.

    With them any metric of pairs is had for random and skilled forgeries apart:
    `{kind: equal_error_rate(scores[at], is_match[at]) for kind, at in impostor_kinds(is_match, skilled).items()}`.

    Args:
        is_match: (P,) booleans (or 0 and 1).
        skilled: (P,) booleans, as in `error_rates`.

    Returns:
        "random" and "skilled", each (P,) bool; a kind without a pair is left out.

    Raises:
        DataError: the flags do not fit, or a matching pair is called skilled.

    >>> impostor_kinds([1, 0, 0], [0, 1, 1])
    {'skilled': array([ True,  True,  True])}
    """
    matching = checked_flags(is_match, np.size(is_match), "is_match")
    imitated = _checked_skilled(skilled, matching)
    kinds = {"random": ~matching & ~imitated, "skilled": imitated}
    return {kind: of_kind | matching for kind, of_kind in kinds.items() if of_kind.any()}


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


def _checked_skilled(skilled: ArrayLike, matching: Bools) -> Bools:
    imitated = checked_flags(skilled, matching.size, "skilled")
    wrong = np.flatnonzero(imitated & matching)
    if wrong.size:
        raise DataError(f"a skilled forgery is a non-matching pair; pair {wrong[0]} is marked as matching and skilled")
    return imitated


def _share(hit: Bools, among: Bools) -> float | None:
    count = int(np.count_nonzero(among))
    return int(np.count_nonzero(hit & among)) / count if count else None
