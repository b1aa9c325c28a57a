"""Labelled images to train on: where they come from, which classes are held out, and how their pixels are fetched.

`ImageDataset` is a plain value (sources, labels, names of classes, an optional split) that every kind of input is
turned into. `PixelDataset` reads it through a `Preprocess`, once into memory where the pixels fit, so that small images
are decoded once and not every epoch.
"""

import csv
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitembed.errors import ConfigError, DataError, ImageError, MissingExtraError, unknown_name
from vitembed.images import ImageSource, list_images
from vitembed.preprocess import Preprocess

Validation = Literal["classes", "images", "none"]
VALIDATIONS = ("classes", "images", "none")
MAX_CACHE_BYTES = 2 << 30  # pixels up to this size are kept in memory


@dataclass(frozen=True)
class ImageDataset:
    """Images with a class each.

    Attributes:
        images: paths, PIL images or arrays, N of them.
        labels: (N,) int64, indices into `classes`.
        classes: the names of the classes; images of one class are positives of each other.
        is_validation: (N,) bool, the images that the data itself sets apart for validation; None if it does not say.

    Raises:
        DataError: if the lengths do not fit or a label names no class.
    """

    images: Sequence[ImageSource]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    is_validation: NDArray[np.bool_] | None = field(default=None)

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise DataError("the data set is empty; expected at least two classes of two images")
        if self.labels.shape != (len(self.images),):
            raise DataError(
                f"expected one label an image; got {self.labels.shape} labels for {len(self.images)} images"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise DataError(f"labels must lie in [0, {len(self.classes)}), one number a class")
        if self.is_validation is not None and self.is_validation.shape != self.labels.shape:
            raise DataError("expected one split an image")

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "ImageDataset":
        """Read a folder of classes, or a .csv or .parquet table; see `from_folder` and `from_table`.

        Raises:
            DataError: if the path does not exist or is of another kind.
        """
        path = Path(source)
        if path.is_dir():
            return cls.from_folder(path)
        if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
            return cls.from_table(path)
        found = "is no folder and no .csv or .parquet table" if path.exists() else "does not exist"
        raise DataError(f"{path} {found}; expected a folder with one subfolder a class, or a table of path,label")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "ImageDataset":
        """Read `folder/class/image.jpg`: the class of an image is the folder that holds it.

        Folders may be nested: `letters/greek/alpha/01.png` is of the class `greek/alpha` of `letters`.

        Raises:
            DataError: if there are no images, or images that lie in no class.
        """
        root = Path(folder)
        paths = list_images(root)
        names = [path.parent.relative_to(root).as_posix() for path in paths]
        if "." in names:
            loose = paths[names.index(".")]
            raise DataError(f"{loose} lies in no class; expected {root}/CLASS/IMAGE: make one folder a class")
        return cls._from_names(paths, names)

    @classmethod
    def from_table(cls, table: str | os.PathLike[str]) -> "ImageDataset":
        """Read a .csv or .parquet table with the columns path, label and, if you like, split (train or val).

        Relative paths start at the table's folder.

        Raises:
            DataError: naming the column, the row and the file that is missing.
            MissingExtraError: for Parquet without pyarrow.
        """
        path = Path(table)
        columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
        images: list[Path] = []
        for row, name in enumerate(columns["path"], start=1):
            image = path.parent / name
            if not image.is_file():
                raise DataError(f"{path}, row {row}: there is no image {image}; paths start at the table's folder")
            images.append(image)
        for row, label in enumerate(columns["label"], start=1):
            if not label:
                raise DataError(f"{path}, row {row}: the label is empty; every image needs one")
        if "split" not in columns:
            return cls._from_names(images, columns["label"])
        is_validation = _read_split(path, columns["split"])
        both = {p for p, held in zip(images, is_validation, strict=True) if held} & {
            p for p, held in zip(images, is_validation, strict=True) if not held
        }
        if both:
            raise DataError(f"{path}: {min(both)} is in train and in val; an image may be in one of them")
        return cls._from_names(images, columns["label"], is_validation)

    @classmethod
    def from_arrays(
        cls, images: Sequence[ImageSource], labels: Iterable[object], *, is_validation: Iterable[bool] | None = None
    ) -> "ImageDataset":
        """Take images with one label each (strings or numbers), and optionally which of them are for validation.

        Raises:
            DataError: if a label is missing (None or NaN), or the lengths do not fit.
        """
        split = None if is_validation is None else np.fromiter(is_validation, dtype=np.bool_)
        names = []
        for position, label in enumerate(labels):
            if label is None or label != label:  # NaN is what differs from itself
                raise DataError(f"image {position} has no label; got {label!r}")
            names.append(str(label))
        return cls._from_names(images, names, split)

    @classmethod
    def from_torchvision(cls, dataset: Any) -> "ImageDataset":
        """Take a torchvision data set, or anything with a length and items of (image, label); they are fetched lazily.

        Leave its own `transform` unset: pre-processing belongs to the model. The labels are read from its `targets` or
        `labels` where it has them, and from its items otherwise.

        Raises:
            DataError: if the items are no pairs.
        """
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is None:
            try:
                labels = [label for _, label in (dataset[i] for i in range(len(dataset)))]
            except (TypeError, ValueError) as error:
                raise DataError("expected a data set whose items are (image, label) pairs") from error
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        names = getattr(dataset, "classes", None)
        if isinstance(names, Sequence) and all(isinstance(label, int) and label < len(names) for label in labels):
            labels = [names[label] for label in labels]
        return cls.from_arrays(_LazyItems(dataset), labels)

    def subset(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "ImageDataset":
        """Return the chosen images, with classes that have none left out."""
        positions = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        kept, labels = np.unique(self.labels[positions], return_inverse=True)
        return ImageDataset(
            images=[self.images[i] for i in positions],
            labels=labels.astype(np.int64),
            classes=tuple(self.classes[label] for label in kept),
        )

    def with_classes(self, names: Iterable[str]) -> "ImageDataset | None":
        """Return the images of the named classes; None if there are none."""
        wanted = set(names)
        chosen = np.array([name in wanted for name in self.classes])[self.labels]
        return self.subset(chosen) if chosen.any() else None

    def split(
        self, validation: Validation, *, share: float, seed: int, again: Collection[str] = ()
    ) -> "tuple[ImageDataset, ImageDataset | None]":
        """Return what to train on and what to validate on.

        Args:
            validation: "classes" holds out whole classes, so that the figure is about classes never seen (the default
                where embeddings are used); "images" holds out images of every class; "none" holds out nothing.
                A split that the data itself names goes before this.
            share: of the classes or images to hold out, in (0, 1).
            seed: which ones.
            again: classes that an earlier training of the same weights held out: with "classes" they are held out
                again, in place of random ones, where the data has two of them.

        Raises:
            ConfigError: if a setting is unknown or out of range.
            DataError: if too little is left on either side: both need two classes, and a class with two images.
        """
        if validation not in VALIDATIONS:
            raise unknown_name("validation", validation, VALIDATIONS)
        if not 0 < share < 1:
            raise ConfigError(f"the share held out for validation must lie in (0, 1); got {share}")
        if validation == "none":
            _check_trainable(self, "training")
            return self, None
        held_out = self.is_validation
        if held_out is None:
            rng = np.random.default_rng(seed)
            held_out = (
                self._pick_classes(share, rng, again) if validation == "classes" else self._pick_images(share, rng)
            )
        if held_out.all() or not held_out.any():
            raise DataError(
                "the split leaves nothing to train on or nothing to validate on: validation needs two classes of two "
                "images (or, for 'images', of four); add images, or hold out 'none'"
            )
        train, held = self.subset(~held_out), self.subset(held_out)
        _check_trainable(train, "training")
        _check_trainable(held, "validation")
        return train, held

    def _pick_classes(self, share: float, rng: np.random.Generator, again: Collection[str]) -> NDArray[np.bool_]:
        count = len(self.classes)
        known = [label for label, name in enumerate(self.classes) if name in set(again)]
        if len(known) >= 2:
            return np.isin(self.labels, known)
        if count < 4:
            raise DataError(
                f"holding out classes for validation needs at least 4 classes; got {count}. "
                "Hold out images (validation 'images'), or nothing ('none')"
            )
        several = np.flatnonzero(np.bincount(self.labels, minlength=count) >= 2)  # one image has nothing to be found
        number = min(max(2, round(share * count)), count - 2)
        return np.isin(self.labels, rng.permutation(several)[:number])

    def _pick_images(self, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
        held_out = np.zeros(len(self), dtype=np.bool_)
        for label in range(len(self.classes)):
            members = rng.permutation(np.flatnonzero(self.labels == label))
            if len(members) >= 4:  # two on either side at least: a lone image has no positive
                number = min(max(2, round(share * len(members))), len(members) - 2)
                held_out[members[:number]] = True
        return held_out

    @classmethod
    def _from_names(
        cls, images: Sequence[ImageSource], names: Sequence[str], is_validation: NDArray[np.bool_] | None = None
    ) -> "ImageDataset":
        classes, labels = np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)
        return cls(images, labels.astype(np.int64), tuple(classes.tolist()), is_validation)


class PixelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pixels and labels of an `ImageDataset`, fetched a whole batch at a time.

    Args:
        dataset: the images.
        preprocess: from images to pixels.
        workers: processes that decode the images that are read into memory.

    Raises:
        ImageError: for the first image that cannot be read, now if the pixels fit into memory, else when it is met.
    """

    def __init__(self, dataset: ImageDataset, preprocess: Preprocess, *, workers: int = 0) -> None:
        self.dataset = dataset
        self.preprocess = preprocess
        self.labels = torch.from_numpy(dataset.labels)
        self.cache: Tensor | None = None
        size = len(dataset) * preprocess.channels * preprocess.size[0] * preprocess.size[1]
        if size <= MAX_CACHE_BYTES:
            self.cache = self._read_all(workers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor] | ImageError:
        """Return (b, C, H, W) uint8 pixels and (b,) labels, or the error of an image that cannot be read."""
        where = torch.as_tensor(positions)
        if self.cache is not None:
            return self.cache[where], self.labels[where]
        try:
            pixels = np.stack([self.preprocess(self.dataset.images[i]) for i in positions])
        except ImageError as error:  # as a value: a worker process would wrap it in a traceback
            return error
        return torch.from_numpy(pixels), self.labels[where]

    def batches(self, sampler: Iterable[list[int]], *, workers: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield the batches that a sampler asks for.

        Raises:
            ImageError: for an image that cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=sampler,
            num_workers=0 if self.cache is not None else workers,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, ImageError):
                raise batch
            yield batch

    def in_order(self, batch_size: int, *, workers: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield all images once, in order."""
        positions = range(len(self))
        slices = [list(positions[start : start + batch_size]) for start in range(0, len(self), batch_size)]
        return self.batches(slices, workers=workers)

    def _read_all(self, workers: int) -> Tensor:
        height, width = self.preprocess.size
        cache = torch.empty((len(self), self.preprocess.channels, height, width), dtype=torch.uint8)
        done = 0
        for pixels, _ in self.in_order(256, workers=workers):
            cache[done : done + len(pixels)] = pixels
            done += len(pixels)
        return cache


class _LazyItems(Sequence[Any]):
    """The images of a data set whose items are (image, label) pairs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: Any) -> Any:
        return self._dataset[int(position)][0]


def _as_fetched(batch: Any) -> Any:
    return batch


def _check_trainable(dataset: ImageDataset, use: str) -> None:
    counts = np.bincount(dataset.labels)
    if len(counts) < 2:
        raise DataError(f"{use} needs at least 2 classes; got {len(counts)} ({', '.join(dataset.classes)})")
    if counts.max() < 2:
        raise DataError(f"{use} needs a class with at least 2 images; every class has one, so there are no pairs")


def _read_csv(path: Path) -> dict[str, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV table: {error}") from error
    _check_columns(path, header, len(rows))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{path}, row {number}: expected {len(header)} fields as in the header")
    return {name: [row[name].strip() for row in rows] for name in ("path", "label", "split") if name in header}


def _read_parquet(path: Path) -> dict[str, list[str]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet", "parquet") from error
    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet table: {error}") from error
    _check_columns(path, table.column_names, table.num_rows)
    wanted = [name for name in ("path", "label", "split") if name in table.column_names]
    return {name: ["" if v is None else str(v) for v in table.column(name).to_pylist()] for name in wanted}


def _check_columns(path: Path, header: Sequence[str], rows: int) -> None:
    missing = [name for name in ("path", "label") if name not in header]
    if missing:
        raise DataError(f"{path} lacks the column {missing[0]!r}; expected path,label[,split], got {','.join(header)}")
    twice = [name for name in ("path", "label", "split") if list(header).count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; which one counts?")
    if rows == 0:
        raise DataError(f"{path} has a header but no rows; expected one row an image")


def _read_split(path: Path, values: Sequence[str]) -> NDArray[np.bool_]:
    for row, value in enumerate(values, start=1):
        if value not in ("train", "val"):
            raise DataError(f"{path}, row {row}: split must be train or val; got {value!r}")
    return np.array([value == "val" for value in values], dtype=np.bool_)
