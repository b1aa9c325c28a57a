"""Which parameters an optimizer treats alike: decayed or not, near the images or far from them, of the loss.

Groups are dictionaries as torch's optimizers take them, each with its own highest learning rate.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import ConfigError
from vitembed.vit import ViT

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_HEADS = ("backbone.head", "backbone.head_dist")
_AFTER_THE_BLOCKS = ("backbone.norm.", "backbone.pre_logits.", "backbone.head.", "backbone.head_dist.")


def parameter_groups(
    network: nn.Module,
    loss: Callable[..., Tensor] | None,
    device: torch.device,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    loss_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters of a network and of a loss.

    Matrices are decayed; norms, biases, positions, single tokens and the parameters of the loss are not. With a layer
    decay d below 1 a block has the share d^(blocks above it + 1) of the rate, what stands before the first block the
    share of one block more, and what comes after the last one the whole rate (Bao et al. 2022, arXiv:2106.08254,
    appendix; Clark et al. 2020, arXiv:2003.10555).

    Args:
        network: what is trained; an `EmbeddingNet` of a `ViT` of ours if the layer decay is not 1.
        loss: whose parameters are moved to the device and trained along, if it is a module that has some.
        device: where the network is.
        learning_rate: the highest of the network.
        weight_decay: of matrices.
        layer_decay: in (0, 1].
        loss_learning_rate: the highest of the loss's parameters; None for that of the network.

    Returns:
        Groups with "params", "lr", "weight_decay" and "matrices", whether the group is one of `hidden_matrices`; those
            of the loss come last, and are marked by "of_loss".

    Raises:
        ConfigError: if there are no blocks to decay the rate over.
    """
    depth = 0
    if layer_decay != 1:
        if not (isinstance(network, EmbeddingNet) and isinstance(network.backbone, ViT)):
            raise ConfigError("layer_decay counts the blocks of a ViT of vitembed; another network stands in here")
        depth = network.backbone.config.depth
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    matrices = hidden_matrices(network)
    for name, parameter in network.named_parameters():
        level = _level(name, depth) if layer_decay != 1 else 0
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "_token"))
        groups.setdefault((level, plain, id(parameter) in matrices), []).append(parameter)
    top = max((level for level, _, _ in groups), default=0)
    found = [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (top - level),
            "weight_decay": 0.0 if plain else weight_decay,
            "matrices": is_matrices,
            "of_loss": False,
        }
        for (level, plain, is_matrices), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    own = list(loss.to(device).parameters()) if isinstance(loss, nn.Module) else []
    if own:
        rate = learning_rate if loss_learning_rate is None else loss_learning_rate
        found.append({"params": own, "lr": rate, "weight_decay": 0.0, "matrices": False, "of_loss": True})
    elif loss_learning_rate is not None:
        raise ConfigError(f"the loss {loss} has no parameters, so it takes no learning rate of its own")
    return found


def hidden_matrices(network: nn.Module) -> set[int]:
    """Return the `id` of each weight that maps vectors to vectors within a network, which is what Muon is for.

    Weights of linear layers, of attention as torch has it, and of convolutions whose channels all meet (not depthwise
    ones); no tables of positions, and no classification head of a ViT, as Jordan (2024) leaves output layers to AdamW.
    """
    found = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.add(id(module.in_proj_weight))
        is_map = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
        if is_map and name not in _HEADS:
            found.add(id(module.weight))
    return found


def _level(name: str, depth: int) -> int:
    """Return how far a parameter is from the images: 0 for patches and positions, depth + 1 after the blocks."""
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    return 0 if name.startswith("backbone.") and not name.startswith(_AFTER_THE_BLOCKS) else depth + 1
