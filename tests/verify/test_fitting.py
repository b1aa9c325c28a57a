import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from vitembed.errors import ConfigError, DataError, VectorError, VerifierError
from vitembed.verify.curves import KINDS, Logistic, curve_from_dict, curve_to_dict
from vitembed.verify.fitting import (
    FITS,
    choose_curve,
    deal_folds,
    fit_isotonic,
    fit_likelihood_ratio,
    fit_logistic,
    pool_violators,
)

EVERY = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


def scored_pairs(matches=400, others=1200, gap=0.5, seed=0):
    rng = np.random.default_rng(seed)
    is_match = np.arange(matches + others) < matches
    return np.clip(0.2 * rng.normal(size=is_match.size) + gap * is_match, -1, 1), is_match


def test_the_logistic_fit_equals_scikit_learn_on_platts_targets():
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


@pytest.mark.parametrize("seed", range(5))
def test_pooling_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    totals = rng.uniform(0.1, 2, size=300)
    shares = np.clip(np.linspace(0, 1, 300) + 0.4 * rng.normal(size=300), 0, 1)
    value, start = pool_violators(shares * totals, totals)
    found = np.repeat(value, np.diff(np.append(start, 300)))
    assert found == pytest.approx(IsotonicRegression().fit(np.arange(300), shares, totals).predict(np.arange(300)))
    assert np.all(np.diff(value) > 0)


def test_isotonic_steps_are_scikit_learns_with_one_more_pair_of_each_kind_at_both_ends():
    scores, is_match = scored_pairs(50, 80, gap=0.2)
    scores = scores.round(2)  # with ties
    curve = fit_isotonic(scores, is_match)
    x = np.concatenate([[-2, -2], scores, [2, 2]])
    y = np.concatenate([[0, 1], is_match, [0, 1]])
    peer = IsotonicRegression().fit(x, y, np.where(y == 1, 0.5 / 50, 0.5 / 80))
    steps = np.unique(peer.predict(scores))
    assert np.unique(curve(np.array(curve.scores))) == pytest.approx(steps)
    order = np.argsort(scores)
    assert np.corrcoef(curve(scores)[order], peer.predict(scores)[order])[0, 1] > 0.98


@EVERY
def test_every_fit_is_calibrated_at_equal_priors_where_the_truth_is_known(fit):
    # Two normals of one variance: the true log-odds are a line, with slope gap / variance and zero half-way.
    scores, is_match = scored_pairs(20_000, 40_000, gap=0.3)
    at = np.linspace(-0.15, 0.45, 13)
    truth = 1 / (1 + np.exp(-(at - 0.15) * 0.3 / 0.04))
    assert fit(scores, is_match)(at) == pytest.approx(truth, abs=0.04)


def test_curves_that_bend_follow_densities_that_no_line_can():
    rng = np.random.default_rng(0)
    is_match = np.arange(30_000) < 10_000
    # Half of the matching pairs are easy, the others hardly better than chance: the log ratio has a wide plateau.
    easy = rng.random(30_000) < 0.5
    scores = np.where(is_match & easy, 0.9, np.where(is_match, 0.25, 0.2)) + 0.1 * rng.normal(size=30_000)
    at = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.7])
    bell = [np.exp(-0.5 * ((at - centre) / 0.1) ** 2) for centre in (0.9, 0.25, 0.2)]
    truth = (bell[0] + bell[1]) / (bell[0] + bell[1] + 2 * bell[2])
    errors = {kind: np.abs(fit(scores, is_match)(at) - truth).max() for kind, fit in FITS.items()}
    assert errors["likelihood ratio"] < 0.09
    assert errors["isotonic"] < 0.03
    assert errors["logistic"] > 0.08
    best, figures = choose_curve(scores, is_match)
    assert best.kind != "logistic"
    assert figures[best.kind]["log_loss"] < figures["logistic"]["log_loss"]
    assert figures[best.kind]["ece"] < figures["logistic"]["ece"]


