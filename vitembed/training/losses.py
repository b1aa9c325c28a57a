"""The losses of metric learning: triplet and contrastive, and those of pytorch-metric-learning by name.

A loss follows the contract of pytorch-metric-learning: `loss(embeddings, labels, tuples)` with (B, D) embeddings, (B,)
integer labels and, as an option, what a miner chose. Our own two bring the embeddings to unit length themselves, work
in float32 at least, and after each call leave in `active_share` the share of terms that are not zero. That is a scalar
tensor and not a number, so that nothing waits for the device until somebody prints it.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from vitembed.errors import ConfigError, MissingExtraError, VectorError, unknown_name
from vitembed.training.classification import CrossEntropyLoss
from vitembed.training.specs import construct, parse_call
from vitembed.training.triplet import Mining, exact_triplets

Miner = Callable[[Tensor, Tensor], Sequence[Tensor]]

_Given = TypeVar("_Given", nn.Module, Miner)


class TripletLoss(nn.Module):
    """Mean of the non-zero terms max(0, D_ap + margin - D_an) over all triplets of a batch.

    D is the Euclidean distance of unit-length embeddings; a triplet is an anchor, another image of its class and an
    image of another class. Equal in value and gradient to pytorch-metric-learning's `TripletMarginLoss(margin)` on the
    triplets of `TripletMarginMiner(margin, mining)`, without making a list of them: for K images a class, time is
    O(B^2 (D + K)) and memory O(B (D + K)).

    Args:
        margin: how much farther a negative should be than a positive, in units of distance (0 to 2); above 0.
        mining: which triplets count: "all"; "hard", whose negative is no farther than the positive; "semihard", whose
            negative is farther.

    Attributes:
        active_share: scalar float32 tensor, the share of all triplets (of the given ones, if there were) whose
            term was not zero in the last call.

    Raises:
        ConfigError: the mining is unknown or the margin is not a finite number above 0.
    """

    def __init__(self, margin: float = 0.2, mining: Mining = "all") -> None:
        super().__init__()
        if mining not in get_args(Mining):
            raise unknown_name("mining", str(mining), get_args(Mining))
        self.margin = _finite("margin", margin)
        if self.margin <= 0:
            raise ConfigError(f"margin must be above 0; got {margin}")
        self.mining: Mining = mining
        self.active_share = torch.zeros(())

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Sequence[Tensor] | None = None) -> Tensor:
        """Return the loss, a scalar: float64 for float64 embeddings, else float32; 0 where no triplet is active.

        Args:
            embeddings: (B, D), of any length and floating type.
            labels: (B,) integers. On a GPU they are read on the host: labels that lie there already save a wait.
            tuples: what a miner chose, (anchors, positives, negatives) or (anchors, positives, anchors, negatives);
                the loss is then over exactly these triplets.

        Raises:
            VectorError: the shapes or types do not fit.
            ConfigError: there are both tuples and a mining other than "all".
        """
        rows = _unit_rows(embeddings, labels)
        if tuples is None:
            with torch.autocast(rows.device.type, enabled=False):
                loss, self.active_share = exact_triplets(rows, labels, margin=self.margin, mining=self.mining)
            return loss
        if self.mining != "all":
            raise ConfigError(f"a miner chooses the triplets already: use mining 'all', not {self.mining!r}")
        anchors, positives, negatives = _as_triplets(tuples)
        distances = _distances(rows)
        terms = distances[anchors, positives] - distances[anchors, negatives] + self.margin
        loss, number = _mean_of_positive(terms)
        self.active_share = number.detach() / max(len(terms), 1)
        return loss

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)`."""
        return f"margin={self.margin}, mining={self.mining!r}"


class ContrastiveLoss(nn.Module):
    """The loss of Siamese networks: positive pairs come nearer than one margin, negative ones go beyond another.

    The mean of the non-zero max(0, D - positive_margin) over positive pairs plus that of the non-zero
    max(0, negative_margin - D) over negative pairs, D as in `TripletLoss`: pytorch-metric-learning's `ContrastiveLoss`.
    With `squared`, each term t is t^2 / 2 instead, as Hadsell, Chopra and LeCun (2006) have it in equation 4.
    Memory is O(B^2).

    Args:
        positive_margin: distance within which positives are near enough.
        negative_margin: distance beyond which negatives are far enough.
        squared: use Hadsell's form.

    Attributes:
        active_share: scalar float32 tensor, the share of pairs whose term was not zero in the last call.

    Raises:
        ConfigError: a margin is not a finite number.
    """

    def __init__(self, positive_margin: float = 0.0, negative_margin: float = 1.0, *, squared: bool = False) -> None:
        super().__init__()
        self.positive_margin = _finite("positive_margin", positive_margin)
        self.negative_margin = _finite("negative_margin", negative_margin)
        self.squared = squared
        self.active_share = torch.zeros(())

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Sequence[Tensor] | None = None) -> Tensor:
        """Return the loss, a scalar as `TripletLoss` gives it; the arguments are the same, too.

        Raises:
            VectorError: the shapes or types do not fit.
        """
        rows = _unit_rows(embeddings, labels)
        distances = _distances(rows)  # (B, B)
        if tuples is None:
            classes = labels.to(rows.device)
            same = classes[:, None] == classes[None, :]
            near, far = distances[same.clone().fill_diagonal_(False)], distances[~same]
        else:
            anchors, positives, others, negatives = _as_pairs(tuples)
            near, far = distances[anchors, positives], distances[others, negatives]
        pull, pulled = _mean_of_positive(near - self.positive_margin, squared=self.squared)
        push, pushed = _mean_of_positive(self.negative_margin - far, squared=self.squared)
        self.active_share = (pulled + pushed).detach() / max(len(near) + len(far), 1)
        return pull + push

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

