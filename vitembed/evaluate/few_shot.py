"""n-way k-shot classification of classes never trained on, as an accuracy with its interval."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitembed import metrics
from vitembed.errors import ConfigError
from vitembed.evaluate.figures import Figure, with_width

_Z = 1.959964  # of a 95 % interval
_TASK = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclass(frozen=True)
class Task:
    """An n-way k-shot task.

    Attributes:
        ways: classes of an episode.
        shots: labelled images of each.

    Raises:
        ConfigError: fewer than two classes, or no image of them.
    """

    ways: int
    shots: int

    def __post_init__(self) -> None:
        if self.ways < 2 or self.shots < 1:
            raise ConfigError(f"a few-shot task needs at least 2 ways and 1 shot; got {self.name}")

    @classmethod
    def parse(cls, text: str) -> "Task":
        """Read "20x1", twenty ways and one shot.

        Raises:
            ConfigError: the text is of another form.

        >>> Task.parse("20x1")
        Task(ways=20, shots=1)
        """
        found = _TASK.fullmatch(text.strip().lower())
        if not found:
            raise ConfigError(f"expected a few-shot task as WAYSxSHOTS, such as 20x1; got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """As it is parsed: "20x1"."""
        return f"{self.ways}x{self.shots}"


@dataclass(frozen=True)
class FewShotReport:
    """How often the class of a new image is told from a few images of each.

    Attributes:
        task: ways and shots.
        episodes: how many were drawn.
        queries: images of each class that are classified in an episode.
        accuracy: the mean over episodes, with its 95 % interval over these; None where all give the same.
    """

    task: Task
    episodes: int
    queries: int
    accuracy: Figure

    @property
    def definition(self) -> str:
        """What was measured, in words."""
        return (
            f"In each of {self.episodes:,} episodes {self.task.ways} classes are drawn, {self.task.shots} support "
            f"images and {self.queries} other image(s) to classify from each; an image goes to the class whose mean "
            "unit support embedding has the highest cosine. The interval is 1.96 standard errors over episodes, which "
            "share the classes of this set: it says nothing of other classes."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        interval = self.accuracy.interval
        return {
            "ways": self.task.ways,
            "shots": self.task.shots,
            "queries": self.queries,
            "episodes": self.episodes,
            "accuracy": self.accuracy.value,
            "accuracy_interval": None if interval is None else list(interval),
        }


def evaluate_few_shot(
    embeddings: ArrayLike,
    labels: ArrayLike,
    task: Task,
    *,
    queries: int = 1,
    episodes: int = 1_000,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> FewShotReport:
    """Draw episodes and classify by the nearest mean of the support (Snell et al. 2017, arXiv:1703.05175).

    Args:
        embeddings: (N, D) of any length but zero.
        labels: (N,) classes, of which enough have shots + queries images.
        task: ways and shots.
        queries: images of each class to classify in an episode.
        episodes: how many to draw.
        groups: (N,) the classes of an episode are of one group, such as an alphabet; None for one group.
        seed: of the draws.

    Raises:
        ConfigError: a number is out of range.
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit, or too few classes have enough images.
    """
    accuracies = np.asarray(
        metrics.few_shot_accuracy(
            embeddings, labels, task.ways, task.shots, queries=queries, episodes=episodes, seed=seed, groups=groups
        )
    )
    mean = float(np.mean(accuracies))
    interval = None
    if accuracies.size > 1:
        half = _Z * float(np.std(accuracies, ddof=1)) / math.sqrt(accuracies.size)
        interval = with_width((max(0.0, mean - half), min(1.0, mean + half)))
    return FewShotReport(task, episodes, queries, Figure(mean, interval))
