"""The pictures of a decision: as the model was given them, all treated alike, and the map of a score over them.

A map covers what the network sees, which pre-processing cuts out of the picture or surrounds with padding; it is laid
where it belongs on the whole picture, so that nothing of what was handed in is hidden from the reviewer.
"""

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitembed.errors import ImageError, VectorError
from vitembed.images import ImageSource, load_image
from vitembed.plots import MATCH, NON_MATCH
from vitembed.preprocess import Preprocess
from vitembed.report import picture_data

STYLE = """
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.pair figure { margin: 0; min-width: 0; } .pair svg { display: block; width: 100%; background: #fff;
  border: 1px solid var(--line); border-radius: 4px; box-sizing: border-box; }
.pair figcaption, .small { overflow-wrap: anywhere; }
.references { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.references figure { margin: 0; font-size: .8rem; } .references img, .references .missing { width: 100%; height: 5rem;
  object-fit: contain; background: #fff; border: 1px solid var(--line); border-radius: 4px; box-sizing: border-box; }
.references .missing { background: none; margin: 0; }
.pair h2 { margin: 0 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em; border: 1px solid #0005; }
"""

REFERENCES_SHOWN = 24
"""References with a picture on the page: those with the highest scores; the number of the others is said."""

_SIDE = 960  # pixels: twice what a picture measures beside another, for screens of high density
_TALLEST, _WIDEST = 0.9, 3.0  # width / height of the frames; what does not fit is centred on white
_REFERENCE_SIDE = 320  # pixels
_STRONGEST = 0.75  # opacity
_WEAKEST = 0.06  # below this a patch is left out: nobody sees it


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the page shows it.

    Attributes:
        name: what it is called.
        image: upright, and of a scan the cleaned ink.
    """

    name: str
    image: Image.Image

    @classmethod
    def read(cls, source: ImageSource, name: str, preprocess: Preprocess | None) -> "Picture":
        """Read an image, and clean it where pre-processing does.

        Raises:
            ImageError: it cannot be read.
        """
        image = load_image(source)
        return cls(name, image if preprocess is None else preprocess.cleaned(image))


def name_of(source: ImageSource, number: int) -> str:
    """Return what an image is called: its file's name, or its place in the list, from 1 on."""
    return Path(source).name if isinstance(source, str | os.PathLike) else f"image {number}"


def draw_pair(pictures: Sequence[Picture], beside: str = "", heading: str = "") -> str:
    """Return the pictures side by side in frames of one shape, each with its name below.

    Args:
        pictures: one or two.
        beside: HTML for the place beside a single picture.
        heading: of that.
    """
    shape = _frame(pictures)
    frames = []
    for number, picture in enumerate(pictures, 1):
        size = f"width={picture.image.width} height={picture.image.height}"
        drawn = f'<image id=picture-{number} href="{_data(picture.image, _SIDE)}" {size} />'
        frames.append(_figure(picture, shape, drawn, picture.name))
    if beside:
        frames.append(f"<section><h2>{html.escape(heading)}</h2>{beside}</section>")
    return f"<div class=pair>{''.join(frames)}</div>"


def draw_references(
    sources: Sequence[ImageSource | None], scores: Sequence[float], preprocess: Preprocess | None, digits: int = 3
) -> str:
    """Return the references as small pictures with their scores, the closest first; what cannot be read says why.

    Args:
        sources: the references; None for one whose image is not kept.
        scores: for each, or empty: then they keep their order.
        preprocess: as of `Picture.read`.
        digits: decimals of the scores.
    """
    order = sorted(range(len(sources)), key=lambda at: -scores[at]) if scores else range(len(sources))
    figures = []
    for at in order[:REFERENCES_SHOWN]:
        source = sources[at]
        title = f"Reference {at + 1}"  # as warnings call it
        name = title if source is None else name_of(source, at + 1)
        score = f": <b>{scores[at]:.{digits}f}</b>" if scores else ""
        called = "" if source is None else f"<br><bdi>{html.escape(name)}</bdi>"
        caption = f"<figcaption>{title}{score}{called}</figcaption>"
        figures.append(f"<figure>{_reference(source, name, preprocess)}{caption}</figure>")
    more = len(sources) - len(figures)
    rest = f"<p class=faint>and {more:,} more</p>" if more else ""
    return f"<div class=references>{''.join(figures)}</div>{rest}"


def _reference(source: ImageSource | None, name: str, preprocess: Preprocess | None) -> str:
    try:
        if source is None:
            raise ImageError(name, "its image is not kept")
        image = Picture.read(source, name, preprocess).image
    except ImageError as error:
        return f"<p class=missing>{html.escape(error.reason)}</p>"
    return f'<img src="{_data(image, _REFERENCE_SIDE)}" alt="{html.escape(name)}">'


