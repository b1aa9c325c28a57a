"""`enroll`, `identify` and `verify --identity`: references that are kept, and decisions with their exit statuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import Outcome, Runner
from vitembed.cli.enrolling import references_folder
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError
from vitembed.preprocess import Preprocess
from vitembed.verify import Verifier, fit_references
from vitembed.verify.words import Terms, how_often_it_errs


def scribble(path: Path, person: int, number: int) -> Path:
    """Draw a line of ink through points of a person's own, each time a little elsewhere."""
    own = np.random.default_rng(person).uniform(10, 54, (7, 2))
    points = own + np.random.default_rng((person, number)).normal(0, 2.0, own.shape)
    page = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(page).line([tuple(point) for point in points], fill=0, width=2, joint="curve")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, drawings of people, and a verifier with a calibration of references."""
    folder = tmp_path_factory.mktemp("office")
    model = Embedder.create("N/8", preprocess=Preprocess.grey((32, 32)), stem="conv", pooling="mean", device="cpu")
    model.save_pretrained(folder / "model")
    images = [scribble(folder / f"people/p{who:02d}/{n}.png", who, n) for who in range(14) for n in range(7)]
    labels = np.repeat(np.arange(14), 7)
    vectors = model.encode(images)
    left, right = np.triu_indices(len(vectors), 1)
    scores = np.einsum("nd,nd->n", vectors[left], vectors[right])
    verifier = Verifier.calibrate(
        scores, labels[left] == labels[right], 0.05, fingerprint=model.fingerprint, location=str(folder / "model")
    )
    verifier.with_references(fit_references(vectors, labels, count=3, far=0.05)).save(folder / "v.verifier")
    return folder


@pytest.fixture
def desk(office: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the verifier."""
    shutil.copy(office / "v.verifier", tmp_path / "v.verifier")
    return tmp_path


def people(office: Path, who: int, count: int = 3) -> list[Path]:
    return [office / f"people/p{who:02d}/{n}.png" for n in range(count)]


def line(outcome: Outcome) -> str:
    assert (outcome.status, outcome.out) == (2, "")
    [only] = [text for text in outcome.err.splitlines() if text]
    return only


@pytest.fixture
def enrolled(cli: Runner, desk: Path, office: Path) -> Path:
    for who, name in enumerate(("alice", "bob", "carol")):
        assert cli("enroll", name, *people(office, who), "--verifier", desk / "v.verifier").status == 0
    return desk / "v.verifier"


def test_references_are_kept_beside_the_verifier(cli: Runner, desk: Path, office: Path) -> None:
    verifier = desk / "v.verifier"
    first = cli("enroll", "zoë", *people(office, 0), "--verifier", verifier, "--json")
    assert (first.status, first.json["identity"], first.json["references"]) == (0, "zoë", 3)
    assert first.json["added"] == [str(path) for path in people(office, 0)]
    assert (desk / "v.references").is_dir()
    again = cli("enroll", "zoë", office / "people/p00", "--verifier", verifier)
    assert again.status == 0
    assert [text.split() for text in again.out.splitlines()][1:4] == [
        ["added", "4"],
        ["known", "already", "3"],
        ["references", "7"],
    ]
    assert cli("enroll", "--list", "--verifier", verifier, "--json").json == {"zoë": 7}
    assert cli("enroll", "--list", "--verifier", verifier).out.split() == ["zoë", "7"]


def test_references_can_lie_elsewhere(cli: Runner, desk: Path, office: Path) -> None:
    place = ["--verifier", desk / "v.verifier", "--references", desk / "other"]
    assert cli("enroll", "alice", *people(office, 0), *place).status == 0
    assert cli("verify", "--identity", "alice", office / "people/p00/5.png", *place).status in (0, 1)
    assert not (desk / "v.references").exists()
    assert cli("enroll", "--list", "--verifier", desk / "v.verifier").out == "nobody is enrolled\n"
    with pytest.raises(ConfigError, match="cannot be both"):
        references_folder(Path("x.references"), None)


def test_the_exit_status_is_the_verdict(cli: Runner, enrolled: Path, office: Path) -> None:
    own = cli("verify", "--identity", "alice", office / "people/p00/1.png", "--verifier", enrolled, "--json")
    other = cli("verify", "--identity", "alice", office / "people/p09/1.png", "--verifier", enrolled, "--json")
    assert (own.status, own.json["verdict"], own.json["match"]) == (0, "match", True)
    assert (other.status, other.json["verdict"], other.json["match"]) == (1, "no match", False)
    assert "is itself a reference" in own.json["notes"][0]
    assert len(other.json["cosines"]) == 3


def test_an_unsure_verdict_is_exit_status_3(cli: Runner, enrolled: Path, office: Path) -> None:
    verifier = Verifier.load(enrolled)
    references = verifier.references
    assert references is not None
    unsure = dataclasses.replace(references.calibration, threshold=1e6, reject_below=-1e6, frr_wanted=0.1)
    verifier.with_references(dataclasses.replace(references, calibration=unsure)).save(enrolled)
    outcome = cli("verify", "--identity", "alice", office / "people/p00/4.png", "--verifier", enrolled)
    assert (outcome.status, outcome.out.splitlines()[0]) == (3, "unsure: alice, by 3 references, rule centre")
    assert "a person should compare the images" in outcome.out
    found = cli("identify", office / "people/p00/4.png", "--verifier", enrolled)
    assert found.status == 3
    assert found.out.startswith("unsure: perhaps ")


