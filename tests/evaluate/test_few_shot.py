"""Few-shot reports: tasks by name, accuracies with intervals over episodes."""

import numpy as np
import pytest

from tests.evaluate.test_evaluation import clustered
from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.evaluate import Task, evaluate_few_shot


def test_the_accuracy_is_the_mean_over_episodes_with_its_standard_error():
    z, labels = clustered(120, classes=12, noise=1.0)
    report = evaluate_few_shot(z, labels, Task(5, 2), queries=3, episodes=200, seed=1)
    episodes = metrics.few_shot_accuracy(z, labels, 5, 2, queries=3, episodes=200, seed=1)
    assert report.accuracy.value == pytest.approx(episodes.mean())
    half = 1.959964 * episodes.std(ddof=1) / np.sqrt(200)
    assert report.accuracy.interval == pytest.approx((episodes.mean() - half, episodes.mean() + half))
    assert 1 / 5 < report.accuracy.value < 1
    assert report.to_dict()["ways"] == 5
    assert "2 support images and 3 other" in report.definition


def test_one_episode_has_no_interval():
    z, labels = clustered(24)
    assert evaluate_few_shot(z, labels, Task(2, 1), episodes=1).accuracy.interval is None


@pytest.mark.parametrize("text", ["20", "x", "20x", "20x1x1", "-2x1", "20 x 1", ""])
def test_a_task_in_another_form_is_one_clear_error(text):
    with pytest.raises(ConfigError, match="WAYSxSHOTS"):
        Task.parse(text)


def test_tasks_are_parsed_and_out_of_range_refused():
    assert Task.parse(" 20X1 ") == Task(20, 1)
    assert Task(20, 1).name == "20x1"
    for ways, shots in ((1, 1), (2, 0)):
        with pytest.raises(ConfigError, match="at least 2 ways"):
            Task(ways, shots)
    z, labels = clustered(24)
    with pytest.raises(DataError):
        evaluate_few_shot(z, labels, Task(13, 1))


def test_an_accuracy_without_an_error_has_no_interval():
    z, labels = np.eye(12)[np.arange(48) % 12], np.arange(48) % 12
    accuracy = evaluate_few_shot(z, labels, Task(5, 1), episodes=20).accuracy
    assert (accuracy.value, accuracy.interval) == (1.0, None)
