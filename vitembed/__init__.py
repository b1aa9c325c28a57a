"""Train a Vision Transformer to embed images, index the embeddings, and decide whether two images match.

The public names load when first used, so that `import vitembed` stays light: torch and FAISS are not imported until
something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitembed.embedder import Embedder as Embedder
    from vitembed.errors import VitembedError as VitembedError
    from vitembed.images import Preprocess as Preprocess
    from vitembed.vit import ViT as ViT
    from vitembed.vit import ViTConfig as ViTConfig

__version__ = "0.1.0"

# Where each public name lives: the one list behind `__all__`, `dir()` and the lazy imports.
_HOME = {
    "Embedder": "vitembed.embedder",
    "Preprocess": "vitembed.images",
    "ViT": "vitembed.vit",
    "ViTConfig": "vitembed.vit",
    "VitembedError": "vitembed.errors",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'vitembed' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
