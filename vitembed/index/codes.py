"""Rows in one byte a number, for scanning an eighth of the time that the rows themselves take.

Every `CODE_ROWS` rows that have filled up are coded together, each dimension by its own step: x ~ step * code, with
codes in [-127, 127]. The codes are a cache: they choose which rows are looked at, never what a row scores. With each
block goes its slack, the largest distance |x - step * code| among its rows, and the largest |code|: they bound by how
much an inner product with the codes can be off, and so make the choice provably complete (see `vitembed.index.exact`).

A block lies in the file as its steps (dim float32) and then its codes (CODE_ROWS x dim uint8, offset by 128, as FAISS's
QT_8bit_direct_signed has them).
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index.mapped import Bytes, MappedFile
from vitembed.index.vectors import FloatArray, StoredArray

# Rows coded together: 6 MB of codes at 384 dimensions. A multiple of the rows under one bitmap.
CODE_ROWS = 16_384

_OFFSET = 128
_LARGEST = 127


@dataclass(frozen=True)
class CodeRecord:
    """What the catalog knows of a block of codes.

    Attributes:
        number: the block begins at row `number * CODE_ROWS`.
        checksum: CRC-32 of its bytes in the file.
        slack: the largest distance of a row from its code.
        norm: the largest length of a code.
        generation: the change that wrote it; the catalog fills it in.
    """

    number: int
    checksum: int
    slack: float
    norm: float
    generation: int = 0


@dataclass(frozen=True, eq=False)
class CodedRows:
    """A block of coded rows.

    Attributes:
        steps: (dim,) float32, the step of each dimension; 0 where all rows are 0.
        codes: (CODE_ROWS, dim) uint8, offset by 128.
        slack: the largest distance of a row from its code, |x - steps * code|.
        norm: the largest length of a code, |code|.
    """

    steps: FloatArray
    codes: Bytes
    slack: float
    norm: float


def codes_path(vectors: Path) -> Path:
    """Return where the codes of a file of vectors lie."""
    return vectors.with_suffix(".codes")


def encode(vectors: StoredArray) -> CodedRows:
    """Code rows (n, dim)."""
    rows = vectors.astype(np.float32)
    steps = np.abs(rows).max(axis=0) / np.float32(_LARGEST)
    steps[steps < np.finfo(np.float32).tiny] = 0.0  # a dimension of zeros has the code 0
    codes = np.clip(np.rint(rows / np.where(steps > 0, steps, 1)), -_LARGEST, _LARGEST)
    rows -= codes * steps
    slack = float(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64).max()))
    norm = float(np.sqrt(np.einsum("nd,nd->n", codes, codes, dtype=np.float64).max()))
    # Room for the rounding of the differences just taken.
    return CodedRows(steps, (codes + _OFFSET).astype(np.uint8), slack * (1 + 1e-5) + 1e-6, norm)


class CodeFile(MappedFile):
    """The file of coded blocks.

    Args:
        path: the file, which may be missing.
        dim: numbers in a row.
    """

    def __init__(self, path: Path, dim: int) -> None:
        super().__init__(path)
        self._steps = dim * 4
        self._stride = self._steps + CODE_ROWS * dim
        self._shape = (CODE_ROWS, dim)

    def put(self, number: int, rows: CodedRows) -> CodeRecord:
        """Write a block and return its record.

        Raises:
            SearchIndexError: the disk is full or cannot be written.
        """
        if not self.path.exists():
            self.path.touch()
        data = np.concatenate([rows.steps.astype("<f4").view(np.uint8), rows.codes.reshape(-1)])
        self.write(number * self._stride, data, truncate=False)
        return CodeRecord(number, zlib.crc32(data.data), rows.slack, rows.norm)

    def get(self, record: CodeRecord, verified: bool) -> CodedRows | None:
        """Return a block, mapped; None if it is not what was written.

        Args:
            record: what the catalog knows of it.
            verified: whether its checksum was compared before.
        """
        start, stop = record.number * self._stride, (record.number + 1) * self._stride
        try:
            if self.size() < stop:
                return None
        except SearchIndexError:
            return None
        data = self.mapped(self.size())[start:stop]
        if not verified and zlib.crc32(data.data) != record.checksum:
            return None
        return CodedRows(
            data[: self._steps].view("<f4"), data[self._steps :].reshape(self._shape), record.slack, record.norm
        )
