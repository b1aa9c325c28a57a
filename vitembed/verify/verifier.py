"""`Verifier`: do two images match, how probably, and with which known error rates?

A verifier is a model's scores and a `Calibration` of them, bound together by the model's fingerprint: with
another model the threshold means nothing, so that is refused. It is saved as one JSON file that a person can read,
replaced as a whole or not at all. The model itself stays where it is; the file only says where that was.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ModelMismatchError, VectorError, VerifierError
from vitembed.images import ImageSource
from vitembed.verify.calibration import Calibration, Verdict, Wanted, calibrate
from vitembed.verify.pairs import Pairs
from vitembed.verify.scored import ScoredPairs
from vitembed.verify.verifier_file import Saved, read_verifier, unusable, write_verifier

if TYPE_CHECKING:
    from vitembed.verify.references import ReferenceCalibration

SAME_FILE = "both images are the same file, or copies of it"
SAME_PIXELS = "both images are the same to the model: one is a copy of the other"

# Rows gathered at a time for the scores of pairs: 24 MB a side for 384 dimensions.
_CHUNK = 16_384


class Encoder(Protocol):
    """What a verifier needs of a model; `vitembed.Embedder` is one."""

    @property
    def fingerprint(self) -> str:
        """Whose embeddings these are."""

    def encode(
        self, images: Sequence[ImageSource], *, batch_size: int = 64, progress: bool = False
    ) -> NDArray[np.float32]:
        """Embed N images as (N, D) unit rows."""


@dataclass(frozen=True)
class Decision:
    """The answer for one pair.

    Attributes:
        match: whether score >= threshold.
        verdict: "match", "no match", or "unsure" where the score lies in the verifier's unsure band: let a person look.
        probability: that the pair matches, in [0, 1], at the verifier's prior (even odds unless told otherwise).
        score: cosine of the two embeddings, in [-1, 1].
        threshold: of the verifier.
        notes: what a reviewer should know besides, a sentence each: that both images are one and the same.
    """

    match: bool
    verdict: Verdict
    probability: float
    score: float
    threshold: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verifier:
    """Decides whether two images match.

    Attributes:
        calibration: threshold, error rates and probability curve.
        fingerprint: of the model whose scores were calibrated; None if that is not known.
        location: where that model was, for people; None if that is not known.
        created: date and time of the calibration, ISO 8601 in UTC.
        model: encodes images for `compare`; None decides on scores alone.
        references: the rule and the calibration for a questioned image beside several references of an identity; None
            without one.

    Raises:
        ModelMismatchError: `model` is not the one with this fingerprint.
    """

    calibration: Calibration
    fingerprint: str | None = None
    location: str | None = None
    created: str = ""
    model: Encoder | None = None
    references: "ReferenceCalibration | None" = None

    def __post_init__(self) -> None:
        if self.model is None or self.fingerprint is None:
            return
        if self.model.fingerprint != self.fingerprint:
            known = f" (it was at {self.location})" if self.location else ""
            raise ModelMismatchError(
                f"this verifier belongs to the model {_short(self.fingerprint)}{known}; got the model "
                f"{_short(self.model.fingerprint)}. Pass that model, or calibrate anew for this one"
            )

    @property
    def threshold(self) -> float:
        """The score from which on a pair is accepted."""
        return self.calibration.threshold

    @classmethod
    def fit(
        cls,
        model: Encoder,
        pairs: Pairs,
        far: float = 0.01,
        *,
        frr: float | None = None,
        against: str | None = None,
        prior: float = 0.5,
        curve: str = "auto",
        test_identities: int | None = None,
        location: str | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> "Verifier":
        """Encode every distinct image of the pairs once, and choose the threshold on their scores.

        Args:
            model: encodes images.
            pairs: of images that the model was not trained on; at least 3 / far of `against` that do not match.
            far: the wanted false-accept rate, in (0, 1).
            frr: the share of matching pairs that may be called "no match"; above it and below the threshold a pair
                is "unsure". None: no pair is.
            against: "skilled", "random" or "all" non-matching pairs; by default skilled ones where there are any.
            prior: the share of matching pairs where the verifier will be used; it moves the probability alone.
            curve: "logistic", "likelihood ratio", "isotonic", or "auto": chosen by cross-validation over identities.
            test_identities: for how many other identities the intervals are; as many as in the pairs by default.
            location: where the model can be found again, kept for people.
            batch_size: images in one pass of the network.
            progress: show a progress bar on standard error.

        Raises:
            ConfigError: a setting is out of range or unknown; nothing is encoded then.
            ImageError: an image cannot be read.
            DataError: one kind of pair only, or none of `against`.
            VerifierError: the pairs cannot support the wanted rates, or the scores tell nothing apart.
        """
        wanted = Wanted(far, frr, against, prior, curve, test_identities)
        wanted.check_support(ScoredPairs.check(np.zeros(len(pairs)), pairs.is_match, pairs.identities, pairs.skilled))
        images, left, right = _distinct(pairs)
        vectors = model.encode(images, batch_size=batch_size, progress=progress)
        return cls.calibrate(
            _cosines(vectors, left, right),
            pairs.is_match,
            far,
            frr=frr,
            identities=pairs.identities,
            skilled=pairs.skilled,
            against=against,
            prior=prior,
            curve=curve,
            test_identities=test_identities,
            fingerprint=model.fingerprint,
            location=location,
            model=model,
        )

    @classmethod
    def calibrate(
        cls,
        scores: ArrayLike,
        is_match: ArrayLike,
        far: float = 0.01,
        *,
        frr: float | None = None,
        identities: ArrayLike | None = None,
        skilled: ArrayLike | None = None,
        against: str | None = None,
        prior: float = 0.5,
        curve: str = "auto",
        test_identities: int | None = None,
        fingerprint: str | None = None,
        location: str | None = None,
        model: Encoder | None = None,
    ) -> "Verifier":
        """Choose the threshold on scores alone, (P,) with `is_match` (P,); cosines, higher is more alike.

        Without `fingerprint` nothing can later tell whether a model is the one that the scores came from.
        Arguments and errors are as in `vitembed.verify.calibration.calibrate`.
        """
        calibration = calibrate(
            scores,
            is_match,
            far,
            frr=frr,
            identities=identities,
            skilled=skilled,
            against=against,
            prior=prior,
            curve=curve,
            test_identities=test_identities,
        )
        return cls(calibration, fingerprint, location, _now(), model)

    def with_references(self, references: "ReferenceCalibration | None") -> "Verifier":
        """Return a copy with the rule for several references of an identity."""
        return dataclasses.replace(self, references=references)

    def compare(self, a: ImageSource, b: ImageSource) -> Decision:
        """Decide whether two images match.

        Raises:
            VerifierError: the verifier has no model.
            ImageError: an image cannot be read.
        """
        if self.model is None:
            raise VerifierError(
                "to compare images this verifier needs its model: Verifier.load(path, model). "
                "Without one it decides on scores"
            )
        vectors = self.model.encode([a, b], batch_size=2)
        score = float(_cosines(vectors, np.array([0]), np.array([1]))[0])
        return self.judge(score, notes=_notes(a, b, vectors))

    def judge(self, score: float, notes: tuple[str, ...] = ()) -> Decision:
        """Decide on one score, with the notes to go with it.

        Raises:
            VectorError: the score is NaN or infinite.
        """
        probability = float(self.probability(score))
        verdict = self.calibration.verdict(float(score))
        return Decision(verdict == "match", verdict, probability, float(score), self.threshold, notes)

    def decide(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Return, for scores of any shape, whether each pair is accepted; one in the unsure band is not.

        Raises:
            VectorError: a score is NaN or infinite.
        """
        return np.asarray(_finite(scores) >= self.threshold)

    def probability(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return, for scores of any shape, the probability in [0, 1] that each pair matches.

        Raises:
            VectorError: a score is NaN or infinite.
        """
        return self.calibration.curve(_finite(scores))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the verifier, without its model, as one JSON file; an old one is replaced as a whole.

        Raises:
            VitembedError: the file cannot be written.
        """
        references = None if self.references is None else self.references.to_dict()
        write_verifier(path, Saved(self.calibration, self.fingerprint, self.location, self.created, references))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Encoder | None = None) -> "Verifier":
        """Read a saved verifier.

        Args:
            path: the JSON file.
            model: the model that it was made with; without one, only scores can be decided on.

        Raises:
            VerifierError: the file is missing, damaged, or of another format or version.
            ModelMismatchError: the model has another fingerprint.
        """
        saved = read_verifier(path)
        references = None
        if saved.references is not None:
            from vitembed.verify.references import ReferenceCalibration

            try:
                references = ReferenceCalibration.from_dict(saved.references)
            except VerifierError as error:
                raise unusable(path, error) from error
        return cls(saved.calibration, saved.fingerprint, saved.location, saved.created, model, references)


