"""The pictures of `vitembed explain`, and the figures beside them: images in, PNG files and an `Explanation` out.

Maps are drawn over what the network sees, not over the whole file: pre-processing may have cut the sides off.
"""

import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitembed import plots
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, VitembedError
from vitembed.explain.attention import (
    Fusion,
    attention_distances,
    attention_maps,
    check_rollout_settings,
    patch_distances,
)
from vitembed.explain.pairs import Shared, explain_pair
from vitembed.files import atomic_write
from vitembed.images import ImageSource
from vitembed.preprocess import Preprocess

SIDE = 448  # of a drawn image in pixels, about
GAP = 8  # between the image and the image with its map
_LONGEST_STEM = 40  # characters of an image's name in a picture's name, so that two of them fit into a file name


@dataclass(frozen=True)
class Explanation:
    """What `explain` found and where it drew it.

    Attributes:
        images: the paths of the images.
        pictures: one file an image: what the network sees, and the same under its rollout.
        maps: (N, rows, columns), of `attention_maps`.
        shared: of the pair, if it was asked for.
        shared_picture: its file.
        distances: (depth, heads) of `attention_distances`, if they were asked for.
        distances_picture: their file.
    """

    images: tuple[Path, ...]
    pictures: tuple[Path, ...]
    maps: NDArray[np.float32]
    shared: Shared | None = None
    shared_picture: Path | None = None
    distances: NDArray[np.float64] | None = None
    distances_picture: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All pictures."""
        others = (self.shared_picture, self.distances_picture)
        return [*self.pictures, *(picture for picture in others if picture is not None)]

    def to_dict(self) -> dict[str, Any]:
        """Return figures and files as JSON types; maps and distances are lists of rows."""
        rollouts = [
            {
                "image": str(image),
                "picture": str(picture),
                "share of patches": float(heat.sum()),
                "strongest patch": [int(at) for at in np.unravel_index(heat.argmax(), heat.shape)],
                "map": heat.tolist(),
            }
            for image, picture, heat in zip(self.images, self.pictures, self.maps, strict=True)
        ]
        result: dict[str, Any] = {"rollouts": rollouts}
        if self.shared is not None:
            result["pair"] = {"picture": str(self.shared_picture), **self.shared.to_dict()}
        if self.distances is not None:
            pixels = [[None if np.isnan(value) else float(value) for value in row] for row in self.distances]
            result["distances"] = {"picture": str(self.distances_picture), "pixels": pixels}
        return result


def explain(
    model: Embedder,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    pair: bool = False,
    distances: bool = False,
) -> Explanation:
    """Draw what a model looks at, as PNG files in a folder.

    Each picture is named after its image; two images of one name get numbers, and no image that was passed is ever
    overwritten. Pictures of an earlier run are.

    Args:
        model: the embedder; its backbone is a `ViT`.
        images: paths of at least one image, or one path.
        out: the folder; it is made if it is missing.
        fusion: see `attention_rollout`.
        discard: see `attention_rollout`.
        pair: also draw what the two images share; there must be two.
        distances: also draw the mean attention distances over the images.

    Raises:
        ConfigError: for a setting that is unknown or out of range, a wrong number of images, or a backbone that is no
            `ViT`. Nothing is written then.
        ImageError: for an image that cannot be read. Nothing is written then.
        VitembedError: if the folder cannot be made or written.
    """
    paths = tuple(map(Path, [images] if isinstance(images, str | os.PathLike) else images))
    check_rollout_settings(fusion, discard)
    if not paths:
        raise ConfigError("explain takes at least one image; got none")
    if pair and len(paths) != 2:
        raise ConfigError(f"what a pair shares needs exactly two images; got {len(paths)}")
    maps = attention_maps(model, paths, fusion=fusion, discard=discard)
    shared = explain_pair(model, *paths) if pair else None
    reach = attention_distances(model, paths) if distances else None

    folder = _made(Path(out))
    taken = {path.name.casefold() for path in paths if path.resolve().parent == folder.resolve()}
    stems = [path.stem[:_LONGEST_STEM] for path in paths]
    pictures = tuple(_free(folder, stem, "rollout", taken) for stem in stems)
    for path, picture, heat in zip(paths, pictures, maps, strict=True):
        atomic_write(picture, draw_rollout(model.preprocess, path, heat))
    shared_picture = distances_picture = None
    if shared is not None:
        shared_picture = _free(folder, "-and-".join(stems), "shared", taken)
        atomic_write(shared_picture, draw_shared(model.preprocess, paths, shared))
    if reach is not None:
        distances_picture = _free(folder, "attention", "distances", taken)
        atomic_write(distances_picture, draw_distances(model, reach))
    return Explanation(paths, pictures, maps, shared, shared_picture, reach, distances_picture)


def draw_rollout(preprocess: Preprocess, image: ImageSource, heat: NDArray[np.float32]) -> bytes:
    """Draw what the network sees of an image, and beside it the same under a (rows, columns) map; a PNG."""
    seen = as_seen(preprocess, image)
    under = plots.overlay(seen, heat, side=max(seen.size))
    both = Image.new("RGB", (2 * seen.width + GAP, seen.height), "white")
    both.paste(seen, (0, 0))
    both.paste(under, (seen.width + GAP, 0))
    buffer = io.BytesIO()
    both.save(buffer, format="PNG")
    return buffer.getvalue()


def draw_shared(preprocess: Preprocess, pair: Sequence[Path], shared: Shared) -> bytes:
    """Draw two images with what they share; a PNG."""
    return plots.plot_shared(
        [as_seen(preprocess, path) for path in pair],
        [shared.first, shared.second],
        names=[_shortened(path.name) for path in pair],
        score=shared.score,
        residuals=[shared.residual_first, shared.residual_second],
    )


def draw_distances(model: Embedder, distances: NDArray[np.float64]) -> bytes:
    """Draw the mean attention distances of the heads by layer; a PNG."""
    config = model.network.vit.config
    everywhere = float(patch_distances(config.grid, config.patch_size).mean())
    return plots.plot_attention_distances(distances, everywhere=everywhere)


def as_seen(preprocess: Preprocess, image: ImageSource, *, side: int = SIDE) -> Image.Image:
    """Return the part of an image that pre-processing keeps, upright, not inverted, about `side` pixels long.

    Pre-processing for a whole multiple of the network's size cuts the same part out, with more pixels.

    Raises:
        ImageError: if the image cannot be read.
    """
    times = max(1, round(side / max(preprocess.size)))
    height, width = preprocess.size
    larger = dataclasses.replace(preprocess, size=(times * height, times * width))
    pixels = larger(image).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    pixels = 255 - pixels if preprocess.invert else pixels
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitembedError(f"cannot create the folder {folder}: {error.strerror}") from error
    return folder


def _free(folder: Path, stem: str, kind: str, taken: set[str]) -> Path:
    """Return a path that nobody has taken, and take it; names that differ by case alone are one name."""
    name, number = f"{stem}-{kind}.png", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{kind}-{number}.png"
    taken.add(name.casefold())
    return folder / name


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_STEM else f"{name[: _LONGEST_STEM - 3]}..."
