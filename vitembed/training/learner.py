"""What turns a batch into a step: augmentation, network, loss, gradient.

A step is the same in all its forms. In several processes each has its share of the batch; with a gradient cache the
share is embedded piece by piece; the loss is of the embeddings of the whole batch in any case, so that neither changes
what is learned. Batch norm is the exception: with a cache it is of a piece.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet, compiling
from vitembed.errors import ConfigError
from vitembed.training.caching import cached_backward
from vitembed.training.classification import accuracy_of
from vitembed.training.config import TrainConfig
from vitembed.training.data.pixels import LabelledPixels
from vitembed.training.distributed import drawing_alike, gather_labels, gather_rows, rank, share_sizes
from vitembed.training.health.signals import Signals, mean_distances, measure
from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.parameter_groups import parameter_groups
from vitembed.training.stepper import Stepper

Loss = Callable[..., Tensor]  # loss(embeddings, labels, tuples) -> scalar, the contract of pytorch-metric-learning
Miner = Callable[[Tensor, Tensor], Any]  # miner(embeddings, labels) -> tuples
Outputs = tuple[Tensor | None, ...]  # (embeddings, logits or None)

# What losses leave behind in a call, by the name that it has in a record.
_LEFT_BY_LOSSES = {"active": "active_share", "drift": "drift", "age": "age"}


def needs_logits(loss: Loss) -> bool:
    """Tell whether a loss is of the logits of a classification head: `loss(logits, labels)`."""
    return bool(getattr(loss, "needs_logits", False))


@dataclass(frozen=True)
class Step:
    """What one step leaves to look at.

    Attributes:
        figures: scalars by name, for which nothing waits: "loss", "positive_distance", "negative_distance"; "accuracy"
            with a classification loss; "active", "drift" and "age" where the loss knows them.
        signals: what was measured for the doctor, if it was to be.
    """

    figures: dict[str, Tensor]
    signals: Signals | None


class Learner:
    """An embedder's network in training.

    Args:
        model: whose network is trained in place.
        loss: of embeddings, or of logits where it says `needs_logits`; its parameters are trained, too.
        miner: chooses tuples for a loss of embeddings; None for none.
        config: the settings.
        steps: how many there will be, for the schedule.

    Raises:
        ConfigError: if the settings and the network or the loss do not go together.
    """

    def __init__(self, model: Embedder, loss: Loss, miner: Miner | None, config: TrainConfig, *, steps: int) -> None:
        self.steps = steps
        self._network, self._loss, self._miner = model.network, loss, miner
        self._classifies = needs_logits(loss)
        self._forward = _forward(model.network, self._classifies, config.compile)
        self._augment, self._chunk = config.augment, config.gradient_cache
        self._random = torch.Generator().manual_seed(config.seed)
        self._device = model.device
        groups = parameter_groups(
            model.network,
            loss,
            model.device,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            layer_decay=config.fine_tune.layer_decay,
            loss_learning_rate=config.loss_learning_rate,
        )
        self._stepper = Stepper(groups, model.device, config, steps=steps, optimizer=config.optimizer)
        self._seed, self._taken = config.seed, 0  # steps
        self._frozen = False
        if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
            raise ConfigError("nothing of this model requires a gradient, so there is nothing to train: thaw it")
        self._parts: dict[str, Any] = {"loss": loss, "miner": miner}
        self._backbone = [p for p in _backbone(model.network) if p.requires_grad]
        inside = {id(parameter) for parameter in self._backbone}
        rest = [p for group in groups for p in group["params"] if p.requires_grad and id(p) not in inside]
        if config.fine_tune.frozen_epochs and not rest:
            raise ConfigError(
                "with a frozen backbone there is nothing to train: give the model a projection (dim), use a loss that "
                "has parameters or classifies, or set frozen_epochs to 0"
            )

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return self._stepper.learning_rate

    def use_rate(self, rate: float) -> None:
        """Take the next step at this learning rate, whatever the schedule says."""
        self._stepper.use_rate(rate)

    def step(self, batch: LabelledPixels, *, look: bool = False) -> Step:
        """Take one step.

        Args:
            batch: this process's share of a batch, on any device.
            look: whether to measure signals for the doctor, which waits for the device.

        Raises:
            ConfigError: if the network cannot be compiled here.
        """
        sizes = share_sizes(len(batch.labels))
        start = sum(sizes[: rank()])
        on_host = gather_labels(batch.labels, sizes)
        labels = on_host.to(self._device, non_blocking=True)
        positions = gather_labels(batch.positions.to(self._device, non_blocking=True), sizes)
        # Drawn for the whole batch, so that an image is changed the same way however many processes share the work.
        changes = self._augment.draw(sum(sizes), _side_lengths(batch.pixels), self._random)[
            start : start + sizes[rank()]
        ]

        def changed(share: Tensor) -> Tensor:
            """Return pixels (b, C, H, W) of images of the share, by their places in a row, after augmentation."""
            part = slice(int(share[0]), int(share[-1]) + 1)
            pixels = batch.pixels[part].to(self._device, non_blocking=True)
            return changes[part].apply(pixels)

        def outputs(share: Tensor) -> Outputs:
            """Return embeddings (b, D) and logits (b, K) or None of images of the share."""
            pixels = changed(share)  # outside of autocast, which would move pixels in bfloat16
            with self._stepper.autocast():
                return self._forward(pixels)

        def loss_of(outputs: Outputs) -> Tensor:
            """Return the loss of the whole batch from the outputs for the share."""
            embeddings, logits = outputs
            with drawing_alike(self._seed + self._taken):
                if logits is not None:
                    return self._loss(gather_rows(logits, sizes), labels)
                return self._metric_loss(gather_rows(_known(embeddings), sizes), labels, on_host, positions, taught)

        share = torch.arange(sizes[rank()])
        taught = self._taught(changed, share, sizes)
        if self._chunk is None:
            embedded = outputs(share)
            loss = loss_of(embedded)
            self._stepper.backward(loss)
        else:
            # As many chunks in all processes, which may have to meet in each.
            number = min(-(-max(sizes) // self._chunk), min(sizes))
            embedded, loss = cached_backward(
                outputs, torch.tensor_split(share, number), loss_of, self._stepper.backward, network=self._network
            )
        gradient = self._stepper.clip()
        with torch.no_grad():
            embeddings = gather_rows(_known(embedded[0]).detach(), sizes)
            figures = {"loss": loss.detach(), **mean_distances(embeddings, labels)}
            if embedded[1] is not None:
                figures["accuracy"] = accuracy_of(gather_rows(embedded[1].detach(), sizes), labels)
        for name, attribute in _LEFT_BY_LOSSES.items():
            if (figure := getattr(self._loss, attribute, None)) is not None:
                figures[name] = figure
        signals = self._measure(embeddings, labels, figures, gradient) if look else None
        self._stepper.advance()
        self._taken += 1
        return Step(figures, signals)

    def _measure(self, embeddings: Tensor, labels: Tensor, figures: dict[str, Tensor], gradient: Tensor) -> Signals:
        # Half precision finds its scale by overflowing now and then: no fault, and the step is skipped.
        skipped = self._stepper.scales and not bool(gradient.isfinite())
        own = getattr(self._loss, "batch_loss", None)  # with a memory the total is no longer to be held to a margin
        return measure(
            embeddings,
            labels,
            figures["loss"] if own is None else own,
            active=figures.get("active"),
            gradient=None if skipped else gradient,
            learning_rate=self.learning_rate,
            backbone=None if self._frozen else self._network.backbone,
        )

    def _taught(self, changed: Callable[[Tensor], Tensor], share: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Return what teachers say of the whole batch's images, a row each; None with a loss that has no teachers."""
        if not isinstance(self._loss, DistillationLoss):
            return None
        rows = []
        for part in torch.split(share, self._chunk or len(share)):
            pixels = changed(part)
            with self._stepper.autocast():
                rows.append(self._loss.teach(pixels))
        return gather_rows(torch.cat(rows), sizes)

    def _metric_loss(
        self, embeddings: Tensor, labels: Tensor, on_host: Tensor, positions: Tensor, taught: Tensor | None
    ) -> Tensor:
        if taught is not None:
            return self._loss(embeddings, labels, taught=taught)
        tuples = self._miner(embeddings, labels) if self._miner else None
        if getattr(self._loss, "reads_labels_on_host", False):  # it would wait for the device to have them there
            labels = on_host
        if getattr(self._loss, "takes_positions", False):
            return self._loss(embeddings, labels, tuples, positions)
        return self._loss(embeddings, labels, tuples)

    def freeze(self, frozen: bool) -> None:
        """Put the network into training mode; keep the backbone as it is, or let what was trainable of it learn.

        A frozen batch norm does not remember the images that it sees, either.
        """
        self._frozen = frozen
        self._network.train()
        for parameter in self._backbone:
            parameter.requires_grad_(not frozen)
        for part in self._network.backbone.modules():
            if frozen and isinstance(part, _BatchNorm):
                part.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return what the training is continued from, the network apart."""
        return {
            "stepper": self._stepper.state_dict(),
            "steps": self._taken,
            "augmentation": self._random.get_state(),
            **{name: _state(part) for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._stepper.load_state_dict(state["stepper"])
        self._taken = state["steps"]
        self._random.set_state(state["augmentation"])
        for name, part in self._parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])


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


def _backbone(network: EmbeddingNet) -> Iterator[nn.Parameter]:
    """Yield the parameters of a backbone without those of a classification head of its own."""
    for name, parameter in network.backbone.named_parameters():
        if not name.startswith(("head.", "pre_logits.", "head_dist.")):
            yield parameter


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


def _state(part: object) -> Any:
    """Return what a loss or a miner is continued from; empty for one that remembers nothing."""
    return part.state_dict() if hasattr(part, "state_dict") else {}


def _side_lengths(pixels: Tensor) -> tuple[int, int]:
    """Return (height, width) of (B, C, H, W) pixels."""
    return pixels.shape[-2], pixels.shape[-1]


def _known(tensor: Tensor | None) -> Tensor:
    """Return a tensor that is always there."""
    if tensor is None:
        raise RuntimeError("a network always gives embeddings")
    return tensor
