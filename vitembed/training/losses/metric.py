"""The losses of metric learning: triplet and contrastive, and those of pytorch-metric-learning by name.

A loss follows the contract of pytorch-metric-learning: `loss(embeddings, labels, tuples, ref_emb, ref_labels)` with
(B, D) embeddings, (B,) integer labels and, as an option, what a miner chose and the references that positives and
negatives are taken from. Our own two bring the embeddings to unit length themselves, work in float32 at least, and
after each call leave in `active_share` the share of terms that are not zero. That is a scalar tensor and not a number,
so that nothing waits for the device until somebody prints it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from vitembed.errors import ConfigError, VectorError, unknown_name
from vitembed.training.classification import CrossEntropyLoss
from vitembed.training.losses.distillation import DISTILLATION
from vitembed.training.losses.mining import OWN_MINERS
from vitembed.training.losses.pairs import exact_pairs
from vitembed.training.losses.peers import check_argument, find_class
from vitembed.training.losses.rows import Comparison, matrix_distances, pair_distances
from vitembed.training.losses.soft_triplets import soft_triplets
from vitembed.training.losses.specs import construct, parse_call
from vitembed.training.losses.triplet import Mining as ExactMining
from vitembed.training.losses.triplet import exact_triplets

Miner = Callable[..., Sequence[Tensor]]
Mining = Literal["all", "hard", "semihard", "batch-hard", "easy-positive", "distance-weighted"]

_Given = TypeVar("_Given", nn.Module, Miner)

# A pair that is gathered costs as much as at least so many of a matrix of distances (measured: 50, for rows of 384).
_GATHERED = 32


class TripletLoss(nn.Module):
    """Mean of the non-zero terms max(0, D_ap + margin - D_an) over the triplets of a batch.

    D is the Euclidean distance of unit-length embeddings; a triplet is an anchor, another image of its class and an
    image of another class. With mining "all", "hard" and "semihard" value and gradient equal those of
    pytorch-metric-learning's `TripletMarginLoss(margin)` on the triplets of `TripletMarginMiner(margin, mining)`,
    without a list of them: for K images a class, time is O(B^2 (D + K)) and memory O(B (D + K)). The other minings
    choose triplets as `vitembed.training.losses.mining` has them, in chunks.

    With `soft` the terms are softplus(D_ap - D_an) and the loss is the mean of all, since none is zero (Hermans, Beyer
    and Leibe 2017, arXiv:1703.07737, section 2). Over all triplets that takes O(B^2 (D + K)) as well, and twice to
    five times as long as the hinge (batches of 1024, 4 to 256 images a class), since none can be merely counted.

    Args:
        margin: how much farther a negative should be than a positive, in units of distance (0 to 2); above 0. None for
            0.2, and with `soft`, which has none.
        mining: which triplets count: "all"; "hard", whose negative is no farther than the positive; "semihard", whose
            negative is farther; "batch-hard", the farthest positive and the nearest negative of each anchor;
            "easy-positive", the nearest positive and the nearest negative beyond it; "distance-weighted", each positive
            with a negative drawn so that all distances come up alike.
        soft: use the soft margin; for every mining but "hard" and "semihard".

    Attributes:
        active_share: scalar float32 tensor, the share of all triplets (of those that were given or chosen, if there
            were such) whose term was not zero in the last call.

    Raises:
        ConfigError: the mining is unknown, the margin is not a finite number above 0, or one does not go with `soft`.
    """

    reads_labels_on_host = True  # the exact terms are laid out there

    def __init__(self, margin: float | None = None, mining: Mining = "all", soft: bool = False) -> None:
        super().__init__()
        if mining not in get_args(Mining):
            raise unknown_name("mining", str(mining), get_args(Mining))
        if soft and margin is not None:
            raise ConfigError(f"the soft margin has no width: leave out margin={margin}, or soft=True")
        if soft and mining in ("hard", "semihard"):
            raise ConfigError(
                f"mining {mining!r} goes with a margin: use 'all', 'batch-hard' or another with soft=True"
            )
        self.margin = None if soft else _finite("margin", 0.2 if margin is None else margin)
        if self.margin is not None and self.margin <= 0:
            raise ConfigError(f"margin must be above 0; got {margin}")
        self.mining: Mining = mining
        self.soft = soft
        self.active_share = torch.zeros(())

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        own: int | None = None,
    ) -> Tensor:
        """Return the loss, a scalar: float64 for float64 embeddings, else float32; 0 where no triplet is active.

        Args:
            embeddings: (B, D), of any length and floating type.
            labels: (B,) integers. On a GPU they are read on the host: labels that lie there already save a wait.
            tuples: what a miner chose, (anchors, positives, negatives) or (anchors, positives, anchors, negatives);
                the loss is then over exactly these triplets.
            ref_emb: (M, D), what positives and negatives are taken from, and numbered in by `tuples`. By default, and
                where it is the very tensor `embeddings`, the batch itself, in which no image is its own positive.
            ref_labels: (M,) integers, for `ref_emb`.
            own: where the batch begins among the references, if these hold it as well.

        Raises:
            VectorError: the shapes or types do not fit, or references lack labels.
            ConfigError: there are both tuples and a mining other than "all".
        """
        batch = Comparison.of(embeddings, labels, ref_emb, ref_labels, own)
        if tuples is not None and self.mining != "all":
            raise ConfigError(f"a miner chooses the triplets already: use mining 'all', not {self.mining!r}")
        with torch.autocast(batch.rows.device.type, enabled=False):
            loss, share = self._loss(batch, tuples)
        self.active_share = share.detach().to(torch.float32)
        return loss

    def _loss(self, batch: Comparison, tuples: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of active terms."""
        if tuples is None and self.mining in OWN_MINERS:
            tuples = OWN_MINERS[self.mining]().choose(batch)
        if tuples is not None:
            return self._given(batch, *_as_triplets(tuples))
        if self.margin is None:
            return soft_triplets(batch)
        mining: ExactMining = self.mining  # type: ignore[assignment]
        references, own = batch.against()
        return exact_triplets(
            batch.rows, batch.labels, margin=self.margin, mining=mining, references=references, own=own
        )

    def _given(self, batch: Comparison, anchors: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of given triplets and the share of those that are active."""
        near, far = _distances(batch, anchors, positives, anchors, negatives)
        if self.margin is None:
            number = torch.ones_like(near).sum()
            loss = nn.functional.softplus(near - far).sum() / number.clamp_min(1)
        else:
            loss, number = _mean_of_positive(near - far + self.margin)
        return loss + batch.poison(), number / max(len(near), 1)

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)`."""
        return f"mining={self.mining!r}, soft=True" if self.soft else f"margin={self.margin}, mining={self.mining!r}"


class ContrastiveLoss(nn.Module):
    """The loss of Siamese networks: positive pairs come nearer than one margin, negative ones go beyond another.

    The mean of the non-zero max(0, D - positive_margin) over positive pairs plus that of the non-zero
    max(0, negative_margin - D) over negative pairs, D as in `TripletLoss`: pytorch-metric-learning's `ContrastiveLoss`.
    With `squared`, each term t is t^2 / 2 instead, as Hadsell, Chopra and LeCun (2006) have it in equation 4.
    Distances exist one block at a time.

    Args:
        positive_margin: distance within which positives are near enough.
        negative_margin: distance beyond which negatives are far enough.
        squared: use Hadsell's form.

    Attributes:
        active_share: scalar float32 tensor, the share of pairs whose term was not zero in the last call.

    Raises:
        ConfigError: a margin is not a finite number.
    """

    reads_labels_on_host = True

    def __init__(self, positive_margin: float = 0.0, negative_margin: float = 1.0, *, squared: bool = False) -> None:
        super().__init__()
        self.positive_margin = _finite("positive_margin", positive_margin)
        self.negative_margin = _finite("negative_margin", negative_margin)
        self.squared = squared
        self.active_share = torch.zeros(())

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        own: int | None = None,
    ) -> Tensor:
        """Return the loss, a scalar as `TripletLoss` gives it; the arguments are the same, too.

        Raises:
            VectorError: the shapes or types do not fit, or references lack labels.
        """
        batch = Comparison.of(embeddings, labels, ref_emb, ref_labels, own)
        with torch.autocast(batch.rows.device.type, enabled=False):
            loss, share = self._loss(batch, tuples)
        self.active_share = share.detach().to(torch.float32)
        return loss

    def _loss(self, batch: Comparison, tuples: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of active terms."""
        if tuples is None:
            references, own = batch.against()
            return exact_pairs(
                batch.rows,
                batch.labels,
                positive_margin=self.positive_margin,
                negative_margin=self.negative_margin,
                squared=self.squared,
                references=references,
                own=own,
            )
        near, far = _distances(batch, *_as_pairs(tuples))
        pull, pulled = _mean_of_positive(near - self.positive_margin, squared=self.squared)
        push, pushed = _mean_of_positive(self.negative_margin - far, squared=self.squared)
        return pull + push, (pulled + pushed) / max(len(near) + len(far), 1)

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)`."""
        margins = f"positive_margin={self.positive_margin}, negative_margin={self.negative_margin}"
        return f"{margins}, squared={self.squared}"


OWN_LOSSES: dict[str, type[nn.Module]] = {
    "triplet": TripletLoss,
    "contrastive": ContrastiveLoss,
    "cross-entropy": CrossEntropyLoss,
    "CrossEntropyLoss": CrossEntropyLoss,
}


def build_loss(
    spec: str | nn.Module, *, num_classes: int | None = None, embedding_size: int | None = None, **settings: object
) -> nn.Module:
    """Return the loss that a line of text names; an object passes through.

    >>> build_loss("triplet", margin=0.1, mining="semihard")
    TripletLoss(margin=0.1, mining='semihard')

    Args:
        spec: "triplet", "contrastive", "cross-entropy" or a loss of pytorch-metric-learning, with arguments or without:
            "contrastive(negative_margin=0.8)", "MultiSimilarityLoss(alpha=2, base=0.5)".
        num_classes: of the data, for those losses of pytorch-metric-learning that cannot do without.
        embedding_size: of the model, the same.
        settings: more arguments, which win over those in `spec`.

    Raises:
        ConfigError: the name or an argument is unknown, missing, mistyped, or makes no sense.
        MissingExtraError: the loss is pytorch-metric-learning's, which is not installed.
    """
    if not isinstance(spec, str):
        return _passed_through(spec, "loss", settings)
    name, arguments = parse_call(spec, "loss")
    if name == DISTILLATION:
        raise ConfigError(f"{name} needs teachers: name them with --teacher, or build DistillationLoss in Python")
    cls = OWN_LOSSES.get(name) or find_class(name, "loss", [*OWN_LOSSES, DISTILLATION])
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "descriptors_dim": embedding_size}
    offered = {key: value for key, value in sizes.items() if value is not None}
    for key, value in offered.items():
        if (given := arguments.get(key, value)) != value:
            raise ConfigError(f"{name}: {key} must be {value}, as data and model have it; got {given}, or leave it out")
    return construct(cls, arguments | settings, offered, check_argument)


