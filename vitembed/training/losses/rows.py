"""A batch of embeddings and what it is compared with: checked rows of unit length, their classes, their distances.

What losses and miners share. Queries are compared with references: those that were given, or the batch itself. An image
is never its own positive: `own` says where the queries stand among the references, if they do. Distances are Euclidean,
of rows of unit length, so they lie in [0, 2]. Whatever has a number for each pair of a query and a reference is made in
chunks of queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitembed.errors import ConfigError, VectorError

# How many distances there are at a time: on a CPU what its cache holds, elsewhere what keeps a device busy.
CHUNK = {"cpu": 2**19, "other": 2**25}


@dataclass(frozen=True)
class Comparison:
    """Queries, and the references that they are compared with.

    Attributes:
        rows: (B, D) of unit length, float32 or float64.
        labels: (B,) integers, on the device where the caller had them.
        others: (M, D), the references; `rows` itself where a batch is compared with itself.
        other_labels: (M,) integers.
        own: position of query 0 among the references, where the others follow in their order; None: they are not there.
    """

    rows: Tensor
    labels: Tensor
    others: Tensor
    other_labels: Tensor
    own: int | None

    @classmethod
    def of(
        cls,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        own: int | None = None,
    ) -> "Comparison":
        """Check a batch and its references, and bring their rows to unit length.

        Args:
            embeddings: (B, D) of any length and floating type.
            labels: (B,) integers.
            ref_emb: (M, D), the references; None, or the very tensor `embeddings`, to compare the batch with itself.
            ref_labels: (M,) integers.
            own: where the batch begins among the references, if these hold it as well.

        Raises:
            VectorError: shapes, types or devices do not fit, or there are references without labels, or the reverse.
            ConfigError: `own` is not where the references have the labels of the batch.
        """
        rows = unit_rows(embeddings, labels)
        if (ref_emb is None) != (ref_labels is None):
            given, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
            raise VectorError(f"{given} came without {missing}: references need both, one label for each row")
        if ref_emb is None or ref_labels is None:
            if own not in (None, 0):
                raise VectorError(f"own={own} is a position among references, and there are none: pass ref_emb as well")
            return cls(rows, labels, rows, labels, 0)
        if ref_emb is embeddings:
            others, own = rows, own or 0
            _check_labels(ref_emb, ref_labels, "ref_labels")
        else:
            _check_references(ref_emb, rows)
            others = unit_rows(ref_emb.to(rows.dtype), ref_labels, names=("ref_emb", "ref_labels"))
        if own is not None and not 0 <= own <= len(others) - len(rows):
            raise VectorError(f"own={own} leaves no room for {len(rows)} queries among {len(others)} references")
        if own is not None and not _same_classes(labels, ref_labels[own : own + len(rows)]):
            where = "ref_emb is embeddings" if others is rows else f"own={own} says that the references hold the batch"
            raise ConfigError(
                f"{where}, but ref_labels differ from labels there: pass the labels of the batch"
                + ("" if others is rows else ", or own=None where the references do not hold it")
            )
        return cls(rows, labels, others, ref_labels, own)

    def against(self) -> tuple[tuple[Tensor, Tensor] | None, int | None]:
        """Return references with labels, and `own`, as the exact losses take them: nothing for a batch by itself."""
        if self.others is self.rows and self.other_labels is self.labels:
            return None, None
        return (self.others, self.other_labels), self.own

    def poison(self) -> Tensor:
        """Return 0, or NaN where a row has one: NaN is near to nothing, so that no triplet may be chosen for it."""
        return self.rows.sum() * 0 + (0 if self.others is self.rows else self.others.sum() * 0)

    def class_sizes(self) -> Tensor:
        """Return how many references share each query's class, itself included if it is there: (B,) on the CPU."""
        return self._classes()[2]

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """Return all positive pairs (T,) int64 on the CPU: queries in their order, and their references in theirs."""
        order, first, counts = self._classes()
        anchors = torch.repeat_interleave(counts)
        offsets = torch.arange(len(anchors)) - (counts.cumsum(0) - counts)[anchors]
        positives = order[first[anchors] + offsets]
        if self.own is not None:
            keep = positives != anchors + self.own
            anchors, positives = anchors[keep], positives[keep]
        return anchors, positives

    def _classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the references sorted by class (M,), where each query's class begins there, and its size (B,)."""
        labels, others = self.labels.detach().cpu().long(), self.other_labels.detach().cpu().long()
        others, order = others.sort(stable=True)
        first = torch.searchsorted(others, labels)
        return order, first, torch.searchsorted(others, labels, right=True) - first

    def blocks(self) -> Iterator["Block"]:
        """Yield the queries in chunks, with their squared distances to all references, without a graph.

        Nothing comes where there are no references.
        """
        with torch.no_grad(), torch.autocast(self.rows.device.type, enabled=False):
            if len(self.others) == 0:
                return
            x, y = centred(self.rows, self.others)
            norms = y.square().sum(1)
            tie = rounding(x.square().sum(1), norms)
            classes, other_classes = (side.to(x.device, torch.int64) for side in (self.labels, self.other_labels))
            for span in chunks(len(x), len(y), x.device):
                squares = (x[span].square().sum(1)[:, None] + norms).addmm_(x[span], y.T, alpha=-2).clamp_min_(0)
                same = classes[span, None] == other_classes
                positive = same
                if self.own is not None:
                    positive = same.clone()
                    positive.diagonal(self.own + span.start).fill_(False)
                yield Block(span, squares, positive, ~same, tie)


