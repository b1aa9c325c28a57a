"""The page of an evaluation shows its figures, definitions and mistakes, and never fails because of a picture."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.test_evaluation import TableModel, clustered, pictures
from tests.evaluate.test_signatures import signatures
from tests.test_report import Collector
from vitembed import plots
from vitembed.errors import VitembedError
from vitembed.evaluate import (
    Side,
    Task,
    check_split,
    evaluate,
    evaluate_embeddings,
    evaluate_few_shot,
    evaluate_given_pairs,
)
from vitembed.evaluation_page import draw_evaluation_page, write_evaluation_page
from vitembed.verify import Pairs, Verifier


def read(page):
    collector = Collector()
    collector.feed(page.html())
    assert collector.open == []
    return collector


def verifier(seed=1):
    given = signatures(seed=seed)
    report = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of)
    pairs = report.pairs
    return Verifier.calibrate(pairs.scores, pairs.is_match, 0.05, identities=pairs.identities, skilled=pairs.skilled)


def test_a_page_of_signatures_shows_everything_and_is_well_formed():
    given = signatures()
    report = evaluate_embeddings(
        given.vectors, given.labels, forgery_of=given.forgery_of, names=given.writers, verifier=verifier()
    )
    page = read(draw_evaluation_page(report, title="A & B", about=["of <these>"]))
    for text in (
        "A & B", "of <these>", "against random", "against skilled", "With 6 references", "Retrieval", "Curves",
        "The verifier's decisions", "ECE", "Errors by identity", "writer 03", "Worst false accepts", "Definitions",
        f"{report.verification.kinds['skilled'].eer.value:.2%}", "a posteriori", "a skilled forgery", "no picture",
    ):  # fmt: skip
        assert text in page.text, text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 5  # ROC, DET, scores, reliability, identities


def test_mistakes_are_shown_as_pictures_under_their_names(tmp_path):
    z, labels = clustered(40, classes=10, noise=2.0)
    paths = []
    for at, label in enumerate(labels):
        path = tmp_path / f"person {label}" / f"{at}é<b>.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (30, 10), 255 - at).save(path)
        paths.append(path)
    paths[3].write_bytes(b"broken")

    class Model:
        fingerprint = "sha256:z"

        def encode(self, images, **_):
            return z[: len(images)].astype(np.float32)

    report = evaluate(Model(), paths, labels)
    mistakes = report.verification.mistakes
    assert len(mistakes.false_accepts) == len(mistakes.false_rejects) == 12
    page = read(draw_evaluation_page(report))
    left, right = report.pairs.images[mistakes.false_accepts[0]]
    assert f"{paths[left].parent.name}/{paths[left].name}" in page.text
    assert f"{paths[right].parent.name}/{paths[right].name}" in page.text
    assert f"score {report.pairs.scores[mistakes.false_accepts[0]]:.4f}" in page.text
    assert str(tmp_path) not in page.text  # names are told below the folder of all images
    shown = [at for side in (mistakes.false_accepts, mistakes.false_rejects) for at in report.pairs.images[list(side)]]
    broken = sum(3 in pair for pair in shown)
    assert page.text.count("is not an image") == broken
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4 + 48 - broken


def test_pairs_alone_make_a_page_without_intervals():
    z, labels = clustered(30, classes=5, noise=0.1)
    pairs = Pairs.from_labels(pictures(range(30)), labels)
    report = evaluate_given_pairs(TableModel(z), pairs)
    page = read(draw_evaluation_page(report))
    assert "No intervals: they need nine known identities" in page.text
    assert "Retrieval" not in page.text
    assert "0 pairs that do not match were accepted" in page.text


def test_a_split_that_leaks_is_told_first():
    z, labels = clustered(60)
    report = evaluate_embeddings(z, labels)
    side = Side(pictures(range(60)), [f"<{label}>" for label in labels], z)
    leaking = type(report)(
        report.retrieval,
        report.verification,
        report.pairs,
        report.paired_images,
        few_shot=(evaluate_few_shot(z, labels, Task(5, 1), episodes=10),),
        split=check_split(side, side),
    )
    page = read(draw_evaluation_page(leaking))
    assert page.text.index("12 identities are on both sides of the split: <0>") < page.text.index("Verification")
    assert "5 ways, 1 shots" in page.text


def test_a_page_is_written_wholly_or_not_at_all(tmp_path):
    z, labels = clustered(60)
    report = evaluate_embeddings(z, labels)
    write_evaluation_page(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")
    with pytest.raises(VitembedError, match="no folder"):
        write_evaluation_page(tmp_path / "missing" / "report.html", report)


def test_plots_are_pictures_for_any_numbers():
    zero = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])
    pictures = [
        plots.plot_roc({"perfect": zero, "chance": ([0, 1], [1, 0])}, lowest=0.01),
        plots.plot_det({"perfect": zero}, lowest=0.01),
        plots.plot_scores({"matching": [0.5, 0.5], "random": [], "skilled": [0.5]}, 0.5, reject_below=0.4),
        plots.plot_identity_errors(["a" * 50, "ü"], {"rejected": [0.5, None], "accepted": [None, None]}),
    ]
    for picture in pictures:
        assert re.match(rb"\x89PNG", picture)
        assert len(picture) > 2000


def test_the_page_claims_nothing_of_forgeries_where_there_are_none():
    z, labels = clustered(120)
    judge = verifier()
    assert judge.calibration.against == "skilled"
    page = read(draw_evaluation_page(evaluate_embeddings(z, labels, verifier=judge)))
    assert "against skilled" not in page.text
    assert "None are known here" in page.text
    assert "that interval" not in page.text


def test_the_page_tells_for_how_many_identities_a_rate_was_expected_and_how_many_are_judged():
    given = signatures(writers=10)
    report = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of, verifier=verifier())
    page = read(draw_evaluation_page(report))
    assert "on 12 other identities. Judged are 10, so that the measured rate cannot be compared" in page.text


def test_the_page_tells_how_many_writers_have_enough_images_for_references():
    given = signatures(writers=3, genuine=5)
    report = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of)
    page = read(draw_evaluation_page(report))
    assert "0 of 3 identities have more than 6 genuine images" in page.text
