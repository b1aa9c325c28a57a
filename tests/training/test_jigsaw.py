"""Jigsaw pre-training: puzzles are what they should be, they are learned, and training goes on from the result."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, TrainingError
from vitembed.files import atomic_write
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ImageDataset, TrainConfig, train
from vitembed.training.jigsaw import JigsawConfig, _Solver, pretrain_jigsaw, unlabelled_images
from vitembed.training.puzzle import NOT_ASKED, PuzzleNet, cut, lay
from vitembed.vit import ViTConfig

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "workers": 0}


def embedder(size: tuple[int, int] = (16, 16), stem: tuple[tuple[int, int], ...] = (), channels: int = 1) -> Embedder:
    config = ViTConfig(size, 4, channels, width=32, depth=2, heads=2, stem=stem)
    grey = Preprocess.grey(size, resize="squash", invert=False)
    return Embedder.create(config, preprocess=grey if channels == 1 else Preprocess(size), device="cpu")


def ramps(count: int = 64, seed: int = 0) -> ImageDataset:
    """Noisy pictures that grow brighter to the right and striped towards the bottom: every place looks different."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    picture = 12 * (x // 4) + 50 * (y // 4) + 30 * (y % 2)
    images = [np.clip(picture + rng.normal(0, 2, (16, 16)), 0, 255).astype(np.uint8) for _ in range(count)]
    return ImageDataset.from_arrays(images, [f"folder{i % 4}" for i in range(count)])


def noise(*shape: int) -> Tensor:
    return 255 * torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def make(model: Embedder, pixels: Tensor, *, tile: int = 1, mask: float = 0.0, contrast: float = 0.0) -> Any:
    net = PuzzleNet(model.network, tile)
    generator = torch.Generator().manual_seed(0)
    return net, *net.puzzle(pixels, mask=mask, min_contrast=contrast, generator=generator)


def test_tiles_are_those_of_a_plain_loop_and_laying_undoes_cutting() -> None:
    images = noise(2, 3, 8, 12)
    tiles = cut(images, 4)
    assert tiles.shape == (2, 6, 3, 4, 4)
    for row in range(2):
        for column in range(3):
            expected = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(tiles[:, 3 * row + column], expected)
    assert torch.equal(lay(tiles, (2, 3)), images)


