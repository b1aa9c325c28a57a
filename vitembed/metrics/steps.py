"""Scored pairs as a staircase: the distinct scores, and how many pairs of either kind have each.

FAR and FRR change at these scores and nowhere else, so every metric of scored pairs is read off the staircase. Part of
it (a range of scores, with how many pairs lie below) answers as well as the whole, as long as the answer lies in it;
the counts may be weights.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.metrics.checks import Floats


@dataclass(frozen=True, eq=False)
class Steps:
    """Distinct scores of a range, ascending, with the pairs that have them.

    Attributes:
        values: (T,) strictly ascending.
        matches: (T,) how many matching pairs score each value; whole numbers, or weights.
        others: (T,) how many non-matching pairs do.
        matches_below: how many matching pairs score below the range.
        others_below: how many non-matching pairs do.
        all_matches: how many matching pairs there are in all, whatever their range.
        all_others: how many non-matching pairs there are in all.
    """

    values: NDArray[Any]
    matches: NDArray[Any]
    others: NDArray[Any]
    matches_below: float
    others_below: float
    all_matches: float
    all_others: float

    @staticmethod
    def of(matches: Floats, others: Floats) -> "Steps":
        """Return the whole staircase of two arrays of scores; both are sorted in place.

        >>> steps = Steps.of(np.array([0.9, 0.4]), np.array([0.4]))
        >>> steps.values.tolist(), steps.matches.tolist(), steps.others.tolist()
        ([0.4, 0.9], [1, 1], [1, 0])
        """
        matches.sort()
        others.sort()
        both = np.concatenate([matches, others])
        both.sort(kind="stable")  # merges two sorted runs in one pass
        values = both[np.append(True, both[1:] != both[:-1])] if both.size else both
        counts = [np.diff(np.searchsorted(side, values), append=side.size) for side in (matches, others)]
        return Steps(values, counts[0], counts[1], 0, 0, matches.size, others.size)

    def within(self, whole: "Steps") -> "Steps":
        """Return this staircase as the part of `whole` that it is: below and beyond it lie the pairs of `whole`."""
        return Steps(
            self.values,
            self.matches,
            self.others,
            whole.matches_below,
            whole.others_below,
            whole.all_matches,
            whole.all_others,
        )

    def part(self, first: int, end: int) -> "Steps":
        """Return steps `first` to `end` (excluded)."""
        cut = slice(first, end)
        below = self.missed[first].item(), self.refused[first].item()
        return Steps(self.values[cut], self.matches[cut], self.others[cut], *below, self.all_matches, self.all_others)

    @cached_property
    def matches_upto(self) -> NDArray[Any]:
        """(T,) how many matching pairs score each value or less."""
        upto: NDArray[Any] = np.cumsum(self.matches)
        upto += self.matches_below
        return upto

    @cached_property
    def others_upto(self) -> NDArray[Any]:
        """(T,) how many non-matching pairs score each value or less."""
        upto: NDArray[Any] = np.cumsum(self.others)
        upto += self.others_below
        return upto

    @property
    def missed(self) -> NDArray[Any]:
        """(T,) how many matching pairs score below each value."""
        below: NDArray[Any] = self.matches_upto - self.matches
        return below

    @property
    def refused(self) -> NDArray[Any]:
        """(T,) how many non-matching pairs score below each value."""
        below: NDArray[Any] = self.others_upto - self.others
        return below

    @property
    def far(self) -> NDArray[np.float64]:
        """(T,) false-accept rate with each value as the threshold."""
        rate: NDArray[np.float64] = (self.all_others - self.refused) / self.all_others
        return rate

    @property
    def frr(self) -> NDArray[np.float64]:
        """(T,) false-reject rate with each value as the threshold."""
        rate: NDArray[np.float64] = self.missed / self.all_matches
        return rate

    def rates(self, k: int) -> tuple[float, float]:
        """Return FAR and FRR with step k as the threshold, or with the score that follows the last step (k = T)."""
        refused = self.others_upto[k - 1].item() if k else self.others_below
        missed = self.matches_upto[k - 1].item() if k else self.matches_below
        return (self.all_others - refused) / self.all_others, missed / self.all_matches

    def last_with_far_above_frr(self) -> int:
        """Return the last step whose FAR is at least its FRR; there must be one."""

        def below(k: int) -> bool:
            far, frr = self.rates(k)
            return far < frr

        # FAR - FRR never rises along the steps, so that those which qualify come first.
        return bisect_left(range(self.values.size), True, key=below) - 1

    def step_of_other(self, rank: float) -> int:
        """Return the step of the non-matching pair with this rank, counted from 0 at the lowest score of all."""
        return int(np.searchsorted(self.others_upto, rank, side="right"))

    def ordered_pairs(self) -> float:
        """Return twice the number of (match, other) with the match of this range above the other, a tie counting once.

        The others below the range count too. Whole numbers while the counts are.
        """
        total: float = np.sum(self.matches * (2 * self.refused + self.others)).item()
        return total
