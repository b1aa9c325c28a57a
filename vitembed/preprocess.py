"""An image becomes the `uint8` pixels that a model reads: `Preprocess`, a frozen value that is saved with the model.

Rounding follows the libraries that models come from, to the pixel: torchvision's and timm's evaluation transforms, and
the image processors of transformers that resize PIL images; those that resize tensors give other pixels, on photographs
by two levels at the most. Normalisation is left to the model, which does it on its own device:
`(pixels / 255 - mean) / std`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitembed.errors import ConfigError, unknown_name
from vitembed.images import ImageSource, load_image
from vitembed.ink import clean_scan

_LARGE = 64  # where resizing makes that many times the pixels that are kept, only these are made


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the pixels that a model reads: resized, grey or RGB, perhaps inverted.

    Attributes:
        size: (height, width) of the result, in pixels.
        mode: "RGB" (3 channels) or "L" (1 channel, grey).
        resize: "crop" brings the short side to size and cuts the rest off on both sides alike; "pad" brings the
            long side to size and centres the image on a ground of `fill`; "squash" ignores the aspect ratio.
        interpolation: "bicubic", "bilinear", "lanczos", "hamming", "box" or "nearest"; all but the last smooth
            what they make smaller.
        mean: per channel, of pixel values scaled to [0, 1]; the model subtracts it.
        std: per channel, likewise; the model divides by it.
        invert: dark on white becomes bright on black, so that the ground is 0.
        fill: grey level 0..255 of the padding, before inversion. White by default, as under what is transparent.
        crop_share: in (0, 1]; "crop" and "squash" resize to `size / crop_share`, rounded down, and cut the middle of
            `size` out. timm's `crop_pct`; 224 / 256 where torchvision and transformers resize to 256 and crop to 224.
        crop_offset: where the middle is if an odd number of pixels goes: "even" rounds half of it to the nearest even
            number, as torchvision and timm do, "down" rounds it down, as transformers does.
        scan: the image is a scan or a photograph of ink: before all else `vitembed.ink.clean_scan` cuts the ink out of
            its ground, at the image's full size. A blank page becomes a blank image.
        binarize: with `scan`, the ink that was found is made black, so that its darkness is not seen.

    Raises:
        ConfigError: if a value is of the wrong type or out of range.
    """

    size: tuple[int, int] = (224, 224)
    mode: Literal["RGB", "L"] = "RGB"
    resize: Literal["crop", "pad", "squash"] = "crop"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet's training images, which most weights have seen
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    invert: bool = False
    fill: int = 255
    crop_share: float = 1.0
    crop_offset: Literal["even", "down"] = "even"
    scan: bool = False
    binarize: bool = False

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, ("RGB", "L"))
        _check_choice("resize", self.resize, ("crop", "pad", "squash"))
        _check_choice("interpolation", self.interpolation, _filters())
        _check_choice("crop_offset", self.crop_offset, ("even", "down"))
        if not (_is_tuple_of(int, self.size) and len(self.size) == 2 and min(self.size) > 0):
            raise ConfigError(f"size must be (height, width), two positive integers; got {self.size!r}")
        self._check_channels()
        for name, value in (("invert", self.invert), ("scan", self.scan), ("binarize", self.binarize)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false; got {value!r}")
        if isinstance(self.fill, bool) or not isinstance(self.fill, int) or not 0 <= self.fill <= 255:
            raise ConfigError(f"fill must be an integer from 0 to 255; got {self.fill!r}")
        if self.scan and self.fill != 255:
            raise ConfigError(f"fill must be 255 for scan, whose ink comes on pure white; got {self.fill}")
        if self.binarize and not self.scan:
            raise ConfigError("binarize needs scan=True, which finds the ink that is made black; got scan=False")
        if not (_is_tuple_of(int | float, (self.crop_share,)) and 0 < self.crop_share <= 1):
            raise ConfigError(f"crop_share must be a number above 0 and at most 1; got {self.crop_share!r}")
        if self.resize == "pad" and self.crop_share != 1:
            raise ConfigError(f"crop_share must be 1 for resize 'pad', which cuts nothing off; got {self.crop_share!r}")

    @classmethod
    def grey(
        cls,
        size: tuple[int, int],
        *,
        resize: Literal["crop", "pad", "squash"] = "pad",
        interpolation: str = "bicubic",
        invert: bool = True,
        scan: bool = False,
        binarize: bool = False,
    ) -> "Preprocess":
        """Describe grey images of ink whose ground and padding shall be 0: one channel, mean 0, std 1.

        `invert` is for dark ink on white; without it the images are bright on black already. `scan` is for scans and
        photographs of ink, whose ground is not yet even; it makes dark ink on white of them all, and `binarize` black
        ink.

        Raises:
            ConfigError: if a value is wrong, or for `scan` without `invert`: its ground is white, not 0.
        """
        if scan and not invert:
            raise ConfigError("scan makes dark ink on white, so that invert must stay true for a ground of 0")
        fill = 255 if invert else 0
        grey = cls(size, "L", resize, interpolation, mean=(0.0,), std=(1.0,), invert=invert, fill=fill)
        return dataclasses.replace(grey, scan=scan, binarize=binarize)

    @property
    def channels(self) -> int:
        """Channels of the result: 3 for RGB, 1 for grey."""
        return 3 if self.mode == "RGB" else 1

    def __call__(self, source: ImageSource) -> NDArray[np.uint8]:
        """Load and resize one image.

        Returns:
            (channels, height, width) uint8 in [0, 255], contiguous and writable.

        Raises:
            ImageError: if the image cannot be read.
        """
        image = self.cleaned(load_image(source))
        image = image if image.mode == self.mode else image.convert(self.mode)
        view = np.asarray(self._resized(image))
        if self.mode == "L":
            view = view[:, :, None]
        pixels = view.transpose(2, 0, 1).copy()  # (H, W, C) -> (C, H, W)
        return np.invert(pixels, out=pixels) if self.invert else pixels  # of uint8 that is 255 - pixels

    def cleaned(self, image: Image.Image) -> Image.Image:
        """Return an image at its full size as the model is given it: of a scan the ink alone."""
        return clean_scan(image, binarize=self.binarize) if self.scan else image

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; without `scan` and `binarize` where they are off.

        They came later than the rest: models saved before them keep their fingerprints.
        """
        values = dataclasses.asdict(self)
        for later in ("scan", "binarize"):
            if not values[later]:
                del values[later]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """Read the settings that `to_dict` wrote; those left out have their defaults.

        Raises:
            ConfigError: if a key is unknown (the nearest known one is named) or a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name("preprocessing setting", name, known)
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)

    def _check_channels(self) -> None:
        """Refuse a mean or deviation that is not one number a channel."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not (_is_tuple_of(int | float, values) and len(values) == self.channels):
                raise ConfigError(f"{name} must hold {self.channels} number(s) for mode {self.mode!r}; got {values!r}")
            if not all(map(math.isfinite, values)):
                raise ConfigError(f"{name} must be finite; got {values!r}")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above 0; got {self.std!r}")

    def _resized(self, image: Image.Image) -> Image.Image:
        """Bring an image to size."""
        height, width = self.size
        sampling = Image.Resampling[self.interpolation.upper()]
        whole = self._whole(image.size)
        if whole == (width, height):
            return image.resize(whole, sampling)
        if self.resize == "pad":
            ground = Image.new(self.mode, (width, height), self.fill if self.mode == "L" else (self.fill,) * 3)
            ground.paste(image.resize(whole, sampling), ((width - whole[0]) // 2, (height - whole[1]) // 2))
            return ground
        spare = (whole[0] - width, whole[1] - height)
        x, y = (n // 2 if self.crop_offset == "down" else round(n / 2) for n in spare)
        return _middle(image, whole, (x, y, x + width, y + height), sampling)

    def _whole(self, source: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) to which an image of (width, height) is resized, before the middle is cut out."""
        # 354 pixels cropped to 224 are a share of 224 / 354, but 224 / (224 / 354) is 353.99999999999994.
        height, width = (math.floor(side / self.crop_share + 1e-9) for side in self.size)
        if self.resize == "squash":
            return width, height
        across, down = source[0] / width, source[1] / height  # source pixels per resized pixel
        if self.resize == "crop" and height == width:  # torchvision's Resize: the long side is rounded down
            short = min(source)
            return source[0] * width // short, source[1] * height // short
        scale = max(across, down) if self.resize == "pad" else min(across, down)  # timm's ResizeKeepRatio
        return max(1, round(source[0] / scale)), max(1, round(source[1] / scale))


