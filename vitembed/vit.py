"""The Vision Transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021, arXiv:2010.11929).

This module owns the network and nothing else: no files, no pre-processing. It reads from top to bottom: the
configuration, attention, one block, the whole. Parameter names follow timm's, so that weights travel in both
directions without renaming. Letters in shape comments:

    B images in the batch    T tokens (CLS and N patches)    W width    h heads    d = W / h    C channels
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitembed.errors import ConfigError, VectorError, unknown_name

# Width, depth and heads. B, L and H are table 1 of the ViT paper; Ti and S are table 1 of DeiT (Touvron et al. 2021,
# arXiv:2012.12877); N (nano) is ours, for small images on a processor.
SIZES = {
    "N": (128, 4, 4),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}

Stem = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a `ViT`.

    Attributes:
        image_size: (height, width) in pixels; both multiples of `patch_size`.
        patch_size: side of a square patch in pixels.
        channels: channels of the input images.
        width: size of a token, a multiple of `heads`.
        depth: number of encoder blocks.
        heads: attention heads of a block.
        mlp_width: hidden units of a block's MLP; None means 4 x width, as in the paper.
        stem: the hybrid stem: (channels, stride) of each 3x3 convolution that stands in place of the linear patch
            projection; empty for linear patches. The strides multiply to `patch_size`. See `conv_stem`.
        num_classes: outputs of the classification head; 0 for none.
        head_width: hidden units (tanh) of the classification head, the paper's MLP head; 0 for a linear one.
        drop_path: probability of skipping a residual branch in training (stochastic depth, Huang et al. 2016,
            arXiv:1603.09382), rising linearly from 0 at the first block to this at the last.

    Raises:
        ConfigError: if the values do not fit together.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None
    stem: Stem = ()
    num_classes: int = 0
    head_width: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "width", "depth", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        if len(self.image_size) != 2 or any(side < 1 or side % self.patch_size for side in self.image_size):
            raise ConfigError(
                f"image_size must be two positive multiples of the patch size {self.patch_size}; got {self.image_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"width must be a multiple of heads; got {self.width} and {self.heads}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ConfigError(f"mlp_width must be at least 1; got {self.mlp_width}")
        if self.num_classes < 0 or self.head_width < 0:
            raise ConfigError("num_classes and head_width must not be negative")
        if not 0.0 <= self.drop_path < 1.0:
            raise ConfigError(f"drop_path must lie in [0, 1); got {self.drop_path}")
        stride = math.prod(stride for _, stride in self.stem)
        if self.stem and stride != self.patch_size:
            raise ConfigError(
                f"the strides of the stem must multiply to the patch size {self.patch_size}; got {stride}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @classmethod
    def named(
        cls,
        name: str,
        *,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        stem: Literal["linear", "conv"] = "linear",
        num_classes: int = 0,
        drop_path: float = 0.0,
    ) -> "ViTConfig":
        """Return the configuration of a size of the paper.

        Args:
            name: size and patch, "Ti/16", "S/16", "S/8", "B/16", "B/32", "L/16", "H/14"; also N (128 wide, 4 blocks).
            image_size: side of square images, or (height, width).
            channels: channels of the input images.
            stem: "linear" patches, or the hybrid's "conv" stem with `conv_stem`'s widths.
            num_classes: outputs of a linear classification head; 0 for none.
            drop_path: see the attribute.

        Raises:
            ConfigError: if the name is not of that form or the size is unknown.
        """
        match = re.fullmatch(r"([A-Za-z]+)/(\d+)", name)
        if not match:
            raise ConfigError(f"an architecture is a size and a patch such as 'S/16'; got {name!r}")
        if match[1] not in SIZES:
            raise unknown_name("ViT size", match[1], SIZES)
        if stem not in ("linear", "conv"):
            raise unknown_name("stem", stem, ("linear", "conv"))
        width, depth, heads = SIZES[match[1]]
        patch_size = int(match[2])
        return cls(
            image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
            patch_size=patch_size,
            channels=channels,
            width=width,
            depth=depth,
            heads=heads,
            stem=conv_stem(width, patch_size) if stem == "conv" else (),
            num_classes=num_classes,
            drop_path=drop_path,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ViTConfig":
        """Return the configuration that `to_dict` described.

        Raises:
            ConfigError: if a key is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise unknown_name("ViT setting", key, known)
        values = dict(fields)
        if "image_size" in values:
            values["image_size"] = tuple(values["image_size"])
        if "stem" in values:
            values["stem"] = tuple((width, stride) for width, stride in values["stem"])
        return cls(**values)


