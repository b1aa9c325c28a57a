import doctest
import math

import numpy as np
import pytest

from vitembed.errors import ConfigError, VerifierError
from vitembed.verify import thresholds
from vitembed.verify.thresholds import check_enough, impostors_needed, reject_below, threshold_for_far


def test_examples_in_docstrings_hold():
    result = doctest.testmod(thresholds)
    assert (result.failed, result.attempted > 0) == (0, True)


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


@pytest.mark.parametrize("frr", [0.01, 0.02, 0.29, 0.5])
def test_the_band_begins_at_the_highest_score_that_keeps_the_rate(frr):
    for genuine in (np.linspace(0, 1, 100), np.random.default_rng(0).normal(size=301).round(1)):
        score = reject_below(genuine, frr, 10.0)
        assert np.mean(genuine < score) <= frr
        higher = genuine[genuine > score].min()
        assert np.mean(genuine < higher) > frr


def test_there_is_no_band_where_the_threshold_refuses_few_enough():
    genuine = np.linspace(0, 1, 101)
    assert reject_below(genuine, 0.1, 0.11) == pytest.approx(0.1)
    assert reject_below(genuine, 0.1, 0.1) is None
    assert reject_below(genuine, 0.1, 0.05) is None


def test_rates_out_of_range_are_one_clear_error():
    for rate in (0, 1, -0.1, math.nan):
        with pytest.raises(ConfigError, match="a false-accept rate must be above 0 and below 1"):
            impostors_needed(rate)
        with pytest.raises(ConfigError, match="a false-reject rate must be above 0 and below 1"):
            check_enough("false-reject", rate, 10, "matching pairs")
