"""`transfer`: a sister's verifier for another model, which says so, and everything else stays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vitembed.errors import ConfigError, ModelMismatchError, VerifierError
from vitembed.images import ImageSource
from vitembed.verify import Verifier, fit_labelled, transfer

REASON = "a sister trained without Greek"


@dataclass(frozen=True)
class Fake:
    """An encoder whose images are their embeddings."""

    fingerprint: str

    def encode(
        self, images: Sequence[ImageSource], *, batch_size: int = 64, progress: bool = False
    ) -> NDArray[np.float32]:
        rows = np.array([np.asarray(image) for image in images], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def fitted() -> Verifier:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 9)
    images = list(rng.standard_normal((12, 8))[labels] + 0.3 * rng.standard_normal((108, 8)))
    verifier, lacking = fit_labelled(Fake("sha256:sister"), images, labels, far=0.05, location="runs/sister")
    assert lacking is None
    return verifier


def test_the_transferred_verifier_is_the_other_model_s_and_says_whose_scores_it_has(
    fitted: Verifier, tmp_path: Path
) -> None:
    model = Fake("sha256:all")
    moved = transfer(fitted, model, REASON, location="ink")
    moved.save(tmp_path / "v")
    loaded = Verifier.load(tmp_path / "v", model)
    assert (loaded.fingerprint, loaded.location, loaded.created) == ("sha256:all", "ink", fitted.created)
    assert loaded.references is not None
    for protocol in (
        loaded.calibration.protocol,
        loaded.references.protocol,
        loaded.references.calibration.protocol,
    ):
        assert f"measured with another model, {REASON} (sha256:sister)" in protocol
        assert "is assumed" in protocol
    same = replace(loaded.calibration, protocol=fitted.calibration.protocol)
    assert same == fitted.calibration
    a, b = np.eye(8)[0], np.eye(8)[:2].sum(axis=0)
    assert loaded.compare(a, b).score == pytest.approx(np.sqrt(0.5))
    with pytest.raises(ModelMismatchError, match="it was at ink"):
        Verifier.load(tmp_path / "v", Fake("sha256:sister"))


def test_what_cannot_be_transferred_is_refused(fitted: Verifier) -> None:
    with pytest.raises(VerifierError, match="this very model"):
        transfer(fitted, Fake("sha256:sister"), REASON)
    with pytest.raises(VerifierError, match="on whose scores"):
        transfer(replace(fitted, fingerprint=None), Fake("sha256:all"), REASON)
    for reason in ("", " ", "two\nlines"):
        with pytest.raises(ConfigError, match="one line of words"):
            transfer(fitted, Fake("sha256:all"), reason)
