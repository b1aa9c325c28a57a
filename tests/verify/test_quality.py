"""The gate before a verification: what cannot be judged, and copies of references, are told."""

import os
import zipfile
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitembed.errors import ConfigError, ImageError
from vitembed.verify.quality import COPY_OVERLAP, LEAST_HEIGHT, LEAST_STROKE, judge_quality

DATA = Path(os.environ.get("VITEMBED_DATA", "missing"))


def written(seed: int, *, size: tuple[int, int] = (500, 300), wobble: float = 0.0, width: int = 4) -> Image.Image:
    """Return a signature: a random smooth curve, the same for the same seed but for the wobble of the hand."""
    rng, hand = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    t = np.linspace(0, 1, 400)
    x, y = 0.15 + 0.7 * t, np.full_like(t, 0.5)
    for frequency in range(2, 12):
        for axis in (x, y):
            amount = rng.normal(0, 0.12) + wobble * hand.normal(0, 0.12)
            axis += amount / np.sqrt(frequency) * np.sin(2 * np.pi * frequency * t + rng.uniform(0, 6))
    points = [(float(a) * size[0], float(b) * size[1]) for a, b in zip(x, y, strict=True)]
    image = Image.new("L", size, 245)
    ImageDraw.Draw(image).line(points, fill=50, width=width, joint="curve")
    return image


def copied(
    image: Image.Image, *, angle: float = 1.0, scale: float = 1.03, noise: float = 6.0, quality: int = 70
) -> Image.Image:
    """Return a photocopy: a little askew, larger and noisy, a pixel off, saved as JPEG."""
    size = (round(image.width * scale), round(image.height * scale))
    page = Image.new("L", (size[0] + 24, size[1] + 24), 245)
    page.paste(image.resize(size, Image.Resampling.BICUBIC), (13, 12))
    page = page.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=245)
    noisy = np.asarray(page) + np.random.default_rng(0).normal(0, noise, page.size[::-1])
    file = BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return Image.open(file)


def kinds(image: Image.Image, references: tuple[Image.Image, ...] = ()) -> list[str]:
    return [problem.kind for problem in judge_quality(image, references).problems]


# The image alone


def test_a_signature_is_good() -> None:
    quality = judge_quality(written(1))
    assert quality.is_good
    assert quality.problems == ()
    assert quality.overlaps == ()
    assert 0.01 < quality.ink_share < 0.2
    assert quality.ink_height > 50
    assert quality.stroke_length > 100


@pytest.mark.parametrize("level", [0, 130, 255])
def test_a_blank_page_is_told_and_nothing_else(level: int) -> None:
    noisy = np.clip(np.random.default_rng(0).normal(level, 3, (200, 300)), 0, 255).astype(np.uint8)
    quality = judge_quality(noisy, [written(1)])
    assert [problem.kind for problem in quality.problems] == ["blank"]
    assert "There is no ink" in quality.problems[0].text
    assert quality.problems[0].reference is None
    assert (quality.ink_share, quality.ink_height, quality.stroke_length) == (0, 0, 0)
    assert quality.overlaps == (0,)


def test_a_dot_and_a_dash_are_little_ink_on_a_page_of_any_size() -> None:
    for side in (150, 600, 1500):
        page = Image.new("L", (side, side), 250)
        ImageDraw.Draw(page).ellipse((60, 60, 90, 90), fill=30)
        assert kinds(page) == ["little ink"]
        page = Image.new("L", (side, side), 250)
        ImageDraw.Draw(page).line((50, 50, 80, 90), fill=30, width=9)
        assert kinds(page) == ["little ink"]


@pytest.mark.parametrize(("length", "width"), [(200, 5), (300, 10), (120, 3)])
def test_the_length_of_a_line_is_counted_in_widths_of_the_pen(length: int, width: int) -> None:
    found = []
    for slope in (0.0, 0.4, 0.8, 1.2):
        page = Image.new("L", (500, 500), 250)
        end = (100 + length * float(np.cos(slope)), 100 + length * float(np.sin(slope)))
        ImageDraw.Draw(page).line((100, 100, *end), fill=20, width=width)
        drawn_width = (np.asarray(page) < 128).sum() / length  # Pillow's lines are not all as wide as was said
        found.append(judge_quality(page).stroke_length * drawn_width / length)
    np.testing.assert_allclose(found, 1, rtol=0.15)


