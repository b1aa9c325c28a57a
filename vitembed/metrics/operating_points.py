"""Operating points: FAR and FRR at thresholds, all of them or as many as a plot can show."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError
from vitembed.metrics.checks import Floats, Ints
from vitembed.metrics.steps import Steps

PROBIT_LIMIT = 6.0
"""The thinned curve is even between these quantiles of the normal distribution: rates of 1e-9 and of 1 - 1e-9."""


@dataclass(frozen=True)
class RocCurve:
    """Operating points of a set of scored pairs, from "accept none" to "accept all".

    Attributes:
        thresholds: (T,) strictly falling; +inf first, then distinct scores.
        far: (T,) float64, false-accept rate at each threshold, rising from 0 to 1.
        frr: (T,) float64, false-reject rate at each threshold, falling from 1 to 0.
    """

    thresholds: Floats
    far: NDArray[np.float64]
    frr: NDArray[np.float64]


def thin_curve(pieces: Iterable[Steps], points: int) -> RocCurve:
    """Return at most `points` operating points, evenly spread where both rates have probit axes.

    Args:
        pieces: all distinct scores, in ascending ranges.
        points: how many, at least 10.

    Raises:
        ConfigError: fewer than 10 points.
    """
    if points < 10:
        raise ConfigError(f"a curve needs at least 10 points; got {points}")
    normal = NormalDist()
    edges = np.array([normal.cdf(x) for x in np.linspace(-PROBIT_LIMIT, PROBIT_LIMIT, points // 2 - 1)])
    kept = []
    for piece in pieces:
        far, frr = piece.far, piece.frr
        at = _entering(far, frr, edges)
        kept.append((piece.values[at], far[at], frr[at]))
    values, far, frr = (np.concatenate(column) for column in zip(*kept, strict=True))
    at = _entering(far, frr, edges)[::-1]  # again: the first of each piece was kept in any case
    thresholds = np.append(np.array(np.inf, dtype=values.dtype), values[at])
    return RocCurve(thresholds, np.append(0.0, far[at]), np.append(1.0, frr[at]))


def _entering(far: NDArray[np.float64], frr: NDArray[np.float64], edges: NDArray[np.float64]) -> Ints:
    """Return the first point, and those at which either rate enters another cell between the edges."""
    cells = np.searchsorted(edges, far), np.searchsorted(edges, frr)
    return np.flatnonzero(np.append(True, (cells[0][1:] != cells[0][:-1]) | (cells[1][1:] != cells[1][:-1])))
