"""How far a measured rate can be trusted: intervals for counts, and for anything by resampling identities."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from vitembed.errors import ConfigError, DataError
from vitembed.metrics.checks import Ints

IDENTITIES_NEEDED = 10
"""With fewer identities no interval over them is reported: too few draws differ, and it would claim certainty."""


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of Wilson (1927) for a rate of which `successes` in `n` trials were seen.

    It takes trials as independent. Pairs that share images or identities are not, so for them it is too narrow; where
    identities are known use `bootstrap_interval`.

    Raises:
        ConfigError: not 0 <= successes <= n with n >= 1, or `level` is outside (0, 1).

    >>> [round(bound, 4) for bound in wilson_interval(0, 100)]
    [0.0, 0.037]
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ConfigError(f"an interval needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + _checked_level(level)) / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale  # exact where rounding would give -1e-18
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def bootstrap_interval(
    statistic: Callable[[Ints], float],
    identities: ArrayLike,
    *,
    level: float = 0.95,
    rounds: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic when identities, not images or pairs, are drawn anew.

    Images of one identity resemble each other, so resampling them singly would call a result more certain than it is
    (the subsets bootstrap: Bolle, Ratha and Pankanti 2004, "Error analysis of pattern recognition systems").

    Args:
        statistic: gets the positions (repeats included) of the drawn items and returns a number. A round for
            which it raises DataError (one kind of pair was drawn) is drawn again.
        identities: (N,) identity of each item, or (N, 2) of the two sides of each pair. A drawn identity brings its
            items as often as it was drawn; a pair of two identities as often as the product of both.
        level: the share of rounds inside the interval.
        rounds: how many times to draw.
        seed: of the random numbers.

    Raises:
        ConfigError: `level` or `rounds` is out of range.
        DataError: fewer than two identities, or hardly any round gives a value.

    >>> hits = np.array([1.0, 1.0, 1.0, 0.0])
    >>> bootstrap_interval(lambda at: hits[at].mean(), ["a", "a", "b", "b"])
    (0.5, 1.0)
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1; got {rounds}")
    names = np.asarray(identities)
    distinct, codes = np.unique(names, return_inverse=True)
    codes = codes.reshape(names.shape)
    if distinct.size < 2:
        raise DataError(f"an interval over identities needs at least 2 of them; got {distinct.size}")
    tail = (1 - _checked_level(level)) / 2
    rng = np.random.default_rng(seed)
    values: list[float] = []
    for _ in range(10 * rounds):
        drawn = np.bincount(rng.integers(distinct.size, size=distinct.size), minlength=distinct.size)
        try:
            values.append(statistic(np.repeat(np.arange(len(codes)), _multiplicity(drawn, codes))))
        except DataError:
            continue
        if len(values) == rounds:
            low, high = np.quantile(values, [tail, 1 - tail])
            return float(low), float(high)
    raise DataError(f"too few identities for an interval ({distinct.size}): most draws hold one kind of pair only")


def _multiplicity(drawn: Ints, codes: Ints) -> Ints:
    if codes.ndim == 1:
        return drawn[codes]
    left, right = codes[:, 0], codes[:, 1]
    # A matching pair comes as often as its one identity: two copies of it are the same person, not a new pair.
    return np.where(left == right, drawn[left], drawn[left] * drawn[right])


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError(f"level must be between 0 and 1; got {level}")
    return level