def conv_stem(width: int, patch_size: int) -> Stem:
    """Return the convolutions of a hybrid stem, as (channels, stride).

    One stride-2 convolution for each halving, the channels doubling up to `width`, as in Xiao et al., "Early
    Convolutions Help Transformers See Better" (2021, arXiv:2106.14881, section 4). Where patches are small there are
    few halvings, so that a stride-1 convolution is put before each: a patch of 4 has four convolutions, not two.

    >>> conv_stem(384, 16)
    ((48, 2), (96, 2), (192, 2), (384, 2))
    >>> conv_stem(128, 4)
    ((32, 1), (64, 2), (64, 1), (128, 2))

    Raises:
        ConfigError: if the patch size is no power of two, or 1.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size < 2 or patch_size != 1 << halvings:
        raise ConfigError(f"a convolutional stem needs a patch size of 2, 4, 8, 16 ...; got {patch_size}")
    widths = [max(8, width >> (halvings - 1 - i)) for i in range(halvings)]
    if halvings >= 3:
        return tuple((w, 2) for w in widths)
    before = [max(8, w // 2) for w in widths]
    return tuple(pair for w, b in zip(widths, before, strict=True) for pair in ((b, 1), (w, 2)))


@dataclass(frozen=True)
class ViTOutput:
    """What a `ViT` returns.

    Attributes:
        cls: (B, W), the CLS token after the final norm.
        patches: (B, N, W), the patch tokens after the final norm, row by row; None unless asked for.
        attentions: one (B, heads, T, T) tensor a block, rows summing to one; None unless asked for.
        logits: (B, num_classes); None without a classification head.
    """

    cls: Tensor
    patches: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class PatchEmbed(nn.Module):
    """Images to patch tokens: one linear projection a patch, or the hybrid's convolutions and a 1x1 projection."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        channels = config.channels
        for width, stride in config.stem:
            self.stem.append(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
            self.stem.append(nn.BatchNorm2d(width))
            self.stem.append(nn.ReLU(inplace=True))
            channels = width
        side = 1 if config.stem else config.patch_size
        self.proj = nn.Conv2d(channels, config.width, kernel_size=side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, N, W) tokens of (B, C, H, W) images."""
        x: Tensor = self.proj(self.stem(images))  # (B, W, rows, columns)
        return x.flatten(2).transpose(1, 2)  # (B, W, N) -> (B, N, W)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A of the paper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W): every token attends to all."""
        q, k, v = self._split(self.qkv(x), 3)
        return self._merge(F.scaled_dot_product_attention(q, k, v))

    def first_token(self, x: Tensor) -> Tensor:
        """Return (B, 1, W): what `forward` gives for the first token, without the queries of the others."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(F.linear(x[:, :1], weight[:width], bias[:width]), 1)
        k, v = self._split(F.linear(x, weight[width:], bias[width:]), 2)
        return self._merge(F.scaled_dot_product_attention(q, k, v))

    def with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` gives and the (B, heads, T, T) attention weights, which fused attention hides."""
        q, k, v = self._split(self.qkv(x), 3)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self._merge(weights @ v), weights

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        x = x.view(batch, tokens, parts, self.heads, -1)  # (B, T, parts * W) -> (B, T, parts, h, d)
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # parts x (B, h, T, d)

    def _merge(self, x: Tensor) -> Tensor:
        merged: Tensor = self.proj(x.transpose(1, 2).flatten(2))  # (B, h, T, d) -> (B, T, h, d) -> (B, T, W)
        return merged


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., W) for (..., W)."""
        x = self.fc1(x)  # (..., hidden), the largest tensor of a block
        # Without a graph it may be overwritten, which spares the traffic of a second tensor of that size.
        x = F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
        x = self.fc2(x)
        return x


class Block(nn.Module):
    """A pre-norm encoder block: attention, then an MLP, each beside a shortcut (equations 2 and 3 of the paper)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_width or 4 * config.width)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W)."""
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def first_token(self, x: Tensor) -> Tensor:
        """Return (B, 1, W): the first token of `forward`, at about a sixth of its cost."""
        cls = x[:, :1] + self._drop(self.attn.first_token(self.norm1(x)))
        return cls + self._drop(self.mlp(self.norm2(cls)))

    def with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` gives and the (B, heads, T, T) attention weights."""
        attended, weights = self.attn.with_weights(self.norm1(x))
        x = x + self._drop(attended)
        return x + self._drop(self.mlp(self.norm2(x))), weights

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1.0 - self.drop_path)  # the expectation stays what it was


