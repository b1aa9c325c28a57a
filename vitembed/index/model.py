"""What `sync` and `migrate` ask of a model: the seam between the index and whatever embeds images.

An `vitembed.Embedder` is such a model. The protocols keep this side free of torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vitembed.errors import ImageError
from vitembed.index.vectors import FloatArray


class Batch(Protocol):
    """What `Model.stream` yields; see `vitembed.embedder.EncodedBatch`."""

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Positions (b,) of the embedded images in the input."""
        ...

    @property
    def vectors(self) -> FloatArray:
        """Their embeddings (b, dim), rows of unit length."""
        ...

    @property
    def failures(self) -> list[tuple[int, ImageError]]:
        """Positions and reasons of those that could not be read."""
        ...


class Model(Protocol):
    """What embeds images; an `vitembed.Embedder` is one."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells this model from every other."""
        ...

    def stream(self, images: Sequence[Any], *, batch_size: int = 64, workers: int | None = None) -> Iterator[Batch]:
        """Embed images lazily, in order."""
        ...
