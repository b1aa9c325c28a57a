"""The demo does the whole job, on the digits it says, and raw pixels have the figures they are known to have."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Runner
from vitembed.demo import CHOOSING, QUERIES, TRAINED, Digits
from vitembed.embedder import Embedder
from vitembed.index import Index


def test_the_digits_are_scikit_learns_and_the_split_shares_no_image() -> None:
    digits = Digits.load()
    assert digits.images.shape == (1797, 8, 8)
    assert digits.images.max() == 255
    known = {image.tobytes() for image in digits[:TRAINED].images}
    assert all(image.tobytes() not in known for image in digits[TRAINED:].images)
    assert len(np.unique(digits[TRAINED - CHOOSING : TRAINED].labels)) == 10


def test_the_command_makes_model_index_verifier_and_report_and_replaces_an_earlier_demo(
    cli: Runner, tmp_path: Path
) -> None:
    outcome = cli("demo", "--out", tmp_path / "demo", "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("equal error rate") >= 3
    assert outcome.out.count("recall@1") == 3
    assert len(re.findall(r"^    vitembed ", outcome.out, flags=re.MULTILINE)) == 3
    as_json = cli("demo", "--out", tmp_path / "demo", "--epochs", 2, "--json")
    figures = json.loads((tmp_path / "demo" / "figures.json").read_text())
    assert figures["eer"] == as_json.json["eer"]
    # Known figures of raw pixels: an oracle for the protocol that does not depend on the network.
    assert figures["raw pixels"]["eer"] == pytest.approx(0.213, abs=0.002)
    assert figures["raw pixels"]["recall@1"] == pytest.approx(0.990, abs=0.002)
    assert figures["raw pixels"]["queries"] == 597
    assert figures["eer"] < figures["untrained"]["eer"]

    model = Embedder.from_pretrained(tmp_path / "demo" / "model")
    with Index.open(tmp_path / "demo" / "digits.index") as index:
        assert len(index) == 597 - QUERIES
        index.require_model(model.fingerprint)
    page = (tmp_path / "demo" / "report.html").read_text()
    for words in ("raw pixels", "untrained", "trained", "query ", "Attention rollout", "vitembed train PHOTOS"):
        assert words in page
    assert len(re.findall(r"<img ", page)) > 60


def test_a_demo_that_cannot_write_is_one_clear_error(cli: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = cli("demo", "--out", tmp_path / "file" / "demo", "--epochs", 1)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("vitembed: error: ")
