"""The folder of a saved embedder: model.safetensors, config.json and README.md.

The weights' file is complete by itself: the configuration travels in its header, so that weights and description cannot
drift apart; config.json is the readable copy. The names of the tensors are timm's, with a projection as the head (as
timm has it for CLIP), so that timm loads the same file; see `vitembed.weights.timm_arguments`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitembed import weights
from vitembed.embedding_net import EmbeddingNet, ForeignBackbone
from vitembed.errors import CheckpointError, ConfigError, VitembedError
from vitembed.files import atomic_write
from vitembed.model_card import model_card
from vitembed.preprocess import Preprocess
from vitembed.vit import ViT, ViTConfig
from vitembed.weights.store import BACKBONE, FORMAT, PROJECTION, WEIGHTS, is_saved_model, split_projection

__all__ = ["WEIGHTS", "describe", "fingerprint", "is_saved_model", "load", "save"]


def describe(network: EmbeddingNet, preprocess: Preprocess) -> dict[str, Any]:
    """Return what an embedding depends on beside the weights, as JSON types."""
    backbone = network.backbone
    return {
        "vit": backbone.config.to_dict() if isinstance(backbone, ViT) else None,
        "backbone": None if isinstance(backbone, ViT) else backbone.describe(),
        "pooling": network.pooling,
        "dim": network.projection.out_features if network.projection else None,
        "preprocess": preprocess.to_dict(),
    }


def fingerprint(network: EmbeddingNet, preprocess: Preprocess) -> str:
    """Return "sha256:..." of weights, architecture, pooling and pre-processing."""
    return weights.fingerprint(network.state_dict(), describe(network, preprocess))


def save(folder: Path, network: EmbeddingNet, preprocess: Preprocess, provenance: Mapping[str, Any]) -> None:
    """Write the folder; each file wholly or not at all.

    Raises:
        VitembedError: if the folder cannot be written or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create the folder {folder}: {error.strerror}") from error
    config = {
        "format": FORMAT,
        "fingerprint": fingerprint(network, preprocess),
        **describe(network, preprocess),
        "provenance": dict(provenance),
    }
    weights.save_weights(folder / WEIGHTS, _to_file(network), config)
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    card = model_card(config, dim=network.dim, parameters=parameters, fingerprint=config["fingerprint"])
    atomic_write(folder / "README.md", card)


def load(folder: Path, *, module: nn.Module | None = None) -> tuple[EmbeddingNet, Preprocess, dict[str, Any]]:
    """Read what `save` wrote.

    Args:
        folder: of the model.
        module: the foreign backbone, where only the caller can build it; it becomes part of the network.

    Returns:
        The network, on the processor, its pre-processing and its provenance.

    Raises:
        CheckpointError: if the folder is damaged, or of another format.
        ConfigError: if a foreign backbone is wanted and is not there, or is there and not wanted.
    """
    file = folder / WEIGHTS
    state, header = weights.read_saved_model(folder)
    try:
        preprocess = Preprocess.from_dict(header["preprocess"])
        network = _build(header, preprocess, module)
    except VitembedError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its description makes no sense ({error})") from error
    weights.load_state(network, _from_file(state, network), file)
    if fingerprint(network, preprocess) != header["fingerprint"]:
        raise CheckpointError(f"{file} is damaged: its weights do not have the fingerprint recorded with them")
    return network, preprocess, header["provenance"]


def _build(header: Mapping[str, Any], preprocess: Preprocess, module: nn.Module | None) -> EmbeddingNet:
    """Return the network of a description, for weights to be loaded into; the global random state stays as it was."""
    backbone: ViT | ForeignBackbone
    with torch.random.fork_rng(devices=[]):
        if header["vit"] is None:
            backbone = ForeignBackbone.from_description(header["backbone"], module)
        elif module is None:
            backbone = ViT(ViTConfig.from_dict(header["vit"]))
        else:
            raise ConfigError(f"this model has a ViT and no place for a {type(module).__name__}; leave module out")
        return EmbeddingNet(
            backbone, mean=preprocess.mean, std=preprocess.std, pooling=header["pooling"], dim=header["dim"]
        )


def _inner(network: EmbeddingNet) -> str:
    """Return what the file leaves out before the backbone's own names of tensors."""
    if isinstance(network.backbone, ViT):
        return BACKBONE
    # A stranger's module may have a projection, too: where its name would be that of ours, all names stay whole.
    both = network.projection is not None and f"{BACKBONE}module.{PROJECTION}" in network.state_dict()
    return "" if both else f"{BACKBONE}module."


def _projection_is_head(network: EmbeddingNet) -> bool:
    backbone = network.backbone
    return network.projection is not None and isinstance(backbone, ViT) and backbone.head is None


def _to_file(network: EmbeddingNet) -> dict[str, Tensor]:
    """Return the state with the names of the file."""
    state = {name.removeprefix(_inner(network)): tensor for name, tensor in network.state_dict().items()}
    if _projection_is_head(network):
        projection = state.pop(PROJECTION)
        state["head.weight"], state["head.bias"] = projection, torch.zeros(len(projection))
    return state


def _from_file(state: Mapping[str, Tensor], network: EmbeddingNet) -> dict[str, Tensor]:
    """Return the tensors of a file with the names of the network's state."""
    rest, projection = split_projection(
        state, projects=network.projection is not None, has_head=not _projection_is_head(network)
    )
    result = {_inner(network) + name: tensor for name, tensor in rest.items()}
    return result if projection is None else {**result, PROJECTION: projection}
