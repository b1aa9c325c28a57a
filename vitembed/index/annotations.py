"""Metadata from a table: one row for each entry, one column for each key."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from vitembed.errors import DataError
from vitembed.index.index import Index

# Cells are read as JSON where they are one of these kinds, and as text otherwise.
_PLAIN = (bool, int, float, type(None))


def annotate_from_table(index: Index, table: str | os.PathLike[str], replace: bool = False) -> int:
    """Give entries the metadata of a CSV table, in one change.

    Args:
        index: the index.
        table: a CSV file in UTF-8 with a header; its column `id` names the entries, the others are keys. A cell that
        JSON
            reads as a number, true, false or null is taken for one; an empty cell leaves its key out.
        replace: drop what the entries have, but for "path"; otherwise other keys stay.

    Returns:
        How many entries were annotated.

    Raises:
        DataError: the file cannot be read, has no column `id`, names an entry twice, or one that is not in the index.
    """
    wanted = _read(Path(table))
    with index.transaction():
        known = index.entries()
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise DataError(f"{table}: not in the index: {unknown[0]!r} ({len(unknown)} in all); see `index list`")
        kept = {name: _kept(known[name], replace) for name in wanted}
        index.annotate(list(wanted), [{**kept[name], **values} for name, values in wanted.items()])
    return len(wanted)


def _kept(metadata: dict[str, Any], replace: bool) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if not replace or key == "path"}


def _read(table: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "id" not in (reader.fieldnames or ()):
                raise DataError(f"{table} must have a header with a column 'id'; it has {reader.fieldnames or 'none'}")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{table}: line {reader.line_num} has another number of cells than the header")
                name = row.pop("id")
                if name in found:
                    raise DataError(f"{table}: line {reader.line_num} names {name!r} again; an entry has one row")
                found[name] = {key: _value(cell) for key, cell in row.items() if cell != ""}
    except OSError as error:
        raise DataError(f"{table}: cannot read it ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is no CSV table in UTF-8: {error}") from error
    return found


def _value(cell: str) -> Any:
    try:
        value = json.loads(cell, parse_constant=str)
    except ValueError:
        return cell
    return value if isinstance(value, _PLAIN) else cell
