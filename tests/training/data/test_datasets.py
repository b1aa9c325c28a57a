"""Labelled images: every kind of input, the splits, and the pixels."""

import csv
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vitembed.errors import ConfigError, DataError, MissingExtraError
from vitembed.layouts import names_of_folders
from vitembed.metrics import recall_at_k
from vitembed.preprocess import Preprocess
from vitembed.training.data.datasets import ImageDataset

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


def load_both(folder: Path, columns: dict[str, list[Any]]) -> list[ImageDataset]:
    """Return what is read of a table that pandas might write, with floats for whole numbers beside a gap."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), folder / "t.parquet")
    with (folder / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(["" if v is None else v for v in row] for row in zip(*columns.values(), strict=True))
    return [ImageDataset.load(folder / "t.parquet"), ImageDataset.load(folder / "t.csv")]


def test_space_around_values_makes_no_class_in_parquet_either(folder: Path) -> None:
    paths = [f"latin/a/{i}.png" for i in range(4)]
    for dataset in load_both(folder, {"path": [" " + path for path in paths], "label": ["a", " a", "b ", "b"]}):
        assert dataset.classes == ("a", "b")
        assert dataset.labels.tolist() == [0, 0, 1, 1]
        assert dataset.images == [folder / path for path in paths]


@pytest.mark.parametrize("label", [[1, 1, 20, 20, 3], [1.0, 1.0, 20.0, 20.0, None]], ids=["whole", "gap"])
@pytest.mark.parametrize("writers", [[None, None, None, None, 20.0], ["", "", "", "", "20"]], ids=["floats", "text"])
def test_numbers_that_a_gap_made_floats_name_their_writer(folder: Path, label: list[Any], writers: list[Any]) -> None:
    paths = [f"latin/a/{i}.png" for i in range(4)] + ["latin/b/0.png"]
    for dataset in load_both(folder, {"path": paths, "label": label, "forgery_of": writers}):
        assert dataset.forgery_of is not None
        owner = dataset.classes[dataset.forgery_of[4]]
        assert float(owner) == 20
        assert dataset.labels[2] == dataset.labels[3] == dataset.forgery_of[4]
        assert dataset.classes[dataset.labels[4]] == f"{owner}/forged/latin/b/0.png"
        assert len(dataset.identities) == 2


@pytest.mark.parametrize("labels", [["x", None], [1.0, float("nan")]])
def test_a_label_that_parquet_lacks_is_refused_with_its_row(folder: Path, labels: list[object]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"path": ["greek/beta/0.png", "latin/b/1.png"], "label": labels}
    parquet.write_table(pa.table(rows), folder / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 2: the label is empty"):
        ImageDataset.load(folder / "t.parquet")


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
        ("path,label,forgery_of\nlatin/a/0.png,,\n", "row 1: the label is empty"),
        ("path,label,forgery_of\nlatin/a/0.png,x,\nlatin/a/1.png,,y\n", "latin/a/1.png imitates 'y', but no genuine"),
        ("path,label,forgery_of\nlatin/a/0.png,x,\nlatin/a/1.png,,x\nlatin/a/1.png,,x\n", "list it once"),
        ("path,label,forgery_of,forgery_of\na,b,,\n", "column 'forgery_of' twice"),
        ("path, label ,path\na,b,c\n", "column 'path' twice"),
        ("path,label,split\nlatin/a/0.png,x,train\nlatin/a/0.png,x,val\n", "in train and in val"),
        ("path,label,split\nlatin/a/0.png,x,train\nlatin/../latin/a/0.png,x,val\n", r"latin/a/0\.png is in train and"),
        ("path,label,split\nlatin/a/0.png,x,val\nlink.png,x,train\n", r"latin/a/0\.png is in train and in val"),
        ("path,label\nlatin/a/0.png,x\n" + "y" * 5000 + ",x\n", r"row 2: y{60}\.\.\. cannot be opened: File name too"),
        ("path,label\nlatin/a/0.png,1\nlatin/a/1.png,one\nlatin/a/2.png,01\n", "'1' of row 1 and '01' of row 3 are"),
        ("path,label\nlatin/a/0.png,x\nlatin/a/1.png,1.0\nlatin/a/2.png,1\n", "'1.0' of row 2 and '1' of row 3"),
        ("path,label\nlatin/a/0.png,-0\nlatin/a/1.png,+0.00\n", "'-0' of row 1 and '[+]0.00' of row 2 are one number"),
        ("path,label,split\nlatin/a/0.png,x,test\n", "row 1: split must be train or val; got 'test'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_its_row(folder: Path, content: str, words: str) -> None:
    (folder / "t.csv").write_text(content)
    (folder / "link.png").symlink_to("latin/a/0.png")
    with pytest.raises(DataError, match=words) as caught:
        ImageDataset.load(folder / "t.csv")
    assert "\n" not in str(caught.value)


def test_labels_that_only_look_alike_are_classes_of_their_own(folder: Path) -> None:
    labels = ["1", "1e0", "1_0", "10", "0x1", "1.5", "1/1", "\u0661", "1" * 5000]
    rows = [f"latin/{name}/{i}.png" for name in "abc" for i in range(4)]
    lines = [f"{path},{label}" for path, label in zip(rows, labels, strict=False)]
    (folder / "t.csv").write_text("path,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    assert ImageDataset.load(folder / "t.csv").classes == tuple(sorted(labels))


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


@pytest.mark.parametrize(
    ("labels", "first", "other", "at"),
    [
        (["1", 1], "'1' (str)", "1 (int)", 1),
        ([2, 2, 2.0], "2 (int)", "2.0 (float)", 2),
        ([1, True], "1 (int)", "True (bool)", 1),
        ([np.int64(3), np.str_("3")], "3 (int)", "'3' (str)", 1),
        ([torch.tensor(1.0), 1], "1.0 (float)", "1 (int)", 1),
    ],
)
def test_labels_of_several_types_are_refused_with_the_first_two(
    labels: list[object], first: str, other: str, at: int
) -> None:
    words = f"image 0 has {re.escape(first)} and image {at} has {re.escape(other)}"
    with pytest.raises(DataError, match=words):
        ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * len(labels), labels)


@pytest.mark.parametrize(
    "labels",
    [[1, np.int64(2), np.int32(1)], ["1", np.str_("2"), "1"], [torch.tensor(1), 2, 1], torch.tensor([1, 2, 1])],
)
def test_labels_of_numpy_and_torch_are_of_the_types_of_python(labels: list[object]) -> None:
    dataset = ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * 3, labels)
    assert dataset.classes == ("1", "2")
    assert dataset.labels.tolist() == [0, 1, 0]


def test_one_hot_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"one label an image, .*shape \(3,\)"):
        ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * 3, np.eye(3))


def test_a_class_with_one_image_may_stand_beside_others() -> None:
    dataset = arrays([1, 2, 1])
    train, held = dataset.split("none", share=0.2, seed=0)
    assert held is None
    assert train.classes == ("0", "1", "2")


class Targets:
    """A data set as torchvision has them: targets by number, and names of the classes."""

    classes = ("cat", "dog", "ship")

    def __init__(self, targets: object) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return np.zeros((8, 8), np.uint8), 0


@pytest.mark.parametrize(
    "targets",
    [[2, 0, 2, 0], np.array([2, 0, 2, 0]), torch.tensor([2, 0, 2, 0]), list(np.array([2, 0, 2, 0], dtype=np.uint8))],
    ids=["list", "numpy", "torch", "scalars"],
)
def test_numbered_targets_go_by_the_names_of_their_classes(targets: object) -> None:
    dataset = ImageDataset.from_torchvision(Targets(targets))
    assert dataset.classes == ("cat", "ship")
    assert dataset.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_a_target_of_minus_one_is_never_the_last_class(as_type: Callable[[list[int]], object]) -> None:
    with pytest.raises(DataError, match="item 2 has no label; got -1"):
        ImageDataset.from_torchvision(Targets(as_type([0, 1, -1, 2])))


def test_one_long_label_costs_its_own_length_and_no_more() -> None:
    labels = [f"class {i % 100}" for i in range(20_000)]
    labels[7] = "x" * 20_000
    tracemalloc.start()
    try:
        dataset = ImageDataset.from_arrays(range(20_000), labels)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # as an array of text of one width it is 1.6 GB
    assert len(dataset.classes) == 101
    assert [dataset.classes[label] for label in dataset.labels] == labels


def test_labels_that_differ_in_a_closing_nul_are_two_classes() -> None:
    dataset = ImageDataset.from_arrays([np.zeros((8, 8), np.uint8)] * 3, ["a\0", "a", "a\0"])
    assert dataset.classes == ("a", "a\0")
    assert dataset.labels.tolist() == [1, 0, 1]


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
        ([1, 1, 1], "none", "class with at least 2 images; each of the 3 classes has one, .* add images"),
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


@pytest.fixture
def signatures(tmp_path: Path) -> Path:
    """Write the signatures of five writers: four genuine ones each, and as many forgeries as the writer's number."""
    for writer in range(5):
        for i in range(4):
            write(tmp_path / "signatures" / f"nl/{writer:03}" / "genuine" / f"{i}.png", level=10 * writer)
        for i in range(writer):
            write(tmp_path / "signatures" / f"nl/{writer:03}" / "forged" / f"{i}.png", level=10 * writer + 5)
    return tmp_path / "signatures"


