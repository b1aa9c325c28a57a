"""The Vision Transformer: the network, its layers, and what is done to its tokens."""

from vitembed.architecture import SIZES, ViTConfig, conv_stem
from vitembed.vit.network import ViT, ViTOutput

__all__ = ["SIZES", "ViT", "ViTConfig", "ViTOutput", "conv_stem"]
