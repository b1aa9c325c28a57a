"""From raw scores to a decision: a threshold for a wanted false-accept rate, and a probability for each score.

Everything here is chosen on labelled pairs and judged on the same pairs, a posteriori; `Calibration.protocol` says so.
On other data the rates will differ, the more so the further the data are from these.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, VerifierError

PROTOCOL = "threshold chosen a posteriori on these pairs"


@dataclass(frozen=True)
class Logistic:
    """probability = 1 / (1 + exp(-(slope * score + offset))), which rises with the score as slope > 0."""

    slope: float
    offset: float

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return the probability, in [0, 1], that a pair of this score matches; any shape."""
        # tanh instead of exp: it does not overflow.
        result: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(
            (self.slope * np.asarray(scores, dtype=np.float64) + self.offset) / 2
        )
        return result


@dataclass(frozen=True)
class Calibration:
    """A threshold, the error rates measured with it, and the curve from score to probability.

    Attributes:
        threshold: a pair is accepted when its score is at least this.
        far_wanted: the false-accept rate that was asked for, in (0, 1).
        far: the measured false-accept rate, at most `far_wanted`.
        far_interval: 95 % interval of `far` at this threshold: what another draw of as many identities could have
            given (bootstrap). Where the identities are not known, Wilson's, which takes pairs as independent and is too
            narrow where they share images. None with fewer than `IDENTITIES_NEEDED` identities: nobody knows then.
        frr: the measured false-reject rate.
        frr_interval: its 95 % interval, likewise.
        eer: the equal error rate of these pairs; its threshold is another one.
        matches: how many matching pairs were used.
        non_matches: how many non-matching pairs were used.
        identities: how many identities they show; None where that is not known.
        logistic: from score to probability.
        prior: the share of matching pairs that the probability supposes, in (0, 1).
        protocol: how the threshold was chosen, in words.
    """

    threshold: float
    far_wanted: float
    far: float
    far_interval: tuple[float, float] | None
    frr: float
    frr_interval: tuple[float, float] | None
    eer: float
    matches: int
    non_matches: int
    logistic: Logistic
    identities: int | None = None
    prior: float = 0.5
    protocol: str = PROTOCOL


def calibrate(
    scores: ArrayLike,
    is_match: ArrayLike,
    far: float = 0.01,
    *,
    identities: ArrayLike | None = None,
    prior: float = 0.5,
) -> Calibration:
    """Choose the threshold for a false-accept rate and fit the probability.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        far: the wanted false-accept rate, in (0, 1).
        identities: (P, 2) whom the two images of each pair show, for the intervals; None if not known.
        prior: the share of matching pairs where the verifier will be used; it moves the probability alone.

    Raises:
        ConfigError: `far` or `prior` is out of range.
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.
        VerifierError: too few non-matching pairs for this rate (see `impostors_needed`), or matching pairs do not
            score higher than the others.
    """
    checked, matching = metrics.checked_pairs(scores, is_match)
    genuine, impostor = checked[matching], checked[~matching]
    threshold = threshold_for_far(impostor, far)
    names = None if identities is None else np.asarray(identities)
    far_interval = _interval(impostor >= threshold, None if names is None else names[~matching])
    frr_interval = _interval(genuine < threshold, None if names is None else names[matching])
    return Calibration(
        threshold=threshold,
        far_wanted=float(far),
        far=float(np.mean(impostor >= threshold)),
        far_interval=far_interval,
        frr=float(np.mean(genuine < threshold)),
        frr_interval=frr_interval,
        eer=metrics.equal_error_rate(checked, matching)[0],
        matches=genuine.size,
        non_matches=impostor.size,
        logistic=fit_logistic(checked, matching, prior=prior),
        identities=None if names is None else int(np.unique(names).size),
        prior=float(prior),
    )


def _interval(errors: NDArray[np.bool_], identities: NDArray[np.int64] | None) -> tuple[float, float] | None:
    """Return the 95 % interval of the share of errors among pairs, (P,), with their identities (P, 2) if known."""
    if identities is None:
        return metrics.wilson_interval(int(np.count_nonzero(errors)), errors.size)
    if np.unique(identities).size < metrics.IDENTITIES_NEEDED:
        return None
    return metrics.bootstrap_interval(lambda at: float(np.mean(errors[at])), identities)


