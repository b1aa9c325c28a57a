"""A learning-rate range test: train a copy of the model at rates that grow from step to step, and watch the loss.

The test is Smith's (2017, arXiv:1506.01186, section 3.3), with rates that grow exponentially. What is watched is the
mean over all terms of the loss, zeros included: `loss * active_share`. The plain value of `TripletLoss`, a mean of the
non-zero terms, stays near the margin however well the network learns.

The suggestion is half of the rate at which that mean, smoothed evenly to both sides, is lowest. On digits and stripes,
with triplet (all, semihard, hard), contrastive, ProxyAnchor and multi-similarity losses and three seeds each, 200 steps
at the rate of a rule ended with a recall@1 that lay below that of the best rate of ten by 0.08 in the mean (0.19 at
worst), against 0.15 (0.35) for a tenth of the lowest point and 0.20 (0.44) for the steepest descent; by the plain loss
the lowest point itself missed by 0.18 (0.80). A training of many epochs can do with less than what suits 200 steps.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitembed.decoding import default_workers
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, TrainingError
from vitembed.training.classification import ShuffledBatches, check_classifiable, fit_head
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import PixelDataset
from vitembed.training.data.sampling import ClassBalancedSampler
from vitembed.training.losses.metric import TripletLoss

Floats = NDArray[np.float64]

LOWEST, HIGHEST = 1e-7, 1.0  # rates
WIDTH = 0.04  # deviation of the smoothing, as a share of the steps
SHARE = 0.5  # of the rate where the loss is lowest
DIVERGED = 4.0  # times the first losses, above 0: the test ends
SURE = 5.0  # deviations of smoothed noise by which the loss must fall; in the trainings above it fell by 7 and more

LEAST = 0.005  # share of the first loss by which it must fall; in the trainings above it was 0.04 and more


@dataclass(frozen=True, eq=False)
class RateCurve:
    """What a range test found.

    Attributes:
        rates: (S,) float64, the learning rate of each step, ascending.
        losses: (S,) float64, the mean over all terms of the loss before that step.
        smoothed: (S,) float64, the same, smoothed.
        suggestion: a learning rate for `TrainConfig`.
    """

    rates: Floats
    losses: Floats
    smoothed: Floats
    suggestion: float


def find_learning_rate(
    model: Embedder,
    dataset: ImageDataset,
    *,
    loss: Callable[..., Tensor] | None = None,
    miner: Callable[[Tensor, Tensor], Any] | None = None,
    config: TrainConfig | None = None,
    steps: int = 100,
) -> RateCurve:
    """Suggest a learning rate for `train`, which takes the same arguments.

    Model, loss and miner, and the random states of Python, numpy and torch (on the processor and on CUDA), are as they
    were before: copies are trained. Images that `train` would hold out are left alone.

    Args:
        model: the embedder.
        dataset: labelled images.
        loss: as for `train`.
        miner: as for `train`.
        config: the settings; the rate, its schedule, epochs and compile do not matter here, and fp16 counts as fp32.
        steps: how many rates there are; at least 20.

    Raises:
        ConfigError: if steps is below 20, or nothing of the model can be trained.
        DataError: if the data set has too few classes or images.
        ImageError: if too many images cannot be read.
        TrainingError: if no rate lowers the loss.
    """
    if steps < 20:
        raise ConfigError(f"a range test needs at least 20 steps; got {steps}")
    config = config or TrainConfig()
    with _same_random_states(model.device):
        torch.manual_seed(config.seed)
        trial = _Trial(model, dataset, copy.deepcopy(loss or TripletLoss()), copy.deepcopy(miner), config)
        rates: Floats = np.geomspace(LOWEST, HIGHEST, steps)
        losses = _until_it_diverges(trial.run(rates), calm=steps // 5)
    return _conclude(rates[: len(losses)], losses, calm=steps // 5, width=WIDTH * steps)


class _Trial:
    """A copy of an embedder that learns at given rates."""

    def __init__(
        self, model: Embedder, dataset: ImageDataset, loss: Callable[..., Tensor], miner: Any, config: TrainConfig
    ) -> None:
        self._classifies = bool(getattr(loss, "needs_logits", False))
        self._workers = default_workers() if config.workers is None else config.workers
        copied = Embedder(
            copy.deepcopy(model.network), model.preprocess, device=model.device, provenance=model.provenance
        )
        self._data = self._training_part(copied, dataset, config)
        self._network = copied.network.train()
        if config.patch_dropout:
            self._network.vit.patch_dropout = config.patch_dropout
        if config.gradient_checkpointing:
            self._network.vit.gradient_checkpointing = True
        self._loss = loss.to(model.device) if isinstance(loss, nn.Module) else loss
        self._miner, self._config, self._device = miner, config, model.device
        self._draws = torch.Generator().manual_seed(config.seed)

    def _training_part(self, model: Embedder, dataset: ImageDataset, config: TrainConfig) -> PixelDataset:
        """Return the images that `train` would train on; a model that is to classify them gets a head for it."""
        train_set, held_out = dataset.split(
            config.validation or ("images" if self._classifies else "classes"),
            share=config.validation_share,
            seed=config.seed,
            again=model.provenance.get("held-out classes", ()),
        )
        if self._classifies:
            check_classifiable(model, train_set, held_out)
        fit_head(model, train_set.classes if self._classifies else (), config.head)
        return PixelDataset(train_set, model.preprocess, workers=self._workers)

    def run(self, rates: Floats) -> Iterator[Tensor]:
        """Take a step at each rate, and yield the mean over all terms of the loss before it, a scalar."""
        groups = self._groups()
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not parameters:
            raise ConfigError("nothing of this model requires a gradient, so no rate can matter: thaw the network")
        optimizer = torch.optim.AdamW(groups, lr=LOWEST)
        for rate, (pixels, labels) in zip(rates.tolist(), self._batches(), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = self._value(pixels.to(self._device), labels.to(self._device))
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(parameters, self._config.clip)
            optimizer.step()
            optimizer.zero_grad()
            yield value.detach() * getattr(self._loss, "active_share", 1.0)

    def _value(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        pixels = self._config.augment(pixels, self._draws)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16()):
            if self._classifies:
                logits = self._network.forward_with_logits(pixels)[1]
            else:
                embeddings = self._network(pixels)
        if self._classifies:
            return self._loss(logits, labels)
        return self._loss(embeddings, labels, self._miner(embeddings, labels) if self._miner else None)

    def _is_bf16(self) -> bool:
        has = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        return self._config.precision == "bf16" or (self._config.precision == "auto" and has)

    def _groups(self) -> list[dict[str, Any]]:
        """Decay matrices; leave norms, biases, positions, single tokens and what the loss learns alone."""
        named = [(name, weight) for name, weight in self._network.named_parameters() if weight.requires_grad]
        plain = {name for name, weight in named if weight.ndim < 2 or name.endswith(("pos_embed", "_token"))}
        others = [weight for name, weight in named if name in plain]
        others += list(self._loss.parameters()) if isinstance(self._loss, nn.Module) else []
        matrices = [weight for name, weight in named if name not in plain]
        return [
            {"params": matrices, "weight_decay": self._config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels without end."""
        config, labels = self._config, self._data.dataset.labels
        sampler: ShuffledBatches | ClassBalancedSampler
        if self._classifies:
            sampler = ShuffledBatches(len(labels), config.classes_per_batch * config.images_per_class, seed=config.seed)
        else:
            sampler = ClassBalancedSampler(
                labels,
                classes_per_batch=config.classes_per_batch,
                images_per_class=config.images_per_class,
                seed=config.seed,
            )
        while True:
            sampler.epoch += 1
            for batch in self._data.batches(sampler, workers=self._workers):
                yield batch[0], batch[1]


