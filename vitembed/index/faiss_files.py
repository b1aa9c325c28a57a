"""Files of FAISS: a flat one is read where it lies, against its own header; others in a process of their own.

FAISS checks little of what it reads, and an exception in one of its threads ends the process: a damaged file may do
that to a child process only.
"""

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError
from vitembed.index.sources import (
    Source,
    batch_rows,
    mapped_source,
    reading,
    required_ids,
    source_with_lines,
    with_note,
)

VECTORS, IDS, ABOUT = "index.faiss", "ids.jsonl", "index.json"  # of a FAISS export

# What a part of a FAISS file may take in memory beyond the file's own size.
_SPARE_BYTES = 1 << 30

# How FAISS begins a flat file: kind, dim, rows, two unused numbers, trained, metric, numbers that follow.
_FLAT = struct.Struct("<4siqqq?iQ")
_FLAT_KINDS = {b"IxFI": 0, b"IxF2": 1}  # by inner product and by L2, with FAISS's numbers for these metrics
_UNUSED = 1 << 20

_CHILD = "import sys; from vitembed.index import faiss_files; faiss_files.send_vectors(sys.argv[1])"


def flat_header(rows: int, dim: int) -> bytes:
    """Return what comes before the numbers in a flat file by inner product."""
    return _FLAT.pack(b"IxFI", dim, rows, _UNUSED, _UNUSED, True, 0, rows * dim)


@contextmanager
def faiss_source(path: Path, ids: Path | None) -> Iterator[Source]:
    """Open a FAISS file: a flat one where it lies, another one through a child process."""
    about = path / ABOUT
    if path.is_dir():
        if not (path / VECTORS).is_file():
            raise DataError(f"{path} is a folder without {VECTORS}; name a folder of a FAISS export, or a file")
        path, ids = path / VECTORS, ids or path / IDS
    ids = required_ids(path, ids)
    with reading(path), path.open("rb") as file:
        head = file.read(_FLAT.size)
    if len(head) < _FLAT.size or head[:1] != b"I" or not head[:4].isalnum():
        raise DataError(f"{path} is no FAISS index: it begins with {head[:4]!r}; expected .parquet, .npy or FAISS")
    with _opened(path, ids, head) as source:
        if not about.is_file():  # no folder, or one of an earlier version
            yield source
            return
        with reading(about):
            text = about.read_bytes()
        yield with_note(source, text, ABOUT)


@contextmanager
def _opened(path: Path, ids: Path, head: bytes) -> Iterator[Source]:
    if head[:4] in _FLAT_KINDS:
        yield mapped_source(path, ids, _flat(path, head))
    else:
        with _reconstructed(path, ids) as source:
            yield source


def _flat(path: Path, head: bytes) -> NDArray[Any]:
    """Return the rows of a flat file, mapped, after its header and its size have been compared."""
    kind, dim, rows, _, _, _, metric, numbers = _FLAT.unpack(head)
    expected, size = _FLAT.size + 4 * numbers, path.stat().st_size
    if dim < 1 or rows < 0 or metric != _FLAT_KINDS[kind] or numbers != rows * dim or size != expected:
        raise DataError(
            f"{path} is damaged: a flat FAISS index of {rows} vectors of {dim} in {size} bytes cannot be; "
            "write it again, or restore it from a copy"
        )
    if not rows:
        return np.empty((0, dim), np.float32)  # nothing cannot be mapped
    return np.memmap(path, "<f4", mode="r", offset=_FLAT.size, shape=(rows, dim))


@contextmanager
def _reconstructed(path: Path, ids: Path) -> Iterator[Source]:
    """Let a child process read the file and send its vectors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, stderr=log, env=environment
        ) as child,
    ):

        def receive(size: int) -> bytes:
            """Return the next bytes of the child, all of them."""
            assert child.stdout is not None
            data = child.stdout.read(size)
            if len(data) < size:
                child.wait()
                log.seek(0)
                said = log.read().decode(errors="replace").split("\n")
                reason = next((line for line in reversed(said) if line.strip()), f"it ended with {child.returncode}")
                raise DataError(
                    f"FAISS cannot give back the vectors of {path}: {reason.rpartition(': ')[2].strip()[:200]}"
                )
            return data

        def read(size: int) -> Iterator[NDArray[Any]]:
            for start in range(0, rows, size):
                count = min(size, rows - start)
                yield np.frombuffer(receive(4 * count * dim), "<f4").reshape(count, dim)

        try:
            rows, dim = struct.unpack("<qq", receive(16))
            if rows < 0 or dim < 1:
                raise DataError(f"{path} is damaged: {rows} vectors of {dim} cannot be; restore it from a copy")
            yield source_with_lines(path, ids, rows, dim, read)
        finally:
            child.kill()


def send_vectors(path: str) -> None:
    """Write the number of vectors of a FAISS file, their width and their numbers to standard output, as bytes.

    This is what the child process does: two int64, then float32, all little-endian.

    Raises:
        RuntimeError: from FAISS, which may also end the process.
        DataError: the file is of a kind that does not say which vector is whose.
    """
    import faiss

    if hasattr(faiss, "set_deserialization_vector_byte_limit"):  # so that a damaged length does not take all memory
        faiss.set_deserialization_vector_byte_limit(Path(path).stat().st_size + _SPARE_BYTES)
    index = faiss.read_index(path)
    if isinstance(index, faiss.IndexIDMap):
        raise DataError("an IndexIDMap gives its own numbers to the vectors; write the index within it (index.index)")
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.make_direct_map()
    if index.ntotal:
        index.reconstruct(0)  # raises here what would end the process in one of FAISS's threads
    sys.stdout.buffer.write(struct.pack("<qq", index.ntotal, index.d))
    for start in range(0, index.ntotal, batch_rows(index.d)):
        rows = index.reconstruct_n(start, min(batch_rows(index.d), index.ntotal - start))
        sys.stdout.buffer.write(np.ascontiguousarray(rows, "<f4").data)
