import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from vitembed.errors import ConfigError
from vitembed.preprocess import Preprocess

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def photos(count: int = 16) -> list[Image.Image]:
    """Noise over gradients in sizes of all kinds, (width, height) from 1 to 500: portrait, landscape, square, tiny."""
    rng = np.random.default_rng(7)
    sizes = [(333, 333), (1, 1), (5, 3), (224, 224), (256, 256), (225, 500), (227, 224), (224, 231), (300, 199)]
    sizes += [tuple(rng.integers(30, 501, 2).tolist()) for _ in range(count)]
    images = []
    for width, height in sizes:
        ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 55, height)[:, None, None]
        values = ramp * rng.uniform(0.3, 1, 3) + rng.normal(0, 30, (height, width, 3))
        images.append(Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)))
    return images


def largest_difference(preprocess: Preprocess, theirs: Callable[[Image.Image], np.ndarray]) -> int:
    """Return by how many levels two ways to make (C, H, W) pixels differ at the most."""
    return max(int(np.abs(preprocess(image).astype(int) - theirs(image)).max()) for image in photos())


def resized_whole(preprocess: Preprocess, image: Image.Image) -> np.ndarray:
    """Return the (C, H, W) pixels of "crop" in two plain steps: the whole is resized, then its middle cut out."""
    height, width = preprocess.size
    sampling = Image.Resampling[preprocess.interpolation.upper()]
    whole = image.resize(preprocess._whole(image.size), sampling)
    left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
    pixels = np.asarray(whole.crop((left, top, left + width, top + height)))
    return pixels.reshape(height, width, -1).transpose(2, 0, 1).astype(int)


# Parity with the libraries that models come from: every pixel


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("short", "crop"), [(256, 224), (224, 224), (242, 224), (73, 64), (100, 51)])
def test_crop_is_that_of_torchvision(short: int, crop: int, interpolation: str) -> None:
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(short, mode), transforms.CenterCrop(crop)])
    ours = Preprocess((crop, crop), interpolation=interpolation, crop_share=crop / short)
    assert largest_difference(ours, lambda image: np.asarray(theirs(image)).transpose(2, 0, 1)) == 0


@pytest.mark.parametrize(("mode", "ours"), [("center", "crop"), ("squash", "squash"), ("border", "pad")])
@pytest.mark.parametrize("share", [1.0, 0.95, 0.9, 0.888, 0.875])
@pytest.mark.parametrize("size", [(224, 224), (64, 48), (32, 112)], ids=str)
def test_every_crop_mode_is_that_of_timm(size: tuple[int, int], share: float, mode: str, ours: Any) -> None:
    if mode == "border" and share != 1:
        pytest.skip("no model of timm has it, and we refuse it")
    theirs = create_transform(
        (3, *size), interpolation="bicubic", crop_pct=share, crop_mode=mode, normalize=False, mean=(0.5,) * 3
    )
    # timm fills the border with the mean, and cannot shrink a side to less than one pixel
    preprocess = Preprocess(size, resize=ours, crop_share=share, fill=round(255 * 0.5), **HALF)
    assert largest_difference(preprocess, lambda image: theirs(image).numpy()) == 0


def processors() -> list[Any]:
    resized = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    squashed = {"size": {"height": 224, "width": 224}}
    crop = Preprocess(crop_share=224 / 256, crop_offset="down")
    squash = Preprocess(resize="squash", interpolation="bilinear")
    return [
        pytest.param("BitImageProcessor", resized, crop, id="bit-256"),
        pytest.param("CLIPImageProcessor", resized, crop, id="clip-256"),
        pytest.param("CLIPImageProcessor", {}, Preprocess(crop_offset="down"), id="clip-224"),
        pytest.param("ViTImageProcessor", squashed, squash, id="vit"),
    ]


def of_transformers(name: str, settings: dict) -> Callable[[Image.Image], np.ndarray]:
    processor = getattr(transformers, name)(**settings, do_rescale=False, do_normalize=False)
    return lambda image: np.asarray(processor(image)["pixel_values"][0])


@pytest.mark.parametrize(("name", "settings", "ours"), processors())
def test_pixels_are_those_of_transformers_on_pil_images(name: str, settings: dict, ours: Preprocess) -> None:
    assert largest_difference(ours, of_transformers(f"{name}Pil", settings)) == 0


@pytest.mark.parametrize(("name", "settings", "ours"), processors())
def test_processors_of_transformers_that_resize_tensors_differ_by_less_than_a_third_of_a_level(
    name: str, settings: dict, ours: Preprocess
) -> None:
    theirs = of_transformers(name, settings)
    differences = [np.abs(ours(image).astype(int) - theirs(image)) for image in photos()]
    assert max(difference.mean() for difference in differences) < 1 / 3
    # Two levels, but for noise where Pillow resizes down first and across second, and torch the other way round.
    assert sorted(difference.max() for difference in differences)[-2] <= 2


