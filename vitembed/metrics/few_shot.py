"""Few-shot episodes: with a few examples of each of a few classes, how often is another image named right?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, DataError
from vitembed.metrics.checks import Floats, Ints, label_codes, unit_rows

# Embeddings of the episodes that are judged together fill about this much.
EPISODE_BYTES = 32 * 2**20


def few_shot_accuracy(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ways: int,
    shots: int,
    queries: int = 1,
    episodes: int = 1_000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Return the accuracy (episodes,) in [0, 1] of n-way k-shot episodes; the error is 1 minus it.

    An episode draws `ways` classes, and of each `shots` support and `queries` query images, all without repetition. A
    class is stood for by its prototype, the mean of the unit embeddings of its support, and a query is named after the
    prototype with which it has the largest cosine (Snell et al. 2017, "Prototypical networks for few-shot learning",
    there with the Euclidean distance; for one shot both are the same). A query that scores as high with another
    prototype counts as wrong.

    Args:
        embeddings: (N, D), of any length but zero.
        labels: (N,) classes. Those with fewer than shots + queries images are never drawn.
        ways: classes in an episode, at least 2.
        shots: support images of a class, at least 1.
        queries: query images of a class, at least 1.
        episodes: how many to draw, at least 1.
        seed: of the draws.
        groups: (N,) restricts each episode to the classes of one group (an alphabet); the groups with enough classes
            are drawn equally often. A class that is in two groups is two classes.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels or groups do not fit, or there are too few classes with enough images.
        ConfigError: a number is out of range.

    >>> few_shot_accuracy([[1, 0], [3, 1], [0, 1], [1, 3]], ["a", "a", "b", "b"], ways=2, shots=1, episodes=3).tolist()
    [1.0, 1.0, 1.0]
    """
    for name, value, least in (
        ("ways", ways, 2),
        ("shots", shots, 1),
        ("queries", queries, 1),
        ("episodes", episodes, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} of few-shot episodes must be at least {least}; got {value}")
    unit = unit_rows(embeddings)
    codes = label_codes(labels, len(unit), "labels")
    group = np.zeros_like(codes) if groups is None else label_codes(groups, len(unit), "groups")
    rng = np.random.default_rng(seed)
    drawn = _draw(codes, group, (episodes, ways, shots + queries), rng)
    accuracy = np.empty(episodes)
    size = max(1, EPISODE_BYTES // (ways * (shots + queries) * unit.shape[1] * unit.itemsize))
    for first in range(0, episodes, size):
        part = slice(first, first + size)
        accuracy[part] = _accuracies(unit[drawn[part]], shots)
    return accuracy


def _accuracies(images: Floats, shots: int) -> NDArray[np.float64]:
    """Return the accuracy (E,) of episodes given as unit rows (E, ways, shots + queries, D), the support first."""
    prototypes = images[:, :, :shots].mean(axis=2)  # (E, ways, D)
    # The cosine with a query divides by the prototype's length; opposite images may have a mean of no length at all.
    prototypes /= np.maximum(np.linalg.norm(prototypes, axis=2, keepdims=True), np.finfo(images.dtype).tiny)
    asked = images[:, :, shots:]  # (E, ways, queries, D)
    n, ways, queries, dim = asked.shape
    scores = (asked.reshape(n, ways * queries, dim) @ prototypes.transpose(0, 2, 1)).reshape(n, ways, queries, ways)
    own = np.einsum("ewqw->ewq", scores).copy()
    np.einsum("ewqw->ewq", scores)[...] = -np.inf
    right: NDArray[np.float64] = (own > scores.max(axis=3)).mean(axis=(1, 2))
    return right


def _draw(codes: Ints, groups: Ints, shape: tuple[int, int, int], rng: np.random.Generator) -> Ints:
    """Return images (episodes, ways, images) of episodes, all classes of an episode from one group."""
    episodes, ways, count = shape
    order = np.lexsort((codes, groups))  # by group, then by class
    both = np.stack([groups[order], codes[order]])
    first = np.flatnonzero(np.append(True, np.any(np.diff(both) != 0, axis=0)))
    size = np.diff(np.append(first, order.size))
    owner = both[0, first]  # (C,) the group of each class
    enough = size >= count
    first, size, owner = first[enough], size[enough], owner[enough]
    classes = np.bincount(owner, minlength=1)
    usable = np.flatnonzero(classes >= ways)
    if usable.size == 0:
        where = " of one group" if groups.any() else ""
        raise DataError(
            f"an episode needs {ways} classes{where} with {count} images (shots and queries) each; "
            f"the most there are is {classes.max()}: ask for fewer ways, shots or queries"
        )
    group = usable[rng.integers(usable.size, size=episodes)]
    ahead = np.cumsum(classes) - classes  # classes of earlier groups
    chosen = ahead[group][:, None] + _distinct(classes[group], ways, rng)  # (episodes, ways)
    images: Ints = order[first[chosen][..., None] + _distinct(size[chosen], count, rng)]
    return images


def _distinct(n: Ints, k: int, rng: np.random.Generator) -> Ints:
    """Return for each n (...) an array (..., k) of distinct integers below it, in random order.

    Floyd's algorithm (Bentley and Floyd 1987, "A sample of brilliance"), for all at once: its sets are uniform, its
    order is not, so they are shuffled.
    """
    drawn = np.empty((*n.shape, k), dtype=np.int64)
    for i in range(k):
        last = n - k + i
        value = rng.integers(last + 1)
        known = np.any(drawn[..., :i] == value[..., None], axis=-1)
        drawn[..., i] = np.where(known, last, value)
    return rng.permuted(drawn, axis=-1)
