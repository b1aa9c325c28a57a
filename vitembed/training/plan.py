"""What a training would be, before it is one: `plan_training`, which `vitembed train --dry-run` prints.

The data are split and dealt into batches as `train` does it, and a step is measured on copies: nothing is written, and
the model, the random states and the data set stay as they were. Seconds and bytes are estimates: of a step, scaled.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vitembed.architecture import SIZES
from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.training.arrangement import Arrangement, arrange
from vitembed.training.classification import fit_head
from vitembed.training.config import TrainConfig
from vitembed.training.costs import StepCosts, measure_step, seconds_to_read
from vitembed.training.data.augment import Augment
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import MAX_CACHE_BYTES
from vitembed.training.learner import Learner, Loss, Miner
from vitembed.training.losses.distillation import DistillationLoss
from vitembed.training.losses.metric import TripletLoss
from vitembed.training.parameter_groups import hidden_matrices
from vitembed.training.random_states import RandomStates
from vitembed.training.stepper import precision_on
from vitembed.vit import ViT

_LOOK_AHEAD = 20  # batches whose sizes are looked at


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training takes, besides what Python and torch have before it.

    What is only there for a moment is not counted: on a processor, peaks were 1.0 to 1.2 times the total, and 1.4 times
    with gradient checkpointing, where activations are the smaller part.

    Attributes:
        weights: of the network, of its moving average and of the loss, where these have some; with their buffers.
        gradients: of what is trained.
        moments: what the optimizer remembers of these: AdamW two numbers for each, Muon one for those of matrices.
        activations: what the network and the loss keep for the backward pass, for a batch or, with gradient caching, a
            chunk of it.
        batch: the pixels of a batch, and as floats those that are changed at once.
        dataset: pixels that are read once and kept, on the processor's side; 0 where they do not fit.
        best: the copy of the best weights so far, on the processor's side.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    batch: int
    dataset: int
    best: int

    @property
    def on_device(self) -> int:
        """What lies on the device that trains."""
        return self.weights + self.gradients + self.moments + self.activations + self.batch

    @property
    def total(self) -> int:
        """All of it; what a processor needs that trains by itself."""
        return self.on_device + self.dataset + self.best


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds that a training takes.

    Attributes:
        reading: of decoding all images once; 0 where they are decoded in every epoch instead.
        step: of one step, once its images are there.
        epoch: of an epoch with its validation; of decoding where that takes longer than the steps.
        total: of all epochs and reading.
    """

    reading: float
    step: float
    epoch: float
    total: float


