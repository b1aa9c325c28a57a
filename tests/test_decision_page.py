"""The page of one decision says what was decided, why, and how often such decisions err."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vitembed.decision_page import write_decision_page
from vitembed.decision_page.pictures import seen_region
from vitembed.decision_page.scale import draw_scale
from vitembed.errors import ConfigError, ImageError, VectorError, VitembedError
from vitembed.preprocess import Preprocess
from vitembed.verify import Decision, ReferenceCalibration, Verifier
from vitembed.verify.calibration import Calibration
from vitembed.verify.curves import Logistic
from vitembed.verify.quality import Problem, Quality
from vitembed.verify.reference_decisions import ReferenceDecision
from vitembed.verify.words import Terms, how_often_it_errs, how_probable, share_in_words, where_it_lies

CALIBRATION = Calibration(
    threshold=0.7,
    far_wanted=0.01,
    far=0.009,
    far_interval=(0.003, 0.021),
    frr=0.062,
    frr_interval=(0.031, 0.101),
    eer=0.02,
    matches=1_842,
    non_matches=9_600,
    curve=Logistic(20.0, -13.0),
    identities=34,
    random=9_600,
    far_random=0.009,
    far_random_interval=(0.003, 0.021),
    protocol="chosen on these pairs",
)
FORGERIES = replace(
    CALIBRATION, random=5_400, skilled=4_200, far_random=0.0, far_random_interval=(0.0, 0.0012), far_skilled=0.041
)
BAND = replace(CALIBRATION, reject_below=0.6, frr_wanted=0.01, unsure_matches=0.051)


MATCH = Decision(match=True, verdict="match", probability=0.95, score=0.8, threshold=0.7)
NO_MATCH = Decision(match=False, verdict="no match", probability=0.05, score=0.4, threshold=0.7)
UNSURE = Decision(match=False, verdict="unsure", probability=0.5, score=0.65, threshold=0.7)
REFERENCES = ReferenceDecision(
    "alice", True, "match", 0.95, 0.8, 0.7, "mean", (0.75, 0.8, 0.85), ("a.png", "b.png", None)
)


class Reader(HTMLParser):
    """The tags and texts of a page; all tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and kind in (None, found.get("class"))]


def ink(size: tuple[int, int] = (60, 30), box: tuple[int, int, int, int] = (10, 10, 40, 14)) -> Image.Image:
    image = Image.new("L", size, 235)
    image.paste(30, box)
    return image


def written(tmp_path: Path, decision: Any = MATCH, images: Sequence[Any] | None = None, **settings: Any) -> Reader:
    path = tmp_path / "decision.html"
    settings = {"calibration": CALIBRATION} | settings
    write_decision_page(path, decision, [ink(), ink()] if images is None else images, **settings)
    return Reader(path)


def judged(*texts: str) -> Quality:
    return Quality(tuple(Problem("blank", text) for text in texts), 0.0, 0, 0.0)


def shared(first: Any = None, second: Any = None) -> Any:
    plain = np.array([[0.1, -0.1], [0.0, 0.05]])
    return SimpleNamespace(first=plain if first is None else first, second=plain if second is None else second)


def decoded(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


# The page -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "sign", "words"),
    [(MATCH, "✓", "Match"), (NO_MATCH, "✗", "No match"), (UNSURE, "?", "Unsure: have a person look")],
    ids=["match", "no match", "unsure"],
)
def test_a_verdict_is_told_by_a_sign_and_words_and_not_by_colour_alone(
    tmp_path: Path, decision: Any, sign: str, words: str
) -> None:
    assert sign + words in written(tmp_path, decision, calibration=BAND).text


def test_a_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, shared=shared(), references=[ink()], reference_scores=[0.5], identity="alice")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    links = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "xlink:href")]
    assert len(links) == 5  # two images, each used once more under its map, and a reference
    assert all(value is not None and value.startswith(("data:image/", "#picture-")) for value in links)
    document = (tmp_path / "decision.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://|url\([^)]*\)", document)) == {"url(#lowers)"}


