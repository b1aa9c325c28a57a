"""The triplet loss with a soft margin over all triplets, value and gradient, without a list of triplets.

The term of a triplet is softplus(D_ap - D_an) = log(1 + exp(D_ap) exp(-D_an)). It has no threshold, so that nothing can
be counted or sorted, and every triplet is computed, one chunk of anchors and one of their positives at a time. The
distances of unit rows are at most 2: the two powers are made once for each pair, and the terms of up to 32 positives
are the logarithm of one product, which stays below 10^30.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitembed.training.losses.rows import (
    Comparison,
    centred,
    chunks,
    pair_distances,
    refuse_second_derivative,
    rounding,
    wanted_zeros,
    wide_type,
)

# A factor is at most 1 + e^2: the product of this many is a float32.
_FACTORS = 32


def soft_triplets(batch: Comparison) -> tuple[Tensor, Tensor]:
    """Return the mean of softplus(D_ap - D_an) over all triplets of queries and references.

    The soft margin of Hermans, Beyer and Leibe 2017 (arXiv:1703.07737), section 2. Time is O(B M (D + K)) for K
    positives an anchor, memory O(chunk x M + B K): where the hinge counts triplets, this computes each, in about 3
    nanoseconds on one CPU core. The gradient is made with the value.

    Args:
        batch: queries and references.

    Returns:
        The loss, and the share of terms that are not zero, which is 1 where there is a triplet at all: two scalars.
        Without a triplet both are 0.
    """
    anchors, positives = batch.positive_pairs()
    counts = torch.bincount(anchors, minlength=len(batch.rows))
    number = int((counts * (len(batch.others) - batch.class_sizes())).sum())
    device = batch.rows.device
    near = pair_distances(batch.rows, batch.others, anchors.to(device), positives.to(device))
    classes = batch.labels.to(device, torch.int64), batch.other_labels.to(device, torch.int64)
    sums = _SoftTriplets.apply(batch.rows, batch.others, near, _Anchors.of(counts), *classes)
    return sums / max(number, 1) + batch.poison(), sums.new_full((), float(number > 0), dtype=torch.float32)


@dataclass(frozen=True)
class _Anchors:
    """The anchors by ascending number of positives, on the CPU, so that those of a chunk have about as many.

    Attributes:
        order: (B,) int64, the anchors.
        counts: (B,) int64, the number of positives of each anchor, in the batch's order.
        starts: (B,) int64, where its positive pairs begin.
    """

    order: Tensor
    counts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> "_Anchors":
        return cls(counts.argsort(stable=True), counts, counts.cumsum(0) - counts)

    def slots(self, span: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return some anchors (c,), the numbers of their positive pairs (c, K), and which of these are real (c, K)."""
        anchors = self.order[span]
        ranks = torch.arange(int(self.counts[anchors].max()))
        real = ranks < self.counts[anchors, None]
        slots = (self.starts[anchors, None] + ranks).masked_fill(~real, 0)
        return anchors.to(device), slots.to(device), real.to(device)


class _SoftTriplets(torch.autograd.Function):
    """The sum of all terms, from rows (B, D), references (M, D) and the distances of the positive pairs (T,)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, others: Tensor, near: Tensor, anchors: _Anchors, labels: Tensor, other_labels: Tensor
    ) -> Tensor:
        """Return the sum, and keep the gradient, which the same sweep gives."""
        x, y = centred(rows, others)
        norms = y.square().sum(1)
        floor = rounding(x.square().sum(1), norms)
        total = rows.new_zeros((), dtype=wide_type(rows.device))
        grads = wanted_zeros(ctx, rows, others, near)
        for span in chunks(len(rows), len(others), rows.device):
            part, slots, real = anchors.slots(span, rows.device)
            if slots.shape[1] == 0:
                continue
            squares = (x[part].square().sum(1)[:, None] + norms).addmm_(x[part], y.T, alpha=-2)
            distances = squares.clamp_min_(floor).sqrt_()
            far = distances.neg().exp_().masked_fill_(labels[part, None] == other_labels, 0)
            value, push, pull = _terms(far, near[slots].exp_().mul_(real))
            total += value
            weights = push.div_(distances)  # the derivative of D_an by a row is the unit vector between both
            if grads[0] is not None:
                grads[0].index_copy_(0, part, (weights @ y).sub_(weights.sum(1, keepdim=True) * x[part]))
            if grads[1] is not None:
                grads[1].addmm_(weights.T, x[part]).sub_(weights.sum(0)[:, None] * y)
            if grads[2] is not None:
                grads[2][slots[real]] = pull[real]
        ctx.save_for_backward(*grads)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return *(None if saved is None else grad * saved for saved in ctx.saved_tensors), None, None, None


def _terms(far: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of some anchors, and the sigmoids that are their derivatives.

    Args:
        far: (c, M), exp(-D_an), and 0 where the reference is no negative.
        near: (c, K), exp(D_ap), and 0 where there is no such positive.

    Returns:
        The sum of all log(1 + near far), a scalar; that of the sigmoids over positives (c, M), and over negatives
        (c, K).
    """
    total = far.new_zeros((), dtype=wide_type(far.device))
    push, pull, factor = torch.zeros_like(far), torch.empty_like(near), torch.empty_like(far)
    product = torch.ones_like(far)
    for k in range(near.shape[1]):
        torch.mul(far, near[:, k, None], out=factor).add_(1)
        product.mul_(factor)
        if (k + 1) % _FACTORS == 0 or k + 1 == near.shape[1]:
            total += product.log_().sum(dtype=total.dtype)
            product.fill_(1)
        sigmoid = factor.reciprocal_().neg_().add_(1)
        push += sigmoid
        pull[:, k] = sigmoid.sum(1)
    return total, push, pull
