"""Images turned by quarter turns when they are fetched."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vitembed.images import ImageSource, load_image
from vitembed.training.data.lazy import LazyImages

_TRANSPOSE = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class TurnedImages(LazyImages):
    """Images of another sequence, each turned by a multiple of 90 degrees; no pixel is made anew.

    Args:
        images: what is turned.
        turns: (position in `images`, degrees counter-clockwise: 0, 90, 180 or 270) of each image.
    """

    def __init__(self, images: Sequence[ImageSource], turns: Sequence[tuple[int, int]]) -> None:
        self._images = images
        self._turns = turns

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, position: Any) -> Any:
        source, degrees = self._turns[position]
        image = self._images[source]
        return load_image(image).transpose(_TRANSPOSE[degrees]) if degrees else image

    @property
    def sources(self) -> list[ImageSource]:
        """What each image is made of, before it is turned; empty where images are fetched from elsewhere."""
        return [] if isinstance(self._images, LazyImages) else [self._images[source] for source, _ in self._turns]

    def take(self, positions: Sequence[int]) -> "TurnedImages":
        """Return the images at some positions, in that order, without fetching them."""
        return TurnedImages(self._images, [self._turns[position] for position in positions])
