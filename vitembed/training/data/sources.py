"""What somebody types as data becomes an `ImageDataset`, whatever kind of data it is."""

import os
from pathlib import Path

from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.huggingface import from_huggingface, is_saved_dataset
from vitembed.training.data.shards import from_shards, is_shards

HUB = "hf:"  # goes before the name of a data set of the Hugging Face hub


def load_source(source: str | os.PathLike[str]) -> ImageDataset:
    """Read labelled images from a folder, a table, tar shards or a Hugging Face data set.

    Args:
        source: a folder of classes, a .csv or .parquet table (see `ImageDataset.load`); tar shards such as
            "shards/train-{000..012}.tar" (`from_shards`); a folder written by `save_to_disk` of `datasets`, or
            "hf:user/name" of the hub (`from_huggingface`).

    Raises:
        DataError: if there is no such data, or it cannot be used.
        MissingExtraError: if its kind needs a package that is not installed.
    """
    text = os.fspath(source)
    if text.startswith(HUB):
        return from_huggingface(text.removeprefix(HUB))
    if is_saved_dataset(Path(text)):
        return from_huggingface(Path(text))
    return from_shards(text) if is_shards(text) else ImageDataset.load(text)
