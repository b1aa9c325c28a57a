"""A training that was interrupted goes on to the same weights, to the bit, whatever it consists of."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses, miners

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError, ConfigError, TrainingError
from vitembed.preprocess import Preprocess
from vitembed.training import (
    Augment,
    CrossBatchMemory,
    CrossEntropyLoss,
    DistillationLoss,
    FineTune,
    HardNegatives,
    ImageDataset,
    Safeguards,
    TrainConfig,
    TripletLoss,
    train,
)
from vitembed.training import learner as learner_module
from vitembed.training.checkpoints import list_checkpoints
from vitembed.training.identity import check_resumable
from vitembed.training.losses.specs import describe
from vitembed.vit import ViTConfig

QUICK: dict[str, Any] = {
    "epochs": 3,
    "classes_per_batch": 4,
    "images_per_class": 4,
    "workers": 0,
    "augment": Augment.named("photo"),
    "safeguards": Safeguards(checkpoint_steps=2, on_collapse="warn"),
}


class Interrupted(Exception):
    """Stands for the end of the process."""


def embedder(**options: Any) -> Embedder:
    config = ViTConfig((8, 8), 4, 1, width=16, depth=2, heads=2, stem=((8, 2), (16, 2)))
    preprocess = Preprocess.grey((8, 8), resize="squash", invert=False)
    return Embedder.create(config, preprocess=preprocess, seed=0, device="cpu", **options)


def trained_before() -> Embedder:
    """Return the same network as one that an earlier training made."""
    model = embedder()
    return Embedder(model.network, model.preprocess, device="cpu", provenance={"trained classes": ["0"]})


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the training end itself when it would take one step more."""
    original, taken = learner_module.Learner.step, 0

    def step(self: Any, batch: Any, **options: Any) -> Any:
        nonlocal taken
        if taken == steps:
            raise Interrupted
        taken += 1
        return original(self, batch, **options)

    monkeypatch.setattr(learner_module.Learner, "step", step)


def in_categories(data: ImageDataset) -> ImageDataset:
    """Name the classes so that they are of two categories."""
    return replace(data, classes=tuple(f"{number % 2}/{name}" for number, name in enumerate(data.classes)))


class DrawsFromNumpy(torch.nn.Module):
    """A miner of others that draws its triplets with numpy's global generator."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = np.random.permutation(len(labels))[: len(labels) // 2]  # noqa: NPY002
        return miners.TripletMarginMiner()(embeddings[chosen], labels[chosen])


class Counting(torch.nn.Module):
    """A miner that remembers how often it was asked."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return miners.TripletMarginMiner(margin=0.1 * float(self.calls))(embeddings, labels)


