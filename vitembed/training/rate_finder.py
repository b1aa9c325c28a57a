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
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, TrainingError
from vitembed.training.allocation import kept_memory
from vitembed.training.arrangement import Arrangement, arrange
from vitembed.training.classification import fit_head
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import LabelledPixels, PixelDataset
from vitembed.training.learner import Learner, Loss, Miner, cheaper_training
from vitembed.training.losses.metric import TripletLoss
from vitembed.training.random_states import undisturbed_random_states

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
    loss: Loss | None = None,
    miner: Miner | None = None,
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
        config: the settings; the rate, its schedule, epochs and compile do not matter here.
        steps: how many rates there are; at least 20.

    Raises:
        ConfigError: if steps is below 20, or nothing of the model can be trained.
        DataError: if the data set has too few classes or images.
        ImageError: if too many images cannot be read.
        TrainingError: if no rate lowers the loss.
    """
    if steps < 20:
        raise ConfigError(f"a range test needs at least 20 steps; got {steps}")
    config = dataclasses.replace(config or TrainConfig(), compile=False)
    with undisturbed_random_states():
        torch.manual_seed(config.seed)
        rates: Floats = np.geomspace(LOWEST, HIGHEST, steps)
        values = _run(model, dataset, copy.deepcopy((loss or TripletLoss(), miner)), config, rates)
        losses = _until_it_diverges(values, calm=steps // 5)
    return _conclude(rates[: len(losses)], losses, calm=steps // 5, width=WIDTH * steps)


def _run(
    model: Embedder, dataset: ImageDataset, chosen: tuple[Loss, Miner | None], config: TrainConfig, rates: Floats
) -> Iterator[Tensor]:
    """Let a copy of a model take a step at each rate, and yield the mean over all terms of the loss before it."""
    loss, miner = chosen
    network = copy.deepcopy(model.network)
    model = Embedder(network, model.preprocess, device=model.device, provenance=model.provenance)
    arranged = arrange(model, dataset, loss, miner, config)
    fit_head(model, arranged.classes, config.head)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError("nothing of this model requires a gradient, so no rate can matter: thaw the network")
    learner = Learner(model, loss, miner, arranged.config, steps=len(rates))
    with kept_memory(model.device), cheaper_training(network, config):
        network.train()
        for rate, batch in zip(rates.tolist(), _batches(model, arranged), strict=False):
            learner.use_rate(rate)
            figures = learner.step(batch).figures
            yield figures["loss"] * figures.get("active", 1.0)


def _batches(model: Embedder, arranged: Arrangement) -> Iterator[LabelledPixels]:
    """Yield batches to train on without end."""
    config = arranged.config
    allowed = config.safeguards.max_unreadable
    pixels = PixelDataset(arranged.train_set, model.preprocess, workers=config.decoders, max_unreadable=allowed)
    while True:
        arranged.sampler.epoch += 1
        yield from (batch for batch in pixels.batches(arranged.sampler, workers=config.decoders) if len(batch.labels))


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
