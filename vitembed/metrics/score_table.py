"""All metrics of one set of scored pairs, however many: the scores are counted, not sorted.

A few scores are sorted once into `Steps`. Of many, a first reading counts the scores in 65,536 buckets; the operating
point that is asked for lies in one of them, and a further reading (three more for float64) counts that bucket alone, as
finely as floats can differ. Every answer is that of the sorted scores.

Invariant: `ScoreTable` gives what the definitions in `pairs.py` say, to the last bit, whichever way it went.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics.checks import Ints, checked_pairs, checked_scores
from vitembed.metrics.counting import (
    Chunks,
    ScoreReader,
    array_chunks,
    changed_chunks,
    counted_keys,
    key_values,
    sorted_keys,
)
from vitembed.metrics.operating_points import RocCurve, thin_curve
from vitembed.metrics.steps import Steps

SORTED = 2**16
"""Up to so many are sorted: for half as many that takes half as long as counting, for twice as many 3 times as long."""

GATHERED = 2**22
"""So many scores are held at a time where a metric needs all of them in order: 300 MB with what is made of them."""


@dataclass(frozen=True, eq=False)
class _Node:
    """Steps of a range of keys; unless `shift` is 0 they are buckets of 2**shift keys, named by their lowest key."""

    steps: Steps
    shift: int = 0


class ScoreTable:
    """Scored pairs, counted once for any number of metrics.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.

    >>> table = ScoreTable([0.8, 0.4, 0.6, 0.2], [True, True, False, False])
    >>> table.equal_error_rate(), table.roc_auc(), table.tar_at_far(0.4)
    ((0.5, 0.6), 0.75, 0.5)
    """

    def __init__(self, scores: ArrayLike, is_match: ArrayLike) -> None:
        self._reader: ScoreReader | None = None
        if _are_many(scores, is_match):
            self._count_arrays(np.asarray(scores), np.asarray(is_match))
            _check_both(self.matches, self.others)
        else:
            checked, matching = checked_pairs(scores, is_match)
            self._root = _Node(Steps.of(checked[matching], checked[~matching]))

    @classmethod
    def of_others(cls, scores: ArrayLike) -> "ScoreTable":
        """Return a table of non-matching pairs alone, of use for `threshold_at_far`; scores (P,) with P >= 1.

        Raises:
            VectorError: the scores are no finite (P,) array, or empty.
        """
        flags = np.broadcast_to(np.False_, np.shape(scores))
        table = cls.__new__(cls)
        table._reader = None
        if _are_many(scores, flags):
            table._count_arrays(np.asarray(scores), flags)
            return table
        checked = checked_scores(scores)
        if checked.size == 0:
            raise VectorError("a threshold for a false-accept rate needs scores of non-matching pairs; got none")
        table._root = _Node(Steps.of(checked[:0].copy(), checked.copy()))
        return table

    @classmethod
    def from_chunks(cls, chunks: Chunks | Iterable[tuple[ArrayLike, ArrayLike]]) -> "ScoreTable":
        """Count scores that need not fit into memory.

        Args:
            chunks: a list of (scores, is_match), or whatever else can be gone through several times; or a function
                that makes them anew: `lambda: (score(rows) for rows in slabs)`. One reading is made here, and each
                metric makes one or two more (float64: four more); `roc_auc` and `det_curve` about one for every
                4 million pairs.

        Raises:
            VectorError: scores are no finite (n,) arrays of one type.
            DataError: flags do not fit, there is one kind of pair only, or the chunks can be read only once.

        >>> halves = [([0.8, 0.6], [True, False]), ([0.4, 0.2], [True, False])]
        >>> ScoreTable.from_chunks(halves).equal_error_rate()
        (0.5, 0.6)
        """
        if isinstance(chunks, Iterator):
            raise DataError("scores are read several times; give a list of chunks, or a function that makes them")
        table = cls.__new__(cls)
        table._count(chunks if callable(chunks) else lambda: chunks)
        _check_both(table.matches, table.others)
        return table

    @classmethod
    def of_steps(cls, steps: Steps) -> "ScoreTable":
        """Return the table of a staircase, whose counts may be weights, with both kinds of pair in it."""
        _check_both(steps.all_matches, steps.all_others)
        table = cls.__new__(cls)
        table._reader, table._root = None, _Node(steps)
        return table

    def _count_arrays(self, scores: NDArray[Any], flags: NDArray[Any]) -> None:
        try:
            self._count(array_chunks(scores, flags))
        except VectorError:
            checked_scores(scores)  # the same complaint, with the position in the whole
            raise

    def _count(self, chunks: Chunks) -> None:
        self._reader = ScoreReader(chunks)
        self._root = _counted(*self._reader.count(), 0, self._reader.bits - 16)

    @property
    def matches(self) -> float:
        """How many matching pairs there are; their weight if the counts are weights."""
        return self._root.steps.all_matches

    @property
    def others(self) -> float:
        """How many non-matching pairs there are, likewise."""
        return self._root.steps.all_others

    def equal_error_rate(self) -> tuple[float, float]:
        """Return the equal error rate in [0, 1] and its threshold; see `vitembed.metrics.equal_error_rate`."""
        steps, k = self._narrow(Steps.last_with_far_above_frr)
        lower, upper = float(steps.values[k]), self._next(steps, k)
        (far, frr), (far_upper, frr_upper) = steps.rates(k), steps.rates(k + 1)
        share = (far - frr) / ((far - frr) + (frr_upper - far_upper))  # of the way from lower to upper
        threshold = lower + share * (upper - lower) if math.isfinite(upper) else lower
        return far + share * (far_upper - far), threshold

    def threshold_at_far(self, far: float) -> float:
        """Return the smallest threshold with a false-accept rate of at most `far`, in [0, 1).

        Raises:
            ConfigError: `far` is out of range.
        """
        steps, k = self._refused_last(far)
        with np.errstate(over="ignore"):  # the float after the largest is infinity
            return float(np.nextafter(steps.values[k], steps.values.dtype.type(np.inf)))

    def tar_at_far(self, far: float) -> float:
        """Return the share of matching pairs accepted at `threshold_at_far(far)`, in [0, 1].

        Raises:
            ConfigError: `far` is out of range.
        """
        steps, k = self._refused_last(far)
        return 1 - steps.rates(k + 1)[1]

    def roc_auc(self) -> float:
        """Return the chance that a matching pair outscores a non-matching one, a tie counting half, in [0, 1]."""
        above = sum(piece.ordered_pairs() for piece in self._pieces(self._root, mixed_only=True))
        return float(above / (2 * self.matches * self.others))

    def det_curve(self, points: int = 2000) -> RocCurve:
        """Return at most about `points` operating points, evenly spread where both rates have probit axes.

        Every point is one of `vitembed.metrics.roc_curve`; its ends are always there.

        Raises:
            ConfigError: fewer than 10 points.
        """
        return thin_curve(self._pieces(self._root, mixed_only=False), points)

    def _refused_last(self, far: float) -> tuple[Steps, int]:
        """Return the step of the best non-matching pair that a false-accept rate refuses."""
        rank = self.others - 1 - allowed_accepts(far, self.others)
        return self._narrow(lambda steps: steps.step_of_other(rank))

    def _narrow(self, choose: Callable[[Steps], int]) -> tuple[Steps, int]:
        """Return distinct scores and the one of them that `choose` takes, read bucket by bucket."""
        node = self._root
        while node.shift:
            node = self._inside(node, choose(node.steps))
        return node.steps, choose(node.steps)

    def _inside(self, node: _Node, k: int) -> _Node:
        """Count one bucket in buckets of its own."""
        assert self._reader is not None
        first, shift = int(node.steps.values[k]), node.shift - 16
        bucket = node.steps.part(k, k + 1)
        inner = _counted(*self._reader.count(first, shift), first, shift)
        _check_same(inner.steps, bucket)
        steps = inner.steps.within(bucket)
        return _Node(steps if shift else _with_floats(steps, self._reader), shift)

    def _next(self, steps: Steps, k: int) -> float:
        """Return the distinct score that follows step k, +inf if there is none."""
        ahead = (steps.matches[k + 1 :] > 0) | (steps.others[k + 1 :] > 0)  # a weight can be 0
        if ahead.any():
            return float(steps.values[k + 1 + int(np.argmax(ahead))])
        return math.inf if self._reader is None else self._reader.next_above(float(steps.values[k]))

    def _pieces(self, node: _Node, *, mixed_only: bool) -> Iterator[Steps]:
        """Yield all distinct scores of a node in ascending ranges; `mixed_only`: ranges of one kind stay buckets."""
        if not node.shift:
            yield node.steps
            return
        assert self._reader is not None
        for first, end in _groups(node.steps, 1 << (self._reader.bits - 1)):
            piece = node.steps.part(first, end)
            if mixed_only and not (piece.matches.any() and piece.others.any()):
                yield piece
            elif (piece.matches + piece.others).sum() > GATHERED:
                yield from self._pieces(self._inside(node, first), mixed_only=mixed_only)
            else:
                yield self._in_order(piece, 1 << node.shift)

    def _in_order(self, buckets: Steps, width: int) -> Steps:
        """Return the distinct scores of a few buckets, each of so many keys."""
        assert self._reader is not None
        first, end = int(buckets.values[0]), int(buckets.values[-1]) + width
        packed = self._reader.gather(first, end, int((buckets.matches + buckets.others).sum()))
        # Where the scores lie dense among the keys, counting takes a quarter of the time of sorting.
        names, matches, others = counted_keys(packed) if end - first <= packed.size else sorted_keys(packed)
        steps = Steps(names.astype(np.uint64) + np.uint64(first), matches, others, 0, 0, 0, 0)
        _check_same(steps, buckets)
        return _with_floats(steps.within(buckets), self._reader)


class WeightedScores:
    """Scored pairs, sorted once, that are to be judged again and again with other weights.

    That is what a bootstrap needs: `bootstrap_interval(..., weighted=True)` gives the weights.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.

    A weight of 2 is the pair twice, of 0 its absence:

    >>> pairs = WeightedScores([0.8, 0.4, 0.6, 0.2], [True, True, False, False])
    >>> pairs.table([2, 0, 1, 1]).equal_error_rate()
    (0.0, 0.8)
    """

    def __init__(self, scores: ArrayLike, is_match: ArrayLike) -> None:
        checked, matching = checked_pairs(scores, is_match)
        self._values, step = np.unique(checked, return_inverse=True)
        self._at: Ints = step.reshape(-1) + self._values.size * matching

    def table(self, weights: ArrayLike) -> ScoreTable:
        """Return the table of the pairs with weights (P,), each at least 0.

        Raises:
            DataError: the weights do not fit, or leave one kind of pair only.
        """
        weight = np.asarray(weights)
        if weight.shape != self._at.shape:
            raise DataError(f"a weight for each of {self._at.size} pairs is needed; got shape {weight.shape}")
        size = self._values.size
        counts = np.bincount(self._at, weight, minlength=2 * size)
        others, matches = counts[:size], counts[size:]
        return ScoreTable.of_steps(
            Steps(self._values, matches, others, 0, 0, matches.sum().item(), others.sum().item())
        )


def allowed_accepts(far: float, others: float) -> int:
    """Return how many of so many non-matching pairs may be accepted at a false-accept rate of at most `far`.

    Raises:
        ConfigError: `far` is outside [0, 1).

    >>> allowed_accepts(0.29, 100)
    29
    """
    if not 0 <= far < 1:
        raise ConfigError(f"a false-accept rate must be at least 0 and below 1; got {far}")
    allowed = math.floor(far * others)
    # The product is rounded: 0.29 * 100 is 28.999..., and six times the number just below 5/6 is 5.
    return allowed + ((allowed + 1) / others <= far) - (allowed / others > far)


def _are_many(scores: ArrayLike, flags: ArrayLike) -> bool:
    """Tell whether these are arrays that are better counted than copied and sorted."""
    if not (isinstance(scores, np.ndarray) and isinstance(flags, np.ndarray)):
        return False
    return scores.ndim == 1 and scores.shape == flags.shape and scores.size > SORTED


def _check_both(matches: float, others: float) -> None:
    if not (matches and others):
        raise DataError(f"pairs of both kinds are needed; got {matches:g} matching and {others:g} non-matching")


def _check_same(found: Steps, expected: Steps) -> None:
    counts = [(int(steps.matches.sum()), int(steps.others.sum())) for steps in (found, expected)]
    if counts[0] != counts[1]:
        raise changed_chunks()


def _counted(matches: Ints, others: Ints, first: int, shift: int) -> _Node:
    filled = np.flatnonzero(matches + others)
    names = np.uint64(first) + (filled.astype(np.uint64) << np.uint64(shift))
    m, o = matches[filled], others[filled]
    return _Node(Steps(names, m, o, 0, 0, int(m.sum()), int(o.sum())), shift)


def _with_floats(steps: Steps, reader: ScoreReader) -> Steps:
    values = key_values(steps.values.astype(f"u{reader.dtype.itemsize}"), reader.dtype)
    return Steps(values, steps.matches, steps.others, 0, 0, 0, 0).within(steps)


def _groups(steps: Steps, sign: int) -> Iterator[tuple[int, int]]:
    """Cut steps into ranges of one sign and of at most `GATHERED` pairs, or of a single step."""
    total = np.cumsum(steps.matches + steps.others)
    positive = int(np.searchsorted(steps.values, np.uint64(sign)))  # the key of zero
    first = 0
    while first < total.size:
        before = int(total[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(total, before + GATHERED, side="right")))
        end = min(end, positive) if first < positive else end
        yield first, end
        first = end
