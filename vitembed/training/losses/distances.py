"""Distances from queries to references one block at a time, and the gradient of what the exact losses make of them.

What holds throughout:

- Rows lie in the order of a `Layout`, where every class is a slice.
- The distances exist one block at a time, small enough for the cache.
- Rows are centred first. Distances do not change, and stay precise when all embeddings are nearly equal.
- With a weight for each pair, (B, M) in W, the gradient is W R - (W 1) Q for the queries Q and W' Q - (W' 1) R for the
  references R: `pull` is the first product, `mass` the second. They are added up with the value, while a block is in
  the cache: a block is never made twice.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitembed.errors import ConfigError
from vitembed.training.losses.layout import Group, Layout
from vitembed.training.losses.rows import rounding

Gradients = tuple[Tensor | None, Tensor | None]
Measured = tuple[Tensor, Tensor, Gradients]


class Sums(NamedTuple):
    """The gradient of one side as it is added up: `pull` (n, D) and `mass` (n,)."""

    pull: Tensor
    mass: Tensor

    @classmethod
    def zeros(cls, rows: Tensor) -> "Sums":
        """Begin with nothing for rows (n, D)."""
        return cls(torch.zeros_like(rows), rows.new_zeros(len(rows)))


class Distances:
    """The rows of both sides, centred and in the order of a layout, and their gradients.

    Attributes:
        layout: the order.
        wide: the type for sums and for the distances of positives; float64 where the device has it.
        tie: scalar, how near two squared distances must be to count as equal.
        floor: scalar, what squared distances are at least; below `tie`.
        block: side of the square blocks.
    """

    def __init__(
        self, rows: Tensor, references: Tensor | None, layout: Layout, block: int, wants: tuple[bool, bool]
    ) -> None:
        """Sort and centre the rows.

        Args:
            rows: (B, D) unit rows.
            references: (M, D) unit rows; None for the batch itself.
            layout: their order.
            block: side of the square blocks.
            wants: whether a gradient is wanted for the rows, and for the references.
        """
        self.layout, self.block = layout, block
        self.wide = torch.float32 if rows.device.type == "mps" else torch.float64
        both = (rows,) if references is None else (rows, references)
        centre = torch.stack([side.sum(0) for side in both]).sum(0) / max(sum(len(side) for side in both), 1)
        self.queries = rows.index_select(0, layout.queries).sub_(centre)
        self.references = self.queries
        if references is not None:
            self.references = references.index_select(0, layout.references).sub_(centre)
        self.query_norms = self.queries.square().sum(1)  # (B,) squared
        self.reference_norms = self.query_norms if references is None else self.references.square().sum(1)  # (M,)
        self.tie = rounding(self.query_norms, self.reference_norms)
        self.floor = self.tie / 4
        self.wants = wants
        self.begin_gradients()
        size = min(block, len(rows)) * min(block, len(self.references))
        self.buffers = [rows.new_empty(size) for _ in range(3)]

    def begin_gradients(self) -> None:
        """Set the gradients to 0."""
        self.query_sums = Sums.zeros(self.queries) if self.wants[0] else None
        # Where the references are the batch, what is theirs is added to the batch's gradient.
        self.reference_sums = self.query_sums
        if not self.layout.symmetric:
            self.reference_sums = Sums.zeros(self.references) if self.wants[1] else None

    def query_blocks(self) -> list[slice]:
        """Cut the sorted positions of the queries into blocks."""
        return _blocks(0, len(self.queries), self.block)

    def pairs(self) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks of pairs; where the references are the batch, those of the upper triangle."""
        for queries in self.query_blocks():
            first = queries.start if self.layout.symmetric else 0
            for references in _blocks(first, len(self.references), self.block):
                yield queries, references

    def squares(self, queries: slice, references: slice, same: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return a block (c, n) of squared distances, of `floor` at least, and two blocks of scratch, while they last.

        `same` is in the place of those of one class; None is for a block that has no other.
        """
        first, last, low, high = self.layout.ends(queries, references)
        if first == last == low == high:
            return None
        rows, columns = self.queries[queries], self.references[references]
        x, one, two = (buffer[: len(rows) * len(columns)].view(len(rows), -1) for buffer in self.buffers)
        torch.add(self.query_norms[queries, None], self.reference_norms[references], out=x)
        x.addmm_(rows, columns.T, alpha=-2).clamp_min_(self.floor)
        if first <= high and low <= last:
            classes = self.layout.query_classes[queries, None], self.layout.reference_classes[references]
            x.masked_fill_(classes[0] == classes[1], same)
        return x, one, two

    def on_diagonal(self, queries: slice, references: slice) -> bool:
        """Tell whether a block holds each of its pairs of images twice, from both ends."""
        return self.layout.symmetric and queries == references

    def add(self, queries: slice, references: slice, weights: Tensor) -> None:
        """Add the gradient of a block of pairs with weights (c, n), which on the diagonal are symmetric."""
        if self.query_sums is not None:
            self.query_sums.pull[queries].addmm_(weights, self.references[references])
            self.query_sums.mass[queries].add_(weights.sum(1))
        if self.reference_sums is not None and not self.on_diagonal(queries, references):
            self.reference_sums.pull[references].addmm_(weights.T, self.queries[queries])
            self.reference_sums.mass[references].add_(weights.sum(0))

    def within(self, group: Group) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Yield the parts of a group and their distances (m, c, k), from queries to references of their class.

        They are in `wide`: a positive is often so near that float32 would lose half of its digits.
        """
        queries, references = group.of_queries(self.queries), group.of_references(self.references)
        for part in group.parts(self.queries.shape[1]):
            rows = queries[part].to(self.wide)
            others = rows if self._whole(group, part) else references[part[0]].to(self.wide)
            yield part, torch.cdist(rows, others)

    def add_within(self, group: Group, part: tuple[slice, slice], weights: Tensor) -> None:
        """Add the gradient of a part of a group with weights (m, c, k)."""
        whole = self._whole(group, part)
        if whole:  # an image is a positive of its own positives: one product serves both ends
            weights = weights + weights.mT
        if self.query_sums is not None:
            pull, mass = (group.of_queries(sums)[part] for sums in self.query_sums)
            pull.baddbmm_(weights, group.of_references(self.references)[part[0]])
            mass.add_(weights.sum(2))
        if self.reference_sums is not None and not whole:
            pull, mass = (group.of_references(sums)[part[0]] for sums in self.reference_sums)
            pull.baddbmm_(weights.mT, group.of_queries(self.queries)[part])
            mass.add_(weights.sum(1))

    def _whole(self, group: Group, part: tuple[slice, slice]) -> bool:
        """Tell whether the queries of a part are the references of its classes."""
        return self.layout.symmetric and part[1] == slice(0, group.asked)

    def gradients(self, scale: Tensor) -> Gradients:
        """Return the gradients times a scale, in the order of the rows as they came; uses the sums up."""
        theirs = None if self.layout.symmetric else self.reference_sums
        return (
            _gradient(self.query_sums, self.queries, self.layout.queries, scale),
            _gradient(theirs, self.references, self.layout.references, scale),
        )


def default_block(device: torch.device) -> int:
    """Return the side of a block of distances: what fits a processor's cache, or is large enough for a GPU."""
    return 768 if device.type == "cpu" else 4096


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _gradient(sums: Sums | None, rows: Tensor, order: Tensor, scale: Tensor) -> Tensor | None:
    """Return (pull - mass rows) scale (n, D), each row where it was before it was sorted."""
    if sums is None:
        return None
    ordered = sums.pull.addcmul_(rows, sums.mass[:, None], value=-1).mul_(scale)
    return torch.empty_like(ordered).index_copy_(0, order, ordered)


class _Recorded(torch.autograd.Function):
    """A value whose gradient was made with it and waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, references: Tensor | None, measure: Callable[[tuple[bool, bool]], Measured]
    ) -> tuple[Tensor, Tensor]:
        """Return the value in the type of the rows, and what else was counted."""
        value, counted, gradients = measure((bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1])))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(counted)
        # Comparisons with NaN are false, so nothing would be active: a broken network must not look like a solved task.
        for side in (rows, references):
            if side is not None:
                value = value + side.sum(dtype=value.dtype) * 0
        return value.to(rows.dtype), counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients that wait."""
        if torch.is_grad_enabled():
            # The saved gradients are constants to autograd: a second derivative would come out wrong without a word.
            raise ConfigError("this loss has no second derivative: call backward without create_graph=True")
        ours, theirs = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return ours, theirs, None


def recorded(
    rows: Tensor, references: Tensor | None, measure: Callable[[tuple[bool, bool]], Measured]
) -> tuple[Tensor, Tensor]:
    """Return a value with a graph and what was counted besides; the value is NaN when a row or reference is.

    Args:
        rows: (B, D).
        references: (M, D), or None.
        measure: called with whether a gradient is wanted for the rows and for the references; gives the value, what
            was counted, and the gradients.
    """
    value, counted = _Recorded.apply(rows, references, measure)
    return value, counted