# Scores of pairs ------------------------------------------------------------------------------------------


def _distinct(pairs: Pairs) -> tuple[list[ImageSource], NDArray[np.int64], NDArray[np.int64]]:
    """Return each distinct image once, and for both sides of the pairs the positions (P,) in that list."""
    images: list[ImageSource] = []
    positions: dict[str | int, int] = {}

    def position(source: ImageSource) -> int:
        """Return where an image stands in the list, which it joins if it is new."""
        # Images in memory are told apart as objects; `pairs` keeps them alive, so no id is given twice.
        key = os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)
        if key not in positions:
            positions[key] = len(images)
            images.append(source)
        return positions[key]

    left = np.array([position(source) for source in pairs.left], dtype=np.int64)
    right = np.array([position(source) for source in pairs.right], dtype=np.int64)
    return images, left, right


def _cosines(vectors: NDArray[np.float32], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the cosines (P,) of the unit rows vectors[left] and vectors[right].

    Row by row in float64, not as a matrix product, so that a pair's score does not depend on the other pairs.
    """
    scores = np.empty(len(left), dtype=np.float64)
    for start in range(0, len(left), _CHUNK):
        at = slice(start, start + _CHUNK)
        np.einsum("nd,nd->n", vectors[left[at]], vectors[right[at]], dtype=np.float64, out=scores[at])
    return np.clip(scores, -1, 1, out=scores)


def _notes(a: ImageSource, b: ImageSource, vectors: NDArray[np.float32]) -> tuple[str, ...]:
    """Say so when both images (embedded as the two rows of `vectors`) are one and the same."""
    if isinstance(a, str | os.PathLike) and isinstance(b, str | os.PathLike) and _one_file(Path(a), Path(b)):
        return (SAME_FILE,)
    # No second decoding: what differs in the pixels that the model sees differs by far more in its embedding. Equal
    # pixels differ by rounding, as their places in the batch do; seen were 0 to 1e-7.
    return (SAME_PIXELS,) if np.abs(vectors[0] - vectors[1]).max() <= 1e-6 else ()


def _one_file(a: Path, b: Path) -> bool:
    """Tell whether two paths lead to one file, or to two of equal content."""
    try:
        return a.samefile(b) or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())
    except OSError:  # an encoder may know images by names that are no files
        return a == b


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise VectorError("scores must be finite; got NaN or infinity")
    return array


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _short(fingerprint: str) -> str:
    return fingerprint[:19] + "..." if len(fingerprint) > 22 else fingerprint
