"""From raw scores to a decision: a threshold for a wanted false-accept rate, and a probability for each score.

The threshold is chosen on labelled pairs, and the rates `far` and `frr` are those of the same pairs, a posteriori. What
other identities will show is told by the intervals: they redo the choice on identities drawn anew (see
`vitembed.verify.unseen`). They speak of identities from where these came from; the further the data are from
these, and the more the model was trained on these very identities, the less they hold.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from vitembed import metrics
from vitembed.errors import DataError, VerifierError, unknown_name
from vitembed.verify import fields
from vitembed.verify.curves import KINDS, Curve, check_prior, curve_from_dict, curve_to_dict
from vitembed.verify.fitting import choose_curve
from vitembed.verify.scored import AGAINST, ScoredPairs
from vitembed.verify.thresholds import check_enough, impostors_needed, reject_below
from vitembed.verify.unseen import Interval, check_test_identities, predict_acceptance, sides_of

__all__ = ["Calibration", "Verdict", "Wanted", "calibrate", "impostors_needed"]

Verdict: TypeAlias = Literal["match", "no match", "unsure"]


@dataclass(frozen=True)
class Calibration:
    """A threshold, the error rates measured with it, and the curve from score to probability.

    Random non-matching pairs show two identities. In a skilled one (a skilled forgery), one image imitates the other's
    identity. `far` is the rate of the kind that the threshold was chosen `against`; both kinds are measured apart.

    The intervals are 95 % intervals of the rate that other identities, `interval_identities` of them, would show with
    this threshold, which is itself uncertain: both are drawn anew (see `vitembed.verify.unseen`). Where identities
    are not known, other pairs take their place, as if independent: too narrow where pairs share images. None where the
    pairs of that kind, or those that the threshold was chosen on, show fewer identities than
    `vitembed.metrics.IDENTITIES_NEEDED` (nobody knows then), and without such pairs.

    Attributes:
        threshold: a pair is accepted when its score is at least this.
        far_wanted: the false-accept rate that was asked for, in (0, 1).
        far: the measured false-accept rate of the pairs of `against`, at most `far_wanted`.
        far_interval: of `far`.
        frr: the measured false-reject rate: the share of matching pairs that is not accepted, the unsure ones among
            them.
        frr_interval: of `frr`.
        eer: the equal error rate of the matching pairs against those of `against`; its threshold is another one.
        matches: how many matching pairs were used.
        non_matches: how many non-matching pairs were used, of both kinds.
        curve: from score to probability: of a match, against the pairs of `against`.
        identities: how many identities the pairs show; None where that is not known.
        against: "skilled", "random" or "all": the non-matching pairs that the threshold and the curve were chosen on.
        random: how many of the non-matching pairs are random; None where the kinds are not told apart.
        skilled: how many of them are skilled; None likewise.
        far_random: the measured false-accept rate of random pairs; None where none are known.
        far_random_interval: of `far_random`.
        far_skilled: the measured false-accept rate of skilled pairs; None where none are known.
        far_skilled_interval: of `far_skilled`.
        frr_wanted: the share of matching pairs that may be called "no match"; None where none was asked for.
        reject_below: scores below it are "no match", and from it up to the threshold "unsure"; None: there is no such
            band, and all scores below the threshold are "no match".
        unsure_matches: the share of matching pairs that is "unsure".
        unsure_non_matches: the share of the pairs of `against` that is "unsure".
        interval_identities: how many other identities the intervals are for; None where identities are not known (as
            many other pairs then) or there are no intervals.
        candidates: what cross-validation found of each kind of curve: {kind: {"log_loss": nats, "ece": share}}.
        protocol: how all this was chosen, in words.
    """

    threshold: float
    far_wanted: float
    far: float
    far_interval: Interval | None
    frr: float
    frr_interval: Interval | None
    eer: float
    matches: int
    non_matches: int
    curve: Curve
    identities: int | None = None
    against: str = "all"
    random: int | None = None
    skilled: int | None = None
    far_random: float | None = None
    far_random_interval: Interval | None = None
    far_skilled: float | None = None
    far_skilled_interval: Interval | None = None
    frr_wanted: float | None = None
    reject_below: float | None = None
    unsure_matches: float = 0.0
    unsure_non_matches: float = 0.0
    interval_identities: int | None = None
    candidates: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    protocol: str = ""

    @property
    def prior(self) -> float:
        """The share of matching pairs that the probability supposes, in (0, 1)."""
        return self.curve.prior

    def verdict(self, score: float) -> Verdict:
        """Return the decision on one finite score: "match", "no match" or "unsure"."""
        if score >= self.threshold:
            return "match"
        return "unsure" if self.reject_below is not None and score >= self.reject_below else "no match"

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()} | {
            "curve": curve_to_dict(self.curve),
            "candidates": {k: dict(v) for k, v in self.candidates.items()},
        }

    @classmethod
    def from_dict(cls, values: object) -> "Calibration":
        """Return the calibration that `to_dict` wrote.

        Raises:
            VerifierError: a key is unknown or missing, or a value is not what it must be.
        """
        return _parse(values)


@dataclass(frozen=True)
class Wanted:
    """What a calibration is asked for; the attributes are described at `calibrate`.

    Raises:
        ConfigError: one is out of range or unknown.
    """

    far: float = 0.01
    frr: float | None = None
    against: str | None = None
    prior: float = 0.5
    curve: str = "auto"
    test_identities: int | None = None

    def __post_init__(self) -> None:
        check_prior(self.prior)
        check_test_identities(self.test_identities)
        if self.curve not in ("auto", *KINDS):
            raise unknown_name("curve", self.curve, ("auto", *KINDS))

    def check_support(self, pairs: ScoredPairs) -> str:
        """Return the kind of non-matching pair to choose the threshold on, whose number does not depend on scores.

        Raises:
            ConfigError: a rate is out of range, or the kind unknown.
            DataError: there is no pair of that kind.
            VerifierError: too few pairs for the wanted rates.
        """
        kinds = pairs.kinds
        chosen = pairs.against(self.against)
        check_enough("false-accept", self.far, int(np.count_nonzero(kinds[chosen])), _describe(chosen))
        if self.frr is not None:
            check_enough("false-reject", self.frr, int(np.count_nonzero(kinds["matching"])), "matching pairs")
        return chosen


def calibrate(
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
    seed: int = 0,
) -> Calibration:
    """Choose the threshold for a false-accept rate, the unsure band if one is wanted, and the probability.

    Args:
        scores: (P,) finite, higher is more alike; of any range.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        far: the wanted false-accept rate of the pairs of `against`, in (0, 1).
        frr: the share of matching pairs that may be called "no match", in (0, 1). Where the threshold refuses more of
            them, the best of these become "unsure". None: no pair is ever unsure.
        identities: (P, 2) whom the two images of each pair show, for the intervals and the choice of the curve; for
            a skilled pair twice the identity that is imitated. None if not known.
        skilled: (P,) booleans: which of the non-matching pairs are skilled. None if not known.
        against: "skilled", "random" or "all": the non-matching pairs on which the threshold is chosen and against which
            the probability is meant. By default "skilled" where there are skilled pairs, else "all".
        prior: the share of matching pairs where the verifier will be used; it moves the probability alone.
        curve: "logistic", "likelihood ratio", "isotonic", or "auto": see `vitembed.verify.fitting.choose_curve`.
        test_identities: for how many other identities the intervals are; as many as here by default.
        seed: of the draws for the intervals, and of the folds.

    Raises:
        ConfigError: a setting is out of range or unknown.
        VectorError: scores are no finite (P,) array.
        DataError: `is_match`, `identities` or `skilled` does not fit, there is one kind of pair only or no pair of
            `against`, or `test_identities` is given without `identities`.
        VerifierError: too few pairs for these rates (see `impostors_needed`), or matching pairs do not score higher
            than the others.
    """
    wanted = Wanted(far, frr, against, prior, curve, test_identities)
    pairs = ScoredPairs.check(scores, is_match, identities, skilled)
    if test_identities is not None and pairs.identities is None:
        raise DataError("test_identities needs the identities of the pairs; they are not known")
    chosen = wanted.check_support(pairs)
    threshold = metrics.threshold_at_far(pairs.scores[pairs.kinds[chosen]], far)
    band = None if frr is None else reject_below(pairs.scores[pairs.is_match], frr, threshold)
    judged = pairs.take(pairs.is_match | pairs.kinds[chosen])
    fitted, candidates = choose_curve(
        judged.scores,
        judged.is_match,
        None if pairs.identities is None else judged.codes,
        prior=prior,
        kinds=tuple(KINDS) if curve == "auto" else (curve,),
        seed=seed,
    )
    intervals = predict_acceptance(sides_of(pairs), chosen, far, test_identities, seed=seed)
    return Calibration(
        threshold=threshold,
        far_wanted=float(far),
        eer=metrics.equal_error_rate(judged.scores, judged.is_match)[0],
        curve=fitted,
        identities=pairs.identities,
        against=chosen,
        frr_wanted=None if frr is None else float(frr),
        reject_below=band,
        interval_identities=(test_identities or pairs.identities) if intervals else None,
        candidates=candidates,
        protocol=_protocol(pairs, chosen, test_identities, intervals, fitted.kind, candidates),
        **_counts(pairs),
        **_rates(pairs, chosen, threshold, intervals),
        **_unsure(judged, band, threshold),
    )


def _describe(kind: str) -> str:
    return "non-matching pairs" if kind == "all" else f"{kind} non-matching pairs"


def _counts(pairs: ScoredPairs) -> dict[str, Any]:
    kinds = {kind: int(np.count_nonzero(mask)) for kind, mask in pairs.kinds.items()}
    apart = {kind: None if pairs.skilled is None else kinds.get(kind, 0) for kind in ("random", "skilled")}
    return {"matches": kinds["matching"], "non_matches": kinds["all"], **apart}


def _rates(pairs: ScoredPairs, chosen: str, threshold: float, accepted: Mapping[str, Interval]) -> dict[str, Any]:
    """Return the measured rates, and from the intervals of the accepted shares theirs."""
    measured = {kind: float(np.mean(pairs.scores[mask] >= threshold)) for kind, mask in pairs.kinds.items()}
    rates: dict[str, Any] = {
        "far": measured[chosen],
        "far_interval": accepted.get(chosen),
        "frr": float(np.mean(pairs.scores[pairs.is_match] < threshold)),
        "frr_interval": None,
    }
    if "matching" in accepted:
        low, high = accepted["matching"]
        rates["frr_interval"] = (1 - high, 1 - low)
    for kind in ("random", "skilled"):
        rates |= {f"far_{kind}": measured.get(kind), f"far_{kind}_interval": accepted.get(kind)}
    return rates


def _unsure(judged: ScoredPairs, band: float | None, threshold: float) -> dict[str, Any]:
    between = np.zeros(judged.scores.size, dtype=np.bool_)
    if band is not None:
        between = (judged.scores >= band) & (judged.scores < threshold)
    return {
        "unsure_matches": float(np.mean(between[judged.is_match])),
        "unsure_non_matches": float(np.mean(between[~judged.is_match])),
    }


def _protocol(
    pairs: ScoredPairs,
    chosen: str,
    test_identities: int | None,
    predicted: Mapping[str, Interval],
    kind: str,
    candidates: Mapping[str, Mapping[str, float]],
) -> str:
    """Say in words how the threshold, the intervals and the curve came about."""
    units = "pairs, as if independent" if pairs.identities is None else "identities"
    met = f"{test_identities or int(pairs.codes.max()) + 1:,} other {units}"
    parts = [f"threshold chosen a posteriori on these pairs, against {'all ' * (chosen == 'all')}{_describe(chosen)}"]
    if not predicted:
        parts.append(f"no intervals, as there are too few identities with {_describe(chosen)}")
    else:
        parts.append(f"intervals: 95 % of the rates of {met}, the choice of the threshold redone (bootstrap)")
        if chosen not in predicted:
            parts.append(f"none of the false-accept rate, as too few of {met} would have {_describe(chosen)}")
    parts.append(f"{kind} curve" + (f" chosen by cross-validation over {units}" if len(candidates) > 1 else ""))
    return "; ".join(parts)


# Back from JSON ------------------------------------------------------------------------------------------


def _parse(values: object) -> Calibration:
    checked = fields.check_keys(values, [field.name for field in dataclasses.fields(Calibration)], "calibration")
    read: dict[str, Any] = dict(checked)
    for key in ("far_wanted", "far", "frr", "eer", "unsure_matches", "unsure_non_matches"):
        read[key] = fields.share(key, checked[key])
    for key in ("far_random", "far_skilled", "frr_wanted"):
        read[key] = None if checked[key] is None else fields.share(key, checked[key])
    for key in ("far_interval", "frr_interval", "far_random_interval", "far_skilled_interval"):
        read[key] = None if checked[key] is None else fields.interval(key, checked[key])
    for key in ("matches", "non_matches"):
        read[key] = fields.count(key, checked[key], 1)
    for key, low in (("identities", 1), ("interval_identities", 1), ("random", 0), ("skilled", 0)):
        read[key] = None if checked[key] is None else fields.count(key, checked[key], low)
    read["threshold"] = fields.number("threshold", checked["threshold"])
    if checked["reject_below"] is not None:
        read["reject_below"] = fields.number("reject_below", checked["reject_below"])
        if read["reject_below"] >= read["threshold"]:
            raise VerifierError(
                f"reject_below must be below the threshold {read['threshold']}; got {read['reject_below']}"
            )
    read["against"] = fields.one_of("against", checked["against"], AGAINST)
    read["protocol"] = fields.text("protocol", checked["protocol"])
    read["curve"] = curve_from_dict(checked["curve"])
    read["candidates"] = _parse_candidates(checked["candidates"])
    return Calibration(**read)


def _parse_candidates(values: object) -> dict[str, dict[str, float]]:
    if not isinstance(values, Mapping):
        raise VerifierError(f"candidates must be an object of curves; got {values!r}")
    read = {}
    for kind, figures in values.items():
        fields.one_of("a candidate", kind, tuple(KINDS))
        checked = fields.check_keys(figures, ["log_loss", "ece"], kind)
        read[kind] = {
            "log_loss": fields.number("log_loss", checked["log_loss"], 0),
            "ece": fields.share("ece", checked["ece"]),
        }
    return read
