"""Signatures by the protocol of single pairs.

A genuine image is its writer's own; a skilled forgery was made by somebody who imitates a writer; a random forgery is a
genuine image of another writer. Only writers with at least two genuine images are judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate.scored import EvaluatedPairs, Ints, score_pairs
from vitembed.evaluate.verification import VerificationReport, evaluate_pairs
from vitembed.verify.calibration import Calibration

PAIRS = (
    "For each writer all pairs of two genuine images, against as many pairs of a genuine image and a skilled forgery "
    "of the writer (all, where these are fewer), and as many random pairs of a genuine image and one of another "
    "writer; which, is drawn by seed."
)


@dataclass(frozen=True, eq=False)
class SignatureReport:
    """How well genuine signatures are told from forgeries by single pairs.

    Attributes:
        pairs: skilled and random forgeries apart.
        scored: the pairs of `pairs`.
        writers: how many writers are judged.
        genuine: how many genuine images.
        forged: how many skilled forgeries.
    """

    pairs: VerificationReport
    scored: EvaluatedPairs
    writers: int
    genuine: int
    forged: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it; the pairs stand at the top of the whole document."""
        return {"writers": self.writers, "genuine": self.genuine, "forged": self.forged}


@dataclass(frozen=True, eq=False)
class Signatures:
    """Embeddings of signatures.

    Attributes:
        vectors: (N, D), of any length but zero.
        labels: (N,) int64, the writer of a genuine image, a position in `writers`; that of a forgery is not read.
        forgery_of: (N,) int64, the writer that an image imitates, -1 for a genuine one.
        writers: names.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: the others do not fit them, there is no forgery, or no writer with two genuine images.
    """

    vectors: NDArray[np.floating[Any]]
    labels: Ints
    forgery_of: Ints
    writers: Sequence[str]

    def __post_init__(self) -> None:
        unit = metrics.unit_rows(self.vectors)
        object.__setattr__(self, "vectors", unit)
        for name in ("labels", "forgery_of"):
            value = np.asarray(getattr(self, name))
            if value.shape != (len(unit),) or value.dtype.kind not in "iu":
                raise DataError(f"{name} must hold one number for each of the {len(unit)} images; got {value.dtype}")
            if value.max(initial=0) >= len(self.writers):
                raise DataError(f"{name} must be numbers of the {len(self.writers)} writers; got {value.max()}")
            object.__setattr__(self, name, value.astype(np.int64))
        if not (self.forgery_of >= 0).any():
            raise DataError("signatures need skilled forgeries to be judged by; got none")
        if not self.judged:
            raise DataError("no writer has two genuine images and another writer beside; add genuine images")

    @property
    def judged(self) -> list[int]:
        """The writers with at least two genuine images, where there is another writer, too."""
        counts = np.bincount(self.labels[self.forgery_of < 0], minlength=len(self.writers))
        return np.flatnonzero(counts >= 2).tolist() if np.count_nonzero(counts) > 1 else []

    def genuine(self, writer: int) -> Ints:
        """Return the positions of a writer's own images."""
        return np.flatnonzero((self.labels == writer) & (self.forgery_of < 0))

    def forged(self, writer: int) -> Ints:
        """Return the positions of the skilled forgeries of a writer."""
        return np.flatnonzero(self.forgery_of == writer)

    def others(self, writer: int) -> Ints:
        """Return the positions of the genuine images of all other writers."""
        return np.flatnonzero((self.labels != writer) & (self.forgery_of < 0))


def evaluate_signatures(
    signatures: Signatures, *, calibration: Calibration | None = None, rounds: int = 100, seed: int = 0
) -> SignatureReport:
    """Measure signatures by pairs; `evaluate_references` measures them by the references of a writer.

    Args:
        signatures: their embeddings.
        calibration: of a verifier's pairs, to be judged on the pairs.
        rounds: draws of the bootstrap intervals over writers.
        seed: of all that is drawn.

    Raises:
        DataError: pairs of one kind only.
    """
    scored = signature_pairs(signatures, seed=seed)
    pairs = evaluate_pairs(scored, calibration=calibration, protocol=PAIRS, rounds=rounds, seed=seed)
    forged = int(np.count_nonzero(signatures.forgery_of >= 0))
    return SignatureReport(pairs, scored, len(signatures.judged), len(signatures.labels) - forged, forged)


def signature_pairs(signatures: Signatures, *, seed: int = 0) -> EvaluatedPairs:
    """Return the pairs of the protocol of single pairs (`PAIRS`), scored.

    Raises:
        DataError: there is no forgery of a judged writer.
    """
    rng = np.random.default_rng(seed)
    images, whom, skilled = [], [], []
    for writer in signatures.judged:
        own, forged, others = signatures.genuine(writer), signatures.forged(writer), signatures.others(writer)
        matching = np.stack([own[side] for side in np.triu_indices(own.size, 1)], axis=1)  # (n, 2)
        wanted = len(matching)
        imitated = _draw_pairs(own, forged, wanted, rng)
        random = _draw_pairs(own, others, wanted, rng)
        images += [matching, imitated, random]
        shown = [np.full(wanted, writer), np.full(len(imitated), writer), signatures.labels[random[:, 1]]]
        whom += [np.stack([np.full(len(right), writer), right], axis=1) for right in shown]
        skilled += [np.zeros(wanted, np.bool_), np.ones(len(imitated), np.bool_), np.zeros(len(random), np.bool_)]
    at, identities, is_skilled = np.concatenate(images), np.concatenate(whom), np.concatenate(skilled)
    return EvaluatedPairs(
        scores=score_pairs(signatures.vectors, at[:, 0], at[:, 1]),
        is_match=(identities[:, 0] == identities[:, 1]) & ~is_skilled,
        identities=identities,
        skilled=is_skilled,
        names=tuple(signatures.writers),
        images=at,
    )


def _draw_pairs(left: Ints, right: Ints, wanted: int, rng: np.random.Generator) -> Ints:
    """Return `wanted` distinct pairs of one of each side, (n, 2), or all where these are fewer."""
    total = left.size * right.size
    numbers = np.arange(total) if total <= wanted else np.sort(rng.choice(total, wanted, replace=False))
    return np.stack([left[numbers // max(1, right.size)], right[numbers % max(1, right.size)]], axis=1)