def check_forgeries(dataset: ImageDataset) -> None:
    """Check that each forgery is alone in its class and imitates the writer in whose folder it lies."""
    assert dataset.forgery_of is not None
    for image, label, writer in zip(dataset.images, dataset.labels, dataset.forgery_of, strict=True):
        path = Path(str(image))
        owner = path.parent.parent.relative_to(path.parents[3]).as_posix()
        if path.parent.name == "forged":
            assert np.count_nonzero(dataset.labels == label) == 1
            assert dataset.classes[label] == f"{owner}/forged/{path.name}"
            assert dataset.classes[writer] == owner
        else:
            assert (dataset.classes[label], writer) == (owner, -1)


def test_a_folder_of_signatures_is_recognised(signatures: Path) -> None:
    dataset = ImageDataset.load(signatures)
    check_forgeries(dataset)
    assert dataset.identities == tuple(f"nl/{writer:03}" for writer in range(5))
    assert len(dataset) == 30
    assert len(dataset.classes) == 15
    assert ImageDataset.from_signatures(signatures).classes == dataset.classes


def test_folders_named_genuine_and_forged_without_writers_are_classes(tmp_path: Path) -> None:
    for name in ("genuine", "forged"):
        write(tmp_path / "coins" / name / "0.png")
    dataset = ImageDataset.load(tmp_path / "coins")
    assert dataset.classes == ("forged", "genuine")
    assert dataset.forgery_of is None
    assert dataset.identities == dataset.classes
    with pytest.raises(DataError, match=r"forged/0\.png lies in no .*WRITER/genuine"):
        ImageDataset.from_signatures(tmp_path / "coins")


