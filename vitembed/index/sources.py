"""Files to import into an index, their rows still unread; vectors of NumPy, and ids that are lines of a text file.

Nothing is read but in batches, and what cannot be read is an error that names the file and the row, counted from 1.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError, DataError, VectorError, VitembedError
from vitembed.index.inputs import UNIT_TOLERANCE, Metadata
from vitembed.index.vectors import DTYPES

PathLike = str | os.PathLike[str]

Batch = tuple[list[str], NDArray[Any], list[Metadata]]  # ids, vectors (n, dim), metadata

FORMAT = 1  # of our own exports

# A batch: this many rows, or fewer where they would take more than 64 MB.
ROWS, BYTES = 10_000, 64_000_000


@dataclass(frozen=True)
class Source:
    """A file to import: its rows are read as often as `ids` and `batches` are called."""

    path: Path
    ids_path: Path
    rows: int
    dim: int | None  # None where only a row could tell and there is none
    ids: Callable[[], Iterator[str]]
    batches: Callable[[], Iterator[Batch]]
    fingerprint: str | None = None
    location: str | None = None
    dtype: str | None = None  # that the index they came from was stored as
    left_out: tuple[str, ...] = ()


def note(dim: int, fingerprint: str | None, location: str | None, dtype: str) -> str:
    """Return what an export of ours says of the index that it came from, as JSON."""
    about = {"format": FORMAT, "dim": dim, "fingerprint": fingerprint, "location": location, "dtype": dtype}
    return json.dumps(about, ensure_ascii=False)


def with_note(source: Source, text: str | bytes, where: str) -> Source:
    """Return a source with what its note says; `where` is the note's name.

    Raises:
        DataError: the note is damaged, of a newer format, or of other vectors.
    """
    about: Any = None
    with suppress(ValueError, RecursionError):
        about = json.loads(text)
    problem = f"{where} does not name a model"
    if isinstance(about, dict):
        if about.get("format") != FORMAT:
            raise DataError(
                f"{source.path} has format {about.get('format')!r:.20}, this vitembed reads {FORMAT}; upgrade vitembed"
            )
        fingerprint, location, dtype = (about.get(key) for key in ("fingerprint", "location", "dtype"))
        if source.dim is not None and about.get("dim", source.dim) != source.dim:
            problem = f"it has vectors of {source.dim}, and {where} says {about['dim']!r:.20}"
        elif all(name is None or isinstance(name, str) for name in (fingerprint, location)) and dtype in (
            None,
            *DTYPES,
        ):
            return replace(source, fingerprint=fingerprint, location=location, dtype=dtype)
    raise DataError(f"{source.path} is damaged: {problem}; export it again")


def batch_rows(dim: int) -> int:
    """Return how many rows of a width are a batch."""
    return max(1, min(ROWS, BYTES // (4 * dim)))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of which file what NumPy, pyarrow or the system could not read."""
    try:
        yield
    except VitembedError:
        raise
    except (OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason[:200]}); is it damaged, or of another kind?") from error


def array_source(path: Path, ids: PathLike | None) -> Source:
    """Return the source of a .npy file; its vectors stay where they lie until they are read."""
    with reading(path):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise DataError(f"{path} must be a .npy file of numbers of shape (n, dim); got {found!r:.80}")
    return mapped_source(path, required_ids(path, ids), found)


def mapped_source(path: Path, ids: Path, vectors: NDArray[Any]) -> Source:
    """Return the source of vectors (n, dim) that are mapped into memory."""

    def read(size: int) -> Iterator[NDArray[Any]]:
        return (vectors[start : start + size] for start in range(0, len(vectors), size))

    return source_with_lines(path, ids, len(vectors), vectors.shape[1], read)


def source_with_lines(
    path: Path, ids: Path, rows: int, dim: int, read: Callable[[int], Iterator[NDArray[Any]]]
) -> Source:
    """Return the source of vectors (rows, dim), read in batches of at most so many, whose ids are lines of a file."""

    def batches() -> Iterator[Batch]:
        lines = _lines(ids)
        for vectors in read(batch_rows(dim)):
            part = list(islice(lines, len(vectors)))
            yield [name for name, _ in part], vectors, [metadata for _, metadata in part]

    return Source(path, ids, rows, dim, lambda: (name for name, _ in _lines(ids)), batches)


def _lines(path: Path) -> Iterator[tuple[str, Metadata]]:
    """Yield the id and the metadata of each line."""
    with reading(path), path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            text = line.removesuffix("\n")
            yield _parsed(path, row, text) if path.suffix.lower() == ".jsonl" else (text, {})


def _parsed(path: Path, row: int, text: str) -> tuple[str, Metadata]:
    value = json_object(path, row, text)
    if "id" not in value or not value.keys() <= {"id", "metadata"}:
        raise DataError(f'{path}, row {row}: expected {{"id": ..., "metadata": {{...}}}}; got the keys {list(value)}')
    metadata = value.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"{path}, row {row}: metadata must be a JSON object; got {metadata!r:.80}")
    return value["id"], metadata


def json_object(path: Path, row: int, text: str) -> Metadata:
    """Return what a text says, if that is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {row}: expected a JSON object; got {text!r:.80}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {row}: expected a JSON object; got {text!r:.80}")
    return value


def required_ids(path: Path, ids: PathLike | None) -> Path:
    """Return the file of ids that goes with a file of vectors."""
    if ids is None:
        raise ConfigError(f"{path} holds vectors without ids; name a file with an id a line (--ids ids.txt)")
    return Path(ids)


def unit_rows(path: Path, before: int, names: list[str], vectors: NDArray[Any], normalise: bool) -> NDArray[np.float32]:
    """Return vectors (n, dim) as float32 rows of unit length, and name the first one that has none."""
    wide = vectors.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        bad = ~np.isfinite(lengths) | (lengths == 0)
        if not normalise:
            bad |= np.abs(lengths - 1.0) > UNIT_TOLERANCE
    if bad.any():
        n = int(np.argmax(bad))
        problem = f"has length {lengths[n]:.4g} and not 1; normalise=True (--normalise) scales all to unit length"
        if lengths[n] == 0:
            problem = "is all zeros, which has no direction; remove the row"
        elif not np.isfinite(lengths[n]):
            problem = "holds NaN or infinite numbers; remove the row"
        raise VectorError(f"{path}, row {before + n + 1}: the vector of {names[n]!r} {problem}")
    return (wide / lengths[:, None] if normalise else vectors).astype(np.float32)
