"""A file that is written at its end and read through a memory map."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.errors import SearchIndexError

Bytes = npt.NDArray[np.uint8]


class VanishedError(SearchIndexError):
    """A file is not there: damage, or another process has just rewritten the index."""


class MappedFile:
    """An open file and its map.

    The file stays open, so that what is mapped can still be read after another process has deleted its name. Its size
    is asked before every use: touching a mapped page that a truncation took away would kill the process.

    Args:
        path: the file; it is opened when it is first needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._map: Bytes = np.empty(0, np.uint8)

    def size(self) -> int:
        """Return the size of the file in bytes.

        Raises:
            SearchIndexError: it is missing or cannot be read.
        """
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            kind = VanishedError if isinstance(error, FileNotFoundError) else SearchIndexError
            raise kind(f"{self.path}: cannot read it ({error.strerror}); restore the index from a copy") from error

    def mapped(self, size: int) -> Bytes:
        """Return the first `size` bytes, which must be there, mapped and read-only."""
        if size > len(self._map):
            assert self._descriptor is not None, "size() comes first"
            self._map = np.frombuffer(mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ), np.uint8)
        return self._map[:size]

    def write(self, start: int, data: npt.NDArray[Any], *, truncate: bool) -> None:
        """Write data from a byte on and force it to the disk.

        Args:
            start: where the data go; the file is at least that long.
            data: what to write, of any type.
            truncate: whether to cut off first what lies from `start` on.

        Raises:
            SearchIndexError: the disk is full or cannot be written.
        """
        try:
            with self.path.open("r+b") as file:
                if truncate:
                    file.truncate(start)
                file.seek(start)
                file.write(np.ascontiguousarray(data).data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SearchIndexError(f"{self.path}: cannot write ({error.strerror}); nothing was changed") from error

    def close(self) -> None:
        """Let go of the file and its map."""
        self._map = np.empty(0, np.uint8)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
