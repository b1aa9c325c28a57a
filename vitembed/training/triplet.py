"""The exact triplet loss of a batch, value and gradient, without a list of triplets.

For an anchor a and a positive p the hinge terms over all negatives n sum to

    sum of max(0, D_ap + margin - D_an)  =  #active (D_ap + margin)  -  sum of D_an over the active n,

and their gradient needs nothing but counts: how many negatives are active for (a, p), and for how many positives
(a, n) is active. Both come from comparing a row of squared distances with one threshold a positive, so the cost is two
matrix products and a few passes over B x B numbers, in place of O(B^2 K) stored index triples.

What holds throughout:

- Images are sorted by (class size, class), so that a class is a slice and a block of anchors has classes of like size.
- The B x B distances exist one square block at a time, small enough for the cache, and only for the upper triangle: a
  block (i, j) serves the anchors among its rows and, by their own thresholds, those among its columns.
- Rows are centred first. Distances do not change, and stay precise when all embeddings are nearly equal.
- The gradient is made with the value, in one sweep, because by then every block is in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

# A positive that is not there, in the tables of classes smaller than the block's largest.
_ABSENT = -1.0

# From this many positives an anchor, a binary search of the sorted thresholds beats one comparison each (measured).
_SEARCH_FROM = 48


@dataclass(frozen=True)
class ClassLayout:
    """The images of a batch sorted by class size, then class: every class is a slice.

    Attributes:
        order: (B,) int64, the batch's row at each sorted position.
        classes: (B,) int64, a number for the class at each sorted position.
        starts: the first sorted position of the class at each position.
        sizes: the number of images of the class at each position.
        triplets: how many (anchor, positive, negative) there are.
    """

    order: Tensor
    classes: Tensor
    starts: list[int]
    sizes: list[int]
    triplets: int

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "ClassLayout":
        """Sort labels (B,) of an integer type; labels that lie on the CPU cost the device no synchronisation."""
        _, classes, counts = torch.unique(labels.detach().cpu(), return_inverse=True, return_counts=True)
        sizes = counts[classes]
        order = torch.argsort(sizes * len(counts) + classes)
        classes, sizes = classes[order], sizes[order]
        _, runs = torch.unique_consecutive(classes, return_counts=True)
        starts = torch.repeat_interleave(runs.cumsum(0) - runs, runs)
        triplets = int((sizes * (sizes - 1) // sizes.clamp_min(1) * (len(order) - sizes)).sum())
        return cls(order.to(device), classes.to(device), starts.tolist(), sizes.tolist(), triplets)

    def strips(self, start: int, stop: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Cut the positions start..stop into slices of `width`, each with the slice that its classes cover."""
        for a in range(start, stop, width):
            b = min(a + width, stop)
            yield slice(a, b), slice(self.starts[a], self.starts[b - 1] + self.sizes[b - 1])


@dataclass(frozen=True)
class _Anchors:
    """A block of c anchors, each with up to K positives.

    Attributes:
        start: first sorted position.
        stop: one past the last.
        distances: (K, c), to the anchor's positives; ascending where a search will need it; _ABSENT where none is.
        positives: (K, c) int32, their sorted positions, the anchor's own where there is none.
        bounds: a sign and the thresholds (K, c) on squared distances; -inf where there is no positive.
        active: (K, c), how many negatives have a non-zero term with this anchor and positive; filled by the sweep.
    """

    start: int
    stop: int
    distances: Tensor
    positives: Tensor
    bounds: tuple[tuple[int, Tensor], ...]
    active: Tensor

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)

    def count(self, x: Tensor, side: int, counts: Tensor, mask: Tensor, *, tally: bool) -> None:
        """Add to `counts` for how many of their positives the anchors find each pair active.

        Args:
            x: squared distances; the anchors are its rows (side 0) or its columns (side 1).
            side: which.
            counts: like x; changed.
            mask: like x; scratch.
            tally: whether to add to `active`, too: once for each pair.
        """
        search = len(self.distances) >= _SEARCH_FROM
        for sign, thresholds in self.bounds:
            if search:
                below = _search(x if side == 0 else x.T, thresholds, counts if side == 0 else counts.T, sign)
                if tally:
                    self.active.add_(below, alpha=sign)
                continue
            for threshold, active in zip(thresholds, self.active, strict=True):
                torch.lt(x, threshold.unsqueeze(1 - side), out=mask)
                counts.add_(mask, alpha=sign)
                if tally:
                    active.add_(mask.sum(1 - side), alpha=sign)


