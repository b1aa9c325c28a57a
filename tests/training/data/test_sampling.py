"""Batches of P classes with K images each, with forgeries and hard neighbours; resumed and shared among processes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitembed.errors import ConfigError, DataError
from vitembed.training.classification import ShuffledBatches
from vitembed.training.data.sampling import Batches, ClassBalancedSampler, EpochBatches, share


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


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=9), min_size=2, max_size=5),
    classes=st.integers(2, 8),
    categories=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_with_categories_an_epoch_is_as_long_and_sees_every_image(
    sizes: list[list[int]], classes: int, categories: int, seed: int
) -> None:
    counts = [count for row in sizes for count in row]
    of_class = np.repeat(np.arange(len(sizes)), [len(row) for row in sizes])
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    kinds: dict[str, Any] = {"classes_per_batch": classes, "images_per_class": 3, "seed": seed}
    chosen = min(categories, classes)
    sampler = ClassBalancedSampler(labels, **kinds, categories=of_class[labels], categories_per_batch=chosen)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(ClassBalancedSampler(labels, **kinds))
    assert {i for batch in batches for i in batch} == set(range(len(labels)))
    assert all(len(np.unique(labels[batch])) == min(classes, len(counts)) for batch in batches)


def test_hard_neighbours_come_beside_categories() -> None:
    labels = np.repeat(np.arange(12), 4)
    kinds: dict[str, Any] = {"categories": labels // 6, "categories_per_batch": 1}
    sampler = ClassBalancedSampler(labels, classes_per_batch=4, images_per_class=2, **kinds)
    other = (np.arange(48) + 24) % 48  # an image of the other category
    sampler.neighbours = other[:, None]
    batches = list(sampler)
    assert {i for batch in batches for i in batch} == set(range(48))
    assert len(batches) == len(sampler)
    first = np.unique(labels[batches[0]])
    assert {int(label + 6) % 12 for label in first} == set(first.tolist())


def test_a_batch_has_classes_of_few_categories_and_all_categories_have_their_turns() -> None:
    classes = np.repeat(np.arange(50), 4)  # of 4 images each, in 5 categories of 10
    sampler = ClassBalancedSampler(
        classes, classes_per_batch=8, images_per_class=2, categories=classes // 10, categories_per_batch=2
    )
    held = [np.bincount(np.unique(classes[batch]) // 10, minlength=5) for batch in sampler]
    assert np.mean([sorted(row)[-2:] == [4, 4] for row in held]) > 0.7  # the rest is what was left over at the end
    assert (np.array(held[:6]) > 0).any(axis=0).all()


def test_forgeries_are_of_the_category_of_their_writer() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    sampler = ClassBalancedSampler(
        labels,
        classes_per_batch=2,
        images_per_class=2,
        forgery_of=np.where(labels < 4, -1, labels - 4),
        categories=np.where(labels < 4, labels // 2, 7),
        categories_per_batch=1,
    )
    batches = list(sampler)
    assert sum(len(batch) for batch in batches) == 10
    assert all(len({int(label) // 2 for label in labels[batch] if label < 4}) == 1 for batch in batches)


def test_categories_that_do_not_fit_are_refused() -> None:
    labels = np.repeat(np.arange(4), 3)
    kinds: dict[str, Any] = {"classes_per_batch": 2, "images_per_class": 2}
    with pytest.raises(DataError, match=r"got int64 of shape \(3,\)"):
        ClassBalancedSampler(labels, **kinds, categories=np.zeros(3, np.int64), categories_per_batch=1)
    with pytest.raises(DataError, match="got float64 of shape"):
        ClassBalancedSampler(labels, **kinds, categories=np.zeros(12), categories_per_batch=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the categories"):
        ClassBalancedSampler(labels, **kinds, categories_per_batch=1)
    with pytest.raises(DataError, match="those of some class are of several"):
        ClassBalancedSampler(labels, **kinds, categories=np.arange(12) % 2, categories_per_batch=1)
    with pytest.raises(ConfigError, match=r"must lie in \[1, 2\]"):
        ClassBalancedSampler(labels, **kinds, categories=labels // 2, categories_per_batch=3)


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


def signatures(genuine: list[int], forged: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and forgery_of of writers with so many genuine images and forgeries, in random order."""
    writers = np.repeat(np.arange(len(genuine)), genuine)
    imitated = np.repeat(np.arange(len(forged)), forged)
    labels = np.concatenate([writers, len(genuine) + np.arange(len(imitated))])
    forgery_of = np.concatenate([np.full(len(writers), -1), imitated])
    order = np.random.default_rng(seed).permutation(len(labels))
    return labels[order], forgery_of[order]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), classes=st.integers(2, 6), images=st.integers(2, 5), seed=st.integers(0, 100))
