"""What turns a batch into a step: network, loss, optimizer and the schedule of its rate."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet, compiling
from vitembed.training.classification import accuracy_of
from vitembed.training.config import TrainConfig
from vitembed.training.stepper import Stepper, check_finite

Record = dict[str, Any]  # the figures of one epoch, as they stand in history.json
Loss = Callable[..., Tensor]  # loss(embeddings, labels, tuples) -> scalar, the contract of pytorch-metric-learning
Miner = Callable[[Tensor, Tensor], Any]  # miner(embeddings, labels) -> tuples


def needs_logits(loss: Loss) -> bool:
    """Tell whether a loss is of the logits of a classification head: `loss(logits, labels)`."""
    return bool(getattr(loss, "needs_logits", False))


class Learner:
    """An embedder's network in training.

    Args:
        model: whose network is trained in place.
        loss: of embeddings, or of logits where it says `needs_logits`; its parameters are trained, too.
        miner: chooses tuples for a loss of embeddings; None for none.
        config: the settings.
        steps: how many there will be, for the schedule.

    Raises:
        ConfigError: if several processes were launched.
    """

    def __init__(self, model: Embedder, loss: Loss, miner: Miner | None, config: TrainConfig, *, steps: int) -> None:
        self.steps = steps
        self._network, self._loss, self._miner = model.network, loss, miner
        self._forward = _forward(model.network, needs_logits(loss), config.compile)
        self._augment = config.augment
        self._random = torch.Generator().manual_seed(config.seed)
        self._device = model.device
        self._stepper = Stepper(model.network, loss, model.device, config, steps=steps)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return self._stepper.learning_rate

    def run_epoch(self, batches: Iterable[tuple[Tensor, Tensor]], bar: Any) -> Record:
        """Take a step a batch and return the means of the steps' figures.

        Raises:
            TrainingError: if the loss becomes NaN or infinite.
            ConfigError: if the network cannot be compiled here.
        """
        self._network.train()
        steps: list[dict[str, Tensor]] = []
        for number, (pixels, labels) in enumerate(batches):
            steps.append(self._step(pixels, labels))
            if number % 10 == 0:  # reading a figure waits for the device
                shown = {name: f"{value.item():.3f}" for name, value in steps[-1].items()}
                bar.set_postfix(shown, refresh=False)
                check_finite(steps[-1]["loss"].item())
            bar.update()
        self._network.eval()
        means = {name: torch.stack([step[name] for step in steps]).mean().item() for name in steps[0]}
        check_finite(means["loss"])
        return means

    def _step(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pixels, labels = pixels.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        pixels = self._augment(pixels, self._random)  # outside of autocast, which would move pixels in bfloat16
        with self._stepper.autocast():
            embeddings, logits = self._forward(pixels)
        if logits is None:
            loss = self._loss(embeddings, labels, self._miner(embeddings, labels) if self._miner else None)
        else:
            loss = self._loss(logits, labels)
        self._stepper.step(loss)
        figures = {"loss": loss.detach(), **_distances(embeddings.detach(), labels)}
        if logits is not None:
            figures["accuracy"] = accuracy_of(logits.detach(), labels)
        active = getattr(self._loss, "active_share", None)
        return figures if active is None else {**figures, "active": active}


@contextmanager
def cheaper_training(network: EmbeddingNet, config: TrainConfig) -> Iterator[None]:
    """Switch on what a configuration asks for of patch dropout and gradient checkpointing, and put it back afterwards.

    Raises:
        ConfigError: if the backbone is no ViT of ours, which has neither.
    """
    wanted = {name: getattr(config, name) for name in ("patch_dropout", "gradient_checkpointing")}
    wanted = {name: value for name, value in wanted.items() if value}
    before = {name: getattr(network.vit, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(network.vit, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(network.vit, name, value)


def _forward(
    network: EmbeddingNet, classifies: bool, compiled: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Return the way from pixels to embeddings (B, D) and logits (B, K), which are None unless they are wanted."""

    def plain(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return network.forward_with_logits(pixels) if classifies else (network(pixels), None)

    if not compiled:
        return plain
    translated = torch.compile(plain)  # the network itself stays as it is: validation and saving know nothing of this

    def call(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Call the compiled function."""
        with compiling():
            return translated(pixels)

    return call


@torch.no_grad()
def _distances(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the mean Euclidean distance of a batch's positives and of its negatives, from (B, D) unit rows."""
    distances = (2 - 2 * embeddings @ embeddings.T).clamp(min=0).sqrt()  # (B, B)
    same = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives, negatives = same & others, ~same
    return {
        "positive_distance": (distances * positives).sum() / positives.sum().clamp(min=1),
        "negative_distance": (distances * negatives).sum() / negatives.sum().clamp(min=1),
    }