def test_forged_beside_other_folders_than_genuine_is_a_class(tmp_path: Path) -> None:
    for name in ("metal/forged", "metal/cast"):
        write(tmp_path / name / "0.png")
    assert ImageDataset.load(tmp_path).classes == ("metal/cast", "metal/forged")


@pytest.mark.parametrize("stray", ["nl/001/scan.png", "x.png", "nl/003/forged/anna/1.png"])
def test_a_stray_image_never_makes_one_class_of_all_forgeries(signatures: Path, stray: str) -> None:
    write(signatures / stray)
    for read in (ImageDataset.load, ImageDataset.from_signatures):
        with pytest.raises(DataError, match=rf"{stray} lies in no "):
            read(signatures)


def test_forgeries_of_a_writer_without_genuine_images_are_refused(signatures: Path) -> None:
    write(signatures / "nl/099/forged/1.png")
    with pytest.raises(DataError, match=r"nl/099/forged/1\.png imitates 'nl/099', but no genuine image"):
        ImageDataset.load(signatures)


def test_a_table_names_forgeries_as_the_folder_does(signatures: Path) -> None:
    whole = ImageDataset.load(signatures)
    lines = ["path,forgery_of,label"]
    for path in whole.images:
        name = Path(str(path)).relative_to(signatures)
        writer = name.parent.parent.as_posix()
        lines.append(f"{name},{writer},{writer}" if name.parent.name == "forged" else f"{name},,{writer}")
    (signatures / "t.csv").write_text("\n".join(lines) + "\n")
    dataset = ImageDataset.load(signatures / "t.csv")
    assert dataset.images == whole.images
    assert dataset.identities == whole.identities
    assert whole.forgery_of is not None
    assert dataset.forgery_of is not None
    writers = [[d.classes[w] if w >= 0 else None for w in d.forgery_of] for d in (dataset, whole)]
    assert writers[0] == writers[1]
    assert len(dataset.classes) == len(whole.classes)
    assert "nl/002/forged/nl/002/forged/1.png" in dataset.classes


