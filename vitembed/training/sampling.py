"""Which images meet in a batch: P classes with K images each, so that every batch holds positives and negatives."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError, DataError


class ClassBalancedSampler:
    """Batches of `classes_per_batch` classes with up to `images_per_class` distinct images each.

    In every epoch every image comes at least once. The images of a class are shuffled and cut into groups of K (a last
    ragged group is filled up with other images of its class), and each batch takes groups of different classes, from
    those with most groups left. That is the schedule of fewest batches, and a large class does not starve the small
    ones. A class of fewer than K images gives as many as it has; a batch that runs short of classes at the end of the
    epoch is filled with groups of other classes.

    Args:
        labels: (N,) class of each image.
        classes_per_batch: P, at least 2.
        images_per_class: K, at least 2.
        seed: epoch `e` is the same for the same seed, whatever came before.

    Raises:
        ConfigError: if P or K is below 2.
        DataError: if there are fewer than two classes.
    """

    def __init__(
        self, labels: NDArray[np.int64], *, classes_per_batch: int, images_per_class: int, seed: int = 0
    ) -> None:
        if classes_per_batch < 2 or images_per_class < 2:
            raise ConfigError(
                "a batch needs at least 2 classes and 2 images a class, else it has no pairs; "
                f"got {classes_per_batch} and {images_per_class}"
            )
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        if len(present) < 2:
            raise DataError(f"batches need at least 2 classes to draw from; got {len(present)}")
        self._members = np.split(order, starts[1:])
        self._classes_per_batch = min(classes_per_batch, len(present))
        self._images_per_class = images_per_class
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        groups = [-(-len(members) // self._images_per_class) for members in self._members]
        return max(max(groups), -(-sum(groups) // self._classes_per_batch))

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self._seed, self.epoch])
        queues = [self._groups(members, rng) for members in self._members]
        left = np.array([len(queue) for queue in queues])
        for _ in range(len(self)):
            # Most groups left first, ties at random; classes without any come last and give a fresh group.
            chosen = np.lexsort((rng.random(len(left)), -left))[: self._classes_per_batch]
            batch: list[int] = []
            for label in chosen:
                batch += (queues[label].pop() if queues[label] else self._fresh(self._members[label], rng)).tolist()
            left[chosen] = np.maximum(0, left[chosen] - 1)
            yield batch

    def _groups(self, members: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
        size = self._images_per_class
        shuffled = rng.permutation(members)
        groups = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        short = size - len(groups[-1])
        if len(groups) > 1 and short:
            groups[-1] = np.concatenate([groups[-1], rng.permutation(shuffled[: -len(groups[-1])])[:short]])
        return groups

    def _fresh(self, members: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.permutation(members)[: self._images_per_class]
