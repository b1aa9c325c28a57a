"""Nearest rows by FAISS: exact search over the live rows of the vector file. No other module imports FAISS.

Two steps. FAISS scans every block of live rows in float32 and keeps a few more candidates than were asked for; the
candidates are then scored again in float64, one row at a time in a fixed order of summation. So a score depends on the
two vectors alone, not on the batch, the block or the position they met in; rows of equal score come in row order; and
the result is provably exact: a row that FAISS left out can only matter when its float32 score is within rounding error
of the k-th, and then (many copies of one image) the rows around that score are all looked at.
"""

import numpy as np
import numpy.typing as npt

from vitembed.index.blocks import BoolArray
from vitembed.index.vectors import FloatArray

RowArray = npt.NDArray[np.int64]
ScoreArray = npt.NDArray[np.float64]

# Rows scanned at a time: 25 MB at 384 dimensions, which bounds the copy made of a block that has dead rows.
SCAN_ROWS = 16_384

# Queries scanned at a time, which bounds the table of candidates.
QUERY_ROWS = 1_024

# Candidates beyond k: enough that the fallback is met by true duplicates only.
SPARE = 6

# Pairs scored again at a time: 25 MB in float64 at 384 dimensions.
_PAIRS = 8_192

# From this many queries on FAISS multiplies matrices instead of scanning row by row, but not through a selector.
_MATRIX_QUERIES = 20


def nearest(vectors: FloatArray, mask: BoolArray, queries: FloatArray, k: int) -> list[tuple[RowArray, ScoreArray]]:
    """Return the k best rows of each query by inner product, exactly.

    Args:
        vectors: (n, dim) float32 unit rows.
        mask: (n,) bool, the rows that may be found.
        queries: (q, dim) float32 unit rows.
        k: how many; at least 1. Fewer come back when fewer rows may be found.

    Returns:
        For each query its rows (k,) int64 and scores (k,) float64, best first, ties in row order.
    """
    live = int(np.count_nonzero(mask))
    width = min(k + SPARE, live)
    found: list[tuple[RowArray, ScoreArray]] = []
    for start in range(0, len(queries), QUERY_ROWS):
        part = queries[start : start + QUERY_ROWS]
        rows, rough = _candidates(vectors, mask, part, width)  # (q, width) each
        scores = _score(vectors, rows, part)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        found += zip(rows, scores, strict=True)
        if width < live:
            # A row left out scores at most the worst candidate's rough score, plus the error of a float32 sum.
            unsure = scores[:, -1] <= rough.min(axis=1) + rounding(vectors.shape[1])
            for position in np.flatnonzero(unsure):
                floor = float(scores[position, -1])
                found[start + position] = _all_around(vectors, mask, part[position], floor, k)
    return found


def rounding(dim: int) -> float:
    """Return a bound on the error of a float32 inner product of two unit rows, in any order of summation.

    The bound is n u / (1 - n u) for n terms (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), with
    room for rows whose length is not exactly 1.
    """
    return 1.01 * (dim + 1) * 2.0**-24


def _candidates(vectors: FloatArray, mask: BoolArray, queries: FloatArray, width: int) -> tuple[RowArray, FloatArray]:
    """Scan block by block; return the rows (q, width) and float32 scores (q, width) of the best, in no order."""
    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(mask), SCAN_ROWS):
        part = mask[start : start + SCAN_ROWS]
        alive = int(np.count_nonzero(part))
        if not alive:
            continue
        block = vectors[start : start + len(part)]
        more_scores, more = _scan(block, part, alive, queries, min(width, alive))
        rows = np.concatenate([rows, more + start], axis=1)
        scores = np.concatenate([scores, more_scores], axis=1)
        if rows.shape[1] > width:
            keep = np.argpartition(-scores, width - 1, axis=1)[:, :width]
            rows, scores = np.take_along_axis(rows, keep, 1), np.take_along_axis(scores, keep, 1)
    return rows, scores


def _scan(block: FloatArray, mask: BoolArray, alive: int, queries: FloatArray, k: int) -> tuple[FloatArray, RowArray]:
    """Return scores (q, k) and positions (q, k) of the k best rows of one block; `alive` >= k rows may be found."""
    import faiss

    dense = alive == len(block) or (alive * 4 >= len(block) and len(queries) < _MATRIX_QUERIES)
    live = None if dense else np.flatnonzero(mask)
    if live is not None:
        block, mask = block[live], np.ones(alive, np.bool_)
    if len(queries) > 1 and mask.all():
        scores, positions = faiss.knn(queries, block, k, faiss.METRIC_INNER_PRODUCT)
    else:
        scores, positions = _scan_selected(block, mask, queries, k)
    return scores, positions if live is None else live[positions]


def _scan_selected(block: FloatArray, mask: BoolArray, queries: FloatArray, k: int) -> tuple[FloatArray, RowArray]:
    """Do the same row by row, skipping the rows that are not in the mask.

    A single query comes here with a full mask too: FAISS then scans on the calling thread. Otherwise it starts its
    threads for every block, which on a busy machine takes ten times as long as the scan itself, and gains little: one
    core reads nearly as fast as the memory can give.
    """
    import faiss

    bits = np.packbits(mask, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits))
    scores = np.empty((len(queries), k), np.float32)
    positions = np.empty((len(queries), k), np.int64)
    faiss.knn_inner_product(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(block),
        block.shape[1],
        len(queries),
        len(block),
        k,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(positions),
        selector,
    )
    return scores, positions


def _score(vectors: FloatArray, rows: RowArray, queries: FloatArray) -> ScoreArray:
    """Return the float64 inner products (q, w) of each query with its own rows (q, w)."""
    flat = rows.ravel()
    owner = np.repeat(np.arange(len(queries)), rows.shape[1])
    scores = np.empty(len(flat), np.float64)
    for start in range(0, len(flat), _PAIRS):
        part = slice(start, start + _PAIRS)
        products = vectors[flat[part]].astype(np.float64)  # (p, dim)
        products *= queries[owner[part]]
        scores[part] = products.sum(axis=1)  # pairwise along each row: the same order for every pair
    return scores.reshape(rows.shape)


def _all_around(
    vectors: FloatArray, mask: BoolArray, query: FloatArray, floor: float, k: int
) -> tuple[RowArray, ScoreArray]:
    """Return the k best rows of one query, given that at least k rows score `floor` or more."""
    rows = np.empty(0, np.int64)
    scores = np.empty(0, np.float64)
    for start in range(0, len(mask), SCAN_ROWS):
        part = mask[start : start + SCAN_ROWS]
        rough = vectors[start : start + len(part)] @ query  # (rows of the block,) float32
        near = np.flatnonzero(part & (rough >= floor - rounding(len(query)))) + start
        rows = np.concatenate([rows, near])
        scores = np.concatenate([scores, _score(vectors, near[None], query[None])[0]])
        order = np.lexsort((rows, -scores))[:k]
        rows, scores = rows[order], scores[order]
    return rows, scores
