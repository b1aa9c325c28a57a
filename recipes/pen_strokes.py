"""Strokes of a pen that nobody held: plans of what is drawn, how they vary, and the images that they become.

For data that is generated, where there is too little of what people drew: a plan stands for a character or a signature,
and each image is the plan disturbed by chance and drawn. The parting of a plan and its execution is that of Ferrer,
Diaz-Cabrera and Morales 2015 ("Static Signature Synthesis: A Neuromotor Inspired Approach for Biometrics", IEEE TPAMI);
this is far simpler, without dynamics of the hand, and none of its sizes were fitted to a data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Stroke = NDArray[np.float64]  # (points, 2) that the pen passes, x to the right and y up; a small letter is 1 high, and
# a character some 2

MARGIN = 6  # pixels around the ink


@dataclass(frozen=True)
class Disturbance:
    """How much a plan changes: standard deviations, in heights of a small letter unless it says otherwise.

    Attributes:
        point: of each point by itself.
        reach: of each point, for every height beyond one to the farther of its neighbours: flourishes vary more.
        warp: of the heights of each of the three waves that displace the whole smoothly.
        turn: of the angle of the whole, in radians.
        stretch: of the logarithm of width and of height.
        slant: of the shear.
        place: of each stroke as a whole.
    """

    point: float
    reach: float
    warp: float
    turn: float
    stretch: float
    slant: float
    place: float

    def __mul__(self, factor: float) -> "Disturbance":
        """Return the same in all, more or less of it."""
        return Disturbance(*(factor * deviation for deviation in vars(self).values()))


def disturbed(plan: Sequence[Stroke], by: Disturbance, rng: np.random.Generator) -> list[Stroke]:
    """Return a plan changed at random."""
    stretch = np.diag(np.exp(rng.normal(0, by.stretch, 2)))
    shape = turned(rng.normal(0, by.turn)) @ np.array([[1, rng.normal(0, by.slant)], [0, 1]]) @ stretch
    everything = np.concatenate(plan)
    corner, size = everything.min(axis=0), np.ptp(everything, axis=0).max()
    waves, phases, heights = rng.normal(0, 1.2, (2, 3)), rng.uniform(0, 2 * np.pi, 3), rng.normal(0, by.warp, (3, 2))
    changed = []
    for stroke in plan:
        smooth = np.sin(np.pi * (stroke - corner) / size @ waves + phases) @ heights
        gaps = np.linalg.norm(np.diff(stroke, axis=0), axis=1)
        longer = np.maximum(np.maximum(np.append(0, gaps), np.append(gaps, 0)) - 1, 0)
        own = rng.normal(0, 1, stroke.shape) * (by.point + by.reach * longer[:, None])
        changed.append((stroke + smooth + own + rng.normal(0, by.place, 2)) @ shape.T)
    return changed


def drawing(
    strokes: Sequence[Stroke],
    pen: float,
    rng: np.random.Generator,
    *,
    side: int,
    tremor: float = 0.0,
    samples: int = 12,
) -> Image.Image:
    """Draw strokes in black on white.

    Args:
        strokes: what is drawn, as large as fits.
        pen: its width in pixels.
        rng: for the tremor.
        side: pixels of the longer side of the image, to one.
        tremor: standard deviation of the points of the curves, in heights of a small letter.
        samples: points of a curve from one point of a stroke to the next.
    """
    curves = [curve(stroke, samples) for stroke in strokes]
    if tremor:
        curves = [points + rng.normal(0, tremor, points.shape) for points in curves]
    everything = np.concatenate(curves)
    corner, extent = everything.min(axis=0), np.ptp(everything, axis=0)
    fine = 2  # pixels of the drawing to one of the image, so that edges are smooth
    margin, width = fine * MARGIN, max(2, round(fine * pen))
    scale = (fine * side - 2 * margin) / extent.max()
    w, h = np.ceil(scale * extent).astype(int) + 2 * margin
    page = Image.new("L", (w, h), 255)
    draw = ImageDraw.Draw(page)
    for points in curves:
        x, y = (scale * (points - corner) + margin).T
        xy = np.stack([x, h - y], axis=1)
        draw.line([tuple(at) for at in xy], fill=0, width=width, joint="curve")
        for at in (xy[0], xy[-1]):
            draw.ellipse([*(at - width / 2), *(at + width / 2)], fill=0)
    return page.reduce(fine)


def curve(stroke: Stroke, samples: int) -> Stroke:
    """Return points of a smooth curve through those of a stroke: a Catmull-Rom spline (Catmull and Rom 1974)."""
    if len(stroke) < 3:
        return stroke
    points = np.concatenate([2 * stroke[:1] - stroke[1:2], stroke, 2 * stroke[-1:] - stroke[-2:-1]])
    a, b, c, d = (points[at : at + len(stroke) - 1, None] for at in range(4))
    t = np.linspace(0, 1, samples, endpoint=False)[:, None]
    between = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([between.reshape(-1, 2), stroke[-1:]])


def turned(angle: float) -> NDArray[np.float64]:
    """Return the matrix that turns by an angle in radians."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
