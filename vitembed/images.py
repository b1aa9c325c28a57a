"""A path, PIL image or array becomes a checked RGB or grey image, and then pixels.

`load_image` gives one answer for one picture, however it was stored: EXIF orientation is applied, 16 bits are scaled
(never clipped) to 8, what is transparent is laid on white as ink lies on paper, of an animation the first frame
counts, and CMYK and its like become RGB. Colour profiles are not applied. Whatever cannot be read raises `ImageError`
with a reason that a person understands. `Preprocess` is the frozen description of how such an image becomes the
`uint8` pixels that a model reads; it is saved with the model. Normalisation is left to the model, which does it on
its own device: `(pixels / 255 - mean) / std`.
"""

import contextlib
import dataclasses
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from vitembed.errors import ConfigError, DataError, ImageError, unknown_name

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any]

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""What `list_images` looks for, in lower case; the case of a file's suffix does not matter."""

MAX_PIXELS = 178_956_970 // 2
"""Above this, an image is refused before it is decoded. A quarter of a gigabyte as RGB; Pillow warns from here on."""

_ACCEPTED = "(H, W) or (H, W, 1|3|4) of uint8, bool, uint16 (0 to 65535) or float (0 to 1)"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONG = 16  # of an image that many times as long as the part that "crop" keeps, only that part is resized
_warnings_lock = threading.Lock()


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as a PIL image of mode "RGB", or "L" when it is grey.

    Args:
        source: a path; a PIL image (it is not changed); or an array, (H, W) or (H, W, 1|3|4), of uint8, bool,
            uint16 in [0, 65535] or floating point in [0, 1].
        max_pixels: files of more pixels are refused before they are decoded. Pillow itself refuses more than
            `2 * PIL.Image.MAX_IMAGE_PIXELS`, whatever is said here.

    Returns:
        A new image without metadata, so that reading it once more changes nothing.

    Raises:
        ImageError: with what was passed and why it cannot be used.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _finish(source, str(getattr(source, "filename", "")) or "PIL image", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source), max_pixels)
    raise ImageError(type(source).__name__, "is not an image; pass a path, a PIL image or a numpy array")


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Find the images under a folder by their suffixes, in sorted order.

    Subfolders and links are followed, each real folder once; names that begin with a dot are left out.

    Raises:
        DataError: if the folder is missing, is a file, cannot be read in full, or holds no image.
    """
    root = Path(folder)
    try:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise DataError(f"{root} {found}; expected a folder of images")
        names = list(_walk_images(root))
    except OSError as error:  # leaving a folder out would look as if its images had been deleted
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}; move it or change its permissions"
        ) from error
    if not names:
        raise DataError(f"{root} holds no image; looked for files that end in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(map(Path, names))


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

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, ("RGB", "L"))
        _check_choice("resize", self.resize, ("crop", "pad", "squash"))
        _check_choice("interpolation", self.interpolation, _filters())
        if not (_is_tuple_of(int, self.size) and len(self.size) == 2 and min(self.size) > 0):
            raise ConfigError(f"size must be (height, width), two positive integers; got {self.size!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not (_is_tuple_of(int | float, values) and len(values) == self.channels):
                raise ConfigError(f"{name} must hold {self.channels} number(s) for mode {self.mode!r}; got {values!r}")
            if not all(map(math.isfinite, values)):
                raise ConfigError(f"{name} must be finite; got {values!r}")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above 0; got {self.std!r}")
        if not isinstance(self.invert, bool):
            raise ConfigError(f"invert must be true or false; got {self.invert!r}")
        if isinstance(self.fill, bool) or not isinstance(self.fill, int) or not 0 <= self.fill <= 255:
            raise ConfigError(f"fill must be an integer from 0 to 255; got {self.fill!r}")

    @classmethod
    def grey(
        cls,
        size: tuple[int, int],
        *,
        resize: Literal["crop", "pad", "squash"] = "pad",
        interpolation: str = "bicubic",
        invert: bool = True,
    ) -> "Preprocess":
        """Describe grey images of ink whose ground and padding shall be 0: one channel, mean 0, std 1.

        `invert` is for dark ink on white; without it the images are bright on black already.
        """
        fill = 255 if invert else 0
        return cls(size, "L", resize, interpolation, mean=(0.0,), std=(1.0,), invert=invert, fill=fill)

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
        image = load_image(source)
        image = image if image.mode == self.mode else image.convert(self.mode)
        pixels = np.asarray(self._resized(image))
        if self.mode == "L":
            pixels = pixels[:, :, None]
        pixels = pixels.transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
        return 255 - pixels.copy() if self.invert else pixels.copy()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = dataclasses.asdict(self)
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

    def _resized(self, image: Image.Image) -> Image.Image:
        """Bring an image to size."""
        height, width = self.size
        sampling = Image.Resampling[self.interpolation.upper()]
        if self.resize == "squash" or image.size == (width, height):
            return image.resize((width, height), sampling)
        if self.resize == "crop":
            return self._cropped(image, sampling)
        scale = min(width / image.width, height / image.height)
        inner = (_side(image.width, scale, width), _side(image.height, scale, height))
        ground = Image.new(self.mode, (width, height), self.fill if self.mode == "L" else (self.fill,) * 3)
        ground.paste(image.resize(inner, sampling), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return ground

    def _cropped(self, image: Image.Image, sampling: Image.Resampling) -> Image.Image:
        """Bring the short side to size, then cut the middle out: what every library's models were trained with."""
        height, width = self.size
        left, top, right, bottom = box = _crop_box(image.size, (width, height))
        # An image of 1 x 50,000 pixels would grow to 224 x 11,200,000 on the way. What lies far outside the box cannot
        # change a pixel inside it, so of very long images only the middle is resized.
        if max(image.size) > _LONG * max(right - left, bottom - top):
            return image.resize((width, height), sampling, box=box)
        across, down = width / (right - left), height / (bottom - top)
        whole = (max(width, int(image.width * across + 1e-6)), max(height, int(image.height * down + 1e-6)))
        x, y = round(left * across), round(top * down)
        return image.resize(whole, sampling).crop((x, y, x + width, y + height))


