"""The learning-rate finder: its suggestion trains well, nothing that it is given changes, and it refuses to guess."""

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, TrainingError
from vitembed.plots import plot_rates
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ContrastiveLoss, CrossEntropyLoss, TrainConfig, TripletLoss
from vitembed.training.data.sampling import ClassBalancedSampler
from vitembed.training.rate_finder import HIGHEST, LOWEST, _conclude, _smooth, _until_it_diverges, find_learning_rate
from vitembed.vit import ViTConfig

SMALL: dict[str, Any] = {"classes_per_batch": 4, "images_per_class": 4, "workers": 0}


def embedder(seed: int = 0) -> Embedder:
    config = ViTConfig((8, 8), 4, 1, width=16, depth=2, heads=2, stem=((8, 2), (16, 2)))
    preprocess = Preprocess.grey((8, 8), resize="squash", invert=False)
    return Embedder.create(config, preprocess=preprocess, seed=seed, device="cpu")


def trained_loss(loss: Callable[..., Tensor], rate: float, *, steps: int = 50) -> float:
    """Return the mean over all terms of a loss at the end of a plain training at a constant rate."""
    model, data = embedder(), stripes(per_class=16)
    pixels = torch.from_numpy(np.stack(data.images))[:, None]
    sampler = ClassBalancedSampler(data.labels, classes_per_batch=4, images_per_class=4)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=rate)
    model.network.train()
    found: list[float] = []
    while len(found) < steps:
        sampler.epoch += 1
        for batch in sampler:
            value = loss(model.network(pixels[batch]), torch.from_numpy(data.labels[batch]))
            value.backward()
            nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item() * loss.active_share.item())
    return float(np.mean(found[-20:]))


@pytest.mark.parametrize("loss", [TripletLoss(0.2), TripletLoss(0.2, "semihard"), ContrastiveLoss()], ids=repr)
def test_the_suggested_rate_trains_better_than_one_far_below_or_above(loss: nn.Module) -> None:
    curve = find_learning_rate(embedder(), stripes(per_class=16), loss=loss, config=TrainConfig(**SMALL))
    at_suggestion = trained_loss(loss, curve.suggestion)
    assert at_suggestion < 0.8 * trained_loss(loss, curve.suggestion / 100)
    assert at_suggestion < 0.8 * trained_loss(loss, curve.suggestion * 300)


def test_the_curve_has_a_loss_for_each_rate_and_the_suggestion_is_half_of_the_lowest_point() -> None:
    curve = find_learning_rate(embedder(), stripes(), config=TrainConfig(**SMALL), steps=60)
    assert len(curve.rates) == len(curve.losses) == len(curve.smoothed)
    assert curve.rates[0] == LOWEST
    assert curve.rates[-1] == pytest.approx(HIGHEST)
    assert np.allclose(np.diff(np.log(curve.rates)), np.log(HIGHEST / LOWEST) / 59)
    assert curve.suggestion == pytest.approx(curve.rates[curve.smoothed.argmin()] / 2)
    again = find_learning_rate(embedder(), stripes(), config=TrainConfig(**SMALL), steps=60)
    assert np.array_equal(again.losses, curve.losses)
    other = find_learning_rate(embedder(), stripes(), config=TrainConfig(**SMALL, seed=1), steps=60)
    assert not np.array_equal(other.losses, curve.losses)


