"""What a verifier's decisions and its probabilities are worth on pairs that it was not made on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate.figures import Figure, Interval, flatten
from vitembed.evaluate.scored import Bools, EvaluatedPairs
from vitembed.evaluate.separation import intervals_over
from vitembed.verify.calibration import Calibration

_KINDS = {"skilled": "skilled forgeries", "random": "random pairs", "all": "non-matching pairs"}


@dataclass(frozen=True)
class DecisionErrors:
    """What a verifier's threshold, chosen on other pairs, does with these.

    Attributes:
        threshold: of the verifier.
        far: the false-accept rate, over the kind of pair in `against`.
        frr: the false-reject rate: the share of matching pairs that is not accepted.
        far_random: the share of random non-matching pairs that is accepted; None where kinds are not known.
        far_skilled: the share of skilled forgeries that is accepted; None where kinds are not known.
        unsure: the share of all pairs that the verifier calls unsure; None if it always decides.
        against: "skilled", "random" or "all": the kind that the threshold was chosen against; "all" where none of that
            kind is known among these pairs.
        chosen_against: the kind that the threshold was chosen against.
        far_wanted: the false-accept rate that the threshold was chosen for.
        far_expected: the interval that the verifier gave for the rate on other identities; None where it gave none, or
            none for this kind of pair.
        expected_for: how many other identities that interval is for; None if that is not known.
        judged: how many identities the pairs of `far` show; None if that is not known.
    """

    threshold: float
    far: Figure
    frr: Figure
    far_random: Figure | None
    far_skilled: Figure | None
    unsure: float | None
    against: str
    chosen_against: str
    far_wanted: float
    far_expected: Interval | None
    expected_for: int | None
    judged: int | None

    @property
    def as_expected(self) -> bool | None:
        """Whether the measured false-accept rate lies in the interval that the verifier gave.

        None without an interval, and where it is for more identities than are judged, or nobody knows how many these
        are: the rate of fewer varies more than the interval says.
        """
        if self.far_expected is None:
            return None
        if self.expected_for is not None and (self.judged is None or self.judged < self.expected_for):
            return None
        return self.far_expected[0] <= self.far.value <= self.far_expected[1]

    @property
    def choice(self) -> str:
        """What the threshold was chosen for, in words."""
        chosen = (
            f"Its threshold, {self.threshold:.4f}, was chosen when the verifier was made, for a false-accept rate of "
        )
        chosen += f"{self.far_wanted:.2%}"
        if self.against == self.chosen_against:
            return f"{chosen} against {self.against} non-matching pairs."
        return (
            f"{chosen} of {_KINDS[self.chosen_against]}. None are known here: the rate is that of all non-matching "
            "pairs, for which the verifier expected nothing."
        )

    @property
    def expectation(self) -> str | None:
        """Whether the rate is as the verifier expected, and for how many identities, in words; None without that."""
        if self.far_expected is None:
            return None
        low, high = self.far_expected
        expected = f"It expected {low:.2%} to {high:.2%} on "
        expected += "other pairs" if self.expected_for is None else f"{self.expected_for:,} other identities"
        judged = "an unknown number" if self.judged is None else f"{self.judged:,}"
        if self.as_expected is None:
            return f"{expected}. Judged are {judged}, so that the measured rate cannot be compared with that interval."
        here = "" if self.judged is None else f", of {judged} identities,"
        return f"{expected}; the measured rate{here} lies {'in' if self.as_expected else 'outside'} that interval."

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        rates = {"far": self.far, "frr": self.frr, "far_random": self.far_random, "far_skilled": self.far_skilled}
        return {
            "threshold": self.threshold,
            **flatten({name: rate for name, rate in rates.items() if rate is not None}),
            "unsure": self.unsure,
            "against": self.against,
            "chosen_against": self.chosen_against,
            "far_wanted": self.far_wanted,
            "far_expected": None if self.far_expected is None else list(self.far_expected),
            "expected_for": self.expected_for,
            "judged": self.judged,
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


def judge_decisions(
    pairs: EvaluatedPairs, calibration: Calibration, *, rounds: int = 100, seed: int = 0
) -> DecisionErrors:
    """Measure what a verifier's threshold does with pairs; intervals are over identities, in `rounds` draws by seed."""
    against = _against(pairs, calibration)
    known = against == calibration.against
    others = pairs.kinds.get(against, ~pairs.is_match)
    accepted = pairs.at_least(calibration.threshold)
    chosen = {"far": others, "frr": pairs.is_match, **{f"far_{kind}": those for kind, those in pairs.kinds.items()}}
    wrong = accepted != pairs.is_match
    rates = {name: _rate(wrong, those, pairs, rounds, seed) for name, those in chosen.items()}
    unsure = None
    if calibration.reject_below is not None:
        unsure = float(np.mean(~accepted & pairs.at_least(calibration.reject_below)))
    return DecisionErrors(
        threshold=calibration.threshold,
        far=rates["far"],
        frr=rates["frr"],
        far_random=rates.get("far_random"),
        far_skilled=rates.get("far_skilled"),
        unsure=unsure,
        against=against,
        chosen_against=calibration.against,
        far_wanted=calibration.far_wanted,
        far_expected=calibration.far_interval if known else None,
        expected_for=calibration.interval_identities if known else None,
        judged=None if pairs.identities is None else int(np.unique(pairs.identities[others]).size),
    )


def judge_probabilities(pairs: EvaluatedPairs, calibration: Calibration, *, raw: bool = False) -> ProbabilityErrors:
    """Measure a verifier's probabilities; with `raw`, for comparison, (1 + score) / 2 taken as a probability."""
    chosen = pairs.is_match | pairs.kinds.get(_against(pairs, calibration), ~pairs.is_match)
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


def _against(pairs: EvaluatedPairs, calibration: Calibration) -> str:
    """Return the kind that a threshold was chosen against; "all" where none of that kind is known."""
    same = calibration.against in pairs.kinds or (calibration.against == "random" and not pairs.kinds)
    return calibration.against if same else "all"


def _rate(wrong: Bools, chosen: Bools, pairs: EvaluatedPairs, rounds: int, seed: int) -> Figure:
    """Return the share of wrong decisions among the chosen pairs."""
    errors = wrong[chosen].astype(np.float64)
    names = None if pairs.identities is None else pairs.identities[chosen]
    intervals = intervals_over(lambda weights: _weighted_mean(errors, weights), names, rounds=rounds, seed=seed)
    interval = intervals.get("rate")
    if interval is not None:  # where no error was seen, every draw would say 0
        least, most = metrics.wilson_interval(int(errors.sum()), errors.size)
        interval = min(interval[0], least), max(interval[1], most)
    return Figure(float(np.mean(errors)), interval)


def _weighted_mean(errors: NDArray[np.float64], weights: NDArray[np.int64]) -> dict[str, float]:
    total = weights.sum()
    if total == 0:
        raise DataError("the draw holds no such pair")
    return {"rate": float(weights @ errors / total)}