def test_every_pair_of_resize_and_crop_side_is_met_by_their_quotient() -> None:
    image = Image.new("RGB", (1, 1))
    for short, crop in itertools.product(range(1, 1025, 3), (16, 224, 256, 336, 384, 448, 518)):
        if crop <= short:
            whole = Preprocess((crop, crop), crop_share=crop / short)._whole(image.size)
            assert whole == (short, short)
    assert math.floor(224 / (224 / 354)) == 353  # else the test shows nothing


@pytest.mark.parametrize("share", [1.0, 0.875, 0.1])
@pytest.mark.parametrize("size", [(4, 600), (700, 5), (300, 300)])
def test_only_the_middle_of_a_very_long_image_is_resized_with_the_same_outcome(
    size: tuple[int, int], share: float
) -> None:
    ramp = np.sin(np.arange(size[0])[:, None] / 7 + np.arange(size[1])[None] / 11)
    image = Image.fromarray(np.rint(127 + 100 * ramp).astype(np.uint8)).convert("RGB")
    preprocess = Preprocess((32, 32), crop_share=share)
    assert np.abs(preprocess(image).astype(int) - resized_whole(preprocess, image)).max() <= 1


# Preprocess on its own


@pytest.mark.parametrize("settings", [Preprocess((24, 32)), Preprocess.grey((20, 20))], ids=["rgb", "grey"])
def test_preprocess_gives_equal_pixels_for_path_pil_and_array(
    rgb: np.ndarray, tmp_path: Path, settings: Preprocess
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    expected = settings(path)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(settings(opened), expected)
    np.testing.assert_array_equal(settings(Image.fromarray(rgb)), expected)
    np.testing.assert_array_equal(settings(rgb), expected)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (17, 300), (300, 17), (24, 40), (64, 64)])
def test_result_is_contiguous_writable_uint8_of_the_size(resize: str, mode: str, shape: tuple[int, int]) -> None:
    values = (0.5,) * (3 if mode == "RGB" else 1)
    preprocess = Preprocess((24, 40), mode, resize, mean=values, std=values)
    pixels = preprocess(np.full((*shape, 3), 77, np.uint8))
    assert pixels.shape == (preprocess.channels, 24, 40)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    if resize != "pad":
        assert (pixels == 77).all()
    else:
        assert set(np.unique(pixels)) <= {77, 255}


def test_extreme_aspect_ratio_does_not_grow_on_the_way() -> None:
    line = np.zeros((1, 60_000), np.uint8)  # resized whole and then cropped, it would have 3 billion pixels
    for share in (1.0, 0.875):
        assert Preprocess((224, 224), crop_share=share)(line).shape == (3, 224, 224)


def test_pad_keeps_the_aspect_ratio_and_centres() -> None:
    pixels = Preprocess((8, 8), resize="pad", fill=9)(np.full((2, 4, 3), 100, np.uint8))
    expected = np.full((3, 8, 8), 9)
    expected[:, 2:6] = 100
    np.testing.assert_array_equal(pixels, expected)


def test_squash_equals_pillow(rgb: np.ndarray) -> None:
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        expected = Image.fromarray(rgb).resize((20, 10), Image.Resampling[name.upper()])
        pixels = Preprocess((10, 20), resize="squash", interpolation=name)(rgb)
        np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("invert", [True, False])
def test_grey_ink_has_a_ground_of_zero(invert: bool) -> None:
    drawing = np.full((10, 20), 255 if invert else 0, np.uint8)
    drawing[5, 5:15] = 255 - drawing[0, 0]
    pixels = Preprocess.grey((40, 40), invert=invert, interpolation="nearest")(drawing)
    assert pixels.shape == (1, 40, 40)
    assert pixels[0, :10].max() == pixels[0, 30:].max() == 0  # padding
    assert pixels[0, 0, 0] == 0
    assert pixels.max() == 255
    assert np.mean(pixels > 0) == pytest.approx(10 / 200 / 2)


def test_settings_survive_json_like_dictionaries() -> None:
    for settings_ in (Preprocess(), Preprocess.grey((105, 90)), Preprocess((7, 9), crop_share=0.9, crop_offset="down")):
        values = settings_.to_dict()
        assert all(isinstance(value, list | str | int | float) for value in values.values())
        assert Preprocess.from_dict(values) == settings_
        assert pickle.loads(pickle.dumps(settings_)) == settings_
    assert Preprocess.from_dict({}) == Preprocess()


