"""The exact triplet loss of a batch, value and gradient, without a list of triplets.

For an anchor a and a positive p the hinge terms over all negatives n sum to

    sum of max(0, D_ap + margin - D_an)  =  #active (D_ap + margin)  -  sum of D_an over the active n,

and their gradient needs nothing but counts: how many negatives are active for (a, p), and for how many positives
(a, n) is active. Both come from comparing a row of squared distances with one threshold a positive, so the cost is two
matrix products and a few passes over B x M numbers, in place of O(B M K) stored index triples.

The anchors are the batch; positives and negatives are its references, or the batch itself. In the latter case only the
upper triangle of blocks is made: a block (i, j) serves the anchors among its rows and, by their own thresholds, those
among its columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitembed.training.losses.distances import Distances, Measured, default_block, recorded
from vitembed.training.losses.layout import Group, Layout, check_references

Mining = Literal["all", "hard", "semihard"]

# Which squared distances of a negative make a triplet active, as signed counts of "below a threshold": below the
# `reach` (D_ap + margin)^2 the hinge is positive; below the `tie` D_ap^2 the negative is as near as the positive.
MININGS: dict[str, tuple[tuple[int, str], ...]] = {
    "all": ((+1, "reach"),),
    "hard": ((+1, "tie"),),
    "semihard": ((+1, "reach"), (-1, "tie")),
}

# In the place of the squared distance of images of one class: beyond every threshold, and finite, since 0 * inf is NaN.
_FAR = 1e30

# From this many positives an anchor, a binary search of the sorted thresholds beats one comparison each (measured on a
# CPU).
SEARCH_FROM = 128


@dataclass(frozen=True)
class _Anchors:
    """A block of c anchors, each with up to K positives.

    Attributes:
        span: the sorted positions.
        distances: (K, c), to the anchor's positives; -1 where there are fewer. Ascending where a search needs it.
        bounds: a sign and the thresholds (K, c) on squared distances; -inf where there is no positive.
        active: (K, c), how many negatives have a non-zero term with this anchor and positive; filled by the sweep.
    """

    span: slice
    distances: Tensor
    bounds: tuple[tuple[int, Tensor], ...]
    active: Tensor

    def count(self, x: Tensor, side: int, counts: Tensor, mask: Tensor, *, tally: bool) -> None:
        """Add to `counts` for how many of their positives the anchors find each pair active.

        Args:
            x: squared distances; the anchors are its rows (side 0) or its columns (side 1).
            side: which.
            counts: like x; changed.
            mask: like x; scratch.
            tally: whether to add to `active`, too: once for each pair.
        """
        if len(self.distances) >= SEARCH_FROM:
            x, counts = (x, counts) if side == 0 else (x.T, counts.T)
            for sign, thresholds in self.bounds:
                below = _search(x, thresholds, counts, sign)
                if tally:
                    self.active.add_(below, alpha=sign)
            return
        for sign, thresholds in self.bounds:
            for threshold, active in zip(thresholds, self.active, strict=True):
                torch.lt(x, threshold.unsqueeze(1 - side), out=mask)
                counts.add_(mask, alpha=sign)
                if tally:
                    active.add_(mask.sum(1 - side), alpha=sign)

    def active_at(self, distances: Tensor) -> Tensor:
        """Return `active` (K, c) in the order of these distances to the positives, (K, c)."""
        if len(self.distances) < SEARCH_FROM:
            return self.active
        place = torch.searchsorted(self.distances.T.contiguous(), distances.T.contiguous())
        return self.active.gather(0, place.T)  # equal distances have equal counts


def _search(x: Tensor, thresholds: Tensor, counts: Tensor, sign: int) -> Tensor:
    """Count by binary search: x (c, n), thresholds (K, c) ascending; returns how many x are below each, (K, c)."""
    k = len(thresholds)
    index = torch.searchsorted(thresholds.T.contiguous(), x.contiguous(), right=True)  # thresholds that are <= x
    counts.add_(k - index, alpha=sign)
    histogram = x.new_zeros(len(x), k + 1).scatter_add_(1, index, x.new_ones(()).expand_as(index))
    return histogram[:, :k].cumsum(1).T


class _Sweep:
    """One pass over the blocks of distances: the sum of all hinge terms, their number, and the gradient of the sum."""

    def __init__(self, space: Distances, margin: float, mining: Mining) -> None:
        self.space, self.layout, self.margin, self.kinds = space, space.layout, margin, MININGS[mining]
        self.positives = [self._measure(group) for group in self.layout.groups]
        self.anchors = {span.start: self._anchors(span) for span in space.query_blocks()}
        self.total = space.queries.new_zeros((), dtype=space.wide)

    def run(self) -> Measured:
        """Return the mean of the non-zero hinge terms, the number of these, and the gradients of the mean."""
        for queries, references in self.space.pairs():
            self._negatives(queries, references)
        number = self.total.new_zeros(())
        for anchors in self.anchors.values():
            active = anchors.active.to(self.space.wide)
            number += active.sum()
            self.total += (active * (anchors.distances.to(self.space.wide) + self.margin)).sum()
        if any(self.space.wants):
            for group, distances in zip(self.layout.groups, self.positives, strict=True):
                self._positives(group, distances)
        scale = number.clamp_min(1).reciprocal()
        return self.total * scale, number, self.space.gradients(scale)

    def _measure(self, group: Group) -> Tensor:
        """Return the distances of a group's queries to their positives: (K, m c)."""
        positives = self.layout.positives(group)
        near = self.space.queries.new_empty(group.classes, group.asked, positives)
        if positives:
            for part, distances in self.space.within(group):
                near[part] = self.layout.without_own(distances, group, part)
        return near.flatten(0, 1).T

    def _anchors(self, span: slice) -> _Anchors:
        """Set the thresholds of a block of anchors."""
        distances = self._positive_distances(span)
        if len(distances) >= SEARCH_FROM:
            distances = distances.sort(dim=0).values
        exact = distances.to(self.space.wide)
        tie = exact.square() + self.space.tie
        reach = torch.maximum((exact + self.margin).square(), tie)
        absent = distances < 0
        thresholds = {"tie": tie, "reach": reach}
        bounds = [
            (sign, thresholds[kind].masked_fill(absent, -torch.inf).to(distances.dtype)) for sign, kind in self.kinds
        ]
        return _Anchors(span, distances, tuple(bounds), torch.zeros_like(distances))

    def _positive_distances(self, span: slice) -> Tensor:
        """Return the block's distances (K, c), K for its largest class, and -1 where a class has fewer."""
        parts = [
            (table[:, inside], inside.start + group.queries.start - span.start)
            for group, table in zip(self.layout.groups, self.positives, strict=True)
            if (inside := _inside(span, group.queries)) is not None
        ]
        distances = self.space.queries.new_full((len(parts[-1][0]), span.stop - span.start), -1.0)
        for table, offset in parts:
            distances[: len(table), offset : offset + table.shape[1]] = table
        return distances

    def _negatives(self, queries: slice, references: slice) -> None:
        """Count, weigh and add up the pairs of a block."""
        sides = [self.anchors[queries.start]]
        if self.layout.symmetric:
            sides.append(self.anchors[references.start])
        if not any(len(anchors.distances) for anchors in sides):
            return
        block = self.space.squares(queries, references, same=_FAR)
        if block is None:
            return
        x, counts, mask = block
        twice = self.space.on_diagonal(queries, references)
        counts.zero_()
        for side, anchors in enumerate(sides):
            anchors.count(x, side, counts, mask, tally=side == 0 or not twice)
        weights = counts.mul_(torch.rsqrt(x, out=mask))  # the derivative of D by D^2 is 1 / 2D
        self.total.sub_(x.mul_(weights).sum(1).sum(dtype=self.space.wide), alpha=0.5 if twice else 1.0)
        self.space.add(queries, references, weights)

    def _positives(self, group: Group, distances: Tensor) -> None:
        """Add the positives' share of the gradient, -active / distance each, for the classes of a group."""
        if len(distances) == 0:
            return
        active = [
            anchors.active_at(self._positive_distances(anchors.span))[
                : len(distances), _inside(group.queries, anchors.span)
            ]
            for anchors in self.anchors.values()
            if _inside(anchors.span, group.queries) is not None
        ]
        weights = torch.cat(active, dim=1).div_(-distances.clamp_min(self.space.floor.sqrt()))  # (K, m c)
        table = weights.T.reshape(group.classes, group.asked, -1)
        for part in group.parts(self.space.queries.shape[1]):
            self.space.add_within(group, part, self.layout.with_own(table[part], group, part))


