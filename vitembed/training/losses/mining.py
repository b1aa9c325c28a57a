"""Miners that choose triplets of a batch, or of queries and references, without a list of all triplets or pairs.

They follow pytorch-metric-learning's contract: `miner(embeddings, labels, ref_emb, ref_labels)` gives index tensors
(anchors, positives, negatives) for `loss(embeddings, labels, tuples)`; positives and negatives number the references
where there are any. The embeddings are brought to unit length, a chunk of queries is compared with all references at a
time, and memory is O(chunk x M) and what is returned. Queries that have no positive or no negative are left out.

References whose distances differ by no more than rounding count as equally far, and the first of them is taken: the
choice depends neither on the size of the chunks nor on the order in which a machine adds.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitembed.errors import ConfigError, VectorError, unknown_name
from vitembed.training.losses.rows import Block, Comparison, wide_type

Triplets = tuple[Tensor, Tensor, Tensor]
Negatives = Literal["semihard", "hard", "all"]


class TripletMiner(nn.Module):
    """What our miners share: the contract, and nothing to learn. A miner of its own has `choose`."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        own: int | None = None,
    ) -> Triplets:
        """Choose triplets: three int64 tensors of one length, on the embeddings' device, by ascending anchor.

        Args:
            embeddings: (B, D) of any length and floating type.
            labels: (B,) integers.
            ref_emb: (M, D), what positives and negatives are taken from; by default, and where it is the very tensor
                `embeddings`, the batch itself, in which no image is its own positive.
            ref_labels: (M,) integers, for `ref_emb`.
            own: where the batch begins among the references, if these hold a copy of it.

        Raises:
            VectorError: shapes or types do not fit, references lack labels, or an embedding holds NaN, which is
                neither near to anything nor far.
            ConfigError: `own` is not where the references have the labels of the batch.
        """
        with torch.no_grad():
            batch = Comparison.of(embeddings, labels, ref_emb, ref_labels, own)
            if batch.poison().isnan():  # a miner waits for the device anyhow, to know how many triplets there are
                raise VectorError("the embeddings or references hold NaN or inf, which a miner cannot compare")
            return self.choose(batch)

    def choose(self, batch: Comparison) -> Triplets:
        """Choose triplets of rows that are checked and of unit length already."""
        raise NotImplementedError


class BatchHardMiner(TripletMiner):
    """For each anchor its farthest positive and its nearest negative: at most B triplets.

    Hermans, Beyer and Leibe 2017 (arXiv:1703.07737), equation 5.
    """

    def choose(self, batch: Comparison) -> Triplets:
        """Choose triplets of rows that are checked and of unit length already."""
        return _one_each(batch, self._hardest)

    @staticmethod
    def _hardest(block: Block) -> Triplets:
        """Return for each query of a block its farthest positive, its nearest negative, and whether it has both."""
        far, has_positive = _first_least(-block.squares, block.positive, block.tie)
        near, has_negative = _first_least(block.squares, block.negative, block.tie)
        return far, near, has_positive & has_negative


class EasyPositiveMiner(TripletMiner):
    """For each anchor its nearest positive alone, so that a class may stay in several parts.

    Xuan, Stylianou and Pless 2020 (arXiv:1904.04370).

    Args:
        negatives: which ones go with it: "semihard", the nearest of those that are farther than the positive (none:
            the anchor is left out); "hard", the nearest; "all", every one, which makes O(B M) triplets.

    Raises:
        ConfigError: `negatives` is unknown.
    """

    def __init__(self, negatives: Negatives = "semihard") -> None:
        super().__init__()
        if negatives not in get_args(Negatives):
            raise unknown_name("negatives", str(negatives), get_args(Negatives))
        self.negatives: Negatives = negatives

    def choose(self, batch: Comparison) -> Triplets:
        """Choose triplets of rows that are checked and of unit length already."""
        if self.negatives == "all":
            return _joined([self._with_all(block) for block in batch.blocks()], batch)
        return _one_each(batch, self._easiest)

    @staticmethod
    def _with_all(block: Block) -> Triplets:
        """Return a block's triplets of each query, its nearest positive and every negative."""
        positives, has_positive = _first_least(block.squares, block.positive, block.tie)
        rows, negatives = (block.negative & has_positive[:, None]).nonzero(as_tuple=True)
        return rows + block.span.start, positives[rows], negatives

    def _easiest(self, block: Block) -> Triplets:
        """Return for each query of a block its nearest positive, its negative, and whether it has both."""
        positives, has_positive = _first_least(block.squares, block.positive, block.tie)
        candidates = block.negative
        if self.negatives == "semihard":
            bound = block.squares.gather(1, positives[:, None]) + block.tie
            candidates = candidates & (block.squares > bound)
        negatives, has_negative = _first_least(block.squares, candidates, block.tie)
        return positives, negatives, has_positive & has_negative

    def extra_repr(self) -> str:
        """Return the settings for `print(miner)`."""
        return f"negatives={self.negatives!r}"