def test_what_is_passed_is_escaped_wherever_it_is_shown(tmp_path: Path) -> None:
    evil = '<b onclick="x">&'
    quality = [judged(evil)]
    calibration = replace(CALIBRATION, protocol=evil)
    page = written(
        tmp_path,
        replace(REFERENCES, notes=(evil,), rule=evil),
        calibration=calibration,
        names=[evil, evil],
        references=[ink(), tmp_path / evil],
        quality=quality,
        identity=evil,
        people=evil,
        verifier=Verifier(calibration, evil, evil, evil),
    )
    assert page.text.count(evil) >= 10
    assert not [found for _, found in page.tags if "onclick" in found]


def test_a_name_that_is_no_text_is_shown_as_well_as_it_can_be(tmp_path: Path) -> None:
    assert "caf?.png" in written(tmp_path, names=["caf\udce9.png", "é 漢字.png"]).text


def test_both_images_are_described_and_named(tmp_path: Path) -> None:
    page = written(tmp_path, names=["questioned.png", "reference.png"])
    assert [found["aria-label"] for found in page.all("svg") if "viewbox" in found] == [
        "questioned.png",
        "reference.png",
    ]
    assert page.text.count("questioned.png") == 3  # title, heading and caption
    assert all(found.get("alt") for found in page.all("img"))
    assert all("aria-label" in found or found.get("aria-hidden") == "true" for found in page.all("svg"))


def test_scans_are_shown_cleaned_and_other_images_as_they_are(tmp_path: Path) -> None:
    images = [ink((200, 120), (40, 40, 140, 50))] * 2
    raw, cleaned, black = (
        written(tmp_path, images=images, preprocess=Preprocess.grey((28, 28), **how)).all("image")[0]["href"]
        for how in ({}, {"scan": True}, {"scan": True, "binarize": True})
    )
    assert decoded(raw).size == (200, 120)
    assert decoded(raw).getpixel((0, 0)) == 235
    assert decoded(cleaned).getpixel((0, 0)) == 255
    assert decoded(cleaned).width < 200  # cropped to the ink
    assert decoded(cleaned).convert("L").getextrema()[0] > 0
    assert np.unique(np.asarray(decoded(black).convert("L"))).tolist() == [0, 255]


def test_a_photograph_is_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20), "red").save(tmp_path / "photo.jpg", exif=exif)
    page = written(tmp_path, images=[tmp_path / "photo.jpg", tmp_path / "photo.jpg"])
    assert decoded(page.all("image")[0]["href"]).size == (20, 40)


def test_problems_and_notes_are_warnings_above_the_verdict(tmp_path: Path) -> None:
    quality = [judged("too small"), judged()]
    page = written(tmp_path, replace(MATCH, notes=("the same file twice",)), names=["a", "b"], quality=quality)
    assert "b: " not in page.text
    assert page.text.index("a: too small") < page.text.index("the same file twice") < page.text.index("✓")
    assert "Warnings" not in {found.get("aria-label") for found in written(tmp_path).all("ul")}


def test_a_problem_that_is_a_note_too_is_said_once(tmp_path: Path) -> None:
    quality = [judged("There is no ink.")]
    assert written(tmp_path, replace(MATCH, notes=("There is no ink.",)), quality=quality).text.count("no ink") == 1


def test_references_are_shown_closest_first_and_one_that_is_gone_leaves_its_reason(tmp_path: Path) -> None:
    ink().save(tmp_path / "one.png")
    references = [tmp_path / "one.png", tmp_path / "gone.png"]
    page = written(tmp_path, images=[ink()], references=references, reference_scores=[0.41, 0.52], identity="alice")
    shown = page.text[page.text.index("References of alice") :]
    assert shown.index("Reference 2: 0.520gone.png") < shown.index("Reference 1: 0.410one.png")
    assert "does not exist" in shown
    assert len(page.all("img")) == 1


def test_a_reference_that_is_not_kept_is_told_and_still_has_its_score(tmp_path: Path) -> None:
    references = [ink(), None]
    page = written(tmp_path, REFERENCES, [ink()], references=references, reference_scores=[0.1, 0.9], identity="alice")
    assert "its image is not kept" in page.text
    assert "Reference 2: 0.900" in page.text


