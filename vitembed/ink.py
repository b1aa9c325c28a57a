"""The ink of a scan or of a phone's picture, found and cut out: shadow, colour and noise of the ground go.

`find_ink` says where the ink lies and how much of it there is, `clean_scan` returns it on pure white, cropped to it and
centred. The page is divided by its ground, which a large window's closing estimates, and thresholded by Otsu's method.
A page without ink is told, never filled with invented ink, and light ink on a dark ground is turned round. What counts
as ink depends on the image alone, so that one image always gives the same pixels.

Printed rulings are not removed: a form's line and a signature's flourish look the same. Nor is ink turned upright by
its principal axis: its slope belongs to the writer, who keeps it within 3 degrees. Without that slope the equal error
rate of a plain comparison of pixels rose from 34 to 37 % (skilled forgeries) and from 11 to 14 % (random ones), and by
two points each where every scan had first been turned by up to 5 degrees.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter

# Chosen on 17 signatures as a phone sees them (shadow, coloured paper, noise, small or pale ink) by the overlap, as
# intersection over union, of the ink that is found with the ink that was drawn: 0.73 on the mean, 0.52 in the worst.
_MASK_SIDE = 1024  # the mask's longer side at most: more than a network reads, and averaging takes noise away
_GROUND_SIDE = 128  # likewise of the estimated ground, which changes slowly
_WINDOW = 4  # the ground's window is that part of the longer side: wider than strokes; 2 and 6 are worse
_NEARBY = 16  # the local mean is over a square that reaches that part of the longer side to every side
_DARKEST = 0.75  # share of the large window's estimate below which the small one's does not go; 1 is worse
_LEVEL = 200  # grey level of the evened ground, so that its noise has room above as well as below
_ROUGH = 0.03  # noise of the ground, as a share of its level, from which on the page is smoothed; scans have 0.007
_SMALL = 256  # pages with a shorter longer side are not smoothed: their strokes are a pixel wide
_NOISE = 3.0  # deviations of the ground's noise within which a pixel is ground; 2 and 5 are worse
_FAINTEST = 0.88  # ink reflects at most this share of what the ground does; that of 383 signatures 0.33 to 0.71
_ALONE = 16  # ink is a speck if the square around it, of that part of the longer side, holds less than a dot of ink
_DOT = 5e-5  # the area of that dot, as a share of the longer side squared: 7 pixels across in the largest mask
_CLOSE = 32  # faint ink is kept where a square of that part of the longer side around it holds dark ink
_MARGIN = 32  # white around the ink: that part of its longer side

Page = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Ink:
    """Where the ink of an image lies; all places are in pixels of the image, x to the right and y down.

    Attributes:
        mask: (h, w) bool, True on ink; of the image reduced by `step`.
        step: pixels of the image along a side of a pixel of the mask; 1 up to 1,024 pixels.
        share: of the image's pixels that are ink, in [0, 1]; 0 on a blank page.
        box: (left, top, right, bottom), the smallest that holds the ink; None on a blank page.
        centre: (x, y), its centre of mass; None on a blank page.
        light_on_dark: whether the ink is lighter than its ground.
    """

    mask: NDArray[np.bool_]
    step: int
    share: float
    box: tuple[int, int, int, int] | None
    centre: tuple[float, float] | None
    light_on_dark: bool

    @property
    def is_blank(self) -> bool:
        """Whether there is no ink."""
        return self.box is None

    @property
    def height(self) -> int:
        """Height of the ink in pixels of the image; 0 on a blank page."""
        return 0 if self.box is None else self.box[3] - self.box[1]

    @property
    def width(self) -> int:
        """Width of the ink in pixels of the image; 0 on a blank page."""
        return 0 if self.box is None else self.box[2] - self.box[0]


def find_ink(image: Image.Image) -> Ink:
    """Find the ink of an image of one drawing or signature on a ground of any colour.

    Args:
        image: mode "L" or "RGB", as `vitembed.images.load_image` returns it; any other is converted.
    """
    return _find(image)[0]


def clean_scan(image: Image.Image, *, binarize: bool = False) -> Image.Image:
    """Return the ink alone, dark on pure white, cropped to it and centred by its centre of mass.

    Grey levels are kept within the ink, as shares of the ground's, unless it is made black. The result is as large as
    it takes to hold all of the ink around its centre of mass, so that a network that pads it sees the centre in the
    middle, as in Hafemann, Sabourin and Oliveira 2017 (arXiv:1705.05787), whose canvas has one size for all and is
    scaled down afterwards.

    Args:
        image: mode "L" or "RGB", as `vitembed.images.load_image` returns it; any other is converted.
        binarize: make the ink that was found black, by Otsu's threshold between it and the white, so that how hard a
            pen pressed and how a scanner was set are not seen. Strokes much fainter than the rest may not be found.

    Returns:
        A new image of mode "L"; a blank page becomes a white image of its own size.
    """
    ink, page, ground = _find(image)
    if ink.box is None or ink.centre is None:
        return Image.new("L", image.size, 255)
    box = _grown(ink.box, ink.step, page.size)
    cut = _on_white(ink, page, ground, box)
    (left, top, right, bottom), (x, y) = ink.box, ink.centre
    margin = max(1, round(max(ink.width, ink.height) / _MARGIN))
    half = [math.ceil(max(x - left, right - x)) + margin, math.ceil(max(y - top, bottom - y)) + margin]
    canvas = Image.new("L", (2 * half[0], 2 * half[1]), 255)
    canvas.paste(cut, (round(half[0] - x) + box[0], round(half[1] - y) + box[1]))
    return Image.fromarray(np.where(ink_of_cleaned(canvas), np.uint8(0), np.uint8(255))) if binarize else canvas


def ink_of_cleaned(cleaned: Image.Image) -> NDArray[np.bool_]:
    """Return (h, w) bool, True on the ink of what `clean_scan` returned: what Otsu's threshold parts from the white."""
    ink: NDArray[np.bool_] = np.asarray(cleaned) <= otsu_threshold(cleaned.histogram())
    return ink


