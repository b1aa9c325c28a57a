"""Rotations as classes: each turned image against numpy's own quarter turn, and what becomes of names and forgeries."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitembed.embedder import Embedder
from vitembed.errors import DataError, ImageError
from vitembed.images import load_image
from vitembed.preprocess import Preprocess
from vitembed.training import ImageDataset, TrainConfig, TripletLoss
from vitembed.training.identity import identity

PICTURES = list(np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8))


def test_every_image_comes_in_four_classes_turned_as_numpy_turns_it() -> None:
    turned = ImageDataset.from_arrays(PICTURES, list("baba")).with_rotations()
    assert turned.classes == ("a", "b", "a@90", "b@90", "a@180", "b@180", "a@270", "b@270")
    assert len(turned) == 16
    for at, image in enumerate(turned.images):
        turns, source = divmod(at, 4)
        assert turned.classes[turned.labels[at]] == "baba"[source] + ("", "@90", "@180", "@270")[turns]
        np.testing.assert_array_equal(np.asarray(load_image(image)), np.rot90(PICTURES[source], turns))


def test_a_part_of_them_is_turned_alike() -> None:
    turned = ImageDataset.from_arrays(PICTURES, list("aabb")).with_rotations()
    part = turned.subset(np.array([13, 2])).subset(np.array([1, 0]))
    assert part.classes == ("b", "a@270")
    np.testing.assert_array_equal(np.asarray(load_image(part.images[0])), PICTURES[2])
    np.testing.assert_array_equal(np.asarray(load_image(part.images[1])), np.rot90(PICTURES[1], 3))


def test_a_turned_forgery_imitates_the_writer_turned_alike() -> None:
    dataset = ImageDataset.from_arrays(PICTURES, ["a", "a", None, "b"], forgery_of=[None, None, "a", None])
    turned = dataset.with_rotations()
    assert turned.forgery_of is not None
    forged = np.flatnonzero(turned.forgery_of >= 0)
    assert [turned.classes[turned.forgery_of[at]] for at in forged] == ["a", "a@90", "a@180", "a@270"]
    assert len(set(turned.labels[forged])) == 4
    assert not set(turned.labels[forged]) & set(np.delete(turned.labels, forged))


def test_images_set_apart_for_validation_stay_so() -> None:
    dataset = ImageDataset.from_arrays(PICTURES, list("aabb"), is_validation=[False, True, True, False])
    turned = dataset.with_rotations()
    assert turned.is_validation is not None
    assert turned.is_validation.tolist() == [False, True, True, False] * 4


def test_a_broken_file_is_named_when_it_is_fetched_not_before(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(PICTURES[0]).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    turned = ImageDataset.from_arrays([tmp_path / "a.png", tmp_path / "b.png"], list("ab")).with_rotations()
    assert load_image(turned.images[2]).size == (5, 7)
    with pytest.raises(ImageError, match=r"b\.png"):
        load_image(turned.images[3])


def test_turned_images_are_not_turned_again() -> None:
    turned = ImageDataset.from_arrays(PICTURES, list("aabb")).with_rotations()
    with pytest.raises(DataError, match="turned already"):
        turned.subset(np.arange(8)).with_rotations()


def test_a_training_of_other_files_under_the_same_names_is_another_one(tmp_path: Path) -> None:
    def identity_of(folder: Path) -> object:
        for name in ("a1", "a2", "b1", "b2"):
            folder.mkdir(exist_ok=True)
            Image.fromarray(PICTURES[0]).save(folder / f"{folder.name}{name}.png")
        paths = sorted(folder.iterdir())
        model = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), stem="conv", device="cpu")
        data = ImageDataset.from_arrays(paths, list("aabb")).with_rotations()
        return identity(model, data, TripletLoss(), None, TrainConfig())

    assert identity_of(tmp_path / "one") == identity_of(tmp_path / "one")
    assert identity_of(tmp_path / "one") != identity_of(tmp_path / "two")


def test_the_category_of_a_class_is_what_it_lies_in_and_how_it_is_turned() -> None:
    data = ImageDataset.from_arrays(PICTURES, ["a/x", "a/y", "b/x", "b/deep/x"][: len(PICTURES)]).with_rotations()
    groups: dict[int, set[str]] = {}
    for label, category in zip(data.labels, data.categories, strict=True):
        groups.setdefault(int(category), set()).add(data.classes[label])
    assert {"a/x", "a/y"} in groups.values()
    assert {"a/x@90", "a/y@90"} in groups.values()
    assert {"b/x"} in groups.values()
    assert {"b/deep/x@180"} in groups.values()
    assert len(groups) == 12
