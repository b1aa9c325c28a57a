"""Clusters of the entries of an index, and samples of them; the same content and seed give the same answer.

Neither depends on the order in which entries were added: where a choice is free, the smaller id is taken. Everything is
read through `Index.stream`, batch by batch; the entries that centres are learned from are held in memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.errors import ConfigError
from vitembed.index.index import Index
from vitembed.index.inputs import Metadata
from vitembed.index.results import Hit, Records
from vitembed.index.vectors import FloatArray

LEARNED = 50_000
"""Entries that the centres of clusters are learned from, or 40 a cluster if that is more."""

TRIED = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 140, 200)
"""Numbers of clusters that are tried when none is asked for."""

_JUDGED = 2_000  # entries that the silhouette is measured on: their distances take 16 MB
_STARTS = 3  # k-means ends in a local optimum; the best of several starts is kept
_ROUNDS = 100
_PERFECT = 1 - 1e-6  # a cosine from which on an entry is its centre, but for rounding

_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cluster:
    """Entries that are nearer to one centre than to any other.

    Attributes:
        members: by their score to the centre, best first; equal ones by id.
    """

    members: tuple[Hit, ...]

    @property
    def medoid(self) -> str:
        """Id of the member that is nearest to the centre."""
        return self.members[0].id


@dataclass(frozen=True, eq=False)
class Clustering:
    """All entries of an index in clusters, the largest first, then by their medoids' ids.

    Attributes:
        clusters: k of them, none empty.
        centres: (k, dim) float32, rows of unit length, in the same order.
        silhouette: mean silhouette of up to 2,000 entries under the cosine distance, in [-1, 1], by which the number
            of clusters was chosen; None if it was given, or there was nothing to choose from.
    """

    clusters: tuple[Cluster, ...]
    centres: FloatArray
    silhouette: float | None


def cluster(index: Index, clusters: int | None = None, seed: int = 0, progress: bool = False) -> Clustering:
    """Return the entries in clusters by spherical k-means (Dhillon and Modha 2001): k-means under the cosine.

    The centres are learned from up to 50,000 entries (or 40 a cluster, if that is more) drawn by the seed, as the best
    of three starts by k-means++ (Arthur and Vassilvitskii 2007); then each entry goes to its nearest centre. Learning
    20 centres from 50,000 entries of 128 numbers takes under a minute on two cores, and two minutes when their number
    is to be found; beyond 50,000 entries only reading them takes longer.

    Args:
        index: the index.
        clusters: how many, at most one an entry; there are fewer where there are fewer different vectors. None tries
            the numbers of `TRIED`, up to half the entries and at least 2, and takes the one with the highest mean
            silhouette (Rousseeuw 1987).
        seed: of the drawing and of the starts, from 0 on.
        progress: show a bar on standard error.

    Raises:
        ConfigError: `clusters` is no whole number from 1 to the number of entries, or the seed is negative.
        SearchIndexError: what had to be read is damaged.
        RewrittenError: another process compacted or rewrote the index meanwhile; begin again.
    """
    size = len(index)
    if clusters is not None and (isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1):
        raise ConfigError(f"clusters must be a whole number of at least 1; got {clusters!r}")
    if clusters is not None and clusters > size:
        raise ConfigError(f"clusters must be at most the number of entries, {size:,}; got {clusters:,}")
    learned = _unit(sample(index, max(LEARNED, 40 * (clusters or 0)), seed).vectors)
    if not len(learned):
        return Clustering((), np.empty((0, index.dim), np.float32), None)
    silhouette = None
    judged, trials = _judged(learned, seed), []
    if clusters is None:
        # The silhouette needs a cluster of two or more.
        trials = [number for number in TRIED if number <= max(2, len(judged) // 2) and len(judged) > 2]
    with _bar(_STARTS * (len(trials) + 1) + 1, progress) as bar:
        if clusters is None:
            clusters, silhouette = _best_number(judged, trials, seed, bar)
        centres = _centres(learned, min(clusters, len(learned)), seed, bar)
        members = _assigned(index, centres)
        bar.update()
    filled = [number for number in range(len(centres)) if members[number]]
    filled.sort(key=lambda number: (-len(members[number]), members[number][0].id))
    return Clustering(tuple(Cluster(tuple(members[number])) for number in filled), centres[filled], silhouette)


def sample(index: Index, limit: int, seed: int = 0) -> Records:
    """Return up to `limit` entries, drawn by the seed when there are more, in the order of their ids.

    Raises:
        ConfigError: `limit` is no whole number of at least 1, or the seed is negative.
        SearchIndexError: what had to be read is damaged.
        RewrittenError: another process compacted or rewrote the index meanwhile; begin again.
    """
    for name, value, least in (("limit", limit, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}")
    names = sorted(index.ids())
    if len(names) > limit:
        drawn = np.random.default_rng(seed).choice(len(names), limit, replace=False)
        names = [names[position] for position in np.sort(drawn)]
    wanted = {name: position for position, name in enumerate(names)}
    vectors = np.empty((len(names), index.dim), np.float32)
    found: dict[int, Metadata] = {}
    for records in index.stream():
        for name, vector, metadata in zip(records.ids, records.vectors, records.metadata, strict=True):
            if (position := wanted.get(name)) is not None:
                vectors[position], found[position] = vector, metadata
    there = sorted(found)  # all of them, unless another process removed some meanwhile
    return Records([names[position] for position in there], vectors[there], [found[position] for position in there])


def _cosines(rows: FloatArray, others: FloatArray) -> list[float]:
    """Return the scores (n,) of rows (n, dim) and others (n, dim), as a search gives them."""
    products = rows.astype(np.float64) * others
    scores: list[float] = products.sum(axis=1).clip(-1, 1).tolist()
    return scores


def _unit(rows: FloatArray) -> FloatArray:
    """Return rows with length 1 again: an index takes them with a tolerance. A row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def _judged(vectors: FloatArray, seed: int) -> FloatArray:
    """Return the vectors that the silhouette is measured on."""
    if len(vectors) <= _JUDGED:
        return vectors
    chosen: FloatArray = vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), _JUDGED, replace=False))]
    return chosen


