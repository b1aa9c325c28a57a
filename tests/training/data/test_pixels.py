"""Pixels of labelled images, and images that cannot be read: set aside, counted, named, and too many stop the run."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vitembed.errors import ConfigError, ImageError
from vitembed.images import MAX_PIXELS
from vitembed.preprocess import Preprocess
from vitembed.training.data import pixels as module
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.pixels import LabelledPixels, PixelDataset

GREY = Preprocess.grey((8, 8), resize="squash", invert=False)
TRUNCATED, MISSING, BOMB = 5, 11, 17


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write five classes of four photographs, the grey level of each its number."""
    for number in range(20):
        path = tmp_path / "photos" / f"class{number // 4}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 48), 10 * number).save(path)
    return tmp_path / "photos"


@pytest.fixture
def damaged(folder: Path) -> ImageDataset:
    """Return the photographs, three of which have been damaged since they were listed."""
    dataset = ImageDataset.load(folder)
    truncated, missing, bomb = (Path(str(dataset.images[i])) for i in (TRUNCATED, MISSING, BOMB))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    missing.unlink()
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(bomb, format="PNG")
    return dataset


@pytest.fixture(params=[True, False], ids=["memory", "lazy"])
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 1 << 30 if request.param else 0)
    return bool(request.param)


def check_batches(batches: Iterable[LabelledPixels], asked: list[list[int]], dataset: ImageDataset) -> None:
    """Check that batches are those asked for without the damaged images, with the right pixels and labels."""
    lost = {TRUNCATED, MISSING, BOMB}
    expected = [[i for i in batch if i not in lost] for batch in asked]
    for (pixels, labels, positions), kept in zip(batches, expected, strict=True):
        assert positions.dtype == labels.dtype == torch.int64
        assert positions.tolist() == kept
        assert labels.tolist() == dataset.labels[kept].tolist()
        assert len(pixels) == len(kept)
        for array, position in zip(pixels.numpy(), kept, strict=True):
            np.testing.assert_array_equal(array, GREY(dataset.images[position]))


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_are_those_of_the_preprocessing(folder: Path, cached: bool, workers: int) -> None:
    dataset = ImageDataset.load(folder)
    pixels = PixelDataset(dataset, GREY, workers=workers)
    assert (pixels.cache is not None) == cached
    [batch] = pixels.batches([[3, 17, 4]], workers=workers)
    assert batch.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(batch.pixels.numpy(), [GREY(dataset.images[i]) for i in (3, 17, 4)])
    assert batch.labels.tolist() == dataset.labels[[3, 17, 4]].tolist()
    assert batch.positions.tolist() == [3, 17, 4]
    whole = torch.cat([batch.pixels for batch in pixels.in_order(7, workers=workers)])
    np.testing.assert_array_equal(whole.numpy(), [GREY(image) for image in dataset.images])
    assert pixels.unreadable == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_cost_the_others_nothing(damaged: ImageDataset, cached: bool, workers: int) -> None:
    pixels = PixelDataset(damaged, GREY, workers=workers, max_unreadable=0.15)
    assert len(pixels.unreadable) == (3 if cached else 0)
    asked = [[0, TRUNCATED, 7], [MISSING, BOMB], [1, 2], [BOMB, 3, 4, MISSING, 3]]
    for _ in range(2):  # two epochs, and each image counts once
        check_batches(pixels.batches(asked, workers=workers), asked, damaged)
        assert {path: reason.split(":")[0] for path, reason in pixels.unreadable.items()} == {
            str(damaged.images[TRUNCATED]): "is truncated",
            str(damaged.images[MISSING]): "does not exist",
            str(damaged.images[BOMB]): "has too many pixels to be decoded safely",
        }
    slices = [list(range(start, min(start + 6, 20))) for start in range(0, 20, 6)]
    check_batches(pixels.in_order(6, workers=workers), slices, damaged)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_unreadable_images_than_the_share_stop_the_run(damaged: ImageDataset, cached: bool, workers: int) -> None:
    with pytest.raises(ImageError) as caught:
        list(PixelDataset(damaged, GREY, workers=workers, max_unreadable=0.1).in_order(8, workers=workers))
    message = str(caught.value)
    assert message.startswith(f"{damaged.images[TRUNCATED]}: is truncated")
    assert "3 of the 20 images here (training and validation count apart) cannot be read, this one first" in message
    assert "at most 2 (a share of 0.1)" in message
    assert "raise max_unreadable" in message
    assert "\n" not in message


