"""Counted scores against sorted ones: the simple implementation here is the oracle of the one that scales."""

import doctest
import importlib
import itertools
import math
import tracemalloc
from bisect import bisect_left

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics import ScoreTable, WeightedScores, counting, score_table


@pytest.fixture
def counted(monkeypatch):
    """Count however few scores, in chunks of an odd size, and hold few of them at a time."""
    monkeypatch.setattr(score_table, "SORTED", 0)
    monkeypatch.setattr(score_table, "GATHERED", 60)
    monkeypatch.setattr(counting, "CHUNK", 97)


def scored_pairs(kind, n, seed):
    rng = np.random.default_rng(seed)
    is_match = rng.random(n) < 0.3
    is_match[:2] = True, False
    scores = rng.normal(size=n) + 1.5 * is_match
    if kind == "ties":
        scores = scores.round(1)
    elif kind == "one score":
        scores = np.full(n, -0.25)
    elif kind == "zeros":
        scores = np.where(rng.random(n) < 0.5, 0.0, -0.0) + np.where(rng.random(n) < 0.2, 1e-30, 0.0)
    elif kind == "narrow":
        scores = 0.75 + 1e-6 * scores  # many in one bucket
    elif kind == "wide":
        scores = np.sign(scores) * np.exp(8 * scores)
    elif kind == "extreme":
        scores = rng.choice([-3.4028234e38, -1e-45, 0.0, 1e-45, 3.4028234e38], n)
    elif kind == "parted":
        scores = scores + 100 * is_match
    return scores, is_match


KINDS = ["plain", "ties", "one score", "zeros", "narrow", "wide", "extreme", "parted"]


def sorted_sides(scores, is_match):
    return np.sort(scores[is_match]), np.sort(scores[~is_match])


def rates_by_sorting(threshold, matches, others):
    refused = np.searchsorted(others, threshold, side="left")
    missed = np.searchsorted(matches, threshold, side="left")
    return float((others.size - refused) / others.size), float(missed / matches.size)


def eer_by_sorting(scores, is_match):
    matches, others = sorted_sides(scores, is_match)

    def far_below_frr(score):
        far, frr = rates_by_sorting(score, matches, others)
        return far < frr

    lower, upper = -math.inf, math.inf
    for side in (matches, others):
        k = bisect_left(side, True, key=far_below_frr)
        lower = max(lower, float(side[k - 1]) if k else -math.inf)
        upper = min(upper, float(side[k]) if k < side.size else math.inf)
    dtype = scores.dtype.type
    far, frr = rates_by_sorting(dtype(lower), matches, others)
    far_upper, frr_upper = rates_by_sorting(dtype(upper), matches, others)
    share = (far - frr) / ((far - frr) + (frr_upper - far_upper))
    threshold = lower + share * (upper - lower) if math.isfinite(upper) else lower
    return far + share * (far_upper - far), threshold


def test_the_accepts_that_a_rate_allows_never_exceed_it_by_the_last_bit():
    for others in range(1, 60):
        for k in range(others):
            for far in (k / others, np.nextafter(k / others, 0), np.nextafter(k / others, 1)):
                expected = max(n for n in range(others) if n / others <= far)
                assert score_table.allowed_accepts(float(far), others) == expected


def threshold_by_sorting(others, far):
    allowed = max(k for k in range(others.size) if k / others.size <= far)
    with np.errstate(over="ignore"):  # the float after the largest is infinity
        return float(np.nextafter(np.sort(others)[others.size - 1 - allowed], others.dtype.type(np.inf)))


def auc_by_sorting(scores, is_match):
    matches, others = sorted_sides(scores, is_match)
    twice = np.searchsorted(others, matches, side="left").sum() + np.searchsorted(others, matches, side="right").sum()
    return float(twice / (2 * matches.size * others.size))