def _side(length: int, scale: float, limit: int) -> int:
    """Scale one side of an image, to at least one pixel and at most the limit."""
    return min(limit, max(1, round(length * scale)))


def _crop_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of an image that "crop" keeps, (left, top, right, bottom) in source pixels; sizes (W, H)."""
    (source_width, source_height), (width, height) = source, target
    if height * source_width >= width * source_height:  # height is the side that needs the larger scale
        whole = (source_width * height // source_height, height)
    else:
        whole = (width, source_height * width // source_width)
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    across, down = source_width / whole[0], source_height / whole[1]  # source pixels per resized pixel
    right = min(float(source_width), (left + width) * across)
    bottom = min(float(source_height), (top + height) * down)
    return left * across, top * down, right, bottom


def _from_path(path: Path, max_pixels: int) -> Image.Image:
    """Check that a path leads to a file with something in it, then decode it."""
    name = str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(name, "is a folder; expected an image file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ImageError(name, "is not a regular file")
        if status.st_size == 0:
            raise ImageError(name, "is empty (0 bytes)")
        with path.open("rb") as file:
            return _decode(file, name, max_pixels)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(name, "does not exist") from error
    except PermissionError as error:
        raise ImageError(name, "cannot be read: permission denied") from error
    except (OSError, ValueError) as error:  # a name that is too long, a null byte, a failing disk
        raise ImageError(name, f"cannot be read: {error}") from error


def _decode(file: Any, name: str, max_pixels: int) -> Image.Image:
    """Open an image file with Pillow and read its first frame."""
    try:
        with _without_warnings():
            image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ImageError(name, "is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        limit = f"the limit is {max_pixels:,}"
        raise ImageError(name, f"has too many pixels to be decoded safely ({limit}): {error}") from error
    except Exception as error:  # decoders meet damage with nearly every kind of exception
        raise ImageError(name, _damage(error)) from error
    with image:
        return _finish(image, name, max_pixels)


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode, turn upright, and bring to RGB or grey."""
    if isinstance(image, ImageFile.ImageFile):
        if image.width * image.height > max_pixels:
            size = f"{image.width:,} x {image.height:,}"
            raise ImageError(name, f"has too many pixels to be decoded safely: {size}; the limit is {max_pixels:,}")
        if image.format == "EPS":  # Pillow would hand a stranger's PostScript program to Ghostscript
            raise ImageError(name, "is an EPS drawing; convert it to PNG")
    if 0 in image.size:
        raise ImageError(name, f"has no pixels: {image.width} x {image.height}")
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        result = _to_8_bit_colours(upright, name)
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(name, _damage(error)) from error
    result = result.copy() if result is image else result
    result.info = {}  # an orientation that stayed behind would be applied once more by the next reader
    return result if type(result) is Image.Image else result.convert(result.mode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged."""
    try:
        with _without_warnings():
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damage of the metadata alone: the pixels are fine
        return 1


def _to_8_bit_colours(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of any of Pillow's modes to RGB, or to L if it has no colour."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scaled_16_bit(image, name)
    if image.mode == "F":
        raise ImageError(name, "has float pixels (mode F) of unknown range; scale them to 0..255 and convert to L")
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # None is for in-place conversion
        return converted
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Lay an image with an alpha channel or a transparent colour on white."""
    grey = image.mode in ("1", "L", "LA", "La")
    layered = image.convert("LA" if grey else "RGBA")
    ground = Image.new("L" if grey else "RGB", image.size, "white")
    ground.paste(layered.convert(ground.mode), mask=layered.getchannel("A"))
    return ground


def _scaled_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey by 1/257 to 8 bits; Pillow's own conversion would clip nearly all of it to white."""
    values = np.asarray(image)
    if image.mode == "I":  # 32 bits, in which some readers hand over 16-bit files
        low, high = int(values.min()), int(values.max())
        from_16_bit_file = image.format in ("PNG", "PPM")
        if low < 0 or high > 65535 or (high <= 255 and not from_16_bit_file):
            found = f"has 32-bit pixels (mode I) from {low} to {high}"
            raise ImageError(name, f"{found}; scale them to 0..255 and convert to L, or to 0..65535 for 16 bits")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray(_eighth_bits(values))


def _eighth_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale [0, 65535] to [0, 255], rounding to nearest: 65535 = 255 * 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: NDArray[Any]) -> Image.Image:
    """Check an array of pixels and make it an image."""
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.size == 0:
        raise ImageError(name, "has no pixels")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        hint = "; transpose(1, 2, 0) makes (H, W, C) of (C, H, W)"
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ImageError(name, f"is not an image; expected {_ACCEPTED}{hint if channels_first else ''}")
    pixels = _pixels_8_bit(array, name)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))  # L, RGB or RGBA
    return _on_white(image) if image.mode == "RGBA" else image


