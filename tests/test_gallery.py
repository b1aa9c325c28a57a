"""Contact sheets show every query and hit, escape what they show, and survive missing and broken pictures."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitembed.errors import ConfigError, VitembedError
from vitembed.gallery import Row, cluster_rows, contact_sheet, group_rows, search_rows, thumbnail
from vitembed.index import Hit, Index, Record
from vitembed.index.clusters import Cluster, Clustering
from vitembed.index.duplicates import DuplicateGroup


class Sheet(HTMLParser):
    """The cells of a page: their pictures, texts and titles; and all tags, which must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, bool]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        classes = (attributes.get("class") or "").split()
        if "cell" in classes:
            title = attributes.get("title") or ""
            self.cells.append({"text": "", "title": title, "src": "", "query": str("query" in classes)})
        if tag == "img" and self._in_cell():
            self.cells[-1]["src"] = attributes["src"] or ""
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, "cell" in classes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell():
            self.cells[-1]["text"] += data

    def _in_cell(self) -> bool:
        return any(is_cell for _, is_cell in self.open)


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (300, 200)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return str(path)


def hit(name: str, path: str | None = None, score: float = 0.5, **metadata: object) -> Hit:
    return Hit(name, score, {**({} if path is None else {"path": path}), **metadata})


def shown(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")


def test_a_hit_is_shown_by_its_picture_score_and_id_with_its_metadata_in_the_title(tmp_path: Path) -> None:
    path = picture(tmp_path / "ö.png", "red")
    missing = contact_sheet(tmp_path / "x.html", [Row([hit("cats/ö.png", path, 0.87654, kind="cät")])], "Cats")
    sheet = Sheet(tmp_path / "x.html")
    (cell,) = sheet.cells
    assert missing == 0
    assert cell["text"] == "0.877cats/ö.png"
    assert cell["title"].startswith("cats/ö.png\n")
    assert '"kind": "cät"' in cell["title"]
    assert shown(cell["src"]).size == (160, 107)
    assert np.asarray(shown(cell["src"])).reshape(-1, 3).mean(axis=0) == pytest.approx([255, 0, 0], abs=3)


def test_what_comes_from_an_index_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    rows = [Row([hit(evil, None, 0.5, **{evil: '" onload="x'})], [tmp_path / f"{evil[:8]}.png"], heading=evil)]
    contact_sheet(tmp_path / "x.html", rows, evil, note=evil)
    sheet = Sheet(tmp_path / "x.html")
    assert {tag for tag, _ in sheet.tags}.isdisjoint({"script", "link", "iframe"})
    assert not any(name.startswith("on") for _, attributes in sheet.tags for name in attributes)
    assert sheet.text.count(evil) == 5  # title, heading of the page, note, heading of the row, id
    assert evil in sheet.cells[1]["title"]
    assert re.findall(r"https?://|url\(|@import", (tmp_path / "x.html").read_text(encoding="utf-8")) == []


def test_missing_and_broken_pictures_leave_their_reasons_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    hits = [
        hit("gone", str(tmp_path / "gone.png")),
        hit("empty", str(tmp_path / "empty.png")),
        hit("text", str(tmp_path / "text.png")),
        hit("folder", str(tmp_path)),
        hit("null", "a\0b"),
        hit("pathless"),
        Hit("number", 0.5, {"path": 7}),
        hit("sound", picture(tmp_path / "sound.png")),
    ]
    assert contact_sheet(tmp_path / "x.html", [Row(hits)], "x") == 7
    sheet = Sheet(tmp_path / "x.html")
    assert [bool(cell["src"]) for cell in sheet.cells] == [False] * 7 + [True]
    for cell, reason in zip(
        sheet.cells,
        ("does not exist", "is empty", "is not an image", "is a folder", "null", "no path", "no path", ""),
        strict=True,
    ):
        assert reason in cell["text"]
    assert "7 pictures could not be shown" in sheet.text


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100] = (0, 0, 255)  # left half blue; upright it is the top half
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    contact_sheet(tmp_path / "x.html", [Row([hit("x", str(tmp_path / "x.jpg"))])], "x")
    image = np.asarray(shown(Sheet(tmp_path / "x.html").cells[0]["src"])).astype(int)
    assert image.shape == (160, 80, 3)
    assert image[:70, :, 2].min() > 200
    assert image[90:, :, 2].max() < 50


def test_queries_may_be_pictures_entries_vectors_and_several_of_them(tmp_path: Path) -> None:
    paths = {colour: picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "lime", "blue")}
    with Index.create(tmp_path / "i", 2) as index:
        index.add(["the id"], np.array([[1.0, 0.0]]), [{"path": paths["red"]}])
        queries = [
            index.get("the id"),
            paths["lime"],
            Path(paths["blue"]),
            Image.new("RGB", (9, 9), "red"),
            np.full((4, 4), 255, np.uint8),
            np.array([1.0, 0.0]),
            Record("record", np.array([1.0, 0.0], np.float32), {"path": paths["lime"]}),
            hit("hit", paths["blue"]),
            (index.get("the id"), Path(paths["lime"])),
        ]
        found = index.search(np.array([[1.0, 0.0]] * len(queries)), 1)
        assert contact_sheet(tmp_path / "x.html", search_rows(queries, found), "x") == 0
    asked = [cell for cell in Sheet(tmp_path / "x.html").cells if cell["query"] == "True"]
    colours = [tuple((np.asarray(shown(c["src"]))[0, 0] > 128).tolist()) if c["src"] else None for c in asked]
    red, lime, blue, white = (True, False, False), (False, True, False), (False, False, True), (True, True, True)
    assert colours == [red, lime, blue, red, white, None, lime, blue, red, lime]
    assert asked[0]["text"] == "the id"
    assert "a vector" in asked[5]["text"]
    assert [asked[6]["text"], asked[7]["text"]] == ["record", "hit"]


