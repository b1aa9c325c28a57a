"""The recipe of near-duplicates finds copies, keeps true ones out of what sets its threshold, and changes no photo."""

import csv
import hashlib
import re
import runpy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitembed import Embedder, Hit, Index, sync
from vitembed.errors import VerifierError
from vitembed.index import Record

FILE = Path(__file__).parents[2] / "recipes" / "near_duplicates.py"
PHOTOS, COPIED = 70, 12

Recipe = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Return what the recipe defines."""
    return runpy.run_path(str(FILE))


@pytest.fixture
def recipe(run_recipe: Recipe) -> Recipe:
    """Run the recipe, and return its exit status and what it printed."""
    return partial(run_recipe, "near_duplicates.py")


def texture(seed: int) -> Image.Image:
    """Return a picture of coloured blotches that no other seed has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((128, 96), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of photos, of which some have a copy of lower quality; to be read only."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "album").mkdir()
    for seed in range(PHOTOS):
        texture(seed).save(folder / "album" / f"{seed:02}.png")
        if seed < COPIED:
            texture(seed).save(folder / f"copy-{seed:02}.jpg", quality=80)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def grouped(table: Path) -> list[set[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            groups[row["group"]].add(row["file"])
    return list(groups.values())


def test_files_of_equal_bytes_are_found_without_a_model(recipe: Recipe, tmp_path: Path) -> None:
    for name, content in {"a.jpg": b"same", "b/a.png": b"same", "c.jpg": b"Same", "d.jpg": b"other"}.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    status, out, _ = recipe("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 0
    assert "2 files in 1 groups" in out
    assert grouped(tmp_path / "out" / "exact.csv") == [{"a.jpg", "b/a.png"}]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["exact.csv"]


def test_copies_are_grouped_with_their_photos_and_no_photo_is_changed(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path
) -> None:
    before = digests(photos)
    status, out, _ = recipe("--data", photos, "--out", tmp_path, "--model", model, "--far", 0.08)
    assert status == 0
    assert digests(photos) == before
    groups = grouped(tmp_path / "groups.csv")
    for number in range(COPIED):
        assert any({f"album/{number:02}.png", f"copy-{number:02}.jpg"} <= group for group in groups)
    lonely = {f"album/{number}.png" for number in range(COPIED, PHOTOS)}
    assert len(lonely & set().union(*groups)) <= 0.25 * len(lonely)
    assert f"{sum(map(len, groups))} photos in {len(groups)} groups" in out
    for page in ("groups.html", "different.html"):
        assert "data:image/" in (tmp_path / page).read_text(encoding="utf-8")


def test_true_copies_do_not_pass_for_non_matches(
    names: dict[str, Any], photos: Path, model: Path, tmp_path: Path
) -> None:
    embedder = Embedder.from_pretrained(model)
    with Index.create(tmp_path / "photos.index", embedder.dim) as index:
        sync(index, embedder, photos)
        best = {name: index.search(index.get(name).vector, k=2)[0] for name in index.ids()}
        pairs = names["most_alike_others"](index, 1_000, 0)
    copies = [{f"album/{number:02}.png", f"copy-{number:02}.jpg"} for number in range(COPIED)]
    assert sum({hit.id for hit in hits} in copies for hits in best.values()) == 2 * COPIED  # they would have been
    assert len(pairs) == PHOTOS + COPIED
    assert not any({pair.photo.id, pair.other.id} in copies for pair in pairs)


def pairs_of(names: dict[str, Any], scores: list[float], path: Path) -> list[Any]:
    """Return a pair for each score, two to a family."""
    photos = [Record(str(n), np.eye(1, 4, dtype=np.float32)[0], {"path": str(path)}) for n in range(len(scores))]
    return [
        names["Pair"](photo, Hit("x", score, {}), str(n // 2))
        for n, (photo, score) in enumerate(zip(photos, scores, strict=True))
    ]


class Constant:
    """An encoder for which every copy has a cosine of 0.6 with its photo."""

    def encode(self, images: list[Image.Image], workers: int) -> np.ndarray:
        return np.tile(np.array([0.6, 0.8, 0, 0], np.float32), (len(images), 1))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_keeps_the_rate_where_it_is_set_and_is_judged_on_all_others(
    names: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    texture(0).save(tmp_path / "a.png")
    scores = np.random.default_rng(seed).uniform(0, 0.5, 80).tolist()
    threshold = names["find_threshold"](Constant(), pairs_of(names, scores, tmp_path / "a.png"), 0.1, seed)
    out = capsys.readouterr().out
    wrong, judged = map(int, re.search(r"(\d+) of (\d+) are linked", out).groups())  # type: ignore[union-attr]
    above = sum(score >= threshold for score in scores)
    assert judged == 40
    assert above - wrong == 4  # of the 40 that set it: as many as 0.1 allows, and no fewer
    assert out.count("100.0%") >= 5  # every altered copy scores 0.6


def test_a_rate_that_the_photos_cannot_show_is_refused(names: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match="needs at least 60 non-matching pairs"):
        names["find_threshold"](Constant(), pairs_of(names, [0.1, 0.2] * 20, tmp_path), 0.05, 0)


def test_photos_that_share_a_most_alike_one_are_one_family(names: dict[str, Any]) -> None:
    following = {"a": "b", "b": "a", "c": "b", "d": "c", "e": "outside", "f": "e", "g": "h", "h": "g"}
    families = {name: names["family"](name, following) for name in following}
    assert families == {**dict.fromkeys("abcd", "a"), **dict.fromkeys("ef", "outside"), **dict.fromkeys("gh", "g")}


def test_pixels_agree_through_compression_light_and_size_alone(names: dict[str, Any], tmp_path: Path) -> None:
    image = texture(0)
    image.save(tmp_path / "photo.png")
    image.save(tmp_path / "low.jpg", quality=20)
    image.resize((40, 30)).point(lambda value: value * 0.7).save(tmp_path / "small-dark.png")
    texture(1).save(tmp_path / "other.png")
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    Image.new("RGB", (90, 50), "white").save(tmp_path / "white-too.png")
    agree = {
        pair: names["agree"](*(str(tmp_path / name) for name in pair))
        for pair in [
            ("photo.png", "low.jpg"),
            ("photo.png", "small-dark.png"),
            ("white.png", "white-too.png"),
            ("photo.png", "other.png"),
            ("photo.png", "white.png"),
        ]
    }
    assert list(agree.values()) == [True, True, True, False, False]


def test_each_change_is_as_large_as_it_says(names: dict[str, Any]) -> None:
    image, rng = texture(3), np.random.default_rng(0)
    altered = names["altered"]
    assert np.array_equal(altered(image, [], rng), image)
    for _ in range(20):
        cropped, resized = altered(image, ["cropped"], rng), altered(image, ["resized"], rng)
        assert all(0.9 * side - 2 <= now <= side for side, now in zip(image.size, cropped.size, strict=True))
        assert all(0.3 * side - 1 <= now <= 0.9 * side + 1 for side, now in zip(image.size, resized.size, strict=True))
        for change in ("recoloured", "recompressed"):
            other = altered(image, [change], rng)
            assert other.size == image.size
            assert not np.array_equal(other, image)
    assert altered(Image.new("L", (1, 1)), names["CHANGES"], rng).size == (1, 1)


@pytest.mark.parametrize(
    ("data", "name", "far", "message"),
    [
        ("photos", "random", 0.01, "--far 0.01 takes 600 photos, to set the threshold and to judge it; got 82"),
        ("photos", "random", 2, "rate must be above 0 and below 1"),
        ("photos", "nowhere", 0.1, "there is no model folder nowhere"),
        ("nothing", "random", 0.1, "does not exist"),
    ],
)
def test_bad_input_is_one_line(
    recipe: Recipe, photos: Path, model: Path, tmp_path: Path, data: str, name: str, far: float, message: str
) -> None:
    folder = photos if data == "photos" else tmp_path / data
    network = model if name == "random" else name
    status, _, err = recipe("--data", folder, "--out", tmp_path / "out", "--model", network, "--far", far)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "photos.index").exists()