@pytest.mark.parametrize("module", ["steps", "counting", "score_table"])
def test_hand_worked_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"vitembed.metrics.{module}"))
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "seed"), [(2, 0), (3, 1), (50, 2), (700, 3)])
@pytest.mark.parametrize("way", ["counted", "sorted"])
def test_every_figure_is_that_of_the_sorted_scores(request, way, kind, dtype, n, seed):
    if way == "counted":
        request.getfixturevalue("counted")
    with np.errstate(under="ignore"):
        scores, is_match = scored_pairs(kind, n, seed)
        scores = scores.astype(dtype)
    table = ScoreTable(scores, is_match)
    matches, others = sorted_sides(scores, is_match)
    assert (table.matches, table.others) == (matches.size, others.size)
    assert table.equal_error_rate() == eer_by_sorting(scores, is_match)
    assert table.roc_auc() == auc_by_sorting(scores, is_match)
    for far in (0.0, 0.01, 0.29, 0.5, 0.999):
        threshold = threshold_by_sorting(others, far)
        assert table.threshold_at_far(far) == threshold
        assert metrics.threshold_at_far(others, far) == threshold
        tar = 1 - np.searchsorted(matches, dtype(threshold), side="left") / matches.size
        assert table.tar_at_far(far) == tar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [10, 200])
def test_the_thinned_curve_is_the_same_whether_counted_or_sorted(counted, monkeypatch, kind, points):
    scores, is_match = scored_pairs(kind, 900, 4)
    curve = metrics.det_curve(scores, is_match, points)
    monkeypatch.setattr(score_table, "SORTED", 10**6)
    expected = metrics.det_curve(scores, is_match, points)
    for name in ("thresholds", "far", "frr"):
        np.testing.assert_array_equal(getattr(curve, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint16, ">f4", ">f8"])
def test_number_types_are_counted_as_they_are_sorted(counted, dtype):
    rng = np.random.default_rng(5)
    scores, is_match = rng.integers(0, 100, 400).astype(dtype), rng.random(400) < 0.5
    as_floats = scores.astype(np.float64)
    assert metrics.equal_error_rate(scores, is_match) == eer_by_sorting(as_floats, is_match)
    assert metrics.equal_error_rate(scores[::-2], is_match[::-2]) == eer_by_sorting(as_floats[::-2], is_match[::-2])
    assert metrics.roc_auc(scores, is_match.astype(int)) == auc_by_sorting(as_floats, is_match)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_have_the_order_of_the_floats_and_give_them_back(dtype):
    rng = np.random.default_rng(6)
    limits = np.finfo(dtype)
    edges = [limits.min, -limits.tiny, 0, limits.smallest_subnormal, limits.max]
    scores = np.concatenate([edges, rng.normal(size=500)])
    scores = np.sort(scores.astype(dtype))
    found = counting.keys(scores)
    assert np.all(found[1:] > found[:-1])
    np.testing.assert_array_equal(counting.key_values(found, scores.dtype), scores)
    assert counting.keys(np.array([-0.0], dtype=dtype)) == counting.keys(np.array([0.0], dtype=dtype))