def _search(x: Tensor, thresholds: Tensor, counts: Tensor, sign: int) -> Tensor:
    """Count by binary search: x (c, n), thresholds (K, c) ascending; returns how many x are below each, (K, c)."""
    k = len(thresholds)
    index = torch.searchsorted(thresholds.T.contiguous(), x.contiguous(), right=True)  # thresholds that are <= x
    counts.add_(k - index, alpha=sign)
    histogram = x.new_zeros(len(x), k + 1).scatter_add_(1, index, x.new_ones(()).expand_as(index))
    return histogram[:, :k].cumsum(1).T


class _Sweep:
    """One pass over the pairs of blocks: the sum of all hinge terms, their number, and the gradient of the sum."""

    def __init__(
        self, rows: Tensor, layout: ClassLayout, margin: float, mining: Mining, block: int, *, with_grad: bool
    ) -> None:
        self.layout, self.margin, self.with_grad = layout, margin, with_grad
        self.rows = rows - rows.mean(0)  # (B, D)
        self.norms = self.rows.square().sum(1)  # (B,) squared
        self.wide = torch.float32 if rows.device.type == "mps" else torch.float64
        self.strip = 64 if rows.device.type == "cpu" else 256
        # Squared distances of unit rows come with errors of a few eps: nearer to each other than that, they are equal.
        self.slack = 4 * torch.finfo(rows.dtype).eps
        self.blocks = [
            self._anchors(start, min(start + block, len(rows)), MININGS[mining]) for start in range(0, len(rows), block)
        ]
        self.total = rows.new_zeros((), dtype=self.wide)
        # With pair weights W the gradient is W rows - (W 1) rows: pull and mass are its two products.
        self.pull = torch.zeros_like(self.rows) if with_grad else self.rows
        self.mass = torch.zeros_like(self.norms)
        self.buffers = [rows.new_empty(min(block, len(rows)) ** 2) for _ in range(3)]

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the hinge terms, the number of non-zero ones, and the gradient (B, D), sorted."""
        for i, left in enumerate(self.blocks):
            for right in self.blocks[i:]:
                self._negatives(left, right)
        number = self.total.new_zeros(())
        for anchors in self.blocks:
            active = anchors.active.to(self.wide)
            number += active.sum()
            self.total += active.mul_(anchors.distances + self.margin).sum()
            if self.with_grad:
                self._positives(anchors)
        return self.total, number, self.pull - self.rows * self.mass[:, None]

    def _anchors(self, start: int, stop: int, kinds: tuple[tuple[int, str], ...]) -> _Anchors:
        """Measure the anchors' positives and set their thresholds."""
        most = self.layout.sizes[stop - 1] - 1  # sizes ascend
        distances = self.norms.new_full((most, stop - start), _ABSENT)
        positives = torch.arange(start, stop, device=self.rows.device, dtype=torch.int32).repeat(most, 1)
        for strip, span in self.layout.strips(start, stop, self.strip):
            self._measure(strip, span, distances[:, strip.start - start :], positives[:, strip.start - start :])
        if most >= _SEARCH_FROM:
            distances, order = distances.sort(dim=0)
            positives = positives.gather(0, order)
        exact = distances.to(self.wide)
        tie = exact.square() + self.slack
        thresholds = {"tie": tie, "reach": torch.maximum((exact + self.margin).square(), tie)}
        for name, values in thresholds.items():
            thresholds[name] = values.masked_fill_(distances < 0, -torch.inf).to(self.rows.dtype)
        bounds = tuple((sign, thresholds[kind]) for sign, kind in kinds)
        return _Anchors(start, stop, distances, positives, bounds, torch.zeros_like(distances))

    def _measure(self, strip: slice, span: slice, distances: Tensor, positives: Tensor) -> None:
        """Fill in the leading columns of the tables (K, c) for the anchors of a strip, whose classes cover `span`."""
        most, width = self.layout.sizes[strip.stop - 1] - 1, strip.stop - strip.start
        if most == 0:
            return
        device = self.rows.device
        anchors = torch.arange(strip.start, strip.stop, device=device)
        starts = torch.tensor(self.layout.starts[strip], device=device)
        sizes = torch.tensor(self.layout.sizes[strip], device=device)
        slots = torch.arange(most, device=device)[:, None]
        mates = starts + slots
        mates += mates >= anchors  # step over the anchor itself
        mates = torch.where(slots < sizes - 1, mates, anchors)  # (most, width)
        near = torch.cdist(self.rows[strip].to(self.wide), self.rows[span].to(self.wide)).to(self.rows.dtype)
        found = near.T.gather(0, mates - span.start)
        distances[:most, :width] = torch.where(mates == anchors, _ABSENT, found)
        positives[:most, :width] = mates

    def _negatives(self, left: _Anchors, right: _Anchors) -> None:
        """Count, weigh and add up the pairs of two blocks of anchors, each the other's negatives."""
        starts = self.layout.starts
        one_class = starts[right.stop - 1] <= left.start
        if one_class or len(left.distances) + len(right.distances) == 0:
            return
        rows, columns = self.rows[left.span], self.rows[right.span]
        x, counts, mask = (b[: len(rows) * len(columns)].view(len(rows), -1) for b in self.buffers)
        torch.add(self.norms[left.span, None], self.norms[right.span], out=x)
        x.addmm_(rows, columns.T, alpha=-2).clamp_min_(self.slack)
        if starts[right.start] < left.stop:
            classes = self.layout.classes
            x.masked_fill_(classes[left.span, None] == classes[right.span], _FAR)
        counts.zero_()
        left.count(x, 0, counts, mask, tally=True)
        right.count(x, 1, counts, mask, tally=right is not left)
        weights = counts.mul_(torch.rsqrt(x, out=mask))  # a distance's derivative by its square, times 2
        shortfall = x.mul_(weights).sum(1).sum(dtype=self.wide)
        # A block on the diagonal holds each pair of images twice, so everything is in it already.
        self.total.sub_(shortfall, alpha=0.5 if right is left else 1.0)
        if self.with_grad:
            self._spread(left.span, right.span, weights, both=right is not left)

    def _positives(self, anchors: _Anchors) -> None:
        """Add the positives' share of the gradient: a weight of -active / distance each."""
        weights = anchors.active / -anchors.distances.clamp_min(self.slack**0.5)  # (K, c)
        for strip, span in self.layout.strips(anchors.start, anchors.stop, self.strip):
            local = slice(strip.start - anchors.start, strip.stop - anchors.start)
            most = self.layout.sizes[strip.stop - 1] - 1
            if most == 0:
                continue
            dense = weights.new_zeros(strip.stop - strip.start, span.stop - span.start)
            # A sorted table has the absent positives first: their weight is 0, so all of it is scattered.
            index = anchors.positives[:, local].T.long() - span.start
            dense.scatter_add_(1, index, weights[:, local].T)
            self._spread(strip, span, dense, both=True)

    def _spread(self, left: slice, right: slice, weights: Tensor, *, both: bool) -> None:
        """Add weights (rows of left, rows of right) to the products, for one side or both sides of each pair."""
        self.pull[left].addmm_(weights, self.rows[right])
        self.mass[left].add_(weights.sum(1))
        if both:
            self.pull[right].addmm_(weights.T, self.rows[left])
            self.mass[right].add_(weights.sum(0))


