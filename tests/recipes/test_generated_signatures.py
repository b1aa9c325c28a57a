"""Generated signatures repeat by seed, are drawn whole, and forgeries differ more than genuine ones do."""

import generated_signatures
import numpy as np
import pytest
from generated_signatures import SIDE
from numpy.typing import NDArray
from pen_strokes import MARGIN
from PIL import Image

from vitembed.training import ImageDataset

WRITERS, IMAGES = 40, 3


@pytest.fixture(scope="module")
def signatures() -> ImageDataset:
    return generated_signatures.generated_signatures(WRITERS, images=IMAGES, seed=1)


def pixels(dataset: ImageDataset) -> list[NDArray[np.uint8]]:
    return [np.asarray(image) for image in dataset.images]


def test_the_same_seed_gives_the_same_images_and_another_seed_others(signatures: ImageDataset) -> None:
    again, other = (generated_signatures.generated_signatures(2, images=IMAGES, seed=seed) for seed in (1, 2))
    first = pixels(signatures)[: len(again)]
    assert all(np.array_equal(a, b) for a, b in zip(first, pixels(again), strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, pixels(other), strict=True))


def test_each_writer_has_genuine_images_of_one_class_and_forgeries_of_classes_of_their_own(
    signatures: ImageDataset,
) -> None:
    assert len(signatures.identities) == WRITERS
    assert signatures.forgery_of is not None
    for writer in range(WRITERS):
        name = f"generated {writer + 1}"
        label = signatures.classes.index(name)
        own, imitated = signatures.labels == label, signatures.forgery_of == label
        assert (own & (signatures.forgery_of < 0)).sum() == own.sum() == IMAGES
        assert imitated.sum() == IMAGES
        assert len(set(signatures.labels[imitated])) == IMAGES


def test_the_ink_is_black_on_white_and_reaches_the_margin_and_no_farther(signatures: ImageDataset) -> None:
    for page in pixels(signatures):
        assert abs(max(page.shape) - SIDE) <= 2
        edge = np.concatenate([page[0], page[-1], page[:, 0], page[:, -1]])
        assert edge.min() == 255
        assert page.min() == 0
        places = np.argwhere(page < 128)
        reach = places.max(axis=0) - places.min(axis=0)
        assert reach.max() >= SIDE - 3 * MARGIN


def test_a_forgery_differs_from_a_genuine_image_by_more_than_two_genuine_images_do(signatures: ImageDataset) -> None:
    small = [
        np.asarray(image.resize((32, 16), Image.Resampling.BOX), dtype=float).ravel() for image in signatures.images
    ]
    nearer = []
    for writer in range(0, len(small), 2 * IMAGES):
        genuine, forged = small[writer : writer + IMAGES], small[writer + IMAGES : writer + 2 * IMAGES]
        own = [np.abs(a - b).mean() for at, a in enumerate(genuine) for b in genuine[:at]]
        others = [np.abs(a - b).mean() for a in genuine for b in forged]
        nearer.append(np.mean(own) < np.mean(others))
    assert np.mean(nearer) >= 0.75  # not all: pens differ, too, and strokes that move by their width share no pixels
