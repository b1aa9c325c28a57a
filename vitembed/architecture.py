"""The architecture of a Vision Transformer as a value: `ViTConfig`, the sizes of the papers, the hybrid stem.

Nothing here computes: `vitembed.weights` fills a configuration from a checkpoint, `vitembed.vit` builds the network.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitembed.errors import ConfigError, unknown_name

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
MlpKind = Literal["gelu", "quick_gelu", "swiglu"]
MLPS = ("gelu", "quick_gelu", "swiglu")


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
        mlp: "gelu", as in the paper; "quick_gelu", x * sigmoid(1.702 x) (CLIP); or "swiglu", whose first layer gives
            2 x `mlp_width` numbers and multiplies SiLU of the first half with the second (Shazeer 2020,
            arXiv:2002.05202; the giant of DINOv2).
        stem: the hybrid stem: (channels, stride) of each 3x3 convolution that stands in place of the linear patch
            projection; empty for linear patches. The strides multiply to `patch_size`. See `conv_stem`.
        registers: extra tokens without a patch, after CLS (Darcet et al. 2023, arXiv:2309.16588). With them the
            position embeddings cover the patches alone.
        distilled: a second token beside CLS, and a second head, as in the distilled DeiT (arXiv:2012.12877, sec. 4).
        layer_scale: a learned factor a channel on each residual branch (Touvron et al. 2021, arXiv:2103.17239).
        norm_pre: a LayerNorm before the first block and a patch projection without bias, as in CLIP (Radford et al.
            2021, arXiv:2103.00020).
        norm_eps: what LayerNorm adds to the variance.
        merge: tokens that each block but the last merges away at inference (token merging; Bolya et al. 2022,
            arXiv:2210.09461): faster, and no longer exact. 0 for none.
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
    mlp: MlpKind = "gelu"
    stem: Stem = ()
    registers: int = 0
    distilled: bool = False
    layer_scale: bool = False
    norm_pre: bool = False
    norm_eps: float = 1e-6
    merge: int = 0
    num_classes: int = 0
    head_width: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        self._check_types()
        if len(self.image_size) != 2 or any(
            not isinstance(side, int) or side < 1 or side % self.patch_size for side in self.image_size
        ):
            raise ConfigError(
                f"image_size must be two positive multiples of the patch size {self.patch_size}; got {self.image_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"width must be a multiple of heads; got {self.width} and {self.heads}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ConfigError(f"mlp_width must be at least 1; got {self.mlp_width}")
        if self.mlp not in MLPS:
            raise unknown_name("MLP", self.mlp, MLPS)
        if not 0.0 < self.norm_eps < 1.0:
            raise ConfigError(f"norm_eps must lie in (0, 1); got {self.norm_eps}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ConfigError(f"drop_path must lie in [0, 1); got {self.drop_path}")
        stride = math.prod(stride for _, stride in self.stem)
        if self.stem and stride != self.patch_size:
            raise ConfigError(
                f"the strides of the stem must multiply to the patch size {self.patch_size}; got {stride}"
            )

    def _check_types(self) -> None:
        for name in ("patch_size", "channels", "width", "depth", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name in ("num_classes", "head_width", "registers", "merge"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be a whole number, not negative; got {value!r}")
        for name in ("distilled", "layer_scale", "norm_pre"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false; got {value!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        rows, columns = self.grid
        return rows * columns

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the patches: CLS, the distillation token, the registers."""
        return 1 + self.distilled + self.registers

    @property
    def prefix_positions(self) -> int:
        """How many of them have a position embedding."""
        return 0 if self.registers else self.prefix_tokens

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
