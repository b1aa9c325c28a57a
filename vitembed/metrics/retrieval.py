"""Metrics of retrieval: is the nearest image of the same class?

All take one search (`ranks.py`) and are means over its queries; `query_ranks` gives the queries themselves, so that an
interval can draw them anew by class. The rules are the same for all:

- The score is the cosine; rows are brought to unit length here.
- Without a gallery every image is searched among all others: the query itself is left out.
- R is the number of images of its class that a query can find. A query with R = 0 is not judged.
- Equal scores count against the model: an image of another class that scores as high as a match ranks before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError
from vitembed.metrics.checks import Bools, Ints
from vitembed.metrics.neighbours import Votes
from vitembed.metrics.parallel import in_parallel
from vitembed.metrics.ranks import SearchSets, blocks, search_block, search_sets
from vitembed.metrics.standing import BEYOND, FullStanding, Standing

Rates = NDArray[np.float64]


@dataclass(frozen=True)
class QueryRanks:
    """How each query fared in a search; the retrieval metrics are means over these.

    Attributes:
        queries: (Q,) int64, positions of the judged queries in the given embeddings, ascending. A query
            without an image of its class to find is not judged.
        matches: (Q,) int64 >= 1, R: how many images of its class there are to find.
        first_rank: (Q,) int64 >= 1, the rank of the best of them.
        precision_at_r: (Q,) float64 in [0, 1], average precision over the first R ranks (see `map_at_r`); empty where
            it was not asked for, as the following.
        r_precision: (Q,) float64 in [0, 1], the share of the first R ranks that hold a match.
        precision_at_k: for each k (Q,) float64 in [0, 1], the share of the first k ranks that hold a match.
        average_precision: (Q,) float64 in [0, 1], over all ranks (see `mean_average_precision`).
        voted_right: (Q,) bool, whether the nearest images vote for the query's class (see `knn_accuracy`).
    """

    queries: Ints
    matches: Ints
    first_rank: Ints
    precision_at_r: Rates
    r_precision: Rates
    precision_at_k: dict[int, Rates]
    average_precision: Rates
    voted_right: Bools

    @property
    def reciprocal_rank(self) -> Rates:
        """Return 1 / the rank (Q,) of the best match, in (0, 1]."""
        return 1 / self.first_rank


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
        ConfigError: a k is below 1.

    At angles of 0, 10, 25 and 80 degrees, only the third image has a nearest neighbour of another class; its
    match at 80 degrees comes last of three:

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> recall_at_k(z, ["a", "a", "b", "b"], ks=(1, 2, 3))
    {1: 0.75, 2: 0.75, 3: 1.0}
    """
    _check_ks(ks, "recall@k")
    ranks = query_ranks(embeddings, labels, gallery, gallery_labels, precision=False).first_rank
    return {int(k): float(np.mean(ranks <= k)) for k in ks}


