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
- The gradient is made with the value, while a block is in the cache: a block is never made twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitembed.errors import ConfigError

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

# From this many positives an anchor, a binary search of the sorted thresholds beats one comparison each (measured).
SEARCH_FROM = 48


@dataclass(frozen=True)
class ClassLayout:
    """The images of a batch sorted by class size, then class: every class is a slice, and so are those of one size.

    Attributes:
        order: (B,) int64, the batch's row at each sorted position.
        classes: (B,) int64, a number for the class at each sorted position.
        groups: (size, start, stop) of the slice that the classes of each size fill; sizes ascend.
    """

    order: Tensor
    classes: Tensor
    groups: list[tuple[int, int, int]]

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "ClassLayout":
        """Sort labels (B,) of an integer type; labels that lie on the CPU cost the device no synchronisation."""
        _, classes, counts = torch.unique(labels.detach().cpu(), return_inverse=True, return_counts=True)
        sizes = counts[classes]
        order = torch.argsort(sizes * (len(counts) + 1) + classes)
        distinct, images = torch.unique_consecutive(sizes[order], return_counts=True)
        stops = images.cumsum(0)
        groups = list(zip(distinct.tolist(), (stops - images).tolist(), stops.tolist(), strict=True))
        return cls(order.to(device), classes[order].to(device), groups)

    @property
    def triplets(self) -> int:
        """How many triplets (anchor, positive, negative) there are."""
        return sum((stop - start) * (size - 1) * (len(self.order) - size) for size, start, stop in self.groups)

    def class_start(self, position: int) -> int:
        """Return where the class of the image at a sorted position begins."""
        size, start, _ = next(group for group in self.groups if position < group[2])
        return start + (position - start) // size * size


