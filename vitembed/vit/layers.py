"""The layers of the Vision Transformer, in the order in which an image meets them.

Parameter names follow timm's, so that weights travel in both directions without renaming. Letters in shape comments:

    B images in the batch    T tokens (prefix and N patches)    W width    h heads    d = W / h    C channels
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitembed.architecture import MlpKind, ViTConfig
from vitembed.vit import tokens
from vitembed.vit.kernels import attention, attention_weights, channels_last, is_plain, linear


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
        self.proj = nn.Conv2d(channels, config.width, kernel_size=side, stride=side, bias=not config.norm_pre)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, N, W) tokens of (B, C, H, W) images."""
        x: Tensor = self.proj(self.stem(channels_last(images) if len(self.stem) else images))  # (B, W, rows, columns)
        return x.flatten(2).transpose(1, 2)  # (B, W, N) -> (B, N, W)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A of the ViT paper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return (B, T, W) for (B, T, W), every token attending to all; the shortcut is added if there is one."""
        q, k, v = self.split(linear(self.qkv, x), 3)
        return self._join(attention(q, k, v, training=self.training), shortcut)

    def first_tokens(self, x: Tensor, count: int, bias: Tensor | None = None) -> Tensor:
        """Return (B, count, W): what `forward` gives for the first tokens, without the queries of the others.

        Args:
            x: (B, T, W).
            count: how many tokens are wanted.
            bias: (B, 1, 1, T), added to the attention logits.
        """
        if is_plain(self.qkv):
            width = x.shape[-1]
            weight, qkv_bias = self.qkv.weight, self.qkv.bias
            (q,) = self.split(F.linear(x[:, :count], weight[:width], qkv_bias[:width]), 1)
            k, v = self.split(F.linear(x, weight[width:], qkv_bias[width:]), 2)
        else:  # its weight is not all of it: an adapter or a hook must be called
            q, k, v = self.split(self.qkv(x), 3)
            q = q[:, :, :count]
        return self._join(attention(q, k, v, bias, training=self.training))

    def with_keys(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return attention with a (B, 1, 1, T) bias on its logits, and the keys averaged over the heads, (B, T, d)."""
        q, k, v = self.split(linear(self.qkv, x), 3)
        return self._join(attention(q, k, v, bias, training=self.training)), k.mean(dim=1)

    def with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` gives and the (B, heads, T, T) attention weights, which fused attention hides."""
        q, k, v = self.split(self.qkv(x), 3)
        weights = attention_weights(q, k)
        return self._join(weights @ v), weights

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, h, T, d) each, of (B, T, parts x W)."""
        batch, count, _ = x.shape
        x = x.view(
            batch, count, parts, self.heads, x.shape[2] // (parts * self.heads)
        )  # (B, T, parts * W) -> (B, T, parts, h, d)
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # parts x (B, h, T, d)

    def _join(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Project what the heads found, side by side."""
        return linear(self.proj, x.transpose(1, 2).flatten(2), shortcut=shortcut)  # (B, h, T, d) -> (B, T, W)


class Mlp(nn.Module):
    """Two linear layers with an activation between them; see `ViTConfig.mlp` for the kinds."""

    def __init__(self, width: int, hidden: int, kind: MlpKind) -> None:
        super().__init__()
        self.kind = kind
        self.fc1 = nn.Linear(width, 2 * hidden if kind == "swiglu" else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return (..., W) for (..., W); the shortcut is added if there is one."""
        if self.kind == "gelu":
            return linear(self.fc2, linear(self.fc1, x, gelu=True), shortcut=shortcut)
        x = linear(self.fc1, x)
        if self.kind == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        return linear(self.fc2, x, shortcut=shortcut)


class LayerScale(nn.Module):
    """A learned factor for every channel of a branch; small at first, as in DINOv2, so that the shortcut leads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., W) for (..., W)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm encoder block: attention, then an MLP, each beside a shortcut (equations 2 and 3 of the paper)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width or 4 * config.width, config.mlp)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.drop_path = drop_path
        self._plain = not config.layer_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W)."""
        if self._plain and not (self.training and self.drop_path):  # nothing between a branch and its shortcut
            x = self.attn(self.norm1(x), x)
            return self.mlp(self.norm2(x), x)  # type: ignore[no-any-return]
        x = x + self._drop(self.ls1(self.attn(self.norm1(x))))
        return self._after_attention(x)

    def first_tokens(self, x: Tensor, count: int, bias: Tensor | None = None) -> Tensor:
        """Return (B, count, W): the first tokens of `forward`, at about a sixth of its cost for one."""
        attended = self.attn.first_tokens(self.norm1(x), count, bias)
        return self._after_attention(x[:, :count] + self._drop(self.ls1(attended)))

    def with_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` gives and the (B, heads, T, T) attention weights."""
        attended, weights = self.attn.with_weights(self.norm1(x))
        return self._after_attention(x + self._drop(self.ls1(attended))), weights

    def merging(self, state: tokens.Merged, count: int, *, prefix: int) -> tokens.Merged:
        """Attend, merge `count` tokens away, and go on with those that are left."""
        attended, keys = self.attn.with_keys(self.norm1(state.tokens), state.attention_bias)
        attended = state.tokens + self.ls1(attended)
        merged = tokens.merge(tokens.Merged(attended, state.sizes, state.homes), keys, count, prefix=prefix)
        return tokens.Merged(self._after_attention(merged.tokens), merged.sizes, merged.homes)

    def _after_attention(self, x: Tensor) -> Tensor:
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1.0 - self.drop_path)  # the expectation stays what it was
