"""`calibrate` and `verify`: their options reach the verifier, and what they print can be read by a clerk."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Outcome, Runner, draw
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.verify import Logistic, Verifier
from vitembed.verify.words import HEADLINES, Terms, how_often_it_errs


@pytest.fixture(scope="module")
def verifier(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a verifier with an unsure band, made by the command."""
    from vitembed.cli.app import run

    path = tmp_path_factory.mktemp("verifier") / "v.json"
    options = ["--far", "0.05", "--frr", "0.05", "--curve", "isotonic", "--prior", "0.2"]
    assert run(["calibrate", str(world / "model"), str(world / "data"), "--out", str(path), *options]) == 0
    return path


def error(outcome: Outcome) -> str:
    assert (outcome.status, outcome.out) == (2, "")
    [line] = [line for line in outcome.err.splitlines() if "error" in line]
    return line


def moved(verifier: Path, out: Path, score: float, verdict: str) -> Path:
    """Write the verifier with threshold and band so placed that this score has this verdict."""
    loaded = Verifier.load(verifier)
    below, threshold = {
        "match": (score - 2, score - 1),
        "unsure": (score - 1, score + 1),
        "no match": (score + 1, score + 2),
    }[verdict]
    calibration = dataclasses.replace(loaded.calibration, reject_below=below, threshold=threshold)
    dataclasses.replace(loaded, calibration=calibration).save(out)
    return out


def test_the_options_reach_the_verifier(verifier: Path) -> None:
    calibration = Verifier.load(verifier).calibration
    assert (calibration.far_wanted, calibration.frr_wanted, calibration.prior) == (0.05, 0.05, 0.2)
    assert (calibration.curve.kind, calibration.against) == ("isotonic", "all")


def test_calibrate_prints_what_is_in_the_file(cli: Runner, world: Path, tmp_path: Path) -> None:
    command = ["calibrate", world / "model", world / "data", "--out", tmp_path / "v.json", "--far", 0.05]
    outcome = cli(*command, "--json")
    document = json.loads((tmp_path / "v.json").read_text())
    by_references = document["references"]
    assert outcome.json == {
        "verifier": str(tmp_path / "v.json"),
        **document["calibration"],
        "references": by_references,
    }
    assert by_references["count"] == 6
    table = cli(*command).out
    assert f"by 6 references of an identity, rule {by_references['rule']['name']}:" in table
    for word in ("threshold", "far_wanted", "frr", "against", "curve", "prior", "protocol"):
        assert any(line.startswith(word) for line in table.splitlines()), word
    assert "slope" not in table
    assert "None" not in table


def test_forgeries_are_told_apart_in_the_signature_layout(cli: Runner, world: Path, tmp_path: Path) -> None:
    for source in sorted((world / "data").glob("class*/*.png")):
        writer, kind = source.parent.name, "genuine" if int(source.stem) < 4 else "forged"
        target = tmp_path / "signatures" / writer / kind / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    out = tmp_path / "v.json"
    options = ["calibrate", world / "model", tmp_path / "signatures", "--out", out, "--far", 0.2, "--json"]
    # Forgeries here are of the writer's own class, so that they cannot be told apart: random ones can.
    outcome = cli(*options, "--against", "random")
    assert outcome.status == 0, outcome.err
    assert outcome.json["skilled"] == 8 * 4 * 4
    assert outcome.json["far"] == outcome.json["far_random"] <= 0.2
    assert outcome.json["far_skilled"] > 0.2
    image = tmp_path / "signatures" / "class0" / "genuine" / "0.png"
    said = cli("verify", image, image, "--verifier", out).out
    assert re.search(r"Of 1,000 skilled forgeries about \d+ \(.*\) would be accepted", said)


@pytest.mark.parametrize(("verdict", "status"), [("match", 0), ("no match", 1), ("unsure", 3)])
def test_each_verdict_has_its_exit_status_and_its_sentences(
    cli: Runner, world: Path, verifier: Path, tmp_path: Path, verdict: str, status: int
) -> None:
    a, b = world / "data" / "class0" / "0.png", world / "data" / "class3" / "1.png"
    score = cli("verify", a, b, "--verifier", verifier, "--json").json["score"]
    path = moved(verifier, tmp_path / "v.json", score, verdict)
    outcome = cli("verify", a, b, "--verifier", path, "--json")
    assert (outcome.status, outcome.json["verdict"], outcome.json["match"]) == (status, verdict, verdict == "match")
    assert all("The ink is only 12 pixels high" in note for note in outcome.json["notes"])
    said = cli("verify", a, b, "--verifier", path)
    assert said.status == status
    first, *others = said.out.splitlines()
    assert first.startswith(f"{verdict}: score {score:.4f}, threshold ")
    assert any(
        line.startswith("If 20 of 100 that are asked about match, the probability of a match is") for line in others
    )
    loaded = Verifier.load(path)
    told = how_often_it_errs(loaded.calibration, Terms.of_pairs("identities"), loaded.created)
    assert others[-len(told) :] == told
    assert ("a person should compare the images" in said.out) == (verdict == "unsure")