@pytest.mark.parametrize("sizes", [[1000], [1, 0, 998, 1], [250] * 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_give_what_the_whole_gives(sizes, dtype):
    scores, is_match = scored_pairs("plain", 1000, 7)
    scores = scores.astype(dtype)
    edges = [0, *itertools.accumulate(sizes)]
    chunks = [(scores[a:b], is_match[a:b]) for a, b in itertools.pairwise(edges)]
    whole = ScoreTable(scores, is_match)
    for given in (chunks, lambda: iter(chunks)):
        table = ScoreTable.from_chunks(given)
        assert table.equal_error_rate() == whole.equal_error_rate()
        assert table.tar_at_far(0.1) == whole.tar_at_far(0.1)
        assert table.roc_auc() == whole.roc_auc()


def test_chunks_that_cannot_be_read_again_are_one_clear_error():
    scores, is_match = scored_pairs("plain", 100, 8)
    with pytest.raises(DataError, match="a list of chunks, or a function"):
        ScoreTable.from_chunks((scores, is_match) for _ in range(1))
    once = iter([(scores, is_match)])
    with pytest.raises(DataError, match="both kinds are needed; got 0 matching and 0"):
        ScoreTable.from_chunks(lambda: once)
    shrinking = iter([scores, scores, scores[:50]])
    table = ScoreTable.from_chunks(lambda: [(s, is_match[: s.size]) for s in [next(shrinking)]])
    for figure in (table.equal_error_rate, table.roc_auc):
        shrinking = iter([scores[:50], scores[:50]])
        with pytest.raises(DataError, match="other scores when read again"):
            figure()


def test_chunks_of_two_types_are_one_clear_error():
    chunks = [(np.zeros(2, dtype=np.float32), [1, 0]), (np.zeros(2), [1, 0])]
    with pytest.raises(VectorError, match="one type; got float32 and float64"):
        ScoreTable.from_chunks(chunks)


@pytest.mark.parametrize(
    ("scores", "is_match", "error", "message"),
    [
        (
            np.array([0.1] * 200 + [np.nan]),
            np.arange(201) < 9,
            VectorError,
            "1 of 201 are not, the first at position 200",
        ),
        (np.array([0.1, np.inf] * 100), np.arange(200) < 9, VectorError, "100 of 200 are not, the first at position 1"),
        (np.zeros((2, 200)), np.zeros((2, 200), bool), VectorError, r"shape \(n,\)"),
        (np.array(["a"] * 200), np.arange(200) < 9, VectorError, "must be numbers"),
        (np.zeros(200), np.zeros(199, bool), DataError, "one flag for each of 200 scores"),
        (np.zeros(200), np.arange(200), DataError, "0 and 1 only"),
        (np.zeros(200), np.array(["yes"] * 200), DataError, "booleans"),
        (np.zeros(200), np.ones(200, bool), DataError, "got 200 matching and 0 non-matching"),
        (np.zeros(200), np.zeros(200, bool), DataError, "got 0 matching and 200 non-matching"),
    ],
)
def test_bad_scores_that_are_counted_are_one_clear_error(counted, scores, is_match, error, message):
    with pytest.raises(error, match=message) as caught:
        ScoreTable(scores, is_match)
    assert "\n" not in str(caught.value)


def test_counting_copies_no_scores():
    rng = np.random.default_rng(9)
    n = 4_000_000  # 16 MB of scores, 4 MB of flags
    is_match = rng.random(n) < 0.3
    scores = (rng.standard_normal(n, dtype=np.float32) * 0.2 + 0.3 * is_match).astype(np.float32)
    tracemalloc.start()
    table = ScoreTable(scores, is_match)
    figures = (*table.equal_error_rate(), table.tar_at_far(0.001), metrics.threshold_at_far(scores, 0.1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20  # tables and chunks; a copy would be 16 MB
    assert figures[:2] == eer_by_sorting(scores, is_match)


# Weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_weight_is_as_many_copies(kind, dtype):
    scores, is_match = scored_pairs(kind, 300, 10)
    with np.errstate(under="ignore"):
        scores = scores.astype(dtype)
    pairs = WeightedScores(scores, is_match)
    for seed in range(5):
        weights = np.random.default_rng(seed).integers(0, 3, 300)
        weights[:2] = 1
        table, copies = pairs.table(weights), ScoreTable(np.repeat(scores, weights), np.repeat(is_match, weights))
        assert table.equal_error_rate() == copies.equal_error_rate()
        assert table.roc_auc() == copies.roc_auc()
        for far in (0.0, 0.05, 0.5):
            assert table.threshold_at_far(far) == copies.threshold_at_far(far)
            assert table.tar_at_far(far) == copies.tar_at_far(far)


def test_bad_weights_are_one_clear_error():
    pairs = WeightedScores([0.1, 0.2, 0.3], [1, 0, 0])
    with pytest.raises(DataError, match=r"each of 3 pairs is needed; got shape \(2,\)"):
        pairs.table([1, 1])
    with pytest.raises(DataError, match="got 0 matching and 2 non-matching"):
        pairs.table([0, 1, 1])


def test_bad_rates_and_points_are_one_clear_error():
    table = ScoreTable([0.1, 0.2], [1, 0])
    for far in (1, -0.1, math.nan):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            table.tar_at_far(far)
    with pytest.raises(ConfigError, match="at least 10 points; got 9"):
        table.det_curve(9)