class ViT(nn.Module):
    """A Vision Transformer.

    >>> vit = ViT.from_config("Ti/16", image_size=32)
    >>> out = vit(torch.zeros(2, 3, 32, 32), patches=True)
    >>> tuple(out.cls.shape), tuple(out.patches.shape)
    ((2, 192), (2, 4, 192))
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, config.width))
        step = config.drop_path / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, step * i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.pre_logits = nn.Linear(config.width, config.head_width) if config.head_width else None
        self.head = nn.Linear(config.head_width or config.width, config.num_classes) if config.num_classes else None
        self._init_weights()

    @classmethod
    def from_config(
        cls,
        name: str,
        *,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        stem: Literal["linear", "conv"] = "linear",
        num_classes: int = 0,
    ) -> "ViT":
        """Return an untrained network of a named size; for the arguments see `ViTConfig.named`."""
        return cls(ViTConfig.named(name, image_size=image_size, channels=channels, stem=stem, num_classes=num_classes))

    def forward(self, images: Tensor, *, patches: bool = False, attentions: bool = False) -> ViTOutput:
        """Embed normalised images.

        Args:
            images: (B, C, H, W) floats of the configuration's channels and size.
            patches: also return the patch tokens. Without them the last block computes its CLS row alone, which gives
                the same CLS token for about a tenth less work.
            attentions: also return the attention weights of every block; slower, and O(depth x B x heads x T^2) memory.

        Raises:
            VectorError: if the images are of another shape.
        """
        tokens = self._embed(images)  # (B, T, W)
        weights = []
        for block in cast(Iterable[Block], self.blocks):
            if attentions:
                tokens, block_weights = block.with_weights(tokens)
                weights.append(block_weights)
            elif patches or block is not self.blocks[-1]:
                tokens = block(tokens)
            else:
                tokens = block.first_token(tokens)  # (B, T, W) -> (B, 1, W)
        tokens = self.norm(tokens)
        return ViTOutput(
            cls=tokens[:, 0],
            patches=tokens[:, 1:] if patches else None,
            attentions=tuple(weights) if attentions else None,
            logits=self._classify(tokens[:, 0]),
        )

    def _embed(self, images: Tensor) -> Tensor:
        expected = (self.config.channels, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise VectorError(
                f"images must have shape (B, {expected[0]}, {expected[1]}, {expected[2]}) for this ViT; "
                f"got {tuple(images.shape)}"
            )
        x = self.patch_embed(images)  # (B, N, W)
        cls = self.cls_token.expand(x.shape[0], -1, -1)  # (1, 1, W) -> (B, 1, W)
        return torch.cat([cls, x], dim=1) + self.pos_embed

    def _classify(self, cls: Tensor) -> Tensor | None:
        if self.head is None:
            return None
        if self.pre_logits is not None:
            cls = torch.tanh(self.pre_logits(cls))
        logits: Tensor = self.head(cls)
        return logits

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        # Fan-in of the flattened patch: the projection is a linear layer in the shape of a convolution.
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)  # the first predictions are uniform
