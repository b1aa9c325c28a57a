"""Verification: how well scores part matching from non-matching pairs, and what a verifier's decisions are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate.figures import Figure, Interval, flatten
from vitembed.evaluate.mistakes import IdentityErrors, Mistakes, identity_errors, worst_mistakes
from vitembed.evaluate.scored import Bools, EvaluatedPairs
from vitembed.evaluate.separation import FARS, Separation, intervals_over, separate
from vitembed.verify.calibration import Calibration

ALL_PAIRS = "All pairs of the images, or of a random part of them."
GIVEN_PAIRS = "The pairs that were given."

_LISTED = 100  # identities in JSON, the worst first


@dataclass(frozen=True)
class DecisionErrors:
    """What a verifier's threshold, chosen on other pairs, does with these.

    Attributes:
        threshold: of the verifier.
        far: the false-accept rate, over the kind of pair that the threshold was chosen against.
        frr: the false-reject rate: the share of matching pairs that is not accepted.
        far_random: the share of random non-matching pairs that is accepted; None where kinds are not known.
        far_skilled: the share of skilled forgeries that is accepted; None where kinds are not known.
        unsure: the share of all pairs that the verifier calls unsure; None if it always decides.
        against: "skilled", "random" or "all": the kind that the threshold was chosen against.
        far_wanted: the false-accept rate that the threshold was chosen for.
        far_expected: the interval that the verifier gave for the rate on other identities; None where it gave none.
        expected_for: how many other identities that interval is for; None if that is not known.
    """

    threshold: float
    far: Figure
    frr: Figure
    far_random: Figure | None
    far_skilled: Figure | None
    unsure: float | None
    against: str
    far_wanted: float
    far_expected: Interval | None
    expected_for: int | None

    @property
    def as_expected(self) -> bool | None:
        """Whether the measured false-accept rate lies in the interval that the verifier gave; None without one."""
        if self.far_expected is None:
            return None
        return self.far_expected[0] <= self.far.value <= self.far_expected[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        rates = {"far": self.far, "frr": self.frr, "far_random": self.far_random, "far_skilled": self.far_skilled}
        return {
            "threshold": self.threshold,
            **flatten({name: rate for name, rate in rates.items() if rate is not None}),
            "unsure": self.unsure,
            "against": self.against,
            "far_wanted": self.far_wanted,
            "far_expected": None if self.far_expected is None else list(self.far_expected),
            "expected_for": self.expected_for,
            "as_expected": self.as_expected,
        }


@dataclass(frozen=True, eq=False)
class ProbabilityErrors:
    """How good probabilities of a match are, with both kinds of pair weighted to the share that these suppose.

    Attributes:
        brier: mean squared error, 0 at best.
        log_loss: mean of -log(probability of what was the case), natural; 0 at best.
        ece: expected calibration error: how far stated and observed shares of matches are apart.
        prior: the share of matching pairs that the probabilities suppose.
        reliability: stated and observed shares in bins, for a diagram.
    """

    brier: float
    log_loss: float
    ece: float
    prior: float
    reliability: metrics.ReliabilityCurve

    def to_dict(self) -> dict[str, float]:
        """Return the figures as JSON takes them."""
        return {"brier": self.brier, "log_loss": self.log_loss, "ece": self.ece, "prior": self.prior}


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
        """Its 95 % bootstrap interval over identities; None where these are not known or fewer than nine."""
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
    cosines = bool(np.abs(pairs.scores).max() <= 1)  # those of some rules for references are not
    return VerificationReport(
        overall=overall,
        kinds=kinds,
        identities=identity_errors(pairs, threshold),
        mistakes=worst_mistakes(pairs, threshold),
        decision=None if calibration is None else _judge(pairs, calibration, rounds, seed),
        probabilities=None if calibration is None else _probabilities(pairs, calibration),
        raw_probabilities=_probabilities(pairs, calibration, raw=True) if calibration is not None and cosines else None,
        protocol=protocol,
    )


def _judge(pairs: EvaluatedPairs, calibration: Calibration, rounds: int, seed: int) -> DecisionErrors:
    accepted = pairs.scores >= calibration.threshold
    chosen = {
        "far": _against(pairs, calibration),
        "frr": pairs.is_match,
        **{f"far_{kind}": those for kind, those in pairs.kinds.items()},
    }
    wrong = accepted != pairs.is_match
    rates = {name: _rate(wrong, those, pairs, rounds, seed) for name, those in chosen.items()}
    unsure = None
    if calibration.reject_below is not None:
        unsure = float(np.mean(~accepted & (pairs.scores >= calibration.reject_below)))
    return DecisionErrors(
        threshold=calibration.threshold,
        far=rates["far"],
        frr=rates["frr"],
        far_random=rates.get("far_random"),
        far_skilled=rates.get("far_skilled"),
        unsure=unsure,
        against=calibration.against,
        far_wanted=calibration.far_wanted,
        far_expected=calibration.far_interval,
        expected_for=calibration.interval_identities,
    )


def _against(pairs: EvaluatedPairs, calibration: Calibration) -> Bools:
    """Return the non-matching pairs of the kind that a threshold was chosen against; all where there are none."""
    return pairs.kinds.get(calibration.against, ~pairs.is_match)


def _rate(wrong: Bools, chosen: Bools, pairs: EvaluatedPairs, rounds: int, seed: int) -> Figure:
    """Return the share of wrong decisions among the chosen pairs."""
    errors = wrong[chosen].astype(np.float64)
    names = None if pairs.identities is None else pairs.identities[chosen]
    intervals = intervals_over(lambda weights: _weighted_mean(errors, weights), names, rounds=rounds, seed=seed)
    return Figure(float(np.mean(errors)), intervals.get("rate"))


def _weighted_mean(errors: NDArray[np.float64], weights: NDArray[np.int64]) -> dict[str, float]:
    total = weights.sum()
    if total == 0:
        raise DataError("the draw holds no such pair")
    return {"rate": float(weights @ errors / total)}


def _probabilities(pairs: EvaluatedPairs, calibration: Calibration, *, raw: bool = False) -> ProbabilityErrors:
    chosen = pairs.is_match | _against(pairs, calibration)
    scores, matching = pairs.scores[chosen], pairs.is_match[chosen]
    p: NDArray[np.float64] = np.clip((1 + scores) / 2, 0, 1) if raw else calibration.curve(scores)
    prior = 0.5 if raw else calibration.prior
    return ProbabilityErrors(
        brier=metrics.brier_score(p, matching, prior=prior),
        log_loss=metrics.log_loss(p, matching, prior=prior),
        ece=metrics.expected_calibration_error(p, matching, prior=prior),
        prior=prior,
        reliability=metrics.reliability_curve(p, matching, prior=prior),
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
    "decision": "Error rates at the verifier's threshold, which was chosen on other pairs, a priori. `expected` is the "
    "interval in which the verifier said that FAR would lie on other identities.",
    "probability": "Brier score: mean squared error. Log-loss: mean of -ln(probability of what was the case). ECE: "
    "mean distance between stated probability and observed share of matches in 15 bins of equal width. Both kinds of "
    "pair are weighted to the share of matches that the probability supposes.",
    "intervals": "95 % bootstrap over identities: what another draw of as many identities could have given. None where "
    "identities are unknown or fewer than nine.",
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