def build_miner(spec: str | Miner, **settings: object) -> Miner:
    """Return the miner that a line of text names; an object passes through.

    Args:
        spec: "batch-hard", "easy-positive", "distance-weighted" or a miner of pytorch-metric-learning, with arguments
            or without: "easy-positive(negatives='hard')", "MultiSimilarityMiner(epsilon=0.1)".
        settings: more arguments, which win over those in `spec`.

    Raises:
        ConfigError: the name or an argument is unknown, missing, mistyped, or makes no sense.
        MissingExtraError: the miner is pytorch-metric-learning's, which is not installed.
    """
    if not isinstance(spec, str):
        return _passed_through(spec, "miner", settings)
    name, arguments = parse_call(spec, "miner")
    cls = OWN_MINERS.get(name) or find_class(name, "miner", OWN_MINERS)
    return construct(cls, arguments | settings, check=check_argument)


def _passed_through(given: _Given, kind: str, settings: dict[str, object]) -> _Given:
    if not callable(given):
        raise ConfigError(f"a {kind} must be its name or an object that can be called; got {given!r}")
    if settings:
        raise ConfigError(f"the {kind} is an object already: {', '.join(settings)} must be set when making it")
    return given


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number; got {value!r}")
    return float(value)


def _distances(
    batch: Comparison, anchors: Tensor, positives: Tensor, others: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the distances (T,) and (U,) of pairs of queries and references, by the way that is less work."""
    left, right = torch.cat([anchors, others]), torch.cat([positives, negatives])
    _check_range(left, len(batch.rows), "queries")
    _check_range(right, len(batch.others), "references")
    device = batch.rows.device
    left, right = left.to(device), right.to(device)
    if len(left) * _GATHERED < len(batch.rows) * len(batch.others):
        distances = pair_distances(batch.rows, batch.others, left, right)
    else:
        distances = matrix_distances(batch.rows, batch.others, left, right)
    return distances[: len(anchors)], distances[len(anchors) :]


def _check_range(index: Tensor, count: int, what: str) -> None:
    """Refuse numbers of rows that there are not; on a device nobody waits for this, and its own check must do.

    Raises:
        VectorError: a number lies outside [0, count).
    """
    if index.device.type == "cpu" and len(index) and not 0 <= (least := int(index.min())) <= int(index.max()) < count:
        found = least if least < 0 else int(index.max())
        raise VectorError(f"a miner's tuples number {count} {what} from 0 to {count - 1}; got {found}")


def _mean_of_positive(terms: Tensor, *, squared: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean of the terms above 0, and how many they are; the mean of none is 0, with a graph."""
    hinges = terms.relu()
    number = (hinges > 0).sum()
    if squared:
        hinges = hinges.square() / 2
    return hinges.sum() / number.clamp_min(1), number


def _as_triplets(tuples: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets as they are, and join pairs (a, p) and (a, n) on their anchor."""
    anchors, positives, others, negatives = _as_pairs(tuples)
    if len(tuples) == 3:
        return anchors, positives, negatives
    order = torch.argsort(others, stable=True)
    others, negatives = others[order], negatives[order]
    first = torch.searchsorted(others, anchors)
    counts = torch.searchsorted(others, anchors, right=True) - first  # negatives of each positive pair's anchor
    pair = torch.repeat_interleave(counts)
    place = torch.arange(len(pair), device=pair.device) - (counts.cumsum(0) - counts)[pair]
    return anchors[pair], positives[pair], negatives[first[pair] + place]


def _as_pairs(tuples: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pairs (a, p), (a, n) as they are, and the pairs that triplets consist of."""
    indices = [index.long() for index in tuples]
    if len(indices) not in (3, 4):
        raise VectorError(f"a miner's tuples must be 3 or 4 index tensors; got {len(indices)}")
    shapes = [tuple(index.shape) for index in indices]
    paired = [shapes] if len(indices) == 3 else [shapes[:2], shapes[2:]]
    if any(len(shape) != 1 for shape in shapes) or any(len(set(group)) > 1 for group in paired):
        raise VectorError(f"index tensors that belong together must be of one length, (T,) each; got {shapes}")
    if len(indices) == 3:
        anchors, positives, negatives = indices
        return anchors, positives, anchors, negatives
    return indices[0], indices[1], indices[2], indices[3]
