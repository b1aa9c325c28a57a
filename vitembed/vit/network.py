"""The Vision Transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021, arXiv:2010.11929).

With what its descendants added: register and distillation tokens, LayerScale, other MLPs, a norm before the blocks.
Everything a caller may want of a forward pass is in `ViTOutput`, so that nobody needs hooks. For the letters in shape
comments see `vitembed.vit.layers`.
"""

import copy
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitembed import weights
from vitembed.architecture import ViTConfig
from vitembed.errors import ConfigError, VectorError
from vitembed.vit.kernels import images_at_once
from vitembed.vit.layers import Block, PatchEmbed
from vitembed.vit.tokens import Merged, drop_patches, resample_positions


@dataclass(frozen=True)
class ViTOutput:
    """What a `ViT` returns.

    Attributes:
        cls: (B, W), the CLS token after the final norm.
        patches: (B, N, W), the patch tokens after the final norm, row by row; None unless asked for. In training with
            `ViT.patch_dropout` only those that were kept.
        attentions: one (B, heads, T, T) tensor a block, rows summing to one; None unless asked for.
        logits: (B, num_classes); None without a classification head.
    """

    cls: Tensor
    patches: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class ViT(nn.Module):
    """A Vision Transformer.

    >>> vit = ViT.from_config("Ti/16", image_size=32)
    >>> out = vit(torch.zeros(2, 3, 32, 32), patches=True)
    >>> tuple(out.cls.shape), tuple(out.patches.shape)
    ((2, 192), (2, 4, 192))

    Attributes:
        config: the architecture.
        patch_dropout: share of the patches that is left out in training, in [0, 1); 0 for none. A setting of the
            training, not of the network: it is not saved.
        gradient_checkpointing: in training, compute the blocks (but for a last one that computes its CLS row alone) a
            second time in the backward pass in place of keeping what they computed (Chen et al. 2016,
            arXiv:1604.06174): less memory, about a third slower. Not saved.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_dropout = 0.0
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.prefix_positions + config.patches, config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps) if config.norm_pre else nn.Identity()
        step = config.drop_path / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, step * i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.pre_logits = nn.Linear(config.width, config.head_width) if config.head_width else None
        self.head = nn.Linear(config.head_width or config.width, config.num_classes) if config.num_classes else None
        self.head_dist = (
            nn.Linear(config.width, config.num_classes) if config.num_classes and config.distilled else None
        )
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

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, heads: int | None = None, image_size: int | tuple[int, int] | None = None
    ) -> "ViT":
        """Load a ViT of torchvision, timm, transformers, the original DINO, DINOv2 or CLIP, or our own; for inference.

        Args:
            name: see `vitembed.weights.load_checkpoint`: a folder, a file, "torchvision:vit_b_16", a hub id.
            heads: attention heads, which no shape of a bare state dict tells; None for heads of width 64.
            image_size: side or (height, width) that the positions of a bare state dict are for, where they are no
                square.

        Raises:
            CheckpointError: if there is nothing, nothing whole, or no ViT under that name.
        """
        checkpoint = weights.load_checkpoint(name, heads=heads, image_size=image_size)
        vit = cls.empty(checkpoint.config)
        weights.load_state(vit, checkpoint.state, checkpoint.source)
        return vit.eval()

    @classmethod
    def empty(cls, config: ViTConfig) -> "ViT":
        """Return a network whose weights are about to be loaded; the global random state is left as it was."""
        # Weights made in inference mode could never be trained.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            return cls(config)

    def resized(self, image_size: int | tuple[int, int]) -> "ViT":
        """Return this network for images of another size: position embeddings resampled, all else copied.

        Bicubic interpolation with antialiasing; the positions of CLS and distillation token stay as they are.

        Raises:
            ConfigError: if the size is no multiple of the patch size.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        config = dataclasses.replace(self.config, image_size=size)
        with torch.inference_mode(False):
            vit = copy.deepcopy(self)
            vit.config = config
            positions = resample_positions(
                vit.pos_embed.detach(), self.config.grid, config.grid, prefix=config.prefix_positions
            )
            vit.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        return vit

    def forward(
        self, images: Tensor, *, patches: bool = False, attentions: bool = False, positions: bool = True
    ) -> ViTOutput:
        """Embed normalised images.

        Args:
            images: (B, C, H, W) floats of the configuration's channels and size.
            patches: also return the patch tokens. Without them the last block computes its CLS row alone, which gives
                the same CLS token for about a tenth less work. With `ViTConfig.merge`, each patch has the token that
                it went into.
            attentions: also return the attention weights of every block; slower, and O(depth x B x heads x T^2) memory.
            positions: add the position embeddings; False withholds them from the patches, as a jigsaw puzzle wants it.

        Raises:
            VectorError: if the images are of another shape.
            ConfigError: if attentions are asked of a network that merges tokens, whose blocks have different ones.
        """
        if not (attentions or self.training):
            config = self.config
            hidden = 4 * (config.prefix_tokens + config.patches) * (config.mlp_width or 4 * config.width)  # float32
            at_once = images_at_once(bytes_each=hidden, device=images.device)
            if at_once is not None and len(images) > at_once:
                return _joined([self._run(part, patches, False, positions) for part in torch.split(images, at_once)])
        return self._run(images, patches, attentions, positions)

    def _run(self, images: Tensor, patches: bool, attentions: bool, positions: bool) -> ViTOutput:
        x = self._embed(images, positions)  # (B, T, W)
        weights_of_blocks: list[Tensor] = []
        if attentions:
            if self.config.merge:
                raise ConfigError("a network that merges tokens has no common attentions; replace merge by 0 first")
            for block in self._blocks():
                x, block_weights = block.with_weights(x)
                weights_of_blocks.append(block_weights)
        elif self.config.merge and not self.training:
            x = self._merging(x, patches)
        else:
            x = self._encode(x, patches)
        x = self.norm(x)
        return ViTOutput(
            cls=x[:, 0],
            patches=x[:, self.config.prefix_tokens :] if patches else None,
            attentions=tuple(weights_of_blocks) if attentions else None,
            logits=self._classify(x),
        )

    def _blocks(self) -> Iterator[Block]:
        return iter(cast("list[Block]", self.blocks))

    def _embed(self, images: Tensor, positions: bool) -> Tensor:
        config = self.config
        expected = (config.channels, *config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise VectorError(
                f"images must have shape (B, {expected[0]}, {expected[1]}, {expected[2]}) for this ViT; "
                f"got {tuple(images.shape)}"
            )
        x = self.patch_embed(images)  # (B, N, W)
        prefix: Tensor = self.cls_token
        if self.dist_token is not None:
            prefix = torch.cat([prefix, self.dist_token], dim=1)  # (1, 2, W)
        if config.prefix_positions:
            prefix = prefix + self.pos_embed[:, : config.prefix_positions]
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        if positions:
            x = x + self.pos_embed[:, config.prefix_positions :]
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)  # (B, T, W)
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout, prefix=config.prefix_tokens)
        normed: Tensor = self.norm_pre(x)
        return normed

    def _encode(self, x: Tensor, patches: bool) -> Tensor:
        """Return the tokens after the last block: all of them, or those alone that the output is made of."""
        *before, last = self._blocks()
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in before:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        if patches:
            return checkpoint(last, x, use_reentrant=False) if recompute else last(x)  # type: ignore[no-any-return]
        return last.first_tokens(x, self._output_tokens)

    def _merging(self, x: Tensor, patches: bool) -> Tensor:
        """Return what `_encode` does, with tokens merged on the way."""
        prefix = self.config.prefix_tokens
        state = Merged.start(x, prefix=prefix)
        *before, last = self._blocks()
        for block in before:
            state = block.merging(state, self.config.merge, prefix=prefix)
        if not patches:
            return last.first_tokens(state.tokens, self._output_tokens, state.attention_bias)
        state = last.merging(state, 0, prefix=prefix)
        return torch.cat([state.tokens[:, :prefix], state.unmerged], dim=1)

    @property
    def _output_tokens(self) -> int:
        """How many tokens the output is made of where no patches are wanted: CLS, and DIST if it has a head."""
        return 1 if self.head_dist is None else 2

    def _classify(self, x: Tensor) -> Tensor | None:
        if self.head is None:
            return None
        cls = x[:, 0]
        if self.pre_logits is not None:
            cls = torch.tanh(self.pre_logits(cls))
        logits: Tensor = self.head(cls)
        if self.head_dist is None:
            return logits
        mean: Tensor = (logits + self.head_dist(x[:, 1])) / 2  # as DeiT's code and timm do
        return mean

    def _init_weights(self) -> None:
        for token in (self.pos_embed, self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        # Fan-in of the flattened patch: the projection is a linear layer in the shape of a convolution.
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        for head in (self.head, self.head_dist):
            if head is not None:
                nn.init.zeros_(head.weight)  # the first predictions are uniform


def _joined(parts: list[ViTOutput]) -> ViTOutput:
    """Return the output of a batch that went through in parts."""

    def join(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return ViTOutput(
        cls=torch.cat([part.cls for part in parts]),
        patches=join([part.patches for part in parts]),
        logits=join([part.logits for part in parts]),
    )