def test_parquet_gives_forgeries_with_null_for_none(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"path": [f"latin/a/{i}.png" for i in range(3)], "label": [7, 7, None], "forgery_of": [None, None, 7]}
    parquet.write_table(pa.table(rows), folder / "t.parquet")
    dataset = ImageDataset.load(folder / "t.parquet")
    assert dataset.classes == ("7", "7/forged/latin/a/2.png")
    assert dataset.forgery_of is not None
    assert dataset.forgery_of.tolist() == [-1, -1, 0]


def test_arrays_take_forgeries() -> None:
    images = [np.zeros((8, 8), np.uint8)] * 5
    dataset = ImageDataset.from_arrays(images, [3, 3, 5, None, 3], forgery_of=[None, None, None, 5, 3])
    assert dataset.classes == ("3", "3/forged/4", "5", "5/forged/3")
    assert dataset.labels.tolist() == [0, 0, 2, 3, 1]
    assert dataset.forgery_of is not None
    assert dataset.forgery_of.tolist() == [-1, -1, -1, 2, 0]
    assert ImageDataset.from_arrays(images, "aabbc", forgery_of=[None] * 5).forgery_of is None
    with pytest.raises(DataError, match="for each of the 5 labels; got 1"):
        ImageDataset.from_arrays(images, "aabbc", forgery_of=[None])
    with pytest.raises(DataError, match=r"image 0 has 3 \(int\) and image 3 has '5' \(str\)"):
        ImageDataset.from_arrays(images, [3, 3, 5, None, 3], forgery_of=[None, None, None, "5", None])


@pytest.mark.parametrize(
    ("forgery_of", "words"),
    [
        ([-1, -1], r"forgery_of for each of the 4 images"),
        ([-1, -1, -1, 3], r"\[-1, 3\)"),
        ([-2, -1, -1, -1], r"\[-1, 3\)"),
        ([-1, 1, -1, -1], "'a' holds a forgery and another image"),
        ([-1, -1, 0, 1], "genuine images; 'b' is none"),
        ([-1, -1, 1, -1], "genuine images; 'b' is none"),
    ],
)
def test_forgeries_that_cannot_be_are_refused(forgery_of: list[int], words: str) -> None:
    images = [np.zeros((8, 8), np.uint8)] * 4
    with pytest.raises(DataError, match=words):
        ImageDataset(images, np.array([0, 0, 1, 2]), ("a", "b", "c"), None, np.array(forgery_of))


@pytest.mark.parametrize("seed", range(4))
def test_held_out_writers_take_their_forgeries_with_them(signatures: Path, seed: int) -> None:
    train, held = ImageDataset.load(signatures).split("classes", share=0.4, seed=seed)
    assert held is not None
    assert len(held.identities) == 2  # forgeries, of which there are ten, are not picked, nor counted
    assert set(train.identities).isdisjoint(held.identities)
    for part in (train, held):
        expected = sum(int(name[-3:]) for name in part.identities)
        assert len(part) == 4 * len(part.identities) + expected
        assert len(part.classes) == len(part.identities) + expected
        if expected:
            check_forgeries(part)
    again, _ = ImageDataset.load(signatures).split("classes", share=0.4, seed=seed + 9, again=held.classes)
    assert again.classes == train.classes


