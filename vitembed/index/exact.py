"""Exact search: the nearest rows, and all rows within a score, of those that a mask lets through.

Two steps. A rough scan finds candidates: in one byte a number (see `vitembed.index.codes`) for few queries, in float32
as a matrix product for many. The candidates are then scored in float64, one row at a time in a fixed order of
summation. So a score depends on the two vectors alone, not on the batch, the block or the position they met in; rows of
equal score
come in row order; and the result is provably exact, because each rough score comes with a bound on its error:

- float32: rounding, see `rounding`.
- codes: let x = step * code + r with |r| <= slack, and q * step = t * m + e with whole numbers m, all of them in one
  byte. Then q.x - t (m.code) = e.code + q.r, and by Cauchy-Schwarz |q.r| <= slack, and |e.code| is at most |e| |code|,
  and, since e.code = (e / step).(step * code), at most |e / step| (1 + slack). The smaller one counts, and a
  little is added, since rows are of unit length only nearly.

A row that was left out can only matter when its rough score is within the bound of the k-th best score: where a block
cannot rule that out, more of its rows are looked at.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from vitembed.index import faiss_kernels as kernels
from vitembed.index.blocks import BoolArray
from vitembed.index.codes import CODE_ROWS, CodedRows
from vitembed.index.mapped import Bytes
from vitembed.index.vectors import FloatArray, StoredArray

RowArray = npt.NDArray[np.int64]
ScoreArray = npt.NDArray[np.float64]
Found = tuple[RowArray, ScoreArray]
_T = TypeVar("_T")

# Up to this many queries are scanned one by one over the codes; more are multiplied as matrices.
FEW_QUERIES = 6

# Up to this many rows are scored outright.
FEW_ROWS = 256

# Queries multiplied at a time, which bounds the table of candidates.
QUERY_ROWS = 1_024

# Candidates beyond k that are kept of a block of codes and of all rows, so that looking twice is the exception.
SPARE, PRODUCT_SPARE = 22, 6

# Rows multiplied at a time where all of them live, and nothing needs to be copied.
PRODUCT_ROWS = 131_072

# From this share of living rows on all rows of a block are scanned, and the dead ones dropped afterwards; below it the
# living are copied together first.
_DENSE = 0.15

# How much more is kept when a block is looked at again.
_WIDER = 16

# Pairs scored at a time: the product stays in the processor's cache.
_PAIRS = 128


class RowSource(Protocol):
    """Where rows come from; `vitembed.index.rows.Rows` is one."""

    def verified(self, rows: RowArray) -> StoredArray:
        """Return all vectors, of which these rows may be used."""
        ...

    def coded(self, number: int) -> CodedRows | None:
        """Return a block of codes, if there is one."""
        ...


class Plain:
    """Rows that lie in memory.

    Args:
        vectors: (n, dim) float32 unit rows.
    """

    def __init__(self, vectors: StoredArray) -> None:
        self._vectors = vectors

    def verified(self, rows: RowArray) -> StoredArray:
        """Return the vectors."""
        return self._vectors

    def coded(self, number: int) -> None:
        """Return None: there are no codes."""
        return


def nearest(source: RowSource, mask: BoolArray, queries: FloatArray, k: int) -> list[Found]:
    """Return the k best rows of each query by inner product, exactly.

    Args:
        source: unit rows.
        mask: (n,) bool, the rows that may be found.
        queries: (q, dim) float32 unit rows.
        k: how many; at least 1. Fewer come back when fewer rows may be found.

    Returns:
        For each query its rows (k,) int64 and scores (k,) float64, best first, ties in row order.
    """
    live = int(np.count_nonzero(mask))
    if live <= k or (live <= FEW_ROWS and len(queries) <= FEW_QUERIES):
        rows = np.flatnonzero(mask)
        return [best(rows, score(source, rows, query), k) for query in queries]
    if len(queries) <= FEW_QUERIES:
        return [_Scan(source, mask, query).nearest(k) for query in queries]
    return _nearest_by_products(source, mask, queries, k, live)


def within(source: RowSource, mask: BoolArray, queries: FloatArray, floor: float) -> list[Found]:
    """Return all rows that score at least `floor` with each query, in the form of `nearest`."""
    if len(queries) <= FEW_QUERIES:
        return [_Scan(source, mask, query).within(floor) for query in queries]
    return _within_by_products(source, mask, queries, floor)


def score(source: RowSource, rows: RowArray, query: FloatArray) -> ScoreArray:
    """Return the float64 inner products (n,) of a query with rows (n,) of the source."""
    return pair_scores(source.verified(rows), rows, query[None], np.zeros(len(rows), np.int64))


def pair_scores(vectors: StoredArray, rows: RowArray, queries: FloatArray, owners: RowArray) -> ScoreArray:
    """Return the float64 inner products (p,) of the rows (p,) with the queries (p,) that they belong to."""
    scores = np.empty(len(rows), np.float64)

    def fill(chunk: int) -> None:
        part = slice(chunk * _PAIRS, (chunk + 1) * _PAIRS)
        products = np.multiply(vectors[rows[part]], queries[owners[part]], dtype=np.float64)  # (p, dim)
        products.sum(axis=1, out=scores[part])  # pairwise along each row: the same order for every pair

    in_parallel(fill, range(-(-len(rows) // _PAIRS)))
    return scores


def rounding(dim: int) -> float:
    """Return a bound on the error of a float32 inner product of two unit rows, in any order of summation.

    The bound is n u / (1 - n u) for n terms (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), with
    room for rows whose length is not exactly 1.
    """
    return 1.01 * (dim + 1) * 2.0**-24


def best(rows: RowArray, scores: ScoreArray, k: int) -> Found:
    """Return the k rows of highest score, best first, ties in row order."""
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


# One query, over the codes


@dataclass(frozen=True, eq=False)
class _Candidates:
    """What the rough scan of a block found.

    Attributes:
        number: of the block.
        rows: (c,) the rows that were kept.
        rough: (c,) their rough scores.
        bound: by how much a rough score can be off.
        rest: the highest rough score that a row can have that was not kept; -inf when all were.
    """

    number: int
    rows: RowArray
    rough: ScoreArray
    bound: float
    rest: float


class _Scan:
    """A search for one query: rough scans of the blocks, then scores of what they cannot rule out."""

    def __init__(self, source: RowSource, mask: BoolArray, query: FloatArray) -> None:
        self.source, self.mask, self.query = source, mask, query
        self._coded: dict[int, CodedRows | None] = {}

    def nearest(self, k: int) -> Found:
        """Return the k best rows; the mask holds more than k."""
        numbers = [
            n for n in range(-(-len(self.mask) // CODE_ROWS)) if self.mask[n * CODE_ROWS : (n + 1) * CODE_ROWS].any()
        ]
        self._prepare(numbers)
        blocks = in_parallel(lambda number: self._rough(number, k + SPARE), numbers)
        rows = np.concatenate([block.rows for block in blocks])
        rough = np.concatenate([block.rough for block in blocks])
        bounds = np.repeat([block.bound for block in blocks], [len(block.rows) for block in blocks])
        # The k-th best score is at least the k-th best of any rows: of those that look best.
        first = np.argpartition(-rough, k - 1)[: k + SPARE] if len(rough) > k + SPARE else np.arange(len(rough))
        scores = np.full(len(rows), -np.inf)
        scores[first] = score(self.source, rows[first], self.query)
        floor = float(np.partition(scores[first], -k)[-k])
        more = np.flatnonzero((rough + bounds >= floor) & np.isneginf(scores))
        scores[more] = score(self.source, rows[more], self.query)
        rows, scores = best(rows, scores, k)
        for block in blocks:
            if block.rest + block.bound >= scores[-1]:
                fresh = self._above(block, float(scores[-1]))
                fresh = fresh[~np.isin(fresh, rows)]
                both = np.concatenate([scores, score(self.source, fresh, self.query)])
                rows, scores = best(np.concatenate([rows, fresh]), both, k)
        return rows, scores

    def within(self, floor: float) -> Found:
        """Return all rows that score at least `floor`."""
        numbers = range(-(-len(self.mask) // CODE_ROWS))
        self._prepare(numbers)
        found = in_parallel(lambda number: self._above(self._rough(number, SPARE), floor), numbers)
        rows = np.concatenate([np.empty(0, np.int64), *found])
        scores = score(self.source, rows, self.query)
        near = scores >= floor
        return best(rows[near], scores[near], len(rows))

    def _prepare(self, numbers: Sequence[int]) -> None:
        """Look up what the scans read: files and SQLite are for the calling thread alone."""
        for number in numbers:
            self._coded[number] = self.source.coded(number)
            if self._coded[number] is None:
                start = number * CODE_ROWS
                self.source.verified(np.flatnonzero(self.mask[start : start + CODE_ROWS]) + start)

    def _above(self, block: _Candidates, floor: float) -> RowArray:
        """Return the rows of a block that may score `floor` or more."""
        width = max(len(block.rows), SPARE)
        while block.rest + block.bound >= floor:
            width *= _WIDER
            block = self._rough(block.number, width)
        return block.rows[block.rough + block.bound >= floor]

    def _rough(self, number: int, width: int) -> _Candidates:
        """Scan a block; keep the `width` rows that look best."""
        start = number * CODE_ROWS
        mask = self.mask[start : start + CODE_ROWS]
        alive = int(np.count_nonzero(mask))
        width = min(width, alive)
        if not alive:
            return _Candidates(number, np.empty(0, np.int64), np.empty(0), 0.0, -np.inf)
        coded = self._coded[number]
        if coded is None:
            rough, rows = self._scan_floats(start, mask, width)
            bound = rounding(len(self.query))
            rest = -np.inf if width == alive else float(rough.min())
        elif alive < _DENSE * len(mask):
            live = np.flatnonzero(mask)
            rough, places, bound = _scan_codes(coded, coded.codes[live], self.query, width)
            rows = live[places]
            rest = -np.inf if width == alive else float(rough.min())
        else:
            # Of the codes that look best as many live as are needed, and half as many again, or it is done once more:
            # a wider heap makes the whole scan slower.
            kept, least = 0, width if width == alive else max(width - SPARE, 1)
            wide = min(max(width, int(1.5 * least * len(mask) / alive) + 1), len(mask))
            while kept < least:
                rough, rows, bound = _scan_codes(coded, coded.codes, self.query, wide)
                kept = int(np.count_nonzero(mask[rows]))
                wide = wide if kept >= least else min(2 * wide, len(mask))
            rest = -np.inf if wide == len(mask) else float(rough.min())
            rough, rows = rough[mask[rows]], rows[mask[rows]]
        return _Candidates(number, rows + start, rough, bound, rest)

    def _scan_floats(self, start: int, mask: BoolArray, width: int) -> tuple[ScoreArray, RowArray]:
        live = np.flatnonzero(mask)
        vectors = self.source.verified(live + start)
        if len(live) < _DENSE * len(mask):
            rough = as_floats(vectors[live + start]) @ self.query
        else:
            rough = (as_floats(vectors[start : start + len(mask)]) @ self.query)[live]
        best = np.argpartition(-rough, width - 1)[:width]
        return rough[best].astype(np.float64), live[best]


def _scan_codes(coded: CodedRows, codes: Bytes, query: FloatArray, width: int) -> tuple[ScoreArray, RowArray, float]:
    """Return rough scores (width,), positions among these codes (width,) and the bound on the scores' error."""
    scaled = query.astype(np.float64) * coded.steps
    step = float(np.abs(scaled).max()) / 127 or 1.0
    whole = np.rint(scaled / step).astype(np.float32)
    left = scaled - step * whole.astype(np.float64)
    used = coded.steps > 0
    off = min(np.linalg.norm(left[used] / coded.steps[used]) * (1 + coded.slack), np.linalg.norm(left) * coded.norm)
    products, positions = kernels.scan_codes(codes, whole, width)
    # The sums are of whole numbers, but in float32 they may round when there are many.
    bound = 1.002 * (float(off) + coded.slack) + 2 * rounding(len(query))
    return products.astype(np.float64) * step, positions, bound