class DistanceWeightedMiner(TripletMiner):
    """Every positive pair with one negative, drawn so that all distances come up alike.

    Most points of a sphere in n dimensions are at a distance near sqrt(2) from each other: the density of distances is
    q(d) ~ d^(n-2) (1 - d^2 / 4)^((n-3)/2). A negative is drawn with a probability proportional to 1 / q(d), where a
    distance below `cutoff` counts as the cutoff, which bounds the weight of the hardest, and one from
    `nonzero_loss_cutoff` is never drawn. Wu, Manmatha, Smola and Krähenbühl 2017 (arXiv:1706.07567), section 4.

    A call takes one number for each positive pair from torch's generator for the CPU, whatever the device: a run whose
    generator is restored draws the same again. An anchor whose negatives are all too far is left out.

    Args:
        cutoff: least distance of the weights, in (0, 2).
        nonzero_loss_cutoff: where negatives are too far to matter, beyond `cutoff` and up to 2.

    Raises:
        ConfigError: the cutoffs are not 0 < cutoff < nonzero_loss_cutoff <= 2.
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4) -> None:
        super().__init__()
        is_flag = isinstance(cutoff, bool) or isinstance(nonzero_loss_cutoff, bool)
        if is_flag or not 0 < cutoff < nonzero_loss_cutoff <= 2:
            raise ConfigError(
                "distance-weighted mining needs 0 < cutoff < nonzero_loss_cutoff <= 2; "
                f"got cutoff={cutoff}, nonzero_loss_cutoff={nonzero_loss_cutoff}"
            )
        self.cutoff, self.nonzero_loss_cutoff = float(cutoff), float(nonzero_loss_cutoff)

    def choose(self, batch: Comparison) -> Triplets:
        """Choose triplets of rows that are checked and of unit length already."""
        anchors, positives = batch.positive_pairs()
        chances = torch.rand(len(anchors), dtype=torch.float64)
        device = batch.rows.device
        negatives = torch.zeros(len(anchors), dtype=torch.int64, device=device)
        found = torch.zeros(len(anchors), dtype=torch.bool, device=device)
        for block in batch.blocks():
            start, stop = torch.searchsorted(anchors, torch.tensor([block.span.start, block.span.stop])).tolist()
            queries = anchors[start:stop] - block.span.start
            drawn = self._draw(block, batch.rows.shape[1], queries, chances[start:stop])
            negatives[start:stop], found[start:stop] = drawn
        return anchors.to(device)[found], positives.to(device)[found], negatives[found]

    def _draw(self, block: Block, dim: int, queries: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a negative for each of some ascending queries of a block.

        Args:
            block: c queries beside M references.
            dim: D of the embeddings.
            queries: (t,) on the CPU, in [0, c), one for each negative that is wanted.
            chances: (t,) float64 on the CPU, uniform in [0, 1).

        Returns:
            The negatives (t,), and (t,) bool, where there is one.
        """
        device = block.squares.device
        wide = wide_type(device)
        sums = self._weights(block, dim).to(wide).cumsum(1)  # (c, M)
        counts = torch.bincount(queries, minlength=len(sums))
        ranks = torch.arange(len(queries)) - (counts.cumsum(0) - counts)[queries]  # 0, 1, ... within each query
        place = queries.to(device), ranks.to(device)
        totals = sums[place[0], -1]
        # Below the total, even where the product is rounded up to it, so that it falls on a negative.
        limit = torch.nextafter(totals, torch.zeros_like(totals))
        values = sums.new_zeros(len(sums), int(counts.max()))
        values[place] = torch.minimum(chances.to(device, wide) * totals, limit)
        return torch.searchsorted(sums, values, right=True)[place], totals > 0

    def _weights(self, block: Block, dim: int) -> Tensor:
        """Return 1 / q(d) of the negatives, each row by its largest, and 0 elsewhere: (c, M)."""
        squares = block.squares.clamp(self.cutoff**2, 4 * (1 - torch.finfo(block.squares.dtype).eps))
        logs = (2 - dim) / 2 * squares.log() - (dim - 3) / 2 * torch.log1p(-squares / 4)
        logs.masked_fill_(~block.negative | (block.squares >= self.nonzero_loss_cutoff**2), -torch.inf)
        # Each row by its own largest: by that of the batch, the far rows' weights would all be rounded to zero.
        largest = logs.max(1, keepdim=True).values
        return logs.sub_(largest.masked_fill_(largest == -torch.inf, 0)).exp_()

    def extra_repr(self) -> str:
        """Return the settings for `print(miner)`."""
        return f"cutoff={self.cutoff}, nonzero_loss_cutoff={self.nonzero_loss_cutoff}"


OWN_MINERS: dict[str, type[TripletMiner]] = {
    "batch-hard": BatchHardMiner,
    "easy-positive": EasyPositiveMiner,
    "distance-weighted": DistanceWeightedMiner,
    "EasyPositiveMiner": EasyPositiveMiner,
}


def _first_least(values: Tensor, mask: Tensor, tie: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position of the least value of each row within a mask, to a tie, and whether there is one."""
    filled = values.masked_fill(~mask, torch.inf)
    bound = filled.amin(1, keepdim=True) + tie
    return (filled <= bound).to(torch.uint8).argmax(1), mask.any(1)


def _one_each(batch: Comparison, choose: Callable[[Block], Triplets]) -> Triplets:
    """Return at most one triplet for each query.

    What is chosen goes into tensors that are there before the first block: small results of their own, each made
    between a block's large ones, would keep the memory of these from being used again.

    Args:
        batch: queries and references.
        choose: gives for the c queries of a block a positive (c,), a negative (c,), and (c,) bool, whether both exist.
    """
    positives, negatives = torch.zeros(2, len(batch.rows), dtype=torch.int64, device=batch.rows.device)
    keep = torch.zeros(len(batch.rows), dtype=torch.bool, device=batch.rows.device)
    for block in batch.blocks():
        positives[block.span], negatives[block.span], keep[block.span] = choose(block)
    anchors = keep.nonzero()[:, 0]
    return anchors, positives[anchors], negatives[anchors]


def _joined(parts: list[Triplets], batch: Comparison) -> Triplets:
    """Return the triplets of all blocks in one."""
    none = torch.empty(0, dtype=torch.int64, device=batch.rows.device)
    anchors, positives, negatives = zip((none, none, none), *parts, strict=True)
    return torch.cat(anchors), torch.cat(positives), torch.cat(negatives)