def test_rates_of_pairs_are_not_said_of_references(tmp_path: Path) -> None:
    decided = {"images": [ink()], "references": [ink()], "identity": "alice"}
    page = written(tmp_path, REFERENCES, **decided, verifier=Verifier(CALIBRATION))
    assert "How often such a decision errs is not known" in page.text
    assert "of 1,000" not in page.text
    fitted = Verifier(CALIBRATION, references=cast(ReferenceCalibration, object()))
    assert "of 1,000 genuine images about 62" in written(tmp_path, REFERENCES, **decided, verifier=fitted).text


def test_more_references_than_a_page_shows_are_counted(tmp_path: Path) -> None:
    page = written(tmp_path, images=[ink()], references=[ink()] * 30)
    assert len(page.all("img")) == 24
    assert "and 6 more" in page.text


def test_single_scores_stand_on_the_scale_only_where_the_rule_keeps_cosines(tmp_path: Path) -> None:
    many = {"images": [ink()], "references": [ink()] * 3, "reference_scores": [0.3, 0.4, 0.5]}
    assert len(written(tmp_path, REFERENCES, **many).all("circle")) == 3
    assert len(written(tmp_path, replace(REFERENCES, rule="znorm"), **many).all("circle")) == 0


def test_a_map_is_drawn_where_it_belongs_and_signs_differ_by_more_than_colour(tmp_path: Path) -> None:
    image = Image.new("RGB", (80, 40), "white")
    preprocess = Preprocess((20, 20), resize="crop")  # sees the middle, 40 x 40
    page = written(tmp_path, images=[image, image], shared=shared(), preprocess=preprocess)
    patches = [found for found in page.all("rect") if "x" in found and "fill" in found]
    places = [tuple(float(found[name] or "") for name in ("x", "y", "width", "height")) for found in patches[:3]]
    assert places == [(20, 0, 20, 20), (40, 0, 20, 20), (40, 20, 20, 20)]
    assert [found["fill"] == "url(#lowers)" for found in patches[:3]] == [False, True, False]
    strength = [float(found["fill-opacity"] or "") for found in patches[:3]]
    assert strength[0] == strength[1] > strength[2]
    assert "no finding about what the images show" in page.text


def test_patches_on_padding_are_not_drawn(tmp_path: Path) -> None:
    image = Image.new("RGB", (80, 20), "white")
    preprocess = Preprocess((40, 40), resize="pad")  # sees 80 x 80: the image is the second quarter of four rows
    page = written(
        tmp_path, images=[image, image], shared=shared(np.ones((8, 1)), np.ones((8, 1))), preprocess=preprocess
    )
    patches = [found for found in page.all("rect") if "x" in found and "fill" in found]
    assert [float(found["y"] or "") for found in patches] == [0, 10, 0, 10]


def test_a_map_of_zeros_draws_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, shared=shared(np.zeros((2, 2)), np.zeros((2, 2))))
    assert [found for found in page.all("rect") if "x" in found and "fill" in found] == []


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(300, 100), (100, 300), (64, 64)])
def test_the_region_of_a_map_is_what_pre_processing_keeps(resize: Any, size: tuple[int, int]) -> None:
    # Oracle: grey levels that tell the place, read back from the pixels that the network gets.
    preprocess = Preprocess((32, 48), resize=resize, interpolation="bilinear")
    across = np.tile(np.linspace(0, 250, size[0]), (size[1], 1)).astype(np.uint8)
    left, _, width, _ = seen_region(preprocess, size)
    row = preprocess(np.dstack([across] * 3))[0, 16].astype(float)
    expected = (left + width * (np.arange(48) + 0.5) / 48) / size[0] * 250
    inside = (expected > 10) & (expected < 240)
    assert inside.any()
    one_pixel = width / 48 / size[0] * 250  # pre-processing rounds to whole pixels
    np.testing.assert_allclose(row[inside], expected[inside], atol=max(4, 0.75 * one_pixel))


