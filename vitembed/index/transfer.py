"""An index in other programs' formats: to Parquet and plain FAISS, and from these, NumPy arrays and others' tables.

Its invariants:

- An export appears whole under its name or not at all, and is written batch by batch.
- An import is one transaction. Before it begins all ids are read and compared, so that a bad one costs no work; memory
  is bounded by a batch and by 8 bytes an id.

Rows are counted from 1.
"""

import json
import os
import secrets
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitembed.errors import ConfigError, DataError, VectorError, VitembedError
from vitembed.files import atomic_path, atomic_write
from vitembed.index.faiss_files import IDS, VECTORS, faiss_source, flat_header
from vitembed.index.index import Index
from vitembed.index.inputs import id_problem
from vitembed.index.sources import PathLike, Source, array_source, batch_rows, unit_rows
from vitembed.index.tables import FORMAT, TableColumns, load_pyarrow, table_source
from vitembed.index.vectors import sync_folder

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

README = "README.txt"

_README = f"""{VECTORS} is a flat FAISS index of {{rows}} vectors of {{dim}}: faiss.read_index("{VECTORS}").
Line n of {IDS}, the first being 0, names the row n of it: {{{{"id": ..., "metadata": ...}}}}.
The vectors have unit length and the scores are cosines; queries come from the model {{fingerprint}}.
"""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        rows: how many were added or replaced.
        left_out: columns of the table that were not taken.
    """

    rows: int
    left_out: tuple[str, ...] = ()


def export_parquet(index: Index, path: PathLike, overwrite: bool = False) -> int:
    """Write all entries as a Parquet file, in the order in which they were last added.

    Its columns are id, vector (a fixed-size list of float32) and metadata (JSON text); the width, the fingerprint and
    the location of the model are in the schema's metadata under "vitembed". Entries that others change meanwhile may
    be missing, as in `Index.stream`.

    Returns:
        How many were written.

    Raises:
        ConfigError: there is something at `path` and it is not to be overwritten.
        MissingExtraError: without pyarrow.
        SearchIndexError: the index is damaged.
        VitembedError: the file cannot be written; an earlier one is then unchanged.
    """
    pyarrow, parquet = load_pyarrow("writing Parquet")
    if Path(path).exists() and not overwrite:
        raise _taken(path)
    about = {"format": FORMAT, "dim": index.dim, "fingerprint": index.fingerprint, "location": index.location}
    kinds = {
        "id": pyarrow.string(),
        "vector": pyarrow.list_(pyarrow.float32(), index.dim),
        "metadata": pyarrow.string(),
    }
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, {"vitembed": json.dumps(about, ensure_ascii=False)})
    rows = 0
    with (
        atomic_path(path) as temporary,
        # Vectors are noise to a compressor; page checksums let a reader notice damage.
        parquet.ParquetWriter(
            temporary, schema, use_dictionary=False, compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        for batch in index.stream(batch_rows(index.dim)):
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(batch.vectors.ravel()), index.dim)
            metadata = [json.dumps(value, ensure_ascii=False) for value in batch.metadata]
            columns = [pyarrow.array(batch.ids, kinds["id"]), vectors, pyarrow.array(metadata, kinds["metadata"])]
            writer.write_table(pyarrow.table(columns, schema=schema))  # a row group
            rows += len(batch)
    return rows


def export_faiss(index: Index, folder: PathLike, overwrite: bool = False) -> int:
    """Write all entries as a folder of a flat FAISS file (inner product), its ids and metadata, and how to use them.

    The entries come in the order in which they were last added; those that others change meanwhile may be missing, as
    in `Index.stream`.

    Args:
        index: the index.
        folder: to make; the folder around it must exist.
        overwrite: replace an earlier export. Any other folder is never replaced.

    Returns:
        How many were written.

    Raises:
        ConfigError: there is something else at `folder`, or an export that is not to be overwritten.
        SearchIndexError: the index is damaged.
        VitembedError: the folder cannot be written; an earlier one is then unchanged.
    """
    target = Path(os.path.realpath(folder))
    _require_free(target, overwrite)
    draft = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        draft.mkdir()
        rows = _write_rows(index, draft)
        text = _README.format(rows=rows, dim=index.dim, fingerprint=index.fingerprint or "that made them")
        atomic_write(draft / README, text)
        _publish(draft, target)
    except OSError as error:
        raise VitembedError(f"cannot write {os.fspath(folder)}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return rows


def _write_rows(index: Index, folder: Path) -> int:
    """Write the vectors and the ids, side by side, and return how many there are."""
    rows = 0
    with (
        atomic_path(folder / VECTORS) as vectors_path,
        atomic_path(folder / IDS) as ids_path,
        vectors_path.open("wb") as vectors,
        ids_path.open("w", encoding="utf-8", newline="\n") as ids,
    ):
        vectors.write(flat_header(0, index.dim))
        for batch in index.stream(batch_rows(index.dim)):
            vectors.write(np.ascontiguousarray(batch.vectors, "<f4").data)
            for name, metadata in zip(batch.ids, batch.metadata, strict=True):
                ids.write(json.dumps({"id": name, "metadata": metadata}, ensure_ascii=False) + "\n")
            rows += len(batch)
        vectors.seek(0)  # only now is their number known
        vectors.write(flat_header(rows, index.dim))
    return rows


def _require_free(target: Path, overwrite: bool) -> None:
    """Raise unless a folder may be written under this name."""
    if not target.exists():
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else None
    if found is None or found - {VECTORS, IDS, README}:
        raise ConfigError(f"{target} is no folder that a FAISS export wrote and is not replaced; name a new one")
    if found and not overwrite:
        raise _taken(target)


def _publish(draft: Path, target: Path) -> None:
    """Rename the draft to its name, and remove the export that had it."""
    old = draft.with_name(f"{draft.name}-old")
    if target.exists():
        target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _taken(path: PathLike) -> ConfigError:
    return ConfigError(f"{os.fspath(path)} exists; choose another name, or overwrite=True (--overwrite) to replace it")


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

    A quantised index gives back what it kept of the vectors.

    Args:
        index: the index.
        source: a folder of `export_faiss`, or a file of any kind of FAISS index that can reconstruct its vectors.
        ids: as in `import_vectors`, in the order of the vectors; a folder holds its own.
        normalise: scale the vectors to unit length; otherwise they must have it.

    Raises:
        ConfigError: a file comes without ids.
        DataError: as in `import_vectors`; also where FAISS cannot read or reconstruct.
        VectorError: as in `import_parquet`.
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
    """Make a new index of what `import_file` reads, with the model that a Parquet file of ours names.

    After an error there is no index. A kill in the middle leaves an empty one, into which one can import again.

    Raises:
        DataError: the file does not say how wide its vectors are.
        SearchIndexError: there is something at `path` already, or it cannot be written.
        VitembedError: as `import_file`.
    """
    with _opened(source, ids, columns) as opened:
        if not opened.dim:
            raise DataError(f"{opened.path} does not say how wide its vectors are; there must be one at least")
        index = Index.create(path, opened.dim, opened.fingerprint, location=opened.location)
        try:
            with index:
                return _import(index, opened, normalise)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
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