FEATURES: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "triplet": (TripletLoss, lambda: None, {}),
    "proxies": (lambda: losses.ProxyAnchorLoss(6, 16), lambda: None, {"loss_learning_rate": 0.1}),
    "memory": (lambda: CrossBatchMemory(TripletLoss(), size=40, warmup=2), lambda: None, {}),
    "average": (TripletLoss, lambda: None, {"ema": 0.9}),
    "patch dropout": (TripletLoss, lambda: None, {"patch_dropout": 0.3, "gradient_cache": 5}),
    "hard negatives": (TripletLoss, lambda: None, {"hard_negatives": HardNegatives(every=2, first=1)}),
    "numpy": (losses.TripletMarginLoss, DrawsFromNumpy, {}),
    "a miner with a state": (TripletLoss, Counting, {}),
    "distance-weighted": (lambda: TripletLoss(mining="distance-weighted"), lambda: None, {}),
    "classification": (CrossEntropyLoss, lambda: None, {}),
    "muon": (TripletLoss, lambda: None, {"optimizer": "muon", "precision": "bf16", "categories_per_batch": 1}),
    "distillation": (lambda: DistillationLoss([embedder(dim=8)]), lambda: None, {"gradient_cache": 5}),
    "fine-tuning": (TripletLoss, lambda: None, {"fine_tune": FineTune(0.7, 1), "patience": 3}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_resumed_training_has_the_weights_of_an_uninterrupted_one(
    feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loss, make_miner, settings = FEATURES[feature]
    config = TrainConfig(**(QUICK | settings))
    data = in_categories(stripes()) if config.categories_per_batch else stripes()

    def run(out: Path, **options: Any) -> tuple[str, list[dict[str, Any]], int]:
        model = embedder(dim=16) if feature == "fine-tuning" else embedder()
        result = train(model, data, loss=make_loss(), miner=make_miner(), config=config, out=out, **options)
        assert Embedder.from_pretrained(out, device="cpu").fingerprint == model.fingerprint
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]
        return model.fingerprint, records, result.best_epoch

    whole = run(tmp_path / "whole")
    for steps in (0, 1, 2, 3):  # each stretch ends somewhere else: before the first step, in and between epochs
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(Interrupted):
                run(tmp_path / "pieces", resume=True)
        torch.rand(7)  # what happens between two processes must not matter
        np.random.rand(7)  # noqa: NPY002
    assert run(tmp_path / "pieces", resume=True) == whole
    assert run(tmp_path / "pieces", resume=True) == whole  # there is nothing left to do
    assert len(list_checkpoints(tmp_path / "pieces")) == 1


def test_only_the_last_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**QUICK | {"safeguards": Safeguards(checkpoint_steps=1, checkpoints_kept=3)})
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train(embedder(), stripes(), config=config, out=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{n:08d}.pt" for n in (3, 4, 5)]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 3) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted):
            train(embedder(), stripes(), config=TrainConfig(**QUICK), out=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": TrainConfig(**QUICK | {"learning_rate": 0.5})}, "with learning_rate 0.001, and now it is 0.5"),
        (
            {"config": TrainConfig(**QUICK | {"augment": Augment()})},
            "with augment {'rotate': 8}, and now it is {'rotate': 0.0}",
        ),
        ({"loss": TripletLoss(0.3)}, "with loss TripletLoss.margin=0.2.* and now it is TripletLoss.margin=0.3"),
        ({"loss": losses.TripletMarginLoss(margin=0.3)}, r"now it is TripletMarginLoss\(margin=0.3"),
        ({"miner": miners.TripletMarginMiner()}, "with miner None, and now it is TripletMarginMiner"),
        ({"dataset": stripes(seed=1, per_class=9)}, "with number of images 64, and now it is 72"),
        ({"model": embedder(pooling="mean")}, "with network {'pooling': 'cls'}, and now it is {'pooling': 'mean'}"),
        ({"model": trained_before()}, "with initial weights None, and now it is sha256:"),
    ],
)
def test_a_training_of_another_kind_is_not_resumed(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments: dict[str, Any] = {"model": embedder(), "dataset": stripes(), "config": TrainConfig(**QUICK)} | changes
    with pytest.raises(CheckpointError, match=words):
        train(**arguments, out=tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def my_loss(embeddings: torch.Tensor, labels: torch.Tensor, tuples: Any = None) -> torch.Tensor:
    return TripletLoss()(embeddings, labels)


def test_settings_that_did_not_exist_yet_had_their_defaults() -> None:
    now = {"optimizer": "adamw", "epochs": 3}
    check_resumable({"epochs": 3}, now, "out")
    with pytest.raises(CheckpointError, match="optimizer adamw, and now it is muon"):
        check_resumable({"epochs": 3}, {**now, "optimizer": "muon"}, "out")


def test_a_function_is_the_same_loss_in_another_process() -> None:
    assert describe(my_loss) == "<function my_loss>"
    assert describe(losses.TripletMarginLoss(margin=0.3)) != describe(losses.TripletMarginLoss(margin=0.4))


def test_broken_weights_never_take_the_place_of_a_sound_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, taken = learner_module.Learner.step, 0

    def step(self: Any, batch: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        result = original(self, batch, **options)
        if taken == 5:
            torch.nn.init.constant_(self._network.vit.norm.weight, float("nan"))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(learner_module.Learner, "step", step)
        with pytest.raises(TrainingError, match="weights became NaN or infinite before step 5"):
            train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path)
    model, whole = embedder(), embedder()
    train(model, stripes(), config=TrainConfig(**QUICK), out=tmp_path, resume=True)
    train(whole, stripes(), config=TrainConfig(**QUICK))
    assert model.fingerprint == whole.fingerprint


def test_a_network_of_ones_own_is_resumed_after_its_end(tmp_path: Path) -> None:
    def own() -> Embedder:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
        return Embedder.from_module(module, Preprocess.grey((8, 8), resize="squash", invert=False), device="cpu")

    first, second = own(), own()
    result = train(first, stripes(), config=TrainConfig(**QUICK), out=tmp_path)
    again = train(second, stripes(), config=TrainConfig(**QUICK), out=tmp_path, resume=True)
    assert (second.fingerprint, again.history) == (first.fingerprint, result.history)


def test_what_a_training_left_is_gone_when_another_begins(tmp_path: Path) -> None:
    train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path)
    (tmp_path / "unreadable.csv").write_text("path,reason\n")
    train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path, overwrite=True)
    assert not (tmp_path / "unreadable.csv").exists()


def test_two_trainings_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = learner_module.Learner.step

    def step(self: Any, batch: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(learner_module.Learner, "step", original)
            for options_of_another in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(TrainingError, match="is being written by another training"):
                    train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path, **options_of_another)
        return original(self, batch, **options)

    monkeypatch.setattr(learner_module.Learner, "step", step)
    result = train(embedder(), stripes(), config=TrainConfig(**QUICK | {"epochs": 1}), out=tmp_path)
    assert len(result.history) == 1
    monkeypatch.undo()
    train(embedder(), stripes(), config=TrainConfig(**QUICK | {"epochs": 1}), out=tmp_path, overwrite=True)


