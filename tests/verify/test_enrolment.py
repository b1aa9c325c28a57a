import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitembed.errors import (
    ConfigError,
    DataError,
    ImageError,
    ModelMismatchError,
    SearchIndexError,
    VerifierError,
)
from vitembed.images import load_image
from vitembed.index import Index
from vitembed.verify import Enrolment, Verifier, fit_references, quality
from vitembed.verify.quality import reads_ink
from vitembed.verify.reference_store import content_hash

DIM = 16
PEOPLE = ("alice", "bob", "carol", "dave")


class PixelModel:
    """Gives every picture the row of a table that its grey level numbers."""

    def __init__(self, table, fingerprint="sha256:" + "a" * 64, preprocess=None):
        self.table, self.fingerprint, self.preprocess, self.encoded = table, fingerprint, preprocess, 0

    def encode(self, images, *, batch_size=64, progress=False):
        self.encoded += len(images)
        return self.table[[int(np.asarray(load_image(image))[0, 0]) for image in images]]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def hands(people, each, seed):
    """Embeddings (people * each, DIM), those of one person together."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(people, DIM)))
    return unit(np.repeat(centres, each, axis=0) + 0.12 * rng.normal(size=(people * each, DIM)))


# Twelve images of each person of the tests, by grey level: alice 0-11, bob 12-23, ...
TABLE = hands(10, 12, seed=1)
# Other people, to calibrate with.
LEARNT = hands(30, 12, seed=2), np.repeat(np.arange(30), 12)


@pytest.fixture(scope="module")
def plain():
    rows, labels = LEARNT
    left, right = np.triu_indices(len(rows), 1)
    scores = np.einsum("nd,nd->n", rows[left], rows[right])
    return Verifier.calibrate(scores, labels[left] == labels[right], 0.01, fingerprint="sha256:" + "a" * 64)


@pytest.fixture(scope="module")
def fitted(plain):
    return plain.with_references(fit_references(*LEARNT, count=4, far=0.01))


@pytest.fixture
def verifier(fitted):
    return dataclasses.replace(fitted, model=PixelModel(TABLE))


@pytest.fixture
def pictures(tmp_path):
    """Paths of all pictures, by grey level."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for level in range(120):
        Image.new("L", (4, 4), level).save(folder / f"{level}.png")
    return [folder / f"{level}.png" for level in range(120)]


@pytest.fixture
def enrolled(tmp_path, verifier, pictures):
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        for number, name in enumerate(PEOPLE):
            enrolment.enroll(name, pictures[12 * number : 12 * number + 4])
        yield enrolment


def test_what_is_enrolled_is_there_after_reopening(tmp_path, verifier, pictures):
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        assert enrolment.identities() == {}
        report = enrolment.enroll("zoë", [str(path) for path in pictures[:3]])
    assert report.added == tuple(map(str, pictures[:3]))
    assert (report.identity, report.known, report.problems, report.references) == ("zoë", (), {}, 3)
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        assert enrolment.identities() == {"zoë": 3}
        assert enrolment.references("zoë") == tuple(pictures[:3])
    with Index.open(tmp_path / "people") as index:
        assert (index.fingerprint, index.dim) == (verifier.fingerprint, DIM)
        for path, (name, entry) in zip(pictures, index.entries().items(), strict=False):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert name == f"zoë/{digest[:16]}"
            assert (entry["identity"], entry["path"], entry["sha256"]) == ("zoë", str(path), digest)
            assert entry["enrolled"].endswith("+00:00")
            np.testing.assert_array_equal(index.get(name).vector, TABLE[int(path.stem)])


def test_relative_paths_are_kept_absolute(tmp_path, verifier, pictures, monkeypatch):
    monkeypatch.chdir(pictures[0].parent)
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        enrolment.enroll("alice", ["0.png"])
        assert enrolment.references("alice") == (pictures[0],)


