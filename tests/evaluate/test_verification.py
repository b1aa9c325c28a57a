"""Verification figures: kinds apart, intervals over identities, a verifier's decisions and its probabilities."""

import dataclasses

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate import (
    EvaluatedPairs,
    Figure,
    evaluate_pairs,
    evaluate_verification,
    identity_errors,
    worst_mistakes,
)
from vitembed.evaluate.scored import score_pairs
from vitembed.verify import calibrate


def signature_like(identities=14, seed=0):
    """Return scores, is_match, identities and skilled of pairs in which skilled forgeries score between the others."""
    rng = np.random.default_rng(seed)
    rows = []
    for one in range(identities):
        rows += [(rng.normal(0.8, 0.1), True, one, one, False) for _ in range(10)]
        rows += [(rng.normal(0.6, 0.1), False, one, one, True) for _ in range(10)]
        rows += [(rng.normal(0.2, 0.1), False, one, (one + step) % identities, False) for step in range(1, 9)]
    scores, match, left, right, skilled = map(np.array, zip(*rows, strict=True))
    return np.clip(scores, -1, 1), match, np.stack([left, right], axis=1), skilled


def test_random_and_skilled_forgeries_are_told_apart():
    scores, match, identities, skilled = signature_like()
    report = evaluate_verification(scores, match, identities=identities, skilled=skilled, rounds=20)
    for kind, chosen in (("random", match | ~skilled), ("skilled", match | skilled)):
        separation = report.kinds[kind]
        assert (separation.eer.value, separation.eer_threshold) == metrics.equal_error_rate(
            scores[chosen], match[chosen]
        )
        assert separation.auc.value == metrics.roc_auc(scores[chosen], match[chosen])
        assert separation.eer.interval[0] <= separation.eer.value <= separation.eer.interval[1]
        assert separation.matches == 140
    assert report.kinds["skilled"].eer.value > report.kinds["random"].eer.value
    assert report.eer == metrics.equal_error_rate(scores, match)[0]
    assert set(report.to_dict()) >= {"random", "skilled", "eer", "mean_identity_eer"}
    assert "random, skilled" in report.definitions
    assert "random, skilled" not in evaluate_verification(scores, match).definitions


def test_intervals_are_those_of_the_bootstrap_over_identities():
    scores, match, identities, skilled = signature_like()
    report = evaluate_verification(scores, match, identities=identities, skilled=skilled, rounds=30, seed=3)

    def eer(at):
        return metrics.equal_error_rate(scores[at], match[at])[0]

    expected = metrics.bootstrap_interval(eer, identities, rounds=30, seed=3)
    assert report.eer_interval == pytest.approx(expected, abs=1e-12)


def test_a_rate_that_cannot_be_seen_is_left_out():
    scores, is_match = np.linspace(0, 1, 140), np.arange(140) >= 40
    report = evaluate_verification(scores, is_match, fars=(0.1, 0.025, 0.01))
    assert report.tar_at_far == {0.1: 1.0, 0.025: 1.0, 0.01: None}
    assert report.to_dict()["tar@far=0.01"] is None
    assert report.eer_interval is None
    assert (report.matches, report.non_matches) == (100, 40)
    assert report.identities == ()


def test_contradicting_identities_and_bad_input_are_one_clear_error():
    with pytest.raises(DataError, match="pair 1 contradicts"):
        evaluate_verification([0.9, 0.1], [1, 0], identities=[["a", "a"], ["b", "b"]])
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        evaluate_verification([0.9, 0.1], [1, 0], identities=["a", "b"])
    with pytest.raises(DataError, match="pair 0 is called both"):
        evaluate_verification([0.9, 0.1], [1, 0], skilled=np.array([True, False]))
    with pytest.raises(DataError, match="a boolean for each of 2 pairs"):
        evaluate_verification([0.9, 0.1], [1, 0], skilled=[1, 0])
    with pytest.raises(DataError, match="both kinds"):
        evaluate_verification([0.9, 0.1], [1, 1])


def test_errors_of_an_identity_are_counted_as_a_plain_loop_does():
    scores, match, identities, skilled = signature_like(identities=9, seed=1)
    pairs = EvaluatedPairs.named(scores, match, identities, skilled)
    found = {one.identity: one for one in identity_errors(pairs, 0.65)}
    for name in range(9):
        rows = [at for at in range(len(pairs)) if name in identities[at]]
        own = [at for at in rows if match[at]]
        forged = [at for at in rows if skilled[at]]
        random = [at for at in rows if not match[at] and not skilled[at]]
        one = found[str(name)]
        assert (one.matches, one.skilled, one.random) == (len(own), len(forged), len(random))
        assert one.frr == pytest.approx(np.mean([scores[at] < 0.65 for at in own]))
        assert one.far_skilled == pytest.approx(np.mean([scores[at] >= 0.65 for at in forged]))
        assert one.far_random == pytest.approx(np.mean([scores[at] >= 0.65 for at in random]))
        both = np.array(own + forged)
        assert one.eer == metrics.equal_error_rate(scores[both], match[both])[0]


