"""The vectors of an index: one append-only file of rows, read where it lies through a memory map.

Row r begins at byte `r * dim * itemsize`; there is no header, because what the file means (its width and type, how many
of its rows are committed, their checksums, which of them live) is the catalog's to say. Committed rows are never
changed in place. Rows past the committed count are what a killed or rolled-back writer left behind: no reader looks at
them and the next writer overwrites them.
"""

import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.errors import SearchIndexError
from vitembed.index.mapped import MappedFile

FloatArray = npt.NDArray[np.float32]
StoredArray = npt.NDArray[np.float32] | npt.NDArray[np.float16]
ChecksumArray = npt.NDArray[np.uint32]

# The types that rows are stored in.
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class VectorFile(MappedFile):
    """The file of rows.

    Args:
        path: the file, which must exist.
        dim: numbers in a row.
        dtype: "float32" or "float16".
    """

    def __init__(self, path: Path, dim: int, dtype: str) -> None:
        super().__init__(path)
        self.dim = dim
        self.dtype = DTYPES[dtype]
        self.stride = dim * self.dtype.itemsize

    def append(self, row: int, vectors: StoredArray) -> None:
        """Write rows from number `row` on and force them to the disk; whatever lay there or beyond is replaced.

        Args:
            row: the committed count, where the first new row goes.
            vectors: (n, dim) of the stored type.

        Raises:
            SearchIndexError: the file is shorter than `row` rows, or the disk is full or cannot be written.
        """
        self.read(row)
        self.write(row * self.stride, vectors, truncate=True)

    def read(self, rows: int) -> StoredArray:
        """Return the first `rows` rows, (rows, dim), mapped and read-only.

        Raises:
            SearchIndexError: the file is missing or shorter than that.
        """
        found = self.size() // self.stride
        if found < rows:
            raise SearchIndexError(
                f"{self.path} is damaged: {rows} rows were committed, {found} are there; "
                "restore the index from a copy or build it again"
            )
        array: StoredArray = self.mapped(rows * self.stride).view(self.dtype).reshape(rows, self.dim)
        return array


def checksums(vectors: StoredArray, rows: Iterable[int] | None = None) -> ChecksumArray:
    """Return the CRC-32 of the bytes of each row, or of these rows."""
    flat = np.ascontiguousarray(vectors).view(np.uint8).reshape(-1).data
    stride = vectors.shape[1] * vectors.itemsize
    numbers = range(len(vectors)) if rows is None else rows
    return np.array([zlib.crc32(flat[row * stride : (row + 1) * stride]) for row in numbers], np.uint32)


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
