"""How well scores part matching pairs from the others, whatever the threshold, with intervals over identities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate.figures import Figure, Interval, flatten, with_width
from vitembed.evaluate.scored import Bools, EvaluatedPairs, Ints

FARS = (0.01, 0.001)


@dataclass(frozen=True)
class Separation:
    """Matching pairs against non-matching ones of one kind, or of all kinds.

    Attributes:
        eer: equal error rate.
        eer_threshold: where it is reached, a posteriori.
        auc: area under the ROC curve.
        tar_at_far: true-accept rate at each false-accept rate, at thresholds a posteriori; None where there are fewer
            than 1 / rate non-matching pairs, so that the rate cannot be seen at all.
        matches: how many matching pairs.
        non_matches: how many non-matching pairs.
    """

    eer: Figure
    eer_threshold: float
    auc: Figure
    tar_at_far: dict[float, Figure | None]
    matches: int
    non_matches: int

    def figures(self) -> dict[str, Figure | None]:
        """Return the figures that have an interval, under the names that papers use."""
        return {
            "eer": self.eer,
            "auc": self.auc,
            **{f"tar@far={far:g}": tar for far, tar in self.tar_at_far.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        flat: dict[str, Any] = {}
        for name, figure in self.figures().items():
            flat |= {name: None, f"{name}_interval": None} if figure is None else flatten({name: figure})
            if name == "eer":
                flat["eer_threshold"] = self.eer_threshold
        return flat | {"matches": self.matches, "non_matches": self.non_matches}


def separate(
    pairs: EvaluatedPairs, chosen: Bools, *, fars: Sequence[float] = FARS, rounds: int = 100, seed: int = 0
) -> Separation:
    """Measure the chosen pairs, (P,) bool, both kinds among them; intervals are of one set of draws of identities.

    Raises:
        DataError: one kind of pair only.
        ConfigError: a rate is out of range.
    """
    scores, matching = pairs.scores[chosen], pairs.is_match[chosen]
    matches = int(np.count_nonzero(matching))
    non_matches = matching.size - matches
    seen = [float(far) for far in fars if far * non_matches >= 1 - 1e-9]
    whole, sorted_once = metrics.ScoreTable(scores, matching), metrics.WeightedScores(scores, matching)
    eer, threshold = whole.equal_error_rate()
    intervals = intervals_over(
        lambda weights: _figures(sorted_once.table(weights), seen),
        None if pairs.identities is None else pairs.identities[chosen],
        rounds=rounds,
        seed=seed,
    )
    told = {name: with_width(interval) for name, interval in intervals.items()}
    measured = {name: Figure(value, told.get(name)) for name, value in _figures(whole, seen).items()}
    return Separation(
        eer=Figure(eer, told.get("eer")),
        eer_threshold=threshold,
        auc=measured["auc"],
        tar_at_far={float(far): measured.get(f"tar@far={far:g}") for far in fars},
        matches=matches,
        non_matches=non_matches,
    )


def intervals_over(
    statistics: Callable[[Ints], Mapping[str, float]], identities: Ints | None, *, rounds: int = 100, seed: int = 0
) -> dict[str, Interval]:
    """Return the 95 % bootstrap intervals of weighted statistics of pairs, from one set of draws of their identities.

    Args:
        statistics: gets weights (P,) and returns numbers by name.
        identities: (P, 2); None where they are not known.
        rounds: how often the identities are drawn.
        seed: of the draws.

    Returns:
        Nothing where identities are not known or fewer than `metrics.IDENTITIES_NEEDED`, or where hardly any draw holds
        both kinds of pair.
    """
    if identities is None or np.unique(identities).size < metrics.IDENTITIES_NEEDED:
        return {}
    try:
        return metrics.bootstrap_intervals(statistics, identities, rounds=rounds, seed=seed, weighted=True)
    except DataError:
        return {}


def _figures(table: metrics.ScoreTable, fars: Sequence[float]) -> dict[str, float]:
    return {
        "eer": table.equal_error_rate()[0],
        "auc": table.roc_auc(),
        **{f"tar@far={far:g}": table.tar_at_far(far) for far in fars},
    }
