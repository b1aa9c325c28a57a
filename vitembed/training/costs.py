"""What a training step takes, measured on a few images: seconds, and bytes kept for the backward pass.

Only network, loss and miner are used, not the data, but for how long its images take to read.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitembed.embedding_net import EmbeddingNet, evaluating
from vitembed.errors import ImageError
from vitembed.preprocess import Preprocess
from vitembed.training.allocation import kept_memory
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.learner import Loss, Miner, cheaper_training, needs_logits
from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.optimizers import build_optimizer
from vitembed.training.parameter_groups import parameter_groups

_ENOUGH = 0.25  # seconds: in what takes less, the clock and what comes once a call weigh too much
_LOSS_ROWS = 1024  # the loss of a larger batch is measured on so many, and taken to grow with their square
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepCosts:
    """What the parts of a step take.

    Attributes:
        train: seconds an image, for its changes, the network forward and backward, and teachers where there are some.
        embed: seconds an image, for the network at inference.
        fixed: seconds a step, for loss, miner and optimizer.
        saved: bytes an image that the network keeps for its backward pass.
        saved_fixed: bytes kept however many images there are, among them the loss's for the whole batch.
    """

    train: float
    embed: float
    fixed: float
    saved: float
    saved_fixed: float


def measure_step(
    network: EmbeddingNet, loss: Loss, miner: Miner | None, labels: Tensor, config: TrainConfig, precision: str
) -> StepCosts:
    """Measure a step on noise.

    Network and loss are trained a little, and torch's random state goes on: pass copies, and put the state back.

    Args:
        network: with the head that it is trained with, where its device is to be.
        loss: of embeddings or logits.
        miner: for the loss; None for none.
        labels: (B,) int64, those of a whole batch.
        config: the settings; `compile` is left out of the measurement.
        precision: "fp32", "bf16" or "fp16".
    """
    device = network.mean.device
    at_once = config.gradient_cache or len(labels)
    step = _Step(network, loss, config, precision, device)
    network.train()
    with kept_memory(device), cheaper_training(network, config):
        step.run(2)  # memory is taken and kernels are chosen once
        train = _seconds_each(step.run, device, at_once)
        optimizer = _optimizer_seconds(network, loss, config, device)
        saved, saved_fixed = step.saved()
    if config.gradient_checkpointing:  # the blocks' insides come back one at a time
        with cheaper_training(network, dataclasses.replace(config, gradient_checkpointing=False)):
            saved += (step.saved()[0] - saved) / network.vit.config.depth
    loss_seconds, loss_saved = _loss_costs(network, loss, miner, labels.to(device))
    return StepCosts(
        train=train,
        embed=_seconds_each(step.embed, device, at_once),
        fixed=loss_seconds + optimizer,
        saved=saved,
        saved_fixed=saved_fixed + loss_saved,
    )


def seconds_to_read(dataset: ImageDataset, preprocess: Preprocess, *, images: int = 8) -> float:
    """Return the seconds that one process takes for an image, measured on a few that lie evenly in the data set.

    Raises:
        ImageError: if none of them can be read.
    """
    positions = np.unique(np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int)).tolist()
    started, errors = time.perf_counter(), []
    for position in positions:
        try:
            preprocess(dataset.images[position])
        except ImageError as error:
            errors.append(error)
    if len(errors) == len(positions):
        raise errors[0]
    return (time.perf_counter() - started) / len(positions)


class _Step:
    """The parts of a step that grow with the number of images."""

    def __init__(
        self, network: EmbeddingNet, loss: Loss, config: TrainConfig, precision: str, device: torch.device
    ) -> None:
        self._network = network
        self._loss, self._classifies = loss, needs_logits(loss)
        self._augment = config.augment
        self._precision, self._device = precision, device

    def run(self, count: int) -> None:
        """Change images, and pass them forward and backward."""
        out = self._forward(count)
        if out.requires_grad:
            (out * torch.randn_like(out)).sum().backward()  # type: ignore[no-untyped-call]

    def embed(self, count: int) -> None:
        """Pass images forward as validation does."""
        with evaluating(self._network), torch.inference_mode():
            self._network(self._noise(count))

    def saved(self) -> tuple[float, float]:
        """Return the bytes kept for the backward pass: for each image, and however many there are."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._network.parameters()}
        two, four = (_saved_bytes(partial(self._forward, count), weights) for count in (2, 4))
        return (four - two) / 2, max(0.0, 2 * two - four)

    def _forward(self, count: int) -> Tensor:
        pixels = self._augment(self._noise(count))
        dtype = _DTYPES.get(self._precision)
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            if isinstance(self._loss, DistillationLoss):
                self._loss.teach(pixels)
            if not self._classifies:
                embeddings: Tensor = self._network(pixels)
                return embeddings
            _, logits = self._network.forward_with_logits(pixels)
        assert logits is not None, "the network was to have a head"
        return logits

    def _noise(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count, *self._network.input_shape), dtype=torch.uint8, device=self._device)


def _loss_costs(network: EmbeddingNet, loss: Loss, miner: Miner | None, labels: Tensor) -> tuple[float, float]:
    """Return seconds and saved bytes of a loss of a whole batch of random rows."""
    count = min(len(labels), _LOSS_ROWS)
    growth = (len(labels) / count) ** 2
    labels = labels[:count]
    width = network.vit.config.num_classes if needs_logits(loss) else network.dim
    rows = F.normalize(torch.randn(count, width, device=labels.device), dim=1).requires_grad_()

    def forward() -> Tensor:
        """Return the loss of the rows, as a training asks for it."""
        if needs_logits(loss):
            return loss(rows, labels)
        if isinstance(loss, DistillationLoss):
            value: Tensor = loss(rows, labels, taught=rows.detach())
            return value
        tuples = miner(rows, labels) if miner else None
        if getattr(loss, "takes_positions", False):
            return loss(rows, labels, tuples, torch.arange(count, device=labels.device))
        return loss(rows, labels, tuples)

    def step() -> None:
        value = forward()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]

    saved = _saved_bytes(forward, {rows.untyped_storage().data_ptr()})
    return growth * _seconds(step, labels.device), growth * saved


def _optimizer_seconds(network: nn.Module, loss: Loss, config: TrainConfig, device: torch.device) -> float:
    """Return the seconds of a step of the optimizer, whose moments are there already."""
    optimizer = build_optimizer(
        config.optimizer, parameter_groups(network, loss, device, learning_rate=1e-6, weight_decay=config.weight_decay)
    )
    optimizer.step()
    return _seconds(optimizer.step, device)


def _seconds_each(run: Callable[[int], None], device: torch.device, at_once: int) -> float:
    """Return the seconds an image: of as many as take long enough, or as come at once or fit into memory."""
    count = min(4, at_once)
    while True:
        seconds = _seconds(partial(run, count), device)
        if seconds >= _ENOUGH or count == at_once:
            return seconds / count
        try:
            run(more := min(4 * count, at_once))  # for the first time of this size
        except torch.OutOfMemoryError:
            return seconds / count
        count = more


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _saved_bytes(forward: Callable[[], Tensor], known: set[int]) -> int:
    """Return the size of the storages that a forward pass keeps for its backward pass, but for the known ones."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # as long as it lives no storage is given to another tensor
    total = sum(size for address, size in sizes.items() if address not in known)
    del out
    return total
