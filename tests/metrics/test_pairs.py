import doctest
import importlib
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics import checks


def clustered(n=300, dim=16, classes=20, noise=0.8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = rng.normal(size=(classes, dim))
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(dtype), labels


def scored_pairs(n=2000, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    is_match = rng.random(n) < 0.3
    scores = rng.normal(size=n) + 1.5 * is_match
    return (scores if decimals is None else scores.round(decimals)), is_match


def test_hand_worked_examples_in_docstrings_hold():
    result = doctest.testmod(importlib.import_module("vitembed.metrics.pairs"))
    assert result.failed == 0
    assert result.attempted > 0


def test_scoring_pairs_does_not_change_its_input():
    z, labels = clustered(30, classes=3)
    copy = z.copy()
    metrics.pair_scores(z, labels)
    np.testing.assert_array_equal(z, copy)


def test_pairs_are_scored_without_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(checks, "CHUNK_BYTES", 2**20)
    z, labels = clustered(6000, dim=8, classes=600)  # the whole matrix: 144 MB; the result: 90 MB
    tracemalloc.start()
    metrics.pair_scores(z, labels)
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert memory < 102


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roc_curve_equals_scikit_learn(decimals, dtype):
    scores, is_match = scored_pairs(decimals=decimals)
    scores = scores.astype(dtype)
    curve = metrics.roc_curve(scores, is_match)
    far, tar, thresholds = sklearn_metrics.roc_curve(is_match, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.far, far)
    np.testing.assert_allclose(1 - curve.frr, tar)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    assert metrics.roc_auc(scores, is_match) == pytest.approx(sklearn_metrics.roc_auc_score(is_match, scores))


def test_roc_curve_counts_accepted_pairs():
    scores, is_match = scored_pairs(50, decimals=1)
    curve = metrics.roc_curve(scores, is_match)
    for threshold, far, frr in zip(curve.thresholds, curve.far, curve.frr, strict=True):
        accepted = scores >= threshold
        assert far == pytest.approx(accepted[~is_match].mean())
        assert frr == pytest.approx(1 - accepted[is_match].mean())


@pytest.mark.parametrize("seed", range(30))
def test_equal_error_rate_is_where_the_curve_crosses(seed):
    # The definition, read off the whole curve; the implementation never builds it.
    scores, is_match = scored_pairs(n=3 + seed * 7, seed=seed, decimals=1 if seed % 2 else None)
    is_match[:2] = True, False
    curve = metrics.roc_curve(scores, is_match)
    j = int(np.argmax(curve.far >= curve.frr))
    gap = curve.far - curve.frr
    share = gap[j] / (gap[j] - gap[j - 1])
    eer, threshold = metrics.equal_error_rate(scores, is_match)
    assert eer == pytest.approx(curve.far[j] + share * (curve.far[j - 1] - curve.far[j]))
    assert eer == pytest.approx(curve.frr[j] + share * (curve.frr[j - 1] - curve.frr[j]))
    assert curve.thresholds[j] <= threshold <= curve.thresholds[j - 1]


@pytest.mark.parametrize(
    ("scores", "is_match", "eer", "threshold"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 0.0, 0.8),  # parted without error
        ([0.1, 0.9], [1, 0], 1.0, 0.9),  # the wrong way round
        ([0.5, 0.5], [1, 0], 0.5, 0.5),  # all alike: a coin
        ([0.5, 0.5, 0.5], [1, 0, 0], 0.5, 0.5),
    ],
)
def test_equal_error_rate_of_simple_cases(scores, is_match, eer, threshold):
    assert metrics.equal_error_rate(scores, is_match) == pytest.approx((eer, threshold))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("far", [0.0, 0.003, 0.01, 0.07, 0.29, 0.5, 0.999])
def test_threshold_is_the_smallest_that_keeps_the_rate(far, decimals, dtype):
    scores = np.random.default_rng(1).normal(size=100)
    scores = (scores if decimals is None else scores.round(decimals)).astype(dtype)
    threshold = metrics.threshold_at_far(scores, far)
    assert np.mean(scores >= threshold) <= far
    below = np.max(scores[scores < threshold])  # the next lower threshold that makes a difference
    assert np.mean(scores >= below) > far
    assert np.nextafter(dtype(threshold), dtype(-np.inf)) == below


def test_tar_at_far_is_the_best_point_of_the_curve_within_the_rate():
    scores, is_match = scored_pairs(decimals=2)
    curve = metrics.roc_curve(scores, is_match)
    for far in (0.0, 0.001, 0.01, 0.1, 0.5):
        expected = np.max(1 - curve.frr[curve.far <= far])
        assert metrics.tar_at_far(scores, is_match, far) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 3000, 2**26])
