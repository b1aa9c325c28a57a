"""Verification: how well scores part matching from non-matching pairs, and what a verifier's decisions are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitembed.evaluate.decisions import DecisionErrors, ProbabilityErrors, judge_decisions, judge_probabilities
from vitembed.evaluate.figures import Interval
from vitembed.evaluate.mistakes import IdentityErrors, Mistakes, identity_errors, worst_mistakes
from vitembed.evaluate.scored import EvaluatedPairs
from vitembed.evaluate.separation import FARS, Separation, separate
from vitembed.verify.calibration import Calibration

ALL_PAIRS = "All pairs of the images, or of a random part of them."
GIVEN_PAIRS = "The pairs that were given."

_LISTED = 100  # identities in JSON, the worst first


@dataclass(frozen=True, eq=False)
class VerificationReport:
    """Telling matching from non-matching pairs by their scores.

    Attributes:
        overall: matching pairs against all others.
        kinds: matching pairs against the "random" and against the "skilled" ones apart; empty where there are none of
            the latter.
        identities: the errors of each identity at the threshold of `mistakes`, the worst first; empty where identities
            are not known.
        mistakes: the worst mistakes at the verifier's threshold or, without a verifier, at that of equal error rates,
            a posteriori (against skilled forgeries where there are some).
        decision: the verifier's error rates; None without one.
        probabilities: of the verifier; None without one.
        raw_probabilities: for comparison, of (1 + cosine) / 2 taken as a probability; None without a verifier, or
            where scores are no cosines.
        protocol: how the pairs were made, in words.
    """

    overall: Separation
    kinds: dict[str, Separation]
    identities: tuple[IdentityErrors, ...]
    mistakes: Mistakes
    decision: DecisionErrors | None = None
    probabilities: ProbabilityErrors | None = None
    raw_probabilities: ProbabilityErrors | None = None
    protocol: str = GIVEN_PAIRS

    @property
    def eer(self) -> float:
        """Equal error rate over all pairs."""
        return self.overall.eer.value

    @property
    def eer_interval(self) -> Interval | None:
        """Its 95 % bootstrap interval over identities; None as in `definitions`."""
        return self.overall.eer.interval

    @property
    def eer_threshold(self) -> float:
        """Where the equal error rate is reached, a posteriori."""
        return self.overall.eer_threshold

    @property
    def auc(self) -> float:
        """Area under the ROC curve over all pairs."""
        return self.overall.auc.value

    @property
    def tar_at_far(self) -> dict[float, float | None]:
        """True-accept rate at each false-accept rate over all pairs; None where the rate cannot be seen."""
        return {far: None if tar is None else tar.value for far, tar in self.overall.tar_at_far.items()}

    @property
    def matches(self) -> int:
        """How many matching pairs."""
        return self.overall.matches

    @property
    def non_matches(self) -> int:
        """How many non-matching pairs."""
        return self.overall.non_matches

    @property
    def mean_identity_eer(self) -> float | None:
        """The mean of the equal error rates of single identities, each at its own threshold; None where unknown."""
        own = [one.eer for one in self.identities if one.eer is not None]
        return float(np.mean(own)) if own else None

    @property
    def definitions(self) -> dict[str, str]:
        """What the figures mean, in words."""
        return {name: text for name, text in _DEFINITIONS.items() if name in _told(self)} | {"pairs": self.protocol}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it, under the names that papers use."""
        document: dict[str, Any] = self.overall.to_dict()
        for kind, separation in self.kinds.items():
            document[kind] = separation.to_dict()
        document["mean_identity_eer"] = self.mean_identity_eer
        if self.decision is not None:
            document["decision"] = self.decision.to_dict()
        for name, errors in (("probabilities", self.probabilities), ("raw_probabilities", self.raw_probabilities)):
            if errors is not None:
                document[name] = errors.to_dict()
        document["identities"] = [one.to_dict() for one in self.identities[:_LISTED]]
        return document


def evaluate_verification(
    scores: ArrayLike,
    is_match: ArrayLike,
    *,
    identities: ArrayLike | None = None,
    skilled: ArrayLike | None = None,
    calibration: Calibration | None = None,
    fars: Sequence[float] = FARS,
    rounds: int = 100,
    seed: int = 0,
) -> VerificationReport:
    """Measure how well scores tell matching from non-matching pairs.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        identities: (P, 2) whom the two images of each pair show, numbers or strings, and of a skilled forgery twice
            whom it imitates; needed for the intervals.
        skilled: (P,) bool, which pairs are skilled forgeries; None if that is not known.
        calibration: of a verifier that is to be judged on these pairs.
        fars: false-accept rates to report the true-accept rate at.
        rounds: draws of the bootstrap intervals.
        seed: of these draws.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match`, `identities` or `skilled` does not fit, or there is one kind of pair only.
    """
    pairs = EvaluatedPairs.named(scores, is_match, identities, skilled)
    return evaluate_pairs(pairs, calibration=calibration, fars=fars, rounds=rounds, seed=seed)


