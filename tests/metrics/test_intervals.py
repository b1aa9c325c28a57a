import doctest
import importlib

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError


def test_hand_worked_examples_in_docstrings_hold():
    result = doctest.testmod(importlib.import_module("vitembed.metrics.intervals"))
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize(
    # Published: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_values(successes, n, low, high):
    assert metrics.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_widens_with_the_level():
    low, high = metrics.wilson_interval(3, 50)
    assert metrics.wilson_interval(47, 50) == pytest.approx((1 - high, 1 - low))
    assert metrics.wilson_interval(50, 50)[1] == 1
    wide_low, wide_high = metrics.wilson_interval(3, 50, level=0.99)
    assert wide_low < low < 0.06 < high < wide_high


def test_bootstrap_of_independent_items_agrees_with_wilson():
    hits = np.arange(400) < 100
    low, high = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400), rounds=2000)
    assert (low, high) == pytest.approx(metrics.wilson_interval(100, 400), abs=0.01)


def test_bootstrap_is_wider_when_identities_bring_many_alike():
    hits = np.arange(400) < 100
    single = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400))
    grouped = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400) // 40)
    assert np.ptp(grouped) > 2 * np.ptp(single)


def test_bootstrap_draws_pairs_by_both_identities():
    pairs = np.array([["a", "a"], ["a", "b"], ["b", "b"], ["b", "c"], ["a", "c"]])
    seen = []

    def note(at):
        seen.append(np.bincount(at, minlength=5).tolist())
        return 0.0

    metrics.bootstrap_interval(note, pairs, rounds=50)
    drawn = max(2, round(3 * metrics.draw_share(3, 2)))  # of three identities
    for aa, ab, bb, bc, ac in seen:
        c = drawn - aa - bb
        assert (ab, bc, ac) == (aa * bb, bb * c, aa * c)
    assert len({tuple(counts) for counts in seen}) > 3


def test_bootstrap_repeats_with_its_seed():
    def mean(at):
        return float(at.mean())

    first = metrics.bootstrap_interval(mean, np.arange(30), seed=1)
    assert metrics.bootstrap_interval(mean, np.arange(30), seed=1) == first
    assert metrics.bootstrap_interval(mean, np.arange(30), seed=2) != first


def test_bootstrap_draws_again_where_one_kind_of_pair_came():
    scores, is_match = [0.9, 0.2, 0.8, 0.4], np.array([True, False, True, False])
    names = [["a", "a"], ["a", "b"], ["b", "b"], ["b", "a"]]
    scores = np.array(scores)
    low, high = metrics.bootstrap_interval(
        lambda at: metrics.equal_error_rate(scores[at], is_match[at])[0], names, rounds=20
    )
    assert (low, high) == (0, 0)

    def never(at):
        raise DataError("one kind")

    with pytest.raises(DataError, match=r"too few identities for an interval \(2\)"):
        metrics.bootstrap_interval(never, names, rounds=5)


def test_bad_intervals_are_one_clear_error():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="successes"):
            metrics.wilson_interval(successes, n)
    with pytest.raises(ConfigError, match="level"):
        metrics.wilson_interval(1, 2, level=95)
    with pytest.raises(ConfigError, match="rounds"):
        metrics.bootstrap_interval(lambda at: 0.0, [0, 1], rounds=0)
    with pytest.raises(DataError, match="at least 2 of them; got 1"):
        metrics.bootstrap_interval(lambda at: 0.0, [0, 0])


def test_bootstrap_draws_a_skilled_forgery_once_with_the_identity_it_imitates():
    pairs = np.array([["a", "a"], ["a", "a"], ["a", "b"], ["b", "b"], ["b", "b"]])
    is_match = np.array([True, False, False, True, False])  # the second and the last are forgeries of a and of b
    seen = []

    def note(weights):
        seen.append(weights.tolist())
        return 0.0

    metrics.bootstrap_interval(note, pairs, rounds=50, weighted=True)
    for weights in seen:
        of_a, of_b = weights[0], weights[3]
        assert weights == [of_a, of_a, of_a * of_b, of_b, of_b]
        assert of_a + of_b == 2
    assert {weights[1] for weights in seen} == {0, 1, 2}
    scores = np.array([0.9, 0.5, 0.1, 0.8, 0.6])
    table = metrics.WeightedScores(scores, is_match)
    assert table.table([2, 2, 0, 0, 0]).roc_auc() == 1


@pytest.mark.parametrize("identities", [np.arange(60) // 5, np.random.default_rng(0).integers(8, size=(60, 2))])
def test_weights_and_copies_give_one_interval(identities):
    rng = np.random.default_rng(1)
    is_match = rng.random(60) < 0.5
    scores = (rng.normal(size=60) + is_match).round(1)
    pairs = metrics.WeightedScores(scores, is_match)
    copies = metrics.bootstrap_interval(lambda at: metrics.equal_error_rate(scores[at], is_match[at])[0], identities)
    weights = metrics.bootstrap_interval(lambda w: pairs.table(w).equal_error_rate()[0], identities, weighted=True)
    assert weights == copies
    assert copies[0] < copies[1]


def test_several_statistics_of_one_set_of_draws_equal_those_drawn_singly():
    values = np.random.default_rng(2).normal(size=90)
    names = np.arange(90) // 6
    figures = {"mean": np.mean, "spread": np.std, "höchster": np.max}
    several = metrics.bootstrap_intervals(lambda at: {n: float(f(values[at])) for n, f in figures.items()}, names)
    assert list(several) == list(figures)
    for name, figure in figures.items():
        single = metrics.bootstrap_interval(lambda at, figure=figure: float(figure(values[at])), names)
        assert several[name] == single


def test_a_statistic_that_is_no_number_is_one_clear_error():
    with pytest.raises(DataError, match="needs finite values; rate was nan"):
        metrics.bootstrap_intervals(lambda at: {"rate": float("nan")}, [0, 1], rounds=3)
