"""What the collapse doctor says of trainings that are broken on purpose, and of healthy ones.

    python benchmarks/collapse.py

A tiny ViT (2 layers, 32 wide) learns scikit-learn's digits from random weights, in batches of 8 classes x 4 images,
with AdamW, a short warm-up and a cosine; the doctor looks at every 5th step and tells a cause that lasts for 10 looks
(or the multiple that the cause has). A run ends at the first fatal diagnosis, else after 300 steps. The table has a row
for each run: what was broken, after how many steps each cause was told, and the messages below it. About three minutes
on one core.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from timing import machine
from torch import Tensor, nn

from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.training import ClassBalancedSampler, ContrastiveLoss, TripletLoss
from vitembed.training.health.collapse import CollapseDoctor, Diagnosis
from vitembed.training.health.signals import measure
from vitembed.vit import ViTConfig

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """A training, broken or not.

    Attributes:
        name: of the cause that is to be told, with what tells runs apart in brackets where there are several;
            "healthy" if none is to be, "any" if it does not matter which.
        how: what is done.
        loss: makes the loss, for a number of classes and a width of embeddings.
        rate: the highest learning rate.
        weight_decay: of matrices.
        relabel: what becomes of the labels of a batch.
        prepare: what becomes of the network.
        images: how many of each class there are; None for all.
    """

    name: str
    how: str
    loss: Callable[[int, int], Loss] = lambda *_: TripletLoss(0.2)
    rate: float = 1e-3
    weight_decay: float = 0.05
    relabel: Callable[[Tensor], Tensor] = lambda labels: labels
    prepare: Callable[[nn.Module], object] = lambda network: network
    images: int | None = None

    @property
    def cause(self) -> str:
        """The fixed word."""
        return self.name.split(" ")[0]


def mean_distances(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean distance of positives and of negatives, from (B, D) unit rows."""
    distances = (2 - 2 * z @ z.T).clamp(min=1e-6).sqrt()
    same = labels[:, None] == labels[None, :]
    return distances[same & ~torch.eye(len(z), dtype=torch.bool)].mean(), distances[~same].mean()


class Saturated(nn.Module):
    """A sigmoid so steep that it is flat wherever the distances are."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        near, far = mean_distances(z, labels)
        return torch.sigmoid(1e4 * (1 + near - far))


class Unbounded(nn.Module):
    """A learned scale before a difference that becomes negative: the loss falls without end."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        near, far = mean_distances(z, labels)
        return torch.exp(10 * self.scale) * (near - far)


class OneCoordinate(nn.Module):
    """The variance of the first coordinate alone, to be enlarged: all embeddings end at its two ends."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return -z[:, 0].var()


class RootOfZero(nn.Module):
    """The distances of all pairs, an image and itself among them, whose root has no derivative."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        squared = (z[:, None] - z[None, :]).square().sum(-1)
        return (squared.sqrt() * (labels[:, None] == labels[None, :])).mean()


