"""What surrounds the steps: freezing, averages, stopping early, images that cannot be read, the doctor, trackers."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.stripes import stripes
from tests.training.test_resume import embedder
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, ImageError, TrainingError
from vitembed.training import (
    CrossBatchMemory,
    FineTune,
    HardNegatives,
    ImageDataset,
    Safeguards,
    TrainConfig,
    TripletLoss,
    run,
    train,
)
from vitembed.training.health.collapse import Diagnosis
from vitembed.training.learner import Learner

QUICK: dict[str, Any] = {"epochs": 2, "classes_per_batch": 4, "images_per_class": 4, "workers": 0}


def weights(model: Embedder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.named_parameters()}


def test_a_frozen_backbone_stays_as_it_is_while_the_projection_learns() -> None:
    model = embedder(dim=8)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    frozen_for_good = model.network.vit.cls_token
    frozen_for_good.requires_grad_(False)
    train(model, stripes(), config=TrainConfig(**QUICK, validation="none", fine_tune=FineTune(frozen_epochs=2)))
    changed = {name for name, tensor in model.network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"projection.weight"}  # what batch norms remember stays as well
    assert all(p.requires_grad for p in model.network.parameters() if p is not frozen_for_good)
    assert not frozen_for_good.requires_grad  # what somebody froze stays frozen


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = embedder()
    model.network.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        train(model, stripes(), config=TrainConfig(**QUICK))


def test_after_the_frozen_epochs_the_backbone_learns() -> None:
    model = embedder(dim=8)
    before = weights(model)
    train(model, stripes(), config=TrainConfig(**QUICK, validation="none", fine_tune=FineTune(frozen_epochs=1)))
    changed = {name for name, tensor in model.network.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"projection.weight", "backbone.blocks.0.attn.qkv.weight"} <= changed


def test_a_frozen_backbone_without_anything_new_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train: give the model a projection"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK, fine_tune=FineTune(frozen_epochs=1)))


def test_a_new_projection_can_be_put_on_and_trained() -> None:
    model = embedder().replace(projection=6, seed=3)
    assert model.dim == 6
    assert model.fingerprint == embedder().replace(projection=6, seed=3).fingerprint
    assert model.fingerprint != embedder().replace(projection=6, seed=4).fingerprint


def test_training_stops_early_when_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = iter([0.5, 0.6, 0.55, 0.6, 0.5, 0.4, 0.3])
    monkeypatch.setattr(run, "validate", lambda *_: {"recall@1": next(recalls)})
    result = train(embedder(), stripes(), config=TrainConfig(**QUICK | {"epochs": 7}, patience=2))
    assert (len(result.history), result.best_epoch) == (6, 4)


def test_the_average_is_what_is_validated_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged, plain = embedder(), embedder()
    seen: list[str] = []
    validate = run.validate

    def noting(model: Embedder, *rest: Any) -> Any:
        seen.append(model.fingerprint)
        return validate(model, *rest)

    monkeypatch.setattr(run, "validate", noting)
    train(averaged, stripes(), config=TrainConfig(**QUICK, ema=0.99), out=tmp_path)
    validated = list(seen)
    train(plain, stripes(), config=TrainConfig(**QUICK))
    assert averaged.fingerprint in validated
    assert averaged.fingerprint not in seen[len(validated) :]
    assert Embedder.from_pretrained(tmp_path, device="cpu").fingerprint == averaged.fingerprint


def pictures(folder: Path, *, broken: int) -> ImageDataset:
    """Write stripes as files, the first ones of the first class cut off in the middle."""
    dataset = stripes(per_class=10)
    for number, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
        path = folder / dataset.classes[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(path)
        if number < broken:
            path.write_bytes(path.read_bytes()[:60])
    return ImageDataset.load(folder)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_image_is_set_aside_and_reported(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr("vitembed.training.data.pixels.MAX_CACHE_BYTES", 0)
    dataset = pictures(tmp_path / "data", broken=2)
    config = TrainConfig(**QUICK, validation="none", safeguards=Safeguards(max_unreadable=0.05))
    result = train(embedder(), dataset, config=config, out=tmp_path / "run")
    assert sorted(result.unreadable) == [str(path) for path in dataset.images[:2]]
    with (tmp_path / "run" / "unreadable.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(result.unreadable)
    assert {row["reason"] for row in rows} == set(result.unreadable.values())


def test_too_many_broken_images_stop_the_training(tmp_path: Path) -> None:
    dataset = pictures(tmp_path, broken=2)
    config = TrainConfig(**QUICK, validation="none", safeguards=Safeguards(max_unreadable=0.01))
    with pytest.raises(ImageError, match=r"000.png.*1 of the 80 images"):
        train(embedder(), dataset, config=config)


def test_an_epoch_whose_batches_are_all_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitembed.training.data.pixels.MAX_CACHE_BYTES", 0)
    dataset = pictures(tmp_path, broken=80)
    config = TrainConfig(**QUICK, validation="none", safeguards=Safeguards(max_unreadable=0.9999))
    with pytest.raises((TrainingError, ImageError), match="read"):
        train(embedder(), dataset, config=config)


class Pessimist:
    """A doctor that gives every training up."""

    @classmethod
    def of_loss(cls, loss: Any) -> "Pessimist":
        return cls()

    def observe(self, step: int, signals: Any) -> Diagnosis:
        assert signals.images == 16
        return Diagnosis("hopeless", f"at step {step}", "give up", fatal=True)

    def conclude(self, *_: float) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_the_doctor_stops_a_training_past_hope_or_warns_of_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "CollapseDoctor", Pessimist)
    with pytest.raises(TrainingError, match="training was stopped: hopeless: at step 1"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK))
    patient = TrainConfig(**QUICK, safeguards=Safeguards(on_collapse="warn"))
    result = train(embedder(), stripes(), config=patient, progress=True)
    assert len(result.diagnoses) == 1
    assert "warning: hopeless" in capfd.readouterr().err
    with pytest.warns(RuntimeWarning, match="hopeless"):
        train(embedder(), stripes(), config=patient)


def test_a_short_training_that_ends_at_the_margin_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    still = TrainConfig(**QUICK | {"learning_rate": 1e-8}, validation="none")
    result = train(embedder(), stripes(), config=still, progress=True)
    assert any("in the last epoch the loss" in diagnosis for diagnosis in result.diagnoses)
    assert "warning: loss-at-margin: in the last epoch" in capfd.readouterr().err
    learned = TrainConfig(**QUICK | {"epochs": 40, "classes_per_batch": 8}, validation="none")
    assert not train(embedder(), stripes(per_class=16), loss=TripletLoss(0.3), config=learned).diagnoses


def test_a_memory_leaves_its_drift_in_the_history() -> None:
    config = TrainConfig(**QUICK | {"epochs": 3}, validation="none")
    result = train(embedder(), stripes(), loss=CrossBatchMemory(TripletLoss(), size=64), config=config)
    assert result.history[0]["drift"] is None or result.history[0]["drift"] >= 0
    assert 0 < result.history[2]["drift"] < 2
    assert 0 < result.history[2]["age"] <= 8


def test_a_search_for_hard_negatives_leaves_the_suspects(tmp_path: Path) -> None:
    config = TrainConfig(**QUICK, validation="none", hard_negatives=HardNegatives(every=1, first=1))
    train(embedder(), stripes(), config=config, out=tmp_path)
    with (tmp_path / "suspected_label_errors.csv").open() as file:
        assert csv.DictReader(file).fieldnames == ["path", "label", "suggested_label", "score", "neighbours_agreeing"]


def test_trackers_get_the_figures_of_steps_and_epochs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    recalls = [event.value for event in events.Scalars("recall@1")]
    assert recalls == pytest.approx([record["recall@1"] for record in result.history])
    assert len(events.Scalars("loss")) >= len(recalls) + 1


def test_sigterm_without_a_folder_says_that_nothing_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Learner.step

    def step(self: Learner, *args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        monkeypatch.setattr(Learner, "step", step)
        with pytest.raises(TrainingError, match="SIGTERM after step 1; without a folder nothing was saved"):
            train(embedder(), stripes(), config=TrainConfig(**QUICK))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
