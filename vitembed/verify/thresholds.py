"""Thresholds for wanted error rates, and how many pairs it takes to support a rate."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, VerifierError


def impostors_needed(far: float) -> int:
    """Return how many non-matching pairs support a threshold for this false-accept rate: 3 / far, rounded up.

    The rule of three (Hanley and Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"; ISO/IEC
    19795-1): when none of n independent trials errs, the error rate is below 3 / n with 95 % confidence. With fewer
    pairs not even a threshold without any false accept would show that the wanted rate is kept. Pairs that share
    images or identities are not independent, so that this is the least, not enough: see `Calibration.far_interval`.

    >>> impostors_needed(0.01), impostors_needed(0.001)
    (300, 3000)
    """
    return _needed("false-accept", far)


def _needed(rate_name: str, rate: float) -> int:
    if not 0 < rate < 1:
        raise ConfigError(f"a {rate_name} rate must be above 0 and below 1, like 0.01; got {rate}")
    return math.ceil(round(3 / rate, 6))  # 3 / 0.01 is a whole number, whatever the last bit says


def threshold_for_far(impostor_scores: ArrayLike, far: float) -> float:
    """Return the smallest threshold whose measured false-accept rate is at most `far`.

    Args:
        impostor_scores: (P,) finite scores of non-matching pairs.
        far: the wanted rate, in (0, 1).

    Raises:
        VectorError: the scores are no finite (P,) array.
        VerifierError: fewer pairs than `impostors_needed`.
    """
    check_enough("false-accept", far, np.size(impostor_scores), "non-matching pairs")
    return metrics.threshold_at_far(impostor_scores, far)


def reject_below(genuine: NDArray[np.floating[Any]], frr: float, threshold: float) -> float | None:
    """Return the highest score below which at most the share `frr` of matching pairs lies; None from `threshold` on."""
    refused = math.floor(frr * genuine.size * (1 + 1e-12))  # 0.29 * 100 is 28.999...
    score = float(np.partition(genuine, refused)[refused])
    return score if score < threshold else None


def check_enough(rate_name: str, rate: float, got: int, what: str) -> None:
    """Refuse a rate that `got` pairs cannot support, by the rule of three of `impostors_needed`.

    Raises:
        ConfigError: the rate is out of range.
        VerifierError: names how many are needed, and the rate that these pairs support.
    """
    needed = _needed(rate_name, rate)
    if got < needed:
        instead = f", or ask for a rate of at least {_rounded_up(3 / got):g}" if got > 3 else ""
        raise VerifierError(
            f"a {rate_name} rate of {rate:g} needs at least {needed:,} {what} (3 / rate); got {got:,}. "
            f"Add pairs{instead}"
        )


def _rounded_up(rate: float) -> float:
    """Round a rate up to two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(round(rate / unit, 6)) * unit