def _pixels_8_bit(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Bring the values of an array to uint8 in [0, 255]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _eighth_bits(array)
    if array.dtype.kind != "f":
        raise ImageError(name, f"is not an image; expected {_ACCEPTED}")
    if np.isnan(array).any():
        raise ImageError(name, "contains NaN; expected float pixels from 0 to 1")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        found = f"has float pixels from {low:g} to {high:g}"
        raise ImageError(name, f"{found}; expected 0 to 1 (divide by 255, or convert to uint8)")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _damage(error: Exception) -> str:
    """Say what a decoder met."""
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"is {'truncated' if 'truncated' in detail.lower() else 'damaged'}: {detail}"


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Pillow from warning about sizes, which are checked here, and about metadata, which is not needed.

    Filters of warnings belong to the whole process, so that threads must take turns.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _walk_images(root: Path) -> Iterator[str]:
    """Yield the paths of the images under a folder, as strings: a `Path` of each would cost more than the walk."""
    seen = {_identity(root)}
    for parent, folders, files in os.walk(root, onerror=_reraise, followlinks=True):
        prefix = parent if parent.endswith(os.sep) else parent + os.sep
        descend = []
        for name in sorted(folders):
            if not name.startswith(".") and (identity := _identity(Path(prefix + name))) not in seen:
                seen.add(identity)
                descend.append(name)
        folders[:] = descend  # os.walk goes on from what is left here
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield prefix + name


def _identity(folder: Path) -> tuple[int, int]:
    """Return what tells one real folder from another, whatever links lead to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _reraise(error: OSError) -> None:
    """Make `os.walk` stop at a folder that cannot be read; by default it leaves it out without a word."""
    raise error


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
