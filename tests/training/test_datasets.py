"""Labelled images: every kind of input, the splits, and the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vitembed.errors import ConfigError, DataError, ImageError, MissingExtraError
from vitembed.preprocess import Preprocess
from vitembed.training import datasets
from vitembed.training.datasets import ImageDataset, PixelDataset

GREY = Preprocess.grey((8, 8), resize="squash", invert=False)


def write(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (10, 8), level).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(["greek/alpha", "greek/beta", "latin/a", "latin/b", "latin/c"]):
        for i in range(4):
            write(tmp_path / "letters" / name / f"{i}.png", level=10 * label + i)
    return tmp_path / "letters"


def arrays(counts: list[int]) -> ImageDataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    return ImageDataset.from_arrays([np.full((8, 8), label, np.uint8) for label in labels], labels)


def test_a_folder_gives_one_class_a_folder_however_deep(folder: Path) -> None:
    dataset = ImageDataset.load(folder)
    assert dataset.classes == ("greek/alpha", "greek/beta", "latin/a", "latin/b", "latin/c")
    assert np.bincount(dataset.labels).tolist() == [4] * 5
    for image, label in zip(dataset.images, dataset.labels, strict=True):
        assert isinstance(image, Path)
        assert image.parent.relative_to(folder).as_posix() == dataset.classes[label]


def test_a_csv_gives_paths_below_its_folder_and_a_split(folder: Path) -> None:
    table = folder / "table.csv"
    table.write_text(
        "label,path,split,note\nx,greek/alpha/0.png,train,a\nx,greek/alpha/1.png,train,b\ny,latin/a/0.png,val,\n",
        encoding="utf-8-sig",
    )
    dataset = ImageDataset.load(table)
    assert dataset.classes == ("x", "y")
    assert dataset.images == [folder / "greek/alpha/0.png", folder / "greek/alpha/1.png", folder / "latin/a/0.png"]
    assert dataset.is_validation is not None
    assert dataset.is_validation.tolist() == [False, False, True]


def test_parquet_and_csv_agree(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"path": ["greek/beta/0.png", "latin/b/1.png"], "label": [7, 12], "other": [0.5, 0.5]}
    parquet.write_table(pa.table(rows), folder / "t.parquet")
    (folder / "t.csv").write_text("path,label\ngreek/beta/0.png,7\nlatin/b/1.png,12\n")
    one, two = ImageDataset.load(folder / "t.parquet"), ImageDataset.load(folder / "t.csv")
    assert one.images == two.images
    assert one.classes == two.classes == ("12", "7")
    assert one.labels.tolist() == two.labels.tolist() == [1, 0]


def test_parquet_without_its_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (folder / "t.parquet").write_bytes(b"x")
    with pytest.raises(MissingExtraError, match=r"vitembed\[parquet\]"):
        ImageDataset.load(folder / "t.parquet")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,labels\na,b\n", "lacks the column 'label'"),
        ("path,label\n", "no rows"),
        ("", "lacks the column 'path'"),
        ("path,label\nmissing.png,x\n", r"row 1: there is no image .*missing\.png"),
        ("path,label\nlatin/a/0.png\n", "row 1: expected 2 fields"),
        ("path,label\nlatin/a/0.png,x,y\n", "row 1: expected 2 fields"),
        ("path,label\nlatin/a/0.png,\n", "row 1: the label is empty"),
        ("path, label ,path\na,b,c\n", "column 'path' twice"),
        ("path,label,split\nlatin/a/0.png,x,train\nlatin/a/0.png,x,val\n", "in train and in val"),
        ("path,label,split\nlatin/a/0.png,x,test\n", "row 1: split must be train or val; got 'test'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_its_row(folder: Path, content: str, words: str) -> None:
    (folder / "t.csv").write_text(content)
    with pytest.raises(DataError, match=words):
        ImageDataset.load(folder / "t.csv")


def test_files_that_are_no_tables_are_refused(folder: Path) -> None:
    (folder / "t.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        ImageDataset.load(folder / "t.csv")
    (folder / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="Parquet"):
        ImageDataset.load(folder / "t.parquet")
    with pytest.raises(DataError, match="does not exist"):
        ImageDataset.load(folder / "missing")
    with pytest.raises(DataError, match="is no folder"):
        ImageDataset.load(write(folder / "x.png"))


def test_images_outside_a_class_are_refused(folder: Path) -> None:
    write(folder / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png lies in no class"):
        ImageDataset.load(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        ImageDataset.load(tmp_path)


def test_torchvision_data_sets_are_taken_as_they_are(folder: Path) -> None:
    torchvision_folder = torchvision.datasets.ImageFolder(folder / "latin")
    dataset = ImageDataset.from_torchvision(torchvision_folder)
    ours = ImageDataset.load(folder / "latin")
    assert dataset.labels.tolist() == ours.labels.tolist()
    assert dataset.classes == ours.classes == ("a", "b", "c")
    np.testing.assert_array_equal(GREY(dataset.images[5]), GREY(ours.images[5]))
    items = [(np.zeros((8, 8), np.uint8), "a"), (np.ones((8, 8), np.uint8), "b")]
    assert ImageDataset.from_torchvision(items).classes == ("a", "b")
    fake = torchvision.datasets.FakeData(4, (3, 8, 8), num_classes=2)
    assert len(ImageDataset.from_torchvision(fake)) == 4
    with pytest.raises(DataError, match="pairs"):
        ImageDataset.from_torchvision([1, 2])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_label_is_no_class(missing: object) -> None:
    with pytest.raises(DataError, match="image 1 has no label"):
        ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * 2, ["a", missing])


def test_tensors_of_targets_are_labels() -> None:
    class WithTargets(list[tuple[np.ndarray, int]]):
        targets = torch.tensor([3, 3, 1])

    items = WithTargets([(np.zeros((8, 8), np.uint8), 0)] * 3)
    assert ImageDataset.from_torchvision(items).classes == ("1", "3")


@pytest.mark.parametrize("seed", range(5))
def test_held_out_classes_share_no_class_with_training(seed: int) -> None:
    train, held = arrays([3] * 20).split("classes", share=0.2, seed=seed)
    assert held is not None
    assert set(train.classes).isdisjoint(held.classes)
    assert len(held.classes) == 4
    assert len(train) + len(held) == 60


def test_held_out_images_leave_two_of_a_class_on_both_sides() -> None:
    train, held = arrays([2, 3, 4, 10]).split("images", share=0.2, seed=0)
    assert held is not None
    assert dict(zip(train.classes, np.bincount(train.labels).tolist(), strict=True)) == {"0": 2, "1": 3, "2": 2, "3": 8}
    assert dict(zip(held.classes, np.bincount(held.labels).tolist(), strict=True)) == {"2": 2, "3": 2}


def test_classes_that_were_held_out_before_are_held_out_again() -> None:
    dataset = arrays([3] * 20)
    for seed in range(3):
        train, held = dataset.split("classes", share=0.5, seed=seed, again=["3", "7", "unknown"])
        assert held is not None
        assert held.classes == ("3", "7")
        assert len(train.classes) == 18
    one, _ = dataset.split("classes", share=0.2, seed=1, again=["3"])  # one class is none to validate on
    assert len(one.classes) == 16


def test_a_split_in_the_data_goes_first() -> None:
    dataset = ImageDataset.from_arrays(
        [np.zeros((8, 8), np.uint8)] * 8, list("aabbccdd"), is_validation=[False] * 4 + [True] * 4
    )
    train, held = dataset.split("classes", share=0.5, seed=0)
    assert held is not None
    assert (train.classes, held.classes) == (("a", "b"), ("c", "d"))


def test_nothing_held_out() -> None:
    dataset = arrays([2, 2])
    assert dataset.split("none", share=0.2, seed=0) == (dataset, None)


def test_equal_seeds_hold_out_equal_classes_and_others_do_not() -> None:
    dataset = arrays([3] * 30)
    chosen = [dataset.split("classes", share=0.2, seed=seed)[0].classes for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    ("counts", "validation", "words"),
    [
        ([5], "none", "at least 2 classes; got 1"),
        ([5, 5, 5], "classes", "at least 4 classes; got 3"),
        ([5], "images", "at least 2 classes"),
        ([1, 1, 1], "none", "2 images"),
        ([1, 1, 1, 1, 1], "classes", "nothing to validate on"),
        ([2, 2], "images", "nothing to validate on"),
    ],
)
def test_too_little_data_is_refused(counts: list[int], validation: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        arrays(counts).split(validation, share=0.2, seed=0)  # type: ignore[arg-type]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'classes'"):
        arrays([2, 2]).split("class", share=0.2, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="share"):
        arrays([2, 2]).split("images", share=1.0, seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "split", "words"),
    [
        ([], [], None, "empty"),
        ([1, 2], [0], None, "one label an image"),
        ([1], [3], None, r"\[0, 2\)"),
        ([1], [0], [True, False], "one split an image"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    images: list[int], labels: list[int], split: list[bool] | None, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        ImageDataset(
            images,  # type: ignore[arg-type]
            np.array(labels, dtype=np.int64),
            ("a", "b"),
            None if split is None else np.array(split),
        )


def test_classes_are_chosen_by_name(folder: Path) -> None:
    dataset = ImageDataset.load(folder)
    kept = dataset.with_classes(["latin/a", "latin/c", "unknown"])
    assert kept is not None
    assert kept.classes == ("latin/a", "latin/c")
    assert dataset.with_classes(["unknown"]) is None


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_are_those_of_the_preprocessing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, workers: int
) -> None:
    monkeypatch.setattr(datasets, "MAX_CACHE_BYTES", 1 << 30 if cached else 0)
    dataset = ImageDataset.load(folder)
    pixels = PixelDataset(dataset, GREY, workers=workers)
    assert (pixels.cache is not None) == cached
    [(batch, labels)] = pixels.batches([[3, 17, 4]], workers=workers)
    assert batch.dtype == torch.uint8
    np.testing.assert_array_equal(batch.numpy(), [GREY(dataset.images[i]) for i in (3, 17, 4)])
    assert labels.tolist() == dataset.labels[[3, 17, 4]].tolist()
    whole = torch.cat([batch for batch, _ in pixels.in_order(7, workers=workers)])
    np.testing.assert_array_equal(whole.numpy(), [GREY(image) for image in dataset.images])


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_image_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr(datasets, "MAX_CACHE_BYTES", 1 << 30 if cached else 0)
    (folder / "latin" / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.png"):
        list(PixelDataset(ImageDataset.load(folder), GREY, workers=1).in_order(4, workers=1))