def test_a_path_is_a_picture_whatever_an_index_calls_its_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "cat.png", "blue")
    red = picture(tmp_path / "photos" / "cat.png", "red")
    monkeypatch.chdir(tmp_path)
    contact_sheet("x.html", search_rows(["cat.png", Path("cat.png")], [[hit("cat.png", red)]] * 2), "x")
    colours = [shown(cell["src"]).getpixel((5, 5)) for cell in Sheet(tmp_path / "x.html").cells]
    assert [max(range(3), key=colour.__getitem__) for colour in colours] == [2, 0, 2, 0]  # type: ignore[union-attr,arg-type]


def test_a_query_that_is_a_path_is_found_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    rows = search_rows([picture(tmp_path / "a.png"), "nowhere.png"], [[], []])
    assert contact_sheet(tmp_path / "x.html", rows, "x") == 1
    sheet = Sheet(tmp_path / "x.html")
    assert [bool(cell["src"]) for cell in sheet.cells] == [True, False]
    assert sheet.text.count("no hits") == 2


def test_there_must_be_hits_for_each_query() -> None:
    with pytest.raises(ConfigError, match="got 1 for 2"):
        search_rows(["a", "b"], [[]])


def test_groups_begin_with_their_representative_and_say_their_lowest_score(tmp_path: Path) -> None:
    members = (hit("a", score=0.9), hit("b", score=1.0), hit("c", score=0.95))
    contact_sheet(tmp_path / "x.html", group_rows([DuplicateGroup("b", 0.8912, members)]), "x")
    sheet = Sheet(tmp_path / "x.html")
    assert [cell["title"].split("\n")[0] for cell in sheet.cells] == ["b", "c", "a"]
    assert "3 alike, lowest linked score 0.891" in sheet.text


def test_clusters_show_their_nearest_members_and_how_many_more_there_are(tmp_path: Path) -> None:
    members = tuple(hit(f"m{number:04}", score=1 - number / 10_000) for number in range(1_234))
    clustering = Clustering((Cluster(members), Cluster(members[:2])), np.eye(2, dtype=np.float32), None)
    contact_sheet(tmp_path / "x.html", cluster_rows(clustering), "x", per_row=5)
    sheet = Sheet(tmp_path / "x.html")
    names = [cell["title"].split("\n")[0] for cell in sheet.cells]
    assert names == [f"m000{number}" for number in (0, 1, 2, 3, 4, 0, 1)]
    assert "Cluster 1: 1,234" in sheet.text
    assert sheet.text.count("and 1,229 more") == 1


def test_a_sheet_stops_at_its_limit_and_says_so(tmp_path: Path) -> None:
    rows = [Row([hit("a"), hit("b"), hit("c")], [np.ones(2)]) for _ in range(3)]
    contact_sheet(tmp_path / "x.html", rows, "x", limit=6)
    sheet = Sheet(tmp_path / "x.html")
    assert len(sheet.cells) == 6
    assert "and 2 more" in sheet.text
    assert "1 more row is not shown" in sheet.text


def test_a_sheet_of_nothing_says_so(tmp_path: Path) -> None:
    assert contact_sheet(tmp_path / "x.html", [], "Empty") == 0
    assert "nothing to show" in Sheet(tmp_path / "x.html").text


def test_a_long_id_is_cut_in_front_and_whole_in_the_title(tmp_path: Path) -> None:
    name = "folder/" * 100 + "end.jpg"
    contact_sheet(tmp_path / "x.html", [Row([hit(name)])], "x")
    (cell,) = Sheet(tmp_path / "x.html").cells
    assert cell["text"].endswith("folder/end.jpg")
    assert "…" in cell["text"]
    assert len(cell["text"]) < 120
    assert cell["title"].startswith(name + "\n")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_file_whose_name_is_no_unicode_can_be_a_query(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    try:
        picture(path)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert contact_sheet(tmp_path / "x.html", search_rows([path], [[]]), "x") == 0
    assert Sheet(tmp_path / "x.html").cells[0]["text"].endswith("?.png")


@pytest.mark.parametrize("setting", [{"per_row": 0}, {"limit": -1}, {"limit": 2.5}, {"per_row": True}])
def test_limits_that_are_none_are_refused_and_nothing_is_written(tmp_path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be a whole number"):
        contact_sheet(tmp_path / "x.html", [], "x", **setting)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_before_the_first_picture_is_read(tmp_path: Path) -> None:
    def rows() -> object:
        raise AssertionError("rows were asked for")
        yield

    with pytest.raises(VitembedError, match="no folder"):
        contact_sheet(tmp_path / "missing" / "x.html", rows(), "x")  # type: ignore[arg-type]


def test_a_thumbnail_keeps_the_proportions_and_never_grows(tmp_path: Path) -> None:
    assert thumbnail(picture(tmp_path / "wide.png", size=(400, 100)), 40).size == (40, 10)  # type: ignore[union-attr]
    assert thumbnail(picture(tmp_path / "small.png", size=(4, 3)), 40).size == (4, 3)  # type: ignore[union-attr]
    assert thumbnail(tmp_path / "none.png") == "does not exist"
