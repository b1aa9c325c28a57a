"""What is done to tokens between the layers: positions for another size, patches left out, tokens merged.

Letters in shape comments, as in `vitembed.vit.layers`: B images, T tokens, N patches, W width, d width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(positions: Tensor, before: tuple[int, int], after: tuple[int, int], *, prefix: int) -> Tensor:
    """Return position embeddings for another grid of patches, by bicubic interpolation with antialiasing.

    Args:
        positions: (1, prefix + rows x columns, W).
        before: (rows, columns) of the grid they are for.
        after: (rows, columns) of the grid that is wanted.
        prefix: how many at the front belong to no patch (CLS, distillation token); they are left as they are.

    Returns:
        (1, prefix + rows x columns of `after`, W) of the same type.
    """
    if before == after:
        return positions
    kept, grid = positions[:, :prefix], positions[:, prefix:]
    image = grid.float().reshape(1, *before, -1).permute(0, 3, 1, 2)  # (1, N, W) -> (1, W, rows, columns)
    image = F.interpolate(image, size=after, mode="bicubic", antialias=True, align_corners=False)
    resampled = image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)  # -> (1, N', W)
    return torch.cat([kept, resampled], dim=1)


def drop_patches(tokens: Tensor, share: float, *, prefix: int) -> Tensor:
    """Leave a random share of each image's patches out.

    PatchDropout (Liu et al. 2022, arXiv:2208.07220): positions are added before, so that what stays keeps its place.

    Args:
        tokens: (B, prefix + N, W).
        share: of the N patches, in [0, 1); at least one is kept.
        prefix: tokens at the front that always stay.

    Returns:
        (B, prefix + kept, W), the kept patches in their order.
    """
    batch, count = tokens.shape[0], tokens.shape[1] - prefix
    keep = max(1, round(count * (1.0 - share)))
    chosen = torch.rand(batch, count, device=tokens.device).topk(keep, dim=1).indices.sort(dim=1).values  # (B, kept)
    patches = tokens[:, prefix:].gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :prefix], patches], dim=1)


@dataclass(frozen=True)
class Merged:
    """Tokens of which some stand for several patches.

    Attributes:
        tokens: (B, T, W).
        sizes: (B, T) float, how many patches a token stands for; 1 for those of the prefix.
        homes: (B, N) int64, at which of the T tokens each patch of the image is found.
    """

    tokens: Tensor
    sizes: Tensor
    homes: Tensor

    @classmethod
    def start(cls, tokens: Tensor, *, prefix: int) -> "Merged":
        """Return (B, T, W) tokens of which each patch still stands for itself."""
        batch, count, _ = tokens.shape
        homes = torch.arange(prefix, count, device=tokens.device).expand(batch, -1)
        return cls(tokens, torch.ones(batch, count, device=tokens.device, dtype=tokens.dtype), homes)

    @property
    def attention_bias(self) -> Tensor:
        """Return (B, 1, 1, T) to add to attention logits: a token that stands for n patches counts n times.

        Proportional attention, equation 1 of the paper.
        """
        return self.sizes.log()[:, None, None, :]

    @property
    def unmerged(self) -> Tensor:
        """Return (B, N, W): for each patch of the image the token that it went into."""
        return self.tokens.gather(1, _wide(self.homes, self.tokens.shape[2]))


def merge(state: Merged, keys: Tensor, count: int, *, prefix: int) -> Merged:
    """Merge the `count` most alike pairs of patches.

    Bipartite soft matching of token merging (Bolya et al. 2022, arXiv:2210.09461, section 3): the patches are dealt
    into two sets by turns; each of the first proposes to the one of the second whose key has the highest cosine to its
    own; the `count` best proposals are accepted and become means, weighted with how many patches each stands for.

    Args:
        state: the tokens.
        keys: (B, T, d), what alikeness is measured by: the keys of the attention before, averaged over the heads.
        count: how many tokens to do away with; at most half of the patches go.
        prefix: tokens at the front that are never merged.
    """
    tokens, sizes = state.tokens, state.sizes
    batch, total, width = tokens.shape
    count = min(count, (total - prefix) // 2)
    if count <= 0:
        return state
    metric = F.normalize(keys[:, prefix:], dim=-1)
    first = torch.arange(prefix, total, 2, device=tokens.device)  # places of the first set, n1 of them
    second = torch.arange(prefix + 1, total, 2, device=tokens.device)  # and of the second, n2
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, n1, n2)
    best, partner = similarity.max(dim=-1)  # (B, n1)
    order = best.argsort(dim=-1, descending=True)
    leaving = order[:, :count]  # (B, count), numbers within the first set
    staying = order[:, count:].sort(dim=-1).values  # (B, n1 - count)
    target = partner.gather(1, leaving)  # (B, count), numbers within the second set

    weighted = tokens * sizes[:, :, None]
    sums, weights = weighted[:, second], sizes[:, second]
    sums = sums.scatter_add(1, _wide(target, width), weighted[:, first].gather(1, _wide(leaving, width)))
    weights = weights.scatter_add(1, target, sizes[:, first].gather(1, leaving))
    kept = tokens[:, first].gather(1, _wide(staying, width))
    new_tokens = torch.cat([tokens[:, :prefix], kept, sums / weights[:, :, None]], dim=1)
    new_sizes = torch.cat([sizes[:, :prefix], sizes[:, first].gather(1, staying), weights], dim=1)

    # Where each of the old tokens is found now.
    stay, pair = staying.shape[1], second.numel()
    now = torch.arange(total, device=tokens.device).expand(batch, -1).clone()  # the prefix stays in place
    now[:, second] = prefix + stay + torch.arange(pair, device=tokens.device)
    now.scatter_(1, first[staying], (prefix + torch.arange(stay, device=tokens.device)).expand(batch, -1))
    now.scatter_(1, first[leaving], prefix + stay + target)
    return Merged(new_tokens, new_sizes, now.gather(1, state.homes))


def _wide(index: Tensor, width: int) -> Tensor:
    """Return (B, n) places as (B, n, W), as gather and scatter want them."""
    return index[:, :, None].expand(-1, -1, width)
