"""Pages are one file that holds everything, and say what they were told to."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitembed import plots
from vitembed.errors import VitembedError
from vitembed.report import Page, Tile


class Collector(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, 200)


def page() -> Page:
    made = Page("A & B <report>")
    made.heading("Figures <1>")
    made.paragraph("x < y & z")
    made.paragraph("an aside", faint=True)
    made.table(["kind", "rate"], [["<a>", "1 %"], ["b", "2 %"]])
    made.figure(plots.plot_history([], 1), 'a "quoted" caption')
    made.sheet([[Tile(picture(), "query <q>"), Tile(picture(), "x", 0.5, True), Tile(picture(), "y", -0.25, False)]])
    made.tiles([Tile(picture((30, 900)), "tall")])
    made.code("vitembed search <index>")
    return made


def test_a_page_is_well_formed_and_escapes_what_it_shows() -> None:
    collector = Collector()
    collector.feed(page().html())
    assert collector.open == []
    for text in ("A & B <report>", "Figures <1>", "x < y & z", "<a>", "query <q>", "vitembed search <index>"):
        assert text in collector.text


def test_a_page_needs_nothing_from_outside_and_runs_nothing() -> None:
    document = page().html()
    collector = Collector()
    collector.feed(document)
    assert {tag for tag, _ in collector.tags}.isdisjoint({"script", "link", "iframe"})
    sources = [attributes["src"] for tag, attributes in collector.tags if tag == "img"]
    assert len(sources) == 5
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert re.findall(r"https?://|url\(", document) == []


def test_every_picture_is_described_and_answers_are_told_by_more_than_colour() -> None:
    collector = Collector()
    collector.feed(page().html())
    assert all(attributes.get("alt") for tag, attributes in collector.tags if tag == "img")
    assert "✓ right" in collector.text
    assert "✗ wrong" in collector.text
    assert "0.500" in collector.text
    assert "-0.250" in collector.text


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page().write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page().html()
    with pytest.raises(VitembedError, match="no folder"):
        page().write(tmp_path / "missing" / "report.html")


def test_a_tile_without_a_picture_shows_the_reason_and_titles_are_escaped() -> None:
    made = Page("x")
    made.tiles([Tile("is <empty>", "the label", 0.5, title='a "quoted" <title>')], wrap=True)
    collector = Collector()
    collector.feed(made.html())
    assert collector.open == []
    assert "is <empty>" in collector.text
    assert "the label" in collector.text
    assert "img" not in {tag for tag, _ in collector.tags}
    assert 'a "quoted" <title>' in [attributes.get("title") for _, attributes in collector.tags]


def test_tiles_that_wrap_keep_their_queries_in_a_column_before_the_hits() -> None:
    made = Page("x")
    made.tiles([Tile("-", "query 1"), Tile("-", "query 2"), Tile("-", "hit", 0.5)], wrap=True)
    before, _, after = made.html().partition('<div class="row wrap">')
    assert ("query 1" in before, "query 2" in before, "hit" in before.partition("<body>")[2]) == (True, True, False)
    assert "hit" in after


def test_large_colour_pictures_become_jpeg_and_small_or_grey_ones_stay_exact() -> None:
    made = Page("x")
    large, small, grey = Image.new("RGB", (300, 200)), Image.new("RGB", (9, 9)), Image.new("L", (300, 200))
    made.tiles([Tile(image, "x") for image in (large, small, grey)])
    assert re.findall(r"data:image/(\w+);", made.html()) == ["jpeg", "png", "png"]


def decoded(png: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(png)).convert("RGB")


def has_colour(image: Image.Image, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(np.asarray(image).astype(int) - wanted).sum(axis=2) < 12).any())


def test_the_history_draws_what_there_is() -> None:
    full = [
        {
            "epoch": i,
            "loss": 1 / i,
            "active": 0.5,
            "recall@1": 0.9,
            "positive_distance": 0.4,
            "negative_distance": 1.2,
        }
        for i in (1, 2, 3)
    ]
    image = decoded(plots.plot_history(full, 2))
    assert all(has_colour(image, colour) for colour in (plots.ACCENT, plots.MATCH, plots.NON_MATCH))
    sparse = decoded(plots.plot_history([{"epoch": 1, "loss": 0.5, "recall@1": None}], 1))
    assert has_colour(sparse, plots.ACCENT)
    assert not has_colour(sparse, plots.MATCH)


def test_the_histogram_draws_both_kinds_and_the_threshold() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 0.1, 500), rng.normal(0.8, 0.05, 50)]).clip(-1, 1)
    image = np.asarray(decoded(plots.plot_score_histogram(scores, np.arange(550) >= 500, 0.5))).astype(int)
    left, right = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 + 100 :]
    reddish = lambda part: ((part[..., 0] - part[..., 1]) > 30).sum()  # noqa: E731
    greenish = lambda part: ((part[..., 1] - part[..., 0]) > 30).sum()  # noqa: E731
    assert reddish(left) > greenish(left)
    assert greenish(right) > reddish(right)


@pytest.mark.parametrize(
    ("scores", "is_match"),
    [([0.1, 0.2], [False, False]), ([0.9], [True]), ([], []), ([-1.0, np.float32(1.0000001)], [False, True])],
    ids=["no match", "one match", "nothing", "just above one"],
)
def test_the_histogram_is_drawn_without_one_kind_and_at_the_ends(scores: list[float], is_match: list[bool]) -> None:
    image = np.asarray(decoded(plots.plot_score_histogram(scores, is_match, 0.5))).astype(int)
    assert bool(((image[..., 0] - image[..., 1]) > 30).any()) == (False in is_match)  # reddish bars
    assert bool(((image[..., 1] - image[..., 0]) > 30).any()) == (True in is_match)  # greenish bars


def test_an_overlay_keeps_the_shape_and_is_strongest_where_the_weight_is() -> None:
    heat = np.zeros((3, 6))
    heat[1, 4] = 5
    drawn = plots.overlay(Image.new("L", (60, 30), 128), heat, side=120)
    assert drawn.size == (120, 60)
    change = np.abs(np.asarray(drawn).astype(int) - 128).sum(axis=2)
    row, column = np.unravel_index(change.argmax(), change.shape)
    assert (row // 20, column // 20) == (1, 4)
    assert change[:, :40].max() < 10
    untouched = plots.overlay(Image.new("L", (60, 30), 128), np.zeros((3, 6)))
    assert np.abs(np.asarray(untouched).astype(int) - 128).max() <= 1
