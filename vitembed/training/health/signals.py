"""What can be measured of a training at one step: how embeddings lie, how large the gradient is, what reaches what.

`measure` is cheap and waits for the device once. `vitembed.training.health.collapse` draws conclusions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitembed.errors import VectorError

ROWS = 512  # distances and rank are of this many images of a batch at most, its first ones: classes stay together


@dataclass(frozen=True)
class Signals:
    """What was measured at one step; the embeddings are those before it, and None stands for what is not known.

    Attributes:
        loss: of the batch.
        images: B, the size of the batch.
        classes: distinct labels in the batch.
        positive_distance: mean Euclidean distance of images of one class, in [0, 2]; None without such a pair.
        negative_distance: the same of images of two classes.
        spread: root of the mean squared distance of the embeddings from their mean, in [0, 1]. Cosines of two images
            are 1 - spread^2 in the mean, over all pairs with an image and itself among them.
        rank: effective rank of the embeddings about their mean, in [1, most_rank]; 0 where all are equal. It is exp(H),
            H the entropy of the singular values divided by their sum (Roy and Vetterli 2007, "The effective rank: a
            measure of effective dimensionality").
        most_rank: what this batch allows, min(B - 1, D, classes - 1): classes that are points, as at the end of a
            perfect training, have no more dimensions.
        active: share of triplets or pairs with a non-zero term, in [0, 1].
        gradient: norm of the whole gradient, before it is clipped.
        learning_rate: of this step.
        trainable: how many parameters (tensors) of the backbone require a gradient.
        reached: how many of these have a gradient that is not zero.
    """

    loss: float
    images: int
    classes: int
    positive_distance: float | None
    negative_distance: float | None
    spread: float
    rank: float
    most_rank: int
    active: float | None = None
    gradient: float | None = None
    learning_rate: float | None = None
    trainable: int | None = None
    reached: int | None = None


@torch.no_grad()
def measure(
    embeddings: Tensor,
    labels: Tensor,
    loss: Tensor | float,
    *,
    active: Tensor | float | None = None,
    gradient: Tensor | float | None = None,
    learning_rate: float | None = None,
    backbone: nn.Module | None = None,
) -> Signals:
    """Measure a step, between the backward pass and the optimizer's step, while there are gradients.

    Distances and rank are of the first 512 images. Nothing random is drawn.

    Args:
        embeddings: (B, D) unit rows of any floating type, B at least 1; where a batch is cut up, all of it.
        labels: (B,) integers.
        loss: scalar.
        active: share of terms that are not zero, where the loss knows it (`active_share`).
        gradient: norm before clipping, of true scale. Leave it out at a step that fp16's loss scaling skips: an
            overflow is how that finds its scale, and no fault.
        learning_rate: of this step.
        backbone: whose gradients are looked at. Leave it out while it is frozen on purpose.

    Raises:
        VectorError: the shapes do not fit.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not len(labels):
        raise VectorError(
            f"expected embeddings (B, D) and labels (B,), B >= 1; got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
        )
    device = embeddings.device
    rows, labels = embeddings[:ROWS].float(), labels.to(device)
    trainable = [] if backbone is None else [weight for weight in backbone.parameters() if weight.requires_grad]
    centred = rows - rows.mean(0)
    gram = centred @ centred.T if len(rows) <= rows.shape[1] else centred.T @ centred
    classes = (labels.sort().values.diff() != 0).sum() + 1
    given = {"loss": loss, "active": active, "gradient": gradient, "reached": _reached(trainable, device)}
    figures = {
        **{name: value for name, value in given.items() if value is not None},
        **_distances(rows, labels[:ROWS]),
        "spread": centred.square().sum(1).mean().sqrt(),
        "classes": classes,
    }
    # All that is wanted of the device goes over in one piece, so that it is waited for once.
    scalars = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(1) for value in figures.values()]
    host = torch.cat([*scalars, gram.flatten()]).cpu()
    values = dict(zip(figures, host[: len(figures)].tolist(), strict=True))
    number = round(values["classes"])
    return Signals(
        loss=values["loss"],
        images=len(embeddings),
        classes=number,
        positive_distance=_mean(values, "positive"),
        negative_distance=_mean(values, "negative"),
        spread=values["spread"],
        rank=_effective_rank(host[len(figures) :].view(len(gram), -1).double()),
        most_rank=max(0, min(len(embeddings) - 1, embeddings.shape[1], number - 1)),
        active=values.get("active"),
        gradient=values.get("gradient"),
        learning_rate=learning_rate,
        trainable=None if backbone is None else len(trainable),
        reached=None if backbone is None else round(values["reached"]),
    )


@torch.no_grad()
def mean_distances(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the mean Euclidean distances of positives and of negatives; 0 where there are none.

    Args:
        embeddings: (B, D) unit rows; the first 512 are looked at.
        labels: (B,) integers on the same device.

    Returns:
        The scalars "positive_distance" and "negative_distance".
    """
    sums = _distances(embeddings[:ROWS].float(), labels[:ROWS])
    return {
        f"{kind}_distance": sums[f"{kind} sum"] / sums[f"{kind}s"].clamp(min=1) for kind in ("positive", "negative")
    }


def _distances(rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the sums of the distances of positives and of negatives, and how many there are."""
    distances = (2 - 2 * rows @ rows.T).clamp(min=0).sqrt()  # (n, n)
    same = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positives, negatives = same & others, ~same
    return {
        "positive sum": (distances * positives).sum(),
        "positives": positives.sum(),
        "negative sum": (distances * negatives).sum(),
        "negatives": negatives.sum(),
    }


def _mean(values: dict[str, float], kind: str) -> float | None:
    return values[f"{kind} sum"] / values[f"{kind}s"] if values[f"{kind}s"] else None


def _effective_rank(gram: Tensor) -> float:
    """Return exp of the entropy of the singular values, from (n, n) products of the rows or columns; NaN from NaN."""
    if not bool(gram.isfinite().all()):
        return math.nan
    squares = torch.linalg.eigvalsh(gram)  # ascending
    rounding = len(gram) * torch.maximum(1e-7 * squares[-1], squares.new_tensor(1e-13))  # of float32 and unit rows
    squares = squares[squares > rounding]
    if not len(squares):
        return 0.0
    singular = squares.sqrt()
    shares = singular / singular.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def _reached(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return how many parameters have a gradient that is not zero; NaN is not zero."""
    found = [weight.grad.any().to(device) for weight in parameters if weight.grad is not None]
    return torch.stack(found).sum() if found else torch.zeros((), device=device)
