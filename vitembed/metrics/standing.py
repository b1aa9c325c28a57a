"""The ranks of a query's matches, from the scores of others in tiles.

A match's rank is its place among the matches of its query plus the number of others that score at least as high; it
only grows as more is seen. So where ranks matter up to a depth only, `Standing` keeps that many of the best others of
each query, and of a tile looks at nothing that scores below the lowest match still within the depth. `FullStanding`
follows all matches to the end.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vitembed.metrics.checks import Floats, Ints
from vitembed.metrics.ranks import reaching

# The rank of a match of which it is only known that it lies beyond the depth.
BEYOND = int(np.iinfo(np.int32).max)

# So many scores wait at most until they are counted.
WAITING = 2**22

# Queries whose others are sorted together: few enough that these have about equally many.
_TOGETHER = 128

# Up to so many matches it is faster to compare all others with each than to sort the others.
_FEW = 32


class Standing:
    """How many others outrank the matches of a block of queries, up to a depth.

    Args:
        matches: (b, R) scores, best first, -inf where a query has fewer.
        depth: the last rank that matters; at 0 only the first match is followed, as it always is.
    """

    def __init__(self, matches: Floats, depth: int) -> None:
        self._matches = matches[:, : max(depth, 1)]
        self._best = np.full((len(matches), depth), -np.inf, dtype=matches.dtype)  # others, best last
        self._ahead = np.zeros(len(matches), dtype=np.int64)  # others that score as high as the first match
        self._waiting: list[tuple[Ints, Ints, Floats]] = []  # queries, how many scores of each, scores
        self._waits = self._seen = 0
        self._due = depth
        self._set_floor()

    def see(self, tile: Floats) -> None:
        """Take the scores (b, c) of others into account, -inf for what is none."""
        rows, scores, flags, found = reaching(tile, self._floor)
        lost = self._alive[rows] == 0  # of these only the first match is still followed
        self._ahead[rows[lost]] += found[lost]
        if lost.any():
            rows, scores, flags, found = rows[~lost], scores[~lost], flags[~lost], found[~lost]
        if rows.size:
            self._waiting.append((rows, found, scores[flags]))
            self._waits += int(found.sum())
        self._seen += tile.shape[1]
        # The floor falls behind as more is seen, and merging costs something for each query: at each doubling.
        if self._seen >= self._due or self._waits > WAITING:
            self._merge()
            self._due = 2 * self._seen

    def first_ranks(self) -> Ints:
        """Return the rank (b,) of the best match of each query, which is known at any depth."""
        self._merge()
        return 1 + self._ahead

    def ranks(self) -> NDArray[np.int32]:
        """Return the ranks (b, R) of the matches, best first; `BEYOND` for those beyond the depth."""
        self._merge()
        ranks = np.full(self._matches.shape, BEYOND, dtype=np.int32)
        place = 1 + self._best.shape[1] + np.arange(self._matches.shape[1])
        for row in np.flatnonzero(self._alive):
            alive = self._alive[row]
            ranks[row, :alive] = place[:alive] - np.searchsorted(self._best[row], self._matches[row, :alive])
        return ranks

    def _merge(self) -> None:
        for rows, scores in _padded(self._waiting, len(self._matches)):
            others = np.concatenate([self._best[rows], scores], axis=1)
            others.sort(axis=1)
            # All that scored as high as a first match within the depth is still here.
            self._ahead[rows] = np.count_nonzero(others >= self._matches[rows, :1], axis=1)
            self._best[rows] = others[:, others.shape[1] - self._best.shape[1] :]
        self._waiting, self._waits = [], 0
        self._set_floor()

    def _set_floor(self) -> None:
        """Set how many matches may be within the depth, and the score (b, 1) that an other needs to matter to them."""
        # The j-th match is beyond the depth when all but j - 1 of the best others score as high.
        others = self._best[:, : self._matches.shape[1]]
        self._alive = np.count_nonzero(others < self._matches[:, : others.shape[1]], axis=1)
        lowest = np.maximum(self._alive - 1, 0)[:, None]
        self._floor = np.take_along_axis(self._matches, lowest, axis=1)


class FullStanding:
    """How many others outrank each match of a block of queries, however many.

    Args:
        matches: (b, R) scores, best first, -inf where a query has fewer.
        counts: (b,) how many matches each query has, at least 1.
    """

    def __init__(self, matches: Floats, counts: Ints) -> None:
        self._matches, self._counts = matches, counts
        self._ahead = np.zeros(matches.shape, dtype=np.int32)
        self._floor = np.take_along_axis(matches, counts[:, None] - 1, axis=1)
        self._waiting: defaultdict[int, list[Floats]] = defaultdict(list)
        self._waits = 0

    def see(self, tile: Floats) -> None:
        """Take the scores (b, c) of others into account, -inf for what is none."""
        rows, scores, flags, found = reaching(tile, self._floor)
        waiting = scores[flags]  # query by query
        ends = np.cumsum(found)
        for row, first, last in zip(rows.tolist(), (ends - found).tolist(), ends.tolist(), strict=True):
            self._waiting[row].append(waiting[first:last])
        self._waits += waiting.size
        if self._waits > WAITING:
            self._count()

    def first_ranks(self) -> Ints:
        """Return the rank (b,) of the best match of each query."""
        self._count()
        return 1 + self._ahead[:, 0].astype(np.int64)

    def ranks(self) -> NDArray[np.int32]:
        """Return the ranks (b, R) of the matches, best first; `BEYOND` where a query has fewer."""
        self._count()
        place = np.arange(1, self._matches.shape[1] + 1, dtype=np.int32)
        ranks: NDArray[np.int32] = np.where(place <= self._counts[:, None], self._ahead + place, np.int32(BEYOND))
        return ranks

    def _count(self) -> None:
        for row, parts in self._waiting.items():
            scores, matches = np.concatenate(parts), self._matches[row, : self._counts[row]]
            if matches.size <= _FEW:
                self._ahead[row, : matches.size] += [np.count_nonzero(scores >= match) for match in matches]
            else:
                scores.sort()
                self._ahead[row, : matches.size] += (scores.size - np.searchsorted(scores, matches)).astype(np.int32)
        self._waiting.clear()
        self._waits = 0


def _padded(waiting: list[tuple[Ints, Ints, Floats]], queries: int) -> Iterator[tuple[Ints, Floats]]:
    """Yield queries (r,) and their waiting scores (r, w), -inf where one has fewer, in groups of similar numbers."""
    if not waiting:
        return
    rows = np.concatenate([np.repeat(rows, found) for rows, found, _ in waiting])
    scores = np.concatenate([scores for _, _, scores in waiting])
    if len(waiting) > 1:
        order = np.argsort(rows, kind="stable")
        scores = scores[order]
    found = np.bincount(rows, minlength=queries)
    first = np.cumsum(found) - found
    by_number = np.argsort(found, kind="stable")
    by_number = by_number[np.searchsorted(found[by_number], 1) :]
    for start in range(0, by_number.size, _TOGETHER):
        group = by_number[start : start + _TOGETHER]
        column = np.arange(found[group[-1]])
        at = np.minimum(first[group, None] + column, scores.size - 1)
        yield group, np.where(column < found[group, None], scores[at], scores.dtype.type(-np.inf))
