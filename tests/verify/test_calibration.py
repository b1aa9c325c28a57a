import dataclasses
import json
import math

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError, VerifierError
from vitembed.verify.calibration import Calibration, calibrate
from vitembed.verify.fitting import choose_curve, fit_isotonic
from vitembed.verify.unseen import predicted_far_interval


def scored_pairs(matches=400, others=1200, gap=0.5, seed=0):
    rng = np.random.default_rng(seed)
    is_match = np.arange(matches + others) < matches
    return np.clip(0.2 * rng.normal(size=is_match.size) + gap * is_match, -1, 1), is_match


def signatures(writers=20, seed=0):
    """Return scores, is_match, identities and skilled of 20 genuine, 20 skilled and 30 random pairs a writer."""
    rng = np.random.default_rng(seed)
    kind = np.tile(np.repeat([0, 1, 2], [20, 20, 30]), writers)
    who = np.repeat(np.arange(writers), 70)
    other = np.where(kind == 2, (who + rng.integers(1, writers, size=who.size)) % writers, who)
    ease = 0.1 * rng.normal(size=writers)[who]
    scores = np.array([0.7, 0.4, 0.0])[kind] + np.where(kind == 1, ease, 0) + 0.15 * rng.normal(size=who.size)
    return scores, kind == 0, np.stack([who, other], axis=1), kind == 1


def test_calibration_reports_the_rates_that_its_threshold_has():
    scores, is_match = scored_pairs()
    result = calibrate(scores, is_match, far=0.02)
    accepted = scores >= result.threshold
    assert result.far == accepted[~is_match].mean() == 24 / 1200
    assert result.frr == pytest.approx(1 - accepted[is_match].mean())
    assert result.far_interval[0] < result.far < result.far_interval[1]
    assert result.frr_interval[0] < result.frr < result.frr_interval[1]
    assert result.eer == metrics.equal_error_rate(scores, is_match)[0]
    assert (result.matches, result.non_matches, result.far_wanted) == (400, 1200, 0.02)
    assert (result.against, result.random, result.skilled, result.identities) == ("all", None, None, None)
    assert result.interval_identities is None
    assert "1,600 other pairs, as if independent" in result.protocol
    assert (result.far_random, result.far_skilled) == (None, None)
    assert result.protocol.startswith("threshold chosen a posteriori on these pairs, against all non-matching pairs; ")


def test_random_and_skilled_rates_are_told_apart():
    scores, is_match, who, skilled = signatures()
    result = calibrate(scores, is_match, 0.05, identities=who, skilled=skilled)
    accepted = scores >= result.threshold
    rates = metrics.error_rates(scores, is_match, result.threshold, skilled)
    assert (result.far_random, result.far_skilled) == (rates.far_random, rates.far_skilled)
    assert (result.random, result.skilled, result.non_matches, result.identities) == (600, 400, 1000, 20)
    assert result.against == "skilled"
    assert result.far == result.far_skilled == accepted[skilled].mean() <= 0.05
    assert result.far_interval == result.far_skilled_interval
    assert result.far_random_interval[0] <= result.far_random <= result.far_random_interval[1]
    judged = is_match | skilled
    assert result.eer == metrics.equal_error_rate(scores[judged], is_match[judged])[0]
    assert result.far_interval == predicted_far_interval(scores[skilled], who[skilled], 0.05)


@pytest.mark.parametrize("against", ["skilled", "random", "all"])
def test_the_threshold_and_the_curve_are_those_of_the_chosen_pairs_alone(against):
    scores, is_match, who, skilled = signatures()
    chosen = {"skilled": skilled, "random": ~is_match & ~skilled, "all": ~is_match}[against]
    result = calibrate(scores, is_match, 0.05, identities=who, skilled=skilled, against=against)
    assert result.threshold == metrics.threshold_at_far(scores[chosen], 0.05)
    used = is_match | chosen
    expected = calibrate(scores[used], is_match[used], 0.05, identities=who[used])
    assert (result.threshold, result.curve, result.candidates) == (
        expected.threshold,
        expected.curve,
        expected.candidates,
    )
    assert result.against == against