def cmc(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ranks: int = 20,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> Rates:
    """Return the cumulative match characteristic up to a rank: the identification rates at ranks 1 to K, (K,) rising.

    It is recall@k for k = 1 ... K, a closed-set measure: a query whose class is not in the gallery is excluded, and
    nothing is said about refusing strangers. Of several images of the query's class the best counts. Arguments and
    errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> cmc(z, ["a", "a", "b", "b"], ranks=3).tolist()
    [0.75, 0.75, 1.0]
    """
    _check_ks((ranks,), "the curve of match ranks")
    first = query_ranks(embeddings, labels, gallery, gallery_labels, precision=False).first_rank
    counts = np.bincount(np.minimum(first, ranks + 1), minlength=ranks + 2)
    rates: Rates = np.cumsum(counts[1 : ranks + 1]) / first.size
    return rates


def mean_reciprocal_rank(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the mean over the queries of 1 / the rank of the best match, in (0, 1].

    Arguments and errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> round(mean_reciprocal_rank(z, ["a", "a", "b", "b"]), 4)  # ranks 1, 1, 3, 1
    0.8333
    """
    return float(np.mean(query_ranks(embeddings, labels, gallery, gallery_labels, precision=False).reciprocal_rank))


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


def r_precision(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the mean share of the first R ranks that hold a match, in [0, 1]; R is the number of matches.

    Arguments and errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> r_precision(z, ["a", "a", "b", "a"])  # (a, b), (a, b) and (b, a)
    0.5
    """
    return float(np.mean(query_ranks(embeddings, labels, gallery, gallery_labels).r_precision))


def precision_at_k(
    embeddings: ArrayLike,
    labels: ArrayLike,
    ks: Sequence[int] = (1,),
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> dict[int, float]:
    """Return the mean share of the k nearest images that are of the query's class, {k: precision@k in [0, 1]}.

    The share is of k, also where fewer than k images of the class, or fewer than k images, are there to find: with R
    matches no query can have more than R / k. Arguments and errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> precision_at_k(z, ["a", "a", "b", "b"], ks=(1, 2))
    {1: 0.75, 2: 0.375}
    """
    found = query_ranks(embeddings, labels, gallery, gallery_labels, ks=ks, precision=False).precision_at_k
    return {k: float(np.mean(shares)) for k, shares in found.items()}


def mean_average_precision(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the mean average precision over the whole ranking (mAP), in (0, 1].

    For a query with R images of its class to find: (1 / R) * the sum, over the ranks that hold one of them, of the
    precision among the ranks so far (Manning, Raghavan and Schuetze 2008, "Introduction to Information Retrieval",
    section 8.4). No interpolation. Arguments and errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> round(mean_average_precision(z, ["a", "a", "b", "a"]), 4)  # ranks (1, 3), (1, 3) and (2, 3)
    0.75
    """
    return float(
        np.mean(query_ranks(embeddings, labels, gallery, gallery_labels, full=True, precision=False).average_precision)
    )


def knn_accuracy(
    embeddings: ArrayLike,
    labels: ArrayLike,
    k: int = 5,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
) -> float:
    """Return the share of queries whose class wins the vote of the k nearest images, in [0, 1].

    Every image has one vote; of classes with equally many the larger sum of scores wins; a query whose class shares
    even that sum with another counts as wrong. Where more images than fit score as high as the k-th, those of other
    classes vote first, and of these the smaller classes. Arguments and errors are as in `recall_at_k`.

    >>> angles = np.radians([0, 10, 25, 80])
    >>> z = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> knn_accuracy(z, ["a", "a", "b", "b"], k=3)  # each query is outvoted by two
    0.0
    """
    found = query_ranks(embeddings, labels, gallery, gallery_labels, voters=k, precision=False)
    return float(np.mean(found.voted_right))


def query_ranks(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    precision: bool = True,
    ks: Sequence[int] = (),
    full: bool = False,
    voters: int | None = None,
) -> QueryRanks:
    """Search every query once and return what the retrieval metrics are means of.

    Ranks beyond what is asked for are not followed: the first rank and the precision at R cost little beside the
    matrix product, precision at a large k and the full average precision more. Arguments and errors are as in
    `recall_at_k`. Memory: the embeddings twice, and tiles of the product.

    Args:
        embeddings: (N, D) query embeddings.
        labels: (N,) their classes.
        gallery: (M, D) embeddings to search in; the queries themselves by default.
        gallery_labels: (M,) classes of the gallery.
        precision: False leaves `precision_at_r` and `r_precision` empty.
        ks: fill `precision_at_k` for these.
        full: fill `average_precision`.
        voters: fill `voted_right` by the vote of so many nearest images.
    """
    _check_ks(ks, "precision@k")
    _check_ks(() if voters is None else (voters,), "a vote of k images")
    sets = search_sets(embeddings, labels, gallery, gallery_labels)
    depth = np.full(len(sets.rows), len(sets.codes) if full else max(ks, default=0))
    if precision:
        depth = np.maximum(depth, sets.counts)
    parts = in_parallel(lambda chosen: _judge(sets, chosen, int(depth[chosen].max()), ks, voters), list(blocks(sets)))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    back = np.argsort(sets.positions)
    found = {name: values[back] for name, values in columns.items()}
    nothing = np.empty(0)
    return QueryRanks(
        queries=sets.positions[back],
        matches=sets.counts[back],
        first_rank=found["first"],
        precision_at_r=found["map@r"] if precision else nothing,
        r_precision=found["r"] if precision else nothing,
        precision_at_k={int(k): found[f"@{k}"] for k in ks},
        average_precision=found["map"] if full else nothing,
        voted_right=found["vote"] if voters is not None else np.empty(0, dtype=np.bool_),
    )


def _judge(
    sets: SearchSets, chosen: slice, depth: int, ks: Sequence[int], voters: int | None
) -> dict[str, NDArray[np.generic]]:
    """Go over all scores of a block of b queries and return their figures by name, (b,) each."""
    block, counts = search_block(sets, chosen), sets.counts[chosen]
    # Keeping the best others pays while they are few beside all.
    limited = depth <= max(block.matches.shape[1], len(sets.codes) // 8)
    standing = Standing(block.matches, depth) if limited else FullStanding(block.matches, counts)
    votes = None if voters is None else Votes(block.matches, voters)
    for first, tile in block.tiles:
        standing.see(tile)
        if votes is not None:
            votes.see(tile, first)
    figures: dict[str, NDArray[np.generic]] = {"first": standing.first_ranks()}
    ranks = standing.ranks()
    place = np.arange(1, ranks.shape[1] + 1)
    precision = np.where(ranks < BEYOND, place / ranks, 0.0)  # (b, R), up to each match
    within = ranks <= counts[:, None]
    figures["map"] = precision.sum(axis=1) / counts
    figures["map@r"] = np.where(within, precision, 0.0).sum(axis=1) / counts
    figures["r"] = np.count_nonzero(within, axis=1) / counts
    figures |= {f"@{k}": np.count_nonzero(ranks <= k, axis=1) / k for k in ks}
    if votes is not None:
        figures["vote"] = votes.right(sets.codes, sets.codes[sets.start[chosen]])
    return figures


def _check_ks(ks: Sequence[int], what: str) -> None:
    if any(k < 1 for k in ks):
        raise ConfigError(f"every k of {what} must be at least 1; got {list(ks)}")
