import doctest
import itertools

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.verify import unseen
from vitembed.verify.scored import ScoredPairs
from vitembed.verify.unseen import Side, degrees_of_freedom, predict_acceptance, predicted_far_interval, sides_of


def forgeries(rng, writers, spread="normal", pairs=60):
    """Return scores of skilled forgeries, writers differing in how easily they are imitated, and whom they show."""
    ease = rng.normal(size=writers) if spread == "normal" else rng.exponential(size=writers) - 1
    scores = np.sqrt(0.3) * ease[:, None] + np.sqrt(0.7) * rng.normal(size=(writers, pairs))
    return scores.ravel(), np.repeat(np.arange(writers), pairs)[:, None].repeat(2, axis=1)


def strangers(rng, people, images=4):
    """Return cosines of images of different people, each with a centre of their own, and whom they show."""
    who = np.repeat(np.arange(people), images)
    z = rng.normal(size=(people, 8))[who] + 0.5 * rng.normal(size=(who.size, 8))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    a, b = np.triu_indices(who.size, 1)
    a, b = a[who[a] != who[b]], b[who[a] != who[b]]
    return np.einsum("nd,nd->n", z[a], z[b]), np.stack([who[a], who[b]], axis=1)


def test_examples_in_docstrings_hold():
    result = doctest.testmod(unseen)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_the_interval_holds_the_rate_of_nine_identities_never_seen():
    rng = np.random.default_rng(7)
    worlds = {
        "normal": lambda writers: forgeries(rng, writers),
        "exponential": lambda writers: forgeries(rng, writers, "exponential"),
        "random": lambda people: strangers(rng, people),
    }
    inside = dict.fromkeys(worlds, 0)
    for trial in range(60):
        for (name, world), far in itertools.product(worlds.items(), (0.01, 0.05)):
            scores, who = world(30)
            low, high = predicted_far_interval(scores, who, far, 9, rounds=60, seed=trial)
            met, _ = world(9)
            inside[name] += low <= np.mean(met >= metrics.threshold_at_far(scores, far)) <= high
    assert sum(inside.values()) >= 0.9 * 360  # 0.95 is the aim
    assert min(inside.values()) >= 0.87 * 120


def test_the_interval_of_the_measured_rate_alone_misses_the_unseen_rate_far_more_often():
    rng = np.random.default_rng(7)
    inside = {"prediction": 0, "measured rate": 0}
    for trial in range(60):
        scores, who = forgeries(rng, 30)
        met, _ = forgeries(rng, 9)
        threshold = metrics.threshold_at_far(scores, 0.05)
        seen = np.mean(met >= threshold)
        low, high = predicted_far_interval(scores, who, 0.05, 9, rounds=100, seed=trial)
        inside["prediction"] += low <= seen <= high
        low, high = metrics.bootstrap_interval(lambda at, hit=scores >= threshold: float(hit[at].mean()), who)
        inside["measured rate"] += low <= seen <= high
    assert inside["prediction"] >= 54
    assert inside["measured rate"] <= inside["prediction"] - 10


def test_independent_pairs_give_the_rate_of_other_pairs():
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(100):
        scores, met = rng.normal(size=(2, 400))
        low, high = predicted_far_interval(scores, None, 0.05, rounds=100, seed=trial)
        inside += low <= np.mean(met >= metrics.threshold_at_far(scores, 0.05)) <= high
    assert inside >= 90


def test_the_interval_is_wider_for_fewer_identities_to_come_and_repeats_with_its_seed():
    scores, who = forgeries(np.random.default_rng(0), 40)
    widths = [np.diff(predicted_far_interval(scores, who, 0.05, count))[0] for count in (5, 20, 200)]
    assert widths[0] > widths[1] > widths[2]
    assert predicted_far_interval(scores, who, 0.05) == predicted_far_interval(scores, who, 0.05, 40)
    assert predicted_far_interval(scores, who, 0.05, seed=1) != predicted_far_interval(scores, who, 0.05)


def test_names_and_the_order_of_pairs_do_not_matter():
    scores, who = forgeries(np.random.default_rng(0), 12)
    names = np.array([f"wr{i:02d} ü" for i in range(12)])[who]
    order = np.random.default_rng(1).permutation(scores.size)
    expected = predicted_far_interval(scores, who, 0.1)
    assert predicted_far_interval(scores[order], names[order], 0.1) == expected


def test_few_identities_give_no_interval():
    scores, who = forgeries(np.random.default_rng(0), metrics.IDENTITIES_NEEDED - 1)
    assert predicted_far_interval(scores, who, 0.1) is None
    scores, who = forgeries(np.random.default_rng(0), metrics.IDENTITIES_NEEDED)
    assert predicted_far_interval(scores, who, 0.1) is not None