def test_held_out_images_take_a_share_of_the_forgeries(signatures: Path) -> None:
    train, held = ImageDataset.load(signatures).split("images", share=0.5, seed=0)
    assert held is not None
    assert len(train.identities) == len(held.identities) == 5
    for part in (train, held):
        check_forgeries(part)
        assert part.forgery_of is not None
        assert np.bincount(part.forgery_of[part.forgery_of >= 0], minlength=1).max() == 2
    assert len(train) + len(held) == 30


def test_named_classes_come_with_their_forgeries(signatures: Path) -> None:
    kept = ImageDataset.load(signatures).with_classes(["nl/001", "nl/003"])
    assert kept is not None
    check_forgeries(kept)
    assert kept.identities == ("nl/001", "nl/003")
    assert len(kept) == 8 + 1 + 3
    without = ImageDataset.load(signatures).with_classes(["nl/000"])
    assert without is not None
    assert without.forgery_of is None


def test_a_forgery_alone_still_knows_whom_it_imitates(signatures: Path) -> None:
    dataset = ImageDataset.load(signatures)
    assert dataset.forgery_of is not None
    alone = dataset.subset(dataset.forgery_of >= 0)
    check_forgeries(alone)
    assert alone.identities == ()
    assert "nl/000" not in alone.classes
    genuine = dataset.subset(dataset.forgery_of < 0)
    assert genuine.forgery_of is None
    assert genuine.classes == dataset.identities


def test_a_split_in_the_data_never_trains_on_forgeries_of_a_held_out_writer() -> None:
    images = [np.zeros((8, 8), np.uint8)] * 9
    labels, forgery_of = [*list("aabbccdd"), None], [None] * 8 + ["d"]
    for forgery_is_held in (True, False):
        held_out = [False] * 4 + [True] * 4 + [forgery_is_held]
        dataset = ImageDataset.from_arrays(images, labels, is_validation=held_out, forgery_of=forgery_of)
        if forgery_is_held:
            _, held = dataset.split("classes", share=0.2, seed=0)
            assert held is not None
            assert held.forgery_of is not None
            assert held.forgery_of.tolist() == [-1, -1, -1, -1, 1]
        else:
            with pytest.raises(DataError, match="'d' is held out for validation, but forgeries of it are for training"):
                dataset.split("classes", share=0.2, seed=0)


def test_forgeries_are_found_by_queries_and_are_none_themselves() -> None:
    images = [np.zeros((8, 8), np.uint8)] * 5
    dataset = ImageDataset.from_arrays(images, ["a", "a", "b", "b", None], forgery_of=[None] * 4 + ["a"])
    angles = np.radians([0, 20, 90, 91, 5])  # the forgery lies nearer to either "a" than the other one does
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert recall_at_k(vectors, dataset.labels, ks=(1, 2)) == {1: 0.5, 2: 1.0}
    assert recall_at_k(vectors[:4], dataset.labels[:4]) == {1: 1.0}


def test_the_signatures_of_the_competition_are_read_as_they_are() -> None:
    folder = os.environ.get("VITEMBED_DATA")
    if folder is None:
        pytest.skip("VITEMBED_DATA is unset")
    with zipfile.ZipFile(Path(folder) / "signatures.zip") as archive:
        names = [Path(name) for name in archive.namelist() if name.endswith(".png")]
    read = names_of_folders(Path(), names)
    assert len(set(read.classes) - {name for name in read.classes if "/forged/" in name}) == 43
    assert sum(writer is None for writer in read.forgery_of) == 635
    assert sum(writer is not None for writer in read.forgery_of) == 514
    assert len(set(read.classes)) == 43 + 514
