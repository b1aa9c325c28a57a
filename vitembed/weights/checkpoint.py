"""What a checkpoint of anybody's becomes: `Checkpoint`, a state in timm's names with all that must travel with it.

`Described` is the other half on the way there: what a configuration beside the weights says and no shape tells.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from vitembed.architecture import MlpKind, ViTConfig
from vitembed.preprocess import Preprocess

Pooling = Literal["cls", "mean"]


@dataclass(frozen=True)
class Described:
    """What a checkpoint's own configuration says; None where it says nothing.

    Attributes:
        heads: attention heads of a block.
        image_size: (height, width) in pixels that the position embeddings are for.
        norm_eps: what LayerNorm adds to the variance.
        mlp: the activation, "gelu" or "quick_gelu"; a gated MLP shows in the shapes.
        pooling: what the model's output is made of.
        preprocess: from images to pixels.
        licence: of the weights.
        notes: what a user should know, a sentence each.
    """

    heads: int | None = None
    image_size: tuple[int, int] | None = None
    norm_eps: float | None = None
    mlp: MlpKind | None = None
    pooling: Pooling = "cls"
    preprocess: Preprocess | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A ViT's weights, wherever they come from.

    Attributes:
        config: the architecture, at the image size that the position embeddings are for.
        state: float32 tensors on the processor, by the names of the parameters of `vitembed.vit.ViT`.
        projection: (D, W), the linear layer after pooling (CLIP's image projection); None for none.
        preprocess: from images to pixels, as the checkpoint's configuration states it. Its size may be another than
            `config.image_size` (the DINOv2 of transformers has positions for 518 pixels and takes 224): resample the
            positions then. None if the images are neither RGB nor grey.
        pooling: what an embedding is made of: "cls", or "mean" for the mean of the patch tokens.
        source: where the weights were found: a file, a folder, "torchvision:vit_b_16:IMAGENET1K_V1", a hub id.
        family: whose names the tensors had.
        revision: the commit of a hub model.
        licence: of the weights, if their configuration or card names one.
        notes: what was assumed or left out, a sentence each.
    """

    config: ViTConfig
    state: dict[str, Tensor] = field(repr=False)
    projection: Tensor | None = field(repr=False)
    preprocess: Preprocess | None
    pooling: Pooling
    source: str
    family: str
    revision: str | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, as JSON types."""
        known = {"source": self.source, "family": self.family, "revision": self.revision, "licence": self.licence}
        return {key: value for key, value in known.items() if value is not None} | {"notes": list(self.notes)}
