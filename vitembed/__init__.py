"""Train a Vision Transformer to embed images, index the embeddings, and decide whether two images match.

The public names load when first used, so that `import vitembed` stays light: torch and FAISS are not imported until
something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitembed.embedder import Embedder as Embedder
    from vitembed.errors import VitembedError as VitembedError
    from vitembed.index import Hit as Hit
    from vitembed.index import Index as Index
    from vitembed.index import sync as sync
    from vitembed.preprocess import Preprocess as Preprocess
    from vitembed.training import Augment as Augment
    from vitembed.training import ContrastiveLoss as ContrastiveLoss
    from vitembed.training import ImageDataset as ImageDataset
    from vitembed.training import TrainConfig as TrainConfig
    from vitembed.training import TripletLoss as TripletLoss
    from vitembed.training import train as train
    from vitembed.verify import Decision as Decision
    from vitembed.verify import Pairs as Pairs
    from vitembed.verify import Verifier as Verifier
    from vitembed.vit import ViT as ViT
    from vitembed.vit import ViTConfig as ViTConfig

__version__ = "0.1.0"

# Where each public name lives: the one list behind `__all__`, `dir()` and the lazy imports.
_HOME = {
    "Augment": "vitembed.training",
    "ContrastiveLoss": "vitembed.training",
    "Decision": "vitembed.verify",
    "Embedder": "vitembed.embedder",
    "Hit": "vitembed.index",
    "ImageDataset": "vitembed.training",
    "Index": "vitembed.index",
    "Pairs": "vitembed.verify",
    "Preprocess": "vitembed.preprocess",
    "TrainConfig": "vitembed.training",
    "TripletLoss": "vitembed.training",
    "Verifier": "vitembed.verify",
    "ViT": "vitembed.vit",
    "ViTConfig": "vitembed.vit",
    "VitembedError": "vitembed.errors",
    "sync": "vitembed.index",
    "train": "vitembed.training",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'vitembed' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