def draw_maps(pictures: Sequence[Picture], maps: Sequence[NDArray[np.float64]], preprocess: Preprocess | None) -> str:
    """Return pictures that `draw_pair` has drawn on the same page once more, paler, under the maps of their score.

    Args:
        pictures: two.
        maps: for each (rows, columns): what each patch adds to the score. Both are drawn on one scale.
        preprocess: tells where the patches lie on the picture; None lays them over the whole of it.

    Raises:
        VectorError: a map has another shape, or is not finite.
    """
    values = [_checked(values) for values in maps]
    # One patch that stands out would leave all others pale.
    limit = float(np.quantile(np.abs(np.concatenate([each.ravel() for each in values])), 0.97)) or 1.0
    shape = _frame(pictures)
    frames = []
    for number, (picture, heat) in enumerate(zip(pictures, values, strict=True), 1):
        size = picture.image.size
        under = f"<use href=#picture-{number} opacity=.55 />"
        drawn = under + _patches(heat / limit, seen_region(preprocess, size), size)
        frames.append(_figure(picture, shape, drawn, f"{picture.name} under the map of its share of the score"))
    return f"<div class=pair>{''.join(frames)}</div>"


def map_legend(subject: str) -> str:
    """Return the line that says what the colours of `draw_maps` mean, with the hatching that they use.

    Args:
        subject: what the map must not be taken for a finding about: the handwriting, say.
    """
    hatch = (
        "<pattern id=lowers width=6 height=6 patternUnits=userSpaceOnUse patternTransform=rotate(45)>"
        f'<rect width=6 height=6 fill="{NON_MATCH}" fill-opacity=.45 /><rect width=3 height=6 fill="{NON_MATCH}" />'
        "</pattern>"
    )
    raises = f'<svg class=key aria-hidden=true><rect width="100%" height="100%" fill="{MATCH}" /></svg>'
    lowers = (
        f"<svg class=key aria-hidden=true><defs>{hatch}</defs>"
        '<rect width="100%" height="100%" fill="url(#lowers)" /></svg>'
    )
    colours = f"{raises} raises the score, {lowers} (hatched) lowers it; the stronger the colour, the more."
    return f"<p class=faint>{colours} This explains the score; it is no finding about {html.escape(subject)}.</p>"


def seen_region(preprocess: Preprocess | None, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return what the network sees of a picture of (width, height) pixels: left, top, width, height in its pixels.

    With padding it reaches beyond the picture.

    >>> seen_region(Preprocess((100, 100)), (400, 200))
    (100.0, 0.0, 200.0, 200.0)
    """
    width, height = map(float, size)
    if preprocess is None:
        return 0.0, 0.0, width, height
    rows, columns = preprocess.size
    across, down = width * preprocess.crop_share / columns, height * preprocess.crop_share / rows
    if preprocess.resize != "squash":  # source pixels per pixel of the network, in both directions
        across = down = max(across, down) if preprocess.resize == "pad" else min(across, down)
    seen = across * columns, down * rows
    return (width - seen[0]) / 2, (height - seen[1]) / 2, *seen


def _checked(values: NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise VectorError(f"a map of a score must be finite numbers of shape (rows, columns); got {array.shape}")
    return array


def _patches(strength: NDArray[np.float64], region: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Return a rectangle for each patch on the picture; strength 1 and more is drawn strongest, below 0 hatched."""
    left, top, width, height = region
    rows, columns = strength.shape
    across = np.clip(left + width / columns * np.arange(columns + 1), 0, size[0])  # padding is no part of the picture
    down = np.clip(top + height / rows * np.arange(rows + 1), 0, size[1])
    parts = []
    for row, column in np.argwhere(np.abs(strength) > _WEAKEST):
        wide, high = across[column + 1] - across[column], down[row + 1] - down[row]
        if min(wide, high) <= 0:
            continue
        value = strength[row, column]
        fill = MATCH if value > 0 else "url(#lowers)"
        place = f'x="{across[column]:.1f}" y="{down[row]:.1f}" width="{wide:.1f}" height="{high:.1f}"'
        parts.append(f'<rect {place} fill="{fill}" fill-opacity={_STRONGEST * min(1, abs(value)):.2f} />')
    return "".join(parts)


def _frame(pictures: Sequence[Picture]) -> float:
    """Return the shape of the frames of all pictures, width / height: that of the tallest, within limits."""
    tallest = min(picture.image.width / picture.image.height for picture in pictures)
    return math.exp(np.clip(math.log(tallest), math.log(_TALLEST), math.log(_WIDEST)))


def _figure(picture: Picture, shape: float, drawn: str, described: str) -> str:
    width, height = picture.image.size
    view = f'viewBox="0 0 {width} {height}" style="aspect-ratio: {shape:.3f}"'
    caption = f"<figcaption><bdi>{html.escape(picture.name)}</bdi></figcaption>"
    return f'<figure><svg {view} role=img aria-label="{html.escape(described)}">{drawn}</svg>{caption}</figure>'


def _data(image: Image.Image, side: int) -> str:
    return picture_data(image, min(side, max(image.size)))  # what is small the reader's screen enlarges