def test_without_forgeries_an_identity_is_judged_on_both_sides_of_its_pairs():
    scores, match = np.array([0.9, 0.2, 0.8, 0.3]), np.array([True, True, False, False])
    pairs = EvaluatedPairs.named(scores, match, [["a", "a"], ["b", "b"], ["a", "b"], ["b", "c"]])
    first, second, third = identity_errors(pairs, 0.5)
    assert (first.identity, first.frr, first.far_random) == ("b", 1.0, 0.5)
    assert (second.identity, second.frr, second.far_random, second.far_skilled) == ("a", 0.0, 1.0, None)
    assert (third.identity, third.frr, third.eer, third.matches) == ("c", None, None, 0)
    assert first.eer == metrics.equal_error_rate([0.2, 0.8, 0.3], [1, 0, 0])[0]


def test_the_worst_mistakes_are_the_most_extreme_scores_and_ties_keep_their_order():
    scores = np.array([0.9, 0.1, 0.7, 0.7, 0.3, 0.2, 0.95])
    match = np.array([True, True, False, False, True, False, True])
    found = worst_mistakes(EvaluatedPairs.named(scores, match), 0.5)
    assert (found.false_accepts, found.false_rejects) == ((2, 3), (1, 4))
    assert (found.accepted, found.rejected) == (2, 2)
    first = worst_mistakes(EvaluatedPairs.named(scores, match), 0.5, count=1)
    assert (first.false_accepts, first.false_rejects, first.accepted) == ((2,), (1,), 2)
    none = worst_mistakes(EvaluatedPairs.named([0.9, 0.1], [True, False]), 0.5)
    assert (none.false_accepts, none.false_rejects) == ((), ())


def test_a_verifier_is_judged_at_its_own_threshold():
    scores, match, identities, skilled = signature_like(seed=2)
    calibration = calibrate(scores, match, 0.05, identities=identities, skilled=skilled)
    others, other_match, other_identities, other_skilled = signature_like(seed=9)
    pairs = EvaluatedPairs.named(others, other_match, other_identities, other_skilled)
    report = evaluate_pairs(pairs, calibration=calibration, rounds=20)
    decision = report.decision
    accepted = others >= calibration.threshold
    assert decision.frr.value == pytest.approx(np.mean(~accepted[other_match]))
    assert decision.far_skilled.value == pytest.approx(np.mean(accepted[other_skilled]))
    assert decision.far_random.value == pytest.approx(np.mean(accepted[~other_match & ~other_skilled]))
    assert (decision.against, decision.far.value) == ("skilled", decision.far_skilled.value)
    assert decision.far.interval[0] <= decision.far.value <= decision.far.interval[1]
    low, high = decision.far_expected
    assert decision.as_expected == (low <= decision.far.value <= high)
    assert report.mistakes.threshold == calibration.threshold
    judged = other_match | other_skilled
    p = calibration.curve(others[judged])
    assert report.probabilities.brier == metrics.brier_score(p, other_match[judged], prior=0.5)
    assert report.probabilities.log_loss == metrics.log_loss(p, other_match[judged], prior=0.5)
    assert report.probabilities.ece < report.raw_probabilities.ece  # a cosine is no probability
    document = report.to_dict()
    assert {"probabilities", "raw_probabilities"} <= set(document)
    assert document["decision"]["far_wanted"] == 0.05
    assert {"decision", "probability"} <= set(report.definitions)


def test_scores_that_are_no_cosines_are_not_taken_for_probabilities():
    scores, match, identities, skilled = signature_like(seed=2)
    calibration = calibrate(5 * scores, match, 0.05, identities=identities, skilled=skilled)
    report = evaluate_pairs(EvaluatedPairs.named(5 * scores, match, identities, skilled), calibration=calibration)
    assert report.probabilities is not None
    assert report.raw_probabilities is None
    assert "raw_probabilities" not in report.to_dict()


def test_a_band_of_unsure_scores_is_counted():
    scores, match, identities, skilled = signature_like(seed=2)
    calibration = calibrate(scores, match, 0.05, frr=0.05, identities=identities, skilled=skilled)
    assert calibration.reject_below is not None
    report = evaluate_pairs(EvaluatedPairs.named(scores, match, identities, skilled), calibration=calibration)
    inside = (scores >= calibration.reject_below) & (scores < calibration.threshold)
    assert report.decision.unsure == pytest.approx(np.mean(inside))


def test_scores_of_pairs_do_not_depend_on_the_other_pairs():
    z = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32)
    left, right = np.triu_indices(50, 1)
    whole = score_pairs(z, left, right)
    assert whole[:7].tolist() == score_pairs(z, left[:7], right[:7]).tolist()
    assert np.all(np.abs(whole) <= 1)
    assert score_pairs(z, [3], [3])[0] == pytest.approx(1, abs=1e-6)


def judged_by(calibration, scores, match, identities=None, skilled=None):
    """Return what a verifier's threshold does with pairs."""
    pairs = EvaluatedPairs.named(scores, match, identities, skilled)
    return evaluate_pairs(pairs, calibration=calibration, rounds=20).decision