def _middle(
    image: Image.Image, whole: tuple[int, int], kept: tuple[int, int, int, int], sampling: Image.Resampling
) -> Image.Image:
    """Return what is kept, (left, top, right, bottom), of an image resized to (width, height)."""
    left, top, right, bottom = kept
    width, height = right - left, bottom - top
    if whole[0] * whole[1] <= _LARGE * width * height:
        return image.resize(whole, sampling).crop(kept)
    # An image of 1 x 50,000 pixels would grow to 224 x 11,200,000 on the way. What lies far outside the box cannot
    # change a pixel inside it, but for rounding between Pillow's two passes.
    across, down = image.width / whole[0], image.height / whole[1]  # source pixels per resized pixel
    box = (left * across, top * down, min(image.width, right * across), min(image.height, bottom * down))
    return image.resize((width, height), sampling, box=box)


def _filters() -> list[str]:
    """Names of Pillow's resampling filters."""
    return [sampling.name.lower() for sampling in Image.Resampling]


def _is_tuple_of(kind: Any, values: object) -> bool:
    """Tell whether a value is a tuple of numbers of one kind; True and False are not numbers here."""
    return isinstance(values, tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _check_choice(kind: str, name: object, known: Any) -> None:
    """Refuse a name that is not one of those known."""
    if not isinstance(name, str):
        raise ConfigError(f"{kind} must be one of {', '.join(known)}; got {name!r}")
    if name not in known:
        raise unknown_name(kind, name, known)
