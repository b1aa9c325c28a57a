"""Labelled images to train on: where they come from, and which classes are held out.

`ImageDataset` is a plain value (sources, labels, names of classes, an optional split) that every kind of input is
turned into; `vitembed.training.data.pixels` reads it.

A skilled forgery imitates a class without belonging to it. It is a class of its own, of one image, so that no loss ever
takes it for a positive of anything, of another forgery of the same writer either; `forgery_of` says whom it imitates.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitembed.errors import ConfigError, DataError, ImageError, unknown_name
from vitembed.images import ImageSource, list_images
from vitembed.layouts import Names, names_of_folders, names_of_signatures
from vitembed.training.data.labels import category_of, name_numbers, names_of_labels
from vitembed.training.data.lazy import LazyImages
from vitembed.training.data.rotations import TurnedImages
from vitembed.training.data.splits import leaked_classes, of_classes, pick_classes, pick_images
from vitembed.training.data.tables import read_table

Validation = Literal["classes", "images", "none"]
VALIDATIONS = ("classes", "images", "none")


@dataclass(frozen=True)
class ImageDataset:
    """Images with a class each.

    Attributes:
        images: paths, PIL images or arrays, N of them.
        labels: (N,) int64, indices into `classes`.
        classes: the names of the classes; images of one class are positives of each other.
        is_validation: (N,) bool, the images that the data itself sets apart for validation; None if it does not say.
        forgery_of: (N,) int64, the class that an image imitates, -1 for a genuine image; None if all are genuine.

    Raises:
        DataError: if the lengths do not fit, a label names no class, or a forgery is not alone in its class.
    """

    images: Sequence[ImageSource]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    is_validation: NDArray[np.bool_] | None = field(default=None)
    forgery_of: NDArray[np.int64] | None = field(default=None)

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
        if self.forgery_of is not None:
            self._check_forgeries(self.forgery_of)
            if self.forgery_of.max() < 0:
                object.__setattr__(self, "forgery_of", None)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identities(self) -> tuple[str, ...]:
        """The names of the classes of genuine images."""
        return tuple(self.classes[label] for label in np.unique(self.labels[self._writers < 0]))

    @property
    def categories(self) -> NDArray[np.int64]:
        """(N,) int64, the category of each image's class: what its name has before the last slash.

        `greek/alpha` and `greek/beta` are of one category; `greek/alpha@90`, which `with_rotations` makes, is of
        another, with all that is Greek and turned alike.
        """
        names = [category_of(name) for name in self.classes]
        numbers = np.unique(names, return_inverse=True)[1]
        return np.asarray(numbers[self.labels], dtype=np.int64)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "ImageDataset":
        """Read a folder of classes, or a .csv or .parquet table; see `from_folder` and `from_table`.

        Raises:
            DataError: if the path does not exist or is of another kind.
        """
        path = Path(source)
        try:
            is_folder = path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise DataError(f"{os.fspath(source)[:60]}... cannot be opened: {error.strerror}") from error
        if is_folder:
            return cls.from_folder(path)
        if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
            return cls.from_table(path)
        found = "is no folder and no .csv or .parquet table" if path.exists() else "does not exist"
        raise DataError(f"{path} {found}; expected a folder with one subfolder a class, or a table of path,label")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "ImageDataset":
        """Read `folder/class/image.jpg`: the class of an image is the folder that holds it.

        Folders may be nested: `letters/greek/alpha/01.png` is of the class `greek/alpha` of `letters`. Where every
        image is a signature in a layout of `from_signatures`, the folder is read by that.

        Raises:
            DataError: if there are no images, images that lie in no class, or a writer's genuine and forged images
                beside others: as a class, the forgeries would be positives of each other.
        """
        root = Path(folder)
        paths = list_images(root)
        return cls._named(paths, names_of_folders(root, paths))

    @classmethod
    def from_signatures(cls, folder: str | os.PathLike[str]) -> "ImageDataset":
        """Read `folder/WRITER/genuine/image.png` and `folder/WRITER/forged/image.png`, others imitating the writer.

        The classes are `WRITER`, and `WRITER/forged/image.png` for each forgery. The layout of CEDAR (Kalera, Srihari
        and Xu 2004) is read as well: `folder/full_org/original_7_1.png` and `folder/full_forg/forgeries_7_1.png` are of
        the writer `7`.

        Raises:
            DataError: if there are no images, images that lie elsewhere, forgeries of a writer without genuine ones, or
                a writer in both layouts.
        """
        root = Path(folder)
        paths = list_images(root)
        return cls._named(paths, names_of_signatures(root, paths))

    @classmethod
    def from_table(cls, table: str | os.PathLike[str]) -> "ImageDataset":
        """Read a .csv or .parquet table with the columns path and label, and, if you like, split and forgery_of.

        split is train or val. forgery_of is the label that a skilled forgery imitates, and empty for other images; the
        label of a forgery is not read, for it is a class of its own. Relative paths start at the table's folder.

        Raises:
            DataError: naming the column, the row and the file that is missing.
            MissingExtraError: for Parquet without pyarrow.
        """
        rows = read_table(table)
        return cls._named(rows.images, rows.names, rows.is_validation)

    @classmethod
    def from_arrays(
        cls,
        images: Sequence[ImageSource],
        labels: Iterable[object],
        *,
        is_validation: Iterable[bool] | None = None,
        forgery_of: Iterable[object] | None = None,
    ) -> "ImageDataset":
        """Take images with one label each (strings or numbers).

        Args:
            images: paths, PIL images or arrays.
            labels: one an image, all of one type: 1 and "1" are not known to be one class, nor to be two.
            is_validation: which images are for validation; None if the data does not say.
            forgery_of: the label that a skilled forgery imitates, None for other images. The label of a forgery is not
                read, for it is a class of its own.

        Raises:
            DataError: if a label is missing (None or NaN), labels are of several types, or the lengths do not fit.
        """
        split = None if is_validation is None else np.fromiter(is_validation, dtype=np.bool_)
        return cls._named(images, names_of_labels(labels, forgery_of), split)

    @classmethod
    def from_torchvision(cls, dataset: Any) -> "ImageDataset":
        """Take a torchvision data set, or anything with a length and items of (image, label); they are fetched lazily.

        Leave its own `transform` unset: pre-processing belongs to the model. The labels are read from its `targets` or
        `labels` where it has them, and from its items otherwise.

        Raises:
            DataError: if the items are no pairs, or one has no label: -1 beside named classes.
        """
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is None:
            try:
                labels = [label for _, label in (dataset[i] for i in range(len(dataset)))]
            except (OSError, TypeError, ValueError) as error:
                raise DataError(f"expected a data set whose items are (image, label) pairs: {error}") from error
        names = getattr(dataset, "classes", None)
        return cls.from_arrays(_LazyItems(dataset), name_numbers(labels, names if isinstance(names, Sequence) else []))

    def subset(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "ImageDataset":
        """Return the chosen images, with classes left out that have none and that none of them imitates."""
        positions = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        labels = self.labels[positions]
        writers = self._writers[positions]
        kept = np.union1d(labels, writers[writers >= 0])
        if isinstance(self.images, LazyImages):
            images: Sequence[ImageSource] = self.images.take(positions.tolist())
        else:
            images = [self.images[i] for i in positions]
        return ImageDataset(
            images=images,
            labels=np.searchsorted(kept, labels).astype(np.int64),
            classes=tuple(self.classes[label] for label in kept),
            forgery_of=np.where(writers >= 0, np.searchsorted(kept, writers), -1).astype(np.int64),
        )

    def with_classes(self, names: Iterable[str]) -> "ImageDataset | None":
        """Return the images of the named classes, with the forgeries of them; None if there are none."""
        chosen = of_classes(self.labels, self._writers, self._numbers(names))
        return self.subset(chosen) if chosen.any() else None

    def with_rotations(self) -> "ImageDataset":
        """Return the images and, as further classes, the same turned by 90, 180 and 270 degrees.

        Four times as many classes to tell apart, as in the few-shot protocols of Omniglot (Santoro et al. 2016,
        arXiv:1605.06065, section 4.1; Vinyals et al. 2016, arXiv:1606.04080, section 4.1.1). A class named `a` becomes
        `a`, `a@90`, `a@180` and `a@270`, counter-clockwise; a forgery imitates the writer who is turned as it is.
        Hold classes out before, not after, or turned images of them are trained on.

        Raises:
            DataError: if they are turned already: a class turned by 360 degrees would be told from itself.
        """
        if isinstance(self.images, TurnedImages):
            raise DataError("these images have been turned already; call with_rotations once")
        count, classes = len(self), len(self.classes)
        turn = np.arange(4).repeat(count)
        labels, writers = np.tile(self.labels, 4), np.tile(self._writers, 4)
        return ImageDataset(
            images=TurnedImages(self.images, [(position, 90 * by) for by in range(4) for position in range(count)]),
            labels=labels + classes * turn,
            classes=tuple(f"{name}@{90 * by}" if by else name for by in range(4) for name in self.classes),
            is_validation=None if self.is_validation is None else np.tile(self.is_validation, 4),
            forgery_of=np.where(writers >= 0, writers + classes * turn, -1),
        )

    def split(
        self, validation: Validation, *, share: float, seed: int, again: Collection[str] = ()
    ) -> "tuple[ImageDataset, ImageDataset | None]":
        """Return what to train on and what to validate on.

        Forgeries in the held-out part are distractors for `recall_at_k`: a query may find one instead of an image of
        its class, and being alone in their classes they are no queries themselves.

        Args:
            validation: "classes" holds out whole classes, so that the figure is about classes never seen (the default
                where embeddings are used), each with its forgeries; "images" holds out images of every class;
                "none" holds out nothing. A split that the data itself names goes before this.
            share: of the classes or images to hold out, in (0, 1).
            seed: which ones.
            again: classes that an earlier training of the same weights held out: with "classes" they are held out
                again, in place of random ones, where the data has two of them.

        Raises:
            ConfigError: if a setting is unknown or out of range.
            DataError: if too little is left on either side: both need two classes, and a class with two images; or
                the data's own split trains on forgeries of a class that it holds out.
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
            held_out = self._pick(validation, share, np.random.default_rng(seed), again)
        if held_out.all() or not held_out.any():
            raise DataError(
                "the split leaves nothing to train on or nothing to validate on: validation needs two classes of two "
                "images (or, for 'images', of four); add images, or hold out 'none'"
            )
        leaks = leaked_classes(self.labels, self._writers, held_out)
        if len(leaks):
            raise DataError(
                f"{self.classes[leaks[0]]!r} is held out for validation, but forgeries of it are for training; "
                "hold them out, too"
            )
        train, held = self.subset(~held_out), self.subset(held_out)
        _check_trainable(train, "training")
        _check_trainable(held, "validation")
        return train, held

    def _pick(
        self, validation: Validation, share: float, rng: np.random.Generator, again: Collection[str]
    ) -> NDArray[np.bool_]:
        if validation == "images":
            return pick_images(self.labels, self._writers, share, rng)
        known = self._numbers(set(again) & set(self.identities))
        if len(known) >= 2:
            return of_classes(self.labels, self._writers, known)
        return pick_classes(self.labels, self._writers, share, rng)

    @property
    def _writers(self) -> NDArray[np.int64]:
        """(N,) `forgery_of`, also where there are no forgeries."""
        return np.full_like(self.labels, -1) if self.forgery_of is None else self.forgery_of

    def _numbers(self, names: Iterable[str]) -> list[int]:
        """Return the labels of the named classes; unknown names have none."""
        wanted = set(names)
        return [label for label, name in enumerate(self.classes) if name in wanted]

    def _check_forgeries(self, writers: NDArray[np.int64]) -> None:
        if writers.shape != self.labels.shape:
            raise DataError(f"expected forgery_of for each of the {len(self)} images; got {writers.shape}")
        if writers.min() < -1 or writers.max() >= len(self.classes):
            raise DataError(f"forgery_of must lie in [-1, {len(self.classes)}), a class or -1 for none")
        forged = self.labels[writers >= 0]
        shared = forged[np.bincount(self.labels)[forged] > 1]
        if len(shared):
            raise DataError(
                f"{self.classes[shared[0]]!r} holds a forgery and another image, which would be its positive; "
                "each forgery is a class of its own: list it once"
            )
        second_hand = np.intersect1d(writers, forged)
        if len(second_hand):
            raise DataError(f"forgery_of must name a class of genuine images; {self.classes[second_hand[0]]!r} is none")

    @classmethod
    def _named(
        cls, images: Sequence[ImageSource], names: Names, is_validation: NDArray[np.bool_] | None = None
    ) -> "ImageDataset":
        classes = tuple(sorted(set(names.classes)))
        numbers = {name: label for label, name in enumerate(classes)}
        labels = np.fromiter((numbers[name] for name in names.classes), dtype=np.int64, count=len(names.classes))
        writers = np.full(len(labels), -1)
        for position, writer in enumerate(names.forgery_of):
            if writer is not None and writer not in numbers:
                raise DataError(
                    f"{names.classes[position]} imitates {writer!r}, but no genuine image is of this class; "
                    "add some, or take the forgery out"
                )
            writers[position] = -1 if writer is None else numbers[writer]
        return cls(images, labels, classes, is_validation, writers)


class _LazyItems(LazyImages):
    """The images of a data set whose items are (image, label) pairs, or some of them."""

    def __init__(self, dataset: Any, positions: Sequence[int] | None = None) -> None:
        self._dataset = dataset
        self._positions = range(len(dataset)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: Any) -> Any:
        number = self._positions[position]
        try:
            return self._dataset[number][0]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise ImageError(f"item {number} of the data set", f"cannot be read: {error}") from error

    def take(self, positions: Sequence[int]) -> "_LazyItems":
        """Return the images at some positions, without fetching them."""
        return _LazyItems(self._dataset, [self._positions[i] for i in positions])


def _check_trainable(dataset: ImageDataset, use: str) -> None:
    counts = np.bincount(dataset.labels)
    if np.count_nonzero(counts) < 2:
        raise DataError(f"{use} needs at least 2 classes; got 1 ({dataset.classes[dataset.labels[0]]})")
    if counts.max() < 2:
        raise DataError(
            f"{use} needs a class with at least 2 images; each of the {np.count_nonzero(counts)} classes has one, so "
            "there are no pairs: add images, or check that the labels name classes and not images"
        )
