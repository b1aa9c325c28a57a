"""Do the classes come out when embeddings are clustered without them?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, DataError
from vitembed.metrics.checks import Floats, Ints, label_codes, slabs, unit_rows

# Rounds of k-means at most; it nearly always stops before, when no row changes its cluster.
ROUNDS = 100


def normalized_mutual_information(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Return the mutual information of two partitions over the mean of their entropies, in [0, 1].

    1 where they are the same but for the names (also where both are one part), 0 where they are independent. The mean
    is the arithmetic one, as papers on metric learning have it (Manning, Raghavan and Schuetze 2008, "Introduction to
    Information Retrieval", eq. 16.22). It rises with the number of clusters by chance alone: compare it only for equal
    numbers of clusters.

    Args:
        labels: (N,) classes, integers or strings.
        clusters: (N,) clusters, likewise.

    Raises:
        DataError: the two are not of one length, hold gaps, or are empty.

    >>> normalized_mutual_information(["a", "a", "b", "b"], [1, 1, 0, 0])
    1.0
    >>> normalized_mutual_information(["a", "a", "b", "b"], [0, 1, 0, 1])
    0.0
    """
    n, other = np.size(labels), np.size(clusters)
    if n != other or n == 0:
        raise DataError(f"labels and clusters must be of one length, at least 1; got {n} and {other}")
    left, right = label_codes(labels, n, "labels"), label_codes(clusters, n, "clusters")
    joint = np.unique(left * (right.max() + 1) + right, return_counts=True)[1]
    both = _entropy(joint)
    separate = _entropy(np.bincount(left)) + _entropy(np.bincount(right))
    if separate == 0:
        return 1.0
    return float(np.clip(2 * (separate - both) / separate, 0, 1))


def cluster_rows(embeddings: ArrayLike, clusters: int, seed: int = 0) -> Ints:
    """Return the cluster (N,) of each row, 0 ... clusters - 1, by k-means on the sphere.

    Rows are brought to unit length; a cluster's centre is its mean, brought to unit length; a row belongs to the centre
    with which it has the largest cosine (Dhillon and Modha 2001, "Concept decompositions for large sparse text data").
    The start is that of k-means++ (Arthur and Vassilvitskii 2007). Every cluster has a row. The time is that of N x
    clusters cosines, some ten times, and the start is one pass over the rows for each cluster.

    Args:
        embeddings: (N, D), of any length but zero.
        clusters: how many, in [1, N]. Papers take the number of classes.
        seed: of the start.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        ConfigError: `clusters` is out of range.

    >>> cluster_rows([[1, 0], [5, 1], [0, 1], [1, 7]], clusters=2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    True
    """
    unit = unit_rows(embeddings)
    if not 1 <= clusters <= len(unit):
        raise ConfigError(f"clusters must be at least 1 and at most the {len(unit)} rows; got {clusters}")
    centres = _spread_out(unit, clusters, np.random.default_rng(seed))
    nearest = np.full(len(unit), -1, dtype=np.int64)
    for _ in range(ROUNDS):
        before = nearest
        nearest, score = _assign(unit, centres)
        _fill(nearest, score, clusters)
        if np.array_equal(before, nearest):
            break
        centres = _centres(unit, nearest, centres)
    return nearest


def _entropy(counts: Ints) -> float:
    share = counts / counts.sum()
    return float(-np.sum(share * np.log(share)))


def _spread_out(unit: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """Choose rows as centres, each with a chance proportional to its squared distance from those chosen before."""
    chosen = [int(rng.integers(len(unit)))]
    distance = np.full(len(unit), np.inf)  # squared: 2 - 2 cos
    while len(chosen) < clusters:
        np.minimum(distance, np.maximum(2 - 2 * (unit @ unit[chosen[-1]]).astype(np.float64), 0), out=distance)
        distance[chosen] = 0
        mass = np.cumsum(distance)
        if mass[-1] > 0:
            chosen.append(min(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")), len(unit) - 1))
        else:  # all rows lie on centres
            chosen.append(int(np.setdiff1d(np.arange(len(unit)), chosen)[0]))
    return unit[chosen]


def _assign(unit: Floats, centres: Floats) -> tuple[Ints, Floats]:
    """Return each row's best centre (N,) and its cosine (N,)."""
    nearest = np.empty(len(unit), dtype=np.int64)
    score = np.empty(len(unit), dtype=unit.dtype)
    for rows in slabs(len(unit), centres):
        product = unit[rows] @ centres.T  # (rows, clusters)
        nearest[rows] = product.argmax(axis=1)
        score[rows] = product.max(axis=1)
    return nearest, score


def _fill(nearest: Ints, score: Floats, clusters: int) -> None:
    """Give each empty cluster the row that fits its own cluster least, of those that are not alone."""
    counts = np.bincount(nearest, minlength=clusters)
    empty = np.flatnonzero(counts == 0)
    if empty.size == 0:
        return
    worst = iter(np.argsort(score, kind="stable").tolist())
    for cluster in empty:
        row = next(row for row in worst if counts[nearest[row]] > 1)
        counts[nearest[row]] -= 1
        counts[cluster] = 1
        nearest[row] = cluster


def _centres(unit: Floats, nearest: Ints, before: Floats) -> Floats:
    """Return the unit means (clusters, D); a mean of no length stays where the centre was."""
    order = np.argsort(nearest, kind="stable")
    edges = np.searchsorted(nearest[order], np.arange(len(before)))
    sums = np.add.reduceat(unit[order], edges, axis=0)
    length: NDArray[np.floating] = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(length > 0, sums / np.maximum(length, np.finfo(unit.dtype).tiny), before).astype(unit.dtype)