def test_an_epoch_sees_every_forgery_and_each_beside_its_writer(
    data: st.DataObject, classes: int, images: int, seed: int
) -> None:
    genuine = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=8))
    forged = data.draw(st.lists(st.integers(0, 15), min_size=len(genuine), max_size=len(genuine)))
    beside = data.draw(st.none() | st.integers(1, 4))
    labels, forgery_of = signatures(genuine, forged, seed)
    sampler = ClassBalancedSampler(
        labels,
        classes_per_batch=classes,
        images_per_class=images,
        seed=seed,
        forgery_of=forgery_of,
        forgeries_per_class=beside,
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {i for batch in batches for i in batch} == set(range(len(labels)))
    for batch in batches:
        assert len(set(batch)) == len(batch)
        whom = forgery_of[batch]
        present, sizes = np.unique(labels[batch][whom < 0], return_counts=True)
        assert len(present) == min(classes, len(genuine))
        assert sizes.tolist() == [min(images, genuine[writer]) for writer in present]
        for writer in range(len(genuine)):  # none without its writer, and some with a writer that has any
            expected = min(beside or images, forged[writer]) if writer in present else 0
            assert np.count_nonzero(whom == writer) == expected


def test_forgeries_without_forgery_of_would_be_classes_and_come_alone() -> None:
    labels, forgery_of = signatures([6] * 6, [6] * 6, seed=0)

    def lonely(**settings: Any) -> int:
        batches = ClassBalancedSampler(labels, classes_per_batch=3, images_per_class=2, **settings)
        return sum(forgery_of[i] >= 0 and forgery_of[i] not in labels[batch] for batch in batches for i in batch)

    assert lonely() > 0
    assert lonely(forgery_of=forgery_of) == 0


def test_a_forgery_whose_writer_has_no_images_is_a_class_like_others() -> None:
    labels, forgery_of = np.array([0, 0, 1, 1, 2, 3]), np.array([-1, -1, -1, -1, 9, 0])
    batches = list(ClassBalancedSampler(labels, classes_per_batch=3, images_per_class=2, forgery_of=forgery_of))
    assert sorted(batches[0]) == [0, 1, 2, 3, 4, 5]
    assert len(batches) == 1


def test_one_writer_with_forgeries_is_enough() -> None:
    labels, forgery_of = signatures([4], [3], seed=0)
    batches = list(ClassBalancedSampler(labels, classes_per_batch=2, images_per_class=2, forgery_of=forgery_of))
    assert {i for batch in batches for i in batch} == set(range(7))
    assert all(len(batch) == 4 for batch in batches)


def test_forgeries_that_share_a_label_are_refused() -> None:
    for labels, forgery_of in [([0, 0, 1, 1], [-1, -1, 0, 0]), ([0, 0, 1, 1], [-1, -1, -1, 0])]:
        with pytest.raises(DataError, match="each forgery must be a class of its own"):
            ClassBalancedSampler(
                np.array(labels), classes_per_batch=2, images_per_class=2, forgery_of=np.array(forgery_of)
            )
    with pytest.raises(DataError, match="for each of the 2 images"):
        ClassBalancedSampler(np.array([0, 1]), classes_per_batch=2, images_per_class=2, forgery_of=np.array([-1]))
    with pytest.raises(ConfigError, match="forgeries_per_class must be at least 1"):
        ClassBalancedSampler(np.array([0, 1]), classes_per_batch=2, images_per_class=2, forgeries_per_class=0)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    classes=st.integers(2, 8),
    images=st.integers(2, 5),
    width=st.integers(0, 6),
    seed=st.integers(0, 100),
)
def test_with_hard_neighbours_an_epoch_is_as_long_and_sees_every_image(
    data: st.DataObject, classes: int, images: int, width: int, seed: int
) -> None:
    genuine = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=12))
    forged = data.draw(st.lists(st.integers(0, 5), min_size=len(genuine), max_size=len(genuine)))
    labels, forgery_of = signatures(genuine, forged, seed)
    sampler = ClassBalancedSampler(
        labels, classes_per_batch=classes, images_per_class=images, seed=seed, forgery_of=forgery_of
    )
    length = len(list(sampler))
    sampler.neighbours = np.random.default_rng(seed).integers(-1, len(labels), (len(labels), width))
    batches = list(sampler)
    assert len(batches) == len(sampler) == length
    assert {i for batch in batches for i in batch} == set(range(len(labels)))
    for batch in batches:
        assert len(set(batch)) == len(batch)
        whom = forgery_of[batch]
        present, sizes = np.unique(labels[batch][whom < 0], return_counts=True)
        assert len(present) == min(classes, len(genuine))
        assert sizes.tolist() == [min(images, genuine[writer]) for writer in present]
        assert set(whom[whom >= 0]) <= set(present)
        assert all(np.count_nonzero(whom == writer) <= images for writer in present)


