"""Generated characters repeat by seed and are told apart by shape, though an alphabet shares its strokes."""

import generated_characters
import numpy as np
import pytest
from generated_characters import SIDE, composed, derived, new_alphabet, new_stroke
from pen_strokes import MARGIN, Disturbance, Stroke

from vitembed.errors import DataError
from vitembed.training import ImageDataset

ALPHABETS, CHARACTERS, IMAGES = 3, 8, 4


@pytest.fixture(scope="module")
def characters() -> ImageDataset:
    return generated_characters.generated_characters(ALPHABETS, characters=CHARACTERS, images=IMAGES, seed=1)


def test_the_same_seed_gives_the_same_images_and_another_seed_others(characters: ImageDataset) -> None:
    again, other = (
        generated_characters.generated_characters(2, characters=CHARACTERS, images=IMAGES, seed=seed) for seed in (1, 2)
    )
    first, second, third = ([np.asarray(image) for image in data.images] for data in (characters, again, other))
    assert all(np.array_equal(a, b) for a, b in zip(first[: len(second)], second, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(second, third, strict=True))


def test_characters_are_classes_and_alphabets_categories(characters: ImageDataset) -> None:
    assert len(characters) == ALPHABETS * CHARACTERS * IMAGES
    assert np.bincount(characters.labels).tolist() == [IMAGES] * (ALPHABETS * CHARACTERS)
    assert np.bincount(characters.categories).tolist() == [IMAGES * CHARACTERS] * ALPHABETS
    assert characters.forgery_of is None


def test_the_ink_is_black_on_white_within_the_margin(characters: ImageDataset) -> None:
    for image in characters.images:
        page = np.asarray(image)
        assert abs(max(page.shape) - SIDE) <= 2
        assert page.min() == 0
        assert min(page[0].min(), page[-1].min(), page[:, 0].min(), page[:, -1].min()) == 255
        places = np.argwhere(page < 128)
        assert np.ptp(places, axis=0).max() >= SIDE - 3 * MARGIN


def test_images_of_a_character_are_nearest_to_its_others_far_more_often_than_by_chance(
    characters: ImageDataset,
) -> None:
    small = np.stack(
        [np.asarray(image.resize((8, 8)), dtype=float).ravel() for image in characters.images]  # type: ignore[union-attr]
    )
    distances = np.abs(small[:, None] - small[None]).mean(axis=-1)
    np.fill_diagonal(distances, np.inf)
    found = characters.labels[distances.argmin(axis=1)] == characters.labels
    chance = (IMAGES - 1) / (len(characters) - 1)
    assert chance < 0.04
    assert found.mean() > 0.4


def shape(stroke: Stroke) -> tuple[float, ...]:
    """Return what stays of a stroke that is moved, scaled and mirrored left to right."""
    centred = (stroke - stroke.mean(axis=0)) / np.abs(stroke - stroke.mean(axis=0)).max()
    mirrored = centred * (-1, 1)
    return min(tuple(np.round(form.ravel(), 6) + 0.0) for form in (centred, mirrored))


def test_characters_of_an_alphabet_are_composed_of_its_strokes() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        parts = [new_stroke(rng) for _ in range(5)]
        known = {shape(part) for part in parts}
        plans = [composed(parts, 1 + number % 4, 0.7, rng) for number in range(30)]
        assert [len(plan) for plan in plans] == [1 + number % 4 for number in range(30)]
        assert {shape(stroke) for plan in plans for stroke in plan} == known


def test_a_derived_character_differs_in_a_stroke_or_in_all_a_little() -> None:
    rng = np.random.default_rng(0)
    parts = [new_stroke(rng) for _ in range(5)]
    plan = composed(parts, 3, 0.7, rng)
    kinds = set()
    for _ in range(60):
        other = derived(plan, parts, rng)
        kept = sum(any(np.array_equal(stroke, before) for before in plan) for stroke in other)
        kinds.add((len(other) - len(plan), kept))
    assert kinds == {(1, 3), (-1, 2), (0, 2), (0, 0)}  # more, less, turned, changed


def test_alphabets_are_as_long_as_is_said_and_no_stroke_is_empty() -> None:
    for seed in range(20):
        plans = new_alphabet(30, np.random.default_rng(seed))
        assert len(plans) == 30
        assert all(plans)
        assert all(np.ptp(stroke, axis=0).max() > 0 for plan in plans for stroke in plan)


def test_hands_differ_by_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = new_alphabet(2, np.random.default_rng(3))[0]
    steady, shaky = ([], [])
    for images, factor in ((steady, 0.1), (shaky, 4.0)):
        monkeypatch.setattr(
            generated_characters, "DRAWER", Disturbance(0.05, 0.0, 0.05, 0.05, 0.05, 0.05, 0.05) * factor
        )
        rng = np.random.default_rng(0)
        images += [np.asarray(generated_characters.drawn_once(plan, rng).resize((16, 16)), float) for _ in range(12)]
    assert np.stack(steady).std(axis=0).mean() < np.stack(shaky).std(axis=0).mean()


@pytest.mark.parametrize("counts", [(0, 3, 3), (-1, 3, 3), (1, 3, 3), (2, 1, 3), (2, 3, 1)])
def test_too_few_to_train_on_are_refused(counts: tuple[int, int, int]) -> None:
    alphabets, characters, images = counts
    with pytest.raises(DataError, match="two alphabets of two characters of two images at least"):
        generated_characters.generated_characters(alphabets, characters=characters, images=images, seed=0)