def evaluate_pairs(
    pairs: EvaluatedPairs,
    *,
    calibration: Calibration | None = None,
    fars: Sequence[float] = FARS,
    protocol: str = GIVEN_PAIRS,
    rounds: int = 100,
    seed: int = 0,
) -> VerificationReport:
    """Measure scored pairs; arguments and errors are as in `evaluate_verification`.

    Args:
        pairs: with what is known of them.
        calibration: of a verifier that is to be judged on these pairs.
        fars: false-accept rates to report the true-accept rate at.
        protocol: how the pairs were made, in words.
        rounds: draws of the bootstrap intervals.
        seed: of these draws.
    """
    everything = np.ones(len(pairs), dtype=np.bool_)
    overall = separate(pairs, everything, fars=fars, rounds=rounds, seed=seed)
    kinds = {
        kind: separate(pairs, pairs.is_match | chosen, fars=fars, rounds=rounds, seed=seed)
        for kind, chosen in pairs.kinds.items()
    }
    a_posteriori = kinds.get("skilled", overall).eer_threshold
    threshold = a_posteriori if calibration is None else calibration.threshold
    decision = probabilities = raw_probabilities = None
    if calibration is not None:
        decision = judge_decisions(pairs, calibration, rounds=rounds, seed=seed)
        probabilities = judge_probabilities(pairs, calibration)
        if np.abs(pairs.scores).max() <= 1:  # those of some rules for references are no cosines
            raw_probabilities = judge_probabilities(pairs, calibration, raw=True)
    return VerificationReport(
        overall=overall,
        kinds=kinds,
        identities=identity_errors(pairs, threshold),
        mistakes=worst_mistakes(pairs, threshold),
        decision=decision,
        probabilities=probabilities,
        raw_probabilities=raw_probabilities,
        protocol=protocol,
    )


_DEFINITIONS = {
    "match": "A pair matches when both images are genuine images of one identity.",
    "accept": "A pair is accepted when its score, the cosine of the two embeddings, is at least the threshold.",
    "FAR, FRR": "The false-accept rate is the share of non-matching pairs that is accepted, the false-reject rate the "
    "share of matching pairs that is not; the true-accept rate is TAR = 1 - FRR.",
    "EER": "The equal error rate is where FAR = FRR as the threshold moves, between two scores on a straight line. Its "
    "threshold is chosen a posteriori, on these very pairs.",
    "TAR@FAR": "The highest TAR whose FAR, on these very pairs, is at most the rate named: a posteriori, without "
    "interpolation. Left out where there are fewer than 1 / rate non-matching pairs.",
    "AUC": "The chance that a matching pair scores higher than a non-matching one, a tie counting half.",
    "random, skilled": "A random non-matching pair shows two identities; in a skilled forgery one image imitates the "
    "identity of the other. Figures without either word are over both, in the numbers in which they are here.",
    "mean identity EER": "The mean of the equal error rates of single identities, each at its own threshold a "
    "posteriori, over their own pairs: against the skilled forgeries where there are some.",
    "decision": "Error rates at the verifier's threshold, which was chosen on other pairs, a priori. The interval "
    "that is expected is the one in which the verifier said that FAR would lie on so many other identities: of fewer "
    "the rate varies more, so that it is then not said whether the rate is as expected.",
    "probability": "Brier score: mean squared error. Log-loss: mean of -ln(probability of what was the case). ECE: "
    "mean distance between stated probability and observed share of matches in 15 bins of equal width. Both kinds of "
    "pair are weighted to the share of matches that the probability supposes.",
    "intervals": "95 % bootstrap over identities: what another draw of as many identities could have given. None where "
    "identities are unknown or fewer than nine, or where every draw gives the same figure, as without any error. That "
    "of a verifier's rate is at least as wide as Wilson's for so many independent pairs.",
}


def _told(report: VerificationReport) -> set[str]:
    left_out = set()
    if not report.kinds:
        left_out.add("random, skilled")
    if report.mean_identity_eer is None:
        left_out.add("mean identity EER")
    if report.decision is None:
        left_out |= {"decision", "probability"}
    return set(_DEFINITIONS) - left_out
