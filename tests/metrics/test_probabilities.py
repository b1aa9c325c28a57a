import doctest
import importlib
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError

FIGURES = [
    metrics.brier_score,
    metrics.log_loss,
    metrics.expected_calibration_error,
    metrics.reliability_curve,
]


def judged_pairs(n=500, seed=0, decimals=None):
    """Probabilities that are too sure of themselves, and what came true."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n)
    is_match = rng.random(n) < truth
    p = 1 / (1 + (1 / truth - 1) ** 2)
    return (p if decimals is None else p.round(decimals)), is_match


def test_hand_worked_examples_in_docstrings_hold():
    result = doctest.testmod(importlib.import_module("vitembed.metrics.probabilities"))
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_brier_and_log_loss_equal_scikit_learn(dtype):
    p, is_match = judged_pairs()
    p = p.astype(dtype)
    as_double = p.astype(np.float64)
    assert metrics.brier_score(p, is_match) == pytest.approx(sklearn_metrics.brier_score_loss(is_match, as_double))
    assert metrics.log_loss(p, is_match) == pytest.approx(sklearn_metrics.log_loss(is_match, as_double))


def test_log_loss_of_a_sure_mistake_is_clipped_as_scikit_learn_does():
    p, is_match = np.array([1.0, 0.0, 0.5]), np.array([False, True, True])
    assert metrics.log_loss(p, is_match) == pytest.approx(sklearn_metrics.log_loss(is_match, p))
    assert metrics.log_loss(p, is_match, clip=0) == math.inf
    assert metrics.log_loss([1.0, 0.0], [True, False], clip=0) == 0
    assert metrics.log_loss([1.0, 0.0], [False, True], clip=0.01) == pytest.approx(math.log(100))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_equals_torchmetrics(bins):
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("torchmetrics.classification")
    p, is_match = judged_pairs()  # no probability on an edge: there the peer takes the bin above
    peer = peers.BinaryCalibrationError(n_bins=bins, norm="l1")(torch.tensor(p), torch.tensor(is_match).long())
    assert metrics.expected_calibration_error(p, is_match, bins) == pytest.approx(float(peer), abs=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 15, 40])
@pytest.mark.parametrize("prior", [None, 0.01, 0.5])
def test_calibration_error_equals_a_plain_loop(bins, prior):
    p, is_match = judged_pairs(200, decimals=2)
    count = is_match.sum()
    weights = (
        [1 / 200] * 200 if prior is None else [prior / count if m else (1 - prior) / (200 - count) for m in is_match]
    )
    error, used = 0.0, []
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        members = [i for i in range(200) if low < p[i] <= high or (b == 0 and p[i] == 0)]
        if members:
            used.append(len(members))
            gap = sum(weights[i] * (p[i] - is_match[i]) for i in members)
            error += abs(gap)
    assert metrics.expected_calibration_error(p, is_match, bins, prior=prior) == pytest.approx(error)
    curve = metrics.reliability_curve(p, is_match, bins, prior=prior)
    assert curve.counts.tolist() == used
    assert curve.shares.sum() == pytest.approx(1)


def test_reliability_curve_equals_scikit_learn():
    p, is_match = judged_pairs()
    curve = metrics.reliability_curve(p, is_match, 10)
    observed, predicted = calibration_curve(is_match, p, n_bins=10)
    np.testing.assert_allclose(curve.observed, observed)
    np.testing.assert_allclose(curve.predicted, predicted)


@pytest.mark.parametrize("n", [30, 31, 100])
def test_bins_of_equal_mass_differ_by_at_most_one_pair(n):
    p, is_match = judged_pairs(n)
    curve = metrics.reliability_curve(p, is_match, 7, equal_mass=True)
    assert len(curve.counts) == 7
    assert np.ptp(curve.counts) <= 1
    assert curve.counts.sum() == n
    assert np.all(np.diff(curve.predicted) > 0)


def test_equal_probabilities_stay_in_one_bin():
    p = np.repeat([0.2, 0.6, 0.9], [50, 10, 20])
    is_match = np.arange(80) % 2 == 0
    curve = metrics.reliability_curve(p, is_match, 15, equal_mass=True)
    np.testing.assert_allclose(curve.predicted, [0.2, 0.6, 0.9])
    assert curve.counts.tolist() == [50, 10, 20]


def test_a_prior_is_as_many_copies_of_the_kind():
    p, is_match = judged_pairs(90)
    times = np.where(is_match, 3, 1)
    copies, flags = np.repeat(p, times), np.repeat(is_match, times)
    prior = float(flags.mean())
    for figure in FIGURES[:3]:
        assert figure(p, is_match, prior=prior) == pytest.approx(figure(copies, flags))
    weighted, copied = metrics.reliability_curve(p, is_match, prior=prior), metrics.reliability_curve(copies, flags)
    np.testing.assert_allclose(weighted.observed, copied.observed)
    np.testing.assert_allclose(weighted.predicted, copied.predicted)
    np.testing.assert_allclose(weighted.shares, copied.shares)


def test_probabilities_that_come_true_have_no_calibration_error():
    p = np.repeat([0.25, 0.75], 400)
    is_match = np.arange(800) % 4 < np.repeat([1, 3], 400)
    assert metrics.expected_calibration_error(p, is_match) == pytest.approx(0)
    assert metrics.expected_calibration_error(np.sqrt(p), is_match) > 0.1


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("p", "is_match", "error", "message"),
    [
        ([0.5, 1.5], [1, 0], VectorError, r"must lie in \[0, 1\]; 1.5 at position 1"),
        ([-0.1, 0.5], [1, 0], VectorError, "-0.1 at position 0"),
        ([0.5, np.nan], [1, 0], VectorError, "finite"),
        ([0.5, 0.5], [1, 1], DataError, "both kinds"),
        ([0.5], [1, 0], DataError, "one flag for each"),
        ([], [], DataError, "both kinds"),
    ],
)
def test_bad_probabilities_are_one_clear_error(figure, p, is_match, error, message):
    with pytest.raises(error, match=message) as caught:
        figure(p, is_match)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_one_clear_error():
    for figure in FIGURES:
        for prior in (0, 1, math.nan):
            with pytest.raises(ConfigError, match="a prior must be above 0 and below 1"):
                figure([0.1, 0.9], [0, 1], prior=prior)
    with pytest.raises(ConfigError, match="bins must be at least 1; got 0"):
        metrics.reliability_curve([0.1, 0.9], [0, 1], 0)
    with pytest.raises(ConfigError, match="clip"):
        metrics.log_loss([0.1, 0.9], [0, 1], clip=0.5)
