"""Decisions by several references of an identity, as they would be made once people are enrolled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitembed.errors import ConfigError
from vitembed.evaluate.scored import EvaluatedPairs
from vitembed.evaluate.verification import VerificationReport, evaluate_pairs
from vitembed.verify.calibration import Calibration
from vitembed.verify.reference_rules import Max, Mean, Rule
from vitembed.verify.reference_trials import LEAST_IDENTITIES, checked_identities, draw_trials
from vitembed.verify.references import ReferenceCalibration

COUNT = 6
"""References of an identity where nothing else is said."""

PROTOCOL = (
    "{count} genuine images of an identity are its references ({enrolled} of {identities} identities have more; the "
    "others are not judged here), drawn by seed several times. Its other images, the skilled forgeries of it and "
    "genuine images of others are questioned, each once, by one score over all references."
)

# Random non-matches that are drawn: ten times as many, see `draw_trials`.
_IMPOSTORS = 300


@dataclass(frozen=True, eq=False)
class ReferencesReport:
    """Telling an identity's own images from others by its references.

    Attributes:
        count: references of an identity.
        enrolled: how many identities have more images than that, and are judged.
        identities: how many there are.
        rules: one report for each rule that makes one score of several; empty where too few are enrolled.
    """

    count: int
    enrolled: int
    identities: int
    rules: Mapping[str, VerificationReport]

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        return PROTOCOL.format(count=self.count, enrolled=self.enrolled, identities=self.identities)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        rules = {name: report.to_dict() for name, report in self.rules.items()}
        return {"count": self.count, "enrolled": self.enrolled, "identities": self.identities, "rules": rules}


def evaluate_references(
    embeddings: ArrayLike,
    labels: ArrayLike,
    forgery_of: ArrayLike | None = None,
    *,
    names: Sequence[str] | None = None,
    fitted: ReferenceCalibration | None = None,
    count: int | None = None,
    rounds: int = 100,
    seed: int = 0,
) -> ReferencesReport:
    """Measure decisions by references, random and skilled forgeries apart.

    Args:
        embeddings: (N, D), of any length but zero.
        labels: (N,) identities, numbers or strings; that of a forgery is not read.
        forgery_of: (N,) the label that a skilled forgery imitates, -1 for genuine images, and labels are numbers then;
            None if all are genuine.
        names: names of the identities, of which labels are positions; labels name themselves by default.
        fitted: how a verifier makes one score of several references, judged beside the mean and the highest cosine.
        count: references of an identity, at least 1; as `fitted` was made for, or `COUNT`, by default.
        rounds: draws of the bootstrap intervals over identities.
        seed: of all that is drawn.

    Raises:
        ConfigError: `count` is below 1.
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels or `forgery_of` do not fit.
    """
    count = count if count is not None else COUNT if fitted is None else fitted.count
    if count < 1:
        raise ConfigError(f"references need a count of at least 1; got {count}")
    rows, codes, imitated = checked_identities(embeddings, labels, forgery_of)
    sizes = np.bincount(codes[codes >= 0])
    enrolled = int(np.count_nonzero(sizes > count))
    report = ReferencesReport(count, enrolled, int(np.count_nonzero(sizes)), {})
    if enrolled < LEAST_IDENTITIES:
        return report
    trials = draw_trials(rows, codes, imitated, count, _IMPOSTORS, np.random.default_rng(seed))
    rules: dict[str, Rule] = {"mean": Mean(), "max": Max()}
    calibrations: dict[str, Calibration] = {}
    if fitted is not None:
        rules[fitted.rule.name], calibrations[fitted.rule.name] = fitted.rule, fitted.calibration
    given = np.asarray(labels)
    distinct = np.unique(given[codes >= 0]).tolist()
    called = tuple(str(label) if names is None else names[int(label)] for label in distinct)
    judged = {}
    for name, rule in rules.items():
        scored = EvaluatedPairs(
            rule(trials.evidence),
            trials.is_match,
            trials.identities,
            trials.skilled if imitated.max() >= 0 else None,
            called,
        )
        judged[name] = evaluate_pairs(
            scored, calibration=calibrations.get(name), protocol=report.protocol, rounds=rounds, seed=seed
        )
    return ReferencesReport(count, enrolled, report.identities, judged)
