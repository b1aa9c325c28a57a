"""The vote of the k nearest images, whatever their class, in the search of `ranks.py`."""

import numpy as np

from vitembed.metrics.checks import Bools, Floats, Ints
from vitembed.metrics.ranks import reaching


class Votes:
    """The k nearest items of each query of a block.

    Of equal scores others come first, in the order of the items; matches are kept apart until the end.

    Args:
        matches: (b, R) scores of the matches, best first, -inf where a query has fewer.
        k: how many items vote.
    """

    def __init__(self, matches: Floats, k: int) -> None:
        self._k, self._matches = k, matches[:, :k]
        self._scores = np.full((len(matches), k), -np.inf, dtype=matches.dtype)  # the best others, best first
        self._columns = np.zeros((len(matches), k), dtype=np.int64)

    def see(self, tile: Floats, first: int) -> None:
        """Take the scores (b, c) of others into account, the items from `first` on; -inf for what is none."""
        k, width = self._k, tile.shape[1]
        floor = self._floor(first)
        if width > k and not np.all(np.isfinite(self._scores)):  # at first all would be good enough
            floor = np.maximum(floor, np.partition(tile, width - k, axis=1)[:, width - k, None])
        rows, tile, flags, found = reaching(tile, floor)
        if rows.size == 0:
            return
        at = np.flatnonzero(flags)
        owner = np.concatenate([np.repeat(np.arange(rows.size), k), np.repeat(np.arange(rows.size), found)])
        scores = np.concatenate([self._scores[rows].ravel(), tile.reshape(-1)[at]])
        columns = np.concatenate([self._columns[rows].ravel(), first + at % width])
        order = np.lexsort((columns, -scores, owner))
        starts = np.cumsum(k + found) - (k + found)
        best = order[starts[:, None] + np.arange(k)]  # (r, k)
        self._scores[rows], self._columns[rows] = scores[best], columns[best]

    def right(self, codes: Ints, wanted: Ints) -> Bools:
        """Return for each query whether its class wins the vote.

        Args:
            codes: (M,) classes of the items.
            wanted: (b,) classes of the queries.
        """
        scores = np.concatenate([self._scores, self._matches], axis=1)
        classes = np.concatenate([codes[self._columns], np.broadcast_to(wanted[:, None], self._matches.shape)], axis=1)
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        scores, classes = (np.take_along_axis(values, nearest, axis=1) for values in (scores, classes))
        return _winners(scores.astype(np.float64), classes, wanted, int(codes.max()) + 1)

    def _floor(self, first: int) -> Floats:
        """Return the score (b, 1) that an item from `first` on needs to be among the k nearest."""
        last = self._scores[:, -1:]
        better = np.nextafter(last, np.array(np.inf, dtype=last.dtype))
        # As much is enough only for an item before the last of those that are kept.
        floor = np.where((self._columns[:, -1:] > first) & (last > -np.inf), last, better)
        return np.maximum(floor, self._matches[:, -1:]) if self._matches.shape[1] == self._k else floor


def _winners(scores: Floats, classes: Ints, wanted: Ints, count: int) -> Bools:
    """Return whether the class wanted (b,) has most of the votes (b, k), or as many and a larger sum of scores."""
    cast = scores > -np.inf  # there may be fewer than k items
    ballots = (np.arange(len(wanted))[:, None] * count + classes)[cast]
    parties, party = np.unique(ballots, return_inverse=True)
    votes = np.bincount(party)
    sums = np.bincount(party, weights=scores[cast])
    own = np.searchsorted(parties, np.arange(len(wanted)) * count + wanted)
    own = np.minimum(own, parties.size - 1)
    present = parties[own] == np.arange(len(wanted)) * count + wanted
    query = parties // count
    rival = own[query]
    beaten = (votes > votes[rival]) | ((votes == votes[rival]) & (sums >= sums[rival]))
    lost = np.bincount(query[beaten & (parties != parties[rival])], minlength=len(wanted)) > 0
    won: Bools = present & ~lost
    return won