def test_no_skilled_pair_at_all_is_another_thing_than_not_knowing():
    scores, is_match = scored_pairs()
    known = calibrate(scores, is_match, 0.05, skilled=np.zeros(1600, dtype=bool))
    assert (known.against, known.random, known.skilled) == ("all", 1200, 0)
    assert (known.far_random, known.far_skilled, known.far_skilled_interval) == (known.far, None, None)


def test_a_wanted_frr_makes_the_scores_between_unsure():
    scores, is_match, who, skilled = signatures()
    plain = calibrate(scores, is_match, 0.02, identities=who, skilled=skilled)
    banded = calibrate(scores, is_match, 0.02, frr=0.05, identities=who, skilled=skilled)
    assert plain.frr > 0.05
    assert banded.threshold == plain.threshold
    below, unsure = scores < banded.reject_below, (scores >= banded.reject_below) & (scores < banded.threshold)
    assert below[is_match].mean() <= 0.05
    assert banded.unsure_matches == unsure[is_match].mean() > 0
    assert banded.unsure_non_matches == unsure[skilled].mean()
    assert banded.frr == pytest.approx(below[is_match].mean() + banded.unsure_matches)
    verdicts = [banded.verdict(score) for score in scores]
    assert [v == "unsure" for v in verdicts] == unsure.tolist()
    assert [v == "match" for v in verdicts] == (scores >= banded.threshold).tolist()
    at, line = banded.reject_below, banded.threshold
    edges = [np.nextafter(at, -9), at, np.nextafter(line, -9), line]
    assert [banded.verdict(score) for score in edges] == ["no match", "unsure", "unsure", "match"]
    assert {plain.verdict(score) for score in scores} == {"match", "no match"}


def test_there_is_no_band_where_the_threshold_already_keeps_the_wanted_frr():
    scores, is_match = scored_pairs(gap=0.9)
    result = calibrate(scores, is_match, 0.05, frr=0.3)
    assert (result.frr_wanted, result.reject_below) == (0.3, None)
    assert (result.unsure_matches, result.unsure_non_matches) == (0, 0)
    assert result.verdict(result.threshold - 1e-9) == "no match"


def test_a_named_curve_is_taken_and_the_prior_moves_the_probability_alone():
    scores, is_match = scored_pairs()
    result = calibrate(scores, is_match, 0.1, curve="isotonic", prior=0.01)
    assert result.curve == fit_isotonic(scores, is_match, prior=0.01)
    assert (result.prior, result.candidates) == (0.01, {})
    even = calibrate(scores, is_match, 0.1, curve="isotonic")
    assert dataclasses.replace(result, curve=even.curve) == even


def test_the_curve_is_chosen_among_all_and_their_figures_are_kept():
    scores, is_match, who, _ = signatures()
    result = calibrate(scores, is_match, 0.1, identities=who)
    assert (result.curve, result.candidates) == choose_curve(scores, is_match, who)
    assert set(result.candidates) == {"logistic", "likelihood ratio", "isotonic"}
    assert result.protocol.endswith(f"{result.curve.kind} curve chosen by cross-validation over identities")


def test_scores_of_any_range_are_calibrated():
    scores, is_match, who, skilled = signatures()
    plain = calibrate(scores, is_match, 0.05, frr=0.05, identities=who, skilled=skilled)
    scaled = calibrate(100 * scores - 30, is_match, 0.05, frr=0.05, identities=who, skilled=skilled)
    assert scaled.threshold == pytest.approx(100 * plain.threshold - 30)
    assert scaled.far_interval == plain.far_interval
    assert scaled.curve(100 * scores - 30) == pytest.approx(plain.curve(scores), abs=0.02)


