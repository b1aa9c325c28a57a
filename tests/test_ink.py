"""Ink on scans and photographs: found on any ground, cut out, centred; a blank page is told."""

import itertools
import os
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitembed.cli.networks import new_embedder
from vitembed.errors import ConfigError
from vitembed.ink import clean_scan, find_ink, otsu_threshold

DATA = Path(os.environ.get("VITEMBED_DATA", "missing"))
STROKES = [((10, 60), (60, 10)), ((60, 10), (90, 70)), ((90, 70), (170, 30)), ((120, 55), (150, 75))]


def drawn(size: tuple[int, int], at: tuple[int, int], *, times: float = 1.0, width: int = 4) -> np.ndarray:
    """Return a drawing of four strokes as (H, W) bool; its corner lies at a place (x, y)."""
    image = Image.new("1", size)
    for stroke in STROKES:
        ends = [(at[0] + times * x, at[1] + times * y) for x, y in stroke]
        ImageDraw.Draw(image).line([*ends[0], *ends[1]], fill=1, width=width)
    return np.array(image)


def photographed(
    drawing: np.ndarray,
    *,
    ground: tuple[int, int, int] = (245, 232, 196),
    ink: tuple[int, int, int] = (40, 60, 150),
    shadow: float = 0.5,
    noise: float = 6.0,
) -> Image.Image:
    """Return a drawing as a phone sees it: coloured ink and ground, a shadow over a corner, noise."""
    height, width = drawing.shape
    colours = np.where(drawing[:, :, None], ink, ground)
    along = (np.arange(width) / width)[None, :] + (np.arange(height) / height)[:, None]
    light = 1 - (1 - shadow) / (1 + np.exp(-(along - 1) / 0.1))
    noisy = colours * light[:, :, None] + np.random.default_rng(3).normal(0, noise, colours.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the intersection over the union of two masks."""
    return float((found & wanted).sum() / (found | wanted).sum())


# What is ink


def test_otsu_is_the_largest_variance_between_two_parts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(0, 6, rng.integers(2, 12))
        levels = np.repeat(np.arange(len(counts)), counts)
        variances = []
        for threshold in range(len(counts)):
            low, high = levels[levels <= threshold], levels[levels > threshold]
            both = len(low) and len(high)
            variances.append(len(low) * len(high) * (low.mean() - high.mean()) ** 2 if both else 0.0)
        if max(variances) > 0:
            assert variances[otsu_threshold(counts)] == pytest.approx(max(variances))


def test_otsu_of_a_single_level_is_zero() -> None:
    assert otsu_threshold([0, 0, 7, 0]) == 0


@pytest.mark.parametrize(
    "look",
    [
        {},
        {"shadow": 0.3},
        {"ink": (180, 40, 40)},
        {"ink": (20, 20, 20), "ground": (190, 190, 200), "noise": 12.0},
        {"ink": (120, 120, 120), "ground": (250, 250, 250), "shadow": 1.0, "noise": 2.0},
        {"ink": (235, 230, 180), "ground": (40, 50, 60)},
    ],
    ids=["blue", "deep shadow", "red", "noisy", "pencil", "chalk"],
)
def test_ink_is_found_on_any_ground(look: dict) -> None:
    drawing = drawn((600, 400), (150, 120), times=1.8, width=7)
    found = find_ink(photographed(drawing, **look))
    assert found.step == 1
    assert agreement(found.mask, drawing) > 0.85
    assert found.share == pytest.approx(drawing.mean(), rel=0.2)
    ys, xs = np.nonzero(drawing)
    assert found.box is not None
    assert found.centre is not None
    np.testing.assert_allclose(found.box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), atol=3)
    np.testing.assert_allclose(found.centre, (xs.mean() + 0.5, ys.mean() + 0.5), atol=3)
    assert (found.width, found.height) == (found.box[2] - found.box[0], found.box[3] - found.box[1])
    assert found.light_on_dark == (look.get("ink", (0,))[0] > look.get("ground", (255,))[0])


@pytest.mark.parametrize("noise", [0.0, 3.0, 10.0, 20.0])
@pytest.mark.parametrize("shadow", [1.0, 0.4])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_page_has_no_ink_and_becomes_white(level: int, shadow: float, noise: float) -> None:
    page = photographed(np.zeros((300, 450), np.bool_), ground=(level,) * 3, shadow=shadow, noise=noise)
    found = find_ink(page)
    assert found.is_blank
    assert (found.share, found.box, found.centre, found.height, found.width) == (0, None, None, 0, 0)
    cleaned = clean_scan(page)
    assert (cleaned.mode, cleaned.size) == ("L", page.size)
    assert cleaned.getextrema() == (255, 255)


def test_a_speck_is_not_ink_and_the_dot_of_an_i_is() -> None:
    page = drawn((600, 400), (150, 120), width=5)
    page[30:33, 560:563] = True  # far from everything
    page[100:106, 240:246] = True  # above the drawing
    found = find_ink(Image.fromarray(np.where(page, 0, 255).astype(np.uint8)))
    assert not found.mask[:60].any()
    assert found.mask[100:106, 240:246].all()


def test_the_faint_end_of_a_stroke_belongs_to_it() -> None:
    page = np.full((200, 400), 250, np.uint8)
    page[98:103, 50:300] = 60
    page[98:103, 300:304] = 170
    found = find_ink(Image.fromarray(page))
    assert found.box == (50, 98, 304, 103)


# The ink on white


def test_cleaned_ink_is_centred_by_its_mass_and_nothing_is_cut_off() -> None:
    page = np.full((300, 500), 240, np.uint8)
    page[0:8, 20:480] = 30  # touches the border
    page[8:150, 460:468] = 30
    cleaned = 255 - np.asarray(clean_scan(Image.fromarray(page)))
    ys, xs = np.nonzero(cleaned)
    assert len(ys) == (page == 30).sum()
    assert abs(xs.mean() + 0.5 - cleaned.shape[1] / 2) <= 1
    assert abs(ys.mean() + 0.5 - cleaned.shape[0] / 2) <= 1
    border = np.concatenate([cleaned[0], cleaned[-1], cleaned[:, 0], cleaned[:, -1]])
    assert border.max() == 0
    assert np.ptp(xs) + 1 == 460  # the aspect is kept
    assert np.ptp(ys) + 1 == 150


def test_where_the_ink_lies_on_its_page_does_not_matter() -> None:
    cleaned = [
        np.asarray(clean_scan(Image.fromarray(np.where(drawn((500, 400), at, width=5), 20, 255).astype(np.uint8))))
        for at in ((0, 0), (150, 100), (310, 300))
    ]
    np.testing.assert_array_equal(cleaned[0], cleaned[1])
    np.testing.assert_array_equal(cleaned[0], cleaned[2])


def test_grey_levels_within_the_ink_are_shares_of_the_ground() -> None:
    page = np.full((200, 400), 200, np.uint8)
    page[90:110, 50:350] = 100
    page[95:105, 100:300] = 20
    cleaned = np.asarray(clean_scan(Image.fromarray(page)))
    levels = np.unique(cleaned)
    assert len(levels) == 3
    np.testing.assert_allclose(levels, [255 * 0.1, 255 * 0.5, 255], atol=2)


def test_binarized_ink_is_black_however_dark_it_was() -> None:
    drawing = drawn((400, 300), (90, 90), width=5)
    black = [
        np.asarray(clean_scan(Image.fromarray(np.where(drawing, level, 250).astype(np.uint8)), binarize=True))
        for level in (10, 60, 140)
    ]
    assert np.unique(black[0]).tolist() == [0, 255]
    assert (black[0] == 0).sum() == drawing.sum()
    np.testing.assert_array_equal(black[0], black[1])
    np.testing.assert_array_equal(black[0], black[2])
    blank = clean_scan(Image.new("L", (40, 30), 250), binarize=True)
    assert np.asarray(blank).min() == 255


def test_a_photograph_and_a_scan_of_one_drawing_become_alike() -> None:
    drawing = drawn((900, 600), (200, 150), times=2.5, width=9)
    scan = Image.fromarray(np.where(drawing, 40, 250).astype(np.uint8))
    small = [np.asarray(clean_scan(image).resize((96, 64))) for image in (scan, photographed(drawing))]
    assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.93


def test_light_ink_on_a_dark_ground_is_turned_round() -> None:
    drawing = drawn((400, 300), (90, 90), width=5)
    dark, light = (Image.fromarray(np.where(drawing, a, b).astype(np.uint8)) for a, b in ((0, 255), (255, 0)))
    assert [find_ink(image).light_on_dark for image in (dark, light)] == [False, True]
    np.testing.assert_array_equal(np.asarray(clean_scan(light)), np.asarray(clean_scan(dark)))


@pytest.mark.parametrize("times", [0.4, 1.0, 3.0])
def test_a_shadow_is_not_taken_for_ink_nor_its_bright_side(times: float) -> None:
    drawing = drawn((1000, 640), (400, 250), times=times, width=4)
    for look in ({"shadow": 0.3}, {"shadow": 0.3, "ground": (60, 70, 65), "ink": (235, 235, 225)}):
        found = find_ink(photographed(drawing, **look))
        assert found.light_on_dark == ("ink" in look)
        assert agreement(found.mask, drawing) > 0.6


def test_fat_strokes_are_ink_too() -> None:
    drawing = drawn((28, 28), (2, 2), times=0.14, width=4)
    assert find_ink(Image.fromarray(np.where(drawing, 0, 255).astype(np.uint8))).mask.tolist() == drawing.tolist()
    assert find_ink(Image.fromarray(np.where(drawing, 255, 0).astype(np.uint8))).mask.tolist() == drawing.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3), (5, 5), (1, 50_000), (2049, 3)])
@pytest.mark.parametrize("value", [0, 255])
def test_images_of_any_shape_are_taken(size: tuple[int, int], value: int) -> None:
    image = Image.new("L", size, 128)
    image.putpixel((size[0] // 2, size[1] // 2), value)
    cleaned = clean_scan(image)
    assert cleaned.mode == "L"
    assert min(cleaned.size) > 0


def test_a_large_scan_is_reduced_to_find_its_ink_and_cut_out_at_full_size() -> None:
    drawing = drawn((3001, 1999), (700, 500), times=8.0, width=20)
    page = Image.fromarray(np.where(drawing, 30, 240).astype(np.uint8))
    found = find_ink(page)
    assert found.step == 3
    assert max(found.mask.shape) <= 1024
    ys, xs = np.nonzero(drawing)
    assert found.box is not None
    np.testing.assert_allclose(found.box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), atol=3)
    cleaned = np.asarray(clean_scan(page))
    assert (cleaned < 128).sum() == pytest.approx(drawing.sum(), rel=0.01)


def test_the_image_is_left_as_it_was_and_the_answer_is_always_the_same() -> None:
    image = photographed(drawn((300, 200), (60, 50), width=4))
    before = image.tobytes()
    first, second = clean_scan(image), clean_scan(image)
    assert image.tobytes() == before
    assert first.tobytes() == second.tobytes()


def test_cleaning_is_quick() -> None:
    scan = photographed(drawn((2000, 1000), (300, 200), times=6.0, width=14))
    letter = Image.fromarray(np.where(drawn((105, 105), (10, 15), times=0.5), 0, 255).astype(np.uint8))
    for image, milliseconds in ((scan, 100), (letter, 5)):  # measured: 14 and 0.7
        times = []
        for _ in range(5):
            start = time.process_time()
            clean_scan(image)
            times.append(1000 * (time.process_time() - start))
        assert min(times) < milliseconds


def test_the_option_scan_makes_a_network_of_ink() -> None:
    settings = new_embedder("cpu", 0, arch="N/4", image_size=28, scan=True).preprocess
    assert settings.scan
    assert settings.mode == "L"
    assert settings.invert
    assert not settings.binarize
    assert new_embedder("cpu", 0, arch="N/4", image_size=28, scan=True, binarize=True).preprocess.binarize
    assert not new_embedder("cpu", 0, arch="N/4", image_size=28, ink=True).preprocess.scan


def test_the_option_binarize_needs_scan() -> None:
    with pytest.raises(ConfigError, match="add --scan"):
        new_embedder("cpu", 0, arch="N/4", image_size=28, ink=True, binarize=True)


# On real scans


@pytest.mark.skipif(not DATA.is_dir(), reason="VITEMBED_DATA names no folder")
def test_every_signature_is_found_where_it_was_cropped() -> None:
    with zipfile.ZipFile(DATA / "signatures.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[::12]
        images = [Image.open(BytesIO(archive.read(name))).convert("L") for name in names]
    shares = []
    for image in images:
        found = find_ink(image)
        assert not found.is_blank
        assert not found.light_on_dark
        shares.append(found.width * found.height / (image.width * image.height))
    assert np.median(shares) > 0.95  # these scans were cropped to their ink by others


@pytest.mark.skipif(not DATA.is_dir(), reason="VITEMBED_DATA names no folder")
def test_every_letter_keeps_its_ink() -> None:
    with zipfile.ZipFile(DATA / "omniglot_background.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[::200]
        images = [np.asarray(Image.open(BytesIO(archive.read(name))).convert("L")) for name in names]
    for image, name in itertools.zip_longest(images, names):
        assert (np.asarray(clean_scan(Image.fromarray(image))) == 0).sum() == (image == 0).sum(), name