@pytest.mark.parametrize("tile", [1, 2])
def test_putting_each_tile_at_its_target_gives_the_image_back(tile: int) -> None:
    model = embedder((16, 24), channels=3)
    pixels = noise(3, 3, 16, 24)
    net, puzzle, places = make(model, pixels, tile=tile)
    tiles, restored = cut(puzzle, 4 * tile), cut(torch.zeros_like(puzzle), 4 * tile)
    assert places.shape == (3, 24 // tile**2)
    for image in range(3):
        assert sorted(places[image].tolist()) == list(range(24 // tile**2))
        for position, place in enumerate(places[image].tolist()):
            restored[image, place] = tiles[image, position]
    assert torch.equal(lay(restored, net.grid), model.network.normalise(pixels))
    assert not torch.equal(places[0], places[1])


def test_masked_tiles_are_the_mean_and_are_not_asked_for() -> None:
    net, puzzle, places = make(embedder(channels=3), noise(5, 3, 16, 16), mask=0.25)
    hidden = places == NOT_ASKED
    assert hidden.sum(dim=1).tolist() == [4] * 5
    assert len({tuple(row) for row in hidden.tolist()}) > 1
    blank = (cut(puzzle, net.side) == 0).flatten(2).all(dim=-1)
    assert torch.equal(blank, hidden)


def test_one_tile_at_least_stays_in_sight_however_many_are_masked() -> None:
    _, puzzle, places = make(embedder(), noise(5, 1, 16, 16), tile=2, mask=0.99)
    assert (places != NOT_ASKED).sum(dim=1).tolist() == [1] * 5
    assert (cut(puzzle, 8) != 0).flatten(2).any(dim=-1).sum(dim=1).tolist() == [1] * 5


def test_blank_tiles_stay_in_the_puzzle_but_are_not_asked_for() -> None:
    pixels = torch.full((1, 1, 16, 16), 200.0)
    pixels[0, 0, 5, 9] = 0  # one dot in row 1, column 2
    _, puzzle, places = make(embedder(), pixels, contrast=8.0)
    assert [place for place in places[0].tolist() if place != NOT_ASKED] == [6]
    assert puzzle.min() < puzzle.max()
    _, _, every = make(embedder(), pixels, contrast=0.0)
    assert sorted(every[0].tolist()) == list(range(16))


def test_contrast_within_a_channel_counts_and_not_that_between_channels() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, 0] = 255  # plain red
    _, _, places = make(embedder(channels=3), pixels, contrast=1.0)
    assert (places == NOT_ASKED).all()


@pytest.mark.parametrize("tile", [1, 2])
def test_without_positions_the_answer_moves_with_the_tile(tile: int) -> None:
    net = PuzzleNet(embedder().network, tile).eval()
    images = noise(2, 1, 16, 16) / 255
    order = torch.randperm(16 // tile**2, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        answers = net(images)
        moved = net(lay(cut(images, net.side)[:, order], net.grid))
    torch.testing.assert_close(moved, answers[:, order], atol=1e-5, rtol=1e-4)


def test_positions_get_no_gradient_and_every_other_weight_of_the_encoder_does() -> None:
    net, puzzle, places = make(embedder(stem=((8, 2), (16, 2))), noise(8, 1, 16, 16))
    logits = net(puzzle)
    assert logits.shape == (8, 16, 16)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten()).backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert {name.rsplit(".", 1)[-1] for name in without} <= {"pos_embed"}


def test_puzzles_are_learned_and_held_out_ones_are_solved() -> None:
    model = embedder()
    config = JigsawConfig(**{**QUICK, "epochs": 25, "learning_rate": 1e-2})
    result = pretrain_jigsaw(model, ramps(), config=config)
    assert result.chance == pytest.approx(1 / 16)
    assert abs(result.history[0]["loss"] - math.log(16)) < 0.7
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.accuracy > 0.8
    assert result.accuracy == result.history[-1]["validation accuracy"]


def test_chance_is_the_best_constant_answer_where_places_are_not_alike() -> None:
    rng = np.random.default_rng(0)
    images = [np.zeros((16, 16), np.uint8) for _ in range(8)]
    for number, image in enumerate(images):
        image[:4, :4] = rng.integers(0, 255, (4, 4))  # every image has ink at place 0, every other one at place 15 too
        if number % 2:
            image[12:, 12:] = rng.integers(0, 255, (4, 4))
    split = ImageDataset.from_arrays(images, ["a"] * 8, is_validation=[False] * 4 + [True] * 4)
    result = pretrain_jigsaw(embedder(), split, config=JigsawConfig(**QUICK))
    assert result.chance == pytest.approx(4 / 6)


def test_the_folder_holds_the_model_and_its_history_and_says_what_was_seen(tmp_path: Path) -> None:
    model = embedder()
    data = ramps()
    result = pretrain_jigsaw(model, data, config=JigsawConfig(**QUICK), out=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "README.md",
        "config.json",
        "history.json",
        "model.safetensors",
    }
    loaded = Embedder.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.fingerprint == model.fingerprint
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result.history
    assert set(result.history[0]) == {
        "epoch",
        "loss",
        "accuracy",
        "validation accuracy",
        "learning_rate",
        "seconds",
    }
    provenance = loaded.provenance
    assert provenance["pre-trained on"] == ["folder0", "folder1", "folder2", "folder3"]
    assert provenance["pre-training images"] == 61  # three of 64 were measured on
    assert provenance["trained classes"] == []
    assert provenance["jigsaw accuracy"] == result.accuracy
    assert provenance["epoch"] == 2


def test_training_goes_on_from_the_folder_and_may_hold_its_classes_out(tmp_path: Path) -> None:
    pretrain_jigsaw(embedder(), ramps(), config=JigsawConfig(**QUICK), out=tmp_path)
    model = Embedder.from_pretrained(tmp_path, device="cpu")
    before = model.fingerprint
    train(model, ramps(), config=TrainConfig(epochs=1, classes_per_batch=2, validation_share=0.5, workers=0))
    assert model.fingerprint != before
    assert model.provenance["initialised from"] == before
    assert len(model.provenance["held-out classes"]) == 2


def test_what_the_data_holds_out_is_not_learned_from() -> None:
    data = ramps()
    held = [label == 3 for label in data.labels]
    split = ImageDataset.from_arrays(data.images, [data.classes[label] for label in data.labels], is_validation=held)
    model = embedder()
    pretrain_jigsaw(model, split, config=JigsawConfig(**QUICK))
    assert model.provenance["pre-trained on"] == ["folder0", "folder1", "folder2"]
    assert model.provenance["pre-training images"] == 48


def test_measuring_leaves_the_weights_alone() -> None:
    fingerprints = set()
    for other in (ramps(8, seed=1), ramps(16, seed=2)):
        images, held_out = [*ramps(32).images, *other.images], [False] * 32 + [True] * len(other)
        model = embedder(stem=((8, 2), (16, 2)))  # with batch normalisation, which would remember what it sees
        split = ImageDataset.from_arrays(images, ["a"] * len(images), is_validation=held_out)
        pretrain_jigsaw(model, split, config=JigsawConfig(**QUICK))
        fingerprints.add(model.fingerprint)
    assert len(fingerprints) == 1


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    fingerprints = []
    for seed in (3, 3, 4):
        model = embedder(stem=((8, 2), (16, 2)))
        pretrain_jigsaw(model, ramps(), config=JigsawConfig(**QUICK, augment=Augment.named("photo"), seed=seed))
        fingerprints.append(model.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_mixed_precision_leaves_the_embedder_as_it_is_saved(tmp_path: Path) -> None:
    model = embedder()
    pretrain_jigsaw(model, ramps(), config=JigsawConfig(**QUICK, precision="bf16"), out=tmp_path)
    images = [np.full((16, 16), 9, np.uint8), np.eye(16, dtype=np.uint8) * 200]
    assert np.array_equal(model.encode(images), Embedder.from_pretrained(tmp_path, device="cpu").encode(images))


def test_batches_of_blank_images_stop_nothing() -> None:
    data = ramps(16)
    blank = [np.zeros((16, 16), np.uint8)] * 48
    mixed = ImageDataset.from_arrays([*blank, *data.images], ["a"] * 64, is_validation=[False] * 56 + [True] * 8)
    config = JigsawConfig(**{**QUICK, "batch_size": 1, "epochs": 1, "min_contrast": 3})
    model = embedder()
    result = pretrain_jigsaw(model, mixed, config=config)
    assert math.isfinite(result.history[0]["loss"])
    assert np.isfinite(model.encode(data.images)).all()


def test_images_without_contrast_are_refused() -> None:
    blank = ImageDataset.from_arrays([np.zeros((16, 16), np.uint8)] * 8, ["a"] * 8)
    with pytest.raises(DataError, match="lower min_contrast"):
        pretrain_jigsaw(embedder(), blank, config=JigsawConfig(**QUICK))


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        pretrain_jigsaw(embedder(), ramps(1), config=JigsawConfig(**QUICK))


def test_a_loss_that_becomes_nan_stops_with_advice_and_keeps_the_last_epoch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = embedder()
    forward, calls = PuzzleNet.forward, 0

    def breaking(net: PuzzleNet, puzzle: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(net, puzzle) * (float("nan") if calls > 10 else 1)

    monkeypatch.setattr(PuzzleNet, "forward", breaking)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        pretrain_jigsaw(model, ramps(), config=JigsawConfig(**{**QUICK, "epochs": 9}), out=tmp_path)
    saved = Embedder.from_pretrained(tmp_path, device="cpu")
    assert saved.fingerprint == model.fingerprint
    assert saved.provenance["epoch"] == len(json.loads((tmp_path / "history.json").read_text()))
    assert np.isfinite(saved.encode(ramps(2).images)).all()


def test_an_earlier_model_is_overwritten_on_purpose_alone(tmp_path: Path) -> None:
    old = embedder()
    old.save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="already holds a model"):
        pretrain_jigsaw(embedder(), ramps(), config=JigsawConfig(**QUICK), out=tmp_path)
    assert Embedder.from_pretrained(tmp_path).fingerprint == old.fingerprint
    pretrain_jigsaw(embedder(), ramps(), config=JigsawConfig(**QUICK), out=tmp_path, overwrite=True)
    assert Embedder.from_pretrained(tmp_path).fingerprint != old.fingerprint


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.training.test_jigsaw import embedder, ramps
from vitembed.training.jigsaw import JigsawConfig, pretrain_jigsaw
pretrain_jigsaw(embedder(), ramps(), config=JigsawConfig(epochs=100000, batch_size=16, workers=0), out=sys.argv[1])
"""


def test_a_process_killed_in_the_middle_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "run"), root], stderr=subprocess.DEVNULL)
    try:
        history, deadline = tmp_path / "run" / "history.json", time.monotonic() + 120
        while not (history.exists() and len(json.loads(history.read_text())) >= 3):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    model = Embedder.from_pretrained(tmp_path / "run", device="cpu")
    assert model.provenance["epoch"] >= 3
    assert model.encode(ramps(2).images).shape == (2, 32)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("warmup", 1.0),
        ("clip", 0.0),
        ("tile", 0),
        ("mask", 1.0),
        ("mask", float("nan")),
        ("min_contrast", -1.0),
        ("validation_share", 0.0),
        ("workers", -1),
        ("seed", -1),
        ("precision", "int8"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        JigsawConfig(**{setting: value})


@pytest.mark.parametrize("tile", [3, 4, 8])
def test_tiles_that_do_not_fill_the_image_or_are_the_image_are_refused(tile: int) -> None:
    with pytest.raises(ConfigError, match="4 x 4 patches"):
        PuzzleNet(embedder().network, tile)


def test_a_backbone_of_others_has_no_patches_to_put_together() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 8))
    model = Embedder.from_module(flat, Preprocess.grey((16, 16), resize="squash"), device="cpu")
    with pytest.raises(ConfigError, match=r"Sequential, has no patches to put together"):
        pretrain_jigsaw(model, ramps(), config=JigsawConfig(**QUICK))


def test_a_step_needs_no_double_precision_of_the_device() -> None:
    model = embedder()
    solver = _Solver(PuzzleNet(model.network, 1), model.device, JigsawConfig(**QUICK), steps=1)
    assert solver._step(noise(4, 1, 16, 16)).dtype == torch.float32


def test_what_was_pretrained_on_is_handed_on_by_training() -> None:
    model = embedder()
    model.provenance = {"source": "timm:vit_x", "family": "timm", "notes": []}
    pretrain_jigsaw(model, ramps(), config=JigsawConfig(**QUICK))
    kept = {key: model.provenance[key] for key in ("base", "task", "pre-trained on", "pre-training images")}
    assert kept["base"] == {"source": "timm:vit_x", "family": "timm", "notes": []}
    config = TrainConfig(epochs=1, classes_per_batch=2, validation_share=0.5, workers=0)
    for _ in range(2):
        train(model, ramps(), config=config)
        assert kept.items() <= model.provenance.items()
        assert len(model.provenance["trained classes"]) == 2


def test_unlabelled_images_may_lie_at_any_depth(tmp_path: Path) -> None:
    for name in ("a.png", "one/b.png", "one/two/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    found = unlabelled_images(tmp_path)
    assert [Path(str(image)).name for image in found.images] == ["a.png", "b.png", "c.png"]
    assert found.classes == (".", "one", "one/two")
    with pytest.raises(DataError, match="does not exist"):
        unlabelled_images(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        unlabelled_images(tmp_path / "empty")
    atomic_write(tmp_path / "t.csv", "path,label\na.png,x\none/b.png,y\n")
    assert unlabelled_images(tmp_path / "t.csv").classes == ("x", "y")
