import dataclasses
import math

import numpy as np
import pytest

from vitembed.errors import VectorError, VerifierError
from vitembed.verify.reference_rules import (
    RULES,
    Centre,
    Dichotomy,
    Evidence,
    Max,
    Mean,
    ZNorm,
    gather_evidence,
    rule_from_dict,
    rule_to_dict,
)

RNG = np.random.default_rng(0)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def draw(questioned=5, references=4, dim=8):
    return unit(RNG.normal(size=(questioned, dim))), unit(RNG.normal(size=(references, dim)))


def evidence_of(questioned, references):
    return gather_evidence(questioned @ references.T, references @ references.T)


def evidence(n, mean, own, spread):
    """One questioned image a row; what the rules do not share is made up."""
    mean, own, spread = np.broadcast_arrays(*np.atleast_1d(mean, own, spread))
    return Evidence(np.full(len(mean), n), mean, mean + 0.1, mean - 0.1, own, spread)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_evidence_is_that_of_plain_loops(n):
    questioned, references = draw(references=n)
    found = evidence_of(questioned, references)
    for row, image in enumerate(questioned):
        with_each = [float(image @ reference) for reference in references]
        assert found.mean[row] == pytest.approx(sum(with_each) / n)
        assert (found.best[row], found.worst[row]) == pytest.approx((max(with_each), min(with_each)))
        others = [[a @ b for j, b in enumerate(references) if j != i] for i, a in enumerate(references)]
        of_each = [sum(cosines) / max(n - 1, 1) for cosines in others]
        assert found.own[row] == pytest.approx(np.mean(of_each) if n > 1 else math.nan, nan_ok=True)
        assert found.spread[row] == pytest.approx(np.std(of_each, ddof=1) if n > 2 else math.nan, nan_ok=True)
        assert found.count[row] == n


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 6])
def test_centre_is_the_cosine_with_the_mean_of_the_references(n):
    questioned, references = draw(references=n)
    expected = questioned @ unit(references.mean(axis=0))
    np.testing.assert_allclose(Centre()(evidence_of(questioned, references)), expected, atol=1e-12)


def test_mean_and_max_are_those_of_the_cosines():
    questioned, references = draw()
    found = evidence_of(questioned, references)
    np.testing.assert_allclose(Mean()(found), (questioned @ references.T).mean(axis=1))
    np.testing.assert_allclose(Max()(found), (questioned @ references.T).max(axis=1))


@pytest.mark.parametrize(
    "rule", [Mean(), Centre(), Max(), ZNorm(0.5, 3, 0.01, 4), Dichotomy((1, 2, 3, -1, 1), 0, 0, 0)]
)
def test_a_rule_does_not_look_at_the_order_of_references_or_at_other_questions(rule):
    questioned, references = draw(references=6)
    scores = rule(evidence_of(questioned, references))
    np.testing.assert_allclose(rule(evidence_of(questioned, references[::-1])), scores)
    for row, image in enumerate(questioned):
        assert rule(evidence_of(image[None], references))[0] == pytest.approx(scores[row])


@pytest.mark.parametrize("kind", [Mean, Centre, Max])
def test_with_one_reference_the_plain_rules_are_the_cosine(kind):
    questioned, references = draw(references=1)
    np.testing.assert_allclose(kind()(evidence_of(questioned, references)), (questioned @ references.T)[:, 0])


def test_znorm_without_a_prior_is_the_distance_in_own_deviations():
    rule = ZNorm(centre=0.0, pull=1e-12, variance=1.0, freedom=1e-12)
    assert rule(evidence(6, 0.7, 0.8, 0.05))[0] == pytest.approx((0.7 - 0.8) / 0.05)


@pytest.mark.filterwarnings("error")
def test_znorm_takes_for_unknown_what_all_identities_have():
    rule = ZNorm(centre=0.6, pull=3.0, variance=0.04, freedom=5.0)
    assert rule(evidence(1, 0.7, math.nan, math.nan))[0] == pytest.approx((0.7 - 0.6) / 0.2)
    assert rule(evidence(2, 0.7, 0.9, math.nan))[0] == pytest.approx((0.7 - (2 * 0.9 + 3 * 0.6) / 5) / 0.2)