def otsu_threshold(histogram: ArrayLike) -> int:
    """Return the level that parts a histogram in two with the largest variance between the parts.

    Otsu 1979, "A threshold selection method from gray-level histograms".

    Args:
        histogram: (L,) counts of the levels 0 to L - 1, none negative, not all zero.

    Returns:
        Such a level t: one part has the levels up to t, the other those above. Where empty levels lie between the
            parts, the middle of them; 0 where there is one level only.

    >>> otsu_threshold([0, 3, 4, 0, 0, 9, 9])
    3
    """
    counts = np.asarray(histogram, dtype=np.float64)
    below = counts.cumsum()
    sums = (counts * np.arange(len(counts))).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):  # a part may be empty
        between = (sums * below[-1] - sums[-1] * below) ** 2 / (below * above)
    between = np.nan_to_num(between, nan=0.0, posinf=0.0)
    (best,) = np.nonzero(below == below[np.argmax(between)])
    return int(best[0] + best[-1]) // 2 if between.any() else 0


def _find(image: Image.Image) -> tuple[Ink, Image.Image, Page]:
    """Return the ink, the grey page with dark ink, and its ground, reduced."""
    page = image if image.mode == "L" else image.convert("L")
    cells = np.asarray(_reduced(page, _GROUND_SIDE))
    window = max(3, max(cells.shape) // _WINDOW)
    light_on_dark = _is_mostly_dark(cells, window) and _differs_upward(cells)
    if light_on_dark:
        page, cells = Image.fromarray(255 - np.asarray(page)), 255 - cells
    ground = _ground(cells, window)
    small = _reduced(page, _MASK_SIDE)
    step = math.ceil(max(page.size) / _MASK_SIDE)
    mask = _ink_of(_evened(small, ground, (0, 0, *small.size), small.size))
    box, centre = _extent(mask, step, page.size)
    share = float(np.count_nonzero(mask)) / mask.size
    return Ink(mask, step, share, box, centre, light_on_dark), page, ground


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """Average whole squares of pixels until the longer side is at most `side`."""
    step = math.ceil(max(image.size) / side)
    return image.reduce(step) if step > 1 else image


# Of 1,151 pictures (a phone's, scans with and without a black edge, letters thin, fat and cropped tightly) one rule
# alone took 21 and the other 163 for light ink, most of them shadows and black edges; both together took one.


def _is_mostly_dark(cells: Page, window: int) -> bool:
    """Tell whether most of a page lies nearer to the darkest than to the lightest level in the window around it.

    Ink is thin: where there is contrast, most of the page is ground.
    """
    high, low = _local_max(cells, window), 255 - _local_max(255 - cells, window)
    return int((2 * cells.astype(np.int32) - high - low).sum()) < 0


def _differs_upward(cells: Page) -> bool:
    """Tell whether the differences from the local mean are skewed to light.

    Ink is the rarer of the two, so that it differs more. The page is continued beyond its border by its reflection in
    the border's own level: a shadow that falls off towards the border then differs from its mean by nothing.
    """
    reach = max(3, max(cells.shape) // _NEARBY)
    pads = [(min(reach, side - 1),) * 2 for side in cells.shape]
    mean = np.pad(cells.astype(np.float32), pads, mode="reflect", reflect_type="odd")
    for (before, after), side in zip(pads, cells.shape, strict=True):
        sums = np.concatenate([np.zeros((1, mean.shape[1]), np.float32), mean.cumsum(axis=0)])
        mean = ((sums[before + after + 1 :] - sums[:side]) / (before + after + 1)).T
    differences = cells - mean
    return float((differences * np.abs(differences)).sum()) > 0


def _ground(cells: Page, window: int) -> Page:
    """Return the levels that the ground has where it is seen, and behind the ink."""
    small = max(3, window // 3)
    # Where a shadow meets the border, its fall goes on beyond; the ground is continued so, without its ink.
    pads = [(min(window, side - 1),) * 2 for side in cells.shape]
    inside = tuple(slice(before, before + side) for (before, _), side in zip(pads, cells.shape, strict=True))
    beyond = np.pad(_closed(cells, small).astype(np.int16), pads, mode="reflect", reflect_type="odd")
    wider = np.clip(beyond, cells.min(), cells.max()).astype(np.uint8)
    wider[inside] = cells
    ground = _closed(wider, window)
    # Where light falls off, the large window still takes the level of what lies further in: a smaller one corrects
    # that, but by so little that it cannot take a broad stroke for a shadow.
    rest = _closed(_divided(wider, ground), small)
    corrected = ground * np.maximum(rest / np.float32(_LEVEL), _DARKEST) + 0.5
    return np.ascontiguousarray(corrected.astype(np.uint8)[inside])


def _closed(values: Page, window: int) -> Page:
    """Close: what is darker and narrower than the window goes."""
    return 255 - _local_max(255 - _local_max(values, window), window)


def _divided(values: Page, ground: Page) -> Page:
    """Divide by the ground, whose level becomes `_LEVEL`."""
    quotients = values / np.maximum(ground, 1).astype(np.float32)
    quotients *= _LEVEL
    quotients += 0.5
    return np.minimum(quotients, 255, out=quotients).astype(np.uint8)


def _local_max(values: Page, window: int) -> Page:
    """Return the largest value of the square window around each place; beyond the border there is nothing."""
    before, after = (window - 1) // 2, window // 2
    for _ in range(2):  # along the columns, then along the rows
        rows = np.zeros((len(values) + window - 1, values.shape[1]), dtype=np.uint8)
        rows[before : len(rows) - after] = values
        span = 1
        while span < window:  # the maximum over 2, 4, 8 ... rows is that of two halves
            more = min(span, window - span)
            rows = np.maximum(rows[:-more], rows[more:])
            span += more
        values = rows.T
    return values


def _evened(page: Image.Image, ground: Page, box: tuple[int, int, int, int], size: tuple[int, int]) -> Page:
    """Divide part of a page by the ground behind it.

    Args:
        page: the part.
        ground: (h, w), of the whole page.
        box: (left, top, right, bottom) of the part in the whole.
        size: (width, height) of the whole.
    """
    across, down = ground.shape[1] / size[0], ground.shape[0] / size[1]
    place = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    behind = Image.fromarray(ground).resize(page.size, Image.Resampling.BILINEAR, box=place)
    return _divided(np.asarray(page), np.asarray(behind))


def _ink_of(evened: Page) -> NDArray[np.bool_]:
    """Return where an evened page is ink: dark by Otsu's threshold, or half as dark and close to such ink.

    The end of a stroke, or one drawn with little pressure, is fainter than the rest.
    """
    noise = _ground_level(evened)[1]
    if max(evened.shape) >= _SMALL and _highest_noise(evened) > _ROUGH * _LEVEL:
        evened = np.asarray(Image.fromarray(evened).filter(ImageFilter.BoxBlur(1)))
        noise = _highest_noise(evened)
    found = _thresholds(evened, noise)
    if found is None:
        return np.zeros(evened.shape, dtype=np.bool_)
    dark, faint = (evened <= level for level in found)
    dark = _without_specks(dark)
    near = _local_max(dark.view(np.uint8), max(3, max(dark.shape) // _CLOSE))
    return np.asarray(dark | (faint & (near > 0)))


def _ground_level(evened: Page) -> tuple[int, float]:
    """Return the level of the ground and the deviation of its noise, seen on the side that has no ink."""
    cumulative = np.asarray(Image.fromarray(evened).histogram()).cumsum()
    middle, quarter = (int(np.searchsorted(cumulative, share * evened.size)) for share in (0.5, 0.75))
    return middle, (quarter - middle) / 0.6745  # of a normal distribution


def _highest_noise(evened: Page) -> float:
    """Return the deviation of the noise in the noisiest quarter: in shadow it is a larger share of the light."""
    y, x = (side // 2 for side in evened.shape)
    quarters = (evened[:y, :x], evened[:y, x:], evened[y:, :x], evened[y:, x:])
    return max(_ground_level(quarter)[1] for quarter in quarters if quarter.size)


def _thresholds(evened: Page, noise: float) -> tuple[int, int] | None:
    """Return the levels up to which an evened page is dark and faint; None if what is darkest is too faint for ink.

    `noise` is the deviation of the ground's.
    """
    middle = _ground_level(evened)[0]
    counts = np.asarray(Image.fromarray(evened).histogram())
    # Ink is a hundredth of a page: left as it is, the variance of the ground's own noise would outweigh it.
    floor = max(0, math.floor(middle - max(1.0, _NOISE * noise)))
    levelled = counts.copy()
    levelled[floor:] = 0
    levelled[middle] += counts[floor:].sum()
    dark = otsu_threshold(levelled)
    found = counts[: dark + 1]
    if dark >= floor or not found.any() or np.average(np.arange(dark + 1), weights=found) > _FAINTEST * middle:
        return None
    return dark, (dark + floor) // 2


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Drop ink that stands alone: with less than a dot's area of ink in the square around it."""
    height, width = mask.shape
    least = _DOT * max(mask.shape) ** 2
    if least <= 1:
        return mask
    reach = max(1, max(mask.shape) // (2 * _ALONE))
    sums = np.zeros((height + 1, width + 1), dtype=np.int32)
    mask.cumsum(axis=0, dtype=np.int32, out=sums[1:, 1:]).cumsum(axis=1, out=sums[1:, 1:])
    ys, xs = np.nonzero(mask)
    top, bottom = np.maximum(ys - reach, 0), np.minimum(ys + reach + 1, height)
    left, right = np.maximum(xs - reach, 0), np.minimum(xs + reach + 1, width)
    alone = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] < least
    kept = mask.copy()
    kept[ys[alone], xs[alone]] = False
    return kept


def _extent(
    mask: NDArray[np.bool_], step: int, size: tuple[int, int]
) -> tuple[tuple[int, int, int, int] | None, tuple[float, float] | None]:
    """Return the box and the centre of mass of a mask, in pixels of the image of (width, height)."""
    columns, rows = mask.sum(axis=0), mask.sum(axis=1)
    total = int(rows.sum())
    if total == 0:
        return None, None
    (xs,), (ys,) = np.nonzero(columns), np.nonzero(rows)
    box = (int(xs[0]) * step, int(ys[0]) * step, (int(xs[-1]) + 1) * step, (int(ys[-1]) + 1) * step)
    x, y = (float(n @ (np.arange(len(n)) + 0.5)) / total * step for n in (columns, rows))
    return (box[0], box[1], min(box[2], size[0]), min(box[3], size[1])), (x, y)


def _grown(box: tuple[int, int, int, int], by: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box with some pixels more on every side, as far as the image of (width, height) reaches."""
    left, top, right, bottom = box
    return max(0, left - by), max(0, top - by), min(size[0], right + by), min(size[1], bottom + by)


def _on_white(ink: Ink, page: Image.Image, ground: Page, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of a page, evened, with pure white wherever there is no ink."""
    evened = _evened(page.crop(box), ground, box, page.size)
    # Its soft edge, a pixel wide, belongs to a stroke.
    near = _local_max(ink.mask.view(np.uint8), 3)
    left, top, right, bottom = (edge / ink.step for edge in box)
    wide = Image.fromarray(near).resize(
        (box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST, (left, top, right, bottom)
    )
    levels = np.minimum(np.rint(np.arange(256) * (255 / _LEVEL)), 255).astype(np.uint8)
    return Image.fromarray(np.where(np.asarray(wide) > 0, levels[evened], np.uint8(255)))