class LogOfNegative(nn.Module):
    """The logarithm of what becomes negative as soon as classes have parted."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        near, far = mean_distances(z, labels)
        return near + torch.log(0.6 - far)


def proxies(classes: int, width: int) -> Loss:
    """Return ProxyAnchor (Kim et al. 2020, arXiv:2003.13911), as pytorch-metric-learning has it."""
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    loss: Loss = ProxyAnchorLoss(classes, width)
    return loss


def freeze(network: nn.Module) -> None:
    """Let no parameter of a network be trained."""
    network.requires_grad_(False)


HEALTHY = (
    Run("healthy (all)", "triplet, mining all"),
    Run("healthy (semihard)", "triplet, mining semihard", lambda *_: TripletLoss(0.2, "semihard")),
    Run("healthy (contrastive)", "contrastive", lambda *_: ContrastiveLoss()),
    Run("healthy (proxies)", "ProxyAnchor", proxies),
)
BROKEN = (
    Run("not-finite (embeddings)", "weight decay 1e4", weight_decay=1e4),
    Run("not-finite (loss)", "logarithm of 0.6 less a distance", lambda *_: LogOfNegative()),
    Run("not-finite (gradient)", "root of the distance of an image and itself", lambda *_: RootOfZero()),
    Run("one-class", "labels all alike", relabel=torch.zeros_like),
    Run("no-positives", "labels all different", relabel=lambda labels: torch.arange(len(labels))),
    Run("frozen-backbone", "requires_grad off, ProxyAnchor", proxies, prepare=freeze),
    Run("no-learning-rate", "learning rate 1e-12", rate=1e-12),
    Run("no-active-triplets (never)", "mining semihard, margin 1e-9", lambda *_: TripletLoss(1e-9, "semihard")),
    Run("equal-distances (hard)", "mining hard from scratch", lambda *_: TripletLoss(0.2, "hard"), rate=1e-2),
    Run("equal-distances (pull)", "contrastive, negative margin 0", lambda *_: ContrastiveLoss(0.0, 0.0), rate=3e-3),
    Run("gradient-vanishing", "a saturated sigmoid", lambda *_: Saturated()),
    Run("loss-at-margin", "labels at random", relabel=lambda labels: labels[torch.randperm(len(labels))]),
    Run("gradient-exploding", "a learned scale without bound", lambda *_: Unbounded(), rate=0.1),
    Run("rank-falling", "a loss of one coordinate", lambda *_: OneCoordinate()),
    Run("spread-falling", "contrastive, negative margin 0.02", lambda *_: ContrastiveLoss(0.0, 0.02)),
    Run("no-active-triplets (any more)", "4 images of each class: soon learned", images=4),
)
CHAOTIC = (  # any of several causes may come first
    Run("any (all)", "triplet, learning rate 10", rate=10.0),
    Run("any (contrastive)", "contrastive, learning rate 10", lambda *_: ContrastiveLoss(), rate=10.0),
)


def tiny(width: int = 32, seed: int = 0) -> nn.Module:
    """Return an untrained network for grey images of 8 x 8."""
    config = ViTConfig((8, 8), 4, 1, width=width, depth=2, heads=2, stem=((8, 2), (width, 2)))
    preprocess = Preprocess.grey((8, 8), resize="squash", invert=False)
    return Embedder.create(config, preprocess=preprocess, seed=seed, device="cpu").network


def tellings(
    run: Run,
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int = 300,
    every: int = 5,
    patience: int = 10,
) -> Iterator[tuple[int, Diagnosis]]:
    """Train, and yield what the doctor tells and at which step; end after what is fatal.

    Args:
        run: how.
        network: is trained in place.
        pixels: (N, 1, 8, 8).
        labels: (N,) int64.
        steps: at most.
        every: how many steps lie between two looks.
        patience: of the doctor, in looks.
    """
    torch.manual_seed(0)
    if run.images:
        few = torch.cat([(labels == label).nonzero()[: run.images, 0] for label in labels.unique()])
        pixels, labels = pixels[few], labels[few]
    loss = run.loss(int(labels.max()) + 1, network.dim)
    run.prepare(network)
    groups = _groups(network, loss, run.weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=run.rate)
    doctor = CollapseDoctor.of_loss(loss, patience=patience)
    network.train()
    for step, batch in zip(range(steps), _batches(labels), strict=False):
        rate = run.rate * (min(1.0, (step + 1) / 20) if step < 20 else 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        marks = run.relabel(labels[batch])
        embeddings = network(pixels[batch])
        value = loss(embeddings, marks)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if step % every == 0:
            signals = measure(
                embeddings,
                marks,
                value,
                active=getattr(loss, "active_share", None),
                gradient=norm,
                learning_rate=rate,
                backbone=network.backbone,
            )
            diagnosis = doctor.observe(step, signals)
            if diagnosis:
                yield step, diagnosis
            if diagnosis and diagnosis.fatal:
                return
        optimizer.step()
        optimizer.zero_grad()


def _groups(network: nn.Module, loss: Loss, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices alone; the parameters of the loss are trained, too."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    others += list(loss.parameters()) if isinstance(loss, nn.Module) else []
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _batches(labels: Tensor) -> Iterator[list[int]]:
    """Yield batches without end."""
    sampler = ClassBalancedSampler(labels.numpy(), classes_per_batch=8, images_per_class=4)
    while True:
        yield from sampler
        sampler.epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", help="causes, such as equal-distances; 'healthy' for healthy runs")
    options = parser.parse_args()

    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    torch.set_num_threads(1)
    print(machine())
    print(f"{'run':<32}{'provoked by':<46}{'told after':>12}  diagnosis")
    for run in HEALTHY + BROKEN + CHAOTIC:
        if options.only and run.cause not in options.only:
            continue
        name, how = run.name, run.how
        for step, diagnosis in tellings(run, tiny(), pixels, labels, steps=options.steps):
            kind = "stops" if diagnosis.fatal else "warns"
            print(f"{name:<32}{how:<46}{step:>6} steps  {kind}: {diagnosis}")
            name, how = "", ""  # the rows below belong to the same run
        if name:
            print(f"{name:<32}{how:<46}{'never':>12}")


if __name__ == "__main__":
    main()