@pytest.mark.parametrize("n", [3, 6, 50])
def test_znorm_trusts_an_identity_the_more_the_more_references_it_has(n):
    rule = ZNorm(centre=0.6, pull=3.0, variance=0.04, freedom=5.0)
    own = (n * 0.9 + 3 * 0.6) / (n + 3)
    variance = ((n - 1) * 0.1**2 + 5 * 0.04) / (n - 1 + 5)
    assert rule(evidence(n, 0.7, 0.9, 0.1))[0] == pytest.approx((0.7 - own) / math.sqrt(variance))


def sets_of(identities, n, between, spreads, rng):
    """Evidence of reference sets whose mean cosine varies by `between` over identities, besides chance."""
    parts = []
    for spread in spreads[:identities]:
        level = 0.6 + between * rng.normal()
        each = level + spread * rng.normal(
            size=n
        )  # of one reference with the others; of n, 2 / sqrt(n) goes into the mean
        own = level + 2 * (each.mean() - level)
        parts.append(evidence(n, 0.5, own, each.std(ddof=1)))
    return Evidence.concatenate(parts)


def test_znorm_learns_how_much_identities_differ():
    rng = np.random.default_rng(1)
    alike = ZNorm.fit(sets_of(4_000, 6, 0.0, np.full(4_000, 0.05), rng), np.arange(4_000))
    assert alike.centre == pytest.approx(0.6, abs=0.01)
    assert alike.pull > 60  # ten times the references
    assert alike.freedom > 60
    assert alike.variance == pytest.approx(0.05**2, rel=0.1)
    differing = ZNorm.fit(sets_of(4_000, 6, 0.1, 0.05 * np.sqrt(8 / rng.chisquare(8, 4_000)), rng), np.arange(4_000))
    within = 0.05**2 * 8 / 6  # mean of an inverse chi-square
    assert differing.pull == pytest.approx(4 * within / 0.1**2, rel=0.2)
    assert differing.freedom == pytest.approx(8, rel=0.35)
    assert differing.variance == pytest.approx(0.05**2, rel=0.15)


def test_znorm_learns_from_several_sets_of_two_references_of_an_identity():
    rng = np.random.default_rng(2)
    who = np.repeat(np.arange(2_000), 4)
    own = 0.6 + 0.1 * rng.normal(size=2_000)[who] + 0.07 * rng.normal(size=8_000)
    rule = ZNorm.fit(evidence(2, 0.5, own, np.full(8_000, math.nan)), who)
    # The posterior mean of an identity's level, from one set of two references.
    weight = 0.1**2 / (0.1**2 + 0.07**2)
    assert 2 / (2 + rule.pull) == pytest.approx(weight, rel=0.05)
    assert ZNorm.fit(evidence(2, 0.5, own, np.full(8_000, math.nan)), np.arange(8_000)).pull > 1e3


def test_znorm_of_equal_references_is_finite():
    rule = ZNorm.fit(evidence(6, 0.5, np.full(4, 1.0), np.zeros(4)), np.arange(4))
    assert np.isfinite(rule(evidence(6, [0.5, 1.0], 1.0, 0.0))).all()
    with pytest.raises(VerifierError, match="two sets or more"):
        ZNorm.fit(evidence(1, 0.5, math.nan, math.nan), np.arange(1))


def labelled(count, seed=0):
    """Evidence in which the mean says most, and the references' own mean some."""
    rng = np.random.default_rng(seed)
    is_match = rng.random(count) < 0.4
    own = 0.7 + 0.1 * rng.normal(size=count)
    mean = own - 0.15 * ~is_match + 0.05 * rng.normal(size=count)
    gap = np.abs(0.05 * rng.normal(size=(2, count)))
    found = Evidence(np.full(count, 6), mean, mean + gap[0], mean - gap[1], own, 0.05 + 0.01 * rng.random(count))
    return found, is_match, ~is_match & (rng.random(count) < 0.3)