def test_the_small_print_names_model_date_protocol_and_counts(tmp_path: Path) -> None:
    verifier = Verifier(FORGERIES, "sha256:abc", "runs/signatures", "2026-11-21T20:05:00+00:00")
    text = written(tmp_path, calibration=FORGERIES, verifier=verifier).text
    small = text[text.index("Small print") :]
    expected = ["sha256:abc", "runs/signatures", "2026-11-21T20:05:00+00:00", "chosen on these pairs"]
    expected += ["1,842 matching, 5,400 random, 4,200 skilled forgeries"]
    assert [fact for fact in expected if fact not in small] == []


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"images": []}, ConfigError, "one or two images; got 0"),
        ({"images": [ink()] * 3}, ConfigError, "one or two images; got 3"),
        ({"names": ["a"]}, ConfigError, "a name for each image; got 1 for 2"),
        ({"images": [ink()], "shared": shared()}, ConfigError, "needs both of them; got 1"),
        ({"references": [ink()], "reference_scores": [0.1, 0.2]}, ConfigError, "got 2 for 1"),
        ({"references": [ink()], "reference_scores": [float("nan")]}, VectorError, "scores must be finite"),
        ({"decision": replace(MATCH, score=float("nan"))}, VectorError, "scores must be finite"),
        ({"decision": replace(MATCH, verdict="maybe")}, ConfigError, "unknown verdict 'maybe'"),
        ({"shared": shared(np.full((2, 2), np.inf))}, VectorError, "must be finite numbers of shape"),
        ({"shared": shared(np.zeros(4))}, VectorError, r"got \(4,\)"),
        ({"images": ["missing.png", ink()]}, ImageError, "does not exist"),
    ],
)
def test_bad_input_is_one_clear_error_and_an_older_page_stays(
    tmp_path: Path, change: dict[str, Any], kind: type[VitembedError], message: str
) -> None:
    (tmp_path / "decision.html").write_text("older")
    with pytest.raises(kind, match=message) as caught:
        written(tmp_path, **change)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["decision.html"]
    assert (tmp_path / "decision.html").read_text() == "older"


# Words ----------------------------------------------------------------------------------------------------


def test_rates_are_said_as_counts_of_pairs_with_their_intervals(tmp_path: Path) -> None:
    text = written(tmp_path, people="people", verifier=Verifier(CALIBRATION, created="2026-11-21T20:05:00+00:00")).text
    assert "of 1,000 pairs of different people about 9 (between 3 and 21) would be accepted" in text
    assert "of 1,000 genuine pairs about 62 (between 31 and 101) would be refused" in text
    assert "measured on 11,442 pairs of 34 people on 21 November 2026." in text


def test_skilled_forgeries_are_told_apart() -> None:
    sentences = how_often_it_errs(FORGERIES, Terms.of_pairs("people"), "")
    assert "pairs of different people fewer than 2 would be accepted" in sentences[0]
    assert sentences[1].startswith("Of 1,000 skilled forgeries about 41 ")


def test_where_kinds_are_not_told_apart_one_rate_is_said_of_all_pairs() -> None:
    unknown = replace(CALIBRATION, random=None, skilled=None, far_random=None, far_random_interval=None, far=0.008)
    (first, *others) = how_often_it_errs(unknown, Terms.of_pairs("people"), "")
    assert "of 1,000 pairs of different people about 8 (between 3 and 21)" in first
    assert "skilled" not in " ".join(others)


def test_with_skilled_forgeries_alone_nothing_is_said_of_other_pairs() -> None:
    alone = replace(FORGERIES, random=None, far_random=None)
    text = " ".join(how_often_it_errs(alone, Terms.of_pairs("people"), ""))
    assert "different people" not in text
    assert "skilled forgeries about 41" in text


def test_with_a_band_the_share_that_is_left_to_a_person_is_said() -> None:
    (first, *_) = how_often_it_errs(BAND, Terms.of_references("people"), "")
    assert "of 1,000 images of other people about 9" in first
    assert first.endswith(
        "genuine images about 62 (between 31 and 101) would not be accepted, 51 of them left to a person."
    )


