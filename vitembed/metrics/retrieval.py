"""Metrics of retrieval: is the nearest image of the same class?

One search serves all of them. Its gallery is sorted by class, so the matches of a query are one slice of its
scores; the rank of a match is then a count of better scores, and no list of neighbours is ever built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics.checks import Floats, Ints, checked_labels, label_codes, slabs, unit_rows


@dataclass(frozen=True)
class QueryRanks:
    """How each query fared in a search; the retrieval metrics are means over these.

    Attributes:
        queries: (Q,) int64, positions of the judged queries in the given embeddings, ascending. A query
            without an image of its class to find is not judged.
        first_rank: (Q,) int64 >= 1, the rank of the best image of the query's class.
        precision_at_r: (Q,) float64 in [0, 1], average precision over the first R ranks (see `map_at_r`).
    """

    queries: Ints
    first_rank: Ints
    precision_at_r: NDArray[np.float64]


def recall_at_k(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int] = (1,),
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> dict[int, float]:
    """Return the share of queries with an image of their class among the k nearest (the hit rate).

    Without a gallery every image is searched among all others: the query itself is left out. Queries that have
    no other image of their class to find are excluded. A query hits when fewer than k images of other classes
    score at least as high as its best match, so a tie is a miss.

    Args:
        embeddings: (N, D) query embeddings, of any length but zero.
        labels: (N,) their classes, integers or strings.
        ks: the numbers of nearest images to look at, each >= 1.
        gallery: (M, D) embeddings to search in; the queries themselves by default.
        gallery_labels: (M,) classes of the gallery.

    Returns:
        {k: recall@k in [0, 1]} in the order of `ks`.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit the embeddings, or no query has anything to find.

    At angles of 0, 10, 25 and 80 degrees, only the third image has a nearest neighbour of another class; its
    match at 80 degrees comes last of three:

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> recall_at_k(z, ["a", "a", "b", "b"], ks=(1, 2, 3))
    {1: 0.75, 2: 0.75, 3: 1.0}
    """
    if any(k < 1 for k in ks):
        raise ConfigError(f"every k of recall@k must be at least 1; got {list(ks)}")
    ranks = query_ranks(embeddings, labels, gallery, gallery_labels, precision=False).first_rank
    return {int(k): float(np.mean(ranks <= k)) for k in ks}


def map_at_r(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the mean average precision at R, in [0, 1].

    For a query with R images of its class to find: (1 / R) * the sum, over the ranks i <= R that hold one of
    them, of the precision among the first i (Musgrave et al. 2020, "A metric learning reality check", eq. 4).
    Self-matches, excluded queries, ties, arguments and errors are as in `recall_at_k`.

    At angles of 0, 10, 25 and 80 degrees the third is the only "b", so it is no query; for each "a" R is 2, and
    the first two ranks are (a, b), (a, b) and (b, a): the mean of 1/2, 1/2 and (1/2) / 2.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> round(map_at_r(z, ["a", "a", "b", "a"]), 4)
    0.4167
    """
    return float(np.mean(query_ranks(embeddings, labels, gallery, gallery_labels).precision_at_r))