class _ExactTriplets(torch.autograd.Function):
    """The mean of the non-zero hinge terms and the number of these; the gradient waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, layout: ClassLayout, margin: float, mining: Mining, block: int
    ) -> tuple[Tensor, Tensor]:
        with_grad = bool(ctx.needs_input_grad[0])
        ordered = rows.index_select(0, layout.order)
        total, number, grad = _Sweep(ordered, layout, margin, mining, block, with_grad=with_grad).run()
        scale = number.clamp_min(1).reciprocal()
        if with_grad:
            unsorted = torch.empty_like(grad).index_copy_(0, layout.order, grad.mul_(scale))
            ctx.save_for_backward(unsorted)
        ctx.mark_non_differentiable(number)
        # Comparisons with NaN are false, and nothing would be active: a broken network must not look like a solved task.
        poison = rows.sum(dtype=scale.dtype) * 0
        return (total * scale + poison).to(rows.dtype), number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None


def exact_triplets(
    rows: Tensor, labels: Tensor, *, margin: float, mining: Mining, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean of the non-zero terms max(0, D_ap + margin - D_an) over the triplets of a batch.

    Args:
        rows: (B, D) unit rows, float32 or float64.
        labels: (B,) integers; the triplets are all (a, p, n) with labels a = p, a is not p, and a's label is not n's.
        margin: above 0, in units of distance.
        mining: "all"; "hard" for D_an <= D_ap alone; "semihard" for D_ap < D_an alone.
        block: side of the square blocks of distances; by default what suits the device's cache. Memory is
            O(B D + block^2), and O(B K) for K images a class.

    Returns:
        The loss, and the share of all triplets whose term is not zero: two scalars. The loss is 0 when there is no
        such triplet, NaN when a row is.
    """
    if block is None:
        block = 512 if rows.device.type == "cpu" else 4096
    layout = ClassLayout.of(labels, rows.device)
    loss, number = _ExactTriplets.apply(rows, layout, margin, mining, block)
    return loss, (number / max(layout.triplets, 1)).to(torch.float32)
