"""Random changes to whole batches of training images, on whatever device they are on."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitembed.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Augment:
    """A random affine map and a change of light, drawn for each image by itself.

    Attributes:
        rotate: largest turn to either side, in degrees.
        scale: smallest and largest factor by which the picture grows; one above 1 crops.
        shear: largest shear to either side, in degrees.
        translate: largest shift to either side, as a share of the side.
        flip: probability of a mirror image, left to right.
        light: largest relative change of brightness and of contrast, 0.2 for 80 % to 120 %.
        padding: what comes in from outside, "border" repeats the edge, "reflection" mirrors the picture.

    Raises:
        ConfigError: if a value is out of range.
    """

    rotate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    translate: float = 0.0
    flip: float = 0.0
    light: float = 0.0
    padding: str = "border"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale must be (smallest, largest), both above 0; got {self.scale}")
        for name, most in (("rotate", 180.0), ("shear", 60.0), ("translate", 1.0), ("flip", 1.0), ("light", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie in [0, {most:g}]; got {getattr(self, name)}")
        if self.padding not in ("border", "reflection"):
            raise unknown_name("padding", self.padding, ("border", "reflection"))

    @classmethod
    def named(cls, name: str) -> "Augment":
        """Return a preset: "none", "ink" (drawings and handwriting: never mirrored) or "photo".

        Raises:
            ConfigError: if there is no such preset.
        """
        presets = {
            "none": cls(),
            "ink": cls(rotate=12, scale=(0.85, 1.15), shear=12, translate=0.08),
            "photo": cls(rotate=8, scale=(1.0, 1.6), shear=4, translate=0.1, flip=0.5, light=0.3, padding="reflection"),
        }
        if name not in presets:
            raise unknown_name("augmentation", name, presets)
        return presets[name]

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return changed pixels.

        Args:
            pixels: (B, C, H, W) of any dtype, in [0, 255].
            generator: source of randomness, on the processor; None for torch's own.

        Returns:
            (B, C, H, W) float32 in [0, 255], on the device of the pixels.
        """
        images = pixels.float()
        if self._moves:
            theta = self._affine(len(images), images.shape[-2:], generator).to(images.device)
            grid = F.affine_grid(theta, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)
        if self.light:
            change = 1 + self.light * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
            brightness, contrast = change.to(images.device)
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            images = (((images - mean) * contrast + mean) * brightness).clamp(0, 255)
        return images

    @property
    def _moves(self) -> bool:
        return bool(self.rotate or self.shear or self.translate or self.flip) or self.scale != (1.0, 1.0)

    def _affine(self, count: int, size: torch.Size, generator: torch.Generator | None) -> Tensor:
        """Return (B, 2, 3) maps from output to input coordinates, both in [-1, 1] as `affine_grid` takes them."""
        draw = 2 * torch.rand(6, count, generator=generator) - 1  # uniform in [-1, 1]
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
