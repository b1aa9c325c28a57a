import json
import subprocess
import sys

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.evaluate import (
    evaluate,
    evaluate_embeddings,
    evaluate_retrieval,
    evaluate_verification,
)


def clustered(n=120, classes=12, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(classes, 8))[labels] + noise * rng.normal(size=(n, 8)), labels


class TableModel:
    """Gives each image, an array with its number, its row of a table."""

    fingerprint = "sha256:table"

    def __init__(self, table):
        self.table = table / np.linalg.norm(table, axis=1, keepdims=True)
        self.calls = 0

    def encode(self, images, *, batch_size=64, progress=False):
        self.calls += 1
        return self.table[[int(image[0, 0]) for image in images]].astype(np.float32)


def test_evaluate_reports_what_the_metrics_say():
    z, labels = clustered()
    images = [np.full((1, 1), i, dtype=np.uint8) for i in range(len(z))]
    report = evaluate(TableModel(z), images, labels).to_dict()
    unit = TableModel(z).table.astype(np.float32)
    scores, is_match = metrics.pair_scores(unit, labels)
    recall = metrics.recall_at_k(unit, labels, ks=(1, 5))
    assert report["recall@1"] == recall[1]
    assert report["recall@5"] == recall[5]
    assert report["map@r"] == metrics.map_at_r(unit, labels)
    assert (report["eer"], report["eer_threshold"]) == metrics.equal_error_rate(scores, is_match)
    assert report["auc"] == metrics.roc_auc(scores, is_match)
    assert report["tar@far=0.01"] == metrics.tar_at_far(scores, is_match, 0.01)
    assert report["tar@far=0.001"] == metrics.tar_at_far(scores, is_match, 0.001)
    assert (report["queries"], report["images"], report["classes"]) == (120, 120, 12)
    assert (report["matches"], report["non_matches"]) == (12 * 45, 120 * 119 // 2 - 12 * 45)
    assert report["recall@1_interval"][0] <= report["recall@1"] <= report["recall@1_interval"][1]
    assert report["eer_interval"][0] <= report["eer"] <= report["eer_interval"][1]


def test_a_report_is_json_and_repeats():
    z, labels = clustered(60)
    first = json.dumps(evaluate_embeddings(z, labels).to_dict(), allow_nan=False)
    assert json.dumps(evaluate_embeddings(z, labels).to_dict(), allow_nan=False) == first
    assert list(json.loads(first))[:4] == ["recall@1", "recall@1_interval", "recall@5", "map@r"]


def test_more_pairs_than_asked_for_are_thinned_by_images():
    z, labels = clustered(120)
    report = evaluate_embeddings(z, labels, max_pairs=1000)
    assert report.paired_images == 45  # 45 * 44 / 2 = 990
    assert report.verification.matches + report.verification.non_matches == 990
    assert report.retrieval.images == 120
    exact = evaluate_embeddings(z[:45], labels[:45], max_pairs=990)
    assert exact.paired_images == 45


def test_a_rate_that_cannot_be_seen_is_left_out():
    scores, is_match = np.linspace(0, 1, 140), np.arange(140) >= 40
    report = evaluate_verification(scores, is_match, fars=(0.1, 0.025, 0.01))
    assert report.tar_at_far == {0.1: 1.0, 0.025: 1.0, 0.01: None}
    assert report.to_dict()["tar@far=0.01"] is None
    assert report.eer_interval is None
    assert (report.matches, report.non_matches) == (100, 40)


def test_singletons_and_one_class_are_counted_not_judged():
    z, _ = clustered(6)
    report = evaluate_retrieval(z, ["a", "a", "a", "b", "c", "d"])
    assert (report.queries, report.images, report.classes) == (3, 6, 4)
    assert report.recall_at_1_interval is None  # over one class nothing can be drawn


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"] * 4, "got 6 matching and 0 non-matching"), ("abcd", "one class"), (list("abcd"), "no query"), (["a"], "4")],
)
def test_unusable_labels_are_one_clear_error(labels, message):
    with pytest.raises(DataError, match=message):
        evaluate_embeddings(np.eye(4) + 0.1, labels)


def test_labels_are_checked_before_images_are_encoded():
    model = TableModel(np.eye(2))
    with pytest.raises(DataError, match=r"each of the 2 images; got shape \(3,\)"):
        evaluate(model, [np.zeros((1, 1)), np.ones((1, 1))], [0, 1, 1])
    assert model.calls == 0


def test_contradicting_identities_and_bad_input_are_one_clear_error():
    with pytest.raises(DataError, match="pair 1 contradicts"):
        evaluate_verification([0.9, 0.1], [1, 0], identities=[["a", "a"], ["b", "b"]])
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        evaluate_verification([0.9, 0.1], [1, 0], identities=["a", "b"])
    with pytest.raises(ConfigError, match="max_pairs"):
        evaluate_embeddings(np.eye(2), [0, 0], max_pairs=0)
    with pytest.raises(VectorError, match="NaN"):
        evaluate_embeddings([[np.nan, 1.0], [1, 0]], [0, 0])


def test_measuring_never_imports_torch():
    code = "import sys, vitembed.evaluate, vitembed.verify, vitembed.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
