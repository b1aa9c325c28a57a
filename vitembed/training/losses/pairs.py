"""The exact contrastive loss of a batch, value and gradient, without a matrix of all pairs.

The pairs of one class are small dense tables, measured in double precision; the others come one block of distances at
a time. The two means are of their own numbers of active pairs, so each has its own sums.
"""

import torch
from torch import Tensor

from vitembed.training.losses.distances import Distances, Measured, default_block, recorded
from vitembed.training.losses.layout import Group, Layout, check_references


class _PairSweep:
    """One pass over the positive pairs and one over the negative: the loss, its active pairs and its gradient."""

    def __init__(self, space: Distances, positive_margin: float, negative_margin: float, *, squared: bool) -> None:
        self.space, self.layout, self.squared = space, space.layout, squared
        self.positive_margin, self.negative_margin = positive_margin, negative_margin
        # Squared distances up to this are rounding: the distance is 0, and so is its gradient.
        self.zero = space.tie
        self._begin()

    def _begin(self) -> None:
        """Set the sum of the terms and their number to 0."""
        self.total = self.space.queries.new_zeros((), dtype=self.space.wide)
        self.number = self.total.clone()

    def run(self) -> Measured:
        """Return the loss, the number of non-zero terms of both kinds, and the gradients of the loss."""
        for group in self.layout.groups:
            if self.layout.positives(group):
                self._positives(group)
        pulled, scale = self.number, self.number.clamp_min(1).reciprocal()
        pull, near = self.total * scale, self.space.gradients(scale)
        self._begin()
        self.space.begin_gradients()
        for queries, references in self.space.pairs():
            self._negatives(queries, references)
        scale = self.number.clamp_min(1).reciprocal()
        push, far = self.total * scale, self.space.gradients(scale)
        # Where the references are the batch, a negative pair is met once and a positive pair from both of its ends.
        pushed = self.number * 2 if self.layout.symmetric else self.number
        ours, theirs = (None if a is None or b is None else a.add_(b) for a, b in zip(near, far, strict=True))
        return pull + push, pulled + pushed, (ours, theirs)

    def _positives(self, group: Group) -> None:
        """Add up max(0, D - positive_margin) over the positive pairs of a group."""
        for part, table in self.space.within(group):
            distances = self.layout.without_own(table, group, part)  # (m, c, K), in double precision
            zero = distances.square() <= self.zero
            terms = distances.masked_fill(zero, 0.0).sub_(self.positive_margin).clamp_min_(0)
            active = (terms > 0).to(terms.dtype)
            self.number += active.sum()
            self.total += terms.square().sum() / 2 if self.squared else terms.sum()
            slopes = (terms if self.squared else active).div_(-distances).masked_fill_(zero, 0.0)
            weights = slopes.to(self.space.queries.dtype)
            self.space.add_within(group, part, self.layout.with_own(weights, group, part))

    def _negatives(self, queries: slice, references: slice) -> None:
        """Add up max(0, negative_margin - D) over the negative pairs of a block."""
        block = self.space.squares(queries, references, same=torch.inf)
        if block is None:
            return
        x, terms, active = block
        zero = x <= self.zero
        torch.sqrt(x, out=terms).masked_fill_(zero, 0.0).neg_().add_(self.negative_margin).clamp_min_(0)
        torch.gt(terms, 0, out=active)
        share = 0.5 if self.space.on_diagonal(queries, references) else 1.0
        self.number.add_(_sum(active, self.space.wide), alpha=share)
        slopes = active
        if self.squared:
            self.total.add_(_sum(torch.square(terms, out=active), self.space.wide), alpha=share / 2)
            slopes = terms
        else:
            self.total.add_(_sum(terms, self.space.wide), alpha=share)
        self.space.add(queries, references, slopes.mul_(x.rsqrt_()).masked_fill_(zero, 0.0))


def _sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up a block, its rows first: a float32 row of numbers below 2 is exact enough."""
    return x.sum(1).sum(dtype=dtype)


def exact_pairs(
    rows: Tensor,
    labels: Tensor,
    *,
    positive_margin: float,
    negative_margin: float,
    squared: bool,
    references: tuple[Tensor, Tensor] | None = None,
    own: int | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean of the non-zero pull terms of positive pairs plus that of the push terms of negative pairs.

    A pull is max(0, D - positive_margin), a push max(0, negative_margin - D); the means are over those above 0. A
    distance that is 0 to rounding counts as 0 and has no gradient.

    Args:
        rows: (B, D) unit rows, float32 or float64.
        labels: (B,) integers; a pair is positive when its labels are equal.
        positive_margin: distance within which positives are near enough.
        negative_margin: distance beyond which negatives are far enough.
        squared: a term t is t^2 / 2 instead, as Hadsell, Chopra and LeCun (2006) have it in equation 4.
        references: (M, D) unit rows and their (M,) labels, to which the batch is paired; by default the batch. They
            have a gradient where they require one.
        own: where row 0 stands among the references when the batch is among them, in its order; no image is then
            paired with itself. None when it is not.
        block: side of the square blocks of distances; by default what suits the device's cache. Memory is
            O((B + M) D + block^2).

    Returns:
        The loss, and the share of all pairs whose term is not zero: two scalars. The loss is 0 when there is no such
        pair, NaN when a row or a reference is.

    Raises:
        VectorError: the references do not fit the batch.
        ConfigError: `own` is not where the references have the batch's labels.
    """
    others, theirs = check_references(rows, references, own)
    layout = Layout.of(labels, theirs, own, rows.device)
    block = block or default_block(rows.device)

    def measure(wants: tuple[bool, bool]) -> Measured:
        space = Distances(rows, others, layout, block, wants)
        return _PairSweep(space, positive_margin, negative_margin, squared=squared).run()

    loss, number = recorded(rows, others, measure)
    pairs = layout.positive_pairs + layout.negative_pairs
    return loss, (number / max(pairs, 1)).to(torch.float32)
