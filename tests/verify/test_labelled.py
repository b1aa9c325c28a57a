"""A verifier from labelled images: every image is embedded once, for pairs and for references."""

import numpy as np
import pytest

from vitembed.errors import ConfigError, DataError, VerifierError
from vitembed.verify import Pairs, Verifier, fit_labelled, fit_references

IDENTITIES, EACH, DIM = 15, 12, 16


class Stub:
    """A model whose "images" are small arrays that hold the number of their embedding."""

    fingerprint = "sha256:stub"

    def __init__(self):
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((IDENTITIES, 1, DIM))
        rows = (centres + 0.5 * rng.standard_normal((IDENTITIES, EACH, DIM))).reshape(-1, DIM)
        self.vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        self.asked = []

    def encode(self, images, *, batch_size=64, progress=False):
        numbers = [int(image[0, 0]) for image in images]
        self.asked += numbers
        return self.vectors[numbers]


@pytest.fixture
def model():
    return Stub()


IMAGES = [np.full((1, 1), number, np.uint16) for number in range(IDENTITIES * EACH)]
LABELS = np.repeat(np.arange(IDENTITIES), EACH)


def test_each_image_is_embedded_once_and_the_verifier_is_that_of_its_pairs(model):
    verifier, lacking = fit_labelled(model, IMAGES, LABELS, far=0.05, location="runs/x")
    assert lacking is None
    assert sorted(model.asked) == list(range(len(IMAGES)))
    alone = Verifier.fit(model, Pairs.from_labels(IMAGES, LABELS), 0.05)
    assert verifier.calibration == alone.calibration
    assert (verifier.fingerprint, verifier.location, verifier.model) == ("sha256:stub", "runs/x", model)
    assert verifier.references == fit_references(model.vectors, LABELS, None, 6, 0.05)


def test_forgeries_reach_pairs_and_references(model):
    forgery_of = np.full(len(IMAGES), -1)
    labels = LABELS.copy()
    forged = np.arange(0, len(IMAGES), EACH)  # the first of each identity now imitates the next one
    labels[forged] = IDENTITIES + np.arange(IDENTITIES)
    forgery_of[forged] = (np.arange(IDENTITIES) + 1) % IDENTITIES
    verifier, lacking = fit_labelled(model, IMAGES, labels, forgery_of, far=0.1, against="random", count=4)
    assert lacking is None
    assert verifier.calibration.skilled == IDENTITIES * (EACH - 1)
    assert verifier.references.calibration.far_skilled is not None
    assert verifier.references.count == 4


def test_too_few_images_for_references_are_told_and_pairs_still_serve(model):
    verifier, lacking = fit_labelled(model, IMAGES, LABELS, far=0.05, count=EACH)
    assert verifier.references is None
    assert "genuine images" in lacking or "more than" in lacking
    assert verifier.calibration.far <= 0.05
    assert fit_labelled(model, IMAGES, LABELS, far=0.05, count=0)[1] is None


def test_what_pairs_cannot_support_is_an_error(model):
    with pytest.raises(VerifierError, match="needs at least"):
        fit_labelled(model, IMAGES, LABELS, far=1e-5)
    with pytest.raises(DataError, match="expected one label an image"):
        fit_labelled(model, IMAGES, LABELS[1:])


def test_the_intervals_are_for_as_many_identities_as_are_asked_for(model):
    verifier, _ = fit_labelled(model, IMAGES, LABELS, far=0.05, count=0, test_identities=9)
    assert verifier.calibration.interval_identities == 9
    assert (
        verifier.calibration
        == Verifier.fit(model, Pairs.from_labels(IMAGES, LABELS), 0.05, test_identities=9).calibration
    )
    with pytest.raises(ConfigError, match="test_identities must be at least 1"):
        fit_labelled(model, IMAGES, LABELS, far=0.05, test_identities=0)


@pytest.mark.parametrize("wrong", [{"far": 2.0}, {"far": 1e-5}, {"curve": "foo"}, {"prior": 3.0}, {"against": "none"}])
def test_nothing_is_embedded_for_settings_that_cannot_be(model, wrong):
    with pytest.raises((ConfigError, VerifierError)):
        fit_labelled(model, IMAGES, LABELS, **wrong)
    assert model.asked == []
