"""Random changes to whole batches of training images, on whatever device they are on.

`Augment` says how much of each kind of change there may be, and draws; `vitembed.training.data.changes` carries it out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitembed.errors import ConfigError, unknown_name
from vitembed.training.data.changes import BEND_POINTS, Changes, blur_weights, colour_maps

# The largest value of each field that is a number; the smallest is 0.
_MOST = {
    "rotate": 180.0,
    "shear": 60.0,
    "translate": 1.0,
    "flip": 1.0,
    "light": 1.0,
    "elastic": 0.2,
    "stroke": 8.0,
    "saturation": 1.0,
    "hue": 180.0,
    "grey": 1.0,
    "blur": 0.1,
    "erase": 1.0,
}


@dataclass(frozen=True)
class Augment:
    """How much of each kind of random change there may be; what is drawn is drawn for each image by itself.

    Attributes:
        rotate: largest turn to either side, in degrees.
        scale: smallest and largest factor by which the picture grows; one above 1 crops.
        shear: largest shear to either side, in degrees.
        translate: largest shift to either side, as a share of the side.
        flip: probability of a mirror image, left to right.
        light: largest relative change of brightness and of contrast, 0.2 for 80 % to 120 %.
        padding: what comes in from outside, "border" repeats the edge, "reflection" mirrors the picture.
        elastic: standard deviation of random displacements, smooth in space, as a share of the side (Simard, Steinkraus
            and Platt 2003, "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis").
        stroke: by how many pixels bright strokes grow or shrink at most, on either side: morphological dilation or
            erosion by a square, parts of a pixel by a blend.
        saturation: largest relative change of the saturation of colours; grey images have none.
        hue: largest turn of the hue to either side, in degrees, in the plane of I and Q of YIQ.
        grey: probability that colours are taken out.
        blur: largest deviation of a Gaussian blur, as a share of the shorter side.
        erase: probability that a box is painted in the image's mean colour (Random Erasing, Zhong et al. 2017,
            arXiv:1708.04896; aspect ratios from 0.3 to 1 / 0.3, as there).
        erase_area: smallest and largest share of the image that such a box covers.

    Raises:
        ConfigError: if a value is out of range, or a range is no pair of numbers.
    """

    rotate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    translate: float = 0.0
    flip: float = 0.0
    light: float = 0.0
    padding: str = "border"
    elastic: float = 0.0
    stroke: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        for name in ("scale", "erase_area"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ConfigError(f"scale must be (smallest, largest), both above 0; got {self.scale}")
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie in [0, {most:g}]; got {getattr(self, name)}")
        if self.padding not in ("border", "reflection"):
            raise unknown_name("padding", self.padding, ("border", "reflection"))
        if not 0 < self.erase_area[0] <= self.erase_area[1] < 1:
            raise ConfigError(f"erase_area must be (smallest, largest), both in (0, 1); got {self.erase_area}")

    @classmethod
    def named(cls, name: str) -> "Augment":
        """Return a preset.

        "none"; "ink" for drawings and handwriting, bright on black, never mirrored; "photo" for photographs of
        things; "faces" for portraits that are aligned already. "ink-strong" also bends and thickens the strokes,
        "photo-strong" also changes colours, blurs and erases.

        Raises:
            ConfigError: if there is no such preset.
        """
        ink = {"rotate": 12, "scale": (0.85, 1.15), "shear": 12, "translate": 0.08}
        photo = {"rotate": 8, "scale": (1.0, 1.6), "shear": 4, "translate": 0.1, "flip": 0.5, "light": 0.3}
        colours = {"saturation": 0.4, "hue": 15, "grey": 0.1, "blur": 0.008, "erase": 0.25}
        face = {"rotate": 6, "scale": (0.95, 1.15), "translate": 0.03, "flip": 0.5, "light": 0.3}
        presets: dict[str, dict[str, Any]] = {
            "none": {},
            "ink": ink,
            "ink-strong": {**ink, "elastic": 0.02, "stroke": 0.5},
            "photo": {**photo, "padding": "reflection"},
            "photo-strong": {**photo, "padding": "reflection", **colours},
            "faces": {**face, "saturation": 0.2, "grey": 0.1, "blur": 0.01, "erase": 0.25},
        }
        if name not in presets:
            raise unknown_name("augmentation", name, presets)
        return cls(**presets[name])

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return changed pixels: draw, and apply at once.

        Args:
            pixels: (B, C, H, W) of any dtype, in [0, 255].
            generator: source of randomness, on the processor; None for torch's own.

        Returns:
            (B, C, H, W) float32 in [0, 255], on the device of the pixels.
        """
        return self.draw(len(pixels), (pixels.shape[-2], pixels.shape[-1]), generator).apply(pixels)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Changes:
        """Draw what is to happen to a batch, to be applied to it whole or in slices, as often as is wanted.

        Only what is switched on takes numbers from the generator.

        Args:
            count: B, how many images.
            size: (height, width) of the images.
            generator: source of randomness, on the processor; None for torch's own.
        """
        return Changes(
            count,
            size,
            self.padding,
            affine=self._affine(count, size, generator) if self._moves else None,
            light=1 + self.light * _uniform(2, count, generator).T if self.light else None,
            bend=self._bend(count, generator) if self.elastic else None,
            stroke=self._stroke(count, generator) if self.stroke else None,
            colour=self._colour(count, generator) if self.saturation or self.hue or self.grey else None,
            blur=self._blur(count, size, generator) if self.blur else None,
            boxes=self._boxes(count, size, generator) if self.erase else None,
        )

    @property
    def _moves(self) -> bool:
        return bool(self.rotate or self.shear or self.translate or self.flip) or self.scale != (1.0, 1.0)

    def _affine(self, count: int, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Return (B, 2, 3) maps from output to input coordinates, both in [-1, 1] as `grid_sample` takes them."""
        draw = _uniform(6, count, generator)
        angle = draw[0] * math.radians(self.rotate)
        skew = torch.tan(draw[1] * math.radians(self.shear))
        low, high = math.log(self.scale[0]), math.log(self.scale[1])
        shrink = torch.exp(-((low + high) / 2 + draw[2] * (high - low) / 2))  # an output step covers 1/scale of input
        mirror = torch.where((draw[3] + 1) / 2 < self.flip, -1.0, 1.0)
        cos, sin = torch.cos(angle) * shrink, torch.sin(angle) * shrink
        aspect = size[1] / size[0]  # width / height: coordinates are relative, turns are in pixels
        rows = [
            torch.stack([cos * mirror, (cos * skew - sin) / aspect, draw[4] * 2 * self.translate], dim=1),
            torch.stack([sin * mirror * aspect, sin * skew + cos, draw[5] * 2 * self.translate], dim=1),
        ]
        return torch.stack(rows, dim=1)

    def _bend(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return (B, 2, 8, 8) displacements, in coordinates in which a side is 2 long."""
        return 2 * self.elastic * torch.randn(count, 2, BEND_POINTS, BEND_POINTS, generator=generator)

    def _stroke(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return (B, S) shares of dilations by one pixel each, negative for erosions."""
        by = self.stroke * _uniform(1, count, generator)[0]
        steps = torch.arange(math.ceil(self.stroke))
        return (by.abs()[:, None] - steps).clamp(0, 1) * by.sign()[:, None]

    def _colour(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return (B, 3, 3) maps of RGB."""
        saturation, hue = torch.ones(count), torch.zeros(count)
        if self.saturation:
            saturation = 1 + self.saturation * _uniform(1, count, generator)[0]
        if self.hue:
            hue = math.radians(self.hue) * _uniform(1, count, generator)[0]
        if self.grey:
            saturation = saturation * (torch.rand(count, generator=generator) >= self.grey)
        return colour_maps(saturation, hue)

    def _blur(self, count: int, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Return (B, R + 1) weights, for a radius of three times the largest deviation."""
        largest = self.blur * min(size)
        return blur_weights(largest * torch.rand(count, generator=generator), math.ceil(3 * largest))

    def _boxes(self, count: int, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        """Return (B, 4): top, left, bottom and right of what is erased; empty where nothing is."""
        draw = torch.rand(5, count, generator=generator)
        low, high = self.erase_area
        area = low + draw[1] * (high - low)
        ratio = torch.exp((2 * draw[2] - 1) * math.log(1 / 0.3))  # height / width; logarithms are even-handed
        pixels = area * size[0] * size[1]
        height = (pixels * ratio).sqrt().round().clamp(1, size[0])
        width = (pixels / ratio).sqrt().round().clamp(1, size[1])
        top = (draw[3] * (size[0] - height + 1)).floor().clamp(max=size[0] - 1)
        left = (draw[4] * (size[1] - width + 1)).floor().clamp(max=size[1] - 1)
        boxes = torch.stack([top, left, top + height, left + width], dim=1)
        return (boxes * (draw[0] < self.erase)[:, None]).long()


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Return two numbers, of a list from a file of settings too, as a tuple."""
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(number, int | float | np.integer | np.floating) for number in value)
    ):
        raise ConfigError(f"{name} must be (smallest, largest), two numbers; got {value!r}")
    return float(value[0]), float(value[1])


def _uniform(rows: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Return (rows, count) numbers, uniform in [-1, 1)."""
    return 2 * torch.rand(rows, count, generator=generator) - 1
