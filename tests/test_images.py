import io
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitembed.errors import DataError, ImageError
from vitembed.images import IMAGE_SUFFIXES, list_images, load_image


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture
def grey(rgb: np.ndarray) -> np.ndarray:
    return rgb[:, :, 0].copy()


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels are missing: decoding it would fail, or never end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


# One picture, one answer


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_rgb_file_array_and_pil_image_give_equal_pixels(rgb: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = saved(Image.fromarray(rgb), tmp_path / f"a{suffix}")
    for source in (path, str(path), rgb, Image.fromarray(rgb), rgb / 255, (rgb / 255).astype(np.float32)):
        image = load_image(source)
        assert type(image) is Image.Image
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), rgb)


def test_grey_stays_grey_and_bilevel_becomes_grey(grey: np.ndarray, tmp_path: Path) -> None:
    for source in (saved(Image.fromarray(grey), tmp_path / "a.png"), grey, grey[:, :, None]):
        image = load_image(source)
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), grey)
    black_white = grey > 128
    for source in (saved(Image.fromarray(black_white), tmp_path / "b.png"), black_white):
        image = load_image(source)
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), black_white * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation_is_applied_once(rgb: np.ndarray, tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(rgb), tmp_path / f"a{suffix}", exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
        before = np.asarray(opened.copy())
        from_pil = load_image(opened)
        np.testing.assert_array_equal(np.asarray(opened), before)
    image = load_image(path)
    np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(np.asarray(from_pil), expected)
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_damaged_exif_does_not_spoil_the_pixels(rgb: np.ndarray, tmp_path: Path) -> None:
    path = saved(Image.fromarray(rgb), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(np.asarray(load_image(path)), rgb)
    image = Image.fromarray(rgb)
    image.info["exif"] = b"Exif\0\0nonsense"
    np.testing.assert_array_equal(np.asarray(load_image(image)), rgb)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 35 * 20).astype(np.uint16).reshape(20, 35)
    path = saved(Image.fromarray(values), tmp_path / f"a{suffix}")
    expected = np.rint(values / 257)
    for source in (path, values, values.astype(">u2"), Image.fromarray(values), Image.fromarray(values.astype(">u2"))):
        image = load_image(source)
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), expected)
    # mode I with values of 16 bits is how some readers hand such a file over
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(values.astype(np.int32)))), expected)


def test_dark_16_bit_file_in_mode_i_is_still_16_bit(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.full((4, 4), 200, np.uint16)), tmp_path / "a.pgm")
    with Image.open(path) as opened:
        assert opened.mode == "I"  # else this test shows nothing
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.full((4, 4), 1))


def test_16_bit_array_in_colour_is_scaled() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    np.testing.assert_array_equal(np.asarray(load_image(values)), np.rint(values / 257))


@pytest.mark.parametrize(("low", "high"), [(0, 200), (-1, 255), (0, 65536)])
def test_32_bit_pixels_of_unknown_range_are_refused(low: int, high: int) -> None:
    values = np.array([[low, high]], np.int32)
    with pytest.raises(ImageError, match=rf"32-bit pixels \(mode I\) from {low} to {high}"):
        load_image(Image.fromarray(values))


def test_float_image_of_unknown_range_is_refused_with_a_way_out() -> None:
    with pytest.raises(ImageError, match=r"mode F.*scale them to 0\.\.255 and convert to L"):
        load_image(Image.new("F", (3, 3)))


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".jpg"), ("LAB", ".tif")])
def test_other_colour_spaces_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    lab = Image.new("LAB", (16, 16), (136, 207, 189))  # L* 53, a* 79, b* 61, with b* and a* offset by 128
    red = lab if mode == "LAB" else Image.new("RGB", (16, 16), (250, 10, 20)).convert(mode)
    image = load_image(saved(red, tmp_path / f"a{suffix}"))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[8, 8], (250, 10, 20), atol=12)


@pytest.mark.parametrize(
    "mode", ["HSV", "RGBX", "RGBa", "PA", "La", "LA", "RGBA", "P", "1", "L", "LAB", "CMYK", "YCbCr"]
)
def test_every_mode_of_pillow_is_read(mode: str) -> None:
    image = load_image(Image.new(mode, (4, 3)))
    assert image.mode in ("RGB", "L")
    assert image.size == (4, 3)


