"""The search behind the retrieval metrics: every score is looked at once, and no list of neighbours is built.

Queries and items are sorted by class, so the matches of a block of queries are neighbours too: they lie in one stretch
of the items, the block's home. Its scores are computed first and the matches taken out of them; all that follows are
others (images of other classes), in tiles that stay in the processor's cache. See `standing.py` for what becomes of
them.

Ties must be ties: copies of an image have to score alike wherever they lie. Libraries of linear algebra compute the
last rows and columns of a product by other means than the rest, with another last bit; so all products have sides that
are multiples of `_ALIGNED`, with zeros as filling.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from vitembed.errors import DataError, VectorError
from vitembed.metrics.checks import Bools, Floats, Ints, checked_labels, label_codes, unit_rows

# Rows and columns of a tile, multiples of `_ALIGNED`.
TILE_ROWS, TILE_COLUMNS = 1_024, 4_096

# A home has at most this many scores (more only where one query alone has more), whatever the sizes of the classes.
HOME_SCORES = 2**23

# Of a home so many columns come first (or as many as there are matches), then as many again, and so on: most matches
# that have no chance are found out among few others.
_FIRST_COLUMNS = 64

# No side of a block that a library computes at once is larger than this, or does not divide it.
_ALIGNED = 64


@dataclass(frozen=True)
class SearchSets:
    """Queries and the items that they are searched in, both by class, classes of few items first.

    So a block of queries has about equally many matches each.

    Attributes:
        vectors: (N, D) unit rows, of which `rows` are the queries.
        rows: (Q,) rows of the judged queries, by class: those with at least one match.
        positions: (Q,) where these queries stood in what was given.
        items: (M', D) unit rows, by class, and zeros up to the next multiple of `_ALIGNED`.
        codes: (M,) classes of the items as numbers, ascending.
        start: (Q,) the first item of the query's class.
        end: (Q,) the item behind the last one.
        own: (Q,) the item that is the query itself; None in a gallery.
    """

    vectors: Floats
    rows: Ints
    positions: Ints
    items: Floats
    codes: Ints
    start: Ints
    end: Ints
    own: Ints | None

    @property
    def counts(self) -> Ints:
        """Return how many matches (Q,) each query has to find, at least 1 each."""
        return self.end - self.start - (self.own is not None)


@dataclass(frozen=True)
class Block:
    """Some queries that are searched together.

    Attributes:
        queries: which of the Q queries these b are.
        matches: (b, R) scores of their matches, best first, -inf where a query has fewer than R.
        tiles: the scores (b, c) of the items from a column on, once each, with -inf in the places of matches and of the
            query itself. A tile is overwritten by the next.
    """

    queries: slice
    matches: Floats
    tiles: Iterator[tuple[int, Floats]]


def search_sets(
    embeddings: ArrayLike, labels: ArrayLike, gallery: ArrayLike | None, gallery_labels: ArrayLike | None
) -> SearchSets:
    """Check queries and gallery (None: the queries themselves) and sort them by class.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit the embeddings, or no query has anything to find.
    """
    queries, query_codes, items, item_codes = _coded_sets(embeddings, labels, gallery, gallery_labels)
    by_size = np.argsort(np.bincount(item_codes, minlength=query_codes.max(initial=0) + 1), kind="stable")
    number = np.argsort(by_size)
    query_codes, item_codes = number[query_codes], number[item_codes]
    order = np.argsort(query_codes, kind="stable")
    item_order = order if gallery is None else np.argsort(item_codes, kind="stable")
    items, item_codes = _filled(items, item_order), item_codes[item_order]
    start = np.searchsorted(item_codes, query_codes[order], side="left")
    end = np.searchsorted(item_codes, query_codes[order], side="right")
    judged = np.flatnonzero(end - start > (gallery is None))
    if judged.size == 0:
        raise DataError("no query has another image of its class to find; check the labels")
    positions = order[judged]
    own = judged if gallery is None else None
    rows = positions if own is None else own
    vectors = items if gallery is None else queries
    return SearchSets(vectors, rows, positions, items, item_codes, start[judged], end[judged], own)


def search_block(sets: SearchSets, chosen: slice) -> Block:
    """Return some of the queries with the scores of their matches and, in tiles, of everything else."""
    queries = _filled(sets.vectors, sets.rows[chosen])
    first = int(sets.start[chosen.start]) // _ALIGNED * _ALIGNED
    home = queries @ sets.items[first : _aligned(int(sets.end[chosen.stop - 1]))].T
    home = home[: chosen.stop - chosen.start]  # (b, columns)
    matches = _take_matches(home, sets, chosen, first)
    return Block(chosen, matches, _tiles(queries, sets, home, first, matches.shape[1]))


def blocks(sets: SearchSets) -> Iterator[slice]:
    """Cut the queries into blocks of about equal size whose homes are not too large."""
    n = len(sets.rows)
    rows = -(-n // -(-n // TILE_ROWS))
    first = 0
    while first < n:
        last = min(first + rows, n)
        while last - first > 1 and (last - first) * (sets.end[last - 1] - sets.start[first]) > HOME_SCORES:
            last = first + (last - first + 1) // 2
        yield slice(first, last)
        first = last


def reaching(tile: Floats, floor: Floats) -> tuple[Ints, Floats, Bools, Ints]:
    """Return which queries have scores in a tile (b, c) that reach their floor (b, 1).

    Returns:
        The queries (r,) ascending, their rows of the tile (r, c), which scores of these reach it (r, c), and how many
        (r,).
    """
    # The best of a row is found in a third of the time of comparing it, and mostly there is nothing to compare.
    rows = np.flatnonzero(tile.max(axis=1) >= floor[:, 0])
    if rows.size < len(tile):
        tile, floor = tile[rows], floor[rows]
    flags = tile >= floor
    # One row at a time is many times as fast as with an axis.
    return rows, tile, flags, np.fromiter(map(np.count_nonzero, flags), dtype=np.int64, count=rows.size)


def _take_matches(scores: Floats, sets: SearchSets, chosen: slice, first: int) -> Floats:
    """Cut the matches (b, R), best first, out of the scores of a home, and leave -inf in their places."""
    start, size = sets.start[chosen, None], (sets.end - sets.start)[chosen, None]
    place = np.arange(size.max())
    at = start - first + np.where(place < size, place, 0)  # (b, R), the first match where a query has fewer
    matches = np.take_along_axis(scores, at, axis=1)
    matches[place >= size] = -np.inf
    np.put_along_axis(scores, at, -np.inf, axis=1)
    if sets.own is not None:
        matches[np.arange(len(matches)), sets.own[chosen] - start[:, 0]] = -np.inf
    matches.sort(axis=1)
    return matches[:, :0:-1] if sets.own is not None else matches[:, ::-1]


def _tiles(queries: Floats, sets: SearchSets, home: Floats, first: int, wanted: int) -> Iterator[tuple[int, Floats]]:
    """Yield the columns of the home in growing pieces, then the products with all other items."""
    width, size = home.shape[1], len(sets.codes)
    home[:, size - first :] = -np.inf  # the filling
    least = max(_FIRST_COLUMNS, wanted)
    edges = [0, *(2**i * least for i in range(width.bit_length()) if 2**i * least < width), width]
    for low, high in pairwise(edges):
        yield first + low, np.ascontiguousarray(home[:, low:high])
    buffer = np.empty(len(queries) * TILE_COLUMNS, dtype=home.dtype)
    for low, high in (*_parts(0, first), *_parts(first + width, len(sets.items))):
        tile = buffer[: len(queries) * (high - low)].reshape(len(queries), high - low)
        np.matmul(queries, sets.items[low:high].T, out=tile)
        tile[:, max(size - low, 0) :] = -np.inf
        yield low, tile[: len(home)]


def _parts(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Cut columns, a multiple of `_ALIGNED`, into parts of at most `TILE_COLUMNS`."""
    for start in range(low, high, TILE_COLUMNS):
        yield start, min(start + TILE_COLUMNS, high)


def _aligned(n: int) -> int:
    return -(-n // _ALIGNED) * _ALIGNED


def _filled(vectors: Floats, rows: Ints) -> Floats:
    """Return a copy of some rows, and rows of zeros up to the next multiple of `_ALIGNED`."""
    filled = np.zeros((_aligned(rows.size), vectors.shape[1]), dtype=vectors.dtype)
    filled[: rows.size] = vectors[rows]
    return filled


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