@pytest.mark.parametrize(
    ("rate", "interval", "trials", "expected"),
    [
        (0.0, (0.0, 0.0), 3_000, "of 1,000 pairs fewer than 1 would be accepted"),
        (0.0, (0.0, 0.0), 600, "of 1,000 pairs fewer than 5 "),  # an interval cannot know better than the rule of three
        (0.0, (0.0, 0.02), 600, "of 1,000 pairs fewer than 20 "),
        (0.0, (0.0, 0.7), 2, "nobody can say how many pairs would be accepted (only 2 were measured)"),
        (0.0002, (0.0, 0.0011), 10_000, "of 10,000 pairs about 2 (between 0 and 11) "),
        (1e-9, (0.0, 1e-8), 10**10, "of 1,000,000 pairs fewer than 1 "),
        (1.0, (0.98, 1.0), 200, "of 1,000 pairs about 1,000 (between 980 and 1,000) "),
        (0.0, None, 600, "of 600 pairs none (too few were measured to know how exact this is) would be accepted"),
        (0.009, None, 600, "about 9 (too few were measured to know how exact this is) "),
    ],
)
def test_no_count_says_more_than_was_measured(rate: float, interval: Any, trials: int, expected: str) -> None:
    assert expected in share_in_words(rate, interval, trials, "pairs", "would be accepted")


@pytest.mark.parametrize(
    ("probability", "prior", "expected"),
    [
        (0.973, 0.5, "If match and no match were equally likely beforehand, the probability of a match is 97.3 %."),
        (1.0, 0.5, "more than 99.9 %"),
        (0.0, 0.5, "less than 0.1 %"),
        (0.6, 0.25, "If 25 of 100 that are asked about match, "),
        (0.5, 0.001, "If 1 of 1,000 that are asked about match, "),
    ],
)
def test_a_probability_is_said_with_what_was_supposed_beforehand(
    probability: float, prior: float, expected: str
) -> None:
    assert expected in how_probable(probability, prior, "match")


def test_where_verdict_and_probability_seem_to_disagree_the_reason_is_said() -> None:
    assert "asks for more" in how_probable(0.6, 0.5, "no match")
    assert "asks for more" in how_probable(0.6, 0.5, "unsure")
    assert "what was likely beforehand" in how_probable(0.4, 0.1, "match")
    for agreeing in (how_probable(0.6, 0.5, "match"), how_probable(0.4, 0.5, "no match")):
        assert agreeing.count(".") == 2  # one sentence, with one decimal point


@pytest.mark.parametrize(
    ("verdict", "score", "below", "expected"),
    [
        ("match", 0.8, None, "The score, 0.800, lies above the line for a match, 0.700."),
        ("match", 0.7, None, "lies exactly on the line"),
        ("match", 0.70001, None, "0.70001, lies above the line for a match, 0.70000."),
        ("no match", 0.1, None, "lies below the line for a match, 0.700."),
        ("no match", 0.1, 0.6, "lies below 0.600, where"),
        ("unsure", 0.6, 0.6, "lies between 0.600 and 0.700"),
    ],
)
def test_the_first_sentence_says_on_which_side_of_the_line_the_score_lies(
    verdict: str, score: float, below: float | None, expected: str
) -> None:
    assert expected in where_it_lies(verdict, score, 0.7, below)


# The scale ------------------------------------------------------------------------------------------------


def scale_parts(svg: str) -> tuple[list[float], list[float], list[float]]:
    """Return the left ends of the zones, the lines, and the circles, in per cent of the width."""
    quoted = re.sub(r"=([^\s\"/>]+)", r'="\1"', svg)
    root = ElementTree.fromstring(quoted)
    take = lambda tag, name: [float(node.attrib[name].rstrip("%")) for node in root.iter(tag)]  # noqa: E731
    return take("rect", "x"), take("line", "x1"), take("circle", "cx")


@pytest.mark.parametrize("values", [(0.8, 0.7, 0.6), (-4.0, 0.7, 0.6), (30.0, 0.7, None), (0.7, 0.7, None)])
def test_everything_on_the_scale_lies_within_it_in_its_order(values: tuple[float, float, float | None]) -> None:
    zones, lines, circles = scale_parts(draw_scale(*values, others=[0.1, 0.9]))
    assert zones == [0.0, *lines]
    assert lines == sorted(lines)
    assert all(0 < x < 100 for x in (*lines, *circles))
    assert circles[0] < lines[0] <= lines[-1] < circles[1]


def test_the_scale_is_described_in_words() -> None:
    described = 'aria-label="Scale of scores: this one is 0.800, a match begins at 0.700, below 0.600 there is none"'
    assert described in draw_scale(0.8, 0.7, 0.6)