def test_dichotomy_is_the_logistic_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    found, is_match, skilled = labelled(400)
    rule = Dichotomy.fit(found, is_match, skilled)
    weight = np.where(is_match, 0.5 / is_match.sum(), 0.25 / (~is_match & ~skilled).sum())
    weight[skilled] = 0.25 / skilled.sum()
    columns = (found.mean, found.best - found.mean, found.mean - found.worst, found.own, found.spread)
    features = np.stack(columns, axis=1)
    centre = weight @ features
    scaled = (features - centre) / np.sqrt(weight @ (features - centre) ** 2)
    peer = linear_model.LogisticRegression(C=1e3, tol=1e-10, max_iter=10_000).fit(scaled, is_match, weight)
    np.testing.assert_allclose(rule(found), peer.decision_function(scaled), atol=1e-4)


def test_dichotomy_stays_finite_where_nothing_is_in_doubt():
    found, is_match, skilled = labelled(50)
    sure = dataclasses.replace(found, mean=found.mean + is_match)
    scores = Dichotomy.fit(sure, is_match, skilled)(sure)
    assert scores[is_match].min() > scores[~is_match].max()
    assert np.abs(scores).max() < 100


def test_dichotomy_fills_in_what_few_references_do_not_tell():
    found, is_match, skilled = labelled(200)
    rule = Dichotomy.fit(found, is_match, skilled)
    unknown = dataclasses.replace(found, own=np.full(200, math.nan), spread=np.full(200, math.nan))
    average = dataclasses.replace(found, own=np.full(200, found.own.mean()), spread=np.full(200, found.spread.mean()))
    np.testing.assert_allclose(rule(unknown), rule(average))
    with pytest.raises(VerifierError, match="one kind alone"):
        Dichotomy.fit(found, np.ones(200, dtype=bool), skilled)


@pytest.mark.parametrize(
    "rule", [Mean(), Centre(), Max(), ZNorm(0.1, 3, 0.01, 4), Dichotomy((0.1, 2, 3, -1, 1), 0.3, 0, 0)]
)
def test_a_rule_comes_back_from_json_to_the_last_bit(rule):
    assert rule_from_dict(rule_to_dict(rule)) == rule
    assert rule_to_dict(rule)["name"] in {kind.name for kind in RULES}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("mean", "must be an object"),
        ({"name": "median"}, "mean, centre, max, znorm, dichotomy"),
        ({"name": "mean", "weight": 1}, "unknown key 'weight'"),
        ({"name": "znorm", "centre": 0.5, "pull": 1, "variance": 1}, "missing freedom"),
        ({"name": "znorm", "centre": 0.5, "pull": 1, "variance": 0, "freedom": 1}, "above 0"),
        ({"name": "znorm", "centre": "0.5", "pull": 1, "variance": 1, "freedom": 1}, "centre must be a finite number"),
        ({"name": "dichotomy", "weights": [1.0, 2.0], "offset": 0, "own": 0, "spread": 0}, "5 numbers"),
        ({"name": "dichotomy", "weights": 1.0, "offset": 0, "own": 0, "spread": 0}, "weights must be a list"),
    ],
)
def test_a_rule_that_was_changed_by_hand_is_named(values, named):
    with pytest.raises(VerifierError, match=named):
        rule_from_dict(values)


@pytest.mark.parametrize(
    ("questioned", "references"),
    [(np.zeros((2, 0)), np.zeros((0, 0))), (np.zeros((2, 3)), np.zeros((2, 2))), (np.zeros(3), np.zeros((3, 3)))],
)
def test_cosines_that_do_not_fit_are_refused(questioned, references):
    with pytest.raises(VectorError, match="n of at least 1; got"):
        gather_evidence(questioned, references)


def test_a_cosine_that_is_not_finite_is_refused():
    with pytest.raises(VectorError, match="finite"):
        gather_evidence([[math.nan]], [[1.0]])
