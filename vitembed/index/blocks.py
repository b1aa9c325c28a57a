"""Blocks of rows: which rows live, and whether the vectors are the ones that were written.

The rows of the vector file are numbered; every `BLOCK_ROWS` of them share a bitmap of the living and a checksum. A
`Block` is that record as the catalog stores it. `LiveRows` is what a process keeps of all blocks between two searches:
it reads only the blocks that changed, and compares every row with its block's checksum once, before the row is first
used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vitembed.errors import SearchIndexError
from vitembed.index.vectors import FloatArray, VectorFile, checksum

BoolArray = npt.NDArray[np.bool_]

# Rows under one checksum: 6 MB at 384 dimensions.
BLOCK_ROWS = 4_096


@dataclass(frozen=True)
class Block:
    """A run of `BLOCK_ROWS` rows, the last one shorter.

    Attributes:
        number: the block begins at row `number * BLOCK_ROWS`.
        rows: how many rows it has.
        live: how many of them live.
        bitmap: one bit a row, the lowest bit first; set where the row lives.
        checksum: CRC-32 of the bytes of all its rows, the dead ones too.
        generation: the change that last touched it; the catalog fills it in.
    """

    number: int
    rows: int = 0
    live: int = 0
    bitmap: bytes = b""
    checksum: int = 0
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


def extended(last: Block, vectors: FloatArray) -> Iterator[Block]:
    """Yield the last block, filled up, and the blocks after it that together take new rows, all of them living."""
    block = last
    while len(vectors):
        if block.rows == BLOCK_ROWS:
            block = Block(block.number + 1)
        taken, vectors = np.split(vectors, [BLOCK_ROWS - block.rows])
        mask = np.concatenate([block.mask(), np.ones(len(taken), np.bool_)])
        block = replace(block.with_mask(mask), checksum=checksum(taken, block.checksum))
        yield block


class LiveRows:
    """The blocks of an index as of one generation, and which of their rows were compared with their checksums.

    Attributes:
        generation: the change up to which the blocks are known; -1 when nothing is.
        blocks: all blocks by number.
        mask: (rows,) bool, which rows live.
    """

    def __init__(self, vectors: VectorFile) -> None:
        self._vectors = vectors
        self.forget()

    def forget(self) -> None:
        """Go back to knowing nothing."""
        self.generation = -1
        self.blocks: list[Block] = []
        self.mask: BoolArray = np.empty(0, np.bool_)
        self._verified: dict[int, int] = {}  # block -> how many of its rows matched its checksum
        self._checksums: dict[int, int] = {}  # block -> that checksum

    def update(self, generation: int, changed: Sequence[Block]) -> None:
        """Take in the blocks that changed since `self.generation`, by number.

        Raises:
            SearchIndexError: blocks are missing, or the vector file is too short for them.
        """
        blocks = self.blocks[:]
        for block in changed:
            blocks[block.number : block.number + 1] = [block]
        numbered = all(block.number == number for number, block in enumerate(blocks))
        if not numbered or any(block.rows != BLOCK_ROWS for block in blocks[:-1]):
            raise self._damaged("its catalog has lost blocks of rows")
        mask = np.zeros(blocks[-1].stop if blocks else 0, np.bool_)
        mask[: len(self.mask)] = self.mask
        for block in changed:
            mask[block.start : block.stop] = block.mask()
        self._vectors.read(len(mask))
        self.generation, self.blocks, self.mask = generation, blocks, mask

    def verified(self, mask: BoolArray) -> FloatArray:
        """Return all rows, (rows, dim), after comparing the blocks that hold a row of the mask with their checksums.

        Raises:
            SearchIndexError: a block does not match.
        """
        vectors = self._vectors.read(len(self.mask))
        for block in self.blocks:
            if mask[block.start : block.stop].any():
                self.verify(block)
        return vectors

    def verify(self, block: Block) -> None:
        """Compare those rows of a block with its checksum that were not compared before.

        Raises:
            SearchIndexError: they do not match.
        """
        known = self._verified.get(block.number, 0)
        if known == block.rows:
            return
        fresh = self._vectors.read(block.stop)[block.start + known :]
        if checksum(fresh, self._checksums.get(block.number, 0)) != block.checksum:
            raise self._damaged(f"rows {block.start} to {block.stop - 1} do not match their checksum")
        self._verified[block.number], self._checksums[block.number] = block.rows, block.checksum

    def _damaged(self, what: str) -> SearchIndexError:
        return SearchIndexError(
            f"{self._vectors.path} is damaged: {what}; restore the index from a copy or build it again"
        )
