"""Images that stay where they are, inside a tar shard or an Arrow table, until they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self


class LazyImages(Sequence[Any]):
    """Images that are fetched one by one; a part of them is of the same kind, so that a split fetches nothing."""

    @abstractmethod
    def take(self, positions: Sequence[int]) -> Self:
        """Return the images at some positions, in that order, without fetching them."""
