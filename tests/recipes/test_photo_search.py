"""The recipe of photo search: what a run embeds, what files say of themselves, what is found, errors of one line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from vitembed import Embedder, Index, Preprocess

FILE = Path(__file__).parents[2] / "recipes" / "photo_search.py"

Recipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(run_recipe: Recipe) -> Recipe:
    """Run the recipe, and return its exit status and what it printed."""
    return partial(run_recipe, "photo_search.py")


def texture(seed: int) -> Image.Image:
    """Return a picture of coloured blotches that no other seed has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of 8 photos, half of them in folder `sea`; 6 and 7 have EXIF."""
    folder = tmp_path / "photos"
    (folder / "sea").mkdir(parents=True)
    for seed in range(6):
        texture(seed).save(folder / ("sea" if seed % 2 else ".") / f"{seed}.png")
    for seed, year in ((6, 2019), (7, 2021)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        exif[ExifTags.Base.Model] = "Box\0"
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"{year}:05:17 12:30:00"
        texture(seed).save(folder / ("sea" if seed % 2 else ".") / f"{seed}.jpg", exif=exif)
    return folder


def hits(out: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")]


def test_only_what_is_new_is_embedded(recipe: Recipe, photos: Path, model: Path, tmp_path: Path) -> None:
    run = ("--data", photos, "--out", tmp_path / "out")
    assert "8 photos embedded, 0 removed" in recipe(*run, "--model", model)[1]
    drawn = (tmp_path / "out" / "map.html").stat().st_mtime_ns
    assert "0 photos embedded, 0 removed" in recipe(*run)[1]
    assert (tmp_path / "out" / "map.html").stat().st_mtime_ns == drawn
    texture(8).save(photos / "8.png")
    (photos / "0.png").unlink()
    status, out, _ = recipe(*run)
    assert (status, "1 photos embedded, 1 removed" in out) == (0, True)
    assert (tmp_path / "out" / "map.html").stat().st_mtime_ns > drawn
    with Index.open(tmp_path / "out" / "photos.index") as index:
        assert index.check() == []


def test_hits_are_the_nearest_by_cosine_without_the_query_itself(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path
) -> None:
    texture(100).save(tmp_path / "query.png")
    files = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*") if file.is_file())
    vectors = Embedder.from_pretrained(model).encode([tmp_path / "query.png", *(photos / name for name in files)])
    run = ("--data", photos, "--out", tmp_path / "out", "--model", model, "-k", 3)

    scores = vectors[1:] @ vectors[0]
    assert hits(recipe(tmp_path / "query.png", *run)[1]) == [files[at] for at in np.argsort(-scores)[:3]]

    at = files.index("sea/3.png")
    scores = vectors[1:] @ vectors[1 + at]
    scores[at] = -2
    assert hits(recipe(photos / "sea" / "3.png", *run)[1]) == [files[at] for at in np.argsort(-scores)[:3]]
    assert "sea/3.png" in (tmp_path / "out" / "search.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["year>=2020"], {"sea/7.jpg"}),
        (["camera=Box"], {"6.jpg", "sea/7.jpg"}),
        (["folder=sea", "width>=45"], {"sea/1.png", "sea/3.png", "sea/5.png"}),
        (["height=50", "taken<2020-01"], {"6.jpg"}),
    ],
)
def test_filters_go_by_what_the_files_say(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path, where: list[str], expected: set[str]
) -> None:
    texture(100).save(tmp_path / "query.png")
    conditions = [word for text in where for word in ("--where", text)]
    run = ("--data", photos, "--out", tmp_path / "out", "--model", model)
    status, out, _ = recipe(tmp_path / "query.png", *run, *conditions)
    assert status == 0
    assert set(hits(out)) == expected
    assert f"{len(expected)} of 8 photos meet {' and '.join(where)}" in out


def test_a_changed_file_is_described_anew_and_keeps_other_metadata(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path
) -> None:
    run = ("--data", photos, "--out", tmp_path / "out", "--model", model)
    recipe(*run)

    def metadata() -> dict[str, Any]:
        with Index.open(tmp_path / "out" / "photos.index") as index:
            return index.get("6.jpg").metadata

    before = metadata()
    assert (before["width"], before["height"], before["year"], before["month"]) == (40, 50, 2019, 5)
    with Index.open(tmp_path / "out" / "photos.index") as index:
        index.annotate(["6.jpg"], [{**before, "who": "Ann"}])
    texture(66).resize((70, 20)).save(photos / "6.jpg")
    recipe(*run)
    after = metadata()
    assert (after["width"], after["height"], after["who"]) == (70, 20, "Ann")
    assert not {"year", "taken", "camera"} & after.keys()
    assert json.dumps(after)


def test_a_file_without_a_picture_is_set_aside_and_said(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    status, out, err = recipe("--data", photos, "--out", tmp_path / "out", "--model", model)
    assert status == 0
    assert "8 photos embedded" in out
    assert "broken.jpg" in err


def test_bad_input_is_one_line(recipe: Recipe, photos: Path, model: Path, tmp_path: Path) -> None:
    run = ("--data", photos, "--out", tmp_path / "out")
    first = recipe(*run)
    assert not (tmp_path / "out").exists()
    built = (*run, "--model", model)
    assert recipe(*built)[0] == 0
    other = tmp_path / "other"
    Embedder.create("N/8", preprocess=Preprocess((32, 32)), stem="conv", seed=2).save_pretrained(other)
    for (status, _, err), message in [
        (first, "name the --model"),
        (recipe(*run, "--model", other), "holds embeddings of the model"),
        (recipe("nothing.jpg", *run), "nothing.jpg: does not exist"),
        (recipe(*run, "--where", "year>3000"), "no photo meets year>3000; there are folder ., sea; year 2019, 2021"),
        (recipe(*run, "--where", "year"), "year"),
        (recipe(*run, "-k", "0"), "k must be a whole number"),
        (recipe("--data", tmp_path / "nothing", "--out", tmp_path / "out"), "does not exist"),
    ]:
        assert status == 2
        lines = [line for line in err.splitlines() if not line.startswith("sync: ")]
        assert len(lines) == 1, err
        assert message in lines[0]
