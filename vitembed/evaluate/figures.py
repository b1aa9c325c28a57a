"""A figure with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

_ROUNDING = 1e-12  # the width that weighted means of equal numbers can have


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: what was measured.
        interval: its 95 % interval; None where nobody knows: with fewer than nine identities, or where each draw of
            them gives the same number.
    """

    value: float
    interval: Interval | None = None


def with_width(interval: Interval | None) -> Interval | None:
    """Return an interval, or None where it has no width: data without an error cannot tell how rare errors are.

    >>> with_width((0.1, 0.2)), with_width((0.0, 0.0))
    ((0.1, 0.2), None)
    """
    return None if interval is None or interval[1] - interval[0] < _ROUNDING else interval


def flatten(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Return figures as JSON takes them: each with its interval below it, under the name NAME_interval.

    >>> flatten({"recall@1": Figure(0.5, (0.4, 0.6)), "mrr": Figure(0.7)})
    {'recall@1': 0.5, 'recall@1_interval': [0.4, 0.6], 'mrr': 0.7, 'mrr_interval': None}
    """
    flat: dict[str, Any] = {}
    for name, figure in figures.items():
        flat[name] = figure.value
        flat[f"{name}_interval"] = None if figure.interval is None else list(figure.interval)
    return flat
