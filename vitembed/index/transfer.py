"""Files of other programs into an index: Parquet, plain FAISS and NumPy arrays; and exports, for they belong together.

An import is one transaction. Before it begins all ids are read and compared, so that a bad one costs no work; memory is
bounded by a batch and by 8 bytes an id. Rows are counted from 1.
"""

import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.index.exports import export_faiss, export_parquet
from vitembed.index.faiss_files import faiss_source
from vitembed.index.index import Index
from vitembed.index.inputs import id_problem
from vitembed.index.sources import PathLike, Source, array_source, unit_rows
from vitembed.index.tables import TableColumns, table_source

__all__ = [
    "Imported",
    "TableColumns",
    "export_faiss",
    "export_parquet",
    "import_faiss",
    "import_file",
    "import_parquet",
    "import_vectors",
    "index_from",
]


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        rows: how many were added or replaced.
        left_out: columns of the table that were not taken.
    """

    rows: int
    left_out: tuple[str, ...] = ()


def import_parquet(
    index: Index, path: PathLike, columns: TableColumns | None = None, normalise: bool = False
) -> Imported:
    """Add the rows of a Parquet table, all of them or none; those whose ids are known replace the old ones.

    Args:
        index: the index.
        path: what `export_parquet` wrote, or a table of others.
        columns: their names, where these are not id, vector and metadata.
        normalise: scale the vectors to unit length; otherwise they must have it.

    Raises:
        DataError: the file cannot be read, lacks a column, or has an id twice or one that is no id.
        VectorError: a vector has another width, another length than 1, zeros alone, or NaN; the message names it.
        ModelMismatchError: the file names another model than the index.
        MissingExtraError: without pyarrow.
        SearchIndexError: another process is writing, or the disk is full.
    """
    return _import(index, table_source(Path(path), columns or TableColumns()), normalise)


def import_vectors(index: Index, vectors: PathLike, ids: PathLike, normalise: bool = False) -> Imported:
    """Add the rows of a NumPy file, all of them or none; those whose ids are known replace the old ones.

    Args:
        index: the index.
        vectors: a .npy file of shape (n, dim).
        ids: n lines: a .jsonl file of {"id": ..., "metadata": {...}}, where metadata may be left out, or a text file
            (UTF-8) of one id a line.
        normalise: scale the vectors to unit length; otherwise they must have it.

    Raises:
        DataError: a file cannot be read, there is not one id for each row, or an id comes twice or is no id.
        VectorError: as in `import_parquet`.
        SearchIndexError: another process is writing, or the disk is full.
    """
    return _import(index, array_source(Path(vectors), ids), normalise)


def import_faiss(index: Index, source: PathLike, ids: PathLike | None = None, normalise: bool = False) -> Imported:
    """Add the vectors of a FAISS file, all of them or none; those whose ids are known replace the old ones.

    A quantised index gives back what it kept of the vectors. A folder says which model they are of; a file does not.

    Args:
        index: the index.
        source: a folder of `export_faiss`, or a file of any kind of FAISS index that can reconstruct its vectors.
        ids: as in `import_vectors`, in the order of the vectors; a folder holds its own.
        normalise: scale the vectors to unit length; otherwise they must have it.

    Raises:
        ConfigError: a file comes without ids.
        DataError: as in `import_vectors`; also where FAISS cannot read or reconstruct.
        VectorError: as in `import_parquet`.
        ModelMismatchError: as in `import_parquet`.
        SearchIndexError: another process is writing, or the disk is full.
    """
    with faiss_source(Path(source), None if ids is None else Path(ids)) as opened:
        return _import(index, opened, normalise)


def import_file(
    index: Index,
    source: PathLike,
    ids: PathLike | None = None,
    columns: TableColumns | None = None,
    normalise: bool = False,
) -> Imported:
    """Import by the suffix: .parquet as `import_parquet`, .npy as `import_vectors`, all else as `import_faiss`.

    Raises:
        ConfigError: ids or columns are given to a kind that has none.
        VitembedError: as the function that does the work.
    """
    with _opened(source, ids, columns) as opened:
        return _import(index, opened, normalise)


def index_from(
    source: PathLike,
    path: PathLike,
    ids: PathLike | None = None,
    columns: TableColumns | None = None,
    normalise: bool = False,
) -> Imported:
    """Make a new index of what `import_file` reads, with the model and the storage that an export of ours names.

    After an error there is no index: a folder that was there is empty again. A kill in the middle leaves an empty
    index, into which one can import again.

    Args:
        source: as in `import_file`.
        path: the directory to make; it must be missing or empty.
        ids: as in `import_file`.
        columns: as in `import_file`.
        normalise: as in `import_file`.

    Raises:
        DataError: the file does not say how wide its vectors are.
        SearchIndexError: there is something at `path` already, or it cannot be written.
        VitembedError: as `import_file`.
    """
    with _opened(source, ids, columns) as opened:
        if not opened.dim:
            raise DataError(f"{opened.path} does not say how wide its vectors are; there must be one at least")
        there = Path(path).exists()
        index = Index.create(path, opened.dim, opened.fingerprint, opened.location, opened.dtype or "float32")
        try:
            with index:
                return _import(index, opened, normalise)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            if there:
                with suppress(OSError):  # a clean-up must not hide the first error
                    Path(path).mkdir()
            raise


@contextmanager
def _opened(source: PathLike, ids: PathLike | None, columns: TableColumns | None) -> Iterator[Source]:
    path, kind = Path(source), Path(source).suffix.lower()
    if kind == ".parquet" and ids is not None:
        raise ConfigError(f"{path} holds its ids itself, in a column; leave the file of ids (--ids) out")
    if kind != ".parquet" and columns not in (None, TableColumns()):
        raise ConfigError(f"{path} has no columns; their names go with a .parquet file")
    if kind == ".parquet":
        yield table_source(path, columns or TableColumns())
    elif kind == ".npy":
        yield array_source(path, ids)
    else:
        with faiss_source(path, None if ids is None else Path(ids)) as opened:
            yield opened


def _import(index: Index, source: Source, normalise: bool) -> Imported:
    if source.fingerprint is not None:
        index.require_model(source.fingerprint)
    if source.dim not in (None, index.dim):
        raise VectorError(
            f"{source.path} has vectors of {source.dim}, the index takes {index.dim}; were they made by another model?"
        )
    _require_distinct(source)
    rows = 0
    with index.transaction():
        for names, vectors, metadata in source.batches():
            index.add(names, unit_rows(source.path, rows, names, vectors, normalise), metadata)
            rows += len(names)
    return Imported(rows, source.left_out)


def _require_distinct(source: Source) -> None:
    """Raise unless there is one id for each row, all of them fit and different."""
    hashes = array("q")
    for row, name in enumerate(source.ids(), start=1):
        problem = id_problem(name)
        if problem:
            raise DataError(f"{source.ids_path}, row {row}: the id {name!r:.80} {problem}")
        hashes.append(hash(name))
    if len(hashes) != source.rows:
        raise DataError(
            f"there must be one id for each vector; {source.ids_path} has {len(hashes)} ids and "
            f"{source.path} has {source.rows} vectors"
        )
    ordered = np.sort(np.array(hashes, np.int64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, int] = {}
    for row, name in enumerate(source.ids() if suspects else (), start=1):
        if hash(name) in suspects and first.setdefault(name, row) != row:
            raise DataError(f"{source.ids_path}: the id {name!r} comes twice, in rows {first[name]} and {row}")
