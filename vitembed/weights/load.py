"""`load_checkpoint`: any name to a `Checkpoint`, by way of its configuration, its tensors and the tables of names."""

import dataclasses
import os
from pathlib import Path

from torch import Tensor

from vitembed.architecture import ViTConfig
from vitembed.errors import CheckpointError, ConfigError
from vitembed.preprocess import Preprocess
from vitembed.weights.checkpoint import Checkpoint, Described
from vitembed.weights.configs import describe_folder
from vitembed.weights.names import to_timm
from vitembed.weights.processing import refusing_nonsense
from vitembed.weights.shapes import to_ours
from vitembed.weights.sources import Source, describe_torchvision, resolve, torchvision_state
from vitembed.weights.store import (
    BACKBONE,
    PROJECTION,
    WEIGHTS,
    fingerprint,
    is_ours,
    is_saved_model,
    read_saved_model,
    split_projection,
)
from vitembed.weights.tensors import read_tensors, weights_in


def load_checkpoint(
    name: str | os.PathLike[str], *, heads: int | None = None, image_size: int | tuple[int, int] | None = None
) -> Checkpoint:
    """Read a ViT's weights, whoever made them, with all that must travel along.

    Families: torchvision's ViT; timm's ViT, AugReg, DeiT (distilled or not), DeiT III, DINO, DINOv2, CLIP; the original
    files of DINO, DINOv2 and DeiT; a CLIP state dict with OpenAI's names (the files that OpenAI publishes are programs,
    which are not run); transformers' ViT, DeiT, DINOv2 with and without registers, CLIP; our own.

    Args:
        name: a folder, a file, "torchvision:vit_b_16", "timm:NAME.TAG", a hub id; see
            `vitembed.weights.sources.resolve`.
        heads: attention heads, for weights whose configuration does not say it; None goes by the width, see
            `vitembed.weights.shapes.heads_of`.
        image_size: side or (height, width) that the position embeddings are for, likewise; None takes them as those of
            a square. To change the image size, use `ViT.resized`.

    Raises:
        CheckpointError: if there is nothing under that name, if it is damaged, would run code, or is no ViT that ours
            can express.
        ConfigError: if `heads` or `image_size` is out of range, or contradicts the checkpoint's own configuration.
    """
    source = resolve(name)
    if source.path is not None and (is_saved_model if source.path.is_dir() else is_ours)(source.path):
        own = _own(source, source.path)
        _with_arguments(Described(own.config.heads, own.config.image_size), heads, image_size, source.name)
        return own
    described, state, notes = _read(source)
    described = _with_arguments(described, heads, image_size, source.name)
    named = to_timm(state, source.name)
    config, named = to_ours(dataclasses.replace(named, notes=(*notes, *named.notes)), described, source.name)
    notes = list(named.notes)
    preprocess = described.preprocess
    if preprocess is None:
        preprocess = _default_preprocess(config, notes)
    elif preprocess.channels != config.channels:
        raise CheckpointError(
            f"{source.name} contradicts itself: its pre-processing gives {preprocess.channels} channels, "
            f"its patches take {config.channels}"
        )
    elif preprocess.size != config.image_size:
        notes.append(f"the positions are for {config.image_size} pixels, the pre-processing gives {preprocess.size}")
    return Checkpoint(
        config=config,
        state=named.state,
        projection=named.projection,
        preprocess=preprocess,
        pooling=described.pooling,
        source=source.name,
        family=named.family.name,
        revision=source.revision,
        licence=described.licence,
        notes=tuple(notes),
    )


