"""The two protocols for signatures: what is paired with what, and how often."""

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate import Signatures, evaluate_embeddings, evaluate_signatures, signature_pairs


def signatures(writers=12, genuine=8, forged=6, seed=0):
    """Return embeddings of signatures: forgeries lie near the writer that they imitate."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(writers, 10))
    labels, forgery_of, rows = [], [], []
    for writer in range(writers):
        labels += [writer] * genuine + list(range(writers + writer * forged, writers + (writer + 1) * forged))
        forgery_of += [-1] * genuine + [writer] * forged
        rows.append(centres[writer] + 0.5 * rng.normal(size=(genuine, 10)))
        rows.append(centres[writer] + 0.7 * rng.normal(size=(forged, 10)))
    names = [f"writer {one:02}" for one in range(writers)] + [f"forgery {one}" for one in range(writers * forged)]
    return Signatures(np.concatenate(rows), np.array(labels), np.array(forgery_of), names)


def test_pairs_are_all_genuine_ones_against_as_many_forged_and_random_ones():
    given = signatures()
    pairs = signature_pairs(given)
    left, right = pairs.images.T
    for writer in range(12):
        matching = pairs.is_match & (pairs.identities[:, 0] == writer)
        imitated = pairs.skilled & (pairs.identities[:, 0] == writer)
        random = ~pairs.is_match & ~pairs.skilled & (pairs.identities[:, 0] == writer)
        assert matching.sum() == imitated.sum() == random.sum() == 8 * 7 // 2
        assert np.all(given.labels[left[matching]] == writer)
        assert np.all(given.labels[right[matching]] == writer)
        assert np.all(given.forgery_of[right[imitated]] == writer)
        assert np.all(given.forgery_of[right[random]] == -1)
        assert np.all(given.labels[right[random]] != writer)
    assert np.all(given.forgery_of[left] == -1)
    assert len(np.unique(pairs.images, axis=0)) == len(pairs), "no pair twice"
    assert np.all(left != right)


def test_few_forgeries_are_all_taken():
    pairs = signature_pairs(signatures(genuine=8, forged=2))
    assert pairs.skilled.sum() == 12 * 8 * 2  # fewer than the 28 matching pairs of a writer
    assert pairs.is_match.sum() == 12 * 28


def test_the_report_has_both_kinds_of_forgery_and_the_mean_over_writers():
    given = signatures()
    report = evaluate_signatures(given, rounds=10)
    pairs = signature_pairs(given)
    chosen = pairs.is_match | pairs.skilled
    assert (
        report.pairs.kinds["skilled"].eer.value
        == metrics.equal_error_rate(pairs.scores[chosen], pairs.is_match[chosen])[0]
    )
    own = []
    for writer in range(12):
        mine = chosen & (pairs.identities[:, 0] == writer)
        own.append(metrics.equal_error_rate(pairs.scores[mine], pairs.is_match[mine])[0])
    assert report.pairs.mean_identity_eer == pytest.approx(np.mean(own))
    assert (report.writers, report.genuine, report.forged) == (12, 96, 72)
    assert report.pairs.kinds["skilled"].eer.interval is not None


def test_an_evaluation_with_forgeries_follows_the_protocols():
    given = signatures()
    report = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of, names=given.writers)
    assert report.verification is report.signatures.pairs
    assert report.retrieval.queries == 96  # a forgery is found by nobody, and in the way of all
    assert report.paired_images == len(np.unique(report.pairs.images))
    assert report.verification.identities[0].identity.startswith("writer")
    assert {"pairs", "references"} <= set(report.definitions)
    assert set(report.to_dict()["references"]["rules"]) == {"mean", "max"}
    unnamed = evaluate_embeddings(given.vectors, given.labels, forgery_of=given.forgery_of)
    assert unnamed.verification.eer == report.verification.eer


def test_bad_signatures_are_one_clear_error():
    z = np.eye(4) + 0.1
    none = np.full(4, -1)
    with pytest.raises(DataError, match="got none"):
        Signatures(z, np.array([0, 0, 1, 1]), none, ("a", "b"))
    with pytest.raises(DataError, match="no writer has two genuine"):
        Signatures(z, np.array([0, 1, 2, 3]), np.array([-1, -1, -1, 0]), "abcd")
    with pytest.raises(DataError, match="one number for each of the 4 images"):
        Signatures(z, np.array(list("aabb")), none, ("a", "b"))
    with pytest.raises(DataError, match="numbers of the 1 writers; got 1"):
        Signatures(z, np.array([0, 0, 1, 1]), none, ("a",))