def test_ink_of_few_pixels_is_too_small() -> None:
    large = written(2, size=(1000, 600), width=12)
    quality = judge_quality(large.resize((60, 36), Image.Resampling.BOX))
    assert [problem.kind for problem in quality.problems] == ["too small"]
    assert quality.ink_height < LEAST_HEIGHT
    assert f"only {quality.ink_height} pixels high, and {LEAST_HEIGHT} are needed" in quality.problems[0].text
    assert kinds(large.resize((250, 150), Image.Resampling.BOX)) == []


# The image beside its references


@pytest.mark.parametrize("copy", [{}, {"angle": -3.5}, {"scale": 0.6}, {"noise": 12.0, "quality": 50}], ids=str)
def test_a_copy_of_a_reference_is_told_with_its_number(copy: dict) -> None:
    references = (written(5), written(6), written(7))
    quality = judge_quality(copied(references[1], **copy), references)
    assert [(problem.kind, problem.reference) for problem in quality.problems] == [("near copy", 1)]
    assert "reference 2" in quality.problems[0].text
    assert not quality.is_good
    assert quality.overlaps[1] > COPY_OVERLAP > 0.7 > max(quality.overlaps[0], quality.overlaps[2])


def test_a_copy_on_another_ground_and_in_another_place_is_told() -> None:
    reference = written(8)
    page = Image.new("RGB", (1400, 1000), (200, 190, 150))
    ink = Image.new("RGB", reference.size, (60, 60, 120))
    page.paste(ink, (700, 100), reference.point(lambda level: 255 if level < 128 else 0))
    assert kinds(page, (reference,)) == ["near copy"]


def test_a_second_signature_of_the_same_hand_is_no_copy() -> None:
    for seed in range(4):
        quality = judge_quality(written(seed, wobble=0.25), [written(seed)])
        assert quality.is_good
        assert 0.2 < quality.overlaps[0] < COPY_OVERLAP


def test_the_same_file_is_told_as_that_and_not_as_a_copy(tmp_path: Path) -> None:
    path, again = tmp_path / "unterschrift ü.png", tmp_path / "again.bmp"
    written(3).save(path)
    written(3).save(again)
    quality = judge_quality(path, [written(4), again])
    assert [(problem.kind, problem.reference) for problem in quality.problems] == [("same file", 1)]
    assert quality.overlaps[1] == pytest.approx(1, abs=1e-4)


def test_overlap_is_the_same_either_way_round() -> None:
    a, b = written(1), written(1, wobble=0.2)
    there, back = judge_quality(a, [b]).overlaps[0], judge_quality(b, [a]).overlaps[0]
    assert there == pytest.approx(back, abs=0.02)


# Bad input


def test_one_image_in_place_of_a_list_of_references_is_one_clear_error() -> None:
    for reference in (written(1), "alice.png", Path("alice.png"), np.zeros((5, 5), np.uint8)):
        with pytest.raises(ConfigError, match="references must be a list of images; got one"):
            judge_quality(written(2), reference)


def test_a_reference_that_is_missing_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: does not exist"):
        judge_quality(written(2), [tmp_path / "gone.png"])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300)])
def test_the_smallest_images_are_judged(size: tuple[int, int]) -> None:
    image = Image.new("L", size, 0)
    assert "blank" in kinds(image, (image,))


# On real signatures


@pytest.mark.skipif(not DATA.is_dir(), reason="VITEMBED_DATA names no folder")
def test_no_two_genuine_signatures_are_copies_and_photocopies_are() -> None:
    highest, copies = [], []
    with zipfile.ZipFile(DATA / "signatures.zip") as archive:
        for writer in ("014", "040", "048"):  # 014 has the most regular hand
            names = sorted(name for name in archive.namelist() if name.startswith(f"{writer}/genuine/"))[:6]
            images = [Image.open(BytesIO(archive.read(name))).convert("L") for name in names if name[-1] == "g"]
            assert all(judge_quality(image).stroke_length > 10 * LEAST_STROKE for image in images)
            highest += [judge_quality(a, [b]).overlaps[0] for a, b in combinations(images, 2)]
            copies += [judge_quality(copied(image), [image]).overlaps[0] for image in images[:2]]
    assert max(highest) < COPY_OVERLAP < min(copies)
