"""Signatures by the two protocols of the field: single pairs, and several references of a writer.

A genuine image is its writer's own; a skilled forgery was made by somebody who imitates a writer; a random forgery is a
genuine image of another writer. Only writers with at least two genuine images are judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.evaluate.scored import EvaluatedPairs, Ints, score_pairs
from vitembed.evaluate.verification import VerificationReport, evaluate_pairs
from vitembed.verify.calibration import Calibration
from vitembed.verify.reference_rules import Evidence, Max, Mean, Rule, gather_evidence
from vitembed.verify.references import ReferenceCalibration

PAIRS = (
    "For each writer all pairs of two genuine images, against as many pairs of a genuine image and a skilled forgery "
    "of the writer (all, where these are fewer), and as many random pairs of a genuine image and one of another "
    "writer; which, is drawn by seed."
)
REFERENCES = (
    "{count} genuine images of each writer who has more ({enrolled} of {writers} writers; the others are not judged "
    "here) are drawn by seed as references; the writer's other genuine images, the "
    "skilled forgeries of the writer and at most {random} genuine images of other writers are questioned, each judged "
    "by one score over all references. {draws} draws of references are pooled."
)

_RANDOM = 100  # random forgeries questioned for a writer and draw: their number grows with that of the writers


@dataclass(frozen=True, eq=False)
class SignatureReport:
    """How well genuine signatures are told from forgeries.

    Attributes:
        pairs: by single pairs, skilled and random forgeries apart.
        references: by the references of a writer, for each rule that makes one score of several; empty where no writer
            has enough genuine images.
        scored: the pairs of `pairs`.
        writers: how many writers are judged.
        genuine: how many genuine images.
        forged: how many skilled forgeries.
        count: references of a writer.
        enrolled: how many writers have more genuine images than that, and so are judged by references.
    """

    pairs: VerificationReport
    references: Mapping[str, VerificationReport]
    scored: EvaluatedPairs
    writers: int
    genuine: int
    forged: int
    count: int
    enrolled: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it; the pairs stand at the top of the whole document."""
        return {
            "writers": self.writers,
            "genuine": self.genuine,
            "forged": self.forged,
            "references": {
                "count": self.count,
                "enrolled": self.enrolled,
                "rules": {name: report.to_dict() for name, report in self.references.items()},
            },
        }


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
    signatures: Signatures,
    *,
    calibration: Calibration | None = None,
    references: ReferenceCalibration | None = None,
    count: int | None = None,
    draws: int = 10,
    rounds: int = 100,
    seed: int = 0,
) -> SignatureReport:
    """Measure signatures by pairs and by references.

    Args:
        signatures: their embeddings.
        calibration: of a verifier's pairs, to be judged on the pairs.
        references: how a verifier makes one score of several references, to be judged beside the mean and the highest
            cosine.
        count: references of a writer, at least 1; by default as many as `references` were fitted for, 6 without.
        draws: how often references are drawn; the draws are pooled.
        rounds: draws of the bootstrap intervals over writers.
        seed: of all that is drawn.

    Raises:
        ConfigError: `count` or `draws` is below 1.
        DataError: pairs of one kind only.
    """
    if count is None:
        count = 6 if references is None else references.count
    if count < 1 or draws < 1:
        raise ConfigError(f"references need a count and draws of at least 1; got {count} and {draws}")
    scored = signature_pairs(signatures, seed=seed)
    pairs = evaluate_pairs(scored, calibration=calibration, protocol=PAIRS, rounds=rounds, seed=seed)
    rules: dict[str, Rule] = {"mean": Mean(), "max": Max()}
    calibrations: dict[str, Calibration] = {}
    if references is not None:
        rules[references.rule.name], calibrations[references.rule.name] = references.rule, references.calibration
    judged = {}
    questions = _ask(signatures, count, draws, seed)
    writers, enrolled = len(signatures.judged), 0
    if questions is not None:
        enrolled = int(np.unique(questions.identities[:, 0]).size)
        protocol = REFERENCES.format(count=count, enrolled=enrolled, writers=writers, random=_RANDOM, draws=draws)
        for name, rule in rules.items():
            asked = questions.scored(rule, signatures.writers)
            judged[name] = evaluate_pairs(
                asked, calibration=calibrations.get(name), protocol=protocol, rounds=rounds, seed=seed
            )
    forged = int(np.count_nonzero(signatures.forgery_of >= 0))
    genuine = len(signatures.labels) - forged
    return SignatureReport(pairs, judged, scored, writers, genuine, forged, count, enrolled)


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


@dataclass(frozen=True, eq=False)
class _Questions:
    """Questioned images against the references of a writer: what is known of their cosines, and who they are."""

    evidence: Evidence
    images: Ints
    identities: Ints
    skilled: NDArray[np.bool_]

    def scored(self, rule: Rule, writers: Sequence[str]) -> EvaluatedPairs:
        """Return them with the scores that a rule gives."""
        matching = (self.identities[:, 0] == self.identities[:, 1]) & ~self.skilled
        return EvaluatedPairs(
            rule(self.evidence), matching, self.identities, self.skilled, tuple(writers), images=self.images
        )


def _ask(signatures: Signatures, count: int, draws: int, seed: int) -> _Questions | None:
    """Draw references and questioned images; None where no writer has an image more than references."""
    rng = np.random.default_rng(seed)
    evidence, images, whom, skilled = [], [], [], []
    vectors = signatures.vectors.astype(np.float64)
    for _ in range(draws):
        for writer in signatures.judged:
            own = rng.permutation(signatures.genuine(writer))
            if own.size <= count:
                continue
            references, others = own[:count], signatures.others(writer)
            random = rng.choice(others, min(_RANDOM, others.size), replace=False)
            forged = signatures.forged(writer)
            questioned = np.concatenate([own[count:], forged, random])
            cosines = np.clip(vectors[questioned] @ vectors[references].T, -1, 1)  # (q, count)
            among = np.clip(vectors[references] @ vectors[references].T, -1, 1)
            evidence.append(gather_evidence(cosines, among))
            images.append(np.stack([references[cosines.argmax(axis=1)], questioned], axis=1))
            shown = np.where(signatures.forgery_of[questioned] >= 0, writer, signatures.labels[questioned])
            whom.append(np.stack([np.full(questioned.size, writer), shown], axis=1))
            skilled.append(signatures.forgery_of[questioned] >= 0)
    if not evidence:
        return None
    return _Questions(
        Evidence.concatenate(evidence), np.concatenate(images), np.concatenate(whom), np.concatenate(skilled)
    )
