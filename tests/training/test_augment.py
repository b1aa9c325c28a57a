"""Random changes to batches of images."""

import numpy as np
import pytest
import torch

from vitembed.errors import ConfigError
from vitembed.training.augment import Augment


def blobs(count: int = 200, size: tuple[int, int] = (41, 61)) -> torch.Tensor:
    """White squares of 5 x 5 pixels in the middle, right above it, on black."""
    images = torch.zeros(count, 1, *size, dtype=torch.uint8)
    images[:, :, 18:23, 38:43] = 255
    return images


def centre(images: torch.Tensor) -> np.ndarray:
    """Return (B, 2): row and column of the centre of mass, relative to the middle of the image."""
    weight = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
    rows = torch.arange(images.shape[2]) - (images.shape[2] - 1) / 2
    columns = torch.arange(images.shape[3]) - (images.shape[3] - 1) / 2
    return torch.stack([(weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)], dim=1).numpy()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_no_change_is_no_change() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    assert torch.equal(Augment.named("none")(images), images.float())


def test_turns_keep_the_distance_from_the_middle_on_images_that_are_not_square() -> None:
    found = centre(Augment(rotate=90)(blobs(), generator()))
    radius = np.hypot(found[:, 0], found[:, 1])
    np.testing.assert_allclose(radius, 10, atol=0.5)
    angle = np.degrees(np.arctan2(found[:, 0], found[:, 1]))
    assert angle.min() < -80
    assert angle.max() > 80
    assert np.abs(angle).max() <= 91


def test_scales_move_points_outward_by_the_factor() -> None:
    found = centre(Augment(scale=(1.5, 1.5))(blobs(), generator()))
    np.testing.assert_allclose(found, [[0, 15]] * 200, atol=0.3)


def test_shifts_are_a_share_of_the_side() -> None:
    found = centre(Augment(translate=0.1)(blobs(), generator()))
    assert np.abs(found[:, 0]).max() == pytest.approx(4.1, abs=0.3)
    assert np.abs(found[:, 1] - 10).max() == pytest.approx(6.1, abs=0.3)


def test_half_of_the_images_are_mirrored() -> None:
    found = centre(Augment(flip=0.5)(blobs(1000), generator()))
    np.testing.assert_allclose(np.abs(found[:, 1]), 10, atol=0.2)
    assert (found[:, 1] < 0).mean() == pytest.approx(0.5, abs=0.05)


def test_shears_move_upper_and_lower_rows_apart() -> None:
    images = torch.zeros(50, 1, 41, 41, dtype=torch.uint8)
    images[:, :, 5, 20] = 255
    found = centre(Augment(shear=30)(images, generator()))
    assert np.abs(found[:, 1]).max() > 5
    np.testing.assert_allclose(found[:, 0], -15, atol=0.6)


def test_light_stays_in_range_and_leaves_places_alone() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    changed = Augment(light=0.5)(images, generator())
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert not torch.equal(changed, images.float())
    for before, after in zip(images.float(), changed, strict=True):
        order = before.flatten().argsort()
        assert (after.flatten()[order].diff() >= -1e-3).all()  # what was brighter still is


@pytest.mark.parametrize("name", ["ink", "photo"])
def test_presets_repeat_with_the_generator_and_differ_between_images(name: str) -> None:
    augment = Augment.named(name)
    one, two = augment(blobs(4), generator()), augment(blobs(4), generator())
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert one.shape == (4, 1, 41, 61)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rotate": 200}, "rotate"),
        ({"flip": -0.1}, "flip"),
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (2, 1)}, "scale"),
        ({"padding": "zeros"}, "unknown padding"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Augment(**values)  # type: ignore[arg-type]


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'photo'"):
        Augment.named("photos")