def test_identities_without_pairs_of_a_kind_do_not_count_for_its_interval():
    # Twenty people lend random pairs, forgeries are of two of them (or of nine) alone.
    rng = np.random.default_rng(0)
    random, others = strangers(rng, 20)
    for forged in (2, metrics.IDENTITIES_NEEDED):
        scores, who = forgeries(rng, forged)
        sides = {"random": Side.of(random, others, 20), "skilled": Side.of(scores, who, 20)}
        known = forged >= metrics.IDENTITIES_NEEDED
        assert list(predict_acceptance(sides, "skilled", 0.05, rounds=50)) == ["random", "skilled"] * known
        assert list(predict_acceptance(sides, "random", 0.05, rounds=50)) == ["random"] + ["skilled"] * known


@pytest.mark.parametrize("turned", [False, True])
def test_identities_shown_are_those_of_either_side_unless_few_meet_many(turned):
    every = np.array(list(itertools.combinations(range(9), 2)))
    few = np.array(list(itertools.product(range(3), range(3, 40))))
    own = np.array([[4, 4], [7, 7], [7, 7]])
    for codes, shown in ((every, 9), (few, 4), (own, 2), (np.concatenate([own, [[4, 7]]]), 2)):
        side = Side.of(np.arange(len(codes)), codes[:, ::-1] if turned else codes, 40)
        assert side.shown == shown


def test_no_accepted_pair_does_not_make_a_rate_certain():
    # Matching and random pairs lie far below all skilled ones: no round accepts any.
    rng = np.random.default_rng(0)
    scores, who = forgeries(rng, 20)
    low_scores, others = strangers(rng, 20)
    pairs = ScoredPairs.check(
        np.concatenate([scores, low_scores - 50, [90.0]]),
        np.arange(scores.size + low_scores.size + 1) == scores.size + low_scores.size,
        np.concatenate([who, others, [[0, 0]]]),
        np.arange(scores.size + low_scores.size + 1) < scores.size,
    )
    found = predict_acceptance(sides_of(pairs), "skilled", 0.05, rounds=50)
    assert found["random"] == metrics.wilson_interval(0, low_scores.size)
    assert found["skilled"][0] < 0.05 < found["skilled"][1]


@pytest.mark.parametrize("far", [0.01, 0.05, 0.29, 0.5])
def test_weighted_thresholds_are_those_of_repeated_scores(far):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=500).round(1)  # with ties
    side = Side.of(scores, np.repeat(np.arange(500)[:, None], 2, axis=1), 500)
    weights = rng.integers(0, 4, size=500)
    repeated = np.repeat(side.scores, weights)
    refused = side.best_refused(weights, far)
    assert np.nextafter(refused, np.inf) == metrics.threshold_at_far(repeated, far)
    assert side.share_above(refused, weights) == pytest.approx(np.mean(repeated > refused))
    assert np.isnan(side.share_above(refused, np.zeros(500, dtype=int)))


def test_a_pair_comes_as_often_as_its_identities_together():
    side = Side.of(np.array([0.1, 0.2, 0.3]), np.array([[0, 1], [2, 2], [1, 2]]), 3)
    assert side.weights(np.array([2, 3, 5])).tolist() == [6, 5, 15]


def test_one_identity_with_all_false_accepts_leaves_few_degrees_of_freedom():
    who = np.repeat(np.arange(20), 10)[:, None].repeat(2, axis=1)
    even = np.tile(np.arange(10.0), 20)
    assert degrees_of_freedom(Side.of(even, who, 20), 8.5) == 19
    one = np.where(who[:, 0] == 3, 10.0, 0.0)
    assert degrees_of_freedom(Side.of(one, who, 20), 5) < 3
    assert degrees_of_freedom(Side.of(even, who, 20), 100) == 19  # nothing accepted


def test_bad_arguments_are_one_clear_error():
    scores, who = forgeries(np.random.default_rng(0), 12)
    with pytest.raises(ConfigError, match="test_identities must be at least 1; got 0"):
        predicted_far_interval(scores, who, 0.1, 0)
    for changes in ({"far": 0}, {"far": 1}, {"far": 0.1, "level": 1}, {"far": 0.1, "rounds": 0}):
        with pytest.raises(ConfigError, match="expected far and level"):
            predicted_far_interval(scores, who, **changes)
    with pytest.raises(DataError, match=r"identities must have shape \(720, 2\)"):
        predicted_far_interval(scores, who[:, 0], 0.1)
    with pytest.raises(DataError, match="got none"):
        predicted_far_interval([], None, 0.1)
    with pytest.raises(VectorError, match="finite"):
        predicted_far_interval(np.where(scores > 1, np.nan, scores), who, 0.1)