def test_an_error_of_several_lines_becomes_one_of_one_line(cached: bool) -> None:
    class Items(list[int]):
        targets = (0, 0, 1, 1)

        def __getitem__(self, position: object) -> tuple[np.ndarray, int]:
            if position == 2:
                raise OSError("broken:\n  the first reason\n  the second")
            return np.zeros((8, 8), np.uint8), 0

    dataset = ImageDataset.from_torchvision(Items(range(4)))
    pixels = PixelDataset(dataset, GREY, max_unreadable=0.5)
    list(pixels.in_order(2))
    reason = "cannot be read: broken: the first reason the second"
    assert pixels.unreadable == {"item 2 of the data set": reason}
    with pytest.raises(ImageError, match=rf"^item 2 of the data set: {reason}; 1 of the 4 .*max_unreadable$"):
        list(PixelDataset(dataset, GREY, max_unreadable=0).in_order(2))


def test_by_default_one_in_twenty_is_too_many_and_zero_stops_at_the_first(damaged: ImageDataset, cached: bool) -> None:
    for settings in ({}, {"max_unreadable": 0.0}):
        with pytest.raises(ImageError, match=r"05\.jpg: is truncated.*1 of the 20 .* at most 0"):
            list(PixelDataset(damaged, GREY, **settings).in_order(4))


def test_the_share_is_a_limit_that_may_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """29 of 100 is a share of 0.29, though 0.29 * 100 is below 29 in floating point."""
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 0)
    images = [np.full((8, 8), -1.0 if i < 29 else 0.5) for i in range(100)]
    dataset = ImageDataset.from_arrays(images, np.arange(100) % 5)
    pixels = PixelDataset(dataset, GREY, max_unreadable=0.29)
    assert sum(len(batch.labels) for batch in pixels.in_order(10)) == 71
    assert list(pixels.unreadable) == [f"image {i}" for i in range(29)]
    with pytest.raises(ImageError, match="29 of the 100"):
        list(PixelDataset(dataset, GREY, max_unreadable=0.28).in_order(10))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    dataset = ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * 2, "ab")
    with pytest.raises(ConfigError, match=r"max_unreadable .* \[0, 1\]; got"):
        PixelDataset(dataset, GREY, max_unreadable=share)


def test_an_image_known_to_be_unreadable_is_not_tried_again(
    damaged: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 0)
    pixels = PixelDataset(damaged, GREY, max_unreadable=0.5)
    list(pixels.in_order(4))
    path = Path(str(damaged.images[MISSING]))
    Image.new("L", (8, 8)).save(path)  # it came back: a run that saw it at times could not be repeated
    assert MISSING not in torch.cat([batch.positions for batch in pixels.in_order(4)])


def test_a_file_that_vanishes_between_epochs_is_met_in_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHE_BYTES", 0)
    dataset = ImageDataset.load(folder)
    pixels = PixelDataset(dataset, GREY, max_unreadable=0.05)
    assert sum(len(batch.labels) for batch in pixels.in_order(4)) == 20
    os.remove(str(dataset.images[9]))  # noqa: PTH107
    assert sum(len(batch.labels) for batch in pixels.in_order(4)) == 19
    assert list(pixels.unreadable) == [str(dataset.images[9])]


def test_a_broken_item_of_a_torchvision_data_set_is_set_aside(folder: Path, cached: bool) -> None:
    (folder / "class2" / "09.jpg").write_bytes(b"no image")
    train, held = ImageDataset.from_torchvision(torchvision.datasets.ImageFolder(folder)).split(
        "classes", share=0.4, seed=3, again=["class0", "class1"]
    )
    assert held is not None
    pixels = PixelDataset(train, GREY, max_unreadable=0.1)
    assert torch.cat([batch.positions for batch in pixels.in_order(5)]).tolist() == [0, *range(2, 12)]
    assert list(pixels.unreadable) == ["item 9 of the data set"]
    assert "cannot identify image" in pixels.unreadable["item 9 of the data set"]


def test_splitting_a_lazy_data_set_fetches_nothing() -> None:
    class Items:
        targets = (0, 0, 1, 1)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
            fetched.append(position)
            return np.full((8, 8), position, np.uint8), 0

    fetched: list[int] = []
    chosen = ImageDataset.from_torchvision(Items()).subset(np.array([3, 1])).subset(np.array([True, False]))
    assert fetched == []
    assert np.asarray(chosen.images[0]).max() == 3
    assert fetched == [3]
