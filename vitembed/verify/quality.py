"""The gate before a verification of ink: can this image be judged at all, and is it a copy of a reference?

Nobody writes the same signature twice: ink that lies almost exactly on a reference's was photocopied, pasted or traced,
however well it matches. The gate is for drawings and signatures on a ground; photographs have no ink, and whoever calls
it knows which they are (`reads_ink`).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vitembed.errors import ConfigError, ImageError
from vitembed.images import ImageSource, load_image
from vitembed.ink import clean_scan, find_ink, ink_of_cleaned
from vitembed.preprocess import Preprocess

ProblemKind = Literal["blank", "little ink", "too small", "near copy", "same file"]

# Widths of the pen: a dot has 3, a dash of five widths 6 to 8, the shortest of 1,149 signatures 165; of Omniglot's
# letters 1 in 80 has less than this.
LEAST_STROKE = 10.0

# Pixels: the equal error rate of comparing drawings by overlap (28 % for signatures 47 to 350 pixels high, skilled
# forgeries) is 29 % for questioned ones reduced to 20 pixels, 35 % at 16 and 43 % at 12.
LEAST_HEIGHT = 20

# The highest overlap of 4,321 pairs of genuine signatures of one writer (34 writers) was 0.871, half of them lay below
# 0.51, and the highest of 832 pairs of a skilled forgery and a genuine one was 0.713. The lowest of 197 simulated
# photocopies (turned by 1 to 3.5 degrees, scaled by 3 %, noisy, JPEG, paler, darker, photographed) was 0.961; that of
# 36 at half the size was 0.943.
# How close a tracing by hand comes has not been measured.
COPY_OVERLAP = 0.92

_SIDE = 256  # of the square on which ink is compared, pixels
_RADIUS = 52.0  # root mean square distance of the ink from its centre there: nearly all of it fits in
_ANGLES = range(-4, 5)  # degrees by which a copy may lie askew
_SHIFT = 5  # pixels by which the centres of mass of a copy and its original may differ there

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """One reason not to trust a verification of an image.

    Attributes:
        kind: "blank" (no ink), "little ink" (a dot or a dash), "too small" (too few pixels), "near copy" (lies almost
            exactly on a reference), "same file" (has a reference's very pixels).
        text: one sentence for whoever handed the image in.
        reference: which reference it is about, counted from 0; None for the image alone.
    """

    kind: ProblemKind
    text: str
    reference: int | None = None


@dataclass(frozen=True)
class Quality:
    """What the gate found.

    Attributes:
        problems: none if the image is good.
        ink_share: ink's share of the image's pixels, in [0, 1].
        ink_height: height of the ink in pixels of the image.
        stroke_length: of all strokes together, in widths of the pen; a dot has 3.
        overlaps: for each reference, how exactly the inks lie on each other at the best small rotation and shift: the
            correlation of their drawings, 1 for the same ink, below 0.88 for two genuine signatures of one writer.
    """

    problems: tuple[Problem, ...]
    ink_share: float
    ink_height: int
    stroke_length: float
    overlaps: tuple[float, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def reads_ink(preprocess: Preprocess | None) -> bool:
    """Tell whether a model takes dark ink on a light ground, for which the quality of an image can be judged."""
    return preprocess is not None and (preprocess.scan or (preprocess.mode == "L" and preprocess.invert))


def require_ink(image: ImageSource, references: Sequence[ImageSource] = ()) -> "Quality":
    """Judge an image as `judge_quality` does, and refuse one without ink.

    Raises:
        ImageError: it is blank, or an image cannot be read.
    """
    quality = judge_quality(image, references)
    if any(problem.kind == "blank" for problem in quality.problems):
        name = str(image) if isinstance(image, str | os.PathLike) else "the image"
        raise ImageError(
            name, "is blank: no ink can be told from its ground; hand in the right image, or scan it again"
        )
    return quality


def judge_quality(image: ImageSource, references: Sequence[ImageSource] = ()) -> Quality:
    """Judge an image of ink before it is verified or enrolled.

    Args:
        image: a path, PIL image or array of a signature or drawing, on any ground.
        references: those it will be compared with; copies of them are suspicious.

    Raises:
        ConfigError: if `references` is one image and not a list of them.
        ImageError: if the image or a reference cannot be read.
    """
    if isinstance(references, str | os.PathLike | Image.Image | np.ndarray):
        raise ConfigError(f"references must be a list of images; got one {type(references).__name__}: put it in a list")
    picture = load_image(image)
    others = [load_image(reference) for reference in references]
    page = find_ink(picture)
    ink = _ink_alone(picture)
    length = _stroke_length(ink)
    poses = _poses(ink, _ANGLES)
    overlaps = tuple(_overlap(poses, _ink_alone(other)) for other in others)
    problems = _problems_of_ink(page.height, length)
    for number, (other, overlap) in enumerate(zip(others, overlaps, strict=True)):
        same = other.mode == picture.mode and other.size == picture.size and other.tobytes() == picture.tobytes()
        if same:
            text = f"This is the very image of reference {number + 1}: hand in the image to be checked."
            problems.append(Problem("same file", text, number))
        elif overlap > COPY_OVERLAP:
            text = (
                f"The ink lies almost exactly on that of reference {number + 1}, as no second signature does: "
                "it may be photocopied, pasted or traced. Ask for the original."
            )
            problems.append(Problem("near copy", text, number))
    return Quality(tuple(problems), page.share, page.height, length, overlaps)


def _problems_of_ink(height: int, length: float) -> list[Problem]:
    """Return what is wrong with the ink itself; `height` in pixels, `length` in widths of the pen."""
    if height == 0:
        return [Problem("blank", "There is no ink on this image: check that it is the right one, and scan it again.")]
    problems = []
    if length < LEAST_STROKE:
        text = "There is hardly any ink on this image, no more than a dot or a dash: scan the whole signature."
        problems.append(Problem("little ink", text))
    if height < LEAST_HEIGHT:
        text = f"The ink is only {height} pixels high, and {LEAST_HEIGHT} are needed: scan it larger."
        problems.append(Problem("too small", text))
    return problems


def _ink_alone(picture: Image.Image) -> Mask:
    """Return the ink's mask at its own scale, however small a part of its page it is."""
    return ink_of_cleaned(clean_scan(picture))


def _stroke_length(ink: Mask) -> float:
    """Return the length of all strokes in widths of the pen: of a line l long and w wide, l / w.

    Its outline is about 2 l and its area l w, so that it is outline squared / (4 area); pi for a disc. Pixels go round
    corners: the outline is told from how often lines in four directions cross it (Crofton's formula).
    """
    area = int(ink.sum())
    if area == 0:
        return 0.0
    padded = np.pad(ink, 1)
    straight = int((padded[1:] != padded[:-1]).sum()) + int((padded[:, 1:] != padded[:, :-1]).sum())
    oblique = int((padded[1:, 1:] != padded[:-1, :-1]).sum()) + int((padded[1:, :-1] != padded[:-1, 1:]).sum())
    outline = math.pi / 8 * (straight + oblique / math.sqrt(2))
    return outline**2 / (4 * area)


def _poses(ink: Mask, angles: Sequence[int]) -> NDArray[np.complex64] | None:
    """Return the spectra of ink drawn at one size around its centre of mass, turned by some degrees each.

    Returns:
        (angles, rows, columns); None where there is no ink.
    """
    ys, xs = np.nonzero(ink)
    if len(xs) == 0:
        return None
    y, x = ys.mean() + 0.5, xs.mean() + 0.5
    radius = math.sqrt(((xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2).mean())
    height, width = ink.shape
    times = _RADIUS / max(radius, 0.5)
    size = (max(1, round(times * width)), max(1, round(times * height)))
    drawn = Image.fromarray(ink.view(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    centre = (x * size[0] / width, y * size[1] / height)
    return np.stack([np.fft.rfft2(_normalised(_turned(drawn, centre, angle))) for angle in angles])


def _turned(drawn: Image.Image, centre: tuple[float, float], degrees: float) -> Image.Image:
    """Return a square of `_SIDE` around a place (x, y), turned by some degrees; beyond the drawing there is no ink."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    half = _SIDE / 2
    affine = (cos, sin, centre[0] - (cos + sin) * half, -sin, cos, centre[1] - (cos - sin) * half)
    return drawn.transform((_SIDE, _SIDE), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


def _normalised(drawn: Image.Image) -> NDArray[np.float32]:
    """Return a drawing, a little blurred as pens and scanners differ, with mean 0 and norm 1."""
    values = np.asarray(drawn.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    values = values - values.mean()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-6), dtype=np.float32)


def _overlap(poses: NDArray[np.complex64] | None, ink: Mask) -> float:
    """Return the highest correlation, in [0, 1], of ink with any pose of other ink; 0 if either has none."""
    upright = _poses(ink, (0,))
    if poses is None or upright is None:
        return 0.0
    correlations = np.fft.irfft2(poses * upright.conj(), s=(_SIDE, _SIDE))  # (angles, rows, columns) of shifts
    near = np.arange(-_SHIFT, _SHIFT + 1)
    return float(np.clip(correlations[:, near[:, None], near[None, :]].max(), 0.0, 1.0))