@dataclass(frozen=True)
class TrainingPlan:
    """What would be trained.

    Attributes:
        classes: that are trained on.
        images: likewise.
        held_out_classes: that validation is on; 0 for no validation.
        held_out_images: likewise.
        batch_size: the largest number of images in a batch.
        batches: in an epoch, a step each.
        epochs: how many.
        network: in words.
        parameters: of the network and of a loss that has some.
        trainable: those of them that are trained.
        loss: in words.
        miner: in words; None for none.
        device: such as "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16"; "auto" is resolved.
        preprocess: fields of the pre-processing.
        augment: fields of the augmentation.
        memory: estimated.
        time: estimated.
    """

    classes: int
    images: int
    held_out_classes: int
    held_out_images: int
    batch_size: int
    batches: int
    epochs: int
    network: str
    parameters: int
    trainable: int
    loss: str
    miner: str | None
    device: str
    precision: str
    preprocess: dict[str, Any]
    augment: dict[str, Any]
    memory: MemoryEstimate
    time: TimeEstimate

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.batches

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types: bytes, seconds, counts, words."""
        memory = {**dataclasses.asdict(self.memory), "total": self.memory.total}
        return {**dataclasses.asdict(self), "steps": self.steps, "memory": memory}

    def figures(self) -> dict[str, str]:
        """Return what a reader wants to know, by the name of the line that it is printed on."""
        memory, time = self.memory, self.time
        held_out = f"{self.held_out_images:,} images of {self.held_out_classes:,} classes"
        parts = {name: _size(getattr(memory, name)) for name in (f.name for f in dataclasses.fields(memory))}
        return {
            "train on": f"{self.images:,} images of {self.classes:,} classes",
            "validate on": held_out if self.held_out_images else "nothing",
            "steps": f"{self.steps:,}: {self.epochs} epochs of {self.batches:,} batches of {self.batch_size} images",
            "network": self.network,
            "parameters": f"{self.parameters:,}, of which {self.trainable:,} are trained",
            "loss": self.loss,
            "miner": self.miner or "none",
            "device": f"{self.device}, {self.precision}",
            "pre-processing": " ".join(str(self.preprocess[name]) for name in ("mode", "resize", "interpolation")),
            "augmentation": _changed(self.augment),
            "memory, estimated": _size(memory.total),
            **{f"  {name}": size for name, size in parts.items()},
            "time, estimated": f"{_duration(time.total)}, {_duration(time.epoch)} an epoch, {time.step:.3g} s a step",
            "  reading": _duration(time.reading),
        }


def plan_training(
    model: Embedder,
    dataset: ImageDataset,
    *,
    loss: Loss | None = None,
    miner: Miner | None = None,
    config: TrainConfig | None = None,
) -> TrainingPlan:
    """Say what `train` would do with the same arguments, and measure what a step takes; in seconds to a minute.

    Args:
        model: as for `train`; it stays as it is.
        dataset: as for `train`; a few of its images are read.
        loss: as for `train`; it stays as it is.
        miner: as for `train`; it stays as it is.
        config: as for `train`.

    Raises:
        ConfigError: if loss, miner, settings and model do not go together.
        DataError: if the data set has too few classes or images.
        ImageError: if none of the images that were tried can be read.
    """
    loss = loss or TripletLoss()
    arranged = arrange(model, dataset, loss, miner, config or TrainConfig())
    config, train_set, held_out = arranged.config, arranged.train_set, arranged.held_out
    batch = max(islice(arranged.sampler, _LOOK_AHEAD), key=len)
    labels = torch.from_numpy(train_set.labels[batch])
    precision = precision_on(model.device, config.precision)
    network, costs = _measured(model, arranged, loss, miner, labels, precision)
    sets = [train_set] if held_out is None else [train_set, held_out]
    parameters = [*network.parameters(), *_parts(loss, nn.Module.parameters)]
    reading = sum(map(len, sets)) * seconds_to_read(dataset, model.preprocess) / max(1, config.decoders)
    kept = _kept(network, sets)
    return TrainingPlan(
        classes=len(train_set.classes),
        images=len(train_set),
        held_out_classes=len(held_out.classes) if held_out else 0,
        held_out_images=len(held_out) if held_out else 0,
        batch_size=len(batch),
        batches=len(arranged.sampler),
        epochs=config.epochs,
        network=_describe(network),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        loss=_in_one_line(loss),
        miner=None if miner is None else _in_one_line(miner),
        device=str(model.device),
        precision=precision,
        preprocess=dataclasses.asdict(model.preprocess),
        augment=dataclasses.asdict(config.augment),
        memory=_memory(network, loss, costs, config, batch=len(batch), kept=kept),
        time=_time(
            costs, config, sets, batch=len(batch), batches=len(arranged.sampler), reading=reading, kept=kept > 0
        ),
    )


def _measured(
    model: Embedder, arranged: Arrangement, loss: Loss, miner: Miner | None, labels: Tensor, precision: str
) -> tuple[EmbeddingNet, StepCosts]:
    """Return a copy of the network with the head that it is to have, and what a step takes; nothing else changes."""
    config, states = arranged.config, RandomStates.now()
    try:
        # One call, so that a miner that is part of the loss stays the loss's.
        network, loss, miner = copy.deepcopy((model.network, loss, miner))
        trained = Embedder(network, model.preprocess, device=model.device, provenance=model.provenance)
        fit_head(trained, arranged.classes, config.head)
        Learner(trained, loss, miner, config, steps=1)  # refuses settings that the network has no use for
        network.zero_grad(set_to_none=True)
        return network, measure_step(network, loss, miner, labels, config, precision)
    finally:
        states.restore()


def _memory(
    network: EmbeddingNet,
    loss: Loss,
    costs: StepCosts,
    config: TrainConfig,
    *,
    batch: int,
    kept: int,
) -> MemoryEstimate:
    """Add up bytes; `batch` is a number of images, `kept` what their pixels take in memory."""
    at_once = min(batch, config.gradient_cache or batch)
    pixels = math.prod(network.input_shape)
    parameters = [*network.parameters(), *_parts(loss, nn.Module.parameters)]
    state = sum(map(_bytes, network.state_dict().values()))
    trained = sum(_bytes(parameter) for parameter in parameters if parameter.requires_grad)
    once = hidden_matrices(network) if config.optimizer == "muon" else set()
    return MemoryEstimate(
        weights=sum(map(_bytes, [*parameters, *network.buffers(), *_parts(loss, nn.Module.buffers)]))
        + (loss.teachers_bytes if isinstance(loss, DistillationLoss) else 0)
        + (state if config.ema is not None else 0),
        gradients=trained,
        moments=2 * trained - sum(_bytes(one) for one in parameters if one.requires_grad and id(one) in once),
        activations=round(costs.saved_fixed + at_once * costs.saved),
        batch=batch * pixels + at_once * 4 * pixels,
        dataset=kept,
        best=state,
    )


def _kept(network: EmbeddingNet, sets: Sequence[ImageDataset]) -> int:
    """Return the bytes of pixels that stay in memory, as `PixelDataset` decides it."""
    sizes = [len(part) * math.prod(network.input_shape) for part in sets]
    return sum(size for size in sizes if size <= MAX_CACHE_BYTES)


def _time(
    costs: StepCosts,
    config: TrainConfig,
    sets: Sequence[ImageDataset],
    *,
    batch: int,
    batches: int,
    reading: float,
    kept: bool,
) -> TimeEstimate:
    """Scale a step's seconds; `reading` is what decoding all images once takes, and `kept` whether once is enough."""
    step = costs.fixed + batch * costs.train
    if config.gradient_cache is not None:
        step += batch * costs.embed  # the pass without a graph
    epoch = batches * step + sum(map(len, sets[1:])) * costs.embed
    if kept:
        return TimeEstimate(reading, step, epoch, reading + config.epochs * epoch)
    epoch = max(epoch, reading)  # while the network computes, other processes decode
    return TimeEstimate(0.0, step, epoch, config.epochs * epoch)


