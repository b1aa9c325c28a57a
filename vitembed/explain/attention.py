"""Attention weights made readable: how they flow from the embedding back to the patches, and how far they reach.

The functions of tensors take the attention weights of a batch; those of a model take images, run the network without
token merging (a merged token lies nowhere in the image) and hold no more images at a time than `MEMORY` allows, as the
weights of all blocks are kept: depth x B x heads x T^2 numbers. They compute in float32, whatever precision the model
embeds with. Tokens before the patches (CLS, distillation, registers) take part in the flow and never appear in a map.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.embedding_net import evaluating
from vitembed.errors import ConfigError, VectorError, unknown_name
from vitembed.images import ImageSource
from vitembed.vit import ViT

Fusion = Literal["mean", "max", "min"]
FUSIONS: tuple[str, ...] = get_args(Fusion)

MEMORY = 1 << 28  # bytes of attention weights that are held at a time
MOST_IMAGES = 64  # in one pass, however small their attention weights are


def attention_rollout(attentions: Sequence[Tensor], *, fusion: Fusion = "mean", discard: float = 0.0) -> Tensor:
    """Follow attention from the last block back to the tokens of the input.

    Attention rollout of Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020, arXiv:2005.00928,
    section 3): heads are fused, the identity is added for the shortcut, each row is divided by its sum, and the
    matrices of the blocks are multiplied. The paper takes the mean of the heads. Other fusions and the discarding are
    a custom of the field, defined here as follows: in each row by itself, that is for each token that attends, of the
    T - 1 attentions to other tokens than CLS (column 0) the floor(discard x (T - 1)) smallest become 0. The CLS column
    is never discarded, nor is a row ever emptied: at least one other attention stays, and the identity is added after.

    Args:
        attentions: one (B, heads, T, T) tensor a block, first to last, rows summing to one, token 0 the CLS token.
        fusion: "mean", "max" or "min" over the heads.
        discard: share of the weakest attentions of a row that are left out, in [0, 1).

    Returns:
        (B, T, T), at least 0, rows summing to one: row i says how much each input token counts for output token i.
        float64 for float64 attentions, else float32.

    Raises:
        VectorError: if there are no attentions, or they are of another shape.
        ConfigError: if the fusion is unknown or `discard` out of range.
    """
    _check_attentions(attentions)
    check_rollout_settings(fusion, discard)
    batch, _, tokens, _ = attentions[0].shape
    dtype = torch.promote_types(attentions[0].dtype, torch.float32)
    identity = torch.eye(tokens, device=attentions[0].device, dtype=dtype)
    rollout = identity.expand(batch, tokens, tokens)
    for attention in attentions:
        mixed = _without_weakest(_fuse(attention.to(dtype), fusion), discard) + identity  # (B, T, T)
        rollout = mixed / mixed.sum(dim=-1, keepdim=True) @ rollout
    return rollout


def mean_attention_distance(attentions: Sequence[Tensor], distances: Tensor, *, prefix_tokens: int = 1) -> Tensor:
    """Return how far each head looks, image by image: the ViT paper's receptive field of attention.

    Figure 7 (right) and appendix D.7 of Dosovitskiy et al. (2021, arXiv:2010.11929): the distance between the query's
    patch and the keys' patches, weighted by attention and averaged over the queries. A patch alone has a place, so that
    the tokens before the patches are left out, as queries and as keys; the attention that is left in a row is brought
    back to a sum of one. A query that has no attention left for patches has no distance and does not count.

    Args:
        attentions: one (B, heads, T, T) tensor a block, rows summing to one.
        distances: (N, N) pixels between patches, of `patch_distances`; N = T - prefix_tokens.
        prefix_tokens: tokens before the patches.

    Returns:
        (B, depth, heads) pixels; NaN where no query of a head has attention for patches.

    Raises:
        VectorError: if the attentions are of another shape, or do not fit the distances.
    """
    _check_attentions(attentions)
    tokens = attentions[0].shape[-1]
    if tuple(distances.shape) != (tokens - prefix_tokens,) * 2:
        raise VectorError(
            f"{tokens} tokens of which {prefix_tokens} are no patches need distances of shape "
            f"({tokens - prefix_tokens}, {tokens - prefix_tokens}); got {tuple(distances.shape)}"
        )
    layers = []
    for attention in attentions:
        weights = attention[:, :, prefix_tokens:, prefix_tokens:]  # (B, heads, N, N)
        dtype = torch.promote_types(weights.dtype, torch.float32)
        weights, apart = weights.to(dtype), distances.to(weights.device, dtype)
        mass = weights.sum(dim=-1)  # (B, heads, N)
        of_query = (weights * apart).sum(dim=-1) / mass
        layers.append(of_query.nanmean(dim=-1))  # 0 / 0 is NaN: a query without attention for patches
    return torch.stack(layers, dim=1)


def patch_distances(grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return the Euclidean distances in pixels between the centres of patches.

    >>> patch_distances((1, 3), 16).tolist()
    [[0.0, 16.0, 32.0], [16.0, 0.0, 16.0], [32.0, 16.0, 0.0]]

    Returns:
        (N, N) float64, patches counted row by row.
    """
    rows, columns = grid
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = patch_size * torch.stack([down.flatten(), across.flatten()], dim=1).double()  # (N, 2)
    return torch.cdist(centres, centres)