# Many queries, as matrix products


def _nearest_by_products(source: RowSource, mask: BoolArray, queries: FloatArray, k: int, live: int) -> list[Found]:
    width = min(k + PRODUCT_SPARE, live)
    found: list[Found] = []
    for start in range(0, len(queries), QUERY_ROWS):
        part = queries[start : start + QUERY_ROWS]
        rows, rough = _candidates(source, mask, part, width)  # (q, width) each
        owners = np.repeat(np.arange(len(part)), width)
        flat = rows.ravel()
        scores = pair_scores(source.verified(np.unique(flat)), flat, part, owners).reshape(rows.shape)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        found += zip(rows, scores, strict=True)
        if width < live:
            unsure = scores[:, -1] <= rough.min(axis=1) + rounding(queries.shape[1])
            for position in np.flatnonzero(unsure):
                found[start + position] = _Scan(source, mask, part[position]).nearest(k)
    return found


def _candidates(source: RowSource, mask: BoolArray, queries: FloatArray, width: int) -> tuple[RowArray, FloatArray]:
    """Scan block by block; return the rows (q, width) and float32 scores (q, width) of the best, in no order."""
    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for live in _spans(mask):
        block = _live_rows(source, live)
        more_scores, more = kernels.nearest_floats(block, queries, min(width, len(live)))
        rows = np.concatenate([rows, live[more]], axis=1)
        scores = np.concatenate([scores, more_scores], axis=1)
        if rows.shape[1] > width:
            keep = np.argpartition(-scores, width - 1, axis=1)[:, :width]
            rows, scores = np.take_along_axis(rows, keep, 1), np.take_along_axis(scores, keep, 1)
    return rows, scores