@EVERY
def test_more_pairs_of_one_kind_do_not_move_the_probability(fit):
    scores, is_match = scored_pairs(2000, 2000)
    many, which = np.concatenate([scores, *[scores[~is_match]] * 9]), np.arange(22_000) < 2000
    at = [0.2, 0.3]
    assert fit(many, which)(at) == pytest.approx(fit(scores, is_match)(at), abs=0.05)


@EVERY
@pytest.mark.parametrize("scale", [1e-6, 1, 1e4])
def test_scores_that_a_threshold_parts_give_no_certainty(fit, scale):
    scores = scale * np.array([0.1, 0.2, 0.8, 0.9])
    p = fit(scores, [False, False, True, True])(np.concatenate([[-scale], scores, [2 * scale]]))
    assert np.all((p > 0) & (p < 1))
    assert np.all(p[1:3] < 0.5)
    assert np.all(p[3:5] > 0.5)


@EVERY
def test_scores_far_apart_for_their_spread_give_no_certainty(fit):
    rng = np.random.default_rng(0)
    is_match = np.arange(400) < 200
    p = fit(np.where(is_match, 0.52, 0.5) + 0.001 * rng.normal(size=400), is_match)([-1, 0.5, 0.52, 1])
    assert np.all((p > 0) & (p < 1))
    assert np.all(np.diff(p) >= 0)


@EVERY
@pytest.mark.parametrize("base", [1 - 2**-53, 0.7, 0.1, -0.3, 1e-300, 1e5])
def test_scores_a_few_ulp_apart_give_a_curve_that_rises_and_loads_again_or_are_refused(fit, base):
    rng = np.random.default_rng(0)
    fitted = 0
    for _ in range(60):
        steps = rng.integers(0, rng.choice([1, 2, 3, 6]), size=rng.integers(6, 40))
        is_match = rng.permutation(steps.size) < rng.integers(2, steps.size - 1)
        scores = base - steps * np.spacing(abs(base))
        above = float(np.mean(steps[~is_match])) - float(np.mean(steps[is_match]))
        if above < 1e-9 or base == 1e-300:
            with pytest.raises(VerifierError, match="do not score higher"):
                fit(scores, is_match)
            continue
        curve = fit(scores, is_match)
        assert np.all(np.diff(curve(np.sort(scores))) >= 0)
        assert curve_from_dict(curve_to_dict(curve)) == curve
        fitted += 1
    assert fitted > 15 or base == 1e-300


def test_a_line_that_does_not_rise_is_refused():
    # Higher by less than the fit looks at.
    with pytest.raises(VerifierError, match="cannot tell them apart"):
        fit_logistic([0, 1, 1e-11, 1 + 1e-11], [False, False, True, True])


@EVERY
def test_a_prior_shifts_the_log_odds(fit):
    scores, is_match = scored_pairs()
    even, rare = fit(scores, is_match), fit(scores, is_match, prior=0.01)
    assert (even.prior, rare.prior) == (0.5, 0.01)
    at = np.linspace(0, 0.5, 6)
    shift = np.log(rare(at) / (1 - rare(at))) - np.log(even(at) / (1 - even(at)))
    assert shift == pytest.approx(math.log(0.01 / 0.99))


@EVERY
@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5, 0.5], [0.9, 0.8, 0.2, 0.1], [0.1, 0.9, 0.1, 0.9]])
def test_scores_that_tell_nothing_apart_are_refused(fit, scores):
    with pytest.raises(VerifierError, match="do not score higher"):
        fit(scores, [False, False, True, True])


@EVERY
def test_a_kind_of_one_score_gives_a_rising_curve(fit):
    p = fit([0.1, 0.3, 0.9, 0.9, 0.9], [False, False, True, True, True])([0.1, 0.9])
    assert p[0] < 0.5 < p[1]
    p = fit([0.2, 0.9, 0.9], [False, False, True])([0.2, 0.9])
    assert p[0] < p[1] < 1


