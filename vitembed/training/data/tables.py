"""Tables of labelled images, CSV or Parquet: read, checked row by row, and nothing made of them yet.

Every error names the table, and the row where there is one; rows are counted from 1, without the header.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError, MissingExtraError
from vitembed.training.data.labels import Names, name_forgery

COLUMNS = ("path", "label", "split", "forgery_of")
NEEDED = COLUMNS[:2]


@dataclass(frozen=True)
class Table:
    """What a table says of its N images.

    Attributes:
        images: their files, all of which exist.
        names: of their classes, and of those that they imitate.
        is_validation: (N,) bool; None without the column split.
    """

    images: list[Path]
    names: Names
    is_validation: NDArray[np.bool_] | None


def read_table(source: str | os.PathLike[str]) -> Table:
    """Read a .csv or .parquet table with the columns path and label, and perhaps split and forgery_of.

    Raises:
        DataError: naming the column, the row and the file that is missing.
        MissingExtraError: for Parquet without pyarrow.
    """
    path = Path(source)
    columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    images = _files(path, columns["path"])
    names = Names([], [])
    forged = columns.get("forgery_of", [""] * len(images))
    for row, (name, label, writer) in enumerate(zip(columns["path"], columns["label"], forged, strict=True), start=1):
        if not label and not writer:
            raise DataError(f"{path}, row {row}: the label is empty; every image but a forgery needs one")
        names.classes.append(name_forgery(writer, name) if writer else label)
        names.forgery_of.append(writer or None)
    return Table(images, names, _split_of(path, columns["split"], images) if "split" in columns else None)


def _files(table: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the column path; relative ones start at the table's folder."""
    images = []
    for row, name in enumerate(names, start=1):
        image = table.parent / name
        if not image.is_file():
            raise DataError(f"{table}, row {row}: there is no image {image}; paths start at the table's folder")
        images.append(image)
    return images


def _split_of(table: Path, values: Sequence[str], images: Sequence[Path]) -> NDArray[np.bool_]:
    """Return which images the column split holds out."""
    for row, value in enumerate(values, start=1):
        if value not in ("train", "val"):
            raise DataError(f"{table}, row {row}: split must be train or val; got {value!r}")
    sides = {side: {p for p, value in zip(images, values, strict=True) if value == side} for side in ("train", "val")}
    both = sides["train"] & sides["val"]
    if both:
        raise DataError(f"{table}: {min(both)} is in train and in val; an image may be in one of them")
    return np.array([value == "val" for value in values], dtype=np.bool_)


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Return the columns of a CSV file that are ours, without the space around their values."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = header = [name.strip() for name in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV table: {error}") from error
    _check_columns(path, header, len(rows))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{path}, row {number}: expected {len(header)} fields as in the header")
    return {name: [row[name].strip() for row in rows] for name in COLUMNS if name in header}


def _read_parquet(path: Path) -> dict[str, list[str]]:
    """Return the columns of a Parquet file that are ours, as text; null and NaN are empty."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise MissingExtraError("reading Parquet", "parquet") from error
    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet table: {error}") from error
    _check_columns(path, table.column_names, table.num_rows)
    wanted = [name for name in COLUMNS if name in table.column_names]
    # NaN is what differs from itself.
    return {name: ["" if v is None or v != v else str(v) for v in table.column(name).to_pylist()] for name in wanted}


def _check_columns(path: Path, header: Sequence[str], rows: int) -> None:
    """Refuse a table without a needed column, with one of ours twice, or without rows."""
    missing = [name for name in NEEDED if name not in header]
    if missing:
        expected = "path,label[,split][,forgery_of]"
        raise DataError(f"{path} lacks the column {missing[0]!r}; expected {expected}, got {','.join(header)}")
    twice = [name for name in COLUMNS if list(header).count(name) > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; which one counts?")
    if rows == 0:
        raise DataError(f"{path} has a header but no rows; expected one row an image")
