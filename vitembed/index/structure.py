"""Approximate search: FAISS structures over the rows of an index, kept in one file each.

A structure is a cache: it proposes rows, which are then scored as exact search scores them. Its ids are row numbers, so
that rows which have died since are left out by a selector, on every kind. FAISS does not check what it reads and a
damaged file can end the process, so a file is compared with its checksum before FAISS sees it.

    hnsw    graph of 32 links a row over codes of one byte a number (Malkov and Yashunin, arXiv:1603.09320)
    ivf     lists around k-means centres, codes of one byte a number
    ivfpq   the same, product-quantised to a quarter or an eighth of a byte a number (Jegou et al., TPAMI 2011)
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from vitembed.errors import SearchIndexError, unknown_name
from vitembed.files import atomic_path
from vitembed.index.blocks import BoolArray
from vitembed.index.exact import RowArray
from vitembed.index.faiss_kernels import load_faiss
from vitembed.index.vectors import FloatArray

KINDS = ("hnsw", "ivf", "ivfpq")

# The least number of rows that a kind is built of.
MIN_ROWS = 1_000

_LINKS = 32
_CONSTRUCTION = 80  # HNSW's breadth of search while it is built
_TRAINING_ROWS = 50  # rows for each centre; FAISS wants at least 39
_TRAINING_LIMIT = 1_000_000

_READ = 1 << 24


class Structure:
    """A FAISS index whose ids are rows.

    Args:
        index: the FAISS index.
        kind: one of `KINDS`.
    """

    def __init__(self, index: Any, kind: str) -> None:
        self._index = index
        self.kind = kind

    @classmethod
    def train(cls, kind: str, sample: FloatArray, rows: int, code_bytes: int = 0) -> Self:
        """Make an empty structure.

        Args:
            kind: one of `KINDS`.
            sample: (n, dim) float32 unit rows to learn centres and ranges from.
            rows: how many rows it will hold, which decides the number of centres.
            code_bytes: for "ivfpq" the size of a code, see `code_sizes`.
        """
        faiss = load_faiss()
        dim = sample.shape[1]
        centres = f"IVF{centres_for(rows)}"
        description = {
            "hnsw": f"IDMap,HNSW{_LINKS}_SQ8",
            "ivf": f"{centres},SQ8",
            "ivfpq": f"{centres},PQ{code_bytes}x8",
        }[kind]
        index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
        if kind == "hnsw":
            faiss.downcast_index(index.index).hnsw.efConstruction = _CONSTRUCTION
        else:
            index.cp.seed, index.cp.niter = 1234, 10
            index.cp.min_points_per_centroid = 1  # FAISS would print a warning about small indices
        if kind == "ivfpq":
            index.pq.cp.min_points_per_centroid = 1
            index.do_polysemous_training = False  # for a kind of search that is not used here
        index.train(sample)
        return cls(index, kind)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, rows: RowArray, vectors: FloatArray) -> None:
        """Add rows (n,) with their vectors (n, dim)."""
        self._index.add_with_ids(vectors, rows)

    def search(self, queries: FloatArray, k: int, effort: int, mask: BoolArray | None) -> RowArray:
        """Return the rows (q, k) that look nearest, -1 where there are fewer.

        Args:
            queries: (q, dim) float32.
            k: how many.
            effort: how much is looked at: HNSW's efSearch, or the number of lists.
            mask: (n,) bool, the rows that may be found; None for all that were added.
        """
        faiss = load_faiss()
        bits = None if mask is None else np.packbits(mask, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits))
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), sel=selector)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=effort, sel=selector)
        # Where faiss.contrib.torch_utils was imported, as by pytorch-metric-learning, `search` takes no parameters.
        search = getattr(self._index, "search_numpy", self._index.search)
        rows: RowArray = search(queries, k, params=parameters)[1]
        return rows

    def efforts(self) -> list[int]:
        """Return the efforts worth measuring, rising."""
        if self.kind == "hnsw":
            return [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
        lists = int(self._index.nlist)
        return sorted({min(round(2 ** (step / 2)), lists) for step in range(2 * lists.bit_length() + 1)})

    def save(self, path: Path) -> int:
        """Write the structure to a file, whole or not at all, and return the file's checksum.

        Raises:
            SearchIndexError: it cannot be written.
        """
        faiss = load_faiss()
        try:
            with atomic_path(path) as draft:
                faiss.write_index(self._index, str(draft))
                return file_checksum(draft)
        except RuntimeError as error:  # what FAISS makes of a full disk
            raise SearchIndexError(f"{path}: cannot write the structure; check free space and permissions") from error

    @classmethod
    def load(cls, path: Path, kind: str, checksum: int) -> Self | None:
        """Read a structure; None if the file is missing or is not what was written."""
        faiss = load_faiss()
        try:
            if file_checksum(path) != checksum:
                return None
            return cls(faiss.read_index(str(path)), kind)
        except (OSError, RuntimeError):
            return None


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            value = zlib.crc32(data, value)
    return value


def centres_for(rows: int) -> int:
    """Return the number of k-means centres for so many rows: about 4 sqrt(rows), a power of two."""
    return int(2 ** np.clip(np.rint(np.log2(4 * max(rows, 1) ** 0.5)), 2, 16))


def training_rows(kind: str, rows: int) -> int:
    """Return how many rows a kind is trained on."""
    wanted = 20_000 if kind == "hnsw" else max(_TRAINING_ROWS * centres_for(rows), 20_000)
    return min(wanted, rows, _TRAINING_LIMIT)


def code_sizes(dim: int) -> list[int]:
    """Return the sizes in bytes that a product-quantised code of `dim` numbers may have, largest first."""
    return [size for size in range(dim // 4, max(dim // 16, 1) - 1, -1) if size and dim % size == 0]


def memory_needed(kind: str, dim: int, rows: int, code_bytes: int = 0) -> int:
    """Return an estimate of the memory of a structure in bytes."""
    centres = centres_for(rows) * dim * 4
    return {
        "hnsw": rows * (dim + 2 * 4 * _LINKS + 24),
        "ivf": rows * (dim + 8) + centres,
        "ivfpq": rows * (code_bytes + 8) + centres + 256 * dim * 4,
    }[kind]


def in_chunks(rows: RowArray, size: int = 16_384) -> Iterable[RowArray]:
    """Yield row numbers in chunks."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def require_kind(kind: str) -> None:
    """Raise unless a kind is known.

    Raises:
        ConfigError: it is not.
    """
    if kind not in (*KINDS, "exact"):
        raise unknown_name("kind of structure", kind, [*KINDS, "exact"])
