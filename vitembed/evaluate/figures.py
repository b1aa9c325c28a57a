"""A figure with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: what was measured.
        interval: its 95 % interval; None where nobody knows, as with fewer than nine identities.
    """

    value: float
    interval: Interval | None = None


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
