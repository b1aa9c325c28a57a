"""A whole evaluation is what the metrics say, with intervals, definitions and the images it is of."""

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, ModelMismatchError, VectorError
from vitembed.evaluate import (
    Task,
    evaluate,
    evaluate_data,
    evaluate_embeddings,
    evaluate_gallery,
    evaluate_given_pairs,
)
from vitembed.verify import Pairs, Verifier


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


@dataclass
class Data:
    images: list
    labels: np.ndarray
    classes: tuple
    forgery_of: np.ndarray | None = None


def pictures(numbers):
    return [np.full((1, 1), i, dtype=np.uint8) for i in numbers]


def data_set(n=120, classes=12):
    z, labels = clustered(n, classes)
    return TableModel(z), Data(pictures(range(n)), labels, tuple(f"class {i:02}" for i in range(classes)))


def test_evaluate_reports_what_the_metrics_say():
    z, labels = clustered()
    report = evaluate(TableModel(z), pictures(range(120)), labels).to_dict()
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
    for name in ("recall@1", "map@r", "mrr", "eer", "auc", "tar@far=0.01"):
        low, high = report[f"{name}_interval"]
        assert low <= report[name] <= high, name


def test_a_report_is_json_repeats_and_defines_its_figures():
    z, labels = clustered(60)
    first = json.dumps(evaluate_embeddings(z, labels).to_dict(), allow_nan=False)
    assert json.dumps(evaluate_embeddings(z, labels).to_dict(), allow_nan=False) == first
    document = json.loads(first)
    assert list(document)[:2] == ["recall@1", "recall@1_interval"]
    assert {"self-match", "match", "EER", "TAR@FAR", "MAP@R", "intervals", "pairs"} <= set(document["definitions"])
    assert "a posteriori" in document["definitions"]["EER"]


def test_more_pairs_than_asked_for_are_thinned_by_images():
    z, labels = clustered(120)
    report = evaluate_embeddings(z, labels, max_pairs=1000)
    assert report.paired_images == 45  # 45 * 44 / 2 = 990
    assert report.verification.matches + report.verification.non_matches == 990
    assert report.retrieval.images == 120
    assert len(np.unique(report.pairs.images)) == 45
    exact = evaluate_embeddings(z[:45], labels[:45], max_pairs=990)
    assert exact.paired_images == 45


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
    one_sided = Pairs(tuple(pictures([0])), tuple(pictures([1])), np.array([True]))
    with pytest.raises(DataError, match="both kinds"):
        evaluate_given_pairs(model, one_sided)
    assert model.calls == 0


def test_bad_input_is_one_clear_error():
    with pytest.raises(ConfigError, match="max_pairs"):
        evaluate_embeddings(np.eye(2), [0, 0], max_pairs=0)
    with pytest.raises(VectorError, match="NaN"):
        evaluate_embeddings([[np.nan, 1.0], [1, 0]], [0, 0])
    with pytest.raises(DataError, match="positions in the 1 names"):
        evaluate_embeddings(np.eye(2), [0, 1], names=["a"])


def test_a_gallery_is_searched_and_paired_across():
    z, labels = clustered(80, classes=10, noise=0.3)
    report = evaluate_gallery(z[:30], labels[:30], z[30:], labels[30:])
    assert report.retrieval.recall_at_1 == metrics.recall_at_k(z[:30], labels[:30], (1,), z[30:], labels[30:])[1]
    assert report.retrieval.gallery == 50
    assert len(report.pairs) == 30 * 50
    unit = metrics.unit_rows(z)
    left, right = report.pairs.images.T
    assert left.max() == 29
    assert right.min() == 30
    np.testing.assert_allclose(report.pairs.scores, np.sum(unit[left] * unit[right], axis=1), atol=1e-12)
    np.testing.assert_array_equal(report.pairs.is_match, labels[left] == labels[right])
    assert "gallery" in report.definitions
    assert "self-match" not in report.definitions
    thinned = evaluate_gallery(z[:30], labels[:30], z[30:], labels[30:], max_pairs=375)
    assert 300 <= len(thinned.pairs) <= 375
    assert thinned.retrieval.gallery == 50


def test_given_pairs_are_scored_by_the_model_and_each_image_is_encoded_once():
    z, labels = clustered(40, classes=10)
    images = pictures(range(40))
    pairs = Pairs.from_labels(images, labels, max_pairs=60)
    model = TableModel(z)
    report = evaluate_given_pairs(model, pairs)
    assert model.calls == 1
    assert report.retrieval is None
    numbers = [[int(image[0, 0]) for image in side] for side in (pairs.left, pairs.right)]
    expected = np.sum(model.table[numbers[0]] * model.table[numbers[1]], axis=1)
    np.testing.assert_allclose(report.pairs.scores, expected, atol=1e-6)
    shown = [[int(report.images[at][0, 0]) for at in side] for side in report.pairs.images.T]
    assert shown == numbers
    assert report.verification.matches == np.count_nonzero(pairs.is_match)


def test_evaluate_data_does_all_that_was_asked_for():
    model, data = data_set()
    train = Data(pictures(range(60)), data.labels[:60], data.classes)
    test = Data(pictures(range(60, 120)), data.labels[60:], data.classes)
    report = evaluate_data(model, test, train=train, few_shot=[Task(5, 1), Task(3, 2)])
    document = report.to_dict()
    assert [few["ways"] for few in document["few_shot"]] == [5, 3]
    assert document["split"]["shared_identities"] == list(data.classes)
    assert report.verification.identities[0].identity.startswith("class ")
    assert report.images is test.images
    searched = evaluate_data(model, test, gallery=train)
    assert searched.retrieval.gallery == 60
    assert [int(image[0, 0]) for image in searched.images] == [*range(60, 120), *range(60)]
    pairs = Pairs.from_labels(data.images, data.labels, max_pairs=80)
    given = evaluate_data(model, test, pairs=pairs)
    assert given.retrieval.images == 60
    assert given.verification.matches + given.verification.non_matches == len(pairs)


def test_a_verifier_of_another_model_is_refused_before_the_work():
    model, data = data_set()
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.8, 0.1, 100), rng.normal(0, 0.1, 400)])
    verifier = Verifier.calibrate(scores, np.arange(500) < 100, far=0.01, fingerprint="sha256:other")
    with pytest.raises(ModelMismatchError, match="belongs to the model"):
        evaluate_data(model, data, verifier=verifier)
    assert model.calls == 0


def test_measuring_never_imports_torch():
    code = "import sys, vitembed.evaluate, vitembed.evaluation_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