def _parts(loss: Loss, kind: Callable[[nn.Module], Iterator[Any]]) -> list[Tensor]:
    """Return the parameters or buffers of a loss, if it has some."""
    return list(kind(loss)) if isinstance(loss, nn.Module) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _describe(network: EmbeddingNet) -> str:
    """Name the network: size and patch where the size is one of the table, else width and depth."""
    channels, height, width = network.input_shape
    images = f"images of {channels} x {height} x {width}"
    if not isinstance(network.backbone, ViT):
        return f"{network.backbone.timm or type(network.backbone.module).__name__}, {images}"
    vit = network.backbone.config
    sizes = {shape: name for name, shape in SIZES.items()}
    size = sizes.get((vit.width, vit.depth, vit.heads), f"ViT of {vit.depth} blocks of width {vit.width}")
    stem = "convolutional stem" if vit.stem else "linear patches"
    return f"{size}/{vit.patch_size}, {stem}, {network.pooling} pooling, embeddings of {network.dim}, {images}"


def _in_one_line(value: object) -> str:
    return " ".join(str(value).split())


def _changed(augment: Mapping[str, Any]) -> str:
    """Write the settings of an augmentation that are not those of none."""
    none = dataclasses.asdict(Augment())
    return ", ".join(f"{name} {value}" for name, value in augment.items() if value != none[name]) or "none"


def _size(count: float) -> str:
    """Write bytes: 1,500,000 as 1.5 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def _duration(seconds: float) -> str:
    """Write seconds: 5400 as 1.5 hours."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
