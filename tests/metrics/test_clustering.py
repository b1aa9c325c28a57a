import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError


def blobs(classes=6, each=20, dim=8, noise=0.2, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return rng.normal(size=(classes, dim))[labels] + noise * rng.normal(size=(classes * each, dim)), labels


@pytest.mark.parametrize(("left", "right"), [(1, 1), (1, 4), (5, 5), (3, 40), (100, 100)])
def test_mutual_information_equals_scikit_learn(left, right):
    rng = np.random.default_rng(left)
    labels, clusters = rng.integers(left, size=200), rng.integers(right, size=200)
    names = np.array([f"é{label}" for label in labels])
    for a, b in ((names, clusters), (clusters, names), (labels, (labels * 7) % 11)):
        assert metrics.normalized_mutual_information(a, b) == pytest.approx(normalized_mutual_info_score(a, b))


def test_the_figure_of_an_embedding_equals_that_of_pytorch_metric_learning():
    module = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch = pytest.importorskip("torch")
    z, labels = blobs(noise=1.5)
    clusters = metrics.cluster_rows(z, 6)
    calculator = module.AccuracyCalculator(
        include=("NMI",), kmeans_func=lambda x, n: torch.tensor(clusters), device=torch.device("cpu")
    )
    peer = calculator.get_accuracy(torch.tensor(z), torch.tensor(labels))["NMI"]
    assert metrics.normalized_mutual_information(labels, clusters) == pytest.approx(peer)
    assert 0.1 < peer < 0.9


def test_clusters_that_lie_apart_are_found():
    z, labels = blobs()
    lengths = np.random.default_rng(1).uniform(0.1, 9, size=(len(z), 1))
    # One start in a few ends in a worse optimum, as with any k-means.
    found = [metrics.normalized_mutual_information(labels, metrics.cluster_rows(z * lengths, 6, s)) for s in range(4)]
    assert max(found) == pytest.approx(1)


def test_no_row_is_nearer_to_another_centre():
    z, _ = blobs(noise=2)
    clusters = metrics.cluster_rows(z, 9, seed=4)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    centres = np.stack([unit[clusters == c].mean(axis=0) for c in range(9)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    np.testing.assert_array_equal((unit @ centres.T).argmax(axis=1), clusters)


def test_the_clusters_are_about_as_tight_as_those_of_scikit_learn():
    from sklearn.cluster import KMeans

    z, _ = blobs(classes=12, noise=1)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)

    def tightness(clusters):
        return sum(np.linalg.norm(unit[clusters == c].sum(axis=0)) for c in range(12)) / len(unit)

    peer = np.mean([tightness(KMeans(12, n_init=1, random_state=seed).fit_predict(unit)) for seed in range(5)])
    ours = np.mean([tightness(metrics.cluster_rows(z, 12, seed=seed)) for seed in range(5)])
    assert ours == pytest.approx(peer, abs=0.01)


@pytest.mark.parametrize("clusters", [1, 7, 20])
def test_every_cluster_has_a_row_even_where_rows_are_alike(clusters):
    z = np.ones((20, 3), dtype=np.float32)
    assert set(metrics.cluster_rows(z, clusters)) == set(range(clusters))
    z[10:] = [1, -1, 0]
    assert set(metrics.cluster_rows(z, clusters, seed=3)) == set(range(clusters))


def test_the_seed_decides():
    z, _ = blobs(noise=2)
    np.testing.assert_array_equal(metrics.cluster_rows(z, 5, seed=1), metrics.cluster_rows(z, 5, seed=1))
    assert np.any(metrics.cluster_rows(z, 5, seed=1) != metrics.cluster_rows(z, 5, seed=2))


def test_bad_input_is_one_clear_error():
    for clusters in (0, 3):
        with pytest.raises(ConfigError, match=f"at most the 2 rows; got {clusters}"):
            metrics.cluster_rows(np.eye(2), clusters)
    with pytest.raises(VectorError, match="row 1 is all zeros"):
        metrics.cluster_rows([[1.0, 2], [0, 0]], 2)
    for labels, clusters in (([], []), ([0, 1], [0, 1, 2])):
        with pytest.raises(DataError, match=f"at least 1; got {len(labels)} and {len(clusters)}"):
            metrics.normalized_mutual_information(labels, clusters)
    with pytest.raises(DataError, match="clusters must be integers or strings without gaps"):
        metrics.normalized_mutual_information([0, 1], [0, np.nan])
