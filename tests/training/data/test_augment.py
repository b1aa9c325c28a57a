"""Random changes to batches of images."""

import numpy as np
import pytest
import torch

from vitembed.errors import ConfigError, VectorError
from vitembed.training.data.augment import Augment
from vitembed.training.data.changes import Changes, blur_weights, colour_maps

PRESETS = ["ink", "ink-strong", "photo", "photo-strong", "faces"]


def blobs(count: int = 200, size: tuple[int, int] = (41, 61)) -> torch.Tensor:
    """White squares of 5 x 5 pixels in the middle, right above it, on black."""
    images = torch.zeros(count, 1, *size, dtype=torch.uint8)
    images[:, :, 18:23, 38:43] = 255
    return images


def centre(images: torch.Tensor) -> np.ndarray:
    """Return (B, 2): row and column of the centre of mass, relative to the middle of the image."""
    weight = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
    rows = torch.arange(images.shape[2]) - (images.shape[2] - 1) / 2
    columns = torch.arange(images.shape[3]) - (images.shape[3] - 1) / 2
    return torch.stack([(weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)], dim=1).numpy()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_no_change_is_no_change() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 9), dtype=torch.uint8)
    assert torch.equal(Augment.named("none")(images), images.float())


def test_turns_keep_the_distance_from_the_middle_on_images_that_are_not_square() -> None:
    found = centre(Augment(rotate=90)(blobs(), generator()))
    radius = np.hypot(found[:, 0], found[:, 1])
    np.testing.assert_allclose(radius, 10, atol=0.5)
    angle = np.degrees(np.arctan2(found[:, 0], found[:, 1]))
    assert angle.min() < -80
    assert angle.max() > 80
    assert np.abs(angle).max() <= 91


def test_scales_move_points_outward_by_the_factor() -> None:
    found = centre(Augment(scale=(1.5, 1.5))(blobs(), generator()))
    np.testing.assert_allclose(found, [[0, 15]] * 200, atol=0.3)


def test_shifts_are_a_share_of_the_side() -> None:
    found = centre(Augment(translate=0.1)(blobs(), generator()))
    assert np.abs(found[:, 0]).max() == pytest.approx(4.1, abs=0.3)
    assert np.abs(found[:, 1] - 10).max() == pytest.approx(6.1, abs=0.3)


def test_half_of_the_images_are_mirrored() -> None:
    found = centre(Augment(flip=0.5)(blobs(1000), generator()))
    np.testing.assert_allclose(np.abs(found[:, 1]), 10, atol=0.2)
    assert (found[:, 1] < 0).mean() == pytest.approx(0.5, abs=0.05)


def test_shears_move_upper_and_lower_rows_apart() -> None:
    images = torch.zeros(50, 1, 41, 41, dtype=torch.uint8)
    images[:, :, 5, 20] = 255
    found = centre(Augment(shear=30)(images, generator()))
    assert np.abs(found[:, 1]).max() > 5
    np.testing.assert_allclose(found[:, 0], -15, atol=0.6)


def test_light_stays_in_range_and_leaves_places_alone() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    changed = Augment(light=0.5)(images, generator())
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert not torch.equal(changed, images.float())
    for before, after in zip(images.float(), changed, strict=True):
        order = before.flatten().argsort()
        assert (after.flatten()[order].diff() >= -1e-3).all()  # what was brighter still is


@pytest.mark.parametrize("name", PRESETS)
def test_presets_repeat_with_the_generator_and_differ_between_images(name: str) -> None:
    augment = Augment.named(name)
    one, two = augment(blobs(4), generator()), augment(blobs(4), generator())
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert one.shape == (4, 1, 41, 61)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rotate": 200}, "rotate"),
        ({"flip": -0.1}, "flip"),
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (2, 1)}, "scale"),
        ({"padding": "zeros"}, "unknown padding"),
        ({"scale": (1, float("inf"))}, "scale"),
        ({"light": float("nan")}, "light"),
        ({"elastic": 0.3}, "elastic"),
        ({"stroke": -1}, "stroke"),
        ({"saturation": 1.1}, "saturation"),
        ({"hue": 181}, "hue"),
        ({"grey": 2}, "grey"),
        ({"blur": 0.2}, "blur"),
        ({"erase": 1.5}, "erase must"),
        ({"erase_area": (0.0, 0.1)}, "erase_area"),
        ({"erase_area": (0.3, 0.2)}, "erase_area"),
        ({"erase_area": (0.3, 1.0)}, "erase_area"),
        ({"scale": (1, 2, 3)}, r"scale must be \(smallest, largest\), two numbers; got \(1, 2, 3\)"),
        ({"scale": 1.2}, "scale must be .*; got 1.2"),
        ({"scale": "12"}, "scale must be .*; got '12'"),
        ({"scale": ("1", "2")}, "scale must be .*; got"),
        ({"erase_area": 0.2}, "erase_area must be .*; got 0.2"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Augment(**values)  # type: ignore[arg-type]


def test_ranges_may_be_lists_and_are_kept_as_values_are() -> None:
    augment = Augment(scale=[1, 1], erase_area=[0.1, 0.2])  # type: ignore[arg-type]  # as a file of settings has them
    assert augment == Augment(erase_area=(0.1, 0.2))
    assert hash(augment) == hash(Augment(erase_area=(0.1, 0.2)))
    assert augment.draw(3, (8, 8)).affine is None


@pytest.mark.parametrize("name", ["photos", "photo_strong", ""])
def test_what_is_no_preset_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Known: faces, ink, ink-strong, none, photo, photo-strong$"):
        Augment.named(name)


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'faces'"):
        Augment.named("face")


def noise(count: int = 9, channels: int = 3, size: tuple[int, int] = (20, 30)) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator())


