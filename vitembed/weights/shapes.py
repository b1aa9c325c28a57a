"""A state in timm's names becomes a configuration and a state in our layout: sizes are read off the shapes.

What no shape tells comes from the checkpoint's own configuration (`Described`), and failing that from rules that are
stated here: how many heads a width has, and that images are square.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitembed.architecture import ViTConfig
from vitembed.errors import CheckpointError, ConfigError
from vitembed.weights.checkpoint import Described, Pooling
from vitembed.weights.names import STAND_IN, Named
from vitembed.weights.store import check_fit

Size = tuple[int, int]

HEAD_WIDTH = 64  # of the ViT paper's B and L, of DeiT, DINO, DINOv2 and CLIP up to L
HEADS_BY_WIDTH = {
    1152: 16,  # So400m (Alabdulmohsin et al. 2023, arXiv:2305.13035)
    1280: 16,  # H: table 1 of the ViT paper
    1408: 16,  # g: Zhai et al. 2022, arXiv:2106.04560
    1664: 16,  # G: likewise
}


def heads_of(width: int, source: str) -> int:
    """Return the attention heads of a width where nothing else tells: of width 64, but for the largest models.

    >>> heads_of(768, "a file"), heads_of(1280, "a file")
    (12, 16)

    Raises:
        CheckpointError: if the width is no multiple of 64.
    """
    if width in HEADS_BY_WIDTH:
        return HEADS_BY_WIDTH[width]
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"{source} does not say how many attention heads it has, and its width {width} is no multiple of "
            f"{HEAD_WIDTH}; say how many: Embedder.from_pretrained(..., heads=...)"
        )
    return width // HEAD_WIDTH


def to_ours(named: Named, described: Described, source: str) -> tuple[ViTConfig, Named]:
    """Read the configuration off the shapes, and bring the state to the layout of `vitembed.vit.ViT`.

    Args:
        named: a state in timm's names.
        described: what the checkpoint's configuration says beside it.
        source: what to call it in errors.

    Returns:
        The configuration, and the state with CLIP's projection taken out and notes added.

    Raises:
        CheckpointError: if a parameter that every ViT has is missing or of an impossible shape, or if the position
            embeddings fit no image size.
    """
    state = dict(named.state)
    notes = [*named.notes, *described.notes]
    _check_vit(state, source)
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    for token in {"cls_token", "dist_token", "reg_token", "pos_embed"} & state.keys():
        state[token] = state[token].reshape(1, -1, width)  # CLIP has no batch dimension here
    grid, layout = _grid(state, patch_size, described.image_size, source)
    _lay_out_positions(state, layout)
    _complete_biases(state)
    projection = _settle_heads(state, named.projection, described.pooling, notes)
    hidden, gated = _mlp(state)
    if described.heads is None:
        notes.append(
            f"the weights do not say how many heads they have: {heads_of(width, source)} for a width of {width}"
        )
    if "dist_token" in state:
        notes.append(
            "the network is distilled: an embedding is made of CLS alone, a feature of timm (num_classes=0) is the "
            "mean of CLS and the distillation token"
        )
    if named.family.mlp == "quick_gelu" and described.mlp is None:
        notes.append("the weights do not name their activation: quick_gelu, as OpenAI's CLIP has it, was assumed")
    try:
        config = ViTConfig(
            image_size=(grid[0] * patch_size, grid[1] * patch_size),
            patch_size=patch_size,
            channels=channels,
            width=width,
            depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            heads=described.heads or heads_of(width, source),
            mlp_width=None if hidden == 4 * width else hidden,
            mlp="swiglu" if gated else described.mlp or named.family.mlp,
            registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
            distilled="dist_token" in state,
            layer_scale="blocks.0.ls1.gamma" in state,
            norm_pre="norm_pre.weight" in state,
            norm_eps=described.norm_eps or _norm_eps(named, state),
            num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
            head_width=state["pre_logits.weight"].shape[0] if "pre_logits.weight" in state else 0,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} describes no ViT: {error}") from error
    try:
        check_fit(expected_shapes(config), state, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if it is no plain ViT, {STAND_IN}") from error
    return config, dataclasses.replace(named, state=state, projection=projection, notes=tuple(dict.fromkeys(notes)))


def expected_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the parameters of a `vitembed.vit.ViT` with linear patches.

    The network itself cannot be asked: it is built on this package.
    """
    width, patch = config.width, config.patch_size
    hidden = config.mlp_width or 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.prefix_positions + config.patches, width),
        "patch_embed.proj.weight": (width, config.channels, patch, patch),
    }
    layers: dict[str, tuple[int, ...]] = {"norm": (width,)}
    if config.distilled:
        shapes["dist_token"] = (1, 1, width)
    if config.registers:
        shapes["reg_token"] = (1, config.registers, width)
    if config.norm_pre:
        layers["norm_pre"] = (width,)
    else:
        shapes["patch_embed.proj.bias"] = (width,)
    for block in (f"blocks.{i}" for i in range(config.depth)):
        layers |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": ((2 if config.mlp == "swiglu" else 1) * hidden, width)}
        layers |= {f"{block}.mlp.fc2": (width, hidden)}
        if config.layer_scale:
            shapes |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
    if config.num_classes:
        layers["head"] = (config.num_classes, config.head_width or width)
        if config.distilled:
            layers["head_dist"] = (config.num_classes, width)
    if config.head_width:
        layers["pre_logits"] = (config.head_width, width)
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def _check_vit(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state without the parameters that the configuration is read off."""
    if "cls_token" not in state:
        raise CheckpointError(f"{source} is a ViT without a CLS token, which this ViT cannot express; {STAND_IN}")
    if "pos_embed" not in state:
        raise CheckpointError(f"{source} is a ViT without learned positions, which this ViT cannot express; {STAND_IN}")
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise CheckpointError(
            f"{source} has patches of another kind: expected patch_embed.proj.weight (width, channels, side, side); "
            f"got {shape}"
        )
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if name in state and (not 1 <= state[name].ndim <= 3 or state[name].shape[-1] != shape[0]):
            raise CheckpointError(
                f"{source} has {name} of shape {tuple(state[name].shape)}; expected {shape[0]} numbers a token, "
                "the width of its patches"
            )
    if not {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"} <= state.keys():
        raise CheckpointError(f"{source} has no blocks.0.mlp.fc1 and fc2: it holds no whole ViT")
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight", "pre_logits.weight"):
        if name in state and state[name].ndim != 2:
            raise CheckpointError(f"{source} has {name} of shape {tuple(state[name].shape)}; expected a matrix")
    numbers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise CheckpointError(f"{source} has no whole row of blocks; expected blocks.0 to blocks.{len(numbers) - 1}")


def _grid(state: Mapping[str, Tensor], patch: int, size: tuple[int, int] | None, source: str) -> tuple[Size, int]:
    """Find the grid of patches, and how many positions stand before those of the patches.

    Positions cover the patches alone (DeiT III), or CLS and DIST too, or the registers as well. A layout fits where
    what is left for the patches makes the grid of the known image size, or a square where none is known; two of them
    fit at once with a handful of patches only. But 9 positions may be a square of 9 patches or, with CLS, 2 x 4
    patches: where only the rarer first reading gives a square, it counts with LayerScale alone, which DeiT III has.
    """
    positions = state["pos_embed"].shape[1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = 1 + ("dist_token" in state)
    layouts = {0, prefix, prefix + registers} | ({1} if registers else set())
    if size is not None:
        grid = (size[0] // patch, size[1] // patch)
        fits = [n for n in layouts if positions - n == grid[0] * grid[1] and not (size[0] % patch or size[1] % patch)]
        if not fits:
            raise CheckpointError(
                f"the {positions} position embeddings of {source} fit no image of {size[0]} x {size[1]} pixels in "
                f"patches of {patch}"
            )
        return grid, fits[0]
    fits = [n for n in layouts if positions > n and math.isqrt(positions - n) ** 2 == positions - n]
    if len(fits) != 1 or (fits == [0] and not registers and "blocks.0.ls1.gamma" not in state):
        reason = "fit no square image" if not fits else "can be read as those of several image sizes"
        raise CheckpointError(
            f"the {positions} position embeddings of {source} {reason} in patches of {patch} pixels; "
            "say which: Embedder.from_pretrained(..., image_size=(height, width))"
        )
    side = math.isqrt(positions - fits[0])
    return (side, side), fits[0]


def _lay_out_positions(state: dict[str, Tensor], layout: int) -> None:
    """Bring positions to our layout: CLS, DIST and patches; with registers the patches alone.

    The position of a token is a constant that is added to it, so that moving it into the token changes nothing.
    """
    positions = state["pos_embed"]
    if "reg_token" in state:
        if layout:
            state["cls_token"] = state["cls_token"] + positions[:, :1]
        if layout > 1:
            state["reg_token"] = state["reg_token"] + positions[:, 1:layout]
        state["pos_embed"] = positions[:, layout:].contiguous()
    elif layout == 0:
        zeros = positions.new_zeros(1, 1 + ("dist_token" in state), positions.shape[2])
        state["pos_embed"] = torch.cat([zeros, positions], dim=1)


def _complete_biases(state: dict[str, Tensor]) -> None:
    """Give linear layers without a bias one of zeros, which is the same; norms are left alone: theirs may be RMS."""
    for name in list(state):
        layer = name.removesuffix(".weight")
        linear = re.fullmatch(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|head|head_dist|pre_logits", layer)
        projects = layer == "patch_embed.proj" and "norm_pre.weight" not in state
        clip = layer == "head" and "norm_pre.weight" in state  # `_settle_heads` makes it the projection
        if name != layer and (linear or projects) and not clip and f"{layer}.bias" not in state:
            state[f"{layer}.bias"] = state[name].new_zeros(state[name].shape[0])


def _settle_heads(
    state: dict[str, Tensor], projection: Tensor | None, pooling: Pooling, notes: list[str]
) -> Tensor | None:
    """Keep a head that reads CLS, make CLIP's head the projection, leave others out; return the projection."""
    if "head.weight" not in state:
        return projection
    head, bias = state["head.weight"], state.get("head.bias")
    if projection is None and "norm_pre.weight" in state and (bias is None or not bias.any()):
        # timm keeps CLIP's projection as a head whose bias is zero; that of a fine-tuned classifier is not.
        del state["head.weight"]
        state.pop("head.bias", None)
        return head
    if head.shape[-1] == 2 * state["cls_token"].shape[-1]:
        notes.append("left out: the classification head, which reads CLS and the mean of the patches")
    elif "dist_token" in state and "head_dist.weight" not in state:
        notes.append("left out: the classification head, which reads CLS alone beside a distillation token")
    elif pooling == "mean":
        notes.append("left out: the classification head, which reads the mean of the patches")
    else:
        return projection
    del state["head.weight"], state["head.bias"]
    return projection


def _mlp(state: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the hidden units of an MLP, and whether its first layer is gated (twice as wide)."""
    hidden = state["blocks.0.mlp.fc2.weight"].shape[-1]
    return hidden, state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden


def _norm_eps(named: Named, state: Mapping[str, Tensor]) -> float:
    """Return what LayerNorm adds where no configuration says it: by family, but for CLIP and DINOv2 in any names."""
    if "norm_pre.weight" in state:
        return 1e-5
    return 1e-6 if "blocks.0.ls1.gamma" in state else named.family.norm_eps
