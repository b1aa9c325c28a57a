"""Batches of P classes with K images each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitembed.errors import ConfigError, DataError
from vitembed.training.sampling import ClassBalancedSampler


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 23), min_size=2, max_size=12),
    classes=st.integers(2, 8),
    images=st.integers(2, 6),
    seed=st.integers(0, 100),
)
def test_an_epoch_sees_every_image_in_batches_of_distinct_images_of_few_classes(
    counts: list[int], classes: int, images: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    sampler = ClassBalancedSampler(labels, classes_per_batch=classes, images_per_class=images, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {i for batch in batches for i in batch} == set(range(len(labels)))
    for batch in batches:
        assert len(set(batch)) == len(batch)
        present, sizes = np.unique(labels[batch], return_counts=True)
        assert len(present) == min(classes, len(counts))
        # A class gives K images, or all that it has, or the rest of a class whose other images are in other groups.
        assert all(size <= images for size in sizes)
        assert all(size == min(images, counts[label]) for label, size in zip(present, sizes, strict=True))


def test_no_schedule_has_fewer_batches() -> None:
    labels = np.repeat(np.arange(4), [8, 8, 8, 40])
    sampler = ClassBalancedSampler(labels, classes_per_batch=2, images_per_class=4)
    assert len(sampler) == 10  # the class of 40 needs ten batches of four
    even = ClassBalancedSampler(np.repeat(np.arange(6), 8), classes_per_batch=3, images_per_class=4)
    assert len(even) == 4  # twelve groups in batches of three
    assert sum(len(batch) for batch in even) == 48  # each image exactly once


def test_epochs_follow_from_the_seed_and_the_number_alone() -> None:
    labels = np.repeat(np.arange(5), 6)
    one = ClassBalancedSampler(labels, classes_per_batch=3, images_per_class=2, seed=4)
    two = ClassBalancedSampler(labels, classes_per_batch=3, images_per_class=2, seed=4)
    list(one)
    one.epoch = two.epoch = 3
    assert list(one) == list(two) == list(one)
    two.epoch = 4
    assert list(one) != list(two)


def test_too_small_batches_and_single_classes_are_refused() -> None:
    labels = np.array([0, 0, 1, 1])
    with pytest.raises(ConfigError, match="got 1 and 2"):
        ClassBalancedSampler(labels, classes_per_batch=1, images_per_class=2)
    with pytest.raises(ConfigError, match="got 2 and 1"):
        ClassBalancedSampler(labels, classes_per_batch=2, images_per_class=1)
    with pytest.raises(DataError, match="at least 2 classes"):
        ClassBalancedSampler(np.zeros(4, np.int64), classes_per_batch=2, images_per_class=2)
