"""`vitembed evaluate`: folders, galleries, pairs, signatures, verifiers, splits and the page."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Runner, draw


def write_pairs(path: Path, data: Path, kinds: bool = False) -> Path:
    """Write all pairs of the first three images of three classes."""
    images = [f"class{label}/{number}.png" for label in range(3) for number in range(3)]
    rows = ["left,right,match" + (",kind" if kinds else "")]
    for at, left in enumerate(images):
        for right in images[at + 1 :]:
            match = left[:6] == right[:6]
            kind = ",genuine" if match else ",skilled" if left.endswith("0.png") else ",random"
            rows.append(f"{data / left},{data / right},{int(match)}" + (kind if kinds else ""))
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three writers with eight genuine and three forged images each."""
    root = tmp_path_factory.mktemp("signed")
    rng = np.random.default_rng(0)
    for writer in range(3):
        base = rng.integers(0, 255, (12, 12))
        for kind, count in (("genuine", 8), ("forged", 3)):
            for number in range(count):
                noise = rng.normal(0, 20 if kind == "genuine" else 40, (12, 12))
                path = root / f"{writer:03}" / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(path)
    return root


def test_figures_have_intervals_and_definitions(cli: Runner, world: Path) -> None:
    outcome = cli("evaluate", world / "model", world / "data", "--json", "--few-shot", "5x1", "--few-shot", "2x3")
    assert outcome.status == 0, outcome.err
    assert {"map@r", "mrr", "nmi", "recall@10", "eer", "auc", "definitions"} <= set(outcome.json)
    assert outcome.json["recall@1_interval"] is None  # eight classes
    assert [few["shots"] for few in outcome.json["few_shot"]] == [1, 3]
    text = cli("evaluate", world / "model", world / "data", "--few-shot", "5x1").out
    for words in ("retrieval (64 queries, 8 classes", "5x1 accuracy", "worst identities", "verification (224 matching"):
        assert words in text


def test_a_gallery_is_searched(cli: Runner, world: Path, tmp_path: Path) -> None:
    queries = draw(tmp_path / "queries", classes=4, per_class=3)
    outcome = cli("evaluate", world / "model", queries, "--gallery", world / "data", "--json")
    assert (outcome.json["images"], outcome.json["gallery"]) == (12, 64)
    assert outcome.json["matches"] == 12 * 8
    assert (
        "12 queries, 4 classes, in 64 images"
        in cli("evaluate", world / "model", queries, "--gallery", world / "data").out
    )


def test_a_table_of_pairs_is_verified(cli: Runner, world: Path, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "pairs.csv", world / "data", kinds=True)
    outcome = cli("evaluate", world / "model", table, "--json")
    assert outcome.status == 0, outcome.err
    assert (outcome.json["matches"], outcome.json["non_matches"], outcome.json["paired_images"]) == (9, 27, 9)
    assert {"random", "skilled"} <= set(outcome.json)
    assert "recall@1" not in outcome.json
    beside = cli("evaluate", world / "model", world / "data", "--pairs", table, "--json")
    assert (beside.json["images"], beside.json["matches"]) == (64, 9)
    for option in (["--held-out"], ["--gallery", world / "data"], ["--few-shot", "5x1"], ["--train", world / "data"]):
        refused = cli("evaluate", world / "model", table, *option)
        assert refused.status == 2
        assert f"{option[0]} goes with images" in refused.err


def test_signatures_are_measured_by_pairs_and_by_references(cli: Runner, world: Path, signed: Path) -> None:
    outcome = cli("evaluate", world / "model", signed, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["skilled"]["matches"] == 3 * 28
    assert outcome.json["signatures"]["writers"] == 3
    assert set(outcome.json["references"]["rules"]) == {"mean", "max"}
    text = cli("evaluate", world / "model", signed).out
    assert "eer skilled" in text
    assert "verification with 6 references, score by max (3 of 3 identities have more images)" in text


def test_a_verifier_is_judged(cli: Runner, world: Path, tmp_path: Path) -> None:
    verifier = tmp_path / "v.json"
    assert cli("calibrate", world / "model", world / "data", "--out", verifier, "--far", 0.05).status == 0
    outcome = cli("evaluate", world / "model", world / "data", "--verifier", verifier, "--json")
    threshold = json.loads(verifier.read_text())["calibration"]["threshold"]
    assert outcome.json["decision"]["threshold"] == threshold
    assert outcome.json["probabilities"]["prior"] == 0.5
    assert (
        f"at its threshold {threshold:.4f}"
        in cli("evaluate", world / "model", world / "data", "--verifier", verifier).out
    )
    ten = draw(tmp_path / "ten", classes=10, per_class=4)
    assert cli("calibrate", world / "model", ten, "--out", verifier, "--far", 0.1).status == 0
    fewer = cli("evaluate", world / "model", world / "data", "--verifier", verifier).out
    assert "on 10 other identities. Judged are 8, so that the measured rate cannot be compared" in fewer
    missing = cli("evaluate", world / "model", world / "data", "--verifier", tmp_path / "none")
    assert (missing.status, "no verifier at" in missing.err) == (2, True)


def test_what_the_data_share_with_the_training_is_a_warning(cli: Runner, world: Path) -> None:
    data = world / "data"
    outcome = cli("evaluate", world / "model", data, "--train", data, "--json")
    assert "warning: 8 identities are on both sides of the split: class0, class1" in outcome.err
    assert "warning: 64 files are on both sides" in outcome.err
    assert len(outcome.json["split"]["equal_files"]) == 64
    honest = cli("evaluate", world / "model", data, "--train", data, "--held-out", "--json")
    assert honest.json["split"]["shared_identities"] == []
    assert honest.json["split"]["train_images"] == 48


def test_the_page_is_written_and_an_impossible_place_is_known_before_the_work(
    cli: Runner, world: Path, tmp_path: Path
) -> None:
    outcome = cli("evaluate", world / "model", world / "data", "--html", tmp_path / "r.html", "--json")
    assert outcome.json["report"] == str(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Evaluation of model" in page
    assert "class0/" in page
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    refused = cli("evaluate", world / "model", world / "data", "--html", tmp_path / "none" / "r.html")
    assert refused.status == 2
    assert "image/s" not in refused.err
    assert "no folder" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--few-shot", "20"], "WAYSxSHOTS"), (["--few-shot", "50x1"], "50"), (["--pairs", "missing.csv"], "missing.csv")],
)
def test_bad_options_are_one_line(cli: Runner, world: Path, options: list[str], message: str) -> None:
    outcome = cli("evaluate", world / "model", world / "data", *options)
    assert (outcome.status, outcome.out) == (2, "")
    [line] = [line for line in outcome.err.splitlines() if line.startswith("vitembed: error: ")]
    assert message in line


def test_a_gallery_that_holds_the_queries_or_forgeries_is_refused(cli: Runner, world: Path, signed: Path) -> None:
    outcome = cli("evaluate", world / "model", world / "data", "--gallery", world / "data")
    assert outcome.status == 2
    assert "are in the gallery too" in outcome.err
    outcome = cli("evaluate", world / "model", world / "data", "--gallery", signed)
    assert outcome.status == 2
    assert "--gallery is for identities without forgeries" in outcome.err