def test_a_decision_is_said_in_words_with_its_error_rates(cli: Runner, enrolled: Path, office: Path) -> None:
    outcome = cli("verify", "--identity", "alice", office / "people/p00/1.png", "--verifier", enrolled)
    first, *lines = outcome.out.splitlines()
    assert first == "match: alice, by 3 references, rule centre"
    assert "warning: The questioned image is itself a reference" in outcome.err
    references = Verifier.load(enrolled).references
    assert references is not None
    verifier = Verifier.load(enrolled)
    told = how_often_it_errs(references.calibration, Terms.of_references("identities"), verifier.created)
    assert lines[-len(told) :] == told


def test_a_page_shows_the_references(cli: Runner, enrolled: Path, office: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    image = office / "people/p00/4.png"
    assert cli("verify", "--identity", "alice", image, "--verifier", enrolled, "--html", page).status in (0, 1)
    text = page.read_text(encoding="utf-8")
    assert "References of alice" in text
    assert "Where the score comes from" in text


def test_identify_names_somebody_or_nobody(cli: Runner, enrolled: Path, office: Path) -> None:
    found = cli("identify", office / "people/p01/0.png", "--verifier", enrolled, "-k", 2, "--json")
    assert (found.status, found.json["best"], found.json["compared"]) == (0, "bob", 3)
    assert found.json["candidates"][0]["identity"] == "bob"
    assert len(found.json["candidates"]) == 2
    words = cli("identify", office / "people/p01/0.png", "--verifier", enrolled)
    assert words.out.startswith("match: bob, of 3 enrolled")
    assert "of strangers, at most" in words.out
    nobody = cli("identify", office / "people/p12/0.png", "--verifier", enrolled)
    assert nobody.status in (0, 1)
    assert nobody.out.startswith("no match") == (nobody.status == 1)


def test_an_identity_is_removed(cli: Runner, enrolled: Path, office: Path) -> None:
    assert cli("enroll", "bob", "--remove", "--verifier", enrolled, "--json").json == {"identity": "bob", "removed": 3}
    assert cli("enroll", "--list", "--verifier", enrolled, "--json").json == {"alice": 3, "carol": 3}
    assert "'bob' is not enrolled" in line(cli("enroll", "bob", "--remove", "--verifier", enrolled))


def test_what_cannot_be_done_is_one_line_and_changes_nothing(cli: Runner, enrolled: Path, office: Path) -> None:
    verifier = ["--verifier", enrolled]
    blank, copy = enrolled.with_name("blank.png"), office / "people/p00/4.png"
    Image.new("L", (64, 64), 255).save(blank)
    wrong = {
        "did you mean 'alice'?": ["verify", "--identity", "alicia", copy],
        "name an identity": ["enroll"],
        "needs at least one image": ["enroll", "alice"],
        "leave the identity": ["enroll", "alice", "--list"],
        "leave the images": ["enroll", "alice", copy, "--remove"],
        "does not exist": ["enroll", "alice", copy, "missing.png"],
        "is blank": ["enroll", "alice", copy, blank],
        "blank.png: is blank": ["verify", "--identity", "alice", blank],
        "control characters": ["enroll", "al\tice", copy],
    }
    for named, arguments in wrong.items():
        assert named in line(cli(*arguments, *verifier))
    assert cli("enroll", "--list", *verifier, "--json").json == {"alice": 3, "bob": 3, "carol": 3}
    assert "there is no verifier" in line(cli("identify", copy, "--verifier", "none.verifier"))
    assert "nobody is enrolled" in line(cli("identify", copy, *verifier, "--references", enrolled.with_name("empty")))


def test_another_model_is_refused(cli: Runner, enrolled: Path, office: Path, tmp_path: Path) -> None:
    other = Embedder.create("N/8", preprocess=Preprocess.grey((32, 32)), seed=1, device="cpu")
    other.save_pretrained(tmp_path / "other")
    arguments = ["verify", "--identity", "alice", office / "people/p00/4.png", "--model", tmp_path / "other"]
    assert "belongs to the model" in line(cli(*arguments, "--verifier", enrolled))
    document = json.loads(enrolled.read_text()) | {"fingerprint": "sha256:other"}
    enrolled.write_text(json.dumps(document))
    assert "holds embeddings of the model" in line(cli("enroll", "--list", "--verifier", enrolled))


def test_a_forgotten_name_is_told(cli: Runner, desk: Path, office: Path) -> None:
    outcome = cli("enroll", *people(office, 0), "--verifier", desk / "v.verifier")
    assert outcome.status == 2
    assert "is an image; name the identity first" in outcome.err


def test_rates_of_pairs_are_not_said_of_references(cli: Runner, desk: Path, office: Path) -> None:
    verifier = desk / "v.verifier"
    Verifier.load(verifier).with_references(None).save(verifier)
    assert cli("enroll", "alice", *people(office, 0), "--verifier", verifier).status == 0
    image = office / "people/p00/4.png"
    said = cli("verify", "--identity", "alice", image, "--verifier", verifier, "--html", desk / "page.html")
    assert "how often such a decision errs is not known" in said.out
    assert "of 1,000" not in said.out
    page = (desk / "page.html").read_text(encoding="utf-8")
    assert "How often such a decision errs is not known" in page
    assert "of 1,000" not in page
    assert "of strangers" not in cli("identify", image, "--verifier", verifier).out
