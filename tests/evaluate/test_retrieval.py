"""Retrieval reports are means over the queries of one search, and say what they left out."""

import numpy as np
import pytest

from tests.evaluate.test_evaluation import clustered
from vitembed import metrics
from vitembed.errors import DataError
from vitembed.evaluate import evaluate_retrieval


def test_every_figure_is_that_of_its_metric():
    z, labels = clustered(150, classes=15)
    report = evaluate_retrieval(z, labels)
    expected = {
        "recall@10": metrics.recall_at_k(z, labels, (10,))[10],
        "r-precision": metrics.r_precision(z, labels),
        "map": metrics.mean_average_precision(z, labels),
        "mrr": metrics.mean_reciprocal_rank(z, labels),
        "precision@5": metrics.precision_at_k(z, labels, (5,))[5],
        "5-nn accuracy": metrics.knn_accuracy(z, labels, 5),
        "nmi": metrics.normalized_mutual_information(labels, metrics.cluster_rows(z, 15, 0)),
    }
    assert {name: report.figures[name].value for name in expected} == expected
    assert "NMI" in report.definitions
    assert report.to_dict()["mrr_interval"] == list(report.figures["mrr"].interval)


def test_intervals_are_those_of_the_bootstrap_over_classes():
    z, labels = clustered(150, classes=15)
    hits = metrics.query_ranks(z, labels).first_rank == 1
    report = evaluate_retrieval(z, labels, rounds=50, seed=4)
    expected = metrics.bootstrap_interval(lambda at: float(np.mean(hits[at])), labels, rounds=50, seed=4)
    assert report.recall_at_1_interval == pytest.approx(expected, abs=1e-12)


def test_singletons_and_one_class_are_counted_not_judged():
    z, _ = clustered(6)
    report = evaluate_retrieval(z, ["a", "a", "a", "b", "c", "d"])
    assert (report.queries, report.images, report.classes) == (3, 6, 4)
    assert report.recall_at_1_interval is None  # over one class nothing can be drawn
    assert "nmi" not in report.figures  # nor clustered
    assert "NMI" not in report.definitions


def test_a_gallery_without_the_classes_of_the_queries_is_one_clear_error():
    with pytest.raises(DataError, match="no query"):
        evaluate_retrieval(np.eye(2), ["a", "b"], gallery=np.eye(2), gallery_labels=["c", "d"])


def test_figures_that_would_take_long_are_left_out_of_large_sets(monkeypatch):
    monkeypatch.setattr("vitembed.evaluate.retrieval._ALL_RANKS", 60 * 60 - 1)
    monkeypatch.setattr("vitembed.evaluate.retrieval._CLUSTERING", 60 * 12 - 1)
    z, labels = clustered(60)
    report = evaluate_retrieval(z, labels)
    assert not {"map", "nmi"} & set(report.to_dict())
    assert not {"mAP", "NMI"} & set(report.definitions)
    assert report.map_at_r == metrics.map_at_r(z, labels)


def test_figures_without_an_error_have_no_interval():
    z, labels = np.eye(12)[np.arange(48) % 12], np.arange(48) % 12
    found = evaluate_retrieval(z, labels).figures
    assert (found["recall@1"].value, found["recall@1"].interval) == (1.0, None)
    assert (found["map@r"].value, found["map@r"].interval) == (1.0, None)