def _inside(span: slice, frame: slice) -> slice | None:
    """Return what of a span lies in a frame, counted from the frame's start; None for nothing."""
    start, stop = max(span.start, frame.start), min(span.stop, frame.stop)
    return slice(start - frame.start, stop - frame.start) if start < stop else None


def exact_triplets(
    rows: Tensor,
    labels: Tensor,
    *,
    margin: float,
    mining: Mining,
    block: int | None = None,
    references: tuple[Tensor, Tensor] | None = None,
    own: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean of the non-zero terms max(0, D_ap + margin - D_an) over the triplets of a batch.

    Args:
        rows: (B, D) unit rows, float32 or float64: the anchors.
        labels: (B,) integers; the triplets are all (a, p, n) with labels a = p, a is not p, and a's label is not n's.
        margin: above 0, in units of distance.
        mining: "all"; "hard" for D_an <= D_ap alone; "semihard" for D_ap < D_an alone.
        block: side of the square blocks of distances; by default what suits the device's cache. Memory is
            O((B + M) D + block^2), and O(B K) for K positives an anchor.
        references: (M, D) unit rows and their (M,) labels, from which positives and negatives come; by default the
            batch. They have a gradient where they require one.
        own: where query 0 stands among the references when the batch is among them, in its order (as in a batch
            gathered from several processes): no image is then its own positive. None when it is not (a memory).

    Returns:
        The loss, and the share of all triplets whose term is not zero: two scalars. The loss is 0 when there is no
        such triplet, NaN when a row or a reference is.

    Raises:
        VectorError: the references do not fit the batch.
        ConfigError: `own` is not where the references have the batch's labels.
    """
    others, theirs = check_references(rows, references, own)
    layout = Layout.of(labels, theirs, own, rows.device)
    block = block or default_block(rows.device)

    def measure(wants: tuple[bool, bool]) -> Measured:
        return _Sweep(Distances(rows, others, layout, block, wants), margin, mining).run()

    loss, number = recorded(rows, others, measure)
    return loss, (number / max(layout.triplets, 1)).to(torch.float32)
