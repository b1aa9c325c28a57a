"""Labelled images from Hugging Face `datasets`: a data set in memory, one saved to a folder, or one of the hub.

The columns and splits are found by themselves where there is no doubt, and asked for where there is. Images stay
encoded until they are fetched, and are then decoded by our own rules (EXIF orientation, 16 bits, transparency).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError, DataError, ImageError, MissingExtraError, unknown_name
from vitembed.images import decode_image
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.lazy import LazyImages

_VALIDATION = ("validation", "val", "valid", "dev")  # what a split of images to validate on goes by
_MARKS = ("dataset_dict.json", "state.json")  # of a folder that `save_to_disk` wrote


def from_huggingface(
    source: Any,
    *,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    validation: str | None = None,
) -> ImageDataset:
    """Take a data set of Hugging Face's `datasets` library.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`, a folder written by `save_to_disk`, or the name of a data set of
            the hub, "user/name" or "user/name:configuration", which is downloaded.
        split: what to train on (or measure); by default "train", or the only split.
        image: the column of the images; by default the only one of the type `Image`.
        label: the column of the classes; by default the only one of the type `ClassLabel`, else the one named "label".
        validation: the split to validate on; by default, unless `split` is given, the one named "validation" (or val,
            valid, dev), if there is one. Its images are `is_validation`. A test split is left alone unless it is named.

    Returns:
        The images in the order of the rows, those for validation last. One that cannot be read raises an `ImageError`
        that names split and row, counted from 0, when it is fetched.

    Raises:
        ConfigError: if there is no such split or column.
        DataError: if the data set cannot be loaded, its columns are in doubt, or a row has no label.
        MissingExtraError: without the `datasets` library.
    """
    splits = _open(source)
    chosen = _choose(splits, split, validation)
    features = splits[chosen[0]].features
    image = image or _image_column(features)
    label = label or _label_column(features)
    labels: list[object] = []
    for name in chosen:
        for column in (image, label):
            if column not in splits[name].features:
                raise unknown_name(f"column of the split {name}:", column, splits[name].features)
        labels += _labels(splits[name], label, name)
    sizes = [len(splits[name]) for name in chosen]
    is_validation = None if len(chosen) == 1 else np.repeat([False, True], sizes)
    images = _Rows([(name, _encoded(splits[name], image)) for name in chosen], image)
    return ImageDataset.from_arrays(images, labels, is_validation=is_validation)


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk` of the `datasets` library."""
    return any(os.path.isfile(folder / mark) for mark in _MARKS)  # noqa: PTH113 - Path's raises for a long name


class _Rows(LazyImages):
    """The images of one or more splits, one after the other, or some of them; decoded when they are asked for."""

    def __init__(
        self, splits: Sequence[tuple[str, Any]], column: str, positions: Sequence[int] | NDArray[np.int64] | None = None
    ) -> None:
        self._splits = splits
        self._column = column
        self._ends = np.cumsum([len(rows) for _, rows in splits])
        self._positions = range(int(self._ends[-1])) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, positions: Sequence[int]) -> "_Rows":
        """Return some of the images."""
        return _Rows(self._splits, self._column, np.asarray(self._positions)[np.asarray(positions, dtype=np.int64)])

    def __getitem__(self, position: Any) -> Any:
        position = int(self._positions[position])
        number = int(np.searchsorted(self._ends, position, side="right"))
        split, rows = self._splits[number]
        row = position - (int(self._ends[number - 1]) if number else 0)
        cell, name = rows[row][self._column], f"{split}[{row}]"
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ImageError(name, "is empty: the row has no image")
        if cell["bytes"] is not None:
            return decode_image(cell["bytes"], name)
        try:
            data = Path(cell["path"]).read_bytes()
        except OSError as error:
            raise ImageError(name, f"cannot be read: {cell['path']}: {error.strerror or error}") from error
        return decode_image(data, name)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading Hugging Face data sets", "datasets") from error
    return datasets


