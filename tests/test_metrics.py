import doctest
import importlib
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics import checks

RNG = np.random.default_rng(0)


def clustered(n=300, dim=16, classes=20, noise=0.8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = rng.normal(size=(classes, dim))
    return (centres[labels] + noise * rng.normal(size=(n, dim))).astype(dtype), labels


def scored_pairs(n=2000, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    is_match = rng.random(n) < 0.3
    scores = rng.normal(size=n) + 1.5 * is_match
    return (scores if decimals is None else scores.round(decimals)), is_match


def ranks_by_hand(embeddings, labels, gallery=None, gallery_labels=None):
    """First rank and average precision at R of each query, from the whole sorted list."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    items = unit if gallery is None else gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    names = labels if gallery is None else gallery_labels
    found = []
    for i, row in enumerate(unit):
        others = [j for j in range(len(items)) if gallery is not None or j != i]
        others.sort(key=lambda j: -float(row @ items[j]))
        hit = [names[j] == labels[i] for j in others]
        r = sum(hit)
        if r == 0:
            continue
        precision = sum(sum(hit[: k + 1]) / (k + 1) for k in range(r) if hit[k]) / r
        found.append((i, hit.index(True) + 1, precision))
    return tuple(np.array(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("module", ["checks", "intervals", "pairs", "retrieval"])
def test_hand_worked_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"vitembed.metrics.{module}"))
    assert result.failed == 0
    assert result.attempted > 0 or module == "checks"


# Retrieval


@pytest.mark.parametrize("chunk", [1, 5000, 2**26])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_query_ranks_equal_a_plain_loop(monkeypatch, chunk, with_gallery):
    monkeypatch.setattr(checks, "CHUNK_BYTES", chunk)
    z, labels = clustered(120, classes=25, dtype=np.float64)
    g = clustered(90, classes=25, seed=1, dtype=np.float64) if with_gallery else (None, None)
    found = metrics.query_ranks(z, labels, *g)
    queries, first, precision = ranks_by_hand(z, labels, *g)
    np.testing.assert_array_equal(found.queries, queries)
    np.testing.assert_array_equal(found.first_rank, first)
    np.testing.assert_allclose(found.precision_at_r, precision)


@pytest.mark.parametrize("classes", [3, 40, 150])
def test_recall_and_map_equal_pytorch_metric_learning(classes):
    calculator_module = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch = pytest.importorskip("torch")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.inference import CustomKNN

    z, labels = clustered(300, classes=classes)
    calculator = calculator_module.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    )
    peer = calculator.get_accuracy(torch.tensor(z), torch.tensor(labels))
    assert metrics.recall_at_k(z, labels)[1] == pytest.approx(peer["precision_at_1"])
    assert metrics.map_at_r(z, labels) == pytest.approx(peer["mean_average_precision_at_r"])


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
    assert metrics.recall_at_k(np.ones((20, 3)), labels, ks=(1, 5)) == {1: 0.0, 5: 0.0}
    assert metrics.map_at_r(np.ones((20, 3)), labels) == 0


def test_queries_without_another_image_of_their_class_are_left_out():
    z, labels = clustered(50, classes=5)
    alone = np.concatenate([z, RNG.normal(size=(3, 16)).astype(np.float32)])
    found = metrics.query_ranks(alone, [*labels, 100, 101, 102])
    np.testing.assert_array_equal(found.queries, np.arange(50))
    in_gallery = metrics.query_ranks(z[:2], ["x", "y"], gallery=z[2:5], gallery_labels=["y", "z", "z"])
    np.testing.assert_array_equal(in_gallery.queries, [1])


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
    copy = z.copy()
    metrics.map_at_r(z, labels)
    metrics.pair_scores(z, labels)
    np.testing.assert_array_equal(z, copy)


def test_search_and_pairs_hold_no_whole_matrix(monkeypatch):
    monkeypatch.setattr(checks, "CHUNK_BYTES", 2**20)
    n = 6000  # the whole matrix: 144 MB; the result of pair_scores: 90 MB
    z, labels = clustered(n, dim=8, classes=600)

    def peak(work):
        tracemalloc.start()
        work()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory / 2**20

    assert peak(lambda: metrics.map_at_r(z, labels)) < 12
    assert peak(lambda: metrics.pair_scores(z, labels)) < 102


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
    with pytest.raises(ConfigError, match="at least 1"):
        metrics.recall_at_k(z, [0, 0], ks=(0,))


# Pairs


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_roc_curve_equals_scikit_learn(decimals, dtype):
    scores, is_match = scored_pairs(decimals=decimals)
    scores = scores.astype(dtype)
    curve = metrics.roc_curve(scores, is_match)
    far, tar, thresholds = sklearn_metrics.roc_curve(is_match, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.far, far)
    np.testing.assert_allclose(1 - curve.frr, tar)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    assert metrics.roc_auc(scores, is_match) == pytest.approx(sklearn_metrics.roc_auc_score(is_match, scores))


def test_roc_curve_counts_accepted_pairs():
    scores, is_match = scored_pairs(50, decimals=1)
    curve = metrics.roc_curve(scores, is_match)
    for threshold, far, frr in zip(curve.thresholds, curve.far, curve.frr, strict=True):
        accepted = scores >= threshold
        assert far == pytest.approx(accepted[~is_match].mean())
        assert frr == pytest.approx(1 - accepted[is_match].mean())


@pytest.mark.parametrize("seed", range(30))
def test_equal_error_rate_is_where_the_curve_crosses(seed):
    # The definition, read off the whole curve; the implementation never builds it.
    scores, is_match = scored_pairs(n=3 + seed * 7, seed=seed, decimals=1 if seed % 2 else None)
    is_match[:2] = True, False
    curve = metrics.roc_curve(scores, is_match)
    j = int(np.argmax(curve.far >= curve.frr))
    gap = curve.far - curve.frr
    share = gap[j] / (gap[j] - gap[j - 1])
    eer, threshold = metrics.equal_error_rate(scores, is_match)
    assert eer == pytest.approx(curve.far[j] + share * (curve.far[j - 1] - curve.far[j]))
    assert eer == pytest.approx(curve.frr[j] + share * (curve.frr[j - 1] - curve.frr[j]))
    assert curve.thresholds[j] <= threshold <= curve.thresholds[j - 1]


@pytest.mark.parametrize(
    ("scores", "is_match", "eer", "threshold"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 0.0, 0.8),  # parted without error
        ([0.1, 0.9], [1, 0], 1.0, 0.9),  # the wrong way round
        ([0.5, 0.5], [1, 0], 0.5, 0.5),  # all alike: a coin
        ([0.5, 0.5, 0.5], [1, 0, 0], 0.5, 0.5),
    ],
)
def test_equal_error_rate_of_simple_cases(scores, is_match, eer, threshold):
    assert metrics.equal_error_rate(scores, is_match) == pytest.approx((eer, threshold))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("far", [0.0, 0.003, 0.01, 0.07, 0.29, 0.5, 0.999])
def test_threshold_is_the_smallest_that_keeps_the_rate(far, decimals, dtype):
    scores = np.random.default_rng(1).normal(size=100)
    scores = (scores if decimals is None else scores.round(decimals)).astype(dtype)
    threshold = metrics.threshold_at_far(scores, far)
    assert np.mean(scores >= threshold) <= far
    below = np.max(scores[scores < threshold])  # the next lower threshold that makes a difference
    assert np.mean(scores >= below) > far
    assert np.nextafter(dtype(threshold), dtype(-np.inf)) == below


def test_tar_at_far_is_the_best_point_of_the_curve_within_the_rate():
    scores, is_match = scored_pairs(decimals=2)
    curve = metrics.roc_curve(scores, is_match)
    for far in (0.0, 0.001, 0.01, 0.1, 0.5):
        expected = np.max(1 - curve.frr[curve.far <= far])
        assert metrics.tar_at_far(scores, is_match, far) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 3000, 2**26])
def test_pair_scores_are_the_upper_triangle(monkeypatch, chunk):
    monkeypatch.setattr(checks, "CHUNK_BYTES", chunk)
    z, labels = clustered(61, classes=7)
    scores, is_match = metrics.pair_scores(z, labels)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    upper = np.triu_indices(61, 1)
    np.testing.assert_allclose(scores, (unit @ unit.T)[upper], atol=1e-6)
    np.testing.assert_array_equal(is_match, (labels[:, None] == labels)[upper])
    assert scores.dtype == np.float32


def test_pair_scores_stay_cosines():
    scores, _ = metrics.pair_scores(np.full((40, 3), 0.1, dtype=np.float32), np.zeros(40))
    assert scores.max() <= 1


@pytest.mark.parametrize("metric", [metrics.roc_curve, metrics.equal_error_rate, metrics.roc_auc])
@pytest.mark.parametrize(
    ("scores", "is_match", "error", "message"),
    [
        ([0.1, np.nan], [True, False], VectorError, "1 of 2 are not, the first at position 1"),
        ([0.1, np.inf], [True, False], VectorError, "must be finite"),
        ([[0.1, 0.2]], [True, False], VectorError, r"shape \(n,\)"),
        (["a", "b"], [True, False], VectorError, "must be numbers"),
        ([0.1, 0.2], [True], DataError, "one flag for each of 2 scores"),
        ([0.1, 0.2], [2, 0], DataError, "0 and 1 only"),
        ([0.1, 0.2], ["yes", "no"], DataError, "must hold booleans"),
        ([0.1, 0.2], [True, True], DataError, "got 2 matching and 0 non-matching"),
        ([0.1, 0.2], [False, False], DataError, "got 0 matching and 2 non-matching"),
        ([], [], DataError, "both kinds"),
    ],
)
def test_bad_scores_are_one_clear_error(metric, scores, is_match, error, message):
    with pytest.raises(error, match=message):
        metric(scores, is_match)


def test_bad_rates_and_sizes_are_one_clear_error():
    with pytest.raises(ConfigError, match="got 1"):
        metrics.threshold_at_far([0.5], 1)
    with pytest.raises(VectorError, match="got none"):
        metrics.threshold_at_far([], 0.1)
    with pytest.raises(VectorError, match="at least 2 embeddings; got 1"):
        metrics.pair_scores([[1.0]], [0])


# Intervals


@pytest.mark.parametrize(
    # Published: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_values(successes, n, low, high):
    assert metrics.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_widens_with_the_level():
    low, high = metrics.wilson_interval(3, 50)
    assert metrics.wilson_interval(47, 50) == pytest.approx((1 - high, 1 - low))
    assert metrics.wilson_interval(50, 50)[1] == 1
    wide_low, wide_high = metrics.wilson_interval(3, 50, level=0.99)
    assert wide_low < low < 0.06 < high < wide_high


def test_bootstrap_of_independent_items_agrees_with_wilson():
    hits = np.arange(400) < 100
    low, high = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400), rounds=2000)
    assert (low, high) == pytest.approx(metrics.wilson_interval(100, 400), abs=0.01)


def test_bootstrap_is_wider_when_identities_bring_many_alike():
    hits = np.arange(400) < 100
    single = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400))
    grouped = metrics.bootstrap_interval(lambda at: float(hits[at].mean()), np.arange(400) // 40)
    assert np.ptp(grouped) > 2 * np.ptp(single)


def test_bootstrap_draws_pairs_by_both_identities():
    pairs = np.array([["a", "a"], ["a", "b"], ["b", "b"], ["b", "c"], ["a", "c"]])
    seen = []

    def note(at):
        seen.append(np.bincount(at, minlength=5).tolist())
        return 0.0

    metrics.bootstrap_interval(note, pairs, rounds=50)
    for aa, ab, bb, bc, ac in seen:
        c = 3 - aa - bb
        assert (ab, bc, ac) == (aa * bb, bb * c, aa * c)
    assert len({tuple(counts) for counts in seen}) > 3


def test_bootstrap_repeats_with_its_seed():
    def mean(at):
        return float(at.mean())

    first = metrics.bootstrap_interval(mean, np.arange(30), seed=1)
    assert metrics.bootstrap_interval(mean, np.arange(30), seed=1) == first
    assert metrics.bootstrap_interval(mean, np.arange(30), seed=2) != first


def test_bootstrap_draws_again_where_one_kind_of_pair_came():
    scores, is_match = [0.9, 0.2, 0.8, 0.4], np.array([True, False, True, False])
    names = [["a", "a"], ["a", "b"], ["b", "b"], ["b", "a"]]
    scores = np.array(scores)
    low, high = metrics.bootstrap_interval(
        lambda at: metrics.equal_error_rate(scores[at], is_match[at])[0], names, rounds=20
    )
    assert (low, high) == (0, 0)

    def never(at):
        raise DataError("one kind")

    with pytest.raises(DataError, match=r"too few identities for an interval \(2\)"):
        metrics.bootstrap_interval(never, names, rounds=5)


def test_bad_intervals_are_one_clear_error():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="successes"):
            metrics.wilson_interval(successes, n)
    with pytest.raises(ConfigError, match="level"):
        metrics.wilson_interval(1, 2, level=95)
    with pytest.raises(ConfigError, match="rounds"):
        metrics.bootstrap_interval(lambda at: 0.0, [0, 1], rounds=0)
    with pytest.raises(DataError, match="at least 2 of them; got 1"):
        metrics.bootstrap_interval(lambda at: 0.0, [0, 0])
