"""What a model looks at: attention, the distance it spans, what two images share, and pictures of all three."""

from vitembed.explain.attention import (
    FUSIONS,
    Fusion,
    attention_distances,
    attention_maps,
    attention_rollout,
    mean_attention_distance,
    patch_distances,
)
from vitembed.explain.pairs import Shared, explain_pair
from vitembed.explain.pictures import Explanation, explain

__all__ = [
    "FUSIONS",
    "Explanation",
    "Fusion",
    "Shared",
    "attention_distances",
    "attention_maps",
    "attention_rollout",
    "explain",
    "explain_pair",
    "mean_attention_distance",
    "patch_distances",
]