# Classes of pytorch-metric-learning that are no losses or miners by themselves: bases, and wrappers of other objects.
_NOT_BY_NAME = {"CrossBatchMemory", "MultipleLosses", "SelfSupervisedLoss", "EmbeddingsAlreadyPackagedAsTriplets"}


def build_loss(
    spec: str | nn.Module, *, num_classes: int | None = None, embedding_size: int | None = None, **settings: object
) -> nn.Module:
    """Return the loss that a line of text names; an object passes through.

    >>> build_loss("triplet", margin=0.1, mining="semihard")
    TripletLoss(margin=0.1, mining='semihard')

    Args:
        spec: "triplet", "contrastive", "cross-entropy" or a loss of pytorch-metric-learning, with arguments or without:
            "contrastive(negative_margin=0.8)", "MultiSimilarityLoss(alpha=2, base=0.5)".
        num_classes: for those losses of pytorch-metric-learning that cannot do without.
        embedding_size: the same.
        settings: more arguments, which win over those in `spec`.

    Raises:
        ConfigError: the name or an argument is unknown, missing, or of the wrong type.
        MissingExtraError: the loss is pytorch-metric-learning's, which is not installed.
    """
    if not isinstance(spec, str):
        return _passed_through(spec, "loss", settings)
    name, arguments = parse_call(spec, "loss")
    cls = OWN_LOSSES[name] if name in OWN_LOSSES else _peer_class(name, "loss", "losses", OWN_LOSSES)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "descriptors_dim": embedding_size}
    offered = {key: value for key, value in sizes.items() if value is not None}
    return construct(cls, arguments | settings, offered)


def build_miner(spec: str | Miner, **settings: object) -> Miner:
    """Return the miner of pytorch-metric-learning that a line of text names; an object passes through.

    Args:
        spec: such as "MultiSimilarityMiner(epsilon=0.1)".
        settings: more arguments, which win over those in `spec`.

    Raises:
        ConfigError: the name or an argument is unknown, missing, or of the wrong type.
        MissingExtraError: pytorch-metric-learning is not installed.
    """
    if not isinstance(spec, str):
        return _passed_through(spec, "miner", settings)
    name, arguments = parse_call(spec, "miner")
    return construct(_peer_class(name, "miner", "miners"), arguments | settings)


def _passed_through(given: _Given, kind: str, settings: dict[str, object]) -> _Given:
    if not callable(given):
        raise ConfigError(f"a {kind} must be its name or an object that can be called; got {given!r}")
    if settings:
        raise ConfigError(f"the {kind} is an object already: {', '.join(settings)} must be set when making it")
    return given


def _peer_class(name: str, kind: str, module: str, own: Sequence[str] | dict[str, type[nn.Module]] = ()) -> type:
    """Find a loss or miner of pytorch-metric-learning by the name of its class."""
    if name.islower():  # classes have capitals: this was meant for one of our own, with or without the other package
        raise unknown_name(kind, name, own or _peer_classes(kind, module))
    classes = _peer_classes(f"{kind} {name}", module)
    if name not in classes:
        raise unknown_name(kind, name, [*own, *classes])
    return classes[name]


def _peer_classes(feature: str, module: str) -> dict[str, type]:
    try:
        import pytorch_metric_learning.losses
        import pytorch_metric_learning.miners
    except ImportError as error:
        raise MissingExtraError(f"the {feature}", "metric-learning") from error
    namespace: ModuleType = getattr(pytorch_metric_learning, module)
    return {
        name: value
        for name, value in vars(namespace).items()
        if isinstance(value, type)
        and not name.startswith(("Base", "Generic"))
        and not name.endswith("Mixin")
        and name not in _NOT_BY_NAME
    }


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number; got {value!r}")
    return float(value)


def _unit_rows(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Check a batch and return its rows at unit length, in float32 at least; rows of zeros stay."""
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise VectorError(
            f"embeddings must be floating-point of shape (B, D); got {embeddings.dtype} of {tuple(embeddings.shape)}"
        )
    if labels.ndim != 1 or len(labels) != len(embeddings):
        raise VectorError(
            f"labels must have shape ({len(embeddings)},), one for each embedding; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise VectorError(f"labels must be integers that number the classes; got {labels.dtype}")
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    with torch.autocast(wide.device.type, enabled=False):
        return nn.functional.normalize(wide)


def _distances(rows: Tensor) -> Tensor:
    """Return the Euclidean distances (B, B) of rows (B, D); where one is 0 to rounding, so is its gradient."""
    with torch.autocast(rows.device.type, enabled=False):
        centred = rows - rows.detach().mean(0)  # more precise where all rows are nearly equal
        norms = centred.square().sum(1)
        squares = norms[:, None] + norms[None, :] - 2 * centred @ centred.T
        zero = squares <= 4 * torch.finfo(rows.dtype).eps
        return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _mean_of_positive(terms: Tensor, *, squared: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean of the terms above 0, and how many they are; the mean of none is 0, with a graph."""
    hinges = terms.relu()
    number = (hinges > 0).sum()
    if squared:
        hinges = hinges.square() / 2
    return hinges.sum() / number.clamp_min(1), number


def _as_triplets(tuples: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets as they are, and join pairs (a, p) and (a, n) on their anchor."""
    if len(tuples) == 3:
        return tuples[0].long(), tuples[1].long(), tuples[2].long()
    anchors, positives, others, negatives = _as_pairs(tuples)
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
    if len(indices) == 3:
        anchors, positives, negatives = indices
        return anchors, positives, anchors, negatives
    if len(indices) != 4:
        raise VectorError(f"a miner's tuples must be 3 or 4 index tensors; got {len(indices)}")
    return indices[0], indices[1], indices[2], indices[3]
