"""Tables of labelled images, CSV or Parquet: read, checked row by row, and nothing made of them yet.

Every error names the table, and the row where there is one; rows are counted from 1, without the header.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError, MissingExtraError
from vitembed.layouts import Names, name_forgery

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
    names = _names(path, columns["path"], columns["label"], columns.get("forgery_of", [""] * len(images)))
    return Table(images, names, _split_of(path, columns["split"], images) if "split" in columns else None)


def _names(table: Path, files: Sequence[str], labels: Sequence[str], writers: Sequence[str]) -> Names:
    """Name the images after their labels, and forgeries after the writer in the column forgery_of.

    A writer that is no label, but is one as a number, is meant: "1.0" is what becomes of 1 in a column with gaps.
    """
    numbered = _by_number(table, labels, writers)
    known = {label for label, writer in zip(labels, writers, strict=True) if not writer}
    names = Names([], [])
    for row, (name, label, writer) in enumerate(zip(files, labels, writers, strict=True), start=1):
        if not label and not writer:
            raise DataError(f"{table}, row {row}: the label is empty; every image but a forgery needs one")
        owner = writer if writer in known else numbered.get(_number(writer), writer)
        names.classes.append(name_forgery(owner, name) if writer else label)
        names.forgery_of.append(owner or None)
    return names


def _by_number(table: Path, labels: Sequence[str], writers: Sequence[str]) -> dict[Decimal | None, str]:
    """Return the labels of genuine images that are numbers by their value, and refuse two of one value."""
    first_rows: dict[str, int] = {}
    for row, (label, writer) in enumerate(zip(labels, writers, strict=True), start=1):
        if not writer:
            first_rows.setdefault(label, row)
    numbered: dict[Decimal | None, str] = {}
    for label, row in first_rows.items():
        number = _number(label)
        other = label if number is None else numbered.setdefault(number, label)
        if other != label:
            raise DataError(
                f"{table}: the labels {other!r} of row {first_rows[other]} and {label!r} of row {row} are one number, "
                "but would be two classes; write it in one way, or give two classes names that are no numbers"
            )
    return numbered


def _number(text: str) -> Decimal | None:
    """Return the value of plain decimals, and None for all else ("1e3" and "1_000" are names).

    >>> _number("007.0") == _number("7"), _number("7 b")
    (True, None)
    """
    return Decimal(text) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", text) else None


def _files(table: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the column path; relative ones start at the table's folder."""
    images = []
    for row, name in enumerate(names, start=1):
        image = table.parent / name
        try:
            found = image.is_file()
        except OSError as error:  # such as a name that is too long
            raise DataError(f"{table}, row {row}: {name[:60]}... cannot be opened: {error.strerror}") from error
        if not found:
            raise DataError(f"{table}, row {row}: there is no image {image}; paths start at the table's folder")
        images.append(image)
    return images


def _split_of(table: Path, values: Sequence[str], images: Sequence[Path]) -> NDArray[np.bool_]:
    """Return which images the column split holds out."""
    for row, value in enumerate(values, start=1):
        if value not in ("train", "val"):
            raise DataError(f"{table}, row {row}: split must be train or val; got {value!r}")
    files = [os.path.realpath(image) for image in images]  # one file may go by several names
    sides = {side: {p for p, value in zip(files, values, strict=True) if value == side} for side in ("train", "val")}
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
    return {name: [_text(value) for value in table.column(name).to_pylist()] for name in wanted}


def _text(value: object) -> str:
    """Return a value of Parquet as a CSV would have it: whole numbers became floats where one is missing beside them.

    >>> _text(" a "), _text(7), _text(7.0), _text(0.5), _text(None), _text(float("nan"))
    ('a', '7', '7', '0.5', '', '')
    """
    if value is None or value != value:  # NaN is what differs from itself
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


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
