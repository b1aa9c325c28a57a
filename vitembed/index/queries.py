"""Queries of several images, and of entries of the index itself."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.errors import DataError, VectorError
from vitembed.index.index import Index
from vitembed.index.results import Hit
from vitembed.index.searching import checked_k
from vitembed.index.vectors import FloatArray


def combined(vectors: npt.ArrayLike) -> FloatArray:
    """Return the direction between several embeddings, as one query for all of them.

    The cosine with it ranks entries by their mean cosine with the several.

    Args:
        vectors: (n, dim) numbers, rows of unit length, at least one.

    Returns:
        (dim,) float32 of unit length.

    Raises:
        VectorError: there is none, or they cancel each other out.
    """
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise VectorError(f"vectors must have shape (n, dim) with at least one row; got {rows.shape}")
    mean = rows.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if not length > 1e-6:
        raise VectorError("the queries cancel each other out or are not finite; search with each of them instead")
    query: FloatArray = (mean / length).astype(np.float32)
    return query


def more_like(
    index: Index,
    ids: Sequence[str],
    k: int = 10,
    where: Mapping[str, Any] | None = None,
    recall: float | None = None,
) -> list[Hit]:
    """Return the entries most alike to some entries together, without those.

    Args:
        index: the index.
        ids: the entries, at least one.
        k: how many hits.
        where: as in `Index.search`.
        recall: as in `Index.search`.

    Raises:
        DataError: an id is not in the index, or none is given.
        ConfigError: `k`, `where` or `recall` is not as in `Index.search`.
        VectorError: the entries cancel each other out.
    """
    if isinstance(ids, str) or not ids:
        raise DataError(f"ids must be a list of at least one id; got {ids!r}")
    query = combined(np.stack([index.get(name).vector for name in ids]))
    [hits] = search_others(index, query[None], [set(ids)], k, where, recall)
    return hits


def search_others(
    index: Index,
    vectors: npt.ArrayLike,
    own: Sequence[Collection[str]],
    k: int = 10,
    where: Mapping[str, Any] | None = None,
    recall: float | None = None,
) -> list[list[Hit]]:
    """Return the k entries most alike to each query, without those that the query was made of.

    Args:
        index: the index.
        vectors: (n, dim) as in `Index.search`.
        own: n collections of different ids, those of each query's entries.
        k: how many hits for each query.
        where: as in `Index.search`.
        recall: as in `Index.search`.

    Raises:
        VectorError: the vectors are not as in `Index.search`.
        ConfigError: `k`, `where` or `recall` is not.
    """
    found = index.search(vectors, checked_k(k) + max(map(len, own), default=0), where=where, recall=recall)
    return [[hit for hit in hits if hit.id not in known][:k] for hits, known in zip(found, own, strict=True)]
