import dataclasses
import json

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError, VerifierError
from vitembed.verify import references as module
from vitembed.verify.reference_rules import RULES, Dichotomy, Evidence, Mean, ZNorm
from vitembed.verify.reference_trials import checked_identities, draw_trials, folds_of
from vitembed.verify.references import ReferenceCalibration, fit_references, rule_scores

RULE_NAMES = [kind.name for kind in RULES]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def signatures(writers=30, genuine=12, forged=6, vary=0.0, seed=0, dim=24):
    """Embeddings of writers whose hands are more or less steady; forgeries miss by a fixed step."""
    rng = np.random.default_rng(seed)
    vectors, labels, imitated = [], [], []
    for writer in range(writers):
        centre = unit(rng.normal(size=dim))
        noise = 0.12 * np.exp(vary * rng.normal())
        step = unit(rng.normal(size=(forged, dim))) * 0.5
        own = centre + noise * rng.normal(size=(genuine, dim))
        vectors += [own, centre + step + noise * rng.normal(size=(forged, dim))]
        labels += [writer] * genuine + [1_000 + 100 * writer + i for i in range(forged)]
        imitated += [-1] * genuine + [writer] * forged
    return unit(np.concatenate(vectors)), np.array(labels), np.array(imitated)


def trials_of(data, count=6, impostors=60, seed=0):
    return draw_trials(*checked_identities(*data), count, impostors, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def fitted():
    return fit_references(*signatures(vary=0.5), far=0.05)


@pytest.mark.parametrize("count", [1, 3, 6, 11])
def test_every_image_is_questioned_once_by_an_identity_and_never_by_itself(count):
    vectors, labels, imitated = signatures(writers=6)
    # Every image its own direction, so that the cosine 1 tells who was compared.
    marked = np.eye(len(vectors))
    trials = trials_of((marked, labels, imitated), count, impostors=10_000)
    assert trials.evidence.best.max() == 0.0, "a questioned image was among its references"
    matches = np.bincount(trials.identities[trials.is_match, 0])
    assert (matches == 12).all() if count <= 6 else (matches >= 4).all()
    assert (np.bincount(trials.identities[trials.skilled, 0]) == 6).all()
    random = ~trials.is_match & ~trials.skilled
    assert (np.bincount(trials.identities[random, 0]) == 5 * 12).all()
    assert (trials.identities[trials.is_match, 0] == trials.identities[trials.is_match, 1]).all()
    assert (trials.identities[trials.skilled, 0] == trials.identities[trials.skilled, 1]).all()
    assert (trials.identities[random, 0] != trials.identities[random, 1]).all()
    assert (trials.evidence.count == count).all()


def test_evidence_of_a_trial_is_of_the_identity_that_it_names():
    # Writers are orthogonal: an own image scores 1 with all references, an image of another writer 0.
    vectors = np.repeat(np.eye(5), 8, axis=0)
    trials = trials_of((vectors, np.repeat(np.arange(5), 8), None), 4)
    np.testing.assert_array_equal(trials.evidence.mean, trials.is_match.astype(float))
    np.testing.assert_array_equal(trials.evidence.own, 1.0)


def test_identities_with_few_images_lend_random_non_matches_alone():
    vectors, labels, imitated = signatures(writers=6)
    kept = np.ones(len(labels), dtype=bool)
    kept[np.flatnonzero(labels == 0)[4:]] = False
    trials = trials_of((vectors[kept], labels[kept], imitated[kept]), 4, impostors=10_000)
    assert 0 not in trials.identities[:, 0]
    assert (np.bincount(trials.identities[:, 1])[0]) == 4 * 5


@pytest.mark.parametrize("kind", [ZNorm, Dichotomy])
def test_a_rule_is_judged_on_identities_that_it_never_saw(kind):
    trials = trials_of(signatures(writers=12, vary=0.5))
    folds = folds_of(trials.identities, seed=0)
    scores = module._held_out_scores(kind, trials, folds)
    judged = (folds[trials.identities] == 0).any(axis=1)
    ones = {field.name: getattr(trials.evidence, field.name).copy() for field in dataclasses.fields(Evidence)}
    for name in ("own", "spread", "mean"):
        ones[name][judged] *= 0.5  # what the first fold shows, as references or as questions, is changed
    changed = dataclasses.replace(trials, evidence=Evidence(**ones))
    first = folds[trials.identities[:, 0]] == 0
    before, after = scores[~first & ~judged], module._held_out_scores(kind, changed, folds)[~first & ~judged]
    assert not np.allclose(before, after), "the other folds learn from the first one"
    learnt = module._fitted(kind, trials, ~judged)
    assert learnt == module._fitted(kind, changed, ~judged)
    np.testing.assert_allclose(scores[first], learnt(trials.evidence[first]))


def test_folds_spread_the_enrolled_identities_evenly():
    trials = trials_of(signatures(writers=13))
    folds = folds_of(trials.identities, seed=3)
    assert sorted(np.bincount(folds[np.unique(trials.identities[:, 0])])) == [2, 2, 3, 3, 3]


def test_where_hands_differ_in_steadiness_a_rule_that_knows_the_writer_is_chosen(fitted):
    assert fitted.rule.name in ("znorm", "dichotomy")
    assert fitted.figures[fitted.rule.name]["eer_skilled"] < fitted.figures["mean"]["eer_skilled"] - 0.05


def test_the_simplest_rule_is_kept_where_no_other_is_better():
    chosen = [fit_references(*signatures(vary=0.0, seed=seed), far=0.05).rule.name for seed in range(3)]
    assert set(chosen) <= {"mean", "centre"}


def test_figures_are_the_equal_error_rates_of_plain_rules():
    data = signatures(vary=0.5)
    found = fit_references(*data, far=0.05, seed=4)
    trials = draw_trials(*checked_identities(*data), 6, 60, np.random.default_rng(4))
    for others, key in ((trials.skilled, "eer_skilled"), (~trials.is_match & ~trials.skilled, "eer_random")):
        counted = others | trials.is_match
        expected = metrics.equal_error_rate(trials.evidence.mean[counted], trials.is_match[counted])[0]
        assert found.figures["mean"][key] == pytest.approx(expected)
    assert list(found.figures) == RULE_NAMES


def test_the_calibration_is_of_the_scores_of_the_rule(fitted):
    vectors, labels, imitated = signatures(vary=0.5)
    calibration = fitted.calibration
    assert (calibration.against, calibration.skilled, calibration.identities) == ("skilled", 180, 30)
    assert calibration.far <= 0.05
    assert calibration.matches == 360
    accepted = []
    for writer in range(30):
        own = np.flatnonzero(labels == writer)
        forged = np.flatnonzero(imitated == writer)
        accepted.append(fitted.scores(vectors[forged], vectors[own[:6]]) >= calibration.threshold)
    assert np.mean(accepted) < 0.12


def test_the_threshold_holds_on_writers_that_were_never_seen(fitted):
    vectors, labels, imitated = signatures(vary=0.5, seed=99)
    false = [
        fitted.scores(vectors[imitated == w], vectors[np.flatnonzero(labels == w)[:6]]) >= fitted.calibration.threshold
        for w in range(30)
    ]
    low, high = fitted.calibration.far_interval
    assert low <= np.mean(false) <= high


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_rule_can_be_asked_for(rule):
    found = fit_references(*signatures(writers=12), far=0.05, rule=rule)
    assert found.rule.name == rule
    assert f"rule {rule} asked for" in found.protocol


def test_without_forgeries_random_non_matches_decide():
    vectors, labels, imitated = signatures(vary=0.5)
    found = fit_references(vectors[imitated < 0], labels[imitated < 0], far=0.05, count=3)
    assert found.calibration.skilled == 0
    assert all(rates["eer_skilled"] is None for rates in found.figures.values())
    named = fit_references(
        vectors[imitated < 0], np.array([f"w{n:02d}" for n in labels[imitated < 0]]), far=0.05, count=3
    )
    assert named == found


def test_forgeries_of_one_identity_leave_the_choice_to_random_non_matches():
    vectors, labels, imitated = signatures(writers=12, forged=60, vary=0.5)
    kept = imitated <= 0
    data = vectors[kept], labels[kept], imitated[kept]
    found = fit_references(*data, far=0.05)
    assert (found.calibration.against, found.calibration.skilled) == ("skilled", 60)
    assert "chosen on random non-matches, as the forgeries imitate one identity alone" in found.protocol
    assert "chosen on random" not in fit_references(vectors, labels, imitated, far=0.05).protocol
    trials = trials_of(data)
    others = module._deciding(trials)
    np.testing.assert_array_equal(others, ~trials.is_match & ~trials.skilled)
    assert module._half_total_errors(trials.evidence.mean, trials, others).shape == (12,)


def test_a_single_reference_leaves_nothing_to_choose():
    found = fit_references(*signatures(), far=0.05, count=1)
    assert (found.rule, list(found.figures)) == (Mean(), ["mean"])


def test_the_same_seed_gives_the_same_calibration_and_another_one_another():
    data = signatures(writers=12, vary=0.5)
    first, again, other = (fit_references(*data, far=0.05, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_an_unsure_band_is_passed_on():
    found = fit_references(*signatures(vary=0.5), far=0.05, frr=0.02, rule="max")
    assert found.calibration.reject_below is not None
    middle = (found.calibration.reject_below + found.calibration.threshold) / 2
    assert found.calibration.verdict(middle) == "unsure"


def test_stricter_rates_have_higher_thresholds_as_far_as_the_data_reach(fitted):
    rates, thresholds = zip(*fitted.thresholds, strict=True)
    assert rates[0] == 0.05
    assert list(rates) == sorted(rates, reverse=True)
    assert list(thresholds) == sorted(thresholds)
    assert rates[-1] >= 3 / fitted.calibration.random
    assert rates[-1] < 3 * 3 / fitted.calibration.random
    for far in (0.05, 0.004, 1e-9):
        rate, threshold = fitted.threshold_for(far)
        assert rate == next((known for known in rates if known <= far), rates[-1])
        assert threshold >= fitted.calibration.threshold


def test_a_rate_that_random_non_matches_are_too_few_for_is_not_said_to_be_kept():
    # Three writers with seven images: 42 random non-matches, of the 60 that the rate needs; forgeries are enough.
    found = fit_references(*signatures(writers=3, genuine=7, forged=20), far=0.05)
    assert (found.calibration.random, found.calibration.skilled) == (42, 60)
    assert [rate for rate, _ in found.thresholds] == [3 / 42]
    assert found.threshold_for(0.05)[0] == 3 / 42
    assert ReferenceCalibration.from_dict(found.to_dict()) == found
    assert module._series(np.arange(60.0), 0.05)[0][0] == 0.05


def test_what_is_saved_is_what_is_loaded(fitted):
    assert ReferenceCalibration.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("count", 0, "count"),
        ("count", True, "count"),
        ("protocol", None, "protocol must be text"),
        ("thresholds", [], "thresholds"),
        ("thresholds", [[0.05, 1.0], [0.05, 2.0]], "must fall"),
        ("thresholds", [[2.0, 1.0]], "rate"),
        ("figures", {"median": {"eer_skilled": None, "eer_random": 0.1}}, "median"),
        ("figures", {"mean": {"eer_skilled": None, "eer_random": 1.5}}, "eer_random"),
        ("figures", [], "figures"),
        ("rule", {"name": "median"}, "name of the rule"),
        ("calibration", {}, "missing"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused(fitted, key, value, named):
    with pytest.raises(VerifierError, match=named):
        ReferenceCalibration.from_dict(fitted.to_dict() | {key: value})


def test_scores_of_no_reference_are_refused(fitted):
    with pytest.raises(VectorError, match="n of at least 1"):
        fitted.scores(np.eye(3), np.zeros((0, 3)))
    assert rule_scores(Mean(), np.eye(3)[:1], np.eye(3)[:2])[0] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"count": 12}, DataError, "12 references .* at least 13 genuine images; got 0 of 12"),
        ({"count": 0}, ConfigError, "at least 1; got 0"),
        ({"count": True}, ConfigError, "whole number"),
        ({"rule": "maximum"}, ConfigError, "did you mean 'max'"),
        ({"far": 0.0}, ConfigError, "false-accept rate"),
        ({"far": 0.001}, VerifierError, "3,000"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"labels": np.arange(3)}, DataError, "labels must be 216"),
        ({"labels": np.linspace(0, 1, 216)}, DataError, "whole numbers or texts"),
        ({"forgery_of": np.full(216, 7_000)}, DataError, "7000, which has no genuine image"),
        ({"forgery_of": np.zeros(3, dtype=int)}, DataError, "forgery_of and labels"),
        ({"vectors": np.full((216, 4), np.nan)}, VectorError, "finite"),
    ],
)
def test_bad_input_is_one_clear_error(changes, error, named):
    vectors, labels, imitated = signatures(writers=12)
    arguments = {"vectors": vectors, "labels": labels, "forgery_of": imitated, "far": 0.05} | changes
    with pytest.raises(error, match=named) as caught:
        fit_references(**arguments)
    assert "\n" not in str(caught.value)


def test_two_identities_are_too_few():
    with pytest.raises(DataError, match="need 3 identities"):
        fit_references(*signatures(writers=2), far=0.05)
