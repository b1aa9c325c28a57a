"""The vectors of an index: one append-only file of float32 rows, read where it lies through a memory map.

Row r begins at byte `r * dim * 4`; there is no header, because what the file means (its width, how many of its rows are
committed, their checksums, which of them live) is the catalog's to say. Committed rows are never changed in place. Rows
past the committed count are what a killed or rolled-back writer left behind: no reader looks at them and the next
writer overwrites them.
"""

import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitembed.errors import SearchIndexError

FloatArray = npt.NDArray[np.float32]

_FLOAT = np.dtype("<f4")


class VectorFile:
    """The file of rows.

    Args:
        path: the file, which must exist.
        dim: numbers in a row.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim
        self._stride = dim * _FLOAT.itemsize
        self._map: FloatArray = np.empty((0, dim), _FLOAT)

    def append(self, row: int, vectors: FloatArray) -> None:
        """Write rows from number `row` on and force them to the disk; whatever lay there or beyond is replaced.

        Args:
            row: the committed count, where the first new row goes.
            vectors: (n, dim) float32.

        Raises:
            SearchIndexError: the file is shorter than `row` rows, or the disk is full or cannot be written.
        """
        self._require(row)
        start = row * self._stride
        try:
            with self.path.open("r+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write(np.ascontiguousarray(vectors, _FLOAT).data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SearchIndexError(
                f"{self.path}: cannot write the vectors ({error.strerror}); nothing was changed"
            ) from error

    def read(self, rows: int) -> FloatArray:
        """Return the first `rows` rows, (rows, dim) float32, mapped and read-only.

        Raises:
            SearchIndexError: the file is missing or shorter than that.
        """
        self._require(rows)
        if rows > len(self._map):
            self._map = np.memmap(self.path, _FLOAT, mode="r", shape=(rows, self.dim))
        # A plain array of the mapped pages: np.memmap's own indexing costs more than FAISS takes for a small block.
        return self._map[:rows].view(np.ndarray)

    def close(self) -> None:
        """Let go of the map."""
        self._map = np.empty((0, self.dim), _FLOAT)

    def _require(self, rows: int) -> None:
        # Before every use, because touching a mapped page that a truncation took away would kill the process.
        try:
            found = self.path.stat().st_size // self._stride
        except OSError as error:
            raise SearchIndexError(
                f"{self.path}: cannot read the vectors ({error.strerror}); restore the index from a copy"
            ) from error
        if found < rows:
            raise SearchIndexError(
                f"{self.path} is damaged: {rows} rows were committed, {found} are there; "
                "restore the index from a copy or build it again"
            )


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(vectors: FloatArray, previous: int = 0) -> int:
    """Return the CRC-32 of the rows' bytes, continued from the checksum of the rows before them."""
    return zlib.crc32(np.ascontiguousarray(vectors, _FLOAT).data, previous) if len(vectors) else previous