def test_what_is_transparent_is_white_and_what_is_half_so_is_blended(tmp_path: Path) -> None:
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png")
    alpha = 128 / 255
    half = [round(200 * alpha + 255 * (1 - alpha)), round(255 * (1 - alpha)), round(255 * (1 - alpha))]
    for source in (path, pixels):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), [[[200, 0, 0], [255, 255, 255], half]])


def test_transparent_grey_stays_grey_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 255], [10, 0]]], np.uint8)
    image = load_image(saved(Image.fromarray(pixels), tmp_path / "a.png"))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), [[10, 255]])


def test_transparent_colour_of_a_png_without_alpha_is_white(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image = load_image(saved(rgb, tmp_path / "rgb.png", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(np.asarray(image), [[[255, 255, 255], [4, 5, 6]]])
    grey = Image.fromarray(np.array([[1, 4]], np.uint8))
    np.testing.assert_array_equal(np.asarray(load_image(saved(grey, tmp_path / "l.png", transparency=1))), [[255, 4]])
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    image = load_image(saved(deep, tmp_path / "deep.png", transparency=257))
    np.testing.assert_array_equal(np.asarray(image), [[255, 2]])


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_becomes_rgb_and_its_transparent_entry_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    plain = load_image(saved(image, tmp_path / f"plain{suffix}"))
    np.testing.assert_array_equal(np.asarray(plain), [[[10, 20, 30], [200, 100, 50]]])
    seen_through = load_image(saved(image, tmp_path / f"through{suffix}", transparency=0))
    np.testing.assert_array_equal(np.asarray(seen_through), [[[255, 255, 255], [200, 100, 50]]])


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, object] = {"lossless": True} if suffix == ".webp" else {}
    path = saved(frames[0], tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as opened:
        assert opened.n_frames == 3
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(frames[0]))


# What cannot be read


def test_unreadable_paths_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "empty.jpg": r"is empty \(0 bytes\)",
        "text.png": "is not an image that Pillow can read",
        "folder.png": "is a folder; expected an image file",
        "none.png": "does not exist",
        "text.png/none.png": "does not exist",
        "pipe.png": "is not a regular file",
        "loop.png": "cannot be read: .*",
        "n" * 300 + ".png": "cannot be read: .*",
        "null\0byte.png": "cannot be read: .*",
    }.items():
        with pytest.raises(ImageError, match=f"(?s)^.*: {reason}$") as caught:
            load_image(tmp_path / name)
        assert caught.value.source == str(tmp_path / name)


def test_path_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("L", (2, 2)), tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # the administrator, who runs tests too, may read every file
    with pytest.raises(ImageError, match="cannot be read: permission denied"):
        load_image(path)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".jpg", {}), (".png", {}), (".gif", {}), (".bmp", {}), (".webp", {}), (".tif", {}), (".ppm", {})],
)
def test_half_a_file_is_never_half_an_image(rgb: np.ndarray, tmp_path: Path, suffix: str, options: dict) -> None:
    path = saved(Image.fromarray(rgb), tmp_path / f"a{suffix}", **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"is (truncated|damaged|not an image)"):
        load_image(path)


def test_truncated_jpeg_is_called_truncated(rgb: np.ndarray, tmp_path: Path) -> None:
    path = saved(Image.fromarray(rgb), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageError, match="is truncated: "):
        load_image(path)
    with Image.open(path) as opened, pytest.raises(ImageError, match="is truncated: ") as caught:
        load_image(opened)
    assert caught.value.source == str(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_any_damage_gives_an_image_or_an_image_error(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content)
    try:
        image = load_image(path, max_pixels=10_000)
    except ImageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both endings are right
    else:
        assert image.mode in ("RGB", "L")


@pytest.mark.parametrize("side", [10_000, 12_000, 30_000], ids=["allowed by Pillow", "warned of", "refused by Pillow"])
def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(side, side))
    limit = Image.MAX_IMAGE_PIXELS
    began = time.perf_counter()
    with pytest.raises(ImageError, match="has too many pixels to be decoded safely"):
        load_image(path)
    assert time.perf_counter() - began < 1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pixel_limit_is_a_parameter_and_holds_for_opened_files_too(tmp_path: Path) -> None:
    path = saved(Image.new("L", (20, 30)), tmp_path / "a.png")
    assert load_image(path, max_pixels=600).size == (20, 30)
    for _ in range(2):
        with pytest.raises(ImageError, match=r"20 x 30; the limit is 599"):
            load_image(path, max_pixels=599)
    with Image.open(path) as opened, pytest.raises(ImageError, match="the limit is 599"):
        load_image(opened, max_pixels=599)


