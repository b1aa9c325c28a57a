from collections import Counter

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.metrics import few_shot


def images(classes=8, each=6, dim=5, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return rng.normal(size=(classes, dim))[labels] + noise * rng.normal(size=(classes * each, dim)), labels


def accuracy_by_hand(unit, drawn, shots):
    """Accuracy of one episode, drawn as images (ways, shots + queries)."""
    hits = []
    for own, row in enumerate(drawn):
        for query in row[shots:]:
            scores = []
            for other in drawn:
                mean = sum(unit[i] for i in other[:shots]) / shots
                scores.append(float(unit[query] @ mean) / float(np.linalg.norm(mean)))
            hits.append(max(range(len(scores)), key=scores.__getitem__) == own)
    return np.mean(hits)


@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 1, 3), (4, 3, 2), (8, 5, 1)])
@pytest.mark.parametrize("at_once", [1, 2**25])
def test_accuracies_equal_a_plain_loop(monkeypatch, ways, shots, queries, at_once):
    monkeypatch.setattr(few_shot, "EPISODE_BYTES", at_once)
    z, labels = images()
    drawn = few_shot._draw(labels, np.zeros_like(labels), (40, ways, shots + queries), np.random.default_rng(3))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    expected = [accuracy_by_hand(unit, episode, shots) for episode in drawn]
    found = metrics.few_shot_accuracy(z * 7, labels, ways, shots, queries, episodes=40, seed=3)
    np.testing.assert_allclose(found, expected)
    assert 0 < found.mean() < 1


def test_episodes_are_of_distinct_classes_of_one_group_and_distinct_images():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(30, size=400), rng.integers(3, size=400)
    drawn = few_shot._draw(labels, groups, (200, 5, 3), rng)
    for episode in drawn:
        assert np.unique(groups[episode]).size == 1
        assert np.all(labels[episode] == labels[episode][:, :1])
        assert np.unique(labels[episode][:, 0]).size == 5
        assert np.unique(episode).size == 15


def test_every_class_image_and_place_is_drawn_equally_often():
    labels = np.repeat([0, 1, 2], [3, 3, 5])
    drawn = few_shot._draw(labels, np.zeros_like(labels), (6_000, 2, 3), np.random.default_rng(0))
    for way in range(2):
        for place in range(3):
            counts = np.bincount(drawn[:, way, place], minlength=11)
            expected = 6_000 / 3 / np.array([3] * 6 + [5] * 5)
            assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_sets_of_distinct_numbers_are_all_equally_likely():
    drawn = few_shot._distinct(np.full(12_000, 4), 3, np.random.default_rng(0))
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 24  # every arrangement of 3 of 4
    assert max(abs(count - 500) for count in counts.values()) < 5 * np.sqrt(500)


def test_groups_with_enough_classes_are_drawn_equally_often_and_others_never():
    labels, groups = np.repeat(np.arange(12), 2), np.repeat(["a", "b", "c"], [4, 4, 16])
    drawn = few_shot._draw(labels, np.unique(groups, return_inverse=True)[1], (300, 2, 2), np.random.default_rng(0))
    counts = Counter(groups[drawn[:, 0, 0]].tolist())
    assert min(counts[name] for name in "abc") > 70
    big = few_shot._draw(labels, np.unique(groups, return_inverse=True)[1], (50, 3, 2), np.random.default_rng(0))
    assert set(groups[big].ravel()) == {"c"}


def test_classes_without_enough_images_are_never_drawn():
    z, labels = images(classes=4, each=4)
    z = np.concatenate([z, [[np.pi] * 5]])
    drawn = few_shot._draw(np.append(labels, 9), np.zeros(17, dtype=int), (100, 4, 2), np.random.default_rng(0))
    assert drawn.max() == 15


def test_collapsed_embeddings_name_nothing():
    assert metrics.few_shot_accuracy(np.ones((8, 3)), np.repeat([0, 1], 4), 2, 3, episodes=5).tolist() == [0] * 5


def test_opposite_supports_have_no_prototype_and_do_not_fail():
    z = [[1, 0], [-1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    found = metrics.few_shot_accuracy(z, [0, 0, 0, 1, 1, 1], 2, 2, episodes=50)
    assert np.all(np.isfinite(found))
    assert np.all(found >= 0.5)


def test_the_seed_decides():
    z, labels = images()
    first = metrics.few_shot_accuracy(z, labels, 5, 1, episodes=30, seed=1)
    np.testing.assert_array_equal(metrics.few_shot_accuracy(z, labels, 5, 1, episodes=30, seed=1), first)
    assert np.any(metrics.few_shot_accuracy(z, labels, 5, 1, episodes=30, seed=2) != first)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ways": 1}, ConfigError, "ways of few-shot episodes must be at least 2; got 1"),
        ({"shots": 0}, ConfigError, "shots .* at least 1; got 0"),
        ({"queries": 0}, ConfigError, "queries .* at least 1"),
        ({"episodes": 0}, ConfigError, "episodes .* at least 1"),
        ({"ways": 9}, DataError, "needs 9 classes with 2 images .* the most there are is 8"),
        ({"shots": 6}, DataError, "needs 2 classes with 7 images .* the most there are is 0"),
        ({"ways": 5, "groups": np.arange(48) // 24}, DataError, "5 classes of one group with 2 .* is 4"),
        ({"groups": [1, 2]}, DataError, "groups must hold one class for each of the 48"),
        ({"labels": [1, 2]}, DataError, "labels must hold"),
        ({"embeddings": np.zeros((48, 2))}, VectorError, "row 0 is all zeros"),
    ],
)
def test_bad_input_is_one_clear_error(changes, error, message):
    z, labels = images()
    given = {"embeddings": z, "labels": labels, "ways": 2, "shots": 1} | changes
    with pytest.raises(error, match=message) as caught:
        metrics.few_shot_accuracy(**given)
    assert "\n" not in str(caught.value)
