import doctest
import importlib
import tracemalloc

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics import ranks, standing

RNG = np.random.default_rng(0)
EVERYTHING = {"ks": (1, 3, 10), "full": True, "voters": 5}


def clustered(n=300, dim=16, classes=20, noise=0.8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, dim))  # the same for queries and gallery
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(dtype), labels


def small_tiles(monkeypatch, rows, columns, home=2**23, first=64):
    monkeypatch.setattr(ranks, "TILE_ROWS", rows)
    monkeypatch.setattr(ranks, "TILE_COLUMNS", columns)
    monkeypatch.setattr(ranks, "HOME_SCORES", home)
    monkeypatch.setattr(ranks, "_FIRST_COLUMNS", first)


def vote_by_hand(ranked, label):
    """Whether `label` wins a vote, the voters given as (score, class)."""
    votes, sums = {}, {}
    for score, name in ranked:
        votes[name] = votes.get(name, 0) + 1
        sums[name] = sums.get(name, 0) + score
    best = max((votes[name], sums[name]) for name in votes)
    return [name for name in votes if (votes[name], sums[name]) == best] == [label]


def ranks_by_hand(embeddings, labels, gallery=None, gallery_labels=None, ks=(), voters=5):
    """Every figure of each query from the whole sorted list, others first among equals."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    items = unit if gallery is None else gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    names = labels if gallery is None else gallery_labels
    found = []
    for i, row in enumerate(unit):
        others = [j for j in range(len(items)) if gallery is not None or j != i]
        score = {j: float(row @ items[j]) for j in others}
        others.sort(key=lambda j: (-score[j], names[j] == labels[i], list(names).count(names[j]), names[j]))
        hit = [names[j] == labels[i] for j in others]
        r = sum(hit)
        if r == 0:
            continue
        precision = [sum(hit[: k + 1]) / (k + 1) * hit[k] for k in range(len(hit))]
        voted = vote_by_hand([(score[j], names[j]) for j in others[:voters]], labels[i])
        at_k = [sum(hit[:k]) / k for k in ks]
        found.append(
            (i, r, hit.index(True) + 1, sum(precision[:r]) / r, sum(hit[:r]) / r, sum(precision) / r, voted, at_k)
        )
    return [np.array(column) for column in zip(*found, strict=True)]


def assert_as_by_hand(found, by_hand, ks):
    queries, r, first, at_r, r_precision, average, voted, at_k = by_hand
    np.testing.assert_array_equal(found.queries, queries)
    np.testing.assert_array_equal(found.matches, r)
    np.testing.assert_array_equal(found.first_rank, first)
    np.testing.assert_allclose(found.precision_at_r, at_r, rtol=1e-12)
    np.testing.assert_allclose(found.r_precision, r_precision, rtol=1e-12)
    np.testing.assert_allclose(found.average_precision, average, rtol=1e-12)
    np.testing.assert_array_equal(found.voted_right, voted)
    assert list(found.precision_at_k) == list(ks)
    for column, k in enumerate(ks):
        np.testing.assert_allclose(found.precision_at_k[k], at_k[:, column], rtol=1e-12)


@pytest.mark.parametrize("module", ["retrieval", "few_shot", "clustering"])
def test_hand_worked_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"vitembed.metrics.{module}"))
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("tiles", [(1, 64, 1, 1), (7, 128, 60, 3), (1_024, 4_096, 2**23, 64)])
@pytest.mark.parametrize("classes", [3, 25])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_query_ranks_equal_a_plain_loop(monkeypatch, tiles, classes, with_gallery):
    small_tiles(monkeypatch, *tiles)
    z, labels = clustered(230, classes=classes, noise=2, dtype=np.float64)
    g = clustered(200, classes=classes, noise=2, seed=1, dtype=np.float64) if with_gallery else (None, None)
    by_hand = ranks_by_hand(z, labels, *g, ks=EVERYTHING["ks"])
    assert_as_by_hand(metrics.query_ranks(z, labels, *g, **EVERYTHING), by_hand, EVERYTHING["ks"])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_gallery", [False, True])
def test_equal_scores_count_against_the_model(monkeypatch, seed, with_gallery):
    # Whole numbers of one length: cosines are exact, and most are shared by many pairs.
    rng = np.random.default_rng(seed)
    small_tiles(monkeypatch, int(rng.integers(1, 40)), 64, int(rng.integers(1, 2_000)), int(rng.integers(1, 20)))

    def draw(n):
        z = np.stack([rng.permutation([1.0, 1, -1, -1, 0, 0, 0, 0]) for _ in range(n)])
        return z, rng.choice([0, 1, 2, 2, 2, 3, 4, 5, 6, 7], size=n)

    z, labels = draw(230)
    g = draw(150) if with_gallery else (None, None)
    by_hand = ranks_by_hand(z, labels, *g, ks=(2,))
    assert_as_by_hand(metrics.query_ranks(z, labels, *g, ks=(2,), full=True, voters=5), by_hand, (2,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [300, 1_030, 2_051])
def test_copies_in_another_class_tie_with_the_match_wherever_they_lie(dtype, n):
    # Each image three times: twice in one class, once in a class far away. Found first or not is a matter of the tie
    # alone, and a last bit that differs between products of other shapes would show.
    rng = np.random.default_rng(n)
    z = np.tile(rng.normal(size=(n, 48)), (3, 1)).astype(dtype)
    labels = np.concatenate([np.arange(n), np.arange(n), n + rng.permutation(n) // 3])
    found = metrics.query_ranks(z, labels, full=True, voters=1)
    twice = found.queries < 2 * n
    assert np.all(found.first_rank[twice] == 2)
    assert np.all(found.average_precision[twice] == 0.5)
    assert not np.any(found.voted_right[twice])


def test_figures_do_not_depend_on_what_else_is_asked_for():
    z, labels = clustered(400, classes=30, noise=2)
    everything = metrics.query_ranks(z, labels, **EVERYTHING)
    alone = metrics.query_ranks(z, labels)
    np.testing.assert_array_equal(alone.first_rank, everything.first_rank)
    np.testing.assert_array_equal(alone.precision_at_r, everything.precision_at_r)
    np.testing.assert_array_equal(alone.r_precision, everything.r_precision)
    ranks_only = metrics.query_ranks(z, labels, precision=False)
    np.testing.assert_array_equal(ranks_only.first_rank, everything.first_rank)
    for empty in (ranks_only.precision_at_r, ranks_only.r_precision, alone.average_precision, alone.voted_right):
        assert empty.size == 0
    assert alone.precision_at_k == {}


def test_the_metrics_are_the_means_over_the_queries():
    z, labels = clustered(200, classes=30, noise=2)
    g = clustered(150, classes=30, noise=2, seed=1)
    found = metrics.query_ranks(z, labels, *g, **EVERYTHING)
    assert metrics.map_at_r(z, labels, *g) == np.mean(found.precision_at_r)
    assert metrics.r_precision(z, labels, *g) == np.mean(found.r_precision)
    assert metrics.mean_average_precision(z, labels, *g) == np.mean(found.average_precision)
    assert metrics.mean_reciprocal_rank(z, labels, *g) == np.mean(1 / found.first_rank)
    assert metrics.knn_accuracy(z, labels, 5, *g) == np.mean(found.voted_right)
    at_k = metrics.precision_at_k(z, labels, (10, 1, 3), *g)
    assert list(at_k.items()) == [(k, np.mean(found.precision_at_k[k])) for k in (10, 1, 3)]
    recall = metrics.recall_at_k(z, labels, (1, 2, 3, 4), *g)
    np.testing.assert_allclose(metrics.cmc(z, labels, 4, *g), list(recall.values()), rtol=1e-12)


# Peers


@pytest.mark.parametrize("classes", [3, 40, 150])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_figures_equal_pytorch_metric_learning(classes, with_gallery):
    calculator_module = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch = pytest.importorskip("torch")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    z, labels = clustered(300, classes=classes)
    g = clustered(260, classes=classes, seed=1) if with_gallery else (None, None)
    include = ("precision_at_1", "r_precision", "mean_average_precision", "mean_reciprocal_rank")
    calculator = calculator_module.AccuracyCalculator(
        include=(*include, "mean_average_precision_at_r"),
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    )
    sets = [torch.tensor(part) for part in (z, labels, *g) if part is not None]
    peer = calculator.get_accuracy(*sets)
    assert metrics.recall_at_k(z, labels, (1,), *g)[1] == pytest.approx(peer["precision_at_1"])
    assert metrics.map_at_r(z, labels, *g) == pytest.approx(peer["mean_average_precision_at_r"])
    assert metrics.r_precision(z, labels, *g) == pytest.approx(peer["r_precision"])
    assert metrics.mean_average_precision(z, labels, *g) == pytest.approx(peer["mean_average_precision"])
    assert metrics.mean_reciprocal_rank(z, labels, *g) == pytest.approx(peer["mean_reciprocal_rank"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_figures_equal_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    torch = pytest.importorskip("torch")
    z, labels = clustered(120, classes=12, noise=2)
    g, g_labels = clustered(100, classes=14, noise=2, seed=1)
    unit, items = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (z, g))
    scores = torch.tensor(1 + unit @ items.T)  # it takes what scores 0 or less as no match
    target = torch.tensor(labels[:, None] == g_labels)
    index = torch.arange(len(z))[:, None].expand_as(scores)

    def peer(name, **options):
        metric = getattr(retrieval, name)(empty_target_action="skip", **options)
        return float(metric(scores.reshape(-1), target.reshape(-1), indexes=index.reshape(-1)))

    assert metrics.mean_average_precision(z, labels, g, g_labels) == pytest.approx(peer("RetrievalMAP"), rel=1e-5)
    assert metrics.mean_reciprocal_rank(z, labels, g, g_labels) == pytest.approx(peer("RetrievalMRR"), rel=1e-5)
    assert metrics.r_precision(z, labels, g, g_labels) == pytest.approx(peer("RetrievalRPrecision"), rel=1e-5)
    for k, value in metrics.precision_at_k(z, labels, (1, 5, 20), g, g_labels).items():
        assert value == pytest.approx(peer("RetrievalPrecision", top_k=k), rel=1e-5)


def test_average_precision_equals_scikit_learn():
    from sklearn.metrics import average_precision_score

    z, labels = clustered(80, classes=9, noise=2, dtype=np.float64)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    others = ~np.eye(len(z), dtype=bool)
    peer = [
        average_precision_score((labels == label)[keep], (unit @ row)[keep])
        for label, row, keep in zip(labels, unit, others, strict=True)
    ]
    np.testing.assert_allclose(metrics.query_ranks(z, labels, full=True).average_precision, peer)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_vote_equals_scikit_learn(k):
    from sklearn.neighbors import KNeighborsClassifier

    z, labels = clustered(150, classes=2, noise=4)  # two classes and odd k: no votes tie
    g, g_labels = clustered(130, classes=2, noise=4, seed=1)
    peer = KNeighborsClassifier(k, metric="cosine").fit(g, g_labels).score(z, labels)
    assert metrics.knn_accuracy(z, labels, k, g, g_labels) == pytest.approx(peer)
    assert 0.5 < peer < 1


# Votes


def vote(scores, names, k):
    """Whether the query "x" at angle 0 is named right by a gallery of these cosines and classes."""
    gallery = [[score, np.sqrt(1 - score**2)] for score in scores]
    return metrics.knn_accuracy([[1.0, 0]], ["x"], k, gallery, names) == 1


@pytest.mark.parametrize(
    ("scores", "names", "k", "right"),
    [
        ([0.9, 0.5, 0.4], "yxx", 3, True),  # the majority
        ([0.9, 0.5, 0.4], "yxx", 1, False),
        ([0.9, 0.5, 0.4, 0.3], "xyyx", 4, True),  # as many votes, a larger sum
        ([0.9, 0.5, 0.45, 0.3], "yxxy", 4, False),
        ([0.9, 0.5, 0.5, 0.5], "yxzx", 2, False),  # of three at the last place the other class votes
        ([0.5, 0.5], "xy", 2, False),  # the same number and sum
        ([0.5, 0.4], "xx", 7, True),  # fewer images than votes
    ],
)
def test_ties_of_a_vote_are_settled_as_promised(scores, names, k, right):
    assert vote(scores, list(names), k) is right


# Ties, exclusions, invariances


def test_recall_rises_with_k_and_reaches_one():
    z, labels = clustered(100, classes=10, noise=3)
    recall = metrics.recall_at_k(z, labels, ks=(1, 2, 5, 99))
    assert list(recall) == [1, 2, 5, 99]
    assert sorted(recall.values()) == list(recall.values())
    assert recall[1] < recall[99] == 1


def test_a_query_never_finds_itself():
    z = [[1, 0], [1, 0.1], [0, 1], [0.1, 1]]
    assert metrics.recall_at_k(z, [0, 1, 0, 1], ks=(1, 3)) == {1: 0.0, 3: 1.0}


def test_a_query_in_another_gallery_may_find_its_copy():
    z = np.eye(3)
    assert metrics.recall_at_k(z, [0, 1, 2], gallery=z, gallery_labels=[0, 1, 2])[1] == 1


def test_collapsed_embeddings_have_no_recall():
    # All images alike: a search that takes the first of equals would call class-sorted data well found.
    labels = np.repeat(np.arange(5), 4)
    found = metrics.query_ranks(np.ones((20, 3)), labels, full=True, voters=4)
    assert np.all(found.first_rank == 17)
    assert np.all(found.precision_at_r == 0)
    np.testing.assert_allclose(found.average_precision, (1 / 17 + 2 / 18 + 3 / 19) / 3)
    assert not found.voted_right.any()


def test_queries_without_another_image_of_their_class_are_left_out():
    z, labels = clustered(50, classes=5)
    alone = np.concatenate([z, RNG.normal(size=(3, 16)).astype(np.float32)])
    found = metrics.query_ranks(alone, [*labels, 100, 101, 102])
    np.testing.assert_array_equal(found.queries, np.arange(50))
    in_gallery = metrics.query_ranks(z[:2], ["x", "y"], gallery=z[2:5], gallery_labels=["y", "z", "z"])
    np.testing.assert_array_equal(in_gallery.queries, [1])


def test_a_set_of_one_class_is_found_without_fault():
    found = metrics.query_ranks(RNG.normal(size=(9, 4)), ["unique ✓"] * 9, **EVERYTHING)
    assert np.all(found.first_rank == 1)
    assert np.all(found.average_precision == 1)
    assert np.all(found.voted_right)
    np.testing.assert_allclose(found.precision_at_k[10], 0.8)


def test_length_order_and_names_do_not_matter():
    z, labels = clustered(100, classes=10, noise=2, dtype=np.float64)
    shuffled = RNG.permutation(100)
    names = np.array([f"class {label}" for label in labels])
    scaled = z * RNG.uniform(0.1, 10, size=(100, 1))
    before, after = metrics.query_ranks(z, labels), metrics.query_ranks(scaled[shuffled], names[shuffled])
    np.testing.assert_array_equal(before.first_rank[shuffled], after.first_rank)
    np.testing.assert_allclose(before.precision_at_r[shuffled], after.precision_at_r)


def test_input_is_not_changed():
    z, labels = clustered(30, classes=3)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    copy = unit.copy()
    metrics.query_ranks(unit, labels, **EVERYTHING)
    np.testing.assert_array_equal(unit, copy)


@pytest.mark.parametrize("classes", [600, 3])
def test_a_search_holds_no_whole_matrix(monkeypatch, classes):
    small_tiles(monkeypatch, 64, 1_024, 2**16)
    monkeypatch.setattr(standing, "WAITING", 2**16)
    n = 4_000  # the whole matrix: 64 MB
    z, labels = clustered(n, dim=8, classes=classes, noise=10)
    tracemalloc.start()
    metrics.query_ranks(z, labels, voters=5)
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert memory < 12


# Bad input


@pytest.mark.parametrize(
    ("z", "labels", "error", "message"),
    [
        ([[1.0, np.nan], [1, 0]], [0, 0], VectorError, "row 0 holds NaN or infinity"),
        ([[1, 0], [np.inf, 0]], [0, 0], VectorError, "row 1 holds NaN or infinity"),
        ([[1.0, 2], [0, 0]], [0, 0], VectorError, "row 1 is all zeros"),
        ([1.0, 2], [0, 0], VectorError, r"shape \(n, d\); got float64 of shape \(2,\)"),
        ([["a", "b"]], [0], VectorError, "must be numbers"),
        ([[1.0, 2], [1]], [0, 0], VectorError, "lists of equal length"),
        (np.eye(2), [0], DataError, r"one class for each of the 2 embeddings; got shape \(1,\)"),
        (np.eye(2), [0.0, np.nan], DataError, "without gaps"),
        (np.eye(2), [None, None], DataError, "integers or strings"),
        (np.eye(2), [0, 1], DataError, "no query has another image"),
        (np.empty((0, 2)), [], DataError, "no query has another image"),
    ],
)
def test_bad_embeddings_or_labels_are_one_clear_error(z, labels, error, message):
    with pytest.raises(error, match=message) as caught:
        metrics.recall_at_k(z, labels)
    assert "\n" not in str(caught.value)


def test_bad_galleries_and_ks_are_one_clear_error():
    z = np.eye(2)
    with pytest.raises(DataError, match="go together"):
        metrics.recall_at_k(z, [0, 1], gallery=z)
    with pytest.raises(VectorError, match="2 columns like the queries; got 3"):
        metrics.recall_at_k(z, [0, 1], gallery=np.eye(3), gallery_labels=[0, 1, 2])
    with pytest.raises(DataError, match="numbers and text"):
        metrics.recall_at_k(z, [0, 1], gallery=z, gallery_labels=["0", "1"])
    for metric in (metrics.recall_at_k, metrics.precision_at_k):
        with pytest.raises(ConfigError, match=r"at least 1; got \[3, 0\]"):
            metric(z, [0, 0], ks=(3, 0))
    for metric in (metrics.cmc, metrics.knn_accuracy):
        with pytest.raises(ConfigError, match=r"at least 1; got \[0\]"):
            metric(z, [0, 0], 0)