def _within_by_products(source: RowSource, mask: BoolArray, queries: FloatArray, floor: float) -> list[Found]:
    found: list[Found] = []
    for first in range(0, len(queries), QUERY_ROWS):
        part = queries[first : first + QUERY_ROWS]
        owners, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for live in _spans(mask, CODE_ROWS):
            rough = part @ _live_rows(source, live).T  # (q, live)
            owner, position = np.nonzero(rough >= floor - rounding(queries.shape[1]))
            owners.append(owner)
            rows.append(live[position])
        owner, row = np.concatenate(owners), np.concatenate(rows)
        scores = pair_scores(source.verified(np.unique(row)), row, part, owner)
        near = scores >= floor
        owner, row, scores = owner[near], row[near], scores[near]
        order = np.lexsort((row, -scores, owner))
        cuts = np.searchsorted(owner[order], np.arange(1, len(part)))
        found += zip(np.split(row[order], cuts), np.split(scores[order], cuts), strict=True)
    return found


def _spans(mask: BoolArray, most: int | None = None) -> Iterator[RowArray]:
    """Yield the living rows in spans: long ones where all rows live, short ones where they have to be copied."""
    start = 0
    while start < len(mask):
        size = PRODUCT_ROWS if most is None else most
        if not mask[start : start + size].all():
            size = min(size, CODE_ROWS)
        live = np.flatnonzero(mask[start : start + size]) + start
        if len(live):
            yield live
        start += size


def _live_rows(source: RowSource, rows: RowArray) -> FloatArray:
    """Return rows, of which none comes twice, as float32; without a copy where they lie side by side."""
    vectors = source.verified(rows)
    first, last = int(rows[0]), int(rows[-1])
    return as_floats(vectors[first : last + 1] if last - first + 1 == len(rows) else vectors[rows])


def as_floats(vectors: StoredArray) -> FloatArray:
    """Return vectors as contiguous float32."""
    return np.ascontiguousarray(vectors, np.float32)


# Threads


def in_parallel(work: Callable[[int], _T], numbers: Sequence[int]) -> list[_T]:
    """Return the results of some work for each number; FAISS and numpy let other threads run meanwhile."""
    parts = 2 * _threads()
    if len(numbers) < parts:
        return [work(number) for number in numbers]
    cuts = [len(numbers) * part // parts for part in range(parts + 1)]
    shares = [numbers[start:stop] for start, stop in pairwise(cuts)]
    done = _pool(os.getpid()).map(lambda share: [work(number) for number in share], shares)
    return list(chain.from_iterable(done))


def _threads() -> int:
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process (a forked one has none of its parent's)."""
    return ThreadPoolExecutor(_threads(), thread_name_prefix=f"vitembed-scan-{process}")