def _until_it_diverges(values: Iterator[Tensor], *, calm: int) -> Floats:
    """Collect scalars up to where they are NaN or infinite, or 4 times what they are in the first, calm steps."""
    losses: list[float] = []
    waiting: list[Tensor] = []
    for value in values:
        waiting.append(value.float())
        if len(waiting) == 10:  # reading a figure waits for the device
            losses += torch.stack(waiting).tolist()
            waiting = []
            first = float(np.mean(losses[:calm]))
            limit = first + (DIVERGED - 1) * abs(first) if len(losses) > calm else math.inf
            if not np.mean(losses[-10:]) <= limit:  # NaN is not
                break
    losses += torch.stack(waiting).tolist() if waiting else []
    finite = np.isfinite(losses)
    return np.asarray(losses[: len(losses) if finite.all() else int(finite.argmin())], dtype=np.float64)


def _conclude(rates: Floats, losses: Floats, *, calm: int, width: float) -> RateCurve:
    """Draw the conclusion from a curve whose first steps are at rates too low to matter.

    Args:
        rates: (S,).
        losses: (S,) at these rates.
        calm: how many the first steps are.
        width: of the smoothing, in steps.

    Raises:
        TrainingError: if the loss never falls by more than its noise.
    """
    still = losses[:calm]
    if len(still) < calm:
        raise TrainingError(f"the loss becomes NaN or infinite at a learning rate of {LOWEST:g}: look at loss and data")
    smoothed = _smooth(losses, width)
    lowest = int(smoothed.argmin())
    noise = float(still.std(ddof=1)) / math.sqrt(2 * math.sqrt(math.pi) * width)  # of a mean with Gaussian weights
    fall = float(still.mean() - smoothed[lowest])
    if not fall > max(SURE * noise, LEAST * abs(float(still.mean()))):
        raise TrainingError(
            f"no learning rate from {LOWEST:g} to {rates[-1]:.2g} lowers the loss by more than its noise: it is "
            f"{still.mean():.4g} at first and {smoothed[lowest]:.4g} at best; check labels, loss and miner, and "
            "whether the network has learned this already"
        )
    return RateCurve(rates, losses, smoothed, float(SHARE * rates[lowest]))


def _smooth(values: Floats, width: float) -> Floats:
    """Return means with Gaussian weights of a deviation of `width` steps, which sum to 1 at the ends, too."""
    places = np.arange(len(values))
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)  # (S, S)
    smoothed: Floats = weights @ values / weights.sum(axis=1)
    return smoothed


@contextmanager
def _same_random_states(device: torch.device) -> Iterator[None]:
    """Put the random states of Python, numpy and torch back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - miners of others draw from it
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
