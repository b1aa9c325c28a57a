"""The plan of a training: it speaks of what `train` then does, and changes nothing."""

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet, ForeignBackbone
from vitembed.errors import ConfigError, DataError, ImageError
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, CrossEntropyLoss, ImageDataset, TrainConfig, TripletLoss, costs, plan, train
from vitembed.training.data.pixels import LabelledPixels
from vitembed.training.learner import Learner
from vitembed.training.plan import TrainingPlan, plan_training
from vitembed.vit import ViTConfig

QUICK: dict[str, Any] = {"epochs": 2, "classes_per_batch": 4, "images_per_class": 4, "workers": 0}
SMALL = Preprocess.grey((8, 8), resize="squash", invert=False)


def embedder(**options: Any) -> Embedder:
    config = ViTConfig((8, 8), 4, 1, width=16, depth=3, heads=2, **options)
    return Embedder.create(config, preprocess=SMALL, device="cpu")


class Proxies(nn.Module):
    """A loss with parameters, a buffer, and a memory of how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.ones(8, 16))
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: object = None) -> Tensor:
        self.calls += 1
        return (embeddings @ self.proxies[labels].T).mean()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_ENOUGH", 0.0)


def test_a_plan_speaks_of_the_training_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = embedder(), TrainConfig(**QUICK, augment=Augment.named("ink"))
    planned = plan_training(model, stripes(), config=config)
    taken: list[int] = []
    step = Learner.step

    def counted(self: Learner, batch: LabelledPixels, *arguments: Any, **options: Any) -> Any:
        taken.append(len(batch.labels))
        return step(self, batch, *arguments, **options)

    monkeypatch.setattr(Learner, "step", counted)
    train(model, stripes(), config=config)
    assert planned.steps == len(taken)
    assert planned.batch_size == max(taken)
    assert planned.images == model.provenance["training images"]
    assert planned.classes == len(model.provenance["trained classes"]) == 6
    assert planned.held_out_classes == len(model.provenance["held-out classes"]) == 2
    assert planned.images + planned.held_out_images == len(stripes())
    assert planned.loss == model.provenance["loss"]
    assert planned.augment["rotate"] == 12
    assert (planned.device, planned.precision) == ("cpu", "fp32")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": Proxies()},
        {"loss": CrossEntropyLoss()},
        {"config": TrainConfig(**QUICK, gradient_cache=3, patch_dropout=0.5, augment=Augment.named("photo-strong"))},
        {"config": TrainConfig(**QUICK, gradient_checkpointing=True, precision="bf16")},
    ],
    ids=["plain", "proxies", "classes", "cached", "bf16"],
)
def test_planning_changes_nothing_and_writes_nothing(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = embedder(drop_path=0.2)
    next(model.network.parameters()).requires_grad_(False)
    before = copy.deepcopy((model.network.state_dict(), model.provenance))
    frozen = [parameter.requires_grad for parameter in model.network.parameters()]
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    loss = options.get("loss")
    kept = copy.deepcopy(loss.state_dict()) if loss is not None else {}
    plan_training(model, stripes(), **{"config": TrainConfig(**QUICK), **options})
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert torch.equal(after[0], states[0])
    assert after[1:] == states[1:]
    state = model.network.state_dict()
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert [parameter.requires_grad for parameter in model.network.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert not any(part.training for part in model.network.modules())
    assert model.provenance == before[1]
    if loss is not None:
        assert all(torch.equal(value, kept[name]) for name, value in loss.state_dict().items())
        assert all(parameter.grad is None for parameter in loss.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_planned_training_learns_the_same_as_an_unplanned_one() -> None:
    fingerprints = []
    for planned in (False, True):
        model, config = embedder(drop_path=0.2), TrainConfig(**QUICK, augment=Augment.named("photo"))
        if planned:
            plan_training(model, stripes(), config=config)
        train(model, stripes(), config=config)
        fingerprints.append(model.fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_what_is_counted_is_there_to_be_counted() -> None:
    model = embedder()
    count = sum(parameter.numel() for parameter in model.network.parameters())
    first = next(model.network.parameters())
    first.requires_grad_(False)
    planned = plan_training(model, stripes(), loss=Proxies(), config=TrainConfig(**QUICK))
    assert planned.parameters == count + 8 * 16
    assert planned.trainable == planned.parameters - first.numel()
    memory = planned.memory
    assert memory.weights == 4 * (planned.parameters + 1 + 2)  # one buffer of the loss; mean and std of one channel
    assert memory.gradients == 4 * planned.trainable
    assert memory.moments == 2 * memory.gradients
    assert memory.best == 4 * count
    assert memory.batch == 16 * 64 * (1 + 4)
    assert memory.dataset == len(stripes()) * 64
    parts = dataclasses.asdict(memory).values()
    assert memory.total == sum(parts) == memory.on_device + memory.dataset + memory.best


def test_a_moving_average_is_one_more_network() -> None:
    model = embedder()
    plain, averaged = (plan_training(model, stripes(), config=TrainConfig(**QUICK, ema=ema)) for ema in (None, 0.9))
    assert averaged.memory.weights - plain.memory.weights == plain.memory.best


def activations(**settings: Any) -> int:
    config = TrainConfig(**{**QUICK, "classes_per_batch": 6}, validation="none", **settings)
    return plan_training(embedder(), stripes(), config=config).memory.activations


def test_activations_of_a_chunk_are_its_share_of_those_of_the_batch() -> None:
    whole, six = activations(), activations(gradient_cache=6)
    fixed = (6 * 4 * six - 6 * whole) / (6 * 4 - 6)  # what the loss keeps, and nothing that grows with the batch
    assert six < 0.4 * whole
    assert 0 <= fixed < 0.1 * whole


def test_checkpointing_and_dropout_keep_less() -> None:
    whole = activations()
    assert activations(gradient_checkpointing=True) < 0.8 * whole
    assert activations(patch_dropout=0.5) < 0.9 * whole


def test_activations_are_at_least_the_inputs_of_all_linear_layers() -> None:
    network = embedder().network
    sizes = []
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].nbytes))
    network.train()(torch.zeros(24, 1, 8, 8))
    whole = activations()
    assert sum(sizes) < whole < 5 * sum(sizes)


def test_storages_count_once_and_known_ones_not_at_all() -> None:
    x = torch.rand(10, requires_grad=True)

    def twice() -> Tensor:
        grown = x.exp()  # kept for exp, and twice for the product: one storage of ten floats
        return (grown * grown).sum()

    assert costs._saved_bytes(twice, set()) == 40
    known = torch.rand(10)
    assert costs._saved_bytes(lambda: (x * known).sum(), set()) == 40
    assert costs._saved_bytes(lambda: (x * known).sum(), {known.untyped_storage().data_ptr()}) == 0


def test_time_is_scaled_from_images_to_steps_to_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = costs.StepCosts(train=0.5, embed=0.1, fixed=2.0, saved=1000.0, saved_fixed=5.0)
    monkeypatch.setattr(plan, "measure_step", lambda *_: fixed)
    monkeypatch.setattr(plan, "seconds_to_read", lambda *_: 0.25)
    config = TrainConfig(**QUICK)
    planned = plan_training(embedder(), stripes(), config=config)
    assert (planned.images, planned.held_out_images, planned.batches) == (48, 16, 3)
    time = planned.time
    assert time.step == 2 + 16 * 0.5
    assert time.epoch == pytest.approx(3 * 10 + 16 * 0.1)
    assert time.reading == 64 * 0.25
    assert time.total == pytest.approx(16 + 2 * 31.6)
    assert planned.memory.activations == 5 + 16 * 1000
    cached = plan_training(embedder(), stripes(), config=dataclasses.replace(config, gradient_cache=4))
    assert cached.time.step == pytest.approx(10 + 16 * 0.1)
    assert cached.memory.activations == 5 + 4 * 1000


def test_what_does_not_fit_into_memory_is_read_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = costs.StepCosts(train=0.5, embed=0.1, fixed=2.0, saved=0.0, saved_fixed=0.0)
    monkeypatch.setattr(plan, "measure_step", lambda *_: fixed)
    monkeypatch.setattr(plan, "seconds_to_read", lambda *_: 1.0)
    monkeypatch.setattr(plan, "MAX_CACHE_BYTES", 100)
    planned = plan_training(embedder(), stripes(), config=TrainConfig(**QUICK))
    assert planned.memory.dataset == 0
    assert planned.time.reading == 0
    assert planned.time.epoch == 64  # decoding is what it waits for: more than 31.6
    assert planned.time.total == 128


def test_measured_seconds_are_there_and_grow_with_the_batch() -> None:
    planned = plan_training(embedder(), stripes(), config=TrainConfig(**QUICK))
    assert 0 < planned.time.step < planned.time.epoch < planned.time.total < 60


def test_a_loss_of_logits_is_planned_with_its_head() -> None:
    model = embedder()
    count = sum(parameter.numel() for parameter in model.network.parameters())
    planned = plan_training(model, stripes(), loss=CrossEntropyLoss(), config=TrainConfig(**QUICK))
    assert planned.parameters == count + 8 * 16 + 8
    assert planned.classes == planned.held_out_classes == 8  # images are held out
    assert model.network.vit.config.num_classes == 0


def test_foreign_backbones_are_planned_too() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    network = EmbeddingNet(ForeignBackbone(module, image_size=(8, 8), channels=1), mean=SMALL.mean, std=SMALL.std)
    model = Embedder(network, SMALL, device="cpu")
    planned = plan_training(model, stripes(), config=TrainConfig(**QUICK))
    assert planned.network == "Sequential, images of 1 x 8 x 8"
    assert planned.parameters == 4 * 9 + 4 + 8
    assert torch.equal(module[1].running_mean, torch.zeros(4))


def test_what_training_refuses_planning_refuses() -> None:
    model = embedder()
    with pytest.raises(ConfigError, match="head 'mlp' is for a classification loss"):
        plan_training(model, stripes(), config=TrainConfig(**QUICK, head="mlp"))
    with pytest.raises(ConfigError, match="leave the miner out"):
        plan_training(model, stripes(), loss=CrossEntropyLoss(), miner=lambda *_: None)
    with pytest.raises(DataError, match="at least 4 classes"):
        plan_training(model, stripes(classes=3), config=TrainConfig(**QUICK))


def test_an_image_that_cannot_be_read_is_passed_over_unless_all_are(tmp_path: Path) -> None:
    images: list[Any] = [*stripes().images]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images[0] = bad
    labels = stripes().labels
    assert plan_training(embedder(), ImageDataset.from_arrays(images, labels), config=TrainConfig(**QUICK)).time.reading
    with pytest.raises(ImageError, match=r"bad\.png"):
        plan_training(embedder(), ImageDataset.from_arrays([bad] * len(labels), labels), config=TrainConfig(**QUICK))


def test_a_plan_is_printed_and_becomes_json() -> None:
    planned = plan_training(embedder(), stripes(), loss=TripletLoss(0.3, "semihard"), config=TrainConfig(**QUICK))
    figures = planned.figures()
    assert figures["train on"] == "48 images of 6 classes"
    assert figures["validate on"] == "16 images of 2 classes"
    assert figures["steps"] == "6: 2 epochs of 3 batches of 16 images"
    assert figures["network"].startswith("ViT of 3 blocks of width 16/4, linear patches, cls pooling, embeddings of 16")
    assert figures["loss"] == "TripletLoss(margin=0.3, mining='semihard')"
    assert figures["augmentation"] == "none"
    assert "estimated" in " ".join(figures)
    document = json.loads(json.dumps(planned.to_dict()))
    assert document["steps"] == 6
    assert document["memory"]["total"] == planned.memory.total
    assert document["time"]["total"] == planned.time.total


def test_nothing_held_out_is_called_so_and_known_sizes_have_their_name() -> None:
    model = Embedder.create("N/4", preprocess=SMALL, stem="conv", device="cpu")
    planned = plan_training(model, stripes(), config=TrainConfig(**QUICK, validation="none"))
    assert planned.figures()["validate on"] == "nothing"
    assert planned.network.startswith("N/4, convolutional stem")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_500_000, "1.5 MB"), (2.5e9, "2.5 GB"), (4e15, "4e+03 TB")],
)
def test_sizes_are_written_in_their_unit(value: float, text: str) -> None:
    assert plan._size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123 s"), (80, "80 s"), (90, "1.5 minutes"), (5400, "1.5 hours"), (2e5, "2.3 days")],
)
def test_durations_are_written_in_their_unit(value: float, text: str) -> None:
    assert plan._duration(value) == text


def test_every_field_of_a_plan_is_described() -> None:
    described = TrainingPlan.__doc__ or ""
    assert all(f"        {field.name}: " in described for field in dataclasses.fields(TrainingPlan))
