import doctest
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError, VerifierError
from vitembed.verify import calibration
from vitembed.verify.calibration import Logistic, calibrate, fit_logistic, impostors_needed, threshold_for_far


def scored_pairs(matches=400, others=1200, gap=0.5, seed=0):
    rng = np.random.default_rng(seed)
    is_match = np.arange(matches + others) < matches
    return np.clip(0.2 * rng.normal(size=is_match.size) + gap * is_match, -1, 1), is_match


def test_examples_in_docstrings_hold():
    result = doctest.testmod(calibration)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_calibration_reports_the_rates_that_its_threshold_has():
    scores, is_match = scored_pairs()
    result = calibrate(scores, is_match, far=0.02)
    accepted = scores >= result.threshold
    assert result.far == accepted[~is_match].mean() == 24 / 1200
    assert result.frr == pytest.approx(1 - accepted[is_match].mean())
    assert result.far_interval == metrics.wilson_interval(24, 1200)
    assert result.frr_interval[0] < result.frr < result.frr_interval[1]
    assert result.eer == metrics.equal_error_rate(scores, is_match)[0]
    assert (result.matches, result.non_matches, result.far_wanted) == (400, 1200, 0.02)
    assert result.protocol == "threshold chosen a posteriori on these pairs"


@pytest.mark.parametrize("far", [0.01, 0.013, 0.05, 0.5])
def test_threshold_is_the_smallest_that_keeps_the_rate(far):
    impostors = np.random.default_rng(0).normal(size=1000).round(2)
    threshold = threshold_for_far(impostors, far)
    assert np.mean(impostors >= threshold) <= far
    assert np.mean(impostors >= impostors[impostors < threshold].max()) > far


@pytest.mark.parametrize("far", [0.3, 0.1, 0.07, 0.05, 0.01, 0.003, 0.001])
def test_the_rule_of_three_bounds_an_error_free_threshold(far):
    needed = impostors_needed(far)
    # The definition of the rule: with rate `far`, n trials all come out well with a chance of at most 5 %.
    assert (1 - far) ** needed <= 0.05
    assert needed == math.ceil(round(3 / far, 6))
    scores = np.linspace(-1, 1, needed)
    threshold_for_far(scores, far)
    with pytest.raises(
        VerifierError, match=rf"needs at least {needed:,} non-matching pairs \(3 / rate\); got {needed - 1:,}"
    ):
        threshold_for_far(scores[1:], far)


@pytest.mark.parametrize("count", [4, 7, 199, 230, 299])
def test_the_rate_that_a_refusal_names_is_accepted(count):
    scores = np.linspace(-1, 1, count)
    with pytest.raises(VerifierError) as caught:
        threshold_for_far(scores, 0.01)
    named = float(str(caught.value).rsplit(" ", 1)[1])
    assert threshold_for_far(scores, named) <= 1.001
    assert named < 1.1 * 3 / count  # and not far above what was possible


def test_a_handful_of_pairs_is_refused_without_naming_a_rate():
    with pytest.raises(VerifierError, match=r"got 3\. Add pairs$"):
        threshold_for_far([0.1, 0.2, 0.3], 0.01)


def test_the_fit_equals_scikit_learn_on_platts_targets():
    # A target of t is t of a positive and 1 - t of a negative at the same score.
    scores, is_match = scored_pairs(60, 300)
    high, low = 61 / 62, 1 / 302
    target = np.where(is_match, high, low)
    weight = np.where(is_match, 0.5 / 60, 0.5 / 300)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    x = np.concatenate([scores, scores])[:, None]
    peer.fit(x, np.repeat([1, 0], 360), sample_weight=1000 * np.concatenate([weight * target, weight * (1 - target)]))
    fitted = fit_logistic(scores, is_match)
    assert fitted.slope == pytest.approx(peer.coef_[0, 0], rel=1e-4)
    assert fitted.offset == pytest.approx(peer.intercept_[0], rel=1e-4)


def test_probability_rises_with_the_score_and_stays_within_zero_and_one():
    curve = fit_logistic(*scored_pairs())
    p = curve(np.linspace(-1, 1, 201))
    assert np.all(np.diff(p) > 0)
    assert p[0] >= 0
    assert p[-1] <= 1
    assert curve([1e300, -1e300]).tolist() == [1, 0]


