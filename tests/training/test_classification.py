"""Classification: the loss, its batches, the head, and a training whose accuracy is that of the saved model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, TrainingError, VectorError
from vitembed.preprocess import Preprocess
from vitembed.training import CrossEntropyLoss, ImageDataset, TrainConfig, TripletLoss, build_loss, run, stepper, train
from vitembed.training.classification import ShuffledBatches, accuracy_of, fit_head
from vitembed.vit import ViTConfig

QUICK: dict[str, Any] = {"epochs": 2, "classes_per_batch": 4, "images_per_class": 4, "workers": 0}
CONFIG = ViTConfig((8, 8), 4, 1, width=16, depth=2, heads=2, stem=((8, 2), (16, 2)))


def embedder(config: ViTConfig = CONFIG, **options: Any) -> Embedder:
    preprocess = Preprocess.grey((8, 8), resize="squash", invert=False)
    return Embedder.create(config, preprocess=preprocess, device="cpu", **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_the_loss_is_that_of_a_plain_loop(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0])
    terms = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        for k, value in enumerate(row):
            target = (1 - smoothing) * (k == label) + smoothing / 3
            terms.append(-target * math.log(math.exp(value) / total))
    loss = CrossEntropyLoss(label_smoothing=smoothing)
    assert loss(logits, labels).item() == pytest.approx(sum(terms) / 5, abs=1e-6)
    assert loss(logits.bfloat16(), labels).dtype == torch.float32
    assert loss(logits.double(), labels).dtype == torch.float64


def test_logits_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VectorError, match=r"got \(3, 2\) and \(2,\)"):
        CrossEntropyLoss()(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


def test_the_share_of_right_answers_is_counted_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [5.0, 1.0]])
    assert accuracy_of(logits, torch.tensor([0, 1, 0, 0])).item() == 0.75


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cross-entropy", "CrossEntropyLoss(label_smoothing=0.0)"),
        ("cross-entropy(label_smoothing=0.1)", "CrossEntropyLoss(label_smoothing=0.1)"),
        ("CrossEntropyLoss(label_smoothing=0.2)", "CrossEntropyLoss(label_smoothing=0.2)"),
    ],
)
def test_the_loss_is_built_by_its_name(spec: str, words: str) -> None:
    assert str(build_loss(spec, num_classes=3, embedding_size=16)) == words


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cross-entropie", "did you mean 'cross-entropy'"),
        ("cross-entropy(smoothing=0.1)", "did you mean 'label_smoothing'"),
        ("cross-entropy(label_smoothing='much')", "must be a finite number"),
        ("cross-entropy(label_smoothing=1)", r"in \[0, 1\)"),
        ("cross-entropy(0.1)", "Name or Name"),
        ("cross - entropy", "Name or Name"),
        ("cross-entropy(label_smoothing=0.1) + 1", "Name or Name"),
    ],
)
def test_a_mistyped_name_or_argument_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_loss(spec)


@pytest.mark.parametrize(("count", "size"), [(64, 16), (65, 16), (17, 16), (5, 16), (1, 4)])
def test_every_image_comes_once_an_epoch_in_batches_of_nearly_one_size(count: int, size: int) -> None:
    sampler = ShuffledBatches(count, size, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(position for batch in batches for position in batch) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


def test_batches_differ_by_epoch_and_seed_alone() -> None:
    sampler = ShuffledBatches(50, 8, seed=3)
    first = list(sampler)
    assert list(sampler) == first
    sampler.epoch = 1
    assert list(sampler) != first
    assert list(ShuffledBatches(50, 8, seed=4)) != first


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_fresh_head_is_the_papers_and_predicts_all_classes_alike(kind: Any) -> None:
    model = embedder()
    before = model.encode(stripes(4, 16).images)
    fit_head(model, ["a", "b", "c"], kind)
    vit = model.network.vit
    assert (vit.config.num_classes, vit.config.head_width) == (3, 16 if kind == "mlp" else 0)
    hidden = [layer for layer in vit.modules() if isinstance(layer, nn.Linear) and layer.out_features in (3, 16)]
    assert vit.head in hidden
    assert (vit.pre_logits is not None) == (kind == "mlp")
    np.testing.assert_allclose(model.classify(stripes(4, 16).images), 1 / 3, atol=1e-6)
    np.testing.assert_array_equal(model.encode(stripes(4, 16).images), before)  # a head leaves the embedding alone


def test_the_head_of_a_distilled_network_is_replaced_with_its_twin() -> None:
    config = ViTConfig((8, 8), 4, 1, width=16, depth=1, heads=2, distilled=True, num_classes=7)
    model = embedder(config)
    fit_head(model, ["a", "b"])
    assert model.network.vit.head_dist is not None
    assert model.network.vit.head_dist.out_features == 2


def test_a_head_is_kept_for_the_same_classes_in_the_same_order_alone() -> None:
    model = embedder()
    data = stripes(4, 16)
    train(model, data, loss=CrossEntropyLoss(), config=TrainConfig(**QUICK))
    vit = model.network.vit
    assert vit.head is not None
    head, weight = vit.head, vit.head.weight.detach().clone()
    assert weight.abs().max() > 0
    fit_head(model, data.classes)
    fit_head(model, data.classes, "linear")
    assert vit.head is head
    for classes, kind in ((data.classes[::-1], None), (data.classes, "mlp")):
        other = embedder(vit.config)
        other.network.load_state_dict(model.network.state_dict())
        other.provenance = dict(model.provenance)
        fit_head(other, classes, kind)  # type: ignore[arg-type]
        assert other.network.vit.head is not None
        assert other.network.vit.head.weight.abs().max() == 0
        assert other.classes == []  # nobody knows yet what the new one will answer


def test_training_learns_to_name_the_classes_and_says_how_well(tmp_path: Path) -> None:
    model = embedder()
    data = stripes(4, 32, noise=15)
    # The third class has no image held out: the held-out part numbers its classes without it.
    held_out = np.array([number % 4 == 0 and label != 2 for number, label in enumerate(data.labels)])
    data = ImageDataset(data.images, data.labels, data.classes, held_out)
    config = TrainConfig(epochs=8, classes_per_batch=4, images_per_class=4, learning_rate=5e-3, workers=0)
    result = train(model, data, loss=CrossEntropyLoss(0.1), config=config, out=tmp_path / "run")
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert result.history[0]["accuracy"] < result.history[-1]["accuracy"] <= 1
    assert result.accuracy == max(record["validation accuracy"] for record in result.history)

    loaded = Embedder.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.classes == ["way 0", "way 1", "way 2", "way 3"]
    answers = loaded.classify([data.images[i] for i in np.flatnonzero(held_out)]).argmax(axis=1)
    assert np.mean(answers == data.labels[held_out]) == pytest.approx(result.accuracy)
    vectors = loaded.encode(data.images)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert loaded.provenance["validation accuracy"] == result.accuracy
    assert loaded.provenance["validation recall@1"] == result.recall_at_1
    assert loaded.provenance["settings"]["validation"] == "images"
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert set(history[0]) == {
        "epoch",
        "loss",
        "accuracy",
        "positive_distance",
        "negative_distance",
        "recall@1",
        "validation accuracy",
        "learning_rate",
        "seconds",
    }
    assert (tmp_path / "run" / "curve.png").is_file()


def test_the_best_epoch_is_that_of_the_highest_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([(0.9, 0.2), (0.1, 0.7), (0.2, 0.7), (0.8, 0.6)])

    def validate(*_: object) -> dict[str, float]:
        return dict(zip(("recall@1", "validation accuracy"), next(figures), strict=True))

    monkeypatch.setattr(run, "validate", validate)
    result = train(embedder(), stripes(4, 16), loss=CrossEntropyLoss(), config=TrainConfig(**{**QUICK, "epochs": 4}))
    assert (result.best_epoch, result.accuracy, result.recall_at_1) == (3, 0.7, 0.2)


def test_without_validation_the_last_epoch_counts_and_has_no_accuracy() -> None:
    config = TrainConfig(**QUICK, validation="none", head="mlp")
    result = train(embedder(), stripes(4, 16), loss=CrossEntropyLoss(), config=config)
    assert (result.best_epoch, result.accuracy, result.recall_at_1) == (2, None, None)


def test_equal_seeds_give_equal_weights() -> None:
    fingerprints = []
    for seed in (3, 3, 4):
        model = embedder()
        train(model, stripes(4, 16), loss=CrossEntropyLoss(), config=TrainConfig(**QUICK, head="mlp", seed=seed))
        fingerprints.append(model.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_loss_of_embeddings_takes_off_the_head_that_it_does_not_train() -> None:
    model = embedder()
    train(model, stripes(4, 16), loss=CrossEntropyLoss(), config=TrainConfig(**QUICK))
    before = model.fingerprint
    train(model, stripes(4, 16), loss=TripletLoss(), config=TrainConfig(**QUICK, validation="images"))
    assert model.classes == []
    assert model.network.vit.head is None
    assert model.network.vit.config.num_classes == 0
    assert model.provenance["initialised from"] == before


def test_any_loss_may_ask_for_logits() -> None:
    widths = set()

    class Focal(nn.Module):
        needs_logits = True

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            widths.add(logits.shape[1])
            picked = logits.log_softmax(1).gather(1, labels[:, None])
            return -((1 - picked.exp()) ** 2 * picked).mean()

    result = train(embedder(), stripes(4, 16), loss=Focal(), config=TrainConfig(**QUICK))
    assert result.accuracy is not None
    assert widths == {4}


def test_what_does_not_go_with_classification_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    def refused(
        words: str, model: Embedder, loss: Any = None, data: Any = None, miner: Any = None, **values: Any
    ) -> None:
        before = model.fingerprint
        config = TrainConfig(**{**QUICK, **values})
        with pytest.raises((ConfigError, DataError), match=words):
            train(
                model,
                data or stripes(4, 16),
                loss=loss or CrossEntropyLoss(),
                miner=miner,
                config=config,
                out=tmp_path / "run",
            )
        assert model.fingerprint == before
        assert not (tmp_path / "run").exists()

    refused("hold out 'images' or 'none'", embedder(), validation="classes")
    refused("leave the miner out", embedder(), miner=lambda *_: None)
    refused("'mlp' is for a classification loss", embedder(), loss=TripletLoss(), head="mlp")
    refused("the mean of the patches", embedder(pooling="mean"))
    refused(r"a projection of it.*model\.replace\(projection=False\)", embedder(dim=8))
    data = stripes(4, 16)
    refused(
        "'way 2' is held out", embedder(), data=ImageDataset(data.images, data.labels, data.classes, data.labels > 1)
    )
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    foreign = Embedder.from_module(flat, Preprocess.grey((8, 8), resize="squash"), device="cpu")
    refused("needs the head of a ViT", foreign)


def test_an_interrupted_first_epoch_leaves_no_names_without_their_head() -> None:
    model = embedder()
    train(model, stripes(4, 16), loss=CrossEntropyLoss(), config=TrainConfig(**QUICK))

    class Broken(CrossEntropyLoss):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, stripes(classes=3), loss=Broken(), config=TrainConfig(**QUICK))
    assert model.classes == []
    assert model.encode(stripes(4, 16).images).shape == (64, 16)


def test_a_model_whose_projection_was_taken_off_is_trained_to_classify() -> None:
    model = embedder(dim=8).replace(projection=False)
    train(model, stripes(4, 16), loss=CrossEntropyLoss(), config=TrainConfig(**QUICK))
    assert model.dim == 16
    assert len(model.classes) == 4


def test_weights_that_break_in_the_last_step_are_told_before_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = embedder()
    advance = stepper.Stepper.advance

    def broken(self: stepper.Stepper) -> None:
        """Take a step whose loss and gradient were fine, and which leaves broken weights."""
        advance(self)
        torch.nn.init.constant_(model.network.vit.norm.weight, float("nan"))

    monkeypatch.setattr(stepper.Stepper, "advance", broken)
    with pytest.raises(TrainingError, match="weights became NaN or infinite before step 1"):
        train(model, stripes(4, 4), loss=CrossEntropyLoss(), config=TrainConfig(**{**QUICK, "classes_per_batch": 8}))
