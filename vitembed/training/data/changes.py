"""What happens to the pixels of a batch of training images, once it has been drawn: `Changes`.

`vitembed.training.data.augment` draws; here nothing is random. A batch may be changed as a whole or a slice at a time,
again and again, with the same result: the drawn numbers are a few dozen an image, the pixels stay as they are.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitembed.errors import VectorError

BEND_POINTS = 8  # along a side; a cell is then as wide as the 4 of 29 pixels that Simard et al. smooth with

CACHED = 1 << 20  # bytes of floats that are changed together on a processor

# NTSC's colours: Y is what a grey picture shows, the angle of (I, Q) is the hue and its length the saturation.
_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]], dtype=torch.float64
)


@dataclass(frozen=True)
class Changes:
    """The changes drawn for B images, None for each kind that is not wanted; `changes[a:b]` are those of a slice.

    Attributes:
        count: B.
        size: (height, width) of the images.
        padding: what comes in from outside, "border" or "reflection".
        affine: (B, 2, 3), maps from output to input coordinates, both in [-1, 1] as `grid_sample` takes them.
        bend: (B, 2, 8, 8), displacements in x and y of points on a grid, in the same coordinates.
        stroke: (B, S), shares of S dilations by a pixel, one after the other; below 0 they are erosions.
        light: (B, 2), factors of brightness and contrast.
        colour: (B, 3, 3), maps from RGB to RGB; images without three channels are left alone.
        blur: (B, R + 1), the weights of a pixel itself and of each neighbour at a distance of 1 ... R.
        boxes: (B, 4), top, left, bottom and right of what is erased, the last two exclusive.
    """

    count: int
    size: tuple[int, int]
    padding: str = "border"
    affine: Tensor | None = None
    bend: Tensor | None = None
    stroke: Tensor | None = None
    light: Tensor | None = None
    colour: Tensor | None = None
    blur: Tensor | None = None
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> "Changes":
        tensors = {name: tensor[part] for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, count=len(range(self.count)[part]), **tensors)

    def to(self, device: torch.device | str) -> "Changes":
        """Return the changes with their numbers on a device; `apply` does so itself, for each slice anew."""
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **tensors)

    @torch.no_grad()
    def apply(self, pixels: Tensor) -> Tensor:
        """Return changed pixels; on a processor a slice gives what the whole gives there, to the bit.

        Args:
            pixels: (B, C, H, W) of any dtype, in [0, 255]; they stay as they are.

        Returns:
            (B, C, H, W) float32 in [0, 255], on the device of the pixels.

        Raises:
            VectorError: if the changes were drawn for another number or size of images.
        """
        if pixels.ndim != 4 or len(pixels) != self.count or tuple(pixels.shape[2:]) != self.size:
            raise VectorError(
                f"expected pixels of shape ({self.count}, C, {self.size[0]}, {self.size[1]}), which the changes were "
                f"drawn for; got {tuple(pixels.shape)}"
            )
        drawn = self.to(pixels.device)
        at_once = _images_at_once(pixels)
        if self.count <= at_once:
            return drawn._apply(pixels.float())
        out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        for start in range(0, self.count, at_once):
            part = slice(start, start + at_once)
            out[part] = drawn[part]._apply(pixels[part].float())
        return out

    def _apply(self, images: Tensor) -> Tensor:
        """Change float32 images that lie where the numbers do."""
        if self.affine is not None or self.bend is not None:
            grid = _grid(self, images.device)
            images = F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)
        if self.stroke is not None:
            images = _thicken(images, self.stroke)
        if self.light is not None:
            images = _relight(images, self.light)
        if self.colour is not None and images.shape[1] == 3:
            images = torch.bmm(self.colour, images.flatten(2)).view_as(images).clamp(0, 255)
        if self.blur is not None:
            images = _smooth(_smooth(images, self.blur, dim=2), self.blur, dim=3)
        if self.boxes is not None:
            images = _erase(images, self.boxes)
        return images

    def _tensors(self) -> dict[str, Any]:
        """Return what was drawn, by the name of the field."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}