def test_pair_scores_are_the_upper_triangle(monkeypatch, chunk):
    monkeypatch.setattr(checks, "CHUNK_BYTES", chunk)
    z, labels = clustered(61, classes=7)
    scores, is_match = metrics.pair_scores(z, labels)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    upper = np.triu_indices(61, 1)
    np.testing.assert_allclose(scores, (unit @ unit.T)[upper], atol=1e-6)
    np.testing.assert_array_equal(is_match, (labels[:, None] == labels)[upper])
    assert scores.dtype == np.float32


def test_pair_scores_stay_cosines():
    scores, _ = metrics.pair_scores(np.full((40, 3), 0.1, dtype=np.float32), np.zeros(40))
    assert scores.max() <= 1


@pytest.mark.parametrize("metric", [metrics.roc_curve, metrics.equal_error_rate, metrics.roc_auc])
@pytest.mark.parametrize(
    ("scores", "is_match", "error", "message"),
    [
        ([0.1, np.nan], [True, False], VectorError, "1 of 2 are not, the first at position 1"),
        ([0.1, np.inf], [True, False], VectorError, "must be finite"),
        ([[0.1, 0.2]], [True, False], VectorError, r"shape \(n,\)"),
        (["a", "b"], [True, False], VectorError, "must be numbers"),
        ([0.1, 0.2], [True], DataError, "one flag for each of 2 scores"),
        ([0.1, 0.2], [2, 0], DataError, "0 and 1 only"),
        ([0.1, 0.2], ["yes", "no"], DataError, "must hold booleans"),
        ([0.1, 0.2], [True, True], DataError, "got 2 matching and 0 non-matching"),
        ([0.1, 0.2], [False, False], DataError, "got 0 matching and 2 non-matching"),
        ([], [], DataError, "both kinds"),
    ],
)
def test_bad_scores_are_one_clear_error(metric, scores, is_match, error, message):
    with pytest.raises(error, match=message):
        metric(scores, is_match)


def test_bad_rates_and_sizes_are_one_clear_error():
    with pytest.raises(ConfigError, match="got 1"):
        metrics.threshold_at_far([0.5], 1)
    with pytest.raises(VectorError, match="got none"):
        metrics.threshold_at_far([], 0.1)
    with pytest.raises(VectorError, match="at least 2 embeddings; got 1"):
        metrics.pair_scores([[1.0]], [0])


@pytest.mark.parametrize("decimals", [None, 1])
def test_det_curve_is_on_the_curve_of_scikit_learn(decimals):
    scores, is_match = scored_pairs(decimals=decimals)
    curve = metrics.det_curve(scores, is_match)
    far, frr, thresholds = sklearn_metrics.det_curve(is_match, scores)
    place = {threshold: at for at, threshold in enumerate(thresholds)}
    shared = [(k, place[t]) for k, t in enumerate(curve.thresholds) if t in place]
    assert len(shared) > 20
    for k, at in shared:
        assert (curve.far[k], curve.frr[k]) == pytest.approx((far[at], frr[at]))


@pytest.mark.parametrize("points", [10, 50, 2000])
def test_det_curve_has_few_points_of_the_whole_curve_and_both_ends(points):
    scores, is_match = scored_pairs(20_000, decimals=None)
    whole, curve = metrics.roc_curve(scores, is_match), metrics.det_curve(scores, is_match, points)
    assert len(curve.thresholds) <= points
    at = np.searchsorted(-whole.thresholds, -curve.thresholds)
    np.testing.assert_array_equal(whole.thresholds[at], curve.thresholds)
    np.testing.assert_array_equal(whole.far[at], curve.far)
    np.testing.assert_array_equal(whole.frr[at], curve.frr)
    assert (curve.far[0], curve.frr[0], curve.far[-1], curve.frr[-1]) == (0, 1, 1, 0)


