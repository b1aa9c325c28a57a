"""Decisions by references: who is enrolled, what is questioned, and by which score."""

import numpy as np
import pytest

from tests.evaluate.test_signatures import signatures
from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.evaluate import evaluate_embeddings, evaluate_references
from vitembed.verify import Verifier, fit_references


def measured(given, **options):
    return evaluate_references(given.vectors, given.labels, given.forgery_of, names=given.writers, rounds=5, **options)


def test_every_other_image_is_questioned_once_and_kinds_are_told_apart():
    given = signatures(writers=4, genuine=7, forged=3)
    report = measured(given, count=5)
    assert (report.count, report.enrolled, report.identities) == (5, 4, 4)
    assert list(report.rules) == ["mean", "max"]
    for one in report.rules.values():
        skilled, random = one.kinds["skilled"], one.kinds["random"]
        assert skilled.matches == random.matches <= 4 * 7
        assert skilled.non_matches == 4 * 3
        assert random.non_matches == 4 * 21
        assert one.protocol.startswith("5 genuine images of an identity are its references (4 of 4 identities")
        assert {one.identity for one in one.identities} == {f"writer 0{writer}" for writer in range(4)}


def test_a_verifiers_rule_is_judged_beside_mean_and_maximum():
    fitted, given = signatures(writers=20, seed=5), signatures(seed=6)
    references = fit_references(fitted.vectors, fitted.labels, fitted.forgery_of, count=5, far=0.1, rule="centre")
    report = measured(given, fitted=references)
    assert list(report.rules) == ["mean", "max", "centre"]
    assert report.count == 5, "as it was fitted for"
    assert measured(given).count == 6
    assert report.rules["centre"].decision.threshold == references.calibration.threshold
    assert report.rules["mean"].decision is None
    verifier = Verifier(references.calibration, references=references)
    whole = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of, verifier=verifier)
    assert whole.references.count == 5
    assert "centre" in whole.to_dict()["references"]["rules"]


def test_identities_without_forgeries_are_judged_by_references_too():
    given = signatures(writers=12)
    genuine = given.forgery_of < 0
    labels = np.array(given.writers)[given.labels[genuine]]
    report = evaluate_references(given.vectors[genuine], labels, count=4, rounds=5)
    assert report.rules["mean"].kinds == {}
    assert report.rules["max"].overall.auc.value > 0.7
    whole = evaluate_embeddings(given.vectors[genuine], labels)
    assert whole.references.enrolled == 12
    assert "references" in whole.definitions


def test_identities_with_few_images_are_left_out_and_counted():
    assert measured(signatures(writers=3, genuine=4), count=6).rules == {}
    given = signatures(writers=12)
    scarce = (given.labels < 4) & (np.arange(len(given.labels)) % 14 >= 6)  # leaves these writers six genuine images
    kept = ~(scarce & (given.forgery_of < 0))
    report = evaluate_references(given.vectors[kept], given.labels[kept], given.forgery_of[kept], rounds=5)
    assert (report.identities, report.enrolled) == (12, 8)
    assert "(8 of 12 identities have more; the others are not judged here)" in report.protocol
    assert len({one.identity for one in report.rules["mean"].identities if one.matches}) == 8


def test_the_mean_of_references_is_what_is_scored():
    # Two groups far from each other: references of one tell its own image from all of the other's without an error.
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(8)[:4], 10, axis=0) + 0.01 * rng.standard_normal((40, 8))
    report = evaluate_references(metrics.unit_rows(rows), np.repeat(np.arange(4), 10), rounds=5)
    assert report.rules["mean"].overall.eer.value == 0
    assert report.rules["mean"].overall.auc.value == 1


def test_what_does_not_fit_is_one_clear_error():
    given = signatures(writers=4)
    with pytest.raises(ConfigError, match="count of at least 1; got 0"):
        measured(given, count=0)
    with pytest.raises(DataError, match="labels must be"):
        evaluate_references(given.vectors, given.labels[1:])