def _open(source: Any) -> Mapping[str, Any]:
    """Return the splits of a data set by name."""
    library = _library()
    title = type(source).__name__
    if isinstance(source, str | Path):
        title, source = str(source), _load(library, source)
    if isinstance(source, library.Dataset):
        source = {str(source.split or "rows"): source}
    if not isinstance(source, dict) or not all(isinstance(rows, library.Dataset) for rows in source.values()):
        raise DataError(
            f"expected a datasets.Dataset or DatasetDict (batches of classes need rows at random, which a stream "
            f"cannot give), a folder or a name of the hub; got {title}"
        )
    splits = {str(name): rows for name, rows in source.items() if len(rows)}
    if not splits:
        raise DataError(f"{title} has no rows; expected at least two classes of two images")
    return splits


def _load(library: Any, source: str | Path) -> Any:
    """Load a data set from a folder or the hub; code that comes with a data set is never run."""
    try:
        if Path(source).is_dir() and is_saved_dataset(Path(source)):
            return library.load_from_disk(str(source))
        name, _, configuration = str(source).partition(":")
        return library.load_dataset(name, configuration or None)
    except Exception as error:  # the library hands on whatever its file systems and HTTP libraries raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source} cannot be loaded as a Hugging Face data set: {reason}") from error


def _choose(splits: Mapping[str, Any], split: str | None, validation: str | None) -> list[str]:
    """Return the names of the split to train on and, where there is one, of that to validate on."""
    for name in (split, validation):
        if name is not None and name not in splits:
            raise unknown_name("split", name, splits)
    train = split or ("train" if "train" in splits else next(iter(splits)))
    if split is None and train != "train" and len(splits) > 1:
        raise DataError(f"which split is to be used? There is no 'train'; name one of {', '.join(splits)}")
    if validation is None and split is None:
        validation = next((name for name in _VALIDATION if name in splits and name != train), None)
    if validation == train:
        raise ConfigError(f"the split {train!r} cannot be trained on and validated on; name two, or one")
    return [train] if validation is None else [train, validation]


def _image_column(features: Mapping[str, Any]) -> str:
    found = [name for name, kind in features.items() if isinstance(kind, _library().Image)]
    if len(found) == 1:
        return found[0]
    have = f"there are {', '.join(found)}" if found else f"none of {', '.join(features)} has that type"
    raise DataError(f"expected one column of the type Image; {have}: name it with image=")


def _label_column(features: Mapping[str, Any]) -> str:
    found = [name for name, kind in features.items() if isinstance(kind, _library().ClassLabel)]
    if len(found) == 1:
        return found[0]
    if not found and "label" in features:
        return "label"
    have = f"there are {', '.join(found)}" if found else f"the columns are {', '.join(features)}"
    raise DataError(f"expected one column of the type ClassLabel, or one named label; {have}: name it with label=")


def _labels(rows: Any, column: str, split: str) -> list[object]:
    """Return the label of each row: the name of a `ClassLabel`, the value of any other column."""
    kind = rows.features[column]
    values = rows.with_format(None).select_columns([column])[:][column]  # without the images, which it would decode
    names = getattr(kind, "names", None)
    for row, value in enumerate(values):
        if value is None or (names is not None and value < 0):  # -1 is what a test split without labels has
            raise DataError(f"{split}[{row}] has no label in the column {column!r}; got {value}")
        if not isinstance(value, str | int):
            raise DataError(f"{split}[{row}]: a label is a text or a whole number; {column!r} has {value!r}")
    return list(values) if names is None else [names[value] for value in values]


def _encoded(rows: Any, column: str) -> Any:
    """Return rows with the image alone, as the bytes of its file."""
    kind, wanted = rows.features[column], _library().Image
    if not isinstance(kind, wanted):
        raise DataError(f"the column {column!r} is of the type {type(kind).__name__}; expected Image")
    return rows.with_format(None).select_columns([column]).cast_column(column, wanted(decode=False))