def test_the_intervals_hold_the_rates_of_writers_never_seen():
    inside = {"far_interval": 0, "frr_interval": 0, "far_random_interval": 0}
    for seed in range(40):
        scores, is_match, who, skilled = signatures(30, seed)
        found = calibrate(
            scores, is_match, 0.05, identities=who, skilled=skilled, test_identities=9, curve="logistic", seed=seed
        )
        met, match, _, forged = signatures(9, 1000 + seed)
        rates = metrics.error_rates(met, match, found.threshold, forged)
        for name, rate in zip(inside, (rates.far_skilled, rates.frr, rates.far_random), strict=True):
            low, high = getattr(found, name)
            inside[name] += low <= rate <= high
    assert min(inside.values()) >= 33  # of 40; at the nominal 95 % fewer come once in a thousand times
    assert found.interval_identities == 9
    assert "9 other identities" in found.protocol


def test_few_identities_give_no_interval_and_say_so():
    scores, is_match, who, skilled = signatures(8)
    found = calibrate(scores, is_match, 0.1, identities=who, skilled=skilled)
    assert (found.far_interval, found.frr_interval, found.far_random_interval) == (None, None, None)
    assert (found.identities, found.interval_identities, found.candidates) == (8, None, {})
    assert "no intervals, as there are too few identities" in found.protocol


def test_forgeries_of_few_of_many_identities_give_no_interval_and_say_so():
    scores, is_match, who, skilled = signatures(30)
    kept = ~skilled | (who[:, 0] < 2)
    found = calibrate(scores[kept], is_match[kept], 0.1, identities=who[kept], skilled=skilled[kept])
    assert (found.identities, found.skilled, found.against) == (30, 40, "skilled")
    assert (found.far_interval, found.frr_interval, found.far_random_interval) == (None, None, None)
    assert found.interval_identities is None
    assert "no intervals, as there are too few identities with skilled non-matching pairs" in found.protocol
    random = calibrate(scores[kept], is_match[kept], 0.1, identities=who[kept], skilled=skilled[kept], against="random")
    assert (random.far_skilled_interval, random.interval_identities) == (None, 30)
    assert random.far_interval == random.far_random_interval is not None


def test_a_single_identity_to_come_has_no_random_pair_and_so_no_interval_of_their_rate():
    scores, is_match, who, _ = signatures(20)
    random = is_match | (who[:, 0] != who[:, 1])
    found = calibrate(scores[random], is_match[random], 0.05, identities=who[random], test_identities=1)
    assert found.far_interval is None
    assert found.frr_interval is not None
    assert "; none of the false-accept rate, as too few of 1 other identities would have non-matching" in found.protocol


@pytest.mark.parametrize("settings", [{}, {"frr": 0.05, "curve": "isotonic", "prior": 0.2}])
@pytest.mark.parametrize("writers", [9, 12])
def test_a_calibration_comes_back_from_json_to_the_last_bit(settings, writers):
    scores, is_match, who, skilled = signatures(writers)
    result = calibrate(scores, is_match, 0.05, identities=who, skilled=skilled, **settings)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(document) == {field.name for field in dataclasses.fields(Calibration)}
    assert Calibration.from_dict(document) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"far_random": 1.2}, r"far_random must be in \[0, 1\]; got 1.2"),
        ({"far_skilled_interval": [0.2, 0.1]}, "far_skilled_interval must rise; got 0.2 and 0.1"),
        ({"frr_interval": [0.2]}, "frr_interval must hold two numbers"),
        ({"reject_below": 5}, "reject_below must be below the threshold"),
        ({"against": "some"}, "against must be one of skilled, random, all; got 'some'"),
        ({"skilled": -1}, "skilled must be a count of at least 0; got -1"),
        ({"identities": True}, "identities must be a count of at least 1; got True"),
        ({"candidates": [1]}, "candidates must be an object of curves"),
        ({"candidates": {"cubic": {}}}, "a candidate must be one of logistic, likelihood ratio, isotonic"),
        ({"candidates": {"logistic": {"log_loss": 1, "ec": 0}}}, "unknown key 'ec', the nearest is 'ece'"),
        ({"candidates": {"logistic": {"log_loss": -1, "ece": 0}}}, "log_loss must be in"),
        ({"curve": None}, "curve must be an object whose kind is one of"),
        ({"unsure_matches": None}, "unsure_matches must be a finite number; got None"),
        ({"unsure_maches": 0}, "unknown key 'unsure_maches', the nearest is 'unsure_matches'"),
    ],
)
def test_a_changed_calibration_is_one_clear_error(changes, message):
    document = calibrate(*scored_pairs(), 0.05).to_dict() | changes
    with pytest.raises(VerifierError, match=message) as caught:
        Calibration.from_dict(document)
    assert "\n" not in str(caught.value)


