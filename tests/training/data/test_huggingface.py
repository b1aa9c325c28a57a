"""Data sets of Hugging Face `datasets`: columns and splits found or asked for, images decoded by our rules."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vitembed.errors import ConfigError, DataError, ImageError, MissingExtraError
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.huggingface import from_huggingface
from vitembed.training.data.lazy import LazyImages
from vitembed.training.data.sources import load_source

IMAGE = datasets.Image()
COLOURS = datasets.ClassLabel(names=["red", "green", "blue"])


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(level: int, **more: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("L", (6, 4), level).save(file, "JPEG" if more else "PNG", **more)
    return {"bytes": file.getvalue(), "path": None}


def table(levels: list[int], labels: list[Any], kind: Any = COLOURS, **more: Any) -> datasets.Dataset:
    features = datasets.Features({"image": IMAGE, "label": kind})
    columns = {"image": [picture(level) for level in levels], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features, **more)


def levels(dataset: ImageDataset) -> list[int]:
    """Return the grey level of each image, which says which one it is."""
    return [int(np.asarray(image)[0, 0]) for image in dataset.images]


def names(dataset: ImageDataset) -> list[str]:
    return [dataset.classes[label] for label in dataset.labels]


def test_class_labels_are_taken_by_name_and_images_in_order() -> None:
    dataset = from_huggingface(table([5, 6, 7, 8], [2, 0, 2, 0]))
    assert dataset.classes == ("blue", "red")
    assert names(dataset) == ["blue", "red", "blue", "red"]
    assert levels(dataset) == [5, 6, 7, 8]
    assert dataset.is_validation is None
    assert dataset.images[-1] == dataset.images[np.int64(3)] == dataset.images[3]  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        dataset.images[4]


def test_a_validation_split_is_set_apart_and_a_test_split_left_alone() -> None:
    splits = {"test": table([1, 2], [0, 1]), "train": table([3, 4, 5], [0, 1, 0]), "validation": table([6, 7], [2, 1])}
    dataset = from_huggingface(datasets.DatasetDict(splits))
    assert levels(dataset) == [3, 4, 5, 6, 7]
    assert names(dataset) == ["red", "green", "red", "blue", "green"]
    assert dataset.is_validation is not None
    assert dataset.is_validation.tolist() == [False] * 3 + [True] * 2


def test_splits_may_be_named() -> None:
    splits = datasets.DatasetDict({"train": table([1, 2], [0, 1]), "val": table([3], [0]), "test": table([4], [1])})
    assert levels(from_huggingface(splits, split="test")) == [4]
    assert levels(from_huggingface(splits, validation="test")) == [1, 2, 4]
    assert levels(from_huggingface(splits)) == [1, 2, 3]
    chosen = from_huggingface(splits, split="val", validation="train")
    assert levels(chosen) == [3, 1, 2]
    assert chosen.is_validation is not None
    assert chosen.is_validation.tolist() == [False, True, True]
    assert levels(from_huggingface(datasets.DatasetDict({"test": splits["test"]}))) == [4]
    with pytest.raises(ConfigError, match="unknown split 'tset'; did you mean 'test'"):
        from_huggingface(splits, split="tset")
    with pytest.raises(ConfigError, match="cannot be trained on and validated on"):
        from_huggingface(splits, split="train", validation="train")
    with pytest.raises(DataError, match="no 'train'; name one of val, test"):
        from_huggingface(datasets.DatasetDict({name: splits[name] for name in ("val", "test")}))


def test_columns_are_found_by_their_type_or_asked_for() -> None:
    features = datasets.Features(
        {"photo": IMAGE, "mask": IMAGE, "fine": COLOURS, "coarse": COLOURS, "id": datasets.Value("int64")}
    )
    row = {
        "photo": [picture(1), picture(2)],
        "mask": [picture(3), picture(4)],
        "fine": [0, 1],
        "coarse": [1, 2],
        "id": [7, 8],
    }
    rows = datasets.Dataset.from_dict(row, features=features)
    with pytest.raises(DataError, match="one column of the type Image; there are photo, mask: name it with image="):
        from_huggingface(rows)
    with pytest.raises(DataError, match="there are fine, coarse: name it with label="):
        from_huggingface(rows, image="photo")
    assert names(from_huggingface(rows, image="mask", label="coarse")) == ["green", "blue"]
    assert names(from_huggingface(rows, image="mask", label="id")) == ["7", "8"]
    assert levels(from_huggingface(rows, image="mask", label="id")) == [3, 4]
    for wrong in ({"image": "foto", "label": "fine"}, {"image": "photo", "label": "fines"}):
        with pytest.raises(ConfigError, match=r"unknown column of the split rows: .*did you mean '(photo|fine)'"):
            from_huggingface(rows, **wrong)
    with pytest.raises(DataError, match="the column 'id' is of the type Value; expected Image"):
        from_huggingface(rows, image="id", label="fine")
    with pytest.raises(DataError, match="none of id has that type"):
        from_huggingface(rows.select_columns(["id"]))
    with pytest.raises(DataError, match="the columns are photo, id"):
        from_huggingface(rows.select_columns(["photo", "id"]))


@pytest.mark.parametrize(("kind", "labels"), [("string", ["b", "a", "b"]), ("int64", [20, 3, 20])])
def test_a_column_named_label_holds_texts_or_numbers(kind: str, labels: list[Any]) -> None:
    dataset = from_huggingface(table([1, 2, 3], labels, datasets.Value(kind)))
    assert names(dataset) == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (COLOURS, [0, -1], r"train\[1\] has no label in the column 'label'; got -1"),
        (COLOURS, [None, 1], r"train\[0\] has no label"),
        (datasets.Value("string"), ["a", None], r"train\[1\] has no label"),
        (datasets.Value("float32"), [0.5, 1.0], r"train\[0\]: a label is a text or a whole number; 'label' has 0\.5"),
        (datasets.Sequence(datasets.Value("int64")), [[1], [2]], r"'label' has \[1\]"),
    ],
)
def test_a_row_without_a_usable_label_is_named(kind: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_huggingface(table([1, 2], labels, kind, split=datasets.Split.TRAIN))


def test_a_folder_written_by_save_to_disk_is_read_lazily(tmp_path: Path) -> None:
    rows = table([1, 2, 3], [0, 1, 0])
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "validation": rows.select([2])}).save_to_disk(tmp_path / "splits")
    assert levels(load_source(tmp_path / "rows")) == [1, 2, 3]
    dataset = load_source(str(tmp_path / "splits"))
    assert levels(dataset) == [1, 2, 3, 3]
    assert len(pickle.dumps(dataset)) < 8000  # paths and not pixels go to a worker process
    assert levels(pickle.loads(pickle.dumps(dataset))) == [1, 2, 3, 3]


def test_worker_processes_read_the_same_images(tmp_path: Path) -> None:
    table(list(range(9)), [0, 1, 2] * 3).save_to_disk(tmp_path / "rows")
    dataset = load_source(tmp_path / "rows")
    loader = torch.utils.data.DataLoader(dataset.images, batch_size=2, num_workers=2, collate_fn=list)  # type: ignore[arg-type,var-annotated]
    assert [int(np.asarray(image)[0, 0]) for batch in loader for image in batch] == list(range(9))


def test_a_part_of_the_images_is_of_the_same_kind() -> None:
    splits = datasets.DatasetDict({"train": table([1, 2, 3], [0, 1, 0]), "validation": table([4, 5], [2, 1])})
    images = from_huggingface(splits).images
    assert isinstance(images, LazyImages)
    part = images.take([4, 0, 3, 1]).take([3, 2, 0])
    assert isinstance(part, LazyImages)
    assert [int(np.asarray(image)[0, 0]) for image in part] == [2, 4, 5]
    assert len(images.take([])) == 0


def test_a_selection_in_another_format_gives_the_rows_that_it_shows() -> None:
    rows = table([1, 2, 3, 4], [0, 1, 0, 1]).select([3, 0]).with_format("numpy")
    dataset = from_huggingface(rows)
    assert (levels(dataset), names(dataset)) == ([4, 1], ["green", "red"])


def test_images_are_decoded_by_our_rules() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    features = datasets.Features({"image": IMAGE, "label": COLOURS})
    rows = {"image": [picture(0, exif=turned), picture(0)], "label": [0, 1]}
    dataset = from_huggingface(datasets.Dataset.from_dict(rows, features=features))
    assert [image.size for image in dataset.images] == [(4, 6), (6, 4)]  # type: ignore[union-attr]


def test_an_image_that_cannot_be_read_names_split_and_row(tmp_path: Path) -> None:
    Image.new("L", (6, 4), 9).save(tmp_path / "there.png")
    features = datasets.Features({"image": IMAGE, "label": COLOURS})
    broken = [
        {"bytes": b"none", "path": "a.png"},
        None,
        {"bytes": None, "path": "gone.png"},
        {"bytes": b"", "path": None},
    ]
    cells = [picture(1), *broken, {"bytes": None, "path": str(tmp_path / "there.png")}]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0] * 6}, features=features)
    splits = datasets.DatasetDict({"train": table([1, 2], [0, 1]), "validation": rows})
    dataset = from_huggingface(splits)
    assert np.asarray(dataset.images[7])[0, 0] == 9
    reasons = ["is not an image", "the row has no image", "cannot be read: gone.png", "is empty"]
    for row, reason in enumerate(reasons, start=1):
        with pytest.raises(ImageError, match=reason) as error:
            dataset.images[2 + row]
        assert error.value.source == f"validation[{row}]"


def test_a_row_with_neither_bytes_nor_path_has_no_image() -> None:
    import pyarrow as pa

    cells = pa.array(
        [picture(1), {"bytes": None, "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    rows = datasets.Dataset(pa.table({"image": cells, "label": ["a", "b"]})).cast_column("image", IMAGE)
    dataset = from_huggingface(rows)
    assert np.asarray(dataset.images[0])[0, 0] == 1
    with pytest.raises(ImageError, match=r"rows\[1\]: is empty: the row has no image"):
        dataset.images[1]


def test_a_name_of_the_hub_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict({"train": table([1, 2], [0, 1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert levels(load_source("hf:user/flowers")) == [1, 2]
    assert levels(load_source(Path("hf:user/flowers:small"))) == [1, 2]
    assert asked == [("user/flowers", None), ("user/flowers", "small")]


def test_parquet_files_laid_out_as_on_the_hub_are_loaded(tmp_path: Path) -> None:
    for split, first in [("train", 1), ("validation", 5)]:
        table([first, first + 1], [0, 1]).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    dataset = load_source(f"hf:{tmp_path / 'data'}")
    assert levels(dataset) == [1, 2, 5, 6]
    assert names(dataset) == ["red", "green", "red", "green"]


def test_what_cannot_be_loaded_is_one_line_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any) -> None:
        raise ConnectionError("the hub\nis away")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    for source in ("hf:user/none", str(tmp_path / "damaged")):
        with pytest.raises(DataError, match="cannot be loaded as a Hugging Face data set") as error:
            load_source(source)
        assert source.removeprefix("hf:") in str(error.value)
        assert "\n" not in str(error.value)


def test_streams_and_other_objects_are_refused() -> None:
    rows = table([1, 2], [0, 1])
    for source in (rows.to_iterable_dataset(), datasets.IterableDatasetDict({"train": rows.to_iterable_dataset()}), 3):
        with pytest.raises(DataError, match=f"at random, which a stream cannot give.*got {type(source).__name__}"):
            from_huggingface(source)
    with pytest.raises(DataError, match="has no rows"):
        from_huggingface(rows.select([]))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"vitembed\[datasets\]"):
        load_source("hf:user/flowers")