@dataclass(frozen=True)
class Block:
    """Some queries beside all references.

    Attributes:
        span: which queries, c of them.
        squares: (c, M) squared distances, to rounding.
        positive: (c, M) bool, where the reference is another image of the query's class.
        negative: (c, M) bool, where it is of another class.
        tie: scalar, how near two squared distances must be to count as equal.
    """

    span: slice
    squares: Tensor
    positive: Tensor
    negative: Tensor
    tie: Tensor


def unit_rows(embeddings: Tensor, labels: Tensor, names: tuple[str, str] = ("embeddings", "labels")) -> Tensor:
    """Check a batch and return its rows at unit length, in float32 at least; rows of zeros stay.

    Args:
        embeddings: (B, D) of any floating type.
        labels: (B,) integers.
        names: of both, for the errors.

    Raises:
        VectorError: the shapes or types do not fit.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise VectorError(
            f"{names[0]} must be floating-point of shape (B, D); got {embeddings.dtype} of {tuple(embeddings.shape)}"
        )
    _check_labels(embeddings, labels, names[1])
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    with torch.autocast(wide.device.type, enabled=False):
        return nn.functional.normalize(_in_range(wide))


def _in_range(rows: Tensor) -> Tensor:
    """Scale those rows (B, D) whose squares would overflow or vanish, so that their length is a number above 0."""
    if rows.shape[1] == 0:
        return rows
    largest = rows.detach().abs().amax(1, keepdim=True)
    usual = (largest > 1e-9) & (largest < 1e9)
    if usual.device.type == "cpu" and usual.all():  # nobody waits for a device, and a copy is spared
        return rows
    scale = largest.clamp_min(torch.finfo(rows.dtype).tiny).masked_fill(usual, 1.0)
    return torch.div(rows, scale)


def _check_labels(embeddings: Tensor, labels: Tensor, name: str) -> None:
    if labels.ndim != 1 or len(labels) != len(embeddings):
        raise VectorError(
            f"{name} must have shape ({len(embeddings)},), one for each embedding; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise VectorError(f"{name} must be integers that number the classes; got {labels.dtype}")


def _same_classes(labels: Tensor, others: Tensor) -> bool:
    """Tell whether two tensors of labels are equal, whatever their types and devices."""
    return others is labels or torch.equal(labels.detach().cpu().long(), others.detach().cpu().long())


def _check_references(ref_emb: Tensor, rows: Tensor) -> None:
    """Refuse references that cannot be compared with rows (B, D)."""
    if ref_emb.ndim != 2 or ref_emb.shape[1] != rows.shape[1] or not ref_emb.is_floating_point():
        raise VectorError(
            f"ref_emb must be floating-point of shape (M, {rows.shape[1]}), as wide as the embeddings; "
            f"got {ref_emb.dtype} of {tuple(ref_emb.shape)}"
        )
    if ref_emb.device != rows.device:
        raise VectorError(f"ref_emb must be on the embeddings' device, {rows.device}; got {ref_emb.device}")


def chunks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut `count` rows of `width` numbers into slices that suit a device."""
    step = max(CHUNK.get(device.type, CHUNK["other"]) // max(width, 1), 1)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def centred(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Move both by the references' mean: distances stay, and are more precise where all rows are nearly equal."""
    centre = others.detach().sum(0) / max(len(others), 1)
    return rows - centre, others - centre


def wide_type(device: torch.device) -> torch.dtype:
    """Return the widest type that a device adds up in."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounding(*norms: Tensor) -> Tensor:
    """Return the rounding error of squared distances, a scalar, from the squared norms (n,) of both sides' rows.

    It is relative to how far the rows lie apart, so that distances stay distinct in a batch that is about to collapse,
    down to the rounding of the rows themselves, which were of unit length before they were centred.
    """
    eps = torch.finfo(norms[0].dtype).eps
    reach = norms[0].new_zeros(())
    for side in norms:
        if len(side):
            reach = reach + side.amax()
    return reach.clamp_min(eps).mul(4 * eps)


def matrix_distances(rows: Tensor, others: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the distances (T,) of rows[left] and others[right], by products of matrices; 0 to rounding is 0.

    What `pair_distances` is for few pairs, for many: time is O(B M D), memory O(chunk x M + T) and a gradient.
    """
    return _MatrixDistances.apply(rows, others, left, right)  # type: ignore[no-any-return]


class _MatrixDistances(torch.autograd.Function):
    """Distances of given pairs; one that is 0 to rounding has a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return the distances (T,), made a chunk of rows at a time."""
        x, y = centred(rows, others)
        norms = y.square().sum(1)
        zero = rounding(x.square().sum(1), norms)
        left, order = left.sort(stable=True)
        right = right[order]
        ordered = x.new_empty(len(left))
        for span, pairs in _pairs_of_chunks(left, len(x), len(y)):
            squares = (x[span].square().sum(1)[:, None] + norms).addmm_(x[span], y.T, alpha=-2)
            ordered[pairs] = squares[left[pairs] - span.start, right[pairs]]
        ordered = ordered.masked_fill_(ordered <= zero, 0.0).sqrt_()
        ctx.save_for_backward(x, y, left, right, ordered, order)
        return torch.empty_like(ordered).index_copy_(0, order, ordered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of both sides, where they are wanted."""
        refuse_second_derivative()
        x, y, left, right, ordered, order = ctx.saved_tensors
        pulls = torch.where(ordered == 0, 0.0, grad[order] / ordered)
        grad_x, grad_y = wanted_zeros(ctx, x, y)
        for span, pairs in _pairs_of_chunks(left, len(x), len(y)):
            weights = x.new_zeros(span.stop - span.start, len(y))
            weights.index_put_((left[pairs] - span.start, right[pairs]), pulls[pairs], accumulate=True)
            if grad_x is not None:
                grad_x[span] = (weights.sum(1)[:, None] * x[span]).addmm_(weights, y, alpha=-1)
            if grad_y is not None:
                grad_y.addcmul_(weights.sum(0)[:, None], y).addmm_(weights.T, x[span], alpha=-1)
        return grad_x, grad_y, None, None


def _pairs_of_chunks(left: Tensor, count: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield chunks of `count` rows, and which of some pairs with ascending numbers of rows begin there."""
    spans = list(chunks(count, width, left.device))
    stops = torch.tensor([span.stop for span in spans], dtype=left.dtype, device=left.device)
    ends = torch.searchsorted(left, stops).tolist()
    for span, start, stop in zip(spans, [0, *ends], ends, strict=False):
        if start < stop:
            yield span, slice(start, stop)


def pair_distances(rows: Tensor, others: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the distances (T,) of rows[left] and others[right], of differences and so precise however near they are.

    Time is O(T D), memory O(T) beside the gradient: the differences are made again for it, in chunks.
    """
    return _PairDistances.apply(rows, others, left, right)  # type: ignore[no-any-return]


class _PairDistances(torch.autograd.Function):
    """Distances of given pairs; a distance of 0 has a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, left: Tensor, right: Tensor) -> Tensor:
        distances = rows.new_empty(len(left))
        for part in chunks(len(left), rows.shape[1], rows.device):
            distances[part] = torch.linalg.vector_norm(rows[left[part]] - others[right[part]], dim=1)
        ctx.save_for_backward(rows, others, left, right, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of both sides, where they are wanted."""
        refuse_second_derivative()
        rows, others, left, right, distances = ctx.saved_tensors
        weights = torch.where(distances == 0, 0.0, grad / distances)
        grad_rows, grad_others = wanted_zeros(ctx, rows, others)
        for part in chunks(len(left), rows.shape[1], rows.device):
            pull = (rows[left[part]] - others[right[part]]).mul_(weights[part, None])
            if grad_rows is not None:
                grad_rows.index_add_(0, left[part], pull)
            if grad_others is not None:
                grad_others.index_add_(0, right[part], pull, alpha=-1)
        return grad_rows, grad_others, None, None


def wanted_zeros(ctx: Any, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Return zeros like the first inputs of a function, and None for those whose gradient nobody wants."""
    wanted = zip(inputs, ctx.needs_input_grad[: len(inputs)], strict=True)
    return tuple(torch.zeros_like(tensor) if wants else None for tensor, wants in wanted)


def refuse_second_derivative() -> None:
    """Stop a backward pass that wants a graph of its own: its result would be a constant to autograd, and wrong.

    Raises:
        ConfigError: the pass runs with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise ConfigError("the loss has no second derivative: call backward without create_graph=True")
