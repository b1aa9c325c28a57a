"""Groups among the entries of an index: near-duplicates, and clusters; the same content gives the same answer.

Neither depends on the order in which entries were added: where a choice is free, the smaller id is taken. Everything is
read through `Index.stream` and `Index.search_within`, batch by batch, so that no more than a batch of vectors is held,
but for those of the representatives (near-duplicates) and of the entries that centres are learned from (clusters).
"""

import hashlib
from collections.abc import Iterable, Iterator
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

# Entries searched for at once. Where they have many hits the next ones are fewer, for _MAX_HITS in all: some 50 MB.
_FIRST_QUERIES, _MAX_QUERIES, _MAX_HITS = 16, 256, 100_000

_JUDGED = 2_000  # entries that the silhouette is measured on: their distances take 16 MB
_STARTS = 3  # k-means ends in a local optimum; the best of several starts is kept
_ROUNDS = 100
_PERFECT = 1 - 1e-6  # a cosine from which on an entry is its centre, but for rounding

_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DuplicateGroup:
    """Entries that are connected by pairs at or above a score (single linkage).

    Two members need not be that alike themselves: a chain of alike entries connects its ends.

    Attributes:
        representative: the id of the member that is linked to the most others; of several, the smallest id.
        weakest: the lowest score of two members that are linked, in [-1, 1].
        members: all of them by id, the representative too; each with its score to the representative.
    """

    representative: str
    weakest: float
    members: tuple[Hit, ...]


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


def near_duplicates(index: Index, score: float = 0.95, progress: bool = False) -> list[DuplicateGroup]:
    """Return the groups of entries that are connected by pairs at or above a score, exactly.

    Every entry is searched for among all others, so that the time grows with the square of their number; of entries
    with the very same vector one is searched for, and they belong together whatever the score. What another process
    changes meanwhile may be left out.

    Args:
        index: the index.
        score: the lowest cosine that links two entries, in [-1, 1].
        progress: show a bar on standard error.

    Returns:
        Groups of two entries or more: the largest first, then by their first member's id.

    Raises:
        ConfigError: `score` is no number in [-1, 1].
        SearchIndexError: what had to be read is damaged.
    """
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise ConfigError(f"score must be a number from -1 to 1; got {score!r}")
    links = _Links()
    with _bar(len(index), progress) as bar:
        for records in index.stream():
            new = [at for at, name in enumerate(records.ids) if links.is_first(name, records.vectors[at])]
            bar.update(len(records) - len(new))
            for part, found in _searches(index, records, new, score):
                for at, hits in zip(part, found, strict=True):
                    links.connect(records.ids[at], hits)
                bar.update(len(part))
    groups = _scored(index, links)
    return sorted(groups, key=lambda group: (-len(group.members), group.members[0].id))


def cluster(index: Index, clusters: int | None = None, seed: int = 0) -> Clustering:
    """Return the entries in clusters by spherical k-means (Dhillon and Modha 2001): k-means under the cosine.

    The centres are learned from up to 50,000 entries (or 40 a cluster, if that is more) drawn by the seed, as the best
    of three starts by k-means++ (Arthur and Vassilvitskii 2007); then each entry goes to its nearest centre.

    Args:
        index: the index.
        clusters: how many, at most one an entry; there are fewer where there are fewer different vectors. None tries
            the numbers of `TRIED`, up to half the entries and at least 2, and takes the one with the highest mean
            silhouette (Rousseeuw 1987).
        seed: of the drawing and of the starts, from 0 on.

    Raises:
        ConfigError: `clusters` is no whole number from 1 to the number of entries, or the seed is negative.
        SearchIndexError: what had to be read is damaged.
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
    if clusters is None:
        clusters, silhouette = _best_number(learned, seed)
    centres = _centres(learned, clusters, seed)
    members = _assigned(index, centres)
    filled = [number for number in range(len(centres)) if members[number]]
    filled.sort(key=lambda number: (-len(members[number]), members[number][0].id))
    return Clustering(tuple(Cluster(tuple(members[number])) for number in filled), centres[filled], silhouette)


def sample(index: Index, limit: int, seed: int = 0) -> Records:
    """Return up to `limit` entries, drawn by the seed when there are more, in the order of their ids.

    Raises:
        ConfigError: `limit` is no whole number of at least 1, or the seed is negative.
        SearchIndexError: what had to be read is damaged.
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