def test_postscript_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    saved(Image.new("RGB", (4, 4)), tmp_path / "a.eps").rename(path)
    with pytest.raises(ImageError, match="is an EPS drawing; convert it to PNG"):
        load_image(path)


def test_closed_or_empty_pil_image_is_refused() -> None:
    closed = Image.new("L", (2, 2))
    closed.close()
    with pytest.raises(ImageError, match=r"^PIL image: is damaged: "):
        load_image(closed)
    with pytest.raises(ImageError, match="has no pixels: 0 x 5"):
        load_image(Image.new("L", (0, 5)))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\) and dtype uint8: has no pixels"),
        (np.zeros((3, 8, 9), np.uint8), r"expected \(H, W\).*transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 9), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((8, 9, 2), np.uint8), r"shape \(8, 9, 2\) and dtype uint8: is not an image"),
        (np.zeros(8, np.uint8), "is not an image"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"is not an image; expected .*\(0 to 1\)$"),
        (np.zeros((8, 9), np.int64), "dtype int64: is not an image; expected"),
        (np.zeros((8, 9), np.complex64), "is not an image"),
        (np.full((8, 9), None), "dtype object: is not an image"),
        (np.full((8, 9), np.nan), "contains NaN"),
        (np.full((8, 9), np.inf), "float pixels from inf to inf"),
        (np.full((8, 9), 255.0), r"float pixels from 255 to 255; expected 0 to 1 \(divide by 255"),
        (np.full((8, 9), -0.5, np.float16), "float pixels from -0.5"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_shape_and_dtype(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3, b"bytes", [[1, 2]]])
def test_other_objects_are_refused(source: object) -> None:
    with pytest.raises(ImageError, match="pass a path, a PIL image or a numpy array"):
        load_image(source)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_result_shares_no_pixels_with_the_image_passed(mode: str) -> None:
    given = Image.new(mode, (4, 3), "white")
    load_image(given).paste("black", (0, 0, 4, 3))
    assert np.asarray(given).min() == 255


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"])
def test_result_outlives_its_file_without_metadata(rgb: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = saved(Image.fromarray(rgb), tmp_path / f"a{suffix}")
    image = load_image(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    path.write_bytes(b"")
    assert type(image) is Image.Image
    assert (image.info, image.format) == ({}, None)
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(image))), expected)
    image.paste("black", (0, 0, 5, 5))  # it may be changed


def test_strided_arrays_are_read_right(rgb: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(rgb[::2, ::-1])), rgb[::2, ::-1])


# Folders


def test_list_images_is_sorted_recursive_and_leaves_hidden_ones_out(tmp_path: Path) -> None:
    wanted = ["a-b/1.png", "a/10.JPG", "a/2.jpeg", "b/c/d/x.TIFF", "z.webp"]
    for name in [*wanted, ".hidden.png", "a/.cache/x.png", "a/notes.txt", "b/png", "a/x.png.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = list_images(tmp_path)
    assert found == sorted(tmp_path / name for name in wanted)
    assert list_images(f"{tmp_path}/") == found


def test_list_images_ends_when_links_go_round(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert list_images(tmp_path) == [tmp_path / "a" / "x.png"]
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert list_images(tmp_path / "linked") == [tmp_path / "linked" / "x.png"]


def test_folder_without_images_is_an_error_that_names_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no image; looked for .*\.jpeg, \.jpg") as caught:
        list_images(tmp_path)
    assert all(suffix in str(caught.value) for suffix in IMAGE_SUFFIXES)
    with pytest.raises(DataError, match="is a file; expected a folder of images"):
        list_images(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="does not exist; expected a folder of images"):
        list_images(tmp_path / "none")


def test_subfolder_that_cannot_be_read_is_an_error_not_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").touch()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked cannot be read: Permission denied; move it"):
        list_images(tmp_path)
