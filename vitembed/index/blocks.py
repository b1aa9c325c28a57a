"""Blocks of rows: which rows live.

The rows of the vector file are numbered; every `BLOCK_ROWS` of them share a bitmap of the living, and a record in the
catalog, which is what a change touches and what a reader takes in again after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]

# Rows under one bitmap: 6 MB at 384 dimensions.
BLOCK_ROWS = 4_096


@dataclass(frozen=True)
class Block:
    """A run of `BLOCK_ROWS` rows, the last one shorter.

    Attributes:
        number: the block begins at row `number * BLOCK_ROWS`.
        rows: how many rows it has.
        live: how many of them live.
        bitmap: one bit a row, the lowest bit first; set where the row lives.
        generation: the change that last touched it; the catalog fills it in.
    """

    number: int
    rows: int = 0
    live: int = 0
    bitmap: bytes = b""
    generation: int = 0

    @property
    def start(self) -> int:
        """Number of its first row."""
        return self.number * BLOCK_ROWS

    @property
    def stop(self) -> int:
        """Number of the row after its last."""
        return self.start + self.rows

    def mask(self) -> BoolArray:
        """Return which of its rows live, (rows,) bool."""
        bits = np.frombuffer(self.bitmap, np.uint8)
        return np.unpackbits(bits, count=self.rows, bitorder="little").astype(np.bool_)

    def with_mask(self, mask: BoolArray) -> "Block":
        """Return the block with these rows living; the mask's length becomes its number of rows."""
        bitmap = np.packbits(mask, bitorder="little").tobytes()
        return replace(self, rows=len(mask), live=int(mask.sum()), bitmap=bitmap)


def extended(last: Block, count: int) -> Iterator[Block]:
    """Yield the last block, filled up, and the blocks after it that together take `count` new rows, all living."""
    block = last
    while count:
        if block.rows == BLOCK_ROWS:
            block = Block(block.number + 1)
        taken = min(count, BLOCK_ROWS - block.rows)
        block = block.with_mask(np.concatenate([block.mask(), np.ones(taken, np.bool_)]))
        count -= taken
        yield block