def test_the_same_image_twice_is_told(cli: Runner, world: Path, verifier: Path, tmp_path: Path) -> None:
    image = world / "data" / "class0" / "0.png"
    (tmp_path / "copy.png").write_bytes(image.read_bytes())
    for other in (image, tmp_path / "copy.png"):
        command = ["verify", image, other, "--verifier", verifier]
        assert "warning: both images are the same file, or copies of it" in cli(*command).err
        assert cli(*command, "--json").json["notes"][0] == "both images are the same file, or copies of it"
    assert "same" not in cli("verify", image, image.with_name("1.png"), "--verifier", verifier).err


def test_a_page_of_the_decision_is_written(cli: Runner, world: Path, verifier: Path, tmp_path: Path) -> None:
    a, b = world / "data" / "class0" / "0.png", world / "data" / "class3" / "1.png"
    outcome = cli("verify", a, b, "--verifier", verifier, "--html", tmp_path / "page.html", "--json")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HEADLINES[outcome.json["verdict"]] in page
    assert "Where the score comes from" in page
    assert page.count("<img") + page.count("<image") >= 2
    line = error(cli("verify", a, b, "--verifier", verifier, "--html", tmp_path / "none" / "page.html"))
    assert "none" in line


def test_mistakes_are_one_line(cli: Runner, world: Path, verifier: Path, tmp_path: Path) -> None:
    image = world / "data" / "class0" / "0.png"
    assert "expected 2 images; got 1" in error(cli("verify", image, "--verifier", verifier))
    assert "expected 2 images; got 3" in error(cli("verify", image, image, image, "--verifier", verifier))
    line = error(cli("verify", image, image, "--identity", "alice", "--verifier", verifier))
    assert "expected 1 image beside --identity alice; got 2" in line
    line = error(cli("verify", image, image, "--references", tmp_path, "--verifier", verifier))
    assert "--references goes with --identity" in line
    command = ["calibrate", world / "model", world / "data", "--out", tmp_path / "v.json", "--far", 0.05]
    assert "did you mean 'isotonic'" in error(cli(*command, "--curve", "isotone"))
    assert "did you mean 'random'" in error(cli(*command, "--against", "randm"))
    assert "false-reject rate" in error(cli(*command, "--frr", 1.5))
    assert "prior" in error(cli(*command, "--prior", 0))
    assert "expected skilled non-matching pairs" in error(cli(*command, "--against", "skilled"))
    assert not (tmp_path / "v.json").exists()


def test_a_nearly_certain_answer_is_not_said_to_be_certain(
    cli: Runner, world: Path, verifier: Path, tmp_path: Path
) -> None:
    image, other = (world / "data" / name / "0.png" for name in ("class0", "class3"))
    loaded = Verifier.load(verifier)
    score = cli("verify", image, other, "--verifier", verifier, "--json").json["score"]
    for offset, words in ((50.0, "more than 99.9 %"), (-50.0, "less than 0.1 %")):
        sure = dataclasses.replace(loaded.calibration, curve=Logistic(1.0, offset - score))
        dataclasses.replace(loaded, calibration=sure).save(tmp_path / "v.json")
        said = cli("verify", image, other, "--verifier", tmp_path / "v.json").out
        assert f"equally likely beforehand, the probability of a match is {words}" in said


def test_a_table_that_pairs_a_file_with_itself_is_warned_of(cli: Runner, world: Path, tmp_path: Path) -> None:
    rows = ["left,right,match"]
    for label in range(8):
        for number in range(1, 8):
            rows.append(f"{world}/data/class{label}/0.png,{world}/data/class{label}/{number}.png,1")
            rows.append(f"{world}/data/class{label}/0.png,{world}/data/class{(label + 1) % 8}/{number}.png,0")
    rows.append(f"{world}/data/class0/0.png,{world}/data/class0/0.png,1")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    warned = "1 of 113 pairs are of one file with itself"
    command = ["calibrate", world / "model", tmp_path / "pairs.csv", "--out", tmp_path / "v", "--far", 0.1]
    assert warned in cli(*command).err
    assert warned in cli("evaluate", world / "model", tmp_path / "pairs.csv").err


def test_a_blank_page_is_refused_by_a_model_of_ink(cli: Runner, tmp_path: Path) -> None:
    model = Embedder.create("N/8", preprocess=Preprocess.grey((32, 32), scan=True), stem="conv", device="cpu")
    model.save_pretrained(tmp_path / "model")
    pages = [tmp_path / "blank.png", tmp_path / "other.png"]
    for page in pages:
        Image.new("L", (64, 64), 255).save(page)
    scores, flags = np.r_[np.linspace(0.5, 1, 50), np.linspace(-1, 0.4, 50)], np.arange(100) < 50
    made = Verifier.calibrate(scores, flags, 0.1, fingerprint=model.fingerprint, location=str(tmp_path / "model"))
    made.save(tmp_path / "v")
    for extra in ([], ["--json"]):
        line = error(cli("verify", *pages, "--verifier", tmp_path / "v", *extra))
        assert "blank.png: is blank: no ink can be told from its ground" in line


def test_intervals_are_for_as_many_identities_as_are_asked_for(cli: Runner, tmp_path: Path, world: Path) -> None:
    data = draw(tmp_path / "ten", classes=10, per_class=4)
    command = ["calibrate", world / "model", data, "--out", tmp_path / "v.json", "--far", 0.1, "--enrolled", 0]
    assert cli(*command, "--json").json["interval_identities"] == 10
    assert cli(*command, "--test-identities", 5, "--json").json["interval_identities"] == 5
    assert "--test-identities" in error(cli(*command, "--test-identities", 0))
