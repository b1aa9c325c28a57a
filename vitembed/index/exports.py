"""An index written for other programs: as Parquet, and as plain FAISS.

An export appears whole under its name or not at all, and is written batch by batch.
"""

import json
import os
import re
import secrets
import shutil
from pathlib import Path

import numpy as np

from vitembed.errors import ConfigError, VitembedError
from vitembed.files import atomic_path, atomic_write
from vitembed.index.faiss_files import ABOUT, IDS, VECTORS, flat_header
from vitembed.index.index import Index
from vitembed.index.sources import PathLike, batch_rows, note
from vitembed.index.tables import load_pyarrow
from vitembed.index.vectors import sync_folder

README = "README.txt"

_FILES = {VECTORS, IDS, ABOUT, README}

_README = f"""{VECTORS} is a flat FAISS index of {{rows}} vectors of {{dim}}: faiss.read_index("{VECTORS}").
Line n of {IDS}, the first being 0, names the row n of it: {{{{"id": ..., "metadata": ...}}}}.
The vectors have unit length and the scores are cosines; queries come from the model {{fingerprint}}.
{ABOUT} says so to `vitembed index import`.
"""


def export_parquet(index: Index, path: PathLike, overwrite: bool = False) -> int:
    """Write all entries as a Parquet file, in the order in which they were last added.

    Its columns are id, vector (a fixed-size list of float32) and metadata (JSON text); the width, the fingerprint and
    the location of the model, and what the vectors were stored as, are in the schema's metadata under "vitembed".
    Entries that others change meanwhile may be missing, as in `Index.stream`.

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
    kinds = {
        "id": pyarrow.string(),
        "vector": pyarrow.list_(pyarrow.float32(), index.dim),
        "metadata": pyarrow.string(),
    }
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, {"vitembed": _note(index)})
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
    in `Index.stream`. What an export that was killed has left beside the folder is cleared up first: an earlier one
    that it had just moved out of the way comes back. Only one process may export to a folder at a time.

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
    draft = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        _clear_up(target)
        _require_free(target, overwrite)
        draft.mkdir()
        rows = _write_rows(index, draft)
        text = _README.format(rows=rows, dim=index.dim, fingerprint=index.fingerprint or "that made them")
        atomic_write(draft / README, text)
        atomic_write(draft / ABOUT, _note(index) + "\n")
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


def _note(index: Index) -> str:
    return note(index.dim, index.fingerprint, index.location, index.dtype)


def _clear_up(target: Path) -> None:
    """Give a folder back its name if a killed export had moved it, and delete what else such exports have left."""
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{8}}(-old)?")
    left = [path for path in target.parent.iterdir() if name.fullmatch(path.name) and _is_export(path)]
    left.sort(key=lambda path: path.stat().st_mtime_ns)
    while left:
        path = left.pop()  # the latest first
        if path.name.endswith("-old") and not target.exists() and (path / VECTORS).exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _is_export(path: Path) -> bool:
    """Tell whether a folder holds nothing but what an export writes, whole or in part."""
    if not path.is_dir() or path.is_symlink():
        return False
    parts = {re.sub(r"^\.(\w+)-[0-9a-f]{8}(?=\.)", r"\1", child.name) for child in path.iterdir()}
    return parts <= _FILES


def _require_free(target: Path, overwrite: bool) -> None:
    """Raise unless a folder may be written under this name."""
    if not target.exists():
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else None
    if found is None or not found <= _FILES:
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