def attention_maps(
    model: Embedder,
    images: Sequence[ImageSource],
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    batch_size: int | None = None,
) -> NDArray[np.float32]:
    """Return how much each patch of each image counts for its embedding, by attention rollout.

    A model that merges tokens is explained without merging: as the network it is an approximation of.

    Args:
        model: the embedder; its backbone is a `ViT`.
        images: N images.
        fusion: see `attention_rollout`.
        discard: see `attention_rollout`.
        batch_size: images in one pass; None takes as many as keep the attention weights below `MEMORY`.

    Returns:
        (N, rows, columns) float32, at least 0; each map, with the share of the tokens that are no patches, sums to one.
        Where the embedding is the mean of the patches, the map is the mean of their maps.

    Raises:
        ImageError: for an image that cannot be read.
        ConfigError: if the backbone is no `ViT`, or a setting is unknown or out of range.
    """
    check_rollout_settings(fusion, discard)
    config = model.network.vit.config
    maps = [np.empty((0, *config.grid), dtype=np.float32)]
    for attentions in _attentions(model, images, batch_size):
        rollout = attention_rollout(attentions, fusion=fusion, discard=discard)  # (B, T, T)
        if model.network.pooling == "cls":
            of_embedding = rollout[:, 0]  # (B, T)
        else:
            of_embedding = rollout[:, config.prefix_tokens :].mean(dim=1)
        maps.append(of_embedding[:, config.prefix_tokens :].reshape(-1, *config.grid).float().cpu().numpy())
    return np.concatenate(maps)


def attention_distances(
    model: Embedder, images: Sequence[ImageSource], *, batch_size: int | None = None
) -> NDArray[np.float64]:
    """Return the mean attention distance of each head over images; see `mean_attention_distance`.

    A model that merges tokens is explained without merging.

    Args:
        model: the embedder; its backbone is a `ViT`.
        images: at least one image; the ViT paper takes 128.
        batch_size: images in one pass; None takes as many as keep the attention weights below `MEMORY`.

    Returns:
        (depth, heads) pixels of the image as the network sees it, after pre-processing.

    Raises:
        ImageError: for an image that cannot be read.
        ConfigError: if the backbone is no `ViT`, or there is no image.
    """
    config = model.network.vit.config
    if len(images) == 0:
        raise ConfigError("the mean attention distance is taken over images; got none")
    apart = patch_distances(config.grid, config.patch_size)
    batches = [
        mean_attention_distance(attentions, apart, prefix_tokens=config.prefix_tokens).cpu().double()
        for attentions in _attentions(model, images, batch_size)
    ]
    mean: NDArray[np.float64] = torch.cat(batches).nanmean(dim=0).numpy()  # (N, depth, heads) -> (depth, heads)
    return mean


def unmerged(vit: ViT) -> ViT:
    """Return the network without token merging; it shares the weights."""
    if not vit.config.merge:
        return vit
    twin = copy.copy(vit)
    twin.config = dataclasses.replace(vit.config, merge=0)
    return twin


def check_rollout_settings(fusion: str, discard: float) -> None:
    """Refuse what `attention_rollout` would, before any image is read.

    Raises:
        ConfigError: if the fusion is unknown or `discard` out of range.
    """
    if fusion not in FUSIONS:
        raise unknown_name("fusion", fusion, FUSIONS)
    if not 0.0 <= discard < 1.0:
        raise ConfigError(f"discard is the share of attentions left out, in [0, 1); got {discard!r}")


def _check_attentions(attentions: Sequence[Tensor]) -> None:
    shapes = {tuple(attention.shape) for attention in attentions}
    if len(shapes) != 1 or any(len(shape) != 4 or shape[-1] != shape[-2] for shape in shapes):
        raise VectorError(
            "attentions must be one (B, heads, T, T) tensor a block, as vit(images, attentions=True) returns them; "
            f"got {sorted(shapes)}"
        )


def _fuse(attention: Tensor, fusion: Fusion) -> Tensor:
    """Return (B, T, T) for (B, heads, T, T)."""
    if fusion == "mean":
        return attention.mean(dim=1)
    return attention.amax(dim=1) if fusion == "max" else attention.amin(dim=1)


def _without_weakest(attention: Tensor, discard: float) -> Tensor:
    """Set the weakest attentions of each row of (B, T, T) to 0; column 0, CLS, stays."""
    others = attention.shape[-1] - 1
    # A share such as 0.29 of 100 is 28.999999999999996 in binary; below 1, one of the others stays nevertheless.
    dropped = min(int(discard * others + 1e-9), others - 1)
    if dropped < 1:
        return attention
    weakest = attention[..., 1:].argsort(dim=-1, stable=True)[..., :dropped] + 1  # (B, T, dropped) columns
    return attention.scatter(-1, weakest, 0.0)


def _attentions(model: Embedder, images: Sequence[ImageSource], batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield the attention weights of all blocks, a few images at a time, with the network in evaluation mode."""
    network = model.network
    vit = unmerged(network.vit)
    config = vit.config
    if batch_size is None:
        tokens = config.prefix_tokens + config.patches
        batch_size = max(1, min(MOST_IMAGES, MEMORY // (4 * config.depth * config.heads * tokens**2)))
    elif batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    for start in range(0, len(images), batch_size):
        pixels = np.stack([model.preprocess(image) for image in images[start : start + batch_size]])
        with evaluating(network), torch.inference_mode():
            out = vit(network.normalise(torch.from_numpy(pixels).to(model.device)), attentions=True)
        assert out.attentions is not None
        yield out.attentions
