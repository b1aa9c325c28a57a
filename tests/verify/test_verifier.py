import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from vitembed.errors import (
    ConfigError,
    DataError,
    ImageError,
    ModelMismatchError,
    VectorError,
    VerifierError,
    VitembedError,
)
from vitembed.verify import Pairs, Verifier
from vitembed.verify import verifier as module
from vitembed.verify.calibration import calibrate
from vitembed.verify.references import fit_references


class TableModel:
    """Gives each path, or array with a number in it, its row of a table; counts what it encodes."""

    def __init__(self, table, fingerprint="sha256:" + "a" * 64):
        self.table = (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)
        self.fingerprint = fingerprint
        self.encoded = []

    def encode(self, images, *, batch_size=64, progress=False):
        self.encoded += images
        return np.stack([self.table[self.number(image)] for image in images])

    @staticmethod
    def number(image):
        if image == "broken.png":
            raise ImageError("broken.png", "is truncated")
        return int(Path(image).stem) if isinstance(image, str | Path) else int(image[0, 0])


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 16))
    return TableModel(np.repeat(centres, 6, axis=0) + 0.7 * rng.normal(size=(60, 16)))


@pytest.fixture
def pairs():
    left, right = np.triu_indices(60, 1)
    names = [f"{i}.png" for i in range(60)]
    return Pairs([names[i] for i in left], [names[j] for j in right], left // 6 == right // 6)


def test_a_fit_encodes_each_distinct_image_once(model, pairs):
    Verifier.fit(model, pairs)
    assert sorted(model.encoded) == sorted({*pairs.left, *pairs.right})


def test_images_in_memory_are_told_apart_as_objects(model):
    images = [np.full((1, 1), i) for i in range(60)]
    left, right = np.triu_indices(60, 1)
    pairs = Pairs([images[i] for i in left], [images[j] for j in right], left // 6 == right // 6)
    Verifier.fit(model, pairs)
    assert len(model.encoded) == 60


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_a_fit_is_the_calibration_of_the_cosines(model, pairs, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    verifier = Verifier.fit(model, pairs, far=0.02, location="runs/x", batch_size=8)
    z = model.table.astype(np.float64)
    expected = calibrate((z @ z.T)[np.triu_indices(60, 1)], pairs.is_match, 0.02)
    got = verifier.calibration
    for name in ("threshold", "far", "frr", "eer", "far_interval", "frr_interval"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), abs=1e-9, rel=1e-6), name
    assert got.curve.kind == expected.curve.kind
    assert got.curve([-0.5, 0, 0.5]) == pytest.approx(expected.curve([-0.5, 0, 0.5]), rel=1e-4)
    assert (got.matches, got.non_matches, got.protocol) == (expected.matches, expected.non_matches, expected.protocol)
    assert (verifier.fingerprint, verifier.location, verifier.model) == (model.fingerprint, "runs/x", model)
    age = datetime.now(UTC) - datetime.fromisoformat(verifier.created)
    assert 0 <= age.total_seconds() < 60


def test_compare_decides_every_fitted_pair_as_the_fit_counted_it(model, pairs):
    verifier = Verifier.fit(model, pairs, far=0.01)
    decisions = [verifier.compare(a, b) for a, b in zip(pairs.left, pairs.right, strict=True)]
    accepted = np.array([decision.match for decision in decisions])
    assert accepted[~pairs.is_match].mean() == verifier.calibration.far <= 0.01
    assert 1 - accepted[pairs.is_match].mean() == pytest.approx(verifier.calibration.frr)


def test_a_decision_holds_together_and_does_not_depend_on_the_order(model, pairs):
    verifier = Verifier.fit(model, pairs)
    decision = verifier.compare("3.png", np.full((1, 1), 4))
    assert decision.match == (decision.score >= decision.threshold)
    assert decision.threshold == verifier.threshold
    assert decision.probability == pytest.approx(float(verifier.probability(decision.score)))
    assert decision.score == pytest.approx(float(model.table[3] @ model.table[4]))
    assert verifier.compare("4.png", "3.png") == decision
    assert verifier.compare("3.png", "3.png").match
    assert [type(value) for value in dataclasses.astuple(decision)] == [bool, str, float, float, float, tuple]
    assert decision.verdict == ("match" if decision.match else "no match")
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.match = True


def test_scores_are_decided_at_once_in_any_shape_and_type(model, pairs):
    verifier = Verifier.fit(model, pairs)
    t = verifier.threshold
    scores = np.array([[t, np.nextafter(t, -1)], [1, -1]])
    assert verifier.decide(scores).tolist() == [[True, False], [True, False]]
    assert verifier.decide(scores.astype(np.float32)).shape == (2, 2)
    assert np.all(np.diff(verifier.probability(np.linspace(-1, 1, 50))) > 0)
    for method in (verifier.decide, verifier.probability):
        with pytest.raises(VectorError, match="finite"):
            method([0.1, np.nan])


@pytest.mark.parametrize("curve", ["auto", "isotonic", "likelihood ratio"])
def test_what_is_saved_is_what_is_loaded(model, pairs, tmp_path, curve):
    verifier = Verifier.fit(model, pairs, far=0.02, frr=0.05, prior=0.1, location="runs/ü", curve=curve)
    verifier.save(tmp_path / "v.json")
    loaded = Verifier.load(tmp_path / "v.json", model)
    assert loaded == verifier
    assert Verifier.load(tmp_path / "v.json") == dataclasses.replace(verifier, model=None)
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]


def test_a_saved_verifier_tells_a_person_all_there_is_to_know(model, pairs, tmp_path):
    Verifier.fit(model, pairs, location="runs/x").save(tmp_path / "v.json")
    document = json.loads((tmp_path / "v.json").read_text())
    keys = ["format", "version", "created", "fingerprint", "location", "calibration", "references"]
    assert list(document) == keys
    assert document["calibration"]["protocol"].startswith("threshold chosen a posteriori on these pairs")
    assert document["calibration"]["far_wanted"] == 0.01
    assert set(document["calibration"]) == {field.name for field in dataclasses.fields(calibrate(*scored()))}


def scored():
    rng = np.random.default_rng(0)
    is_match = np.arange(1000) < 400
    return rng.normal(size=1000) + 2 * is_match, is_match


def test_a_verifier_from_scores_alone_decides_on_scores_and_refuses_images(tmp_path):
    verifier = Verifier.calibrate(*scored(), far=0.05)
    assert verifier.calibration == calibrate(*scored(), 0.05)
    assert verifier.decide([-5, 5]).tolist() == [False, True]
    verifier.save(tmp_path / "v.json")
    with pytest.raises(VerifierError, match=r"needs its model: Verifier\.load\(path, model\)"):
        Verifier.load(tmp_path / "v.json").compare("0.png", "1.png")


def test_another_models_verifier_is_refused(model, tmp_path):
    verifier = Verifier.calibrate(*scored(), fingerprint=model.fingerprint, location="runs/x")
    verifier.save(tmp_path / "v.json")
    assert Verifier.load(tmp_path / "v.json", model).model is model
    other = TableModel(np.eye(3), fingerprint="sha256:" + "b" * 64)
    with pytest.raises(
        ModelMismatchError, match=r"sha256:aaaaaaaaaaaa\.\.\. \(it was at runs/x\); got the model sha256:bbbb"
    ):
        Verifier.load(tmp_path / "v.json", other)


def test_bad_pairs_are_one_clear_error(model, pairs):
    with pytest.raises(VerifierError, match="needs at least 3,000 non-matching pairs"):
        Verifier.fit(model, pairs, far=0.001)
    with pytest.raises(DataError, match="both kinds"):
        Verifier.fit(model, Pairs(["0.png"] * 2, ["1.png"] * 2, np.array([True, True])))
    assert not model.encoded  # all this is known before the work begins
    broken = Pairs([*pairs.left, "broken.png"], [*pairs.right, "1.png"], np.append(pairs.is_match, True))
    with pytest.raises(ImageError, match=r"broken\.png: is truncated"):
        Verifier.fit(model, broken)
    for settings in ({"prior": 1}, {"curve": "cubic"}, {"against": "some"}, {"frr": 2}, {"far": 0}):
        with pytest.raises(ConfigError):
            Verifier.fit(model, broken, **settings)


def damage(path, **changes):
    """Change keys of a saved verifier, "calibration__x" ones inside its calibration; None takes a key away."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        *inside, key = name.split("__")
        place = document
        for step in inside:
            place = place[step]
        if value is None:
            del place[key]
        else:
            place[key] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, 'expected "format": "vitembed-verifier"'),
        ({"version": 1}, "expected version 2; got 1"),
        ({"fingerprnt": "x"}, "unknown key 'fingerprnt', the nearest is 'fingerprint'"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"created": None}, "missing created"),
        ({"created": 5}, "created must be text"),
        ({"created": "yesterday"}, "created must be a date and time in ISO 8601; got 'yesterday'"),
        ({"references": 5}, "references"),
        ({"fingerprint": 5}, "fingerprint must be text or null; got 5"),
        ({"calibration": [1]}, "calibration must be an object with threshold"),
        ({"calibration__threshold": None}, "missing threshold"),
        ({"calibration__treshold": 1}, "unknown key 'treshold', the nearest is 'threshold'"),
        ({"calibration__threshold": "0.5"}, "threshold must be a finite number; got '0.5'"),
        ({"calibration__threshold": True}, "threshold must be a finite number"),
        ({"calibration__threshold": float("inf")}, "threshold must be a finite number"),
        ({"calibration__threshold": float("nan")}, "threshold must be a finite number"),
        ({"calibration__threshold": 10**400}, "threshold must be a finite number"),
        ({"calibration__far": 1.5}, r"far must be in \[0, 1\]; got 1.5"),
        ({"calibration__far_interval": [0.1]}, "far_interval must hold two numbers"),
        ({"calibration__matches": 0.5}, "matches must be a count of at least 1; got 0.5"),
        ({"calibration__protocol": 1}, "protocol must be text"),
        ({"calibration__curve": 1}, "curve must be an object whose kind is one of"),
        ({"calibration__curve__slope": -1}, "slope must be above 0; got -1"),
    ],
)
def test_a_changed_file_is_one_clear_error(tmp_path, changes, message):
    path = tmp_path / "v.json"
    Verifier.calibrate(*scored(), curve="logistic").save(path)
    damage(path, **changes)
    with pytest.raises(VerifierError, match=rf"v\.json is not a verifier that can be used: {message}") as caught:
        Verifier.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(VerifierError, match=r"v\.json is damaged or no verifier: expected JSON"):
        Verifier.load(tmp_path / "v.json")


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "v.json"
    Verifier.calibrate(*scored()).save(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 29):
        path.write_bytes(content[:length])
        with pytest.raises(VerifierError):
            Verifier.load(path)


def test_a_missing_file_and_a_folder_are_one_clear_error(tmp_path):
    with pytest.raises(VerifierError, match="there is no verifier at"):
        Verifier.load(tmp_path / "none.json")
    with pytest.raises(VerifierError, match=r"cannot read the verifier .*: Is a directory"):
        Verifier.load(tmp_path)
    with pytest.raises(VitembedError, match="there is no folder"):
        Verifier.calibrate(*scored()).save(tmp_path / "none" / "v.json")


def test_scores_in_the_band_are_unsure_and_no_match(model):
    verifier = Verifier.calibrate(*scored(), far=0.02, frr=0.05)
    low, high = verifier.calibration.reject_below, verifier.threshold
    decisions = [verifier.judge(score) for score in (low - 1e-9, low, (low + high) / 2, high)]
    assert [decision.verdict for decision in decisions] == ["no match", "unsure", "unsure", "match"]
    assert [decision.match for decision in decisions] == verifier.decide([d.score for d in decisions]).tolist()
    for score in (np.nan, np.inf):
        with pytest.raises(VectorError, match="finite"):
            verifier.judge(score)


def test_the_kinds_of_pairs_reach_the_calibration(model, pairs):
    left, right = np.triu_indices(60, 1)
    forged = ~pairs.is_match & (left // 6 == right // 6 - 1)
    who = np.stack([left // 6, np.where(forged, left, right) // 6], axis=1)
    known = dataclasses.replace(pairs, identities=who, skilled=forged)
    verifier = Verifier.fit(model, known, 0.05, frr=0.1, test_identities=5)
    z = model.table.astype(np.float64)
    scores = np.clip(np.einsum("nd,nd->n", z[left], z[right]), -1, 1)
    expected = calibrate(scores, pairs.is_match, 0.05, frr=0.1, identities=who, skilled=forged, test_identities=5)
    assert verifier.calibration == expected
    assert (expected.against, expected.skilled, expected.interval_identities) == ("skilled", 9 * 36, 5)
    assert Verifier.fit(model, known, 0.05, against="random").calibration.against == "random"


def test_the_same_image_on_both_sides_is_told(model, pairs, tmp_path):
    verifier = Verifier.fit(model, pairs)
    (tmp_path / "sub").mkdir()
    for name, content in (("3.png", b"abc"), ("sub/3.png", b"abc"), ("4.png", b"xyz")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "5.png").symlink_to("4.png")
    at = {name: tmp_path / name for name in ("3.png", "sub/3.png", "4.png", "5.png")}
    assert verifier.compare(at["3.png"], at["3.png"]).notes == (module.SAME_FILE,)
    assert verifier.compare(at["3.png"], str(at["sub/3.png"])).notes == (module.SAME_FILE,)
    assert verifier.compare(at["4.png"], at["5.png"]).notes == (module.SAME_FILE,)
    assert verifier.compare(at["3.png"], at["4.png"]).notes == ()
    assert verifier.compare(np.full((1, 1), 7), np.full((1, 1), 7)).notes == (module.SAME_PIXELS,)
    assert verifier.compare(np.full((1, 1), 7), np.full((1, 1), 8)).notes == ()
    assert verifier.compare(at["4.png"], np.full((1, 1), 4)).notes == (module.SAME_PIXELS,)


def test_references_are_carried_along(tmp_path):
    verifier = Verifier.calibrate(*scored())
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 12)
    vectors = rng.normal(size=(20, 8))[labels] + 0.4 * rng.normal(size=(240, 8))
    references = fit_references(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels, far=0.05)
    with_rule = verifier.with_references(references)
    assert verifier.references is None
    assert with_rule.references == references
    assert with_rule.with_references(None) == verifier
    with_rule.save(tmp_path / "v.json")
    assert Verifier.load(tmp_path / "v.json") == with_rule
    damage(tmp_path / "v.json", references__count=0)
    with pytest.raises(VerifierError, match=r"v\.json is not a verifier that can be used: count must be"):
        Verifier.load(tmp_path / "v.json")