def test_nothing_is_expected_of_a_kind_of_pair_that_the_threshold_was_not_chosen_against():
    scores, match, identities, skilled = signature_like(seed=2)
    against = {
        kind: calibrate(scores, match, 0.05, identities=identities, skilled=skilled, against=kind)
        for kind in ("skilled", "random")
    }
    assert against["skilled"].far_interval is not None
    easy = match | ~skilled
    decision = judged_by(against["skilled"], scores[easy], match[easy], identities[easy], skilled[easy])
    assert (decision.against, decision.chosen_against) == ("all", "skilled")
    assert (decision.far_expected, decision.expected_for, decision.as_expected) == (None, None, None)
    assert decision.expectation is None
    assert "against skilled" not in decision.choice
    assert "of skilled forgeries. None are known here" in decision.choice
    random = judged_by(against["random"], scores[easy], match[easy], identities[easy])  # kinds are not told apart
    assert (random.against, random.far_expected) == ("random", against["random"].far_interval)
    forged = match | skilled
    none = judged_by(against["random"], scores[forged], match[forged], identities[forged], skilled[forged])
    assert (none.against, none.far_expected) == ("all", None)
    assert "of random pairs. None are known here" in none.choice


def test_fewer_identities_than_the_interval_is_for_are_not_compared_with_it():
    scores, match, identities, skilled = signature_like(identities=14, seed=2)
    fitted = {
        others: calibrate(
            scores, match, 0.05, identities=identities, skilled=skilled, against="random", test_identities=others
        )
        for others in (None, 10)
    }
    fewer = signature_like(identities=10, seed=9)
    decision = judged_by(fitted[None], *fewer)
    assert (decision.expected_for, decision.judged, decision.as_expected) == (14, 10, None)
    assert "on 14 other identities. Judged are 10, so that" in decision.expectation
    document = decision.to_dict()
    assert (document["expected_for"], document["judged"], document["as_expected"]) == (14, 10, None)
    asked = judged_by(fitted[10], *fewer)
    assert asked.as_expected in (True, False)
    assert "on 10 other identities; the measured rate, of 10 identities, lies" in asked.expectation
    unknown = judged_by(fitted[10], fewer[0], fewer[1], None, fewer[3])
    assert (unknown.judged, unknown.as_expected) == (None, None)
    assert "Judged are an unknown number" in unknown.expectation
    far_off = dataclasses.replace(decision, far=Figure(0.9), expected_for=10)
    assert far_off.as_expected is False
    assert "lies outside" in far_off.expectation


def test_a_rate_without_an_error_has_the_interval_of_the_pairs_that_were_seen():
    scores, match, identities, skilled = signature_like(seed=2)
    parted = np.where(match, scores + 5, scores)
    decision = judged_by(calibrate(parted, match, 0.05, identities=identities), parted, match, identities, skilled)
    assert decision.frr == Figure(0.0, metrics.wilson_interval(0, 140))
    assert decision.frr.interval[1] > 0.02
    hard = judged_by(calibrate(scores, match, 0.05, identities=identities), scores, match, identities, skilled)
    wrong, seen = int(np.sum(~(scores >= hard.threshold) & match)), int(match.sum())
    low, high = metrics.wilson_interval(wrong, seen)
    assert hard.frr.interval[0] <= low < high <= hard.frr.interval[1]


def test_figures_that_no_draw_changes_have_no_interval():
    scores, match, identities, skilled = signature_like(seed=2)
    parted = np.where(match, scores + 5, scores)
    report = evaluate_verification(parted, match, identities=identities, skilled=skilled, rounds=20)
    for separation in (report.overall, *report.kinds.values()):
        assert (separation.eer, separation.auc) == (Figure(0.0, None), Figure(1.0, None))
        assert separation.tar_at_far[0.01] == Figure(1.0, None)
    assert report.to_dict()["eer_interval"] is None
    assert "every draw gives the same" in report.definitions["intervals"]


def test_a_threshold_is_not_rounded_to_the_type_of_the_scores():
    score = np.float32(0.7)
    just_above = float(score) + 1e-9  # the same number in float32
    scores = np.array([0.9, score, score, 0.1], dtype=np.float32)
    match = np.array([True, True, False, False])
    pairs = EvaluatedPairs.named(scores, match, [["a", "a"], ["b", "b"], ["a", "b"], ["a", "b"]])
    assert pairs.scores.dtype == np.float32
    assert pairs.at_least(just_above).tolist() == [True, False, False, False]
    assert pairs.at_least(float(score)).tolist() == [True, True, True, False]
    found = worst_mistakes(pairs, just_above)
    assert (found.false_accepts, found.false_rejects) == ((), (1,))
    assert {one.identity: one.frr for one in identity_errors(pairs, just_above)} == {"a": 0.0, "b": 1.0}
    many, flags = np.tile(scores, 100), np.tile(match, 100)
    fitted = calibrate(many, flags, 0.05, frr=0.4)
    moved = dataclasses.replace(fitted, threshold=just_above, reject_below=just_above - 1e-12)
    decision = judged_by(moved, many, flags)
    assert (decision.far.value, decision.frr.value, decision.unsure) == (0.0, 0.5, 0.0)
