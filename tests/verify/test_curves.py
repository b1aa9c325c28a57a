import json
import math

import numpy as np
import pytest

from vitembed.errors import ConfigError, VerifierError
from vitembed.verify.curves import (
    KINDS,
    Isotonic,
    LikelihoodRatio,
    Logistic,
    check_prior,
    curve_from_dict,
    curve_to_dict,
)

CURVES = [
    Logistic(7.3, -2.1),
    Isotonic((-0.2, 0.1, 1 / 3, 0.9), (-4.0, -1.0, -1.0, 5.5), 0.3),
    LikelihoodRatio((0.1, 0.7), (-2.0, 3.0)),
]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.kind)
def test_a_curve_comes_back_from_json_to_the_last_bit(curve):
    assert curve_from_dict(json.loads(json.dumps(curve_to_dict(curve)))) == curve


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.kind)
def test_probability_never_falls_and_stays_within_zero_and_one(curve):
    p = curve(np.linspace(-2, 2, 401).reshape(1, 401))
    assert p.shape == (1, 401)
    assert np.all(np.diff(p[0]) >= 0)
    far = curve([-1e300, 1e300])
    assert 0 < far[0] <= p.min()
    assert p.max() <= far[1] < 1


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.kind)
@pytest.mark.parametrize("prior", [1e-6, 0.02, 0.5, 0.9])
def test_a_prior_moves_a_curve_by_bayes_rule(curve, prior):
    scores = np.linspace(-0.5, 1, 31)
    ratio = np.exp(curve.log_ratio(scores))
    moved = type(curve)(**{**curve.__dict__, "prior": prior})
    assert moved(scores) == pytest.approx(ratio * prior / (ratio * prior + 1 - prior))


@pytest.mark.parametrize("prior", [1e-300, 1e-17, 1e-13, 0.3, 1 - 2**-53])
def test_a_prior_however_small_is_the_probability_where_the_score_says_nothing(prior):
    curve = LikelihoodRatio((-1.0, 1.0), (-40.0, 40.0), prior)
    assert float(curve(0.0)) == pytest.approx(prior, rel=1e-12, abs=0)
    p = curve(np.linspace(-1, 1, 10_001))
    assert np.all(np.diff(p) >= 0)
    assert 0 < p[0] < p[-1] < 1


def test_knots_are_joined_by_straight_lines_of_the_log_ratio_and_constant_beyond():
    curve = LikelihoodRatio((0.0, 1.0), (-2.0, 2.0))
    assert curve.log_ratio([-5, 0, 0.25, 1, 5]).tolist() == [-2, -2, -1, 2, 2]
    assert float(curve(0.5)) == 0.5
    assert float(curve(9)) == pytest.approx(1 / (1 + math.exp(-2)))


def test_kinds_are_named_from_the_simplest_on():
    assert list(KINDS) == ["logistic", "likelihood ratio", "isotonic"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (5, "curve must be an object whose kind is one of logistic, likelihood ratio, isotonic; got 5"),
        ({"slope": 1}, "curve must be an object whose kind"),
        ({"kind": ["logistic"]}, "curve must be an object whose kind"),
        ({"kind": "logistic", "slope": 1, "offset": 0}, "missing prior"),
        ({"kind": "logistic", "slop": 1, "offset": 0, "prior": 0.5}, "unknown key 'slop', the nearest is 'slope'"),
        ({"kind": "logistic", "slope": 0, "offset": 0, "prior": 0.5}, "slope must be above 0"),
        ({"kind": "logistic", "slope": 1, "offset": "0", "prior": 0.5}, "offset must be a finite number"),
        ({"kind": "logistic", "slope": 1, "offset": 0, "prior": 1}, "prior must be above 0 and below 1"),
        ({"kind": "isotonic", "scores": [0], "log_ratios": [1], "prior": 0.5}, "scores must be a list of two numbers"),
        ({"kind": "isotonic", "scores": [0, 0], "log_ratios": [1, 2], "prior": 0.5}, "scores must rise"),
        ({"kind": "isotonic", "scores": [0, 1], "log_ratios": [2, 1], "prior": 0.5}, "none lower than the one before"),
        ({"kind": "isotonic", "scores": [0, 1], "log_ratios": [1, 2, 3], "prior": 0.5}, "one number for each"),
        ({"kind": "isotonic", "scores": [0, None], "log_ratios": [1, 2], "prior": 0.5}, "finite number; got None"),
    ],
)
def test_a_changed_curve_is_one_clear_error(values, message):
    with pytest.raises(VerifierError, match=message):
        curve_from_dict(values)


def test_a_prior_out_of_range_is_one_clear_error():
    for prior in (0, 1, -1, math.nan):
        with pytest.raises(ConfigError, match="prior must be above 0 and below 1"):
            check_prior(prior)