def rivals(classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and as neighbours of each image those of the class that its own is mistaken for (c and c ^ 1)."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))
    neighbours = np.stack([np.flatnonzero(labels == label ^ 1) for label in labels])
    return labels, neighbours


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_are_mistaken_for_each_other_meet(seed: int) -> None:
    labels, neighbours = rivals(40, 12, seed)
    sampler = ClassBalancedSampler(labels, classes_per_batch=8, images_per_class=4, seed=seed)

    def met() -> float:
        """Share of the images in batches whose rival class is there, too."""
        return float(np.mean([label ^ 1 in labels[batch] for batch in sampler for label in labels[batch]]))

    assert met() < 0.3  # by chance: 7 of the 39 other classes are in the batch
    sampler.neighbours = neighbours
    assert met() > 0.75
    sampler.neighbours = None
    assert met() < 0.3


def test_the_very_neighbour_comes_with_mates_of_its_class() -> None:
    labels = np.repeat(np.arange(20), 6)
    wanted = np.arange(20) * 6 + 3  # one image of each class is what the class before is mistaken for
    sampler = ClassBalancedSampler(labels, classes_per_batch=6, images_per_class=3)
    sampler.neighbours = wanted[(labels + 1) % 20][:, None]
    [first, *_] = sampler
    present = set(labels[first].tolist())
    followers = [label for label in present if (label - 1) % 20 in present]
    assert len(followers) >= 3  # half of the classes
    for label in followers:
        assert np.count_nonzero(labels[first] == label) == 3
    assert sum(wanted[label] in first for label in followers) >= 3


def test_a_forgery_that_is_a_hard_neighbour_comes_with_its_writer() -> None:
    labels, forgery_of = signatures([4] * 10, [8] * 10, seed=1)
    forgery = int(np.flatnonzero(forgery_of == 7)[5])
    sampler = ClassBalancedSampler(
        labels, classes_per_batch=2, images_per_class=2, forgery_of=forgery_of, forgeries_per_class=1
    )
    sampler.neighbours = np.full((len(labels), 1), forgery)
    [first, *_] = sampler
    assert forgery in first
    assert 7 in labels[first]


def test_epochs_with_neighbours_follow_from_seed_number_and_neighbours() -> None:
    labels, neighbours = rivals(10, 6, 0)
    one, two = (ClassBalancedSampler(labels, classes_per_batch=4, images_per_class=2, seed=3) for _ in range(2))
    list(one)
    one.epoch = two.epoch = 5
    one.neighbours, two.neighbours = neighbours, neighbours.copy()
    assert list(one) == list(two) == list(one)
    two.neighbours = neighbours[:, ::-1]
    assert list(one) != list(two)


@pytest.mark.parametrize(
    ("neighbours", "words"),
    [
        (np.zeros((3, 2), np.int64), r"shape \(4, m\)"),
        (np.zeros(4, np.int64), r"shape \(4, m\)"),
        (np.zeros((4, 2)), "whole numbers.*float64"),
        (np.full((4, 2), 4), "below 4"),
        (np.full((4, 2), -2), "below 4"),
    ],
)
def test_neighbours_that_do_not_fit_are_refused(neighbours: np.ndarray, words: str) -> None:
    sampler = ClassBalancedSampler(np.array([0, 0, 1, 1]), classes_per_batch=2, images_per_class=2)
    with pytest.raises(DataError, match=words):
        sampler.neighbours = neighbours


def samplers() -> list[Batches]:
    """Return one sampler of each kind, with ragged batches."""
    labels, forgery_of = signatures([9, 7, 5, 4, 3, 1], [4, 0, 7, 1, 0, 2], seed=2)
    balanced = ClassBalancedSampler(labels, classes_per_batch=4, images_per_class=3, forgery_of=forgery_of)
    hard = ClassBalancedSampler(labels, classes_per_batch=4, images_per_class=3, forgery_of=forgery_of)
    hard.neighbours = np.random.default_rng(0).integers(-1, len(labels), (len(labels), 3))
    return [balanced, hard, ShuffledBatches(43, 8, seed=1)]


@pytest.mark.parametrize("sampler", samplers(), ids=["balanced", "hard", "shuffled"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(sampler: Batches, workers: int) -> None:
    batches = EpochBatches(sampler)
    batches.epoch = 4
    whole = list(batches)
    assert len(whole) == len(batches) == len(sampler)
    for start in [0, 1, 3, len(whole)] if workers == 0 else [2]:
        batches.epoch = 9  # whatever came in between
        list(batches)
        batches.epoch, batches.start = 4, start
        loader = torch.utils.data.DataLoader(range(99), batch_sampler=batches, num_workers=workers, collate_fn=list)
        assert list(loader) == whole[start:]
        assert list(loader) == whole[start:]  # asking ahead moves nothing
        assert len(batches) == len(whole)


def test_a_new_epoch_starts_at_its_beginning() -> None:
    batches = EpochBatches(ShuffledBatches(20, 4))
    batches.start = 3
    batches.epoch = 1
    assert batches.start == 0
    assert len(list(batches)) == 5


@pytest.mark.parametrize("start", [-1, 6])
def test_a_start_outside_of_the_epoch_is_refused(start: int) -> None:
    batches = EpochBatches(ShuffledBatches(20, 4))
    batches.start = start
    with pytest.raises(ConfigError, match=f"an epoch has 5 batches; got start {start}"):
        iter(batches)


@pytest.mark.parametrize("sampler", samplers(), ids=["balanced", "hard", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shares_of_all_processes_in_rank_order_are_the_batch_of_one(sampler: Batches, world_size: int) -> None:
    ranks = [EpochBatches(sampler, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = list(ranks[0]) if world_size == 1 else list(EpochBatches(sampler))
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert [i for part in parts for i in part] == batch
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    ranks[-1].start = 2
    assert list(ranks[-1]) == [share(batch, world_size - 1, world_size) for batch in whole[2:]]


def test_a_batch_for_more_processes_than_images_is_refused() -> None:
    assert [share([5, 6, 7], rank, 3) for rank in range(3)] == [[5], [6], [7]]
    with pytest.raises(ConfigError, match="a batch of 3 images cannot be shared by 4 processes"):
        share([5, 6, 7], 0, 4)
    with pytest.raises(ConfigError, match=r"rank must lie in \[0, 2\)"):
        EpochBatches(ShuffledBatches(20, 4), rank=2, world_size=2)