def query_ranks(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    precision: bool = True,
) -> QueryRanks:
    """Search every query and return the rank of its first match and its average precision at R.

    Arguments and errors are as in `recall_at_k`. Memory: the embeddings twice, and `CHUNK_BYTES` a few times.

    Args:
        embeddings: (N, D) query embeddings.
        labels: (N,) their classes.
        gallery: (M, D) embeddings to search in; the queries themselves by default.
        gallery_labels: (M,) classes of the gallery.
        precision: False leaves `precision_at_r` empty and saves the time.
    """
    queries, query_codes, items, item_codes = _coded_sets(embeddings, labels, gallery, gallery_labels)
    alone = gallery is None
    # Sorted by class, the matches of a query are one slice of the gallery: start[class] to end[class].
    order = np.argsort(query_codes, kind="stable")
    query_codes = query_codes[order]
    item_order = np.argsort(item_codes, kind="stable")
    items, item_codes = items[item_order], item_codes[item_order]
    start = np.searchsorted(item_codes, query_codes, side="left")
    end = np.searchsorted(item_codes, query_codes, side="right")
    judged = np.flatnonzero(end - start - alone >= 1)
    if judged.size == 0:
        raise DataError("no query has another image of its class to find; check the labels")
    first_rank = np.empty(judged.size, dtype=np.int64)
    average = np.empty(judged.size if precision else 0, dtype=np.float64)
    for rows in slabs(judged.size, items):
        chosen = judged[rows]
        scores = queries[order[chosen]] @ items.T  # (rows, M)
        for run in _runs(query_codes[chosen]):
            at = slice(rows.start + run.start, rows.start + run.stop)
            group = slice(int(start[chosen[run.start]]), int(end[chosen[run.start]]))
            matches = _take_matches(scores[run], group, chosen[run] if alone else None)
            first_rank[at] = _first_ranks(scores[run], matches)
            if precision:
                average[at] = _precision_at_r(scores[run], matches)
    back = np.argsort(order[judged])
    return QueryRanks(order[judged][back], first_rank[back], average[back] if precision else average)


def _take_matches(scores: Floats, group: slice, own: Ints | None) -> Floats:
    """Cut the matches (g, R) out of the scores (g, M), best first, and leave -inf in their places."""
    matches = np.array(scores[:, group])
    if own is not None:
        matches[np.arange(len(matches)), own - group.start] = -np.inf
    scores[:, group] = -np.inf
    matches.sort(axis=1)
    return matches[:, :0:-1] if own is not None else matches[:, ::-1]


def _first_ranks(others: Floats, matches: Floats) -> list[int]:
    # count_nonzero of one row at a time is many times as fast as with an axis.
    return [1 + int(np.count_nonzero(row)) for row in others >= matches[:, :1]]


def _precision_at_r(others: Floats, matches: Floats) -> NDArray[np.float64]:
    """Average precision at R of each row; reorders `others`.

    The j-th best match has rank j + the number of others that score at least as high. Only ranks <= R count, so the
    best R of the others decide, and no full sort is needed.
    """
    r = matches.shape[1]
    others.partition(others.shape[1] - r, axis=1)
    best = np.sort(others[:, -r:], axis=1)  # (g, R), ascending
    order = np.arange(1, r + 1)
    result = np.empty(len(matches))
    for i, (row, match) in enumerate(zip(best, matches, strict=True)):
        rank = order + r - np.searchsorted(row, match, side="left")
        result[i] = np.sum(np.where(rank <= r, order / rank, 0.0)) / r
    return result


def _coded_sets(
    embeddings: ArrayLike, labels: ArrayLike, gallery: ArrayLike | None, gallery_labels: ArrayLike | None
) -> tuple[Floats, Ints, Floats, Ints]:
    """Check queries and gallery; return unit rows and labels as integers that mean the same in both."""
    queries = unit_rows(embeddings)
    names = checked_labels(labels, len(queries), "labels")
    if (gallery is None) != (gallery_labels is None):
        raise DataError("gallery and gallery_labels go together; got one without the other")
    if gallery is None or gallery_labels is None:
        codes = label_codes(names, len(names), "labels")
        return queries, codes, queries, codes
    items = unit_rows(gallery, "gallery")
    if items.shape[1] != queries.shape[1]:
        raise VectorError(f"gallery must have {queries.shape[1]} columns like the queries; got {items.shape[1]}")
    item_names = checked_labels(gallery_labels, len(items), "gallery_labels")
    if names.dtype.kind != item_names.dtype.kind and "U" in names.dtype.kind + item_names.dtype.kind:
        raise DataError("labels and gallery_labels must be of one kind; got numbers and text")
    codes = np.unique(np.concatenate([names, item_names]), return_inverse=True)[1].astype(np.int64)
    return queries, codes[: len(names)], items, codes[len(names) :]


def _runs(codes: Ints) -> Iterator[slice]:
    """Yield the slices of equal values in a sorted array."""
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for first, last in pairwise(edges):
        yield slice(first, last)
