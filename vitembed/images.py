"""A path, PIL image or array becomes a checked RGB or grey image; a folder becomes the paths of its images.

`load_image` gives one answer for one picture, however it was stored: EXIF orientation is applied, 16 bits are scaled
(never clipped) to 8, what is transparent is laid on white as ink lies on paper, of an animation the first frame
counts, and CMYK and its like become RGB. Colour profiles are not applied. Whatever cannot be read raises `ImageError`
with a reason that a person understands. `vitembed.preprocess` makes pixels for a model of what comes out here.
"""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from vitembed.errors import DataError, ImageError

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
        image = _finish(source, str(getattr(source, "filename", "")) or "PIL image", max_pixels)
        return _plain(image.copy() if image is source else image)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source), max_pixels)
    raise ImageError(type(source).__name__, "is not an image; pass a path, a PIL image or a numpy array")


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the content of an image file by the rules of `load_image`.

    Args:
        data: what the file would hold.
        name: what errors call it.
        max_pixels: images of more are refused before they are decoded.

    Raises:
        ImageError: with the name, and why the image cannot be used.
    """
    if not data:
        raise ImageError(name, "is empty (0 bytes)")
    return _decode(io.BytesIO(data), name, max_pixels)


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
        return _plain(_finish(image, name, max_pixels))


def _finish(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode, turn upright, and bring to RGB or grey; the image itself comes back where nothing is to be done."""
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
        return _to_8_bit_colours(upright, name)
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(name, _damage(error)) from error


def _plain(image: Image.Image) -> Image.Image:
    """Return the pixels of an image of ours as an image without metadata and without a file.

    Pillow's `_new` shares them. `copy` would take as long as decoding did, for the memory of a large image is fresh.
    """
    plain = image._new(image.im)
    plain.info = {}  # an orientation that stayed behind would be applied once more by the next reader
    return plain


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
    if image.mode in ("RGB", "L"):
        return image
    if image.mode in ("1", "LA"):
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
