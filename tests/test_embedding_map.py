"""The map: a page that stands alone, holds what it says, and is the same for the same index and seed."""

import base64
import html
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitembed import embedding_map
from vitembed.embedding_map import map_index, project
from vitembed.errors import ConfigError, DataError, MissingExtraError, VitembedError
from vitembed.index import Index


def bunches(count: int, each: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.standard_normal((count, dim)), each, axis=0) + 0.05 * rng.standard_normal((count * each, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(path: Path, vectors: np.ndarray, metadata: list[dict[str, Any]] | None = None) -> Index:
    index = Index.create(path, vectors.shape[1])
    index.add([f"id{number:03}" for number in range(len(vectors))], vectors, metadata)
    return index


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


def test_bunches_stay_together_on_the_map(tmp_path: Path) -> None:
    with filled(tmp_path / "i", bunches(4, 12)) as index:
        for method in ("tsne", "pca"):
            report = map_index(index, tmp_path / "x.html", method)
            points = np.array(data_of(tmp_path / "x.html")["points"])
            distances = np.linalg.norm(points[:, None] - points[None], axis=2)
            np.fill_diagonal(distances, np.inf)
            assert (distances.argmin(axis=1) // 12 == np.arange(48) // 12).all()
            assert (report.entries, report.shown, report.method, report.thumbnails) == (48, 48, method, 0)


def test_pca_keeps_the_proportions_of_distances_and_says_how_much_it_holds(tmp_path: Path) -> None:
    angles = np.radians(np.linspace(0, 350, 36))
    circle = np.stack([np.cos(angles), np.zeros(36), np.sin(angles)], axis=1).astype(np.float32)
    with filled(tmp_path / "i", circle) as index:
        map_index(index, tmp_path / "x.html", "pca")
    points = np.array(data_of(tmp_path / "x.html")["points"])
    assert np.linalg.norm(points - points.mean(axis=0), axis=1) == pytest.approx(0.5, abs=0.01)
    assert points.min() >= 0
    assert points.max() <= 1
    assert "100% of it in all" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_the_same_index_and_seed_give_the_same_page_whatever_the_order_of_insertion(tmp_path: Path) -> None:
    vectors = bunches(3, 10)
    order = np.random.default_rng(1).permutation(30)
    pages = []
    for turn, rows in enumerate((np.arange(30), order)):
        with Index.create(tmp_path / str(turn), 16) as index:
            index.add([f"id{number:03}" for number in rows], vectors[rows])
            map_index(index, tmp_path / "x.html", limit=20, seed=3)
            pages.append((tmp_path / "x.html").read_bytes())
            map_index(index, tmp_path / "x.html", limit=20, seed=4)
            pages.append((tmp_path / "x.html").read_bytes())
    assert pages[0] == pages[2]
    assert pages[1] == pages[3]
    assert pages[0] != pages[1]


def test_of_more_entries_than_the_limit_a_sample_is_shown_and_the_page_says_so(tmp_path: Path) -> None:
    with filled(tmp_path / "i", bunches(3, 10)) as index:
        report = map_index(index, tmp_path / "x.html", "pca", limit=8)
    data = data_of(tmp_path / "x.html")
    assert (report.entries, report.shown) == (30, 8)
    assert len(set(data["ids"])) == len(data["points"]) == len(data["pictures"]) == len(data["group"]) == 8
    assert "8 entries of 30, drawn at random" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("count", range(7))
def test_few_entries_are_drawn_too(tmp_path: Path, count: int) -> None:
    with filled(tmp_path / "i", bunches(7, 1)[:count]) as index:
        report = map_index(index, tmp_path / "x.html")
    points = np.array(data_of(tmp_path / "x.html")["points"])
    assert len(points) == count
    assert np.isfinite(points).all()
    assert report.method == ("pca" if count < 5 else "tsne")
    assert ("too few for tsne" in (tmp_path / "x.html").read_text(encoding="utf-8")) == (count < 5)


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_equal_vectors_and_narrow_ones_are_drawn(method: str, dim: int) -> None:
    same = np.tile(bunches(1, 1, dim), (9, 1))
    assert project(same, method)[0].tolist() == [[0, 0]] * 9
    mixed = np.concatenate([same, -same])
    points, share = project(mixed, method)
    assert points.shape == (18, 2)
    assert np.isfinite(points).all()
    assert share == pytest.approx(1)


def test_text_of_the_index_cannot_leave_the_data(tmp_path: Path) -> None:
    evil = '</script><script>alert("1")</script><!-- {{data}} \u2028'
    with Index.create(tmp_path / "i", 16) as index:
        index.add([evil, *"abcde"], bunches(6, 1), [{evil: evil}, *[{evil: "b"}] * 5])
        map_index(index, tmp_path / "x.html", "pca", label=evil)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    data = data_of(tmp_path / "x.html")
    assert text.count("<script") == text.count("</script>") == 2
    assert evil in data["ids"]
    assert data["label"] == evil
    assert data["groups"] == ["b", evil]


@pytest.mark.parametrize("label", ["{{data}}", "{{about}}", "{{title}}", "{{other}}", r"\g<0>\1"])
def test_a_label_that_looks_like_a_place_of_the_template_is_text(tmp_path: Path, label: str) -> None:
    with filled(tmp_path / "i", bunches(2, 3), [{label: "x"}] * 6) as index:
        map_index(index, tmp_path / "x.html", "pca", label=label)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert text.count(f"Map of 6 entries by {html.escape(label)}<") == 2  # title and heading
    assert data_of(tmp_path / "x.html")["label"] == label


def test_the_page_needs_nothing_from_outside_and_says_what_to_do_without_scripts(tmp_path: Path) -> None:
    with filled(tmp_path / "i", bunches(2, 3)) as index:
        map_index(index, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://|url\(|@import|<link|fetch\(", text) == []
    assert "default-src 'none'" in text
    assert "<noscript>" in text
    assert "prefers-color-scheme: dark" in text
    assert "{{" not in text


# Colours


def labelled(tmp_path: Path, values: list[Any]) -> dict[str, Any]:
    metadata = [{} if value is ... else {"key": value} for value in values]
    with filled(tmp_path / "i", bunches(len(values), 1, 64), metadata) as index:
        map_index(index, tmp_path / "x.html", "pca", label="key")
    data = data_of(tmp_path / "x.html")
    assert len(data["styles"]) == len(data["groups"])
    assert all(0 <= group < len(data["groups"]) for group in data["group"])
    return data


def test_groups_are_the_values_of_the_label_the_most_frequent_first(tmp_path: Path) -> None:
    data = labelled(tmp_path, ["cät", "dog", "dog", True, ..., None, 3, ["x"]])
    assert data["groups"] == ["dog", "3", '["x"]', "cät", "true", "(none)"]
    named = [data["groups"][group] for group in data["group"]]
    assert named == ["cät", "dog", "dog", "true", "(none)", "(none)", "3", '["x"]']
    assert len({tuple(style) for style in data["styles"]}) == 6


def test_a_value_that_looks_like_ours_for_none_is_a_value(tmp_path: Path) -> None:
    data = labelled(tmp_path, ["(none)", "(none)", ..., "others"])
    assert data["groups"] == ["(none)", "others", "(none)"]
    assert data["group"] == [0, 0, 2, 1]


def test_more_values_than_styles_share_the_grey_one(tmp_path: Path) -> None:
    values = [f"v{number:02}" for number in range(30)] + ["v29"] + [...]
    data = labelled(tmp_path, values)
    assert data["groups"] == ["v29", *(f"v{number:02}" for number in range(17)), "others", "(none)"]
    assert [data["group"][number] for number in (0, 16, 17, 28, 29, 30, 31)] == [1, 17, 18, 18, 0, 0, 19]
    assert len({tuple(style) for style in data["styles"]}) == 20
    assert data["values"][20] == "v20"  # what the pointer shows stays the value


def test_a_number_of_many_values_is_shown_in_ranges(tmp_path: Path) -> None:
    numbers = [float(number) ** 2 for number in range(35)]
    data = labelled(tmp_path, [*numbers, ...])
    assert len(data["groups"]) == 8
    for number, group in zip(numbers, data["group"], strict=False):
        low, high = map(float, data["groups"][group].split(" to "))
        assert low <= number <= high
    counts = np.bincount(data["group"])
    assert counts.sum() == 36
    assert counts[:7].min() >= 4
    assert counts[:7].max() <= 6
    assert data["group"][-1] == 7


def test_numbers_beyond_what_a_float_can_be_are_texts(tmp_path: Path) -> None:
    numbers = [10**400 + number for number in range(9)]
    data = labelled(tmp_path, [*numbers, 1, 2.5])
    assert set(data["groups"]) == {*map(str, numbers), "1", "2.5"}
    assert data["values"][0] == str(10**400)


def test_numbers_that_are_one_float_are_texts(tmp_path: Path) -> None:
    data = labelled(tmp_path, [2**62 + number for number in range(9)])
    assert set(data["groups"]) == {str(2**62 + number) for number in range(9)}
    assert len(set(data["group"])) == 9


@pytest.mark.parametrize(("first", "step"), [(1_700_000_000, 86_400), (1_700_000_000_123, 1), (0.123456789, 1e-9)])
def test_the_legend_tells_large_and_close_numbers_apart(tmp_path: Path, first: float, step: float) -> None:
    numbers = [first + step * number for number in range(30)]
    data = labelled(tmp_path, numbers)
    edges = [float(edge) for name in data["groups"] for edge in name.split(" to ")]
    assert len(set(edges)) == 8
    assert (edges[0], edges[-1]) == pytest.approx((numbers[0], numbers[-1]), rel=1e-9, abs=0)


def test_a_few_numbers_are_values_like_others(tmp_path: Path) -> None:
    assert labelled(tmp_path, [1, 2, 2, 3, 1, 2])["groups"] == ["2", "1", "3"]


def test_a_label_that_no_entry_has_names_those_there_are_and_writes_nothing(tmp_path: Path) -> None:
    with (
        filled(tmp_path / "i", bunches(2, 1), [{"kind": 1}, {"path": "x"}]) as index,
        pytest.raises(DataError, match=r"'category'.*'kind', 'path'"),
    ):
        map_index(index, tmp_path / "x.html", label="category")
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


# Pictures


def with_pictures(tmp_path: Path, count: int) -> Index:
    rng = np.random.default_rng(0)
    metadata = []
    for number in range(count):
        noise = rng.integers(0, 256, (150, 200, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
        metadata.append({"path": str(tmp_path / f"{number}.jpg")})
    return filled(tmp_path / "i", bunches(count, 1, 64), metadata)


def sizes(data: dict[str, Any]) -> list[tuple[int, int] | None]:
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) if text else None for text in data["pictures"]]
    return [picture and picture.size for picture in pictures]


def test_each_entry_has_its_picture_and_a_missing_one_none(tmp_path: Path) -> None:
    with with_pictures(tmp_path, 6) as index:
        (tmp_path / "2.jpg").unlink()
        (tmp_path / "4.jpg").write_text("broken")
        report = map_index(index, tmp_path / "x.html", "pca")
    assert sizes(data_of(tmp_path / "x.html")) == [(112, 84), (112, 84), None, (112, 84), None, (112, 84)]
    assert report.thumbnails == 4
    assert "4 have a picture, 112 pixels at most" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("budget", "side", "number"), [(45_000, 112, 8), (20_000, 80, 8), (5_600, 40, 8), (4_000, 40, 4), (1, 40, 0)]
)
def test_thumbnails_shrink_and_then_thin_out_to_stay_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, side: int, number: int
) -> None:
    monkeypatch.setattr(embedding_map, "BUDGET", budget)
    with with_pictures(tmp_path, 8) as index:
        report = map_index(index, tmp_path / "x.html", "pca")
    data = data_of(tmp_path / "x.html")
    found = [size for size in sizes(data) if size]
    assert {max(size) for size in found} <= {side}
    assert len(found) == report.thumbnails == number
    assert sum(map(len, data["pictures"])) <= budget


# Methods, and bad input


def test_umap_is_given_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            asked["shape"] = vectors.shape
            return vectors[:, 2:4]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))  # type: ignore[misc]
    with filled(tmp_path / "i", bunches(3, 3, 100)) as index:
        assert map_index(index, tmp_path / "x.html", "umap").method == "umap"
    assert asked["shape"] == (9, 9)
    assert (asked["n_neighbors"], asked["n_jobs"], asked["init"].shape) == (8, 1, (9, 2))


def test_umap_itself_keeps_bunches_together() -> None:
    pytest.importorskip("umap")
    points, _ = project(bunches(3, 20), "umap")
    again, _ = project(bunches(3, 20), "umap")
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()
    assert (points == again).all()


def test_without_umap_the_extra_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with filled(tmp_path / "i", bunches(3, 3)) as index, pytest.raises(MissingExtraError, match=r"vitembed\[map\]"):
        map_index(index, tmp_path / "x.html", "umap")
    assert not (tmp_path / "x.html").exists()


def test_bad_settings_are_refused_and_an_old_page_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("old")
    with filled(tmp_path / "i", bunches(3, 3)) as index:
        with pytest.raises(ConfigError, match="did you mean 'tsne'"):
            map_index(index, tmp_path / "x.html", "t-sne")
        with pytest.raises(ConfigError, match="limit must be"):
            map_index(index, tmp_path / "x.html", limit=0)
        with pytest.raises(ConfigError, match="seed must be"):
            map_index(index, tmp_path / "x.html", seed=-1)
        with pytest.raises(VitembedError, match="no folder"):
            map_index(index, tmp_path / "missing" / "x.html")
    assert (tmp_path / "x.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
