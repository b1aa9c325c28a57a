"""Images to batches of pixels."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitembed import decoding
from vitembed.decoding import as_sequence, available_cores, default_workers, pixel_batches
from vitembed.errors import ConfigError
from vitembed.preprocess import Preprocess

PREPROCESS = Preprocess((8, 8))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(i)).save(path)
    return paths


def test_one_image_many_and_arrays_become_sequences(photos: list[Path]) -> None:
    image = Image.fromarray(picture(0))
    for one in (str(photos[0]), photos[0], image, picture(0), picture(0)[..., 0]):
        [only] = as_sequence(one)
        assert only is one
    assert len(as_sequence(np.stack([picture(0), picture(1)]))) == 2
    assert as_sequence(np.array(["a.png", "b.png"])) == ["a.png", "b.png"]
    assert as_sequence(np.array([photos[0], photos[1]], dtype=object)) == photos[:2]
    assert as_sequence(path for path in photos) == photos
    assert as_sequence(photos) is photos
    for nothing in (None, 3, b"a.png"):
        with pytest.raises(ConfigError, match="expected images: paths, PIL images or arrays; got"):
            as_sequence(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_pixels_in_order_and_the_errors_beside_them(photos: list[Path], workers: int) -> None:
    photos[1].write_bytes(b"no image")
    batches = list(pixel_batches(photos, PREPROCESS, batch_size=2, workers=workers, pin=False))
    assert [len(pixels) for pixels, _ in batches] == [1, 2, 1]
    [(offset, error)] = [failure for _, failures in batches for failure in failures]
    assert (offset, error.source) == (1, str(photos[1]))
    expected = np.stack([PREPROCESS(path) for i, path in enumerate(photos) if i != 1])
    found = torch.cat([pixels for pixels, _ in batches])
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_batch_without_one_good_image_is_empty(photos: list[Path]) -> None:
    photos[0].write_bytes(b"")
    [(pixels, errors)] = pixel_batches(photos[:1], PREPROCESS, batch_size=4, workers=0, pin=False)
    assert len(pixels) == 0
    assert [offset for offset, _ in errors] == [0]


def test_threads_are_for_files_alone(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def read(image: object, preprocess: Preprocess) -> np.ndarray:
        seen.append(threading.current_thread().name)
        return np.zeros((3, 8, 8), np.uint8)

    monkeypatch.setattr(decoding, "_read", read)
    for images, expected in [(photos, True), (photos[:1], False), ([picture(0)] * 5, False)]:
        seen.clear()
        batches = pixel_batches(images, PREPROCESS, batch_size=2, workers=None, pin=False)  # type: ignore[arg-type]
        assert sum(len(pixels) for pixels, _ in batches) == len(images)
        assert all(name.startswith("vitembed-decode") is expected for name in seen)
    assert list(pixel_batches([], PREPROCESS, batch_size=2, workers=None, pin=False)) == []
    monkeypatch.setattr(decoding, "available_cores", lambda: 3)
    assert default_workers() == 3
    monkeypatch.setattr(decoding, "available_cores", lambda: 96)
    assert default_workers() == 8


def test_the_order_is_that_of_the_images_however_long_each_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        time.sleep(0.004 * (7 - int(image[0]) % 7))
        return np.full((3, 8, 8), image[0], np.uint8)

    monkeypatch.setattr(decoding, "_read", read)
    images = [np.array([i]) for i in range(23)]
    batches = pixel_batches(images, PREPROCESS, batch_size=4, workers=5, pin=False)  # type: ignore[arg-type]
    assert [int(image[0, 0, 0]) for pixels, _ in batches for image in pixels] == list(range(23))


def test_two_batches_are_read_ahead_and_none_for_whom_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def remember(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        read.append(int(image[0]))
        return np.zeros((3, 8, 8), np.uint8)

    monkeypatch.setattr(decoding, "_read", remember)
    images = [np.array([i]) for i in range(40)]
    batches = pixel_batches(images, PREPROCESS, batch_size=4, workers=2, pin=False)  # type: ignore[arg-type]
    assert read == []
    next(batches)
    time.sleep(0.05)
    assert sorted(read) == list(range(12))
    batches.close()  # type: ignore[attr-defined]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("vitembed-decode")] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_is_not_taken_for_a_bad_image(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(self: Preprocess, image: object) -> np.ndarray:
        raise ZeroDivisionError

    monkeypatch.setattr(Preprocess, "__call__", stumble)
    with pytest.raises(ZeroDivisionError):
        list(pixel_batches([picture(0)] * 3, PREPROCESS, batch_size=2, workers=workers, pin=False))


def test_there_is_at_least_one_core() -> None:
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"workers": -1}, "workers must be a whole number, not negative; got -1"),
        ({"workers": 1.5}, "workers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pixel_batches([], PREPROCESS, **{"batch_size": 1, "workers": 0, "pin": False, **settings})  # type: ignore[arg-type]
