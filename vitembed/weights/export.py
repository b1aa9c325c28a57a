"""The way back: our weights as timm loads them."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitembed.architecture import ViTConfig
from vitembed.errors import ConfigError


def timm_arguments(config: ViTConfig) -> dict[str, Any]:
    """Return the arguments with which timm builds the same network.

    For `timm.models.vision_transformer.VisionTransformer`, or for `timm.models.deit.VisionTransformerDistilled` if
    `config.distilled`. The names are strings and numbers, but for `norm_layer` and `mlp_layer` where timm needs a
    class: those are imported from timm.

    Raises:
        ConfigError: if timm has no such network: a convolutional stem, or a head with a hidden layer.
    """
    _check_expressible(config)
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "num_classes": config.num_classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": _mlp_ratio(config),
    }
    if config.registers:
        arguments |= {"reg_tokens": config.registers, "no_embed_class": True}
    if config.layer_scale:
        arguments["init_values"] = 1.0  # its weights replace it; None would leave the layers out
    if config.norm_pre:
        arguments["pre_norm"] = True
    if config.mlp == "quick_gelu":
        arguments["act_layer"] = "quick_gelu"
    if config.norm_eps != 1e-6:
        arguments["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=config.norm_eps)
    if config.mlp == "swiglu":
        from timm.layers import SwiGLUPacked

        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": "silu"}  # else timm would gate with its default, GELU
    return arguments


def timm_state(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Return a ViT's state as timm's network of `timm_arguments` loads it, strictly.

    Raises:
        ConfigError: as for `timm_arguments`.
    """
    _check_expressible(config)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _check_expressible(config: ViTConfig) -> None:
    if config.stem:
        raise ConfigError("timm has no ViT with a convolutional stem; train with stem='linear' to go back to timm")
    if config.head_width:
        raise ConfigError("timm has no ViT with a hidden layer in its head; use a linear head to go back to timm")


def _mlp_ratio(config: ViTConfig) -> float:
    """Return the ratio from which timm gets the width of the MLP's first layer again, which it rounds down."""
    wanted = (config.mlp_width or 4 * config.width) * (2 if config.mlp == "swiglu" else 1)
    ratio = wanted / config.width
    return ratio if int(config.width * ratio) == wanted else (wanted + 0.5) / config.width
