"""Parquet tables to import into an index: our own exports and those of others, whose columns are looked at first."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import ConfigError, DataError, MissingExtraError, VectorError
from vitembed.index.inputs import Metadata
from vitembed.index.sources import ROWS, Batch, Source, batch_rows, json_object, reading, with_note


@dataclass(frozen=True)
class TableColumns:
    """How the columns of a Parquet table are named.

    Attributes:
        id: of texts or whole numbers.
        vector: of lists of numbers.
        metadata: of JSON objects as text, or of structs. Where there is no column of this name, every other column of
            texts, numbers, bools, dates or times becomes a key of the metadata.
    """

    id: str = "id"
    vector: str = "vector"
    metadata: str = "metadata"


def load_pyarrow(feature: str) -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(feature, "parquet") from error
    return pyarrow, parquet


def table_source(path: Path, columns: TableColumns) -> Source:
    """Return the source of a Parquet file, after its columns have been found and looked at."""
    pyarrow, parquet = load_pyarrow("reading Parquet")
    with reading(path), parquet.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    _require_columns(path, columns, schema.names)
    dim = _width(path, columns, schema.field(columns.vector).type, rows)
    others = [name for name in schema.names if name not in (columns.id, columns.vector)]
    if columns.metadata in others:
        taken = [columns.metadata]
    else:
        taken = [name for name in others if _is_simple(pyarrow, schema.field(name).type)]

    def ids() -> Iterator[str]:
        for batch in _record_batches(path, [columns.id], ROWS):
            yield from _ids_of(batch, columns)

    def batches() -> Iterator[Batch]:
        """Read the table from its beginning."""
        row = 0
        for batch in _record_batches(path, [columns.id, columns.vector, *taken], batch_rows(dim or 1)):
            with reading(path):
                names = _ids_of(batch, columns)
                vectors = _matrix(path, batch.column(columns.vector), dim or 0, row)
                if taken == [columns.metadata]:
                    metadata = _objects(path, batch.column(columns.metadata), row)
                else:
                    values = [_values(pyarrow, batch.column(name)) for name in taken]
                    metadata = [dict(zip(taken, each, strict=True)) for each in zip(*values, strict=True)]
            yield names, vectors, metadata or [{} for _ in names]
            row += len(names)

    left_out = tuple(name for name in others if name not in taken)
    source = Source(path, path, rows, dim, ids, batches, left_out=left_out)
    text = (schema.metadata or {}).get(b"vitembed")
    return source if text is None else with_note(source, text, 'its metadata "vitembed"')


def _record_batches(path: Path, names: list[str], size: int) -> Iterator[Any]:
    _, parquet = load_pyarrow("reading Parquet")
    with reading(path), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from file.iter_batches(size, columns=names)


def _require_columns(path: Path, columns: TableColumns, found: list[str]) -> None:
    wanted = [("id", columns.id), ("vector", columns.vector)]
    if columns.metadata != TableColumns.metadata:
        wanted.append(("metadata", columns.metadata))
    for what, name in wanted:
        if name not in found:
            listed = ", ".join(found[:12])
            raise DataError(f"{path} lacks the column {name!r}; it has {listed}. Name another: --{what}-column")
    twice = {name for name in found if found.count(name) > 1}
    if twice:
        raise DataError(f"{path} has the column {min(twice)!r} twice; which one counts?")
    if len({name for _, name in wanted}) < len(wanted):
        raise ConfigError(f"ids, vectors and metadata need a column each; got {', '.join(name for _, name in wanted)}")


def _width(path: Path, columns: TableColumns, kind: Any, rows: int) -> int | None:
    """Return the width of the vectors; lists of any length tell it with the first of them."""
    pyarrow, _ = load_pyarrow("reading Parquet")
    types = pyarrow.types
    fixed = types.is_fixed_size_list(kind)
    lists = fixed or types.is_list(kind) or types.is_large_list(kind)
    if not lists or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
        raise DataError(f"{path}: the column {columns.vector!r} must hold lists of numbers; it holds {kind}")
    if fixed:
        return int(kind.list_size)
    for batch in _record_batches(path, [columns.vector], 1) if rows else ():
        return len(batch.column(0)[0].as_py() or ())
    return None


def _ids_of(batch: Any, columns: TableColumns) -> list[str]:
    """Return ids as they are, whole numbers as text; whatever cannot be an id is found later."""
    values = batch.column(columns.id).to_pylist()
    return [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]


def _matrix(path: Path, column: Any, dim: int, before: int) -> NDArray[Any]:
    """Return a column of lists as (n, dim) numbers; `before` rows came earlier."""
    lengths = np.array([-1 if value is None else value for value in column.value_lengths().to_pylist()], np.int64)
    wrong = np.flatnonzero(lengths != dim)
    if len(wrong):
        found = max(int(lengths[wrong[0]]), 0)
        raise VectorError(f"{path}, row {before + int(wrong[0]) + 1}: the vector has {found} numbers instead of {dim}")
    numbers = column.flatten()
    if numbers.null_count:
        row = int(np.argmax(numbers.is_null().to_numpy(zero_copy_only=False))) // dim
        raise VectorError(f"{path}, row {before + row + 1}: a number of the vector is missing")
    return np.asarray(numbers.to_numpy(zero_copy_only=False)).reshape(-1, dim)


def _objects(path: Path, column: Any, before: int) -> list[Metadata]:
    """Return the column of metadata as mappings."""
    found: list[Metadata] = []
    for row, value in enumerate(column.to_pylist(), start=before + 1):
        parsed = json_object(path, row, value) if isinstance(value, str) else value or {}
        if not isinstance(parsed, dict):
            raise DataError(f"{path}, row {row}: metadata must be a JSON object or a struct; got {value!r:.80}")
        found.append(parsed)
    return found


def _is_simple(pyarrow: Any, kind: Any) -> bool:
    """Tell whether JSON can hold the values of a type, dates and times as text."""
    types = pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = types.is_string(kind) or types.is_large_string(kind)
    numbers = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    times = types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind)
    return bool(texts or numbers or times or types.is_null(kind))


def _values(pyarrow: Any, column: Any) -> list[Any]:
    """Return a column of a simple type as values that JSON can hold; NaN, as others write a gap, is None."""
    types = pyarrow.types
    column = column.dictionary_decode() if types.is_dictionary(column.type) else column
    if types.is_floating(column.type):
        return [None if value != value else value for value in column.cast(pyarrow.float64()).to_pylist()]
    if types.is_temporal(column.type):
        column = column.cast(pyarrow.string())
    return list(column.to_pylist())