@dataclass(frozen=True)
class _Anchors:
    """A block of c anchors, each with up to K positives.

    Attributes:
        start: first sorted position.
        stop: one past the last.
        distances: (K, c), to the anchor's positives; -1 where there are fewer. Ascending where a search needs it.
        bounds: a sign and the thresholds (K, c) on squared distances; -inf where there is no positive.
        active: (K, c), how many negatives have a non-zero term with this anchor and positive; filled by the sweep.
    """

    start: int
    stop: int
    distances: Tensor
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
    """One pass over the pairs of blocks: the sum of all hinge terms, their number, and the gradient of the sum."""

    def __init__(
        self, rows: Tensor, layout: ClassLayout, margin: float, mining: Mining, block: int, *, with_grad: bool
    ) -> None:
        self.layout, self.margin, self.with_grad = layout, margin, with_grad
        self.rows = rows - rows.mean(0)  # (B, D)
        self.norms = self.rows.square().sum(1)  # (B,) squared
        self.wide = torch.float32 if rows.device.type == "mps" else torch.float64
        self.eps = torch.finfo(rows.dtype).eps
        # Squared distances that are nearer to each other than their rounding errors (measured) are equal.
        self.slack = 1e-12 if rows.dtype == torch.float64 else 4 * self.eps
        self.positives = [self._measure(*group) for group in layout.groups]
        starts = range(0, len(rows), block)
        self.blocks = [self._anchors(start, min(start + block, len(rows)), MININGS[mining]) for start in starts]
        self.total = rows.new_zeros((), dtype=self.wide)
        # With pair weights W the gradient is W rows - (W 1) rows: pull and mass are its two products.
        self.pull = torch.zeros_like(self.rows)
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
            self.total += (active * (anchors.distances.to(self.wide) + self.margin)).sum()
        if self.with_grad:
            for group, distances in zip(self.layout.groups, self.positives, strict=True):
                self._positives(*group, distances)
        return self.total, number, self.pull.sub_(self.rows * self.mass[:, None])

    def _measure(self, size: int, start: int, stop: int) -> Tensor:
        """Return the distances of the images start..stop, of classes of one size, to their positives: (size - 1, n)."""
        near = self.rows.new_empty((stop - start) // size, size, size)
        classes = self.rows[start:stop].view(-1, size, self.rows.shape[1])
        for part in _parts(len(classes), size):
            wide = classes[part].to(self.wide)  # a positive is often so near that float32 would lose half of its digits
            near[part] = torch.cdist(wide, wide)
        return _without_diagonal(near).reshape(stop - start, size - 1).T

    def _anchors(self, start: int, stop: int, kinds: tuple[tuple[int, str], ...]) -> _Anchors:
        """Set the thresholds of a block of anchors."""
        distances = self._positive_distances(start, stop)
        if len(distances) >= SEARCH_FROM:
            distances = distances.sort(dim=0).values
        exact = distances.to(self.wide)
        tie = exact.square() + self.slack
        reach = torch.maximum((exact + self.margin).square(), tie)
        absent = distances < 0
        thresholds = {"tie": tie, "reach": reach}
        bounds = [(sign, thresholds[kind].masked_fill(absent, -torch.inf).to(self.rows.dtype)) for sign, kind in kinds]
        return _Anchors(start, stop, distances, tuple(bounds), torch.zeros_like(distances))

    def _positive_distances(self, start: int, stop: int) -> Tensor:
        """Return the block's distances (K, c), K for its largest class, and -1 where a class has fewer."""
        parts = [
            (table[:, max(start - first, 0) : stop - first], max(first - start, 0))
            for (_, first, last), table in zip(self.layout.groups, self.positives, strict=True)
            if first < stop and start < last
        ]
        distances = self.rows.new_full((len(parts[-1][0]), stop - start), -1.0)
        for table, offset in parts:
            distances[: len(table), offset : offset + table.shape[1]] = table
        return distances

    def _negatives(self, left: _Anchors, right: _Anchors) -> None:
        """Count, weigh and add up the pairs of two blocks of anchors, each the other's negatives."""
        one_class = self.layout.class_start(right.stop - 1) <= left.start
        if one_class or len(left.distances) + len(right.distances) == 0:
            return
        rows, columns = self.rows[left.span], self.rows[right.span]
        x, counts, mask = (buffer[: len(rows) * len(columns)].view(len(rows), -1) for buffer in self.buffers)
        torch.add(self.norms[left.span, None], self.norms[right.span], out=x)
        x.addmm_(rows, columns.T, alpha=-2).clamp_min_(self.eps)
        if self.layout.class_start(right.start) < left.stop:
            classes = self.layout.classes
            x.masked_fill_(classes[left.span, None] == classes[right.span], _FAR)
        counts.zero_()
        left.count(x, 0, counts, mask, tally=True)
        right.count(x, 1, counts, mask, tally=right is not left)
        weights = counts.mul_(torch.rsqrt(x, out=mask))  # the derivative of D by D^2 is 1 / 2D
        shortfall = x.mul_(weights).sum(1).sum(dtype=self.wide)
        # A block on the diagonal holds each pair of images twice, so everything is in it already.
        self.total.sub_(shortfall, alpha=0.5 if right is left else 1.0)
        if self.with_grad:
            self.pull[left.span].addmm_(weights, columns)
            self.mass[left.span].add_(weights.sum(1))
            if right is not left:
                self.pull[right.span].addmm_(weights.T, rows)
                self.mass[right.span].add_(weights.sum(0))

    def _positives(self, size: int, start: int, stop: int, distances: Tensor) -> None:
        """Add the positives' share of the gradient, -active / distance each, for classes of one size."""
        if size == 1:
            return
        active = [
            block.active_at(self._positive_distances(block.start, block.stop))[
                : size - 1, max(start - block.start, 0) : stop - block.start
            ]
            for block in self.blocks
            if block.start < stop and start < block.stop
        ]
        weights = torch.cat(active, dim=1).div_(-distances.clamp_min(self.eps**0.5))  # (size - 1, n)
        square = _with_diagonal(weights.T.reshape(-1, size, size - 1))
        classes, pull, mass = (
            tensor[start:stop].view(-1, size, *tensor.shape[1:]) for tensor in (self.rows, self.pull, self.mass)
        )
        for part in _parts(len(square), size):
            both = square[part] + square[part].mT  # an image is a positive of its own positives
            pull[part].baddbmm_(both, classes[part])
            mass[part].add_(both.sum(2))


def _parts(classes: int, size: int) -> Iterator[slice]:
    """Cut a number of classes into slices whose (k, k, size) tables have 4 million numbers at most."""
    step = max(2**22 // size**2, 1)
    return (slice(first, first + step) for first in range(0, classes, step))


def _without_diagonal(square: Tensor) -> Tensor:
    """Cut the diagonals out of (m, k, k): (m, k, k - 1)."""
    m, k, _ = square.shape
    return square.reshape(m, k * k)[:, 1:].view(m, k - 1, k + 1)[:, :, :-1].reshape(m, k, k - 1)


def _with_diagonal(table: Tensor) -> Tensor:
    """Put diagonals of zeros into (m, k, k - 1): (m, k, k)."""
    m, k, _ = table.shape
    padded = nn.functional.pad(table.reshape(m, k - 1, k), (0, 1)).view(m, k * k - 1)
    return nn.functional.pad(padded, (1, 0)).view(m, k, k)


class _ExactTriplets(torch.autograd.Function):
    """The mean of the non-zero hinge terms and the number of these; the gradient waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, layout: ClassLayout, margin: float, mining: Mining, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return loss and share of active triplets, and keep the gradient, which the same sweep gives."""
        with_grad = bool(ctx.needs_input_grad[0])
        ordered = rows.index_select(0, layout.order)
        total, number, grad = _Sweep(ordered, layout, margin, mining, block, with_grad=with_grad).run()
        scale = number.clamp_min(1).reciprocal()
        if with_grad:
            unsorted = torch.empty_like(grad).index_copy_(0, layout.order, grad.mul_(scale))
            ctx.save_for_backward(unsorted)
        ctx.mark_non_differentiable(number)
        # Comparisons with NaN are false, so nothing would be active: a broken network must not look like a solved task.
        poison = rows.sum(dtype=scale.dtype) * 0
        return (total * scale + poison).to(rows.dtype), number

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            # The saved gradient is a constant to autograd: a second derivative would come out wrong without a word.
            raise ConfigError("TripletLoss has no second derivative: call backward without create_graph=True")
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
        block = 768 if rows.device.type == "cpu" else 4096
    layout = ClassLayout.of(labels, rows.device)
    loss, number = _ExactTriplets.apply(rows, layout, margin, mining, block)
    return loss, (number / max(layout.triplets, 1)).to(torch.float32)
