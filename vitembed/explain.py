"""What a model looks at: attention, drawn back onto the image."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import VectorError
from vitembed.images import ImageSource


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Follow attention from the last block back to the patches.

    Attention rollout of Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020, arXiv:2005.00928,
    section 3): heads are averaged, the identity is added for the shortcut, rows are brought back to a sum of one, and
    the blocks are multiplied.

    Args:
        attentions: one (B, heads, T, T) tensor a block, first to last, rows summing to one.

    Returns:
        (B, T, T), rows summing to one: row i says how much each input token counts for output token i.

    Raises:
        VectorError: if there are no attentions, or they are of another shape.
    """
    if not attentions or any(a.ndim != 4 or a.shape[-1] != a.shape[-2] for a in attentions):
        raise VectorError("attentions must be one (B, heads, T, T) tensor a block; call vit(images, attentions=True)")
    tokens = attentions[0].shape[-1]
    identity = torch.eye(tokens, device=attentions[0].device)
    rollout = identity.expand(attentions[0].shape[0], tokens, tokens)
    for attention in attentions:
        mixed = attention.float().mean(dim=1) + identity  # (B, heads, T, T) -> (B, T, T)
        rollout = mixed / mixed.sum(dim=-1, keepdim=True) @ rollout
    return rollout


def attention_maps(model: Embedder, images: Sequence[ImageSource]) -> NDArray[np.float32]:
    """Return how much each patch of each image counts for its embedding, by attention rollout.

    Args:
        model: the embedder.
        images: N images, held in memory together.

    Returns:
        (N, rows, columns) float32, at least 0; each map with the CLS token's share sums to one. Where the embedding is
        the mean of the patches, the map is the mean of their maps.

    Raises:
        ImageError: for an image that cannot be read.
    """
    network = model.network
    rows, columns = network.vit.config.grid
    if len(images) == 0:
        return np.empty((0, rows, columns), dtype=np.float32)
    pixels = torch.from_numpy(np.stack([model.preprocess(image) for image in images])).to(model.device)
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        out = network.vit(network.normalise(pixels), attentions=True)
        rollout = attention_rollout(out.attentions)  # (N, T, T)
        of_embedding = rollout[:, 0] if network.pooling == "cls" else rollout[:, 1:].mean(dim=1)  # (N, T)
    network.train(was_training)
    maps: NDArray[np.float32] = of_embedding[:, 1:].reshape(-1, rows, columns).cpu().numpy()
    return maps
