"""Images to batches of pixels, read and resized by threads while the network computes.

Threads, because Pillow decodes and resizes without Python's lock: processes would have to be started, and would copy
every pixel over.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitembed.errors import ConfigError, ImageError
from vitembed.images import ImageSource
from vitembed.preprocess import Preprocess

_Task = Callable[[], NDArray[np.uint8] | ImageError]
_AHEAD = 2  # batches that are read before they are asked for

PixelBatch = tuple[Tensor, list[tuple[int, ImageError]]]  # see `pixel_batches`


def as_sequence(images: Iterable[ImageSource] | ImageSource) -> Sequence[ImageSource]:
    """Make a sequence of anything: one image, an array (N, H, W, C), an array of paths, a list, a generator."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        is_sequence = images.ndim == 4 or (images.ndim == 1 and images.dtype.kind in "UO")
        return images.tolist() if images.ndim == 1 and is_sequence else list(images) if is_sequence else [images]
    given: object = images
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"expected images: paths, PIL images or arrays; got {type(given).__name__}")
    return images if isinstance(images, Sequence) else list(images)


def pixel_batches(
    images: Sequence[ImageSource], preprocess: Preprocess, *, batch_size: int, workers: int | None, pin: bool
) -> Iterator[PixelBatch]:
    """Return batches, in order, of (b, C, H, W) uint8 pixels and of the images that could not be read.

    The latter are (offset in the batch, error). Two batches are read ahead, no more.

    Args:
        images: paths, PIL images or arrays.
        preprocess: makes pixels of them.
        batch_size: images in a batch.
        workers: threads that read and resize; None takes one a core for paths and none for what is in memory.
        pin: put the pixels into page-locked memory, from which a GPU copies faster.

    Raises:
        ConfigError: if `batch_size` is below 1 or `workers` below 0.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise ConfigError(f"workers must be a whole number, not negative; got {workers!r}")
    if workers is None:
        in_files = len(images) > 1 and isinstance(images[0], str | os.PathLike)
        workers = default_workers() if in_files else 0
    return _batches(images, preprocess, batch_size, workers, pin)


def _batches(
    images: Sequence[ImageSource], preprocess: Preprocess, batch_size: int, workers: int, pin: bool
) -> Iterator[PixelBatch]:
    ranges = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    if workers == 0:
        for positions in ranges:
            yield _collate([_read(images[position], preprocess) for position in positions], pin)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vitembed-decode")
    pending: deque[list[_Task]] = deque()
    try:
        for positions in ranges:
            pending.append([_task(pool, images[position], preprocess) for position in positions])
            if len(pending) > _AHEAD:
                yield _collate([task() for task in pending.popleft()], pin)
        while pending:
            yield _collate([task() for task in pending.popleft()], pin)
    finally:  # also when nobody wants the rest
        pool.shutdown(wait=True, cancel_futures=True)


def _task(pool: ThreadPoolExecutor, image: ImageSource, preprocess: Preprocess) -> _Task:
    """Return what waits for an image's pixels.

    A PIL image may be opened lazily and stand at several places: two threads must not decode it at once, so that it is
    read by the caller's.
    """
    if isinstance(image, Image.Image):
        return partial(_read, image, preprocess)
    return pool.submit(_read, image, preprocess).result


def _read(image: ImageSource, preprocess: Preprocess) -> NDArray[np.uint8] | ImageError:
    """Return the pixels of an image, or, as a value, why it cannot be read: the others of its batch go on."""
    try:
        return preprocess(image)
    except ImageError as error:
        return error


def _collate(items: list[NDArray[np.uint8] | ImageError], pin: bool) -> PixelBatch:
    errors = [(offset, item) for offset, item in enumerate(items) if isinstance(item, ImageError)]
    arrays = [item for item in items if not isinstance(item, ImageError)]
    pixels = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty((0,), dtype=torch.uint8)
    return (pixels.pin_memory() if pin else pixels), errors


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return how many threads or processes decode images unless told otherwise: one a core, 8 at most."""
    return min(8, available_cores())