def _best_number(judged: FloatArray, trials: list[int], seed: int, bar: Any) -> tuple[int, float | None]:
    """Return the number of clusters with the highest mean silhouette, and that; 1 and None if none can be judged."""
    from sklearn.metrics import silhouette_score

    distances = (1 - judged @ judged.T).clip(0)  # (n, n)
    np.fill_diagonal(distances, 0)
    best: tuple[int, float | None] = (1, None)
    for number in trials:
        labels, _ = _nearest(judged, _centres(judged, number, seed, bar))
        if 1 < len(np.unique(labels)) < len(judged):
            silhouette = float(silhouette_score(distances, labels, metric="precomputed"))
            if best[1] is None or silhouette > best[1]:
                best = (number, silhouette)
    return best


def _centres(vectors: FloatArray, clusters: int, seed: int, bar: Any) -> FloatArray:
    """Learn centres (clusters, dim), rows of unit length, from unit rows (n, dim); n >= clusters."""
    from sklearn.cluster import kmeans_plusplus

    best, best_score = np.empty(0, np.float32), -np.inf
    for start in range(_STARTS):
        state = int(np.random.default_rng([seed, start]).integers(2**32))
        centres, _ = kmeans_plusplus(vectors, clusters, random_state=state)
        centres, score = _settled(vectors, centres, bar)
        bar.update()
        if score > best_score:
            best, best_score = centres, score
    return best


def _settled(vectors: FloatArray, centres: FloatArray, bar: Any) -> tuple[FloatArray, float]:
    """Move centres until no row changes its cluster; return them and the mean score of the rows to theirs."""
    labels, scores = _nearest(vectors, centres)
    for number in range(1, _ROUNDS + 1):
        bar.set_postfix_str(f"{len(centres)} centres, round {number}", refresh=False)
        bar.update(0)
        centres = _moved(vectors, centres, labels, scores)
        before = labels
        labels, scores = _nearest(vectors, centres)
        if np.array_equal(labels, before):
            break
    return centres, float(scores.mean())


def _moved(vectors: FloatArray, centres: FloatArray, labels: _Labels, scores: FloatArray) -> FloatArray:
    """Return the mean directions of the clusters; the centre of an empty one moves to the row that has the worst."""
    order = np.argsort(labels, kind="stable")
    filled, starts = np.unique(labels[order], return_index=True)
    moved = centres.copy()
    means = _unit(np.add.reduceat(vectors[order], starts, axis=0))
    moved[filled] = np.where(np.any(means, axis=1, keepdims=True), means, centres[filled])  # opposite rows cancel out
    worst = iter(np.argsort(scores, kind="stable"))
    for number in np.setdiff1d(np.arange(len(centres)), filled):
        row = next(worst)
        if scores[row] < _PERFECT:  # otherwise there are fewer different vectors than clusters, and it stays empty
            moved[number] = vectors[row]
    return moved


def _nearest(vectors: FloatArray, centres: FloatArray, size: int = 4_096) -> tuple[_Labels, FloatArray]:
    """Return for each row the number (n,) of its nearest centre, the lowest of several, and its score (n,) to it."""
    labels, scores = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), size):
        found = vectors[start : start + size] @ centres.T  # (b, clusters)
        labels[start : start + size] = found.argmax(axis=1)
        scores[start : start + size] = found.max(axis=1)
    return labels, scores


def _assigned(index: Index, centres: FloatArray) -> list[list[Hit]]:
    """Return for each centre the entries that are nearest to it, best first."""
    members: list[list[Hit]] = [[] for _ in centres]
    for records in index.stream():
        labels, _ = _nearest(records.vectors, centres)
        scores = _cosines(_unit(records.vectors), centres[labels])
        entries = zip(records.ids, labels.tolist(), scores, records.metadata, strict=True)
        for name, label, score, metadata in entries:
            members[label].append(Hit(name, score, metadata))
    for hits in members:
        hits.sort(key=lambda hit: (-hit.score, hit.id))
    return members


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=" steps", desc="clusters", disable=not shown)