EACH = {
    "ink": Augment.named("ink"),
    "photo": Augment.named("photo"),
    "elastic": Augment(elastic=0.05),
    "stroke": Augment(stroke=2.5),
    "light": Augment(light=0.5),
    "colour": Augment(saturation=0.8, hue=90, grey=0.3),
    "blur": Augment(blur=0.05),
    "erase": Augment(erase=0.7),
    "photo-strong": Augment.named("photo-strong"),
    "many": Augment(rotate=20, elastic=0.03, stroke=1, light=0.2, saturation=0.2, blur=0.02, erase=0.5),
}
each = pytest.mark.parametrize("augment", EACH.values(), ids=EACH)


@each
@pytest.mark.parametrize("threads", [1, 2])
def test_slices_are_changed_as_the_whole_is_to_the_bit(augment: Augment, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = noise(7, size=(120, 100))  # large enough for two threads to share one image
        changes = augment.draw(len(images), (120, 100), generator())
        whole = changes.apply(images)
        for size in (1, 2, 3):
            parts = [changes[i : i + size].apply(images[i : i + size]) for i in range(0, len(images), size)]
            assert torch.equal(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(before)


@each
@pytest.mark.parametrize("size", [(1, 120), (120, 1), (1, 1), (2, 61), (5, 224)])
def test_slices_of_thin_images_are_changed_as_the_whole_is_to_the_bit(augment: Augment, size: tuple[int, int]) -> None:
    images = noise(33, size=size)
    changes = augment.draw(33, size, generator())
    whole = changes.apply(images)
    for count in (1, 2, 5):
        parts = [changes[i : i + count].apply(images[i : i + count]) for i in range(0, 33, count)]
        assert torch.equal(torch.cat(parts), whole)


@each
def test_changes_can_be_applied_again_and_leave_their_input_alone(augment: Augment) -> None:
    images = noise().float()
    kept = images.clone()
    changes = augment.draw(len(images), (20, 30), generator())
    first = changes.apply(images)
    assert torch.equal(changes.apply(images), first)
    assert torch.equal(images, kept)
    assert not torch.equal(first, kept)
    assert torch.equal(augment(images, generator()), first)


@each
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_whatever_comes_in_floats_in_range_come_out(augment: Augment, channels: int) -> None:
    for images in (noise(5, channels), noise(5, channels).double(), 255 * torch.ones(2, channels, 6, 5)):
        out = augment(images, generator())
        assert out.dtype == torch.float32
        assert out.shape == images.shape
        assert out.min() >= -1e-3  # interpolation rounds
        assert out.max() <= 255 + 1e-3


def test_no_images_are_changed_to_no_images() -> None:
    for augment in EACH.values():
        assert augment(noise(0), generator()).shape == (0, 3, 20, 30)


def test_what_is_drawn_is_small_and_a_slice_counts_as_one() -> None:
    changes = EACH["many"].draw(100, (224, 224), generator())
    numbers = sum(value.numel() for value in vars(changes).values() if isinstance(value, torch.Tensor))
    assert numbers / 100 < 0.002 * 3 * 224 * 224
    assert (len(changes), len(changes[10:25]), len(changes[95:200]), len(changes[:])) == (100, 15, 5, 100)


def test_changes_of_other_images_are_refused() -> None:
    changes = Augment.named("ink").draw(4, (28, 28), generator())
    for shape in ((3, 1, 28, 28), (4, 1, 28, 29), (4, 28, 28)):
        with pytest.raises(VectorError, match="which the changes were drawn for"):
            changes.apply(torch.zeros(shape))


def test_an_option_that_is_off_draws_nothing() -> None:
    for augment, numbers in (
        (Augment(), 0),
        (Augment.named("ink"), 6 * 5),
        (Augment(light=0.1), 2 * 5),
        (Augment.named("photo"), 8 * 5),
        (Augment(stroke=1.0), 5),
        (Augment(saturation=0.1, hue=1), 2 * 5),
        (Augment(erase=0.1), 5 * 5),
    ):
        drawn, counted = generator(), generator()
        augment.draw(5, (8, 8), drawn)
        torch.rand(numbers, generator=counted)
        assert torch.equal(torch.rand(3, generator=drawn), torch.rand(3, generator=counted))


def test_moves_are_what_affine_grid_makes_of_them() -> None:
    augment = Augment(rotate=40, scale=(0.7, 1.4), shear=10, translate=0.2, flip=0.5)
    images = noise().float()
    changes = augment.draw(len(images), (20, 30), generator())
    assert changes.affine is not None
    grid = torch.nn.functional.affine_grid(changes.affine, list(images.shape), align_corners=False)
    expected = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(changes.apply(images), expected, rtol=0, atol=1e-2)


def test_bends_are_the_plain_sum_over_their_grid_of_points() -> None:
    """A horizontal ramp, bent: each pixel shows where it was taken from, within one level."""
    width, height = 60, 7
    ramp = (torch.arange(width).float() * 4).expand(1, 1, height, width).contiguous()
    changes = Augment(elastic=0.01).draw(1, (height, width), generator())
    assert changes.bend is not None
    x, y = (np.arange(width) + 0.5) * 7 / width, (np.arange(height) + 0.5) * 7 / height
    across, down = (np.exp(-((side[:, None] - np.arange(8)) ** 2) / 2) for side in (x, y))
    across, down = (side / np.sqrt((side**2).sum(axis=1, keepdims=True)) for side in (across, down))
    moved = np.einsum("rp,pq,cq->rc", down, changes.bend[0, 0].numpy(), across) * width / 2
    expected = np.clip(4 * (np.arange(width) + moved), 0, 4 * (width - 1))
    np.testing.assert_allclose(changes.apply(ramp)[0, 0].numpy(), expected, atol=1e-2)


def test_bends_move_points_by_the_deviation_and_neighbours_together() -> None:
    spot = torch.zeros(400, 1, 41, 81)
    spot[:, :, 19:22, 39:42] = 255
    found = centre(Augment(elastic=0.03)(spot, generator()))
    np.testing.assert_allclose(found.std(axis=0), [0.03 * 41, 0.03 * 81], rtol=0.15)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=0.4)
    two = torch.zeros(200, 1, 41, 81)
    two[:, :, 19:22, 36:39] = 255
    beside = centre(Augment(elastic=0.03)(two, generator()))[:, 1] + 3
    assert np.corrcoef(beside, found[:200, 1])[0, 1] > 0.9


def test_strokes_grow_and_shrink_by_the_pixels_that_were_drawn() -> None:
    line = torch.zeros(1, 1, 15, 15)
    line[:, :, 5:10, :] = 100  # five pixels wide
    for by, widths in ((1.0, 7), (2.0, 9), (0.5, 6), (0.0, 5), (-0.5, 4), (-1.0, 3), (-2.0, 1), (-3.0, 0)):
        steps = torch.arange(3)
        shares = (torch.tensor([[abs(by)]]) - steps).clamp(0, 1) * (1 if by > 0 else -1)
        changed = Changes(1, (15, 15), stroke=shares).apply(line)
        assert changed[0, 0, :, 7].sum().item() == pytest.approx(100 * widths)
        assert changed[0, 0].T.unique(dim=0).shape[0] == 1  # the line runs through: no edge eats at it


def test_stroke_draws_reach_to_either_side_and_no_farther() -> None:
    square = torch.zeros(300, 1, 21, 21)
    square[:, :, 8:13, 8:13] = 255
    side = Augment(stroke=1.5)(square, generator())[:, 0, 10].sum(dim=1) / 255
    assert 2 <= side.min() < 2.2
    assert 7.8 < side.max() <= 8
    assert 0.4 < (side > 5).float().mean() < 0.6


def test_saturation_and_hue_leave_grey_and_luminance_alone() -> None:
    saturation, hue = 0.5 + torch.rand(20, generator=generator()), 6 * torch.rand(20, generator=generator())
    maps = colour_maps(saturation, hue)
    luminance = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luminance @ maps, luminance.expand(20, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(maps @ torch.ones(3), torch.ones(20, 3), rtol=0, atol=1e-5)


def test_no_turn_and_no_stretch_is_no_change_and_saturation_0_is_grey() -> None:
    torch.testing.assert_close(colour_maps(torch.ones(1), torch.zeros(1))[0], torch.eye(3), rtol=0, atol=1e-6)
    grey = colour_maps(torch.zeros(1), torch.ones(1))[0]
    torch.testing.assert_close(grey, torch.tensor([[0.299, 0.587, 0.114]] * 3), rtol=0, atol=1e-5)


def test_a_half_turn_of_the_hue_gives_the_complement() -> None:
    image = torch.tensor([150.0, 100.0, 100.0])  # reddish
    turned = colour_maps(torch.ones(1), torch.tensor([torch.pi]))[0] @ image
    luminance = 0.299 * 150 + 0.701 * 100
    torch.testing.assert_close(turned, 2 * luminance - image, rtol=0, atol=1e-2)


def test_colours_of_grey_images_do_not_change() -> None:
    augment = Augment(saturation=1, hue=180, grey=0.5)
    one = noise(channels=1)
    assert torch.equal(augment(one, generator()), one.float())
    three = one.repeat(1, 3, 1, 1)
    torch.testing.assert_close(augment(three, generator()), three.float(), rtol=0, atol=1e-2)


def test_probabilities_0_and_1_are_never_and_always() -> None:
    images = noise(200, size=(12, 12))
    grey = Augment(grey=1.0)(images, generator())
    assert (grey.amax(dim=1) - grey.amin(dim=1)).max() < 1e-2
    some = Augment(grey=0.25)(images, generator())
    is_grey = (some.amax(dim=1) - some.amin(dim=1)).amax(dim=(1, 2)) < 1e-2
    assert is_grey.float().mean() == pytest.approx(0.25, abs=0.1)
    erased = Augment(erase=1.0)(images, generator()) != images
    assert erased.any(dim=1).any(dim=1).any(dim=1).all()
    mirrored = Augment(flip=1.0)(images, generator())
    torch.testing.assert_close(mirrored, images.float().flip(3), rtol=0, atol=1e-3)


def test_blur_is_the_plain_sum_over_neighbours() -> None:
    deviation, radius = torch.tensor([0.0, 0.7, 2.0]), 5
    weights = blur_weights(deviation, radius)
    images = noise(3, 2, (9, 11)).double()
    changed = Changes(3, (9, 11), blur=weights).apply(images)
    assert torch.equal(changed[0], images[0].float())
    for number in (1, 2):
        offsets = np.arange(-radius, radius + 1)
        kernel = np.exp(-(offsets**2) / (2 * deviation[number].item() ** 2))
        kernel /= kernel.sum()
        padded = np.pad(images[number].numpy(), ((0, 0), (radius, radius), (radius, radius)), mode="edge")
        expected = np.zeros((2, 9, 11))
        for row in range(9):
            for column in range(11):
                window = padded[:, row : row + 2 * radius + 1, column : column + 2 * radius + 1]
                expected[:, row, column] = np.einsum("cij,i,j->c", window, kernel, kernel)
        np.testing.assert_allclose(changed[number].numpy(), expected, atol=1e-2)


def test_erased_boxes_have_the_mean_colour_and_the_wanted_area() -> None:
    images = noise(300, size=(50, 40))
    out = Augment(erase=1.0, erase_area=(0.1, 0.2))(images, generator())
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    inside = (out == mean).all(dim=1)
    assert torch.equal(torch.where(inside[:, None], images.float(), out), images.float())
    share = inside.float().mean(dim=(1, 2))
    assert 0.095 < share.min() < 0.11
    assert 0.19 < share.max() < 0.21  # sides are whole pixels
    rows, columns = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, inside.sum(dim=(1, 2)))  # one full rectangle each
    assert inside.any(dim=0).float().mean() > 0.99  # anywhere


def test_presets_are_about_what_they_are_named_after() -> None:
    for name in ("ink", "ink-strong"):
        assert Augment.named(name).flip == 0  # mirrored letters are other letters
    face, photo = Augment.named("faces"), Augment.named("photo")
    assert face.flip == 0.5
    assert face.translate < photo.translate
    assert face.shear == 0


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("ink", [[12.7851, 52.7851, 92.7851], [134.1004, 174.1004, 214.1004]]),
        ("photo", [[13.4828, 38.4897, 63.4966], [107.6974, 140.1062, 172.5150]]),
    ],
)
def test_the_draws_of_the_first_presets_stay_as_they_were(name: str, pixels: list[list[float]]) -> None:
    ramp = 2 * torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    changed = Augment.named(name)(ramp, generator())[:, :, 1, 2]
    torch.testing.assert_close(changed, torch.tensor(pixels), rtol=0, atol=1e-3)