def test_an_image_is_a_reference_once_by_its_content(enrolled, pictures, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    report = enrolled.enroll("alice", [copy, pictures[4], pictures[4]])
    assert (report.added, report.known) == ((str(pictures[4]),), (str(copy), str(pictures[4])))
    assert (report.references, enrolled.identities()["alice"]) == (5, 5)


def test_images_in_memory_are_enrolled_by_their_pixels(enrolled, pictures):
    array = np.full((4, 4), 5, dtype=np.uint8)
    report = enrolled.enroll("alice", [array, Image.fromarray(array)])
    assert (report.added, report.known) == (("image 0",), ("image 1",))
    assert enrolled.references("alice")[4:] == (None,)
    decision = enrolled.verify("alice", array)
    assert decision.notes[0] == "The questioned image is itself a reference: an image that came from memory."
    assert decision.references == (*map(str, pictures[:4]), None)


def test_letters_that_unicode_writes_in_two_ways_are_one_name(enrolled, pictures):
    enrolled.enroll("Jose\u0301", pictures[50:52])
    assert enrolled.enroll("Jos\u00e9", pictures[52:53]).references == 3
    assert len(enrolled.references("Jose\u0301")) == 3


def test_an_image_that_is_a_reference_of_somebody_else_is_told(enrolled, pictures):
    report = enrolled.enroll("bob", [pictures[0], pictures[16]])
    assert report.problems == {str(pictures[0]): ("The same image is a reference of 'alice'.",)}
    assert len(report.added) == 2


@pytest.mark.parametrize("bad", ["missing", "damaged"])
def test_an_image_that_cannot_be_read_leaves_everything_as_it_was(enrolled, pictures, tmp_path, bad):
    path = tmp_path / "bad.png"
    if bad == "damaged":
        path.write_bytes(pictures[0].read_bytes()[:40])
    with pytest.raises(ImageError, match=r"bad\.png"):
        enrolled.enroll("erin", [pictures[50], path])
    assert list(enrolled.identities()) == list(PEOPLE)


def test_a_first_enrolment_that_fails_makes_no_index(tmp_path, verifier):
    with Enrolment.open(tmp_path / "people", verifier) as enrolment, pytest.raises(ImageError):
        enrolment.enroll("alice", [tmp_path / "missing.png"])
    assert not (tmp_path / "people").exists()


def test_a_change_that_is_interrupted_is_undone(enrolled, pictures, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        enrolled.enroll("alice", pictures[4:8])
    monkeypatch.undo()
    assert enrolled.identities()["alice"] == 4


def test_removing_an_identity_removes_all_of_it_and_nothing_else(enrolled):
    assert enrolled.remove("bob") == 4
    assert list(enrolled.identities()) == ["alice", "carol", "dave"]
    with pytest.raises(DataError, match="'bob' is not enrolled"):
        enrolled.verify("bob", np.zeros((4, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("", "is empty"),
        (" alice", "spaces at its ends"),
        ("al\nice", "control characters"),
        ("x" * 1_001, "longer than 1,000 bytes"),
        ("\udcff", "not valid Unicode"),
        (7, "must be a string"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_everywhere(enrolled, pictures, name, named):
    calls = (
        lambda: enrolled.enroll(name, pictures[:1]),
        lambda: enrolled.verify(name, pictures[0]),
        lambda: enrolled.remove(name),
        lambda: enrolled.references(name),
    )
    for call in calls:
        with pytest.raises(DataError, match=named):
            call()


@pytest.mark.parametrize("images", [[], "a.png", Path("a.png"), np.zeros((4, 4), dtype=np.uint8)])
def test_an_identity_without_a_list_of_images_is_one_clear_error(enrolled, images):
    with pytest.raises(DataError, match="enrolling 'alice' needs"):
        enrolled.enroll("alice", images)


def test_an_unknown_identity_is_told_with_the_nearest_name(enrolled, pictures):
    with pytest.raises(DataError, match=r"'alicia' is not enrolled; did you mean 'alice'\? 4 identities are in"):
        enrolled.verify("alicia", pictures[0])
    with pytest.raises(DataError, match=r"'xyz' is not enrolled\. 4 identities"):
        enrolled.remove("xyz")


def test_with_nobody_enrolled_every_question_is_one_clear_error(tmp_path, verifier, pictures):
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        for call in (lambda: enrolment.identify(pictures[0]), lambda: enrolment.remove("alice")):
            with pytest.raises(DataError, match="nobody is"):
                call()
        with pytest.raises(DataError, match="nobody is"):
            enrolment.verify("alice", pictures[0])
    assert not (tmp_path / "people").exists()


# Decisions ------------------------------------------------------------------------------------------------


def test_a_decision_is_that_of_the_calibrated_rule(enrolled, fitted, pictures):
    for level in (5, 15, 30):
        decision = enrolled.verify("alice", pictures[level])
        score = float(fitted.references.scores(TABLE[[level]], TABLE[:4])[0])
        assert decision.score == pytest.approx(score)
        assert decision.match == (score >= fitted.references.calibration.threshold) == (level == 5)
        assert decision.verdict == ("match" if level == 5 else "no match")
        assert decision.probability == pytest.approx(float(fitted.references.calibration.curve(score)))
        assert decision.threshold == fitted.references.calibration.threshold
        np.testing.assert_allclose(decision.cosines, TABLE[:4] @ TABLE[level], atol=1e-6)
        assert (decision.identity, decision.rule, decision.notes) == ("alice", fitted.references.rule.name, ())
        assert decision.references == tuple(map(str, pictures[:4]))
        json.dumps(dataclasses.asdict(decision))


def test_one_encoding_is_all_that_a_decision_takes(enrolled, verifier, pictures):
    before = verifier.model.encoded
    enrolled.verify("alice", pictures[5])
    enrolled.identify(pictures[5])
    assert verifier.model.encoded == before + 2


def test_a_reference_as_the_questioned_image_is_told(enrolled, pictures, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[2].read_bytes())
    assert enrolled.verify("alice", copy).notes == (f"The questioned image is itself a reference: {pictures[2]}.",)
    Image.new("L", (5, 5), 2).save(copy)  # other bytes, the same to the model
    [note] = enrolled.verify("alice", copy).notes
    assert note == f"To the model it is the same picture as the reference {pictures[2]}: is it a copy?"
    assert enrolled.verify("bob", copy).notes == ()


def test_another_number_of_references_than_was_calibrated_with_is_told(enrolled, pictures):
    enrolled.enroll("erin", pictures[50:51])
    enrolled.enroll("alice", pictures[4:6])
    [few] = enrolled.verify("erin", pictures[52]).notes
    [many] = enrolled.verify("alice", pictures[7]).notes
    assert few == "There is 1 reference, fewer than the 4 that the error rates were measured with."
    assert many == "There are 6 references, more than the 4 that the error rates were measured with."


def test_without_a_calibration_of_references_the_one_of_pairs_is_used_and_told(tmp_path, plain, pictures):
    verifier = dataclasses.replace(plain, model=PixelModel(TABLE))
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        enrolment.enroll("alice", pictures[:3])
        enrolment.enroll("bob", pictures[12:15])
        decision = enrolment.verify("alice", pictures[5])
        found = enrolment.identify(pictures[5])
    assert decision.score == pytest.approx(float(np.mean(TABLE[:3] @ TABLE[5])))
    assert (decision.rule, decision.threshold) == ("mean", plain.threshold)
    assert "calibrated on pairs, not on references" in decision.notes[0]
    assert found.false_positive_rate == pytest.approx(1 - 0.99**2)
    assert "no false-accept rate below 0.01" in found.notes[0]


def test_an_unsure_band_is_kept(tmp_path, plain, pictures):
    fitted = plain.with_references(fit_references(*LEARNT, count=4, far=0.01, rule="mean"))
    score = float(np.mean(TABLE[:4] @ TABLE[5]))
    calibration = dataclasses.replace(
        fitted.references.calibration, threshold=score + 0.01, reject_below=score - 0.01, frr_wanted=0.1
    )
    references = dataclasses.replace(fitted.references, calibration=calibration)
    verifier = dataclasses.replace(fitted, references=references, model=PixelModel(TABLE))
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        enrolment.enroll("alice", pictures[:4])
        assert (enrolment.verify("alice", pictures[5]).verdict, enrolment.verify("alice", pictures[5]).match) == (
            "unsure",
            False,
        )
        found = enrolment.identify(pictures[5])
        assert (found.verdict, found.best) == ("unsure", None)


def test_identify_finds_the_person_and_rejects_strangers(enrolled, fitted, pictures):
    for level in (5, 16, 28, 40):
        found = enrolled.identify(pictures[level], k=2)
        assert found.best == found.candidates[0].identity == PEOPLE[level // 12]
        assert (found.verdict, found.compared, len(found.candidates)) == ("match", 4, 2)
    strangers = [enrolled.identify(picture).best for picture in pictures[48:]]
    assert strangers.count(None) >= len(strangers) - 2


def test_candidates_are_all_identities_by_their_scores(enrolled, fitted, pictures):
    found = enrolled.identify(pictures[5], k=10)
    expected = {
        name: float(fitted.references.scores(TABLE[[5]], TABLE[12 * n : 12 * n + 4])[0])
        for n, name in enumerate(PEOPLE)
    }
    assert [candidate.identity for candidate in found.candidates] == sorted(expected, key=expected.get, reverse=True)
    for candidate in found.candidates:
        assert candidate.score == pytest.approx(expected[candidate.identity])
        assert candidate.threshold == found.threshold
        assert candidate.match == (candidate.score >= found.threshold)
    json.dumps(dataclasses.asdict(found))


def test_the_threshold_of_identify_accounts_for_the_number_of_identities(enrolled, fitted, pictures):
    found = enrolled.identify(pictures[5])
    far, threshold = fitted.references.threshold_for(0.01 / 4)
    assert far <= 0.01 / 4
    assert (found.far, found.threshold) == (far, threshold)
    assert found.threshold > fitted.references.calibration.threshold
    assert found.false_positive_rate == pytest.approx(1 - (1 - far) ** 4)
    assert found.false_positive_rate <= 0.01
    assert found.notes == ()


def test_identify_says_where_the_data_support_no_rate_so_low(enrolled, fitted, verifier, pictures):
    kept = dataclasses.replace(fitted.references, thresholds=fitted.references.thresholds[:1])
    enrolled.verifier = verifier.with_references(kept)
    found = enrolled.identify(pictures[5])
    assert found.false_positive_rate == pytest.approx(1 - 0.99**4)
    assert found.notes[0].startswith("The calibration supports no false-accept rate below 0.01 for one comparison")
    assert "3.94%" in found.notes[0]


@pytest.mark.parametrize("k", [0, -1, True, 1.5])
def test_fewer_than_one_candidate_is_refused(enrolled, pictures, k):
    with pytest.raises(ConfigError, match="k must be"):
        enrolled.identify(pictures[0], k=k)


# What goes together ---------------------------------------------------------------------------------------


def test_references_of_another_model_are_refused(enrolled, verifier):
    other = dataclasses.replace(verifier, fingerprint=None, model=PixelModel(TABLE, "sha256:" + "b" * 64))
    with pytest.raises(ModelMismatchError):
        Enrolment.open(enrolled.path, other)
    with Index.open(enrolled.path) as index, pytest.raises(ModelMismatchError):
        Enrolment(other, index)


def test_without_its_model_a_verifier_lists_and_removes_but_does_not_embed(enrolled, fitted, pictures):
    with Enrolment.open(enrolled.path, fitted) as enrolment:
        assert enrolment.remove("dave") == 4
        assert list(enrolment.identities()) == list(PEOPLE[:3])
        for call in (
            lambda: enrolment.enroll("alice", pictures[:1]),
            lambda: enrolment.verify("alice", pictures[0]),
            lambda: enrolment.identify(pictures[0]),
        ):
            with pytest.raises(VerifierError, match="needs its model"):
                call()


def test_an_index_that_was_handed_over_stays_open(enrolled, verifier):
    with Index.open(enrolled.path) as index:
        with Enrolment(verifier, index) as enrolment:
            assert len(enrolment.identities()) == 4
        assert len(index) == 16


def test_an_index_of_something_else_is_refused(tmp_path, verifier, pictures):
    with Index.create(tmp_path / "photos", DIM, verifier.fingerprint) as index:
        index.add(["a.jpg"], TABLE[:1])
    with Enrolment.open(tmp_path / "photos", verifier) as enrolment:
        enrol = lambda: enrolment.enroll("alice", pictures[:2])  # noqa: E731
        for call in (enrolment.identities, lambda: enrolment.identify(pictures[0]), enrol):
            with pytest.raises(SearchIndexError, match=r"no references, like 'a\.jpg'"):
                call()
    with Index.open(tmp_path / "photos") as index:
        assert index.ids() == ["a.jpg"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(SearchIndexError):
        Enrolment.open(tmp_path / "file", verifier)


@pytest.mark.parametrize("damage", [{"path": 5}, {"sha256": None}, {"sha256": 7}])
def test_damaged_metadata_are_one_clear_error(tmp_path, verifier, pictures, damage):
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        enrolment.enroll("alice", pictures[:2])
    with Index.open(tmp_path / "people") as index:
        index.annotate(index.ids()[:1], [{"identity": "alice", "sha256": "0" * 64, "path": None, **damage}])
    with Enrolment.open(tmp_path / "people", verifier) as enrolment:
        calls = [
            enrolment.identities,
            lambda: enrolment.verify("alice", pictures[5]),
            lambda: enrolment.identify(pictures[5]),
            lambda: enrolment.enroll("alice", pictures[6:7]),
        ]
        for call in calls:
            with pytest.raises(SearchIndexError, match="holds entries that are no references"):
                call()


def test_who_enrols_second_joins_who_was_first(tmp_path, verifier, pictures):
    with (
        Enrolment.open(tmp_path / "people", verifier) as first,
        Enrolment.open(tmp_path / "people", verifier) as second,
    ):
        first.enroll("alice", pictures[:2])
        second.enroll("bob", pictures[12:14])
        assert first.identities() == second.identities() == {"alice": 2, "bob": 2}
    with Enrolment.open(tmp_path / "others", verifier) as first:
        stranger = dataclasses.replace(verifier, fingerprint="sha256:" + "b" * 64, model=None)
        with Enrolment.open(tmp_path / "others", stranger) as second:
            first.enroll("alice", pictures[:2])
            with pytest.raises(ModelMismatchError):
                second._store.add("bob", ["x"], ["0" * 64], TABLE[:1])


# The quality gate -----------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """A gate that calls level 0 blank and the level of a reference a copy; returns what it was asked."""
    asked = []

    def judge(image, references=()):
        asked.append((image, list(references)))
        level = int(np.asarray(load_image(image))[0, 0])
        if level == 0:
            problems = [("blank", "It is blank.", None)]
        else:
            copied = [n for n, path in enumerate(references) if int(Path(path).stem) == level + 60]
            problems = [("near copy", f"It is a copy of reference {n + 1}.", n) for n in copied]
        found = [SimpleNamespace(kind=kind, text=text, reference=n) for kind, text, n in problems]
        return SimpleNamespace(problems=tuple(found))

    monkeypatch.setattr(quality, "judge_quality", judge)
    return asked


INK = SimpleNamespace(mode="L", invert=True, scan=False)


@pytest.fixture
def inked(tmp_path, fitted, gate):
    model = PixelModel(TABLE, preprocess=INK)
    with Enrolment.open(tmp_path / "ink", dataclasses.replace(fitted, model=model)) as enrolment:
        yield enrolment


def test_a_blank_page_is_no_reference_and_no_question(inked, pictures):
    inked.enroll("bob", pictures[61:64])
    for call in (
        lambda: inked.enroll("alice", [pictures[1], pictures[0]]),
        lambda: inked.verify("bob", pictures[0]),
        lambda: inked.identify(pictures[0]),
    ):
        with pytest.raises(ImageError, match=r"0\.png: is blank: no ink can be told"):
            call()
    assert inked.identities() == {"bob": 3}


def test_a_near_copy_of_a_reference_is_suspicious_and_told(inked, pictures):
    assert inked.enroll("bob", pictures[61:64]).problems == {}
    [note, _] = inked.verify("bob", pictures[2]).notes
    assert note == f"It is a copy of reference 2. ({pictures[62]})"
    assert inked.identify(pictures[2]).candidates[0].notes[0] == note
    report = inked.enroll("bob", [pictures[3], pictures[4]])
    assert report.problems == {str(pictures[3]): (f"It is a copy of reference 3. ({pictures[63]})",)}
    assert report.references == 5


def test_references_of_one_call_are_compared_with_each_other(inked, pictures):
    problems = inked.enroll("bob", [pictures[70], pictures[10]]).problems
    assert problems == {str(pictures[10]): (f"It is a copy of reference 1. ({pictures[70]})",)}


def test_a_reference_whose_file_has_gone_still_decides(inked, pictures, gate):
    inked.enroll("bob", pictures[61:65])
    pictures[61].unlink()
    decision = inked.verify("bob", pictures[66])
    assert len(decision.cosines) == 4
    assert gate[-1][1] == [str(path) for path in pictures[62:65]]


def test_a_reference_whose_file_now_holds_something_else_still_decides(inked, pictures, gate):
    inked.enroll("bob", pictures[61:65])
    pictures[61].write_text("no image any more")
    pictures[62].write_bytes(pictures[2].read_bytes())
    decision = inked.verify("bob", pictures[66])
    assert len(decision.cosines) == 4
    assert gate[-1][1] == [str(path) for path in pictures[63:65]]


def test_photographs_are_not_judged_as_ink(enrolled, gate, pictures):
    enrolled.enroll("alice", [pictures[0], pictures[5]])
    enrolled.verify("alice", pictures[0])
    assert gate == []


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        (None, False),
        (SimpleNamespace(mode="RGB", invert=False, scan=False), False),
        (SimpleNamespace(mode="L", invert=False, scan=False), False),
        (SimpleNamespace(mode="L", invert=True, scan=False), True),
        (SimpleNamespace(mode="RGB", invert=False, scan=True), True),
    ],
)
def test_ink_is_what_the_preprocessing_says(preprocess, expected):
    assert reads_ink(preprocess) is expected


def test_the_hash_of_pixels_tells_shapes_and_kinds_apart():
    images = [
        np.zeros((2, 8), np.uint8),
        np.zeros((8, 2), np.uint8),
        np.zeros((2, 8, 3), np.uint8),
        np.ones((2, 8), np.uint8),
    ]
    assert len({content_hash(image) for image in images}) == 4
    assert content_hash(images[0]) == content_hash(Image.fromarray(images[0]))
