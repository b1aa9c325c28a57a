"""Pixels of an `ImageDataset`, fetched a whole batch at a time, and what becomes of images that cannot be read.

`PixelDataset` reads images through a `Preprocess`, once into memory where the pixels fit, so that small images are
decoded once and not every epoch. An image that cannot be read is set aside: it is left out of its batch, counted and
kept with its path and the reason, and it costs the other images nothing. More than a stated share stops the run.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitembed.errors import ConfigError, ImageError
from vitembed.images import ImageSource
from vitembed.preprocess import Preprocess
from vitembed.training.data.datasets import ImageDataset

MAX_CACHE_BYTES = 2 << 30  # pixels up to this size are kept in memory


class LabelledPixels(NamedTuple):
    """A batch of images.

    Attributes:
        pixels: (b, C, H, W) uint8.
        labels: (b,) int64, the class of each.
        positions: (b,) int64, where each stands in the data set.
    """

    pixels: Tensor
    labels: Tensor
    positions: Tensor


class _Fetched(NamedTuple):
    """What a worker process sends back: a batch, and the images (position, error) that are missing from it."""

    batch: LabelledPixels
    errors: list[tuple[int, ImageError]]


class PixelDataset(Dataset[_Fetched]):
    """Pixels and labels of an `ImageDataset`.

    Args:
        dataset: the images.
        preprocess: from images to pixels.
        workers: processes that decode the images that are read into memory.
        max_unreadable: share of the images, in [0, 1], that may be set aside because they cannot be read; 0 stops at
            the first.

    Attributes:
        unreadable: why each image that was set aside so far cannot be read, by its path; an image that is no file goes
            by its position, as "image 3". Known at once where the pixels fit into memory, else as they are met.
        labels: (N,) int64, the class of each image, read or not.
        cache: (N, C, H, W) uint8, the pixels in memory, undefined for what cannot be read; None where they do not fit.

    Raises:
        ConfigError: if `max_unreadable` is out of range.
        ImageError: if too many images cannot be read.
    """

    def __init__(
        self, dataset: ImageDataset, preprocess: Preprocess, *, workers: int = 0, max_unreadable: float = 0.01
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ConfigError(f"max_unreadable is a share of the images and must lie in [0, 1]; got {max_unreadable}")
        self.dataset = dataset
        self.preprocess = preprocess
        self.max_unreadable = max_unreadable
        self.unreadable: dict[str, str] = {}
        self.labels = torch.from_numpy(dataset.labels)
        self.cache: Tensor | None = None
        self._is_readable = torch.ones(len(dataset), dtype=torch.bool)  # as far as is known
        shape = (len(dataset), preprocess.channels, *preprocess.size)
        if np.prod(shape, dtype=np.int64) <= MAX_CACHE_BYTES:
            cache = torch.empty(shape, dtype=torch.uint8)
            for pixels, _, positions in self.in_order(256, workers=workers):
                cache[positions] = pixels
            self.cache = cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: list[int]) -> _Fetched:
        """Fetch the images at some positions but for those that cannot be read."""
        where = torch.as_tensor(positions, dtype=torch.int64)
        where = where[self._is_readable[where]]
        if self.cache is not None:
            return _Fetched(LabelledPixels(self.cache[where], self.labels[where], where), [])
        fetched = [(position, self._fetch(position)) for position in where.tolist()]
        errors = [(position, error) for position, error in fetched if isinstance(error, ImageError)]
        read = [(position, array) for position, array in fetched if not isinstance(array, ImageError)]
        where = torch.as_tensor([position for position, _ in read], dtype=torch.int64)
        pixels = torch.from_numpy(np.stack([array for _, array in read])) if read else torch.empty(0, dtype=torch.uint8)
        return _Fetched(LabelledPixels(pixels, self.labels[where], where), errors)

    def batches(self, sampler: Iterable[list[int]], *, workers: int = 0) -> Iterator[LabelledPixels]:
        """Yield the batches that a sampler asks for, without the images that cannot be read.

        Pixels, labels and positions always belong together. A batch of which no image can be read is empty, so that
        there are as many batches as the sampler has, and its places can be counted.

        Args:
            sampler: lists of positions.
            workers: processes that decode, for pixels that are not in memory.

        Raises:
            ImageError: if too many images cannot be read: more than `max_unreadable` of the data set.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=sampler,
            num_workers=0 if self.cache is not None else workers,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each loader would draw a seed for its workers from torch's own
        )
        for batch, errors in loader:
            for position, error in errors:
                self._set_aside(position, error)
            yield batch

    def in_order(self, batch_size: int, *, workers: int = 0) -> Iterator[LabelledPixels]:
        """Yield all images that can be read once, in order."""
        positions = range(len(self))
        slices = [list(positions[start : start + batch_size]) for start in range(0, len(self), batch_size)]
        return (batch for batch in self.batches(slices, workers=workers) if len(batch.positions))

    def _fetch(self, position: int) -> NDArray[np.uint8] | ImageError:
        """Return the pixels of an image, or, as a value, why it cannot be read: the others of its batch go on."""
        source: ImageSource | None = None
        try:
            source = self.dataset.images[position]
            return self.preprocess(source)
        except ImageError as error:
            if isinstance(source, str | os.PathLike | None):
                return error
            return ImageError(f"image {position}", f"{error.source} {error.reason}")

    def _set_aside(self, position: int, error: ImageError) -> None:
        """Take down an image that cannot be read, in the main process, and stop if there are too many."""
        self._is_readable[position] = False
        self.unreadable.setdefault(error.source, " ".join(error.reason.split()))  # others' errors may have lines
        count, allowed = len(self.unreadable), int(self.max_unreadable * len(self) + 1e-6)  # 0.29 * 100 is 28.999...
        if count > allowed:
            first, reason = next(iter(self.unreadable.items()))
            raise ImageError(
                first,
                f"{reason}; {count} of the {len(self)} images here (training and validation count apart) cannot be "
                f"read, this one first, and at most {allowed} (a share of {self.max_unreadable:g}) may be left out: "
                "repair or remove them, or raise max_unreadable",
            )


def _as_fetched(batch: Any) -> Any:
    return batch