def test_probability_is_calibrated_at_equal_priors():
    # Two normals of one variance: the true log-odds are a line, with slope gap / variance and zero half-way.
    scores, is_match = scored_pairs(40_000, 80_000, gap=0.3)
    fitted = fit_logistic(scores, is_match)
    assert fitted.slope == pytest.approx(0.3 / 0.04, rel=0.03)
    assert float(fitted(0.15)) == pytest.approx(0.5, abs=0.01)


def test_more_pairs_of_one_kind_do_not_move_the_probability():
    scores, is_match = scored_pairs(2000, 2000)
    many, which = np.concatenate([scores, *[scores[~is_match]] * 9]), np.arange(22_000) < 2000
    assert float(fit_logistic(many, which)(0.3)) == pytest.approx(float(fit_logistic(scores, is_match)(0.3)), abs=0.01)


def test_a_prior_shifts_the_log_odds():
    scores, is_match = scored_pairs()
    even, rare = fit_logistic(scores, is_match), fit_logistic(scores, is_match, prior=0.01)
    assert rare.slope == even.slope
    assert rare.offset == pytest.approx(even.offset + math.log(0.01 / 0.99))
    assert calibrate(scores, is_match, 0.1, prior=0.01).prior == 0.01


@pytest.mark.parametrize("scale", [1e-6, 1, 1e4])
def test_scores_that_a_threshold_parts_give_a_finite_curve(scale):
    scores = scale * np.array([0.1, 0.2, 0.8, 0.9])
    curve = fit_logistic(scores, [False, False, True, True])
    # Platt's targets for two and two: 3/4 and 1/4.
    assert curve(scores).mean() == pytest.approx(0.5)
    assert np.all(curve(scores[2:]) > 0.7)
    assert isinstance(curve, Logistic)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5, 0.5], [0.9, 0.8, 0.2, 0.1], [0.1, 0.9, 0.1, 0.9]])
def test_scores_that_tell_nothing_apart_are_refused(scores):
    with pytest.raises(VerifierError, match="do not score higher"):
        fit_logistic(scores, [False, False, True, True])


def test_bad_settings_and_scores_are_one_clear_error():
    scores, is_match = scored_pairs()
    for far in (0, 1, -0.1, math.nan):
        with pytest.raises(ConfigError, match="false-accept rate must be above 0 and below 1"):
            calibrate(scores, is_match, far)
    for prior in (0, 1, math.nan):
        with pytest.raises(ConfigError, match="prior"):
            calibrate(scores, is_match, prior=prior)
    with pytest.raises(DataError, match="both kinds"):
        calibrate(scores, np.ones(1600, dtype=bool))
    with pytest.raises(VectorError, match="finite"):
        calibrate(np.where(is_match, np.nan, scores), is_match)


def world(rng, identities, images):
    """Return unit vectors (identities * images, 3) around a centre an identity, and whom they show."""
    centres = rng.normal(size=(identities, 1, 3))
    vectors = (centres + 0.3 * rng.normal(size=(identities, images, 3))).reshape(-1, 3)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.repeat(np.arange(identities), images)


def test_the_interval_over_identities_holds_the_rate_of_new_identities_where_wilsons_does_not():
    rng = np.random.default_rng(0)
    fresh, names = world(rng, 3000, 2)
    i, j = rng.integers(len(fresh), size=(2, 200_000))
    impostors = np.einsum("nd,nd->n", fresh[i], fresh[j])[names[i] != names[j]]
    covered = {"identities": 0, "pairs": 0}
    for _ in range(40):
        vectors, who = world(rng, 20, 5)
        a, b = np.triu_indices(len(who), 1)
        scores, is_match = np.einsum("nd,nd->n", vectors[a], vectors[b]), who[a] == who[b]
        known = calibrate(scores, is_match, 0.1, identities=np.stack([who[a], who[b]], axis=1))
        unknown = calibrate(scores, is_match, 0.1)
        assert known.identities == 20
        assert unknown.identities is None
        true = np.mean(impostors >= known.threshold)
        for kind, found in (("identities", known), ("pairs", unknown)):
            low, high = found.far_interval
            covered[kind] += low <= true <= high
    assert covered["identities"] >= 32  # of 40; 38 would be the nominal 95 %
    assert covered["pairs"] < covered["identities"] - 8


def test_few_identities_give_no_interval():
    vectors, who = world(np.random.default_rng(0), 9, 8)
    a, b = np.triu_indices(len(who), 1)
    scores = np.einsum("nd,nd->n", vectors[a], vectors[b])
    found = calibrate(scores, who[a] == who[b], 0.1, identities=np.stack([who[a], who[b]], axis=1))
    assert (found.far_interval, found.frr_interval, found.identities) == (None, None, 9)