def impostors_needed(far: float) -> int:
    """Return how many non-matching pairs support a threshold for this false-accept rate: 3 / far, rounded up.

    The rule of three (Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"; ISO/IEC
    19795-1): when none of n independent trials errs, the error rate is below 3 / n with 95 % confidence. With fewer
    pairs not even a threshold without any false accept would show that the wanted rate is kept. Pairs that share
    images or identities are not independent, so that this is the least, not enough: see `Calibration.far_interval`.

    >>> impostors_needed(0.01), impostors_needed(0.001)
    (300, 3000)
    """
    if not 0 < far < 1:
        raise ConfigError(f"a false-accept rate must be above 0 and below 1, like 0.01; got {far}")
    return math.ceil(round(3 / far, 6))  # 3 / 0.01 is a whole number, whatever the last bit says


def threshold_for_far(impostor_scores: ArrayLike, far: float) -> float:
    """Return the smallest threshold whose measured false-accept rate is at most `far`.

    Args:
        impostor_scores: (P,) finite scores of non-matching pairs.
        far: the wanted rate, in (0, 1).

    Raises:
        VectorError: the scores are no finite (P,) array.
        VerifierError: fewer pairs than `impostors_needed`.
    """
    count, needed = np.size(impostor_scores), impostors_needed(far)
    if count < needed:
        instead = f", or ask for a rate of at least {_rounded_up(3 / count):g}" if count > 3 else ""
        raise VerifierError(
            f"a false-accept rate of {far:g} needs at least {needed:,} non-matching pairs (3 / rate); got {count:,}. "
            f"Add pairs{instead}"
        )
    return metrics.threshold_at_far(impostor_scores, far)


def _rounded_up(rate: float) -> float:
    """Round a rate up to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(round(rate / unit, 6)) * unit


def fit_logistic(scores: ArrayLike, is_match: ArrayLike, *, prior: float = 0.5) -> Logistic:
    """Fit the probability of a match to labelled scores (Platt 1999, "Probabilistic outputs for SVMs").

    The targets are Platt's, (N+ + 1) / (N+ + 2) for the N+ matching pairs and 1 / (N- + 2) for the others, so that the
    fit stays finite when a threshold parts them without error. Both kinds weigh the same, whatever their numbers;
    another `prior` then shifts the log-odds by log(prior / (1 - prior)), by Bayes' rule.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        prior: the share of matching pairs that the probability supposes, in (0, 1).

    Raises:
        ConfigError: `prior` is out of range.
        VerifierError: matching pairs do not score higher than the others, so no rising curve fits.
    """
    if not 0 < prior < 1:
        raise ConfigError(f"prior must be above 0 and below 1; got {prior}")
    checked, matching = metrics.checked_pairs(scores, is_match)
    x = checked.astype(np.float64)
    positives = int(np.count_nonzero(matching))
    negatives = x.size - positives
    target = np.where(matching, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weight = np.where(matching, 0.5 / positives, 0.5 / negatives)
    centre = float(weight @ x)
    spread = math.sqrt(float(weight @ (x - centre) ** 2))
    # At slope 0 the loss falls towards higher slopes exactly when this is positive; the loss is convex.
    if float((weight * (target - weight @ target)) @ (x - centre)) <= 1e-12 * spread:
        raise VerifierError(
            "matching pairs do not score higher than the others on average, so these scores cannot tell them apart; "
            "check the labels of the pairs, or train the model"
        )
    slope, offset = _newton((x - centre) / spread, target, weight)
    slope /= spread
    return Logistic(slope, offset - slope * centre + math.log(prior / (1 - prior)))


def _newton(x: NDArray[np.float64], target: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[float, float]:
    """Minimise the weighted cross-entropy over slope and offset: Newton's method, steps halved until they help.

    The loss is convex, and its minimum finite as no target is 0 or 1 (Lin, Lin and Weng 2007, "A note on Platt's
    probabilistic outputs", algorithm 1).
    """
    design = np.stack([x, np.ones_like(x)], axis=1)  # (P, 2)

    def loss(at: NDArray[np.float64]) -> float:
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
