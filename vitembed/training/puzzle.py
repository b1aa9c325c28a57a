"""Jigsaw puzzles of images: cut, shuffle, mask, and a head that says where each tile belongs.

Letters in shape comments, beside those of `vitembed.vit`: N tiles and as many places, s the side of a tile in pixels,
t its side in patches.
"""

import torch
from torch import Tensor, nn

from vitembed.embedding_net import EmbeddingNet
from vitembed.errors import ConfigError
from vitembed.vit import ViT

NOT_ASKED = -100  # the target of a tile whose place is not asked for; what cross_entropy ignores


class PuzzleNet(nn.Module):
    """A network with a head that names the place of each tile: three layers, as in Jigsaw-ViT.

    Args:
        network: its ViT reads the puzzle; it is shared, not copied.
        tile: side of a tile in patches.

    Attributes:
        grid: rows and columns of tiles.
        side: side of a tile in pixels.

    Raises:
        ConfigError: if the patches cannot be put together to two tiles or more, or the backbone is no ViT of ours.
    """

    def __init__(self, network: EmbeddingNet, tile: int) -> None:
        super().__init__()
        if not isinstance(network.backbone, ViT):
            raise ConfigError(
                "a jigsaw needs a ViT of vitembed, such as S/16: a backbone of others, here "
                f"{type(network.backbone.module).__name__}, has no patches to put together"
            )
        vit = network.vit.config
        rows, columns = vit.grid
        if rows % tile or columns % tile or rows * columns == tile**2:
            raise ConfigError(
                f"a puzzle needs two tiles or more of {tile} x {tile} patches; this network has {rows} x {columns} "
                "patches: choose a tile that divides both, or another image size"
            )
        self.network = network
        self.tile = tile
        self.grid = (rows // tile, columns // tile)
        self.side = tile * vit.patch_size
        places = self.grid[0] * self.grid[1]
        width = vit.width
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, places)
        )

    def forward(self, puzzle: Tensor) -> Tensor:
        """Return (B, N, N) logits, of N tiles row by row over N places, for normalised (B, C, H, W) puzzles."""
        tokens = self.network.vit(puzzle, patches=True, positions=False).patches
        rows, columns = self.grid
        # The patches of a tile are averaged: (B, patches, W) -> (B, rows, t, columns, t, W) -> (B, N, W)
        tokens = tokens.reshape(len(tokens), rows, self.tile, columns, self.tile, -1).mean(dim=(2, 4)).flatten(1, 2)
        logits: Tensor = self.head(tokens)
        return logits

    def puzzle(
        self, pixels: Tensor, *, mask: float, min_contrast: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Cut, shuffle and mask images.

        Args:
            pixels: (B, C, H, W) in [0, 255].
            mask: share of the tiles to hide, in [0, 1); one tile stays at least.
            min_contrast: see `JigsawConfig`.
            generator: source of randomness, on the processor.

        Returns:
            The puzzles, (B, C, H, W) normalised, and (B, N) int64: the place that the tile at each position came from,
            `NOT_ASKED` where it is masked or has no contrast.
        """
        contrast = cut(pixels.float(), self.side).flatten(3).std(dim=-1, correction=0).amax(dim=-1)  # (B, N)
        tiles = cut(self.network.normalise(pixels), self.side)  # (B, N, C, s, s)
        # Two random permutations of the tiles of each image: their order, and a draw of those to hide, exactly so many.
        order, draw = torch.rand(2, *contrast.shape, generator=generator).argsort(dim=-1).to(pixels.device)
        hidden = draw < min(round(mask * order.shape[1]), order.shape[1] - 1)
        tiles = tiles.gather(1, order[:, :, None, None, None].expand_as(tiles))
        tiles = tiles.masked_fill(hidden[:, :, None, None, None], 0.0)  # the mean, as pixels are normalised
        places = order.masked_fill(hidden | (contrast.gather(1, order) < min_contrast), NOT_ASKED)
        return lay(tiles, self.grid), places


def cut(images: Tensor, side: int) -> Tensor:
    """Return the tiles (B, N, C, side, side), row by row, of (B, C, H, W) images."""
    height, width = images.shape[-2:]
    tiles = images.reshape(*images.shape[:2], height // side, side, width // side, side)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, C, rows, s, columns, s) -> (B, rows x columns, C, s, s)


def lay(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the (B, C, H, W) images that (B, N, C, side, side) tiles make when laid row by row on a grid."""
    images = tiles.reshape(len(tiles), *grid, *tiles.shape[2:])
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, rows, columns, C, s, s) -> (B, C, H, W)
