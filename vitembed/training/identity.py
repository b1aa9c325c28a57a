"""What must be the same for a training to go on: settings, loss, network, data.

It is recorded in every checkpoint as JSON types, so that a difference can be named.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from vitembed.embedder import Embedder
from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import CheckpointError
from vitembed.training.config import TrainConfig
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.rotations import TurnedImages
from vitembed.training.distributed import world_size
from vitembed.training.learner import Loss, Miner
from vitembed.training.losses.specs import describe
from vitembed.training.provenance import initialised_from
from vitembed.vit import ViT

# Settings that change what a run costs or when it is saved, but not what it learns.
_WITHOUT_CONSEQUENCE = ("safeguards", "workers")


def identity(
    model: Embedder, dataset: ImageDataset, loss: Loss, miner: Miner | None, config: TrainConfig
) -> dict[str, Any]:
    """Describe a training as far as it decides on the weights."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _WITHOUT_CONSEQUENCE}
    described = {
        **settings,
        "loss": describe(loss),
        "miner": None if miner is None else describe(miner),
        "network": _network(model.network),
        "initial weights": initialised_from(model),
        "pre-processing": dataclasses.asdict(model.preprocess),
        "processes": world_size(),
        **_data(dataset),
    }
    return _as_json(described)


def check_resumable(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a training of another kind.

    Args:
        before: what `identity` gave when the checkpoint was written.
        now: what it gives now.
        where: the folder, for the error.

    Raises:
        CheckpointError: naming the first difference.
    """
    defaults = _as_json(dataclasses.asdict(TrainConfig()))
    for name in [*now, *before]:
        old, new = before.get(name, defaults.get(name)), now.get(name)  # a setting that is newer had its default
        if old != new:
            old, new = _shortest_difference(old, new)
            raise CheckpointError(
                f"{where} holds a training with {name} {old}, and now it is {new}: resume with the same settings and "
                "data, or train into another folder"
            )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they come back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _network(network: EmbeddingNet) -> dict[str, Any]:
    backbone = network.backbone
    described = dataclasses.asdict(backbone.config) if isinstance(backbone, ViT) else backbone.describe()
    return {**described, "pooling": network.pooling, "dim": network.dim}


def _data(dataset: ImageDataset) -> dict[str, Any]:
    """Describe images by their number, their names where they have any, and their labels."""
    names = hashlib.sha256("\0".join(_names(dataset)).encode("utf-8", "surrogateescape"))
    labels = hashlib.sha256(dataset.labels.tobytes() + "\0".join(dataset.classes).encode())
    return {
        "number of images": len(dataset),
        "labels (as a hash)": labels.hexdigest()[:16],
        "image files (as a hash of their names)": names.hexdigest()[:16],
    }


def _names(dataset: ImageDataset) -> list[str]:
    """Return the names of image files below the folder that all of them share: data may move, or be typed otherwise."""
    images = dataset.images.sources if isinstance(dataset.images, TurnedImages) else dataset.images
    if not isinstance(images, list):
        return []
    files = [image for image in images if isinstance(image, str | os.PathLike)]
    paths = [os.path.abspath(file) for file in files]  # noqa: PTH100 - links stay as they are typed
    shared = len(os.path.commonpath(paths)) if paths else 0
    return [path[shared:] for path in paths]


def _shortest_difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return what differs of two values, the inner parts of mappings alone."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [name for name in [*new, *old] if old.get(name) != new.get(name)]
        return {names[0]: old.get(names[0])}, {names[0]: new.get(names[0])}
    return old, new