def test_scan_is_written_only_where_it_is_on() -> None:
    plain, scan = Preprocess.grey((28, 28)), Preprocess.grey((28, 28), scan=True)
    assert "scan" not in plain.to_dict()  # so that models saved before it have the fingerprints they had
    assert scan.to_dict() == {**plain.to_dict(), "scan": True}
    assert Preprocess.from_dict(plain.to_dict()) == plain
    assert Preprocess.from_dict(scan.to_dict()) == scan
    black = Preprocess.grey((28, 28), scan=True, binarize=True)
    assert black.to_dict() == {**scan.to_dict(), "binarize": True}
    assert Preprocess.from_dict(black.to_dict()) == black
    assert pickle.loads(pickle.dumps(scan)) == scan


def test_scan_finds_the_ink_at_full_size_before_it_resizes(tmp_path: Path) -> None:
    page = np.full((1500, 2400), 180, np.uint8)
    page[300:303, 500:700] = 40  # 3 pixels high: gone in 64 pixels of the whole page
    page[300:400, 600:603] = 40
    pixels = Preprocess.grey((64, 64), scan=True)(page)
    assert pixels.shape == (1, 64, 64)
    assert pixels[0, 0].max() == 0
    assert pixels.max() > 150
    _, xs = np.nonzero(pixels[0] > 100)
    assert np.ptp(xs) > 40
    moved = np.where(np.roll(page, (600, 900), (0, 1)) == 180, 225, 50).astype(np.uint8)  # elsewhere, on another ground
    np.testing.assert_allclose(Preprocess.grey((64, 64), scan=True)(moved).astype(int), pixels.astype(int), atol=2)
    path = tmp_path / "page.png"
    Image.fromarray(page).save(path)
    np.testing.assert_array_equal(Preprocess.grey((64, 64), scan=True)(path), pixels)
    colour = Image.fromarray(page).convert("RGB")
    np.testing.assert_array_equal(Preprocess.grey((64, 64), scan=True)(colour), pixels)


def test_a_blank_scan_becomes_a_blank_image() -> None:
    noisy = np.random.default_rng(0).normal(200, 4, (300, 500)).astype(np.uint8)
    assert Preprocess.grey((32, 32), scan=True)(noisy).max() == 0
    colour = Preprocess((32, 32), resize="pad", scan=True)(noisy)
    assert colour.shape == (3, 32, 32)
    assert colour.min() == 255


def test_scan_without_inversion_has_no_ground_of_zero() -> None:
    with pytest.raises(ConfigError, match="invert must stay true"):
        Preprocess.grey((32, 32), scan=True, invert=False)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'interpolation'"):
        Preprocess.from_dict({"interpolaton": "bicubic"})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"size": 224}, r"size must be \(height, width\), two positive integers; got 224"),
        ({"size": (0, 224)}, "size must be"),
        ({"size": (224,)}, "size must be"),
        ({"size": (224.0, 224)}, "size must be"),
        ({"size": (True, 224)}, "size must be"),
        ({"mode": "RGBA"}, "unknown mode 'RGBA'; did you mean 'RGB'"),
        ({"mode": 3}, "mode must be one of RGB, L; got 3"),
        ({"resize": "padd"}, "did you mean 'pad'"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"mode": "L"}, r"mean must hold 1 number\(s\) for mode 'L'"),
        ({"mean": ("a", "b", "c")}, "mean must hold 3"),
        ({"mean": (0, 0, float("nan"))}, "mean must be finite"),
        ({"std": (1, 1)}, "std must hold 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0"),
        ({"invert": 1}, "invert must be true or false; got 1"),
        ({"scan": 1}, "scan must be true or false; got 1"),
        ({"binarize": True}, "binarize needs scan=True, which finds the ink"),
        ({"scan": True, "binarize": 1}, "binarize must be true or false; got 1"),
        ({"scan": True, "fill": 0}, "fill must be 255 for scan, whose ink comes on pure white; got 0"),
        ({"fill": 256}, "fill must be an integer from 0 to 255; got 256"),
        ({"fill": True}, "fill must be an integer"),
        ({"crop_share": 0}, "crop_share must be a number above 0 and at most 1; got 0"),
        ({"crop_share": 1.01}, "crop_share must be a number above 0 and at most 1; got 1.01"),
        ({"crop_share": float("nan")}, "crop_share must be a number"),
        ({"crop_share": "0.9"}, "crop_share must be a number above 0 and at most 1; got '0.9'"),
        ({"crop_share": True}, "crop_share must be a number"),
        ({"resize": "pad", "crop_share": 0.9}, "crop_share must be 1 for resize 'pad'"),
        ({"crop_offset": "up"}, "unknown crop_offset 'up'"),
    ],
)
def test_wrong_settings_are_refused(values: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Preprocess(**values)