def test_data_may_move_between_two_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "there"):
        for number, (image, label) in enumerate(zip(stripes().images, stripes().labels, strict=True)):
            path = tmp_path / place / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image)).save(path)
    here, there = ImageDataset.load(tmp_path / "here"), ImageDataset.load(tmp_path / "there")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            train(embedder(), here, config=TrainConfig(**QUICK), out=tmp_path / "run")
    train(embedder(), there, config=TrainConfig(**QUICK), out=tmp_path / "run", resume=True)
    (tmp_path / "there" / "0" / "0.png").rename(tmp_path / "there" / "0" / "renamed.png")
    with pytest.raises(CheckpointError, match="image files"):
        train(
            embedder(),
            ImageDataset.load(tmp_path / "there"),
            config=TrainConfig(**QUICK),
            out=tmp_path / "run",
            resume=True,
        )


def test_settings_without_consequence_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    changed = {"workers": 1, "safeguards": Safeguards(checkpoints_kept=1, on_collapse="warn")}
    model, whole = embedder(), embedder()
    train(model, stripes(), config=TrainConfig(**QUICK | changed), out=tmp_path, resume=True)
    train(whole, stripes(), config=TrainConfig(**QUICK))
    assert model.fingerprint == whole.fingerprint


def test_an_interrupted_training_is_not_overwritten_by_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch, steps=1)
    with pytest.raises(TrainingError, match="interrupted; resume it"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path)
    train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path, overwrite=True)


def test_resume_needs_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume needs the folder"):
        train(embedder(), stripes(), resume=True)
    with pytest.raises(ConfigError, match="choose one"):
        train(embedder(), stripes(), out=tmp_path, resume=True, overwrite=True)
    embedder().save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(embedder(), stripes(), out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "newer"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch, steps=5)
    last = list_checkpoints(tmp_path)[-1]
    data = bytearray(last.read_bytes())
    if damage == "newer":
        state = torch.load(last, weights_only=True)
        torch.save(state | {"format": 99}, last)
    else:
        data[len(data) // 2] ^= 0xFF
        last.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=f"{last.name} .*(damaged.*remove it|format 99)"):
        train(embedder(), stripes(), config=TrainConfig(**QUICK), out=tmp_path, resume=True)
    last.unlink()
    model, whole = embedder(), embedder()
    train(model, stripes(), config=TrainConfig(**QUICK), out=tmp_path, resume=True)
    train(whole, stripes(), config=TrainConfig(**QUICK))
    assert model.fingerprint == whole.fingerprint


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """The size of files is limited after the first checkpoints, which a full disk answers in the same way."""
    script = f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from tests.training.test_resume import QUICK, embedder, stripes
        from vitembed.errors import TrainingError
        from vitembed.training import TrainConfig, train
        from vitembed.training import learner
        original, taken = learner.Learner.step, 0
        def step(self, batch, **options):
            global taken
            taken += 1
            if taken == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return original(self, batch, **options)
        learner.Learner.step = step
        try:
            train(embedder(), stripes(), config=TrainConfig(**QUICK), out={str(tmp_path)!r})
        except TrainingError as error:
            sys.exit(str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "cannot save the checkpoint of step 5" in done.stderr
    assert "File too large; step-00000003.pt before it is intact" in done.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000003.pt"
    model, whole = embedder(), embedder()
    train(model, stripes(), config=TrainConfig(**QUICK), out=tmp_path, resume=True)
    train(whole, stripes(), config=TrainConfig(**QUICK))
    assert model.fingerprint == whole.fingerprint


KILLED = """
    import sys
    from pathlib import Path
    from tests.training.test_resume import QUICK, embedder, stripes
    from vitembed.training import TrainConfig, train
    model = embedder()
    print("ready", flush=True)
    train(model, stripes(), config=TrainConfig(**QUICK | {"epochs": 14}), out=Path(sys.argv[1]), resume=True)
    print(model.fingerprint)
"""


def start(out: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_resumed_to_the_same_weights(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    while not [path for path in list_checkpoints(tmp_path) if path.stem > "step-00000012"]:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -number  # SIGTERM is not swallowed: it follows once the checkpoint is saved
    done = list_checkpoints(tmp_path)[-1].stem
    rest = start(tmp_path)
    output, errors = rest.communicate()
    assert rest.returncode == 0, errors
    whole = embedder()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(whole, stripes(), config=TrainConfig(**QUICK | {"epochs": 14}))
    finally:
        torch.set_num_threads(threads)
    assert output.strip() == whole.fingerprint
    assert done < list_checkpoints(tmp_path)[-1].stem
