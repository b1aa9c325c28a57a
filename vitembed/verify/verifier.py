"""`Verifier`: do two images match, how probably, and with which known error rates?

A verifier is a model's scores and a `Calibration` of them, bound together by the model's fingerprint: with
another model the threshold means nothing, so that is refused. It is saved as one JSON file that a person can read,
replaced as a whole or not at all. The model itself stays where it is; the file only says where that was.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ModelMismatchError, VectorError, VerifierError
from vitembed.files import atomic_write
from vitembed.images import ImageSource
from vitembed.verify.calibration import Calibration, Logistic, calibrate
from vitembed.verify.pairs import Pairs

FORMAT = "vitembed-verifier"
VERSION = 1

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
        probability: that the pair matches, in [0, 1], at the verifier's prior (even odds unless told otherwise).
        score: cosine of the two embeddings, in [-1, 1].
        threshold: of the verifier.
    """

    match: bool
    probability: float
    score: float
    threshold: float


@dataclass(frozen=True)
class Verifier:
    """Decides whether two images match.

    Attributes:
        calibration: threshold, error rates and probability curve.
        fingerprint: of the model whose scores were calibrated; None if that is not known.
        location: where that model was, for people; None if that is not known.
        created: date and time of the calibration, ISO 8601 in UTC.
        model: encodes images for `compare`; None decides on scores alone.

    Raises:
        ModelMismatchError: `model` is not the one with this fingerprint.
    """

    calibration: Calibration
    fingerprint: str | None = None
    location: str | None = None
    created: str = ""
    model: Encoder | None = None

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
        prior: float = 0.5,
        location: str | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> "Verifier":
        """Encode every distinct image of the pairs once, and choose the threshold on their scores.

        Args:
            model: encodes images.
            pairs: labelled pairs, of both kinds; at least 3 / far that do not match.
            far: the wanted false-accept rate, in (0, 1).
            prior: the share of matching pairs where the verifier will be used; it moves the probability alone.
            location: where the model can be found again, kept for people.
            batch_size: images in one pass of the network.
            progress: show a progress bar on standard error.

        Raises:
            ImageError: an image cannot be read.
            DataError: one kind of pair only.
            VerifierError: the pairs cannot support the wanted rate, or the scores tell nothing apart.
        """
        images, left, right = _distinct(pairs)
        vectors = model.encode(images, batch_size=batch_size, progress=progress)
        scores = _cosines(vectors, left, right)
        calibration = calibrate(scores, pairs.is_match, far, identities=pairs.identities, prior=prior)
        return cls(calibration, model.fingerprint, location, _now(), model)

    @classmethod
    def calibrate(
        cls,
        scores: ArrayLike,
        is_match: ArrayLike,
        far: float = 0.01,
        *,
        prior: float = 0.5,
        fingerprint: str | None = None,
        location: str | None = None,
    ) -> "Verifier":
        """Choose the threshold on scores alone, (P,) with `is_match` (P,); cosines, higher is more alike.

        Without `fingerprint` nothing can later tell whether a model is the one that the scores came from.
        Arguments and errors are as in `vitembed.verify.calibration.calibrate`.
        """
        return cls(calibrate(scores, is_match, far, prior=prior), fingerprint, location, _now())

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
        return Decision(score >= self.threshold, float(self.probability(score)), score, self.threshold)

    def decide(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Return, for scores of any shape, whether each pair is accepted.

        Raises:
            VectorError: a score is NaN or infinite.
        """
        return np.asarray(_finite(scores) >= self.threshold)

    def probability(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return, for scores of any shape, the probability in [0, 1] that each pair matches.

        Raises:
            VectorError: a score is NaN or infinite.
        """
        return self.calibration.logistic(_finite(scores))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the verifier, without its model, as one JSON file; an old one is replaced as a whole.

        Raises:
            VitembedError: the file cannot be written.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            "fingerprint": self.fingerprint,
            "location": self.location,
            "calibration": dataclasses.asdict(self.calibration),
        }
        atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

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
        document = _read_json(Path(path))
        try:
            return cls(*_parse(document), model)
        except VerifierError as error:
            raise VerifierError(f"{path} is not a verifier that can be used: {error}. Calibrate anew") from error


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


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise VectorError("scores must be finite; got NaN or infinity")
    return array


# The file -------------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _short(fingerprint: str) -> str:
    return fingerprint[:19] + "..." if len(fingerprint) > 22 else fingerprint


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise VerifierError(f"there is no verifier at {path}; make one with Verifier.fit or calibrate") from error
    except OSError as error:
        raise VerifierError(f"cannot read the verifier {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"{path} is damaged or no verifier: expected JSON; {error}") from error


def _parse(document: object) -> tuple[Calibration, str | None, str | None, str]:
    """Check a document of `Verifier.save` and return the fields of the verifier, in order."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise VerifierError(f'expected "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise VerifierError(f"expected version {VERSION}; got {document.get('version')!r}")
    _check_keys(document, ("format", "version", "created", "fingerprint", "location", "calibration"))
    for key in ("fingerprint", "location"):
        if not isinstance(document[key], str | None):
            raise VerifierError(f"{key} must be text or null; got {document[key]!r}")
    if not isinstance(document["created"], str):
        raise VerifierError(f"created must be text; got {document['created']!r}")
    return (
        _parse_calibration(document["calibration"]),
        document["fingerprint"],
        document["location"],
        document["created"],
    )


def _parse_calibration(values: object) -> Calibration:
    checked = dict(_check_keys(values, [field.name for field in dataclasses.fields(Calibration)]))
    logistic = _check_keys(checked["logistic"], ["slope", "offset"])
    for key in ("threshold", "far_wanted", "far", "frr", "eer", "prior"):
        checked[key] = _number(key, checked[key])
    for key in ("far_interval", "frr_interval"):
        if checked[key] is None:
            continue
        if not isinstance(checked[key], list) or len(checked[key]) != 2:
            raise VerifierError(f"{key} must hold two numbers or be null; got {checked[key]!r}")
        checked[key] = tuple(_number(key, value) for value in checked[key])
    if checked["identities"] is not None and (type(checked["identities"]) is not int or checked["identities"] < 1):
        raise VerifierError(f"identities must be a count or null; got {checked['identities']!r}")
    for key in ("matches", "non_matches"):
        if type(checked[key]) is not int or checked[key] < 1:
            raise VerifierError(f"{key} must be a count; got {checked[key]!r}")
    if not isinstance(checked["protocol"], str):
        raise VerifierError(f"protocol must be text; got {checked['protocol']!r}")
    slope, offset = (_number(key, logistic[key]) for key in ("slope", "offset"))
    if slope <= 0:
        raise VerifierError(f"slope must be above 0; got {slope}")
    for key in ("far_wanted", "far", "frr", "eer", "prior"):
        if not 0 <= checked[key] <= 1:
            raise VerifierError(f"{key} must be in [0, 1]; got {checked[key]}")
    return Calibration(**(checked | {"logistic": Logistic(slope, offset)}))


def _check_keys(values: object, expected: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise VerifierError(f"expected an object with {', '.join(expected)}; got {values!r}")
    for key in values:
        if key not in expected:
            near = difflib.get_close_matches(key, expected, n=1)
            raise VerifierError(f"unknown key {key!r}" + (f", the nearest is {near[0]!r}" if near else ""))
    missing = [key for key in expected if key not in values]
    if missing:
        raise VerifierError(f"missing {', '.join(missing)}")
    return values


def _number(key: str, value: object) -> float:
    # A whole number of 400 digits is valid JSON, and no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise VerifierError(f"{key} must be a finite number; got {value!r}")
    return float(value)
