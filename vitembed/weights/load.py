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
from vitembed.weights.shapes import to_ours
from vitembed.weights.sources import Source, describe_torchvision, resolve, torchvision_state
from vitembed.weights.store import is_ours, load_weights
from vitembed.weights.tensors import read_tensors, weights_in


def load_checkpoint(
    name: str | os.PathLike[str], *, heads: int | None = None, image_size: int | tuple[int, int] | None = None
) -> Checkpoint:
    """Read a ViT's weights, whoever made them, with all that must travel along.

    Families: torchvision's ViT; timm's ViT, AugReg, DeiT (distilled or not), DeiT III, DINO, DINOv2, CLIP; the original
    files of DINO, DINOv2, DeiT and CLIP; transformers' ViT, DeiT, DINOv2 with and without registers, CLIP; our own.

    Args:
        name: a folder, a file, "torchvision:vit_b_16", "timm:NAME.TAG", a hub id; see `vitembed.weights.resolve`.
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
    if source.path is not None and _own_file(source.path).is_file() and is_ours(_own_file(source.path)):
        return _own(source, _own_file(source.path))
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
        if not isinstance(heads, int) or heads < 1:
            raise ConfigError(f"heads must be a whole number of at least 1; got {heads!r}")
        if described.heads not in (None, heads):
            raise ConfigError(f"{source} says that it has {described.heads} heads; got heads={heads}")
        described = dataclasses.replace(described, heads=heads)
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
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


def _own_file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _own(source: Source, file: Path) -> Checkpoint:
    """Read what `save_pretrained` wrote."""
    state, header = load_weights(file)
    try:
        if header["vit"] is None:
            raise CheckpointError(f"{file} holds another network than a ViT of ours; load it with Embedder")
        config = ViTConfig.from_dict(header["vit"])
        preprocess = Preprocess.from_dict(header["preprocess"])
        pooling, dim = header["pooling"], header["dim"]
    except KeyError as error:
        raise CheckpointError(f"{file} is damaged: its description lacks {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{file} describes no model that this version knows: {error}") from error
    projection = state.pop("projection.weight", None)
    if dim is not None and projection is None and not config.num_classes and "head.weight" in state:
        projection = state.pop("head.weight")  # timm keeps a projection as a head whose bias is zero
        state.pop("head.bias", None)
    return Checkpoint(config, state, projection, preprocess, pooling, source.name, family="vitembed", notes=())