class Drawing(nn.Module):
    """A miner with a buffer and a count, which draws from every global source of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> None:
        self.seen += len(embeddings)
        self.calls += 1
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)


def state_of(model: Embedder, *modules: nn.Module) -> dict[str, Any]:
    """Return all that could change, as bytes and plain values."""
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "torch": torch.get_rng_state().numpy().tobytes(),
        "provenance": copy.deepcopy(model.provenance),
        "device": model.device,
    }
    for number, module in enumerate((model.network, *modules)):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{number} {name}"] = (tensor.detach().numpy().tobytes(), tensor.requires_grad, tensor.grad is None)
        for name, part in module.named_modules():
            found[f"{number} {name} mode"] = (part.training, type(part))
    return found


@pytest.mark.parametrize("kind", ["proxies", "triplet", "cross-entropy"])
def test_model_loss_miner_and_random_states_are_unchanged_to_the_bit(kind: str) -> None:
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    torch.manual_seed(0)
    model = embedder()
    loss = {"proxies": ProxyAnchorLoss(8, 16), "triplet": TripletLoss(), "cross-entropy": CrossEntropyLoss()}[kind]
    miner = Drawing() if kind == "triplet" else None
    model.network.backbone.blocks[0].train()  # parts have modes of their own
    before = state_of(model, loss, *([miner] if miner else []))
    fingerprint = model.fingerprint
    config = TrainConfig(**SMALL, augment=Augment(light=0.2), patch_dropout=0.25, gradient_checkpointing=True)
    find_learning_rate(model, stripes(), loss=loss, miner=miner, config=config, steps=100)
    assert state_of(model, loss, *([miner] if miner else [])) == before
    assert model.fingerprint == fingerprint
    assert (model.network.vit.patch_dropout, model.network.vit.gradient_checkpointing) == (0.0, False)
    assert miner is None or miner.calls == 0
    assert not hasattr(loss, "active_share") or float(loss.active_share) == 0.0


def test_random_states_are_put_back_after_an_error_too() -> None:
    class Failing(Drawing):
        def forward(self, embeddings: Tensor, labels: Tensor) -> None:
            super().forward(embeddings, labels)
            raise RuntimeError("broken")

    model = embedder()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="broken"):
        find_learning_rate(model, stripes(), miner=Failing(), config=TrainConfig(**SMALL))
    assert state_of(model) == before


def test_bf16_finds_a_rate_as_well() -> None:
    config = TrainConfig(**SMALL, precision="bf16")
    curve = find_learning_rate(embedder(), stripes(per_class=16), config=config)
    assert 1e-4 < curve.suggestion < 0.3


class Constant(nn.Module):
    """A loss that nothing can lower, with the noise of its batches."""

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: object = None) -> Tensor:
        return 1 + 0.1 * torch.randn(()) + 0 * embeddings.sum()


def test_a_loss_that_no_rate_lowers_is_refused() -> None:
    for loss in (Constant(), TripletLoss(1e-9, "semihard")):
        with pytest.raises(TrainingError, match=r"no learning rate from 1e-07 to 1 lowers the loss by more than its"):
            find_learning_rate(embedder(), stripes(), loss=loss, config=TrainConfig(**SMALL))


def test_noise_alone_is_refused_nearly_always() -> None:
    rates, rng = np.geomspace(LOWEST, HIGHEST, 100), np.random.default_rng(0)
    accepted = 0
    for _ in range(200):
        try:
            _conclude(rates, 1 + 0.1 * rng.standard_normal(100), calm=20, width=4)
            accepted += 1
        except TrainingError:
            pass
    assert accepted <= 4


def test_a_clear_valley_is_found_through_noise_without_lag() -> None:
    rates, rng = np.geomspace(LOWEST, HIGHEST, 100), np.random.default_rng(0)
    place = np.arange(100)
    losses = 1 - 0.6 * np.exp(-0.5 * ((place - 70) / 8) ** 2) + 0.05 * rng.standard_normal(100)
    curve = _conclude(rates, losses, calm=20, width=4)
    assert abs(curve.smoothed.argmin() - 70) <= 3
    assert curve.suggestion == pytest.approx(rates[curve.smoothed.argmin()] / 2)


def test_smoothing_is_the_plain_weighted_mean() -> None:
    values = np.random.default_rng(0).standard_normal(9)
    expected = []
    for i in range(9):
        weights = [np.exp(-((i - j) ** 2) / (2 * 1.5**2)) for j in range(9)]
        expected.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    assert np.allclose(_smooth(values, 1.5), expected)
    assert np.allclose(_smooth(np.full(9, 3.0), 1.5), 3)


@pytest.mark.parametrize(("end", "length"), [([np.nan] * 40, 60), ([1.0] * 5 + [np.inf] + [1.0] * 34, 65)])
def test_a_curve_ends_where_the_loss_is_not_finite(end: list[float], length: int) -> None:
    losses = _until_it_diverges((torch.tensor(value) for value in [1.0] * 60 + end), calm=20)
    assert losses.tolist() == [1.0] * length


def test_a_loss_that_grows_fourfold_ends_the_test_and_a_negative_one_that_falls_does_not() -> None:
    growing = [1.0] * 50 + [10.0] * 50
    assert len(_until_it_diverges((torch.tensor(value) for value in growing), calm=20)) == 60
    falling = [-1.0 - step for step in range(100)]
    assert len(_until_it_diverges((torch.tensor(value) for value in falling), calm=20)) == 100


def test_nan_from_the_start_on_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor, tuples: object = None) -> Tensor:
            return embeddings.sum() * torch.nan

    with pytest.raises(TrainingError, match="NaN or infinite at a learning rate of 1e-07: look at loss and data"):
        find_learning_rate(embedder(), stripes(), loss=Broken(), config=TrainConfig(**SMALL))


def test_a_frozen_model_and_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 20 steps; got 19"):
        find_learning_rate(embedder(), stripes(), steps=19)
    model = embedder()
    model.network.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing of this model requires a gradient"):
        find_learning_rate(model, stripes(), config=TrainConfig(**SMALL))


@pytest.mark.parametrize("smoothed", [None, [1.0, 0.6, 0.9]])
def test_the_picture_of_a_curve_is_a_png(smoothed: list[float] | None) -> None:
    png = plot_rates([1e-4, 1e-3, 1e-2], [1.0, 0.5, 0.9], 5e-4, smoothed=smoothed)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