def test_the_simplest_curve_is_kept_where_the_others_are_no_better():
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(12):
        who = np.repeat(np.arange(20), 40)
        is_match = np.tile(np.arange(40) < 20, 20)
        scores = 0.1 * rng.normal(size=20)[who] + 0.3 * is_match + 0.2 * rng.normal(size=800)
        curve, figures = choose_curve(scores, is_match, np.stack([who, who], axis=1))
        assert list(figures) == list(KINDS)
        kept += curve.kind == "logistic"
    assert kept >= 9


def test_identities_are_never_on_both_sides_of_a_fold(monkeypatch):
    # Each identity's pairs have scores of their own, so that its number can be read off them.
    who = np.repeat(np.arange(20), 10)
    is_match = np.tile(np.arange(10) < 5, 20)
    scores = who + 0.4 * is_match + np.tile(np.linspace(0, 0.1, 10), 20)
    seen = []

    def watch(x, matching, *, prior=0.5):
        seen.append(set(np.floor(x).astype(int)))
        return lambda at: check(set(np.floor(at).astype(int)), at)

    def check(held, at):
        assert not held & seen[-1]
        assert len(held) == 4
        return np.full(at.size, 0.5)

    for kind in FITS:
        monkeypatch.setitem(FITS, kind, watch)
    choose_curve(scores, is_match, np.stack([who, who], axis=1))
    assert len(seen) == 3 * 5 + 1
    assert seen[-1] == set(range(20))


def test_pairs_across_folds_are_in_neither_part():
    a, b = np.triu_indices(24, 1)
    who = np.stack([a // 2, b // 2], axis=1)
    for fitted, held in deal_folds(who[:, 0] == who[:, 1], who, 3, 0):
        assert not set(who[fitted].ravel()) & set(who[held].ravel())
        assert not np.all(fitted | held)


def test_few_identities_or_one_kind_compare_nothing():
    scores, is_match = scored_pairs(45, 45)
    who = np.resize(np.arange(8), 90)
    curve, figures = choose_curve(scores, is_match, np.stack([who, who], axis=1))
    assert (curve, figures) == (fit_logistic(scores, is_match), {})
    curve, figures = choose_curve(scores, is_match, kinds=["isotonic"], prior=0.1)
    assert (curve, figures) == (fit_isotonic(scores, is_match, prior=0.1), {})
    curve, figures = choose_curve(scores, is_match, kinds=["isotonic", "likelihood ratio"])
    assert list(figures) == ["likelihood ratio", "isotonic"]


def test_bad_settings_and_scores_are_one_clear_error():
    scores, is_match = scored_pairs()
    with pytest.raises(ConfigError, match="unknown curve 'isotonc'; did you mean 'isotonic'"):
        choose_curve(scores, is_match, kinds=["isotonc"])
    with pytest.raises(ConfigError, match="2 folds; got 1 and 1"):
        choose_curve(scores, is_match, kinds=["isotonic"], folds=1)
    with pytest.raises(ConfigError, match="at least one kind"):
        choose_curve(scores, is_match, kinds=[])
    with pytest.raises(DataError, match="identities must have shape"):
        choose_curve(scores, is_match, np.arange(1600))
    for fit in FITS.values():
        with pytest.raises(ConfigError, match="prior"):
            fit(scores, is_match, prior=1)
        with pytest.raises(DataError, match="both kinds"):
            fit(scores, np.ones(1600, dtype=bool))
        with pytest.raises(VectorError, match="finite"):
            fit(np.where(is_match, np.nan, scores), is_match)


def test_a_curve_of_many_pairs_is_a_short_list():
    scores, is_match = scored_pairs(20_000, 60_000)
    assert len(fit_isotonic(scores, is_match).scores) < 200
    assert len(fit_likelihood_ratio(scores, is_match).scores) < 70
    assert isinstance(fit_logistic(scores, is_match), Logistic)
