"""The file of a verifier: one JSON document that a person can read, checked as a whole when it is read back."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vitembed.errors import VerifierError
from vitembed.files import atomic_write
from vitembed.verify import fields
from vitembed.verify.calibration import Calibration

FORMAT = "vitembed-verifier"
VERSION = 2

KEYS = ("format", "version", "created", "fingerprint", "location", "calibration", "references")


@dataclass(frozen=True)
class Saved:
    """What the file of a verifier holds.

    Attributes:
        calibration: of single pairs.
        fingerprint: of the model; None if that is not known.
        location: where the model was; None if that is not known.
        created: date and time, ISO 8601.
        references: the JSON of a `ReferenceCalibration`, not yet checked; None without one.
    """

    calibration: Calibration
    fingerprint: str | None
    location: str | None
    created: str
    references: Any = None


def write_verifier(path: str | os.PathLike[str], saved: Saved) -> None:
    """Write the file; an old one is replaced as a whole.

    Raises:
        VitembedError: the file cannot be written.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "created": saved.created,
        "fingerprint": saved.fingerprint,
        "location": saved.location,
        "calibration": saved.calibration.to_dict(),
        "references": saved.references,
    }
    atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_verifier(path: str | os.PathLike[str]) -> Saved:
    """Read the file and check every field but `references`.

    Raises:
        VerifierError: it is missing, damaged, or of another format or version.
    """
    document = _read_json(Path(path))
    try:
        return _parse(document)
    except VerifierError as error:
        raise unusable(path, error) from error


def unusable(path: str | os.PathLike[str], error: VerifierError) -> VerifierError:
    """Return the error for a file that is JSON but no verifier that can be used."""
    return VerifierError(f"{os.fspath(path)} is not a verifier that can be used: {error}. Calibrate anew")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise VerifierError(f"there is no verifier at {path}; make one with Verifier.fit or calibrate") from error
    except OSError as error:
        raise VerifierError(f"cannot read the verifier {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"{path} is damaged or no verifier: expected JSON; {error}") from error


def _parse(document: object) -> Saved:
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise VerifierError(f'expected "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        newer = isinstance(document.get("version"), int) and document["version"] > VERSION
        raise VerifierError(
            f"expected version {VERSION}; got {document.get('version')!r:.80}{': update vitembed' if newer else ''}"
        )
    fields.check_keys(document, KEYS)
    for key in ("fingerprint", "location"):
        if not isinstance(document[key], str | None):
            raise VerifierError(f"{key} must be text or null; got {document[key]!r:.80}")
    return Saved(
        Calibration.from_dict(document["calibration"]),
        document["fingerprint"],
        document["location"],
        _date(document["created"]),
        document["references"],
    )


def _date(value: object) -> str:
    written = fields.text("created", value)
    try:
        datetime.fromisoformat(written)
    except ValueError:
        raise VerifierError(f"created must be a date and time in ISO 8601; got {written!r:.80}") from None
    return written