def test_too_few_pairs_of_a_kind_are_refused_with_the_number_that_is_needed():
    scores, is_match, who, skilled = signatures(10)
    with pytest.raises(VerifierError, match=r"rate of 0\.01 needs at least 300 skilled non-matching pairs .* got 200"):
        calibrate(scores, is_match, 0.01, identities=who, skilled=skilled)
    with pytest.raises(VerifierError, match="needs at least 3,000 random non-matching pairs"):
        calibrate(scores, is_match, 0.001, skilled=skilled, against="random")
    with pytest.raises(VerifierError, match=r"a false-reject rate of 0\.01 needs at least 300 matching pairs"):
        calibrate(scores, is_match, 0.05, frr=0.01, skilled=skilled)


def test_bad_settings_and_scores_are_one_clear_error():
    scores, is_match = scored_pairs()
    for far in (0, 1, -0.1, math.nan):
        with pytest.raises(ConfigError, match="false-accept rate must be above 0 and below 1"):
            calibrate(scores, is_match, far)
        with pytest.raises(ConfigError, match="false-reject rate must be above 0 and below 1"):
            calibrate(scores, is_match, frr=far)
    for prior in (0, 1, math.nan):
        with pytest.raises(ConfigError, match="prior"):
            calibrate(scores, is_match, prior=prior)
    with pytest.raises(ConfigError, match="did you mean 'logistic'"):
        calibrate(scores, is_match, curve="logistics")
    with pytest.raises(ConfigError, match="did you mean 'skilled'"):
        calibrate(scores, is_match, against="skiled")
    with pytest.raises(ConfigError, match="test_identities must be at least 1"):
        calibrate(scores, is_match, test_identities=0)
    with pytest.raises(DataError, match="test_identities needs the identities of the pairs"):
        calibrate(scores, is_match, test_identities=9)
    with pytest.raises(DataError, match=r"expected skilled non-matching pairs .* which pairs are skilled is not known"):
        calibrate(scores, is_match, against="skilled")
    with pytest.raises(DataError, match=r"expected skilled non-matching pairs .* there is none"):
        calibrate(scores, is_match, against="skilled", skilled=np.zeros(1600, dtype=bool))
    with pytest.raises(DataError, match="both kinds"):
        calibrate(scores, np.ones(1600, dtype=bool))
    with pytest.raises(VectorError, match="finite"):
        calibrate(np.where(is_match, np.nan, scores), is_match)
    with pytest.raises(VerifierError, match="do not score higher"):
        calibrate(-scores, is_match)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identities": np.zeros((5, 2), dtype=int)}, r"identities must have shape \(1600, 2\)"),
        ({"identities": np.zeros((1600, 2))}, "identities must be numbers or texts; got float64"),
        ({"skilled": np.zeros(5, dtype=bool)}, "skilled must hold one boolean for each of 1600 pairs"),
        ({"skilled": np.full(1600, 2)}, "skilled must hold one boolean"),
        ({"skilled": np.arange(1600) == 3}, "a skilled pair does not match; pair 3 is said to be both"),
    ],
)
def test_identities_and_kinds_that_do_not_fit_are_one_clear_error(changes, message):
    with pytest.raises(DataError, match=message):
        calibrate(*scored_pairs(), 0.05, **changes)
