"""Classification, the ViT paper's own use: a head on the CLS token, cross-entropy, accuracy.

The head is the ViT's (`ViT.head`, and `ViT.pre_logits` where it has a hidden layer). The embedding is made from the CLS
token that the head reads, so a network that has learned to classify is encoded, indexed and matched like any other.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.training.config import Head
from vitembed.training.data.datasets import ImageDataset
from vitembed.vit import ViT


class CrossEntropyLoss(nn.Module):
    """Mean cross-entropy of logits and classes.

    With label smoothing e the target is 1 - e for the image's class, plus e / K for each of the K classes (Szegedy et
    al. 2016, arXiv:1512.00567, section 7).

    Args:
        label_smoothing: e, in [0, 1).

    Attributes:
        needs_logits: True: `train` gives such a loss (B, K) logits where others get embeddings, and attaches a head.

    Raises:
        ConfigError: the label smoothing is out of range.
    """

    needs_logits = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a float32 scalar; float64 for float64 logits.

        Args:
            logits: (B, K) of any floating type.
            labels: (B,) int64, in [0, K).

        Raises:
            VectorError: the shapes do not fit.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise VectorError(
                f"expected logits (B, classes) and labels (B,); got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)`."""
        return f"label_smoothing={self.label_smoothing}"


class ShuffledBatches:
    """Batches of all images in random order, each once an epoch; their sizes differ by one at most.

    A ragged last batch could be a single image, of which batch normalisation has no deviation to speak of.

    Args:
        count: number of images.
        batch_size: largest size of a batch.
        seed: epoch `e` is the same for the same seed, whatever came before.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self._seed, self.epoch]).permutation(self._count)
        return (batch.tolist() for batch in np.array_split(order, len(self)))


def check_classifiable(model: Embedder, train_set: ImageDataset, held_out: ImageDataset | None) -> None:
    """Refuse a classification that would train or measure something else.

    Raises:
        ConfigError: if the embedding is not the CLS token that the head reads, or the backbone is no ViT of ours.
        DataError: if a class is held out that there are no images of to train on.
    """
    network = model.network
    if not isinstance(network.backbone, ViT):
        raise ConfigError("a classification loss needs the head of a ViT of vitembed; another backbone stands in here")
    if network.pooling != "cls" or network.projection is not None:
        embedded, advice = "a projection of it", "leave dim out, take it off with model.replace(projection=False)"
        if network.pooling != "cls":
            embedded, advice = "the mean of the patches", "use pooling 'cls' without dim"
        raise ConfigError(
            f"a classification loss trains the CLS token, but this model embeds {embedded}: {advice}, or use a loss "
            "of embeddings such as triplet"
        )
    unknown = set(held_out.classes) - set(train_set.classes) if held_out else set()
    if unknown:
        raise DataError(
            f"the class {min(unknown)!r} is held out for validation and has no image to train on, so it cannot be "
            "named; every class needs images in both parts of the split"
        )


def fit_head(model: Embedder, classes: Sequence[str], kind: Head | None = None) -> None:
    """Give a network a classification head for these classes, in place; none for no classes.

    A head that answers for the same classes in the same order already stays as it is. Otherwise the whole head is
    replaced, as the paper does for fine-tuning (arXiv:2010.11929, appendix B.1.1): by a linear layer, zero-initialised,
    so that the first predictions are uniform; "mlp" puts a layer as wide as the network and tanh before it, the paper's
    head for pre-training (section 3.1).

    Args:
        model: the embedder; with classes, one that `check_classifiable` lets pass.
        classes: their names, in the order of the logits.
        kind: "linear" or "mlp"; a head of the other kind is replaced. None keeps either, and makes a linear one.
    """
    if not classes and not isinstance(model.network.backbone, ViT):
        return  # what stands in for the ViT has no head of ours
    vit = model.network.vit
    width = vit.config.width if classes and kind == "mlp" else 0
    config = dataclasses.replace(vit.config, num_classes=len(classes), head_width=width)
    is_of_kind = kind is None or vit.config == config
    if (
        is_of_kind
        and vit.config.num_classes == len(classes)
        and tuple(model.provenance.get("classes", ())) == tuple(classes)
    ):
        return
    # The head of the smallest network of its kind: how heads are made stays the ViT's own affair.
    side = config.patch_size
    donor = ViT(dataclasses.replace(config, image_size=(side, side), depth=1)).to(model.device)
    for name in ("pre_logits", "head", "head_dist"):
        setattr(vit, name, getattr(donor, name))
    vit.config = config
    # The names of a head that is gone must not stay behind, whatever becomes of the training.
    model.provenance = {key: value for key, value in model.provenance.items() if key != "classes"}


@torch.no_grad()
def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of (B, K) logits whose largest is that of the label, a float32 scalar."""
    return (logits.argmax(dim=1) == labels).float().mean()