def _images_at_once(pixels: Tensor) -> int:
    """Return how many images are changed together: a cache full of floats on a processor, all on other devices.

    Larger intermediate results are handed back to the system and come again page by page (measured: photographs of
    224 x 224 took three times as long in batches of 32).
    """
    if pixels.device.type != "cpu":
        return max(1, len(pixels))
    each = 4 * pixels[:1].numel()
    return max(torch.get_num_threads(), CACHED // max(1, each))


def colour_maps(saturation: Tensor, hue: Tensor) -> Tensor:
    """Return maps of RGB that leave the luminance alone: a turn and a stretch of the plane of I and Q of YIQ.

    Args:
        saturation: (B,) factors; 0 makes grey.
        hue: (B,) turns, in radians.

    Returns:
        (B, 3, 3) float32.
    """
    yiq = torch.zeros(len(hue), 3, 3, dtype=torch.float64)
    yiq[:, 0, 0] = 1
    along, across = saturation.double() * torch.cos(hue.double()), saturation.double() * torch.sin(hue.double())
    yiq[:, 1, 1], yiq[:, 1, 2], yiq[:, 2, 1], yiq[:, 2, 2] = along, -across, across, along
    maps: Tensor = torch.linalg.inv(_TO_YIQ) @ yiq @ _TO_YIQ
    return maps.float()


def blur_weights(deviation: Tensor, radius: int) -> Tensor:
    """Return (B, radius + 1) weights of a Gaussian blur, for (B,) deviations in pixels; 0 is no blur.

    Those of one image, with each neighbour counted on both sides, sum to 1.
    """
    distance = torch.arange(radius + 1, dtype=torch.float32)
    weights = torch.exp(-((distance / deviation.clamp(min=1e-6)[:, None]) ** 2) / 2)
    return weights / (2 * weights.sum(dim=1, keepdim=True) - weights[:, :1])


def _grid(drawn: Changes, device: torch.device) -> Tensor:
    """Return (B, H, W, 2): where each pixel of the result lies in the image, x and y in [-1, 1]."""
    height, width = drawn.size
    # Middles of pixels, as `F.affine_grid` has them.
    x = torch.linspace(-1, 1, width, device=device) * (width - 1) / width
    y = (torch.linspace(-1, 1, height, device=device) * (height - 1) / height)[:, None]
    if drawn.affine is None:
        grid = torch.stack([x.expand(height, width), y.expand(height, width)]).expand(drawn.count, 2, height, width)
    else:
        across, down, shift = drawn.affine[..., None, None].unbind(dim=2)  # each (B, 2, 1, 1)
        grid = across * x + down * y + shift  # (B, 2, H, W)
    if drawn.bend is not None:
        grid = grid + _bent(drawn.bend, drawn.size)
    return grid.permute(0, 2, 3, 1)


def _bent(bend: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, 2, H, W): how far each pixel moves.

    A product a plane: `matmul` would fold the images into the rows of one product, and round by their number.
    """
    planes = bend.flatten(0, 1)  # (2B, 8, 8)
    rows, columns = (_spread(side, bend.device).expand(len(planes), -1, -1) for side in size)
    return torch.bmm(torch.bmm(rows, planes), columns.transpose(1, 2)).view(len(bend), 2, *size)


def _spread(side: int, device: torch.device) -> Tensor:
    """Return (side, BEND_POINTS): how much each grid point moves each pixel, a Gaussian one cell wide.

    The squares of a row sum to 1, so that a pixel's displacement has the deviation of the points'.
    """
    pixels = (torch.arange(side, device=device) + 0.5) * (BEND_POINTS - 1) / side
    weights = torch.exp(-((pixels[:, None] - torch.arange(BEND_POINTS, device=device)) ** 2) / 2)
    return weights / weights.square().sum(dim=1, keepdim=True).sqrt()


def _thicken(images: Tensor, shares: Tensor) -> Tensor:
    """Dilate images by squares, a pixel wider with each of the (B, S) shares, or erode where these are below 0.

    Erosion is dilation of the negative: one way of computing does for both.
    """
    sign = torch.where(shares[:, 0] < 0, -1.0, 1.0)[:, None, None, None]
    images = images * sign
    for share in shares.abs().T[..., None, None, None]:
        images = torch.lerp(images, _dilate(_dilate(images, dim=2), dim=3), share)
    return images * sign


def _dilate(images: Tensor, *, dim: int) -> Tensor:
    """Return the largest of each pixel and its two neighbours along a dimension."""
    size = images.shape[dim]
    out = images.clone()
    before, after = images.narrow(dim, 0, size - 1), images.narrow(dim, 1, size - 1)
    later, earlier = out.narrow(dim, 1, size - 1), out.narrow(dim, 0, size - 1)
    torch.maximum(later, before, out=later)
    torch.maximum(earlier, after, out=earlier)
    return out


def _relight(images: Tensor, light: Tensor) -> Tensor:
    """Multiply distances from the image's mean by the contrast, then all by the brightness; light is (B, 2)."""
    brightness, contrast = light.T[..., None, None, None]  # each (B, 1, 1, 1)
    mean = _mean(images, (1, 2, 3))
    changed: Tensor = ((images - mean) * contrast + mean) * brightness
    return changed.clamp(0, 255)


def _smooth(images: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """Weigh each pixel and its neighbours along a dimension with (B, R + 1) weights; the edge is repeated outside.

    As sums of shifted images: a convolution with a kernel an image would be as many groups, and round by their number.
    """
    radius, size = weights.shape[1] - 1, images.shape[dim]
    border = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)  # the last dimension first
    padded = F.pad(images, border, mode="replicate")
    weights = weights[:, :, None, None, None]
    out = images * weights[:, 0]
    for distance in range(1, radius + 1):
        pair = padded.narrow(dim, radius - distance, size) + padded.narrow(dim, radius + distance, size)
        out.addcmul_(pair, weights[:, distance])
    return out.clamp_(0, 255)


def _erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Paint (B, 4) boxes in the mean colour of their image."""
    top, left, bottom, right = boxes.T[..., None, None, None]  # each (B, 1, 1, 1)
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, 1, H, W)
    return torch.where(inside, _mean(images, (2, 3)), images)


def _mean(images: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return means of each image, whose rounding does not depend on how many images there are."""
    if len(images) > 1:
        return images.mean(dim=dims, keepdim=True)
    # Several threads share the sum of a lone image, and add its parts in another order than those of many.
    return torch.cat([images, images]).mean(dim=dims, keepdim=True)[: len(images)]
