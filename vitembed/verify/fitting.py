"""Fitting the curves of `vitembed.verify.curves` to labelled scores, and choosing among them.

All fits see both kinds of pair with the same total weight, and none gives a probability of 0 or 1: each supposes a
little more than it saw.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, VerifierError, unknown_name
from vitembed.verify.curves import KINDS, Array, Curve, Isotonic, LikelihoodRatio, Logistic, check_prior
from vitembed.verify.scored import identity_codes

Bools = NDArray[np.bool_]

BINS = 4096  # of the scores' range, for densities: a tenth of the narrowest kernel seen on real scores
KNOTS = 33  # quantiles of each kind at which the densities are compared


def choose_curve(
    scores: ArrayLike,
    is_match: ArrayLike,
    identities: ArrayLike | None = None,
    *,
    prior: float = 0.5,
    kinds: Sequence[str] = tuple(KINDS),
    folds: int = 5,
    seed: int = 0,
) -> tuple[Curve, dict[str, dict[str, float]]]:
    """Choose the kind of curve by cross-validation over identities, and fit it to all pairs.

    The identities are dealt into folds. A curve is fitted to the pairs that show no identity of a fold, and judged on
    those that show only its identities, so that nobody is on both sides. From the simplest kind on, another one takes
    its place when its log-loss is lower by more than the standard error of the difference over the folds (Breiman et
    al. 1984, the rule of one standard error), and its calibration error is not higher.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        identities: (P, 2) whom the two images of each pair show. None if not known: the pairs are then dealt into
            folds as if they were independent, which favours the curves that bend the most.
        prior: the share of matching pairs that the probability supposes, in (0, 1).
        kinds: names in `vitembed.verify.curves.KINDS`; with one alone nothing is compared.
        folds: at least 2.
        seed: of the dealing.

    Returns:
        The curve, and for each kind the figures of the pairs judged: {kind: {"log_loss": nats, "ece": share}}, both
        kinds of pair weighing the same. They are empty where nothing was compared: one kind of curve, or with
        identities known, fewer than `vitembed.metrics.IDENTITIES_NEEDED` of them or none of the folds holding both
        kinds of pair; the curve is then the simplest.

    Raises:
        ConfigError: `prior`, `kinds` or `folds` is out of range.
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` or `identities` does not fit, or has one kind of pair only.
        VerifierError: matching pairs do not score higher than the others, so no rising curve fits.
    """
    check_prior(prior)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("curve", kind, KINDS)
    if not kinds or folds < 2:
        raise ConfigError(f"expected at least one kind of curve and 2 folds; got {len(kinds)} and {folds}")
    checked, matching = metrics.checked_pairs(scores, is_match)
    ordered = [kind for kind in KINDS if kind in kinds]
    figures: dict[str, dict[str, float]] = {}
    best = ordered[0]
    if len(ordered) > 1:
        parts = list(deal_folds(matching, identities, folds, seed))
        if len(parts) > 1:
            best, figures = _compare(checked, matching, ordered, parts)
    return FITS[best](checked, matching, prior=prior), figures


def _compare(
    scores: NDArray[Any], matching: Bools, kinds: Sequence[str], parts: Sequence[tuple[Bools, Bools]]
) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the kind of curve to take, and the figures of all."""
    losses: dict[str, Array] = {}
    figures: dict[str, dict[str, float]] = {}
    judged = np.concatenate([matching[held] for _, held in parts])
    for kind in kinds:
        p = [FITS[kind](scores[fitted], matching[fitted])(scores[held]) for fitted, held in parts]
        of_folds = zip(p, (matching[held] for _, held in parts), strict=True)
        losses[kind] = np.array([metrics.log_loss(q, flags, prior=0.5) for q, flags in of_folds])
        ece = metrics.expected_calibration_error(np.concatenate(p), judged, prior=0.5)
        figures[kind] = {"log_loss": float(losses[kind].mean()), "ece": float(ece)}
    best = kinds[0]
    for kind in kinds[1:]:
        gain = losses[best] - losses[kind]
        noise = float(gain.std(ddof=1)) / math.sqrt(gain.size)
        if gain.mean() > noise and figures[kind]["ece"] <= figures[best]["ece"]:
            best = kind
    return best, figures


def deal_folds(matching: Bools, identities: ArrayLike | None, folds: int, seed: int) -> Iterator[tuple[Bools, Bools]]:
    """Deal the identities into folds, and yield for each the pairs to fit to and those to judge, masks (P,).

    Pairs with one identity in the fold and one out of it are in neither. A fold is left out when either part lacks a
    kind of pair. With fewer than `vitembed.metrics.IDENTITIES_NEEDED` identities there is none.
    """
    codes, count = identity_codes(identities, matching.size)
    if count is not None and count < metrics.IDENTITIES_NEEDED:
        return
    units = matching.size if count is None else count
    fold_of = np.random.default_rng(seed).permutation(units) % folds
    left, right = fold_of[codes].T  # the fold of either image
    for fold in range(folds):
        fitted, held = (left != fold) & (right != fold), (left == fold) & (right == fold)
        if all(0 < np.count_nonzero(matching[part]) < np.count_nonzero(part) for part in (fitted, held)):
            yield fitted, held


# The fits ------------------------------------------------------------------------------------------------


def fit_logistic(scores: ArrayLike, is_match: ArrayLike, *, prior: float = 0.5) -> Logistic:
    """Fit the probability of a match to labelled scores (Platt 1999, "Probabilistic outputs for SVMs").

    The targets are Platt's, (N+ + 1) / (N+ + 2) for the N+ matching pairs and 1 / (N- + 2) for the others, so that the
    fit stays finite when a threshold parts them without error.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        prior: the share of matching pairs that the probability supposes, in (0, 1).

    Raises:
        ConfigError: `prior` is out of range.
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.
        VerifierError: matching pairs do not score higher than the others, so no rising curve fits.
    """
    x, matching = _checked(scores, is_match, prior)
    positives = int(np.count_nonzero(matching))
    negatives = x.size - positives
    target = np.where(matching, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weight = _balanced(matching)
    centre = float(weight @ x)
    spread = math.sqrt(float(weight @ (x - centre) ** 2))
    slope, offset = _newton((x - centre) / spread, target, weight)
    slope /= spread
    if not slope > 0:
        raise _alike()
    return Logistic(slope, offset - slope * centre, float(prior))


def fit_isotonic(scores: ArrayLike, is_match: ArrayLike, *, prior: float = 0.5) -> Isotonic:
    """Fit rising steps by pooling adjacent violators (Zadrozny and Elkan 2002), and join the steps' mean scores.

    One more pair of each kind is supposed below the lowest score and one above the highest, which holds the ends off 0
    and 1 as Laplace's rule of succession does. Arguments and errors are as in `fit_logistic`.
    """
    x, matching = _checked(scores, is_match, prior)
    weight = _balanced(matching)
    distinct, at = np.unique(x, return_inverse=True)
    ends = np.array([weight[matching][0], weight[~matching][0]])  # of one more pair of each kind
    of_all: Array = np.pad(np.bincount(at, weight), 1, constant_values=ends.sum())
    of_matches: Array = np.pad(np.bincount(at, weight * matching), 1, constant_values=ends[0])
    value, start = pool_violators(of_matches, of_all)
    inside = np.concatenate([[distinct[0]], distinct, [distinct[-1]]])
    centre = np.add.reduceat(inside * of_all, start) / np.add.reduceat(of_all, start)
    # The supposed pairs lie on the ends' scores: where one of them is a step of its own it falls onto a neighbour's.
    centre, kept = np.unique(centre, return_index=True)
    return Isotonic(*_knots(centre, np.log(value / (1 - value))[kept]), float(prior))


def fit_likelihood_ratio(scores: ArrayLike, is_match: ArrayLike, *, prior: float = 0.5) -> LikelihoodRatio:
    """Fit the densities of both kinds of score by Gaussian kernels, and make their ratio rise.

    Kernels and not two normals: the scores of matching pairs crowd below their upper bound and trail downwards, and
    two normals of unequal width have a ratio that falls again at one end. The bandwidth is Silverman's (1986, equation
    3.31), 0.9 min(standard deviation, quartile range / 1.34) n^(-1/5), for each kind on its own. One more pair of
    each kind is supposed, spread evenly over all scores, so that no density is 0. What still falls is pooled, as in
    `fit_isotonic`. Arguments and errors are as in `fit_logistic`.
    """
    x, matching = _checked(scores, is_match, prior)
    low, high = float(x.min()), float(x.max())
    quantiles = np.linspace(0, 1, KNOTS)
    at = np.unique(np.concatenate([np.quantile(x[kind], quantiles) for kind in (matching, ~matching)]))
    match, other = (_density(x[kind], low, high, at) for kind in (matching, ~matching))
    value, start = pool_violators(match, match + other)
    share = np.repeat(value, np.diff(np.append(start, at.size)))
    return LikelihoodRatio(*_knots(at, np.log(share / (1 - share))), float(prior))


FITS: Mapping[str, Callable[..., Curve]] = {
    "logistic": fit_logistic,
    "likelihood ratio": fit_likelihood_ratio,
    "isotonic": fit_isotonic,
}


def pool_violators(successes: Array, totals: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the rising shares that fit successes / totals best by weighted squares, and where each begins.

    Neighbours whose shares do not rise are pooled until all do; the order of pooling makes no difference (Ayer et al.
    1955). Each pass pools whole runs at once.

    Args:
        successes: (K,) weight of what counts 1.
        totals: (K,) weight of all, above 0.

    Returns:
        (S,) strictly rising shares, S <= K, and (S,) the position of the first item of each.
    """
    start = np.arange(successes.size)
    while True:
        shares = successes / totals
        begins = np.flatnonzero(np.append(True, shares[1:] > shares[:-1]))
        if begins.size == shares.size:
            return shares, start
        successes, totals = np.add.reduceat(successes, begins), np.add.reduceat(totals, begins)
        start = start[begins]


def _checked(scores: ArrayLike, is_match: ArrayLike, prior: float) -> tuple[Array, Bools]:
    """Return scores as float64 and the flags, once it is sure that a rising curve can be fitted."""
    check_prior(prior)
    checked, matching = metrics.checked_pairs(scores, is_match)
    x: Array = checked.astype(np.float64)
    above = x - x.min()  # exact for scores a few ulp apart, whose own means are rounded to either side of each other
    difference = above[matching].mean() - above[~matching].mean()
    if not difference > 1e-12 * above.std() + 1e-150:  # of anything smaller, squares underflow
        raise _alike()
    return x, matching


def _alike() -> VerifierError:
    return VerifierError(
        "matching pairs do not score higher than the others on average, so these scores cannot tell them apart; "
        "check the labels of the pairs, or train the model"
    )


def _balanced(matching: Bools) -> Array:
    """Return a weight for each pair, (P,): half of all for either kind."""
    positives = int(np.count_nonzero(matching))
    return np.where(matching, 0.5 / positives, 0.5 / (matching.size - positives))


def _knots(scores: Array, log_ratios: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return points of a curve as plain numbers: at least two, and only those that a straight line would miss."""
    if scores.size == 1:
        scores, log_ratios = scores + np.array([0.0, np.spacing(abs(scores[0]))]), np.repeat(log_ratios, 2)
    log_ratios = np.maximum.accumulate(log_ratios)  # means of scores a few ulp apart come out of order
    flat = (log_ratios[1:-1] == log_ratios[:-2]) & (log_ratios[1:-1] == log_ratios[2:])
    kept = np.concatenate([[True], ~flat, [True]])
    return tuple(scores[kept].tolist()), tuple(log_ratios[kept].tolist())


def _density(scores: Array, low: float, high: float, at: Array) -> Array:
    """Return the density of scores in [low, high] at some of them, by a histogram convolved with the kernel."""
    step = (high - low) / (BINS - 1)
    place = np.rint((scores - low) / step).astype(np.int64)
    quartiles = np.quantile(scores, [0.25, 0.75])
    spread = min(float(scores.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(scores.std())
    width = max(0.9 * spread * scores.size**-0.2, step)
    reach = min(BINS - 1, math.ceil(4 * width / step))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / width) ** 2)
    smooth = np.convolve(np.bincount(place, minlength=BINS), kernel / (kernel.sum() * step))[reach : reach + BINS]
    even = 1 / (high - low)
    result: Array = (np.interp(at, low + step * np.arange(BINS), smooth) + even) / (scores.size + 1)
    return result


def _newton(x: Array, target: Array, weight: Array) -> tuple[float, float]:
    """Minimise the weighted cross-entropy over slope and offset: Newton's method, steps halved until they help.

    The loss is convex, and its minimum finite as no target is 0 or 1 (Lin, Lin and Weng 2007, "A note on Platt's
    probabilistic outputs", algorithm 1).
    """
    design = np.stack([x, np.ones_like(x)], axis=1)  # (P, 2)

    def loss(at: Array) -> float:
        z = design @ at
        return float(weight @ (np.logaddexp(0, z) - target * z))

    at = np.zeros(2)
    value = loss(at)
    for _ in range(100):
        p = Logistic(1.0, 0.0)(design @ at)
        gradient = design.T @ (weight * (p - target))
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (lower := loss(at - size * step)) > value and size > 1e-10:
            size /= 2
        if lower > value:
            break  # as low as rounding allows
        at, value = at - size * step, lower
    return float(at[0]), float(at[1])