def test_det_curve_leaves_no_gap_wider_than_its_step():
    scores, is_match = scored_pairs(20_000)
    whole, curve = metrics.roc_curve(scores, is_match), metrics.det_curve(scores, is_match, 200)
    at = np.searchsorted(-whole.thresholds, -curve.thresholds)
    step = 12 / 98  # quantiles from -6 to 6, 99 of them
    for rate in (whole.far, whole.frr):
        quantile = norm.ppf(np.clip(rate, 1e-9, 1 - 1e-9))
        for first, last in pairwise(at):
            # One jump of the whole curve may be wider than a step; what was left out after it may not.
            assert abs(quantile[min(first + 1, last)] - quantile[last]) <= step + 1e-9


# Rates at a threshold


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threshold", [-np.inf, 0.1, 0.7, 0.75, np.inf])
def test_error_rates_count_wrong_decisions(dtype, threshold):
    rng = np.random.default_rng(3)
    scores, is_match = rng.integers(0, 20, 300).astype(dtype) / 20, rng.random(300) < 0.4
    skilled = ~is_match & (rng.random(300) < 0.3)
    wrong = {"match": [], "random": [], "skilled": []}
    for score, matching, imitated in zip(scores, is_match, skilled, strict=True):
        kind = "match" if matching else "skilled" if imitated else "random"
        wrong[kind].append((float(score) >= threshold) != matching)
    rates = metrics.error_rates(scores, is_match, threshold, skilled)
    assert rates.frr == pytest.approx(np.mean(wrong["match"]))
    assert rates.far == pytest.approx(np.mean(wrong["random"] + wrong["skilled"]))
    assert rates.far_random == pytest.approx(np.mean(wrong["random"]))
    assert rates.far_skilled == pytest.approx(np.mean(wrong["skilled"]))
    unknown = metrics.error_rates(scores, is_match, threshold)
    assert unknown == metrics.ErrorRates(rates.frr, rates.far, None, None)


def test_a_kind_without_pairs_has_no_rate():
    assert metrics.error_rates([0.9], [True], 0.5) == metrics.ErrorRates(0.0, None)
    assert metrics.error_rates([0.9], [False], 0.5, [True]) == metrics.ErrorRates(None, 1.0, None, 1.0)
    assert metrics.error_rates([0.9], [False], 0.5, [False]) == metrics.ErrorRates(None, 1.0, 1.0, None)


def test_kinds_of_forgery_have_rates_of_their_own():
    scores = np.array([0.9, 0.8, 0.85, 0.1, 0.2])
    is_match, skilled = np.array([1, 1, 0, 0, 0], bool), np.array([0, 0, 1, 0, 0], bool)
    eer = {
        kind: metrics.equal_error_rate(scores[at], is_match[at])[0]
        for kind, at in metrics.impostor_kinds(is_match, skilled).items()
    }
    assert eer == {"random": 0.0, "skilled": 0.5}
    assert list(metrics.impostor_kinds(is_match, np.zeros(5, bool))) == ["random"]


@pytest.mark.parametrize(
    ("scores", "is_match", "threshold", "skilled", "error", "message"),
    [
        ([0.1], [1], np.nan, None, ConfigError, "got NaN"),
        ([np.nan], [1], 0.5, None, VectorError, "must be finite"),
        ([], [], 0.5, None, VectorError, "got none"),
        ([0.1, 0.2], [1], 0.5, None, DataError, "is_match must hold one flag for each of 2"),
        ([0.1, 0.2], [1, 0], 0.5, [1], DataError, "skilled must hold one flag for each of 2"),
        ([0.1, 0.2], [1, 0], 0.5, [0, 2], DataError, "skilled must hold booleans"),
        ([0.1, 0.2], [0, 1], 0.5, [0, 1], DataError, "pair 1 is marked as matching and skilled"),
    ],
)
def test_bad_input_of_error_rates_is_one_clear_error(scores, is_match, threshold, skilled, error, message):
    with pytest.raises(error, match=message) as caught:
        metrics.error_rates(scores, is_match, threshold, skilled)
    assert "\n" not in str(caught.value)