def saved_model_at(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a model that `Embedder.save_pretrained` saved; None where the name is of somebody else's.

    Args:
        name: as for `load_checkpoint`; a model of ours may lie on the hub, too.

    Raises:
        CheckpointError: if there is nothing under that name.
    """
    path = resolve(name).path
    if path is not None and path.name == WEIGHTS:
        path = path.parent
    return path if path is not None and path.is_dir() and is_saved_model(path) else None


def _read(source: Source) -> tuple[Described, dict[str, Tensor], list[str]]:
    """Read the configuration, if there is one, and the tensors."""
    if source.path is None:
        return describe_torchvision(source), dict(torchvision_state(source)), []
    if source.path.is_dir():
        described = describe_folder(source.path)
        return described, *read_tensors(weights_in(source.path))
    return Described(), *read_tensors(source.path)


def _with_arguments(
    described: Described, heads: int | None, image_size: int | tuple[int, int] | None, source: str
) -> Described:
    """Add what the caller knows of a checkpoint that does not say it itself."""
    if heads is not None:
        if type(heads) is not int or heads < 1:
            raise ConfigError(f"heads must be a whole number of at least 1; got {heads!r}")
        if described.heads not in (None, heads):
            raise ConfigError(f"{source} says that it has {described.heads} heads; got heads={heads}")
        described = dataclasses.replace(described, heads=heads)
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not isinstance(size, tuple) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
            raise ConfigError(
                f"image_size must be a whole number above 0, or (height, width) of such; got {image_size!r}"
            )
        if described.image_size not in (None, size):
            raise ConfigError(
                f"{source} says that its positions are for {described.image_size} pixels; got image_size={size}. "
                "To change the size of a network, use its resized()"
            )
        described = dataclasses.replace(described, image_size=size)
    return described


def _default_preprocess(config: ViTConfig, notes: list[str]) -> Preprocess | None:
    """Return ImageNet's usual pre-processing for weights that come without any, and say so."""
    if config.channels != 3:
        notes.append(f"no pre-processing: the weights take {config.channels} channel(s) and say nothing of their range")
        return None
    notes.append("the weights come without pre-processing: ImageNet's mean and deviation and a crop were assumed")
    return Preprocess(config.image_size)


def _own(source: Source, path: Path) -> Checkpoint:
    """Read what `save_pretrained` wrote, as strictly as `vitembed.saved_model.load` does."""
    state, header = read_saved_model(path)
    if header["vit"] is None:
        raise CheckpointError(f"{path} holds another network than a ViT of ours; load it with Embedder")
    try:
        with refusing_nonsense(str(path)):
            config = ViTConfig.from_dict(header["vit"])
            preprocess = Preprocess.from_dict(header["preprocess"])
    except ConfigError as error:
        raise CheckpointError(f"{path} describes no model that this version knows: {error}") from error
    pooling, dim = header["pooling"], header["dim"]
    if pooling not in ("cls", "mean"):
        raise CheckpointError(f"{path} is damaged: its pooling must be 'cls' or 'mean'; got {pooling!r}")
    if dim is not None and (type(dim) is not int or dim < 1):
        raise CheckpointError(f"{path} is damaged: its dim must be null or a whole number above 0; got {dim!r}")
    # A stem counts its batches in whole numbers.
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    state, projection = split_projection(state, projects=dim is not None, has_head=config.num_classes > 0)
    if dim is not None and (projection is None or tuple(projection.shape) != (dim, config.width)):
        got = "none" if projection is None else tuple(projection.shape)
        raise CheckpointError(f"{path} is damaged: expected a projection {(dim, config.width)}; got {got}")
    # The names and values that `vitembed.saved_model.fingerprint` takes of the network.
    named = {BACKBONE + name: tensor for name, tensor in state.items()}
    named |= {} if projection is None else {PROJECTION: projection}
    described = {"vit": config.to_dict(), "backbone": None, "pooling": pooling, "dim": dim}
    if fingerprint(named, {**described, "preprocess": preprocess.to_dict()}) != header["fingerprint"]:
        raise CheckpointError(f"{path} is damaged: its weights do not have the fingerprint recorded with them")
    return Checkpoint(config, state, projection, preprocess, pooling, source.name, family="vitembed", notes=())