class _Links:
    """Which entries are linked: a union-find over their ids, and what is told about a group."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._positions: dict[str, int] = {}
        self._parents: list[int] = []
        self._degrees: dict[int, int] = {}  # entry that was searched for -> entries found
        self._weakest: dict[int, float] = {}  # the same -> the lowest score found
        self._twins: dict[bytes, int] = {}  # vector -> the first entry that has it
        self._first: dict[int, int] = {}  # entry -> the first one with its vector

    def is_first(self, name: str, vector: FloatArray) -> bool:
        """Note an entry; tell whether its vector is new. Otherwise link it to the one that has the same."""
        digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        position = self._position(name)
        first = self._twins.setdefault(digest, position)
        self._first[position] = first
        self._unite(position, first)
        return first == position

    def connect(self, name: str, hits: Iterable[Hit]) -> None:
        """Link an entry to all that were found for it."""
        position, degree, weakest = self._position(name), 0, 1.0
        for hit in hits:
            degree += 1
            if hit.id != name:
                weakest = min(weakest, hit.score)
                self._unite(position, self._position(hit.id))
        self._degrees[position], self._weakest[position] = degree, weakest

    def groups(self) -> Iterator[tuple[str, float, list[str]]]:
        """Yield each group of two or more: its representative, the lowest score of a link, and its ids in order."""
        together: dict[int, list[int]] = {}
        for position in range(len(self._names)):
            together.setdefault(self._root(position), []).append(position)
        for members in together.values():
            if len(members) > 1:
                chosen = min(members, key=lambda at: (-self._degree(at), self._names[at]))
                weakest = min(self._weakest.get(at, 1.0) for at in members)
                yield self._names[chosen], weakest, sorted(self._names[at] for at in members)

    def _degree(self, position: int) -> int:
        return self._degrees.get(self._first.get(position, position), 0)

    def _position(self, name: str) -> int:
        position = self._positions.setdefault(name, len(self._names))
        if position == len(self._names):
            self._names.append(name)
            self._parents.append(position)
        return position

    def _unite(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self._parents[high] = low

    def _root(self, position: int) -> int:
        while self._parents[position] != position:
            # Halving the path on the way keeps trees flat (Tarjan and van Leeuwen 1984).
            self._parents[position] = position = self._parents[self._parents[position]]
        return position


def _searches(
    index: Index, records: Records, rows: list[int], score: float
) -> Iterator[tuple[list[int], list[list[Hit]]]]:
    """Search for some rows of a batch, in parts; yield the rows of each part, and what was found for each of them."""
    size, start = _FIRST_QUERIES, 0
    while start < len(rows):
        part = rows[start : start + size]
        found = index.search_within(records.vectors[part], score)
        yield part, found
        start += len(part)
        size = max(1, min(_MAX_QUERIES, _MAX_HITS // max(1, max(map(len, found)))))


def _scored(index: Index, links: _Links) -> Iterator[DuplicateGroup]:
    """Yield the groups with the scores of their members to the representatives."""
    groups = list(links.groups())
    number = {name: at for at, (_, _, names) in enumerate(groups) for name in names}
    chosen = {name: at for at, (name, _, _) in enumerate(groups)}
    vectors: dict[int, FloatArray] = {}
    for records in index.stream():
        vectors |= {chosen[name]: records.vectors[at] for at, name in enumerate(records.ids) if name in chosen}
    members: dict[int, list[Hit]] = {}
    for records in index.stream():
        rows = [at for at, name in enumerate(records.ids) if number.get(name) in vectors]
        owners = [number[records.ids[at]] for at in rows]
        if rows:
            scores = _cosines(records.vectors[rows], np.stack([vectors[owner] for owner in owners]))
            for at, owner, score in zip(rows, owners, scores, strict=True):
                members.setdefault(owner, []).append(Hit(records.ids[at], score, records.metadata[at]))
    for at, (name, weakest, _) in enumerate(groups):
        if len(found := members.get(at, [])) > 1:
            yield DuplicateGroup(name, weakest, tuple(sorted(found, key=lambda hit: hit.id)))


def _cosines(rows: FloatArray, others: FloatArray) -> list[float]:
    """Return the scores (n,) of rows (n, dim) and others (n, dim), as a search gives them."""
    products = rows.astype(np.float64) * others
    scores: list[float] = products.sum(axis=1).clip(-1, 1).tolist()
    return scores


def _unit(rows: FloatArray) -> FloatArray:
    """Return rows with length 1 again: an index takes them with a tolerance. A row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def _best_number(vectors: FloatArray, seed: int) -> tuple[int, float | None]:
    """Return the number of clusters with the highest mean silhouette, and that; 1 and None if none can be judged."""
    from sklearn.metrics import silhouette_score

    judged = vectors
    if len(vectors) > _JUDGED:
        judged = vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), _JUDGED, replace=False))]
    distances = (1 - judged @ judged.T).clip(0)  # (n, n)
    np.fill_diagonal(distances, 0)
    best: tuple[int, float | None] = (1, None)
    for number in TRIED:
        if number > max(2, len(judged) // 2) or len(judged) < 3:  # the silhouette needs a cluster of two or more
            break
        labels, _ = _nearest(judged, _centres(judged, number, seed))
        if 1 < len(np.unique(labels)) < len(judged):
            silhouette = float(silhouette_score(distances, labels, metric="precomputed"))
            if best[1] is None or silhouette > best[1]:
                best = (number, silhouette)
    return best


def _centres(vectors: FloatArray, clusters: int, seed: int) -> FloatArray:
    """Learn centres (clusters, dim), rows of unit length, from unit rows (n, dim); n >= clusters."""
    from sklearn.cluster import kmeans_plusplus

    best, best_score = np.empty(0, np.float32), -np.inf
    for start in range(_STARTS):
        state = int(np.random.default_rng([seed, start]).integers(2**32))
        centres, _ = kmeans_plusplus(vectors, clusters, random_state=state)
        centres, score = _settled(vectors, centres)
        if score > best_score:
            best, best_score = centres, score
    return best


def _settled(vectors: FloatArray, centres: FloatArray) -> tuple[FloatArray, float]:
    """Move centres until no row changes its cluster; return them and the mean score of the rows to theirs."""
    labels, scores = _nearest(vectors, centres)
    for _ in range(_ROUNDS):
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

    return tqdm(total=total, unit=" entries", desc="duplicates", disable=not shown)
