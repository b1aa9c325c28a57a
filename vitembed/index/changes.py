"""What a change of an index writes, and in which order.

Vectors, and what is computed from them, are on the disk before the transaction that makes them part of the index
commits; a kill in between leaves bytes that nobody looks at. Everything here runs inside such a transaction.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index.blocks import extended
from vitembed.index.catalog import OLD, Catalog, Item
from vitembed.index.codes import CODE_ROWS
from vitembed.index.rows import Rows
from vitembed.index.vectors import StoredArray, checksums

# Rows moved at a time when all rows are written anew.
_BATCH = 16_384

# What the names of an index's own files begin with; the catalog says which of them are in use.
_PREFIXES = ("vectors-", "structure-", ".structure-")


@dataclass(frozen=True, eq=False)
class Entries:
    """What is written: n ids, their vectors (n, dim) and their metadata (JSON texts), all of them checked."""

    ids: Sequence[str]
    vectors: StoredArray
    metadata: Sequence[str]


def append(catalog: Catalog, rows: Rows, entries: Entries) -> None:
    """Write new rows; their ids must be free.

    Raises:
        SearchIndexError: the disk is full or cannot be written.
    """
    last = catalog.last_block()
    first = last.stop
    stored: StoredArray = entries.vectors.astype(rows.vectors.dtype, copy=False)
    rows.vectors.append(first, stored)
    fresh = checksums(stored)
    for block in extended(last, len(stored)):
        begin = max(block.start, first)
        known = catalog.checksums(block.number)[: begin - block.start] if begin > block.start else fresh[:0]
        catalog.put_block(block)
        catalog.put_checksums(block.number, np.concatenate([known, fresh[begin - first : block.stop - first]]))
    catalog.insert_items(
        [Item(first + n, name, text) for n, (name, text) in enumerate(zip(entries.ids, entries.metadata, strict=True))]
    )
    for number in range(first // CODE_ROWS, (first + len(stored)) // CODE_ROWS):
        catalog.put_codes(rows.encode(number))


def drop(catalog: Catalog, items: Sequence[Item]) -> None:
    """Delete live items and clear their rows' bits."""
    catalog.delete_items(items)
    rows = np.array([item.row for item in items], np.int64)
    for block in catalog.blocks_of(rows.tolist()):
        mask = block.mask()
        mask[rows[(rows >= block.start) & (rows < block.stop)] - block.start] = False
        catalog.put_block(block.with_mask(mask))


def rewrite(catalog: Catalog, folder: Path, settings: dict[str, str | None], batches: Iterable[Entries]) -> None:
    """Replace all rows by these, numbered anew, in a new file.

    Args:
        catalog: of the index.
        folder: the index's.
        settings: "vectors", the name of the new file, and what else changes.
        batches: the entries, in order; they may be read from the old ones while this runs, see `surviving`.
    """
    sweep(catalog, folder)
    with catalog.rewriting(settings):
        name = str(settings["vectors"])
        try:
            (folder / name).touch()
        except OSError as error:
            raise SearchIndexError(f"{folder / name}: cannot write ({error.strerror}); nothing was changed") from error
        fresh = Rows(folder, catalog, name)
        try:
            for entries in batches:
                append(catalog, fresh, entries)
        finally:
            fresh.close()


def surviving(catalog: Catalog, rows: Rows) -> Iterator[Entries]:
    """Yield the live entries of rows that are being rewritten; each was compared with its checksum before."""
    vectors = rows.vectors.read(len(rows.mask))
    for start in range(0, len(rows.mask), _BATCH):
        live = np.flatnonzero(rows.mask[start : start + _BATCH]) + start
        items = catalog.items_between(start, start + _BATCH, OLD)
        if [item.row for item in items] != live.tolist():
            raise SearchIndexError(f"{rows.vectors.path.parent} is damaged: a live row has no entry; restore a copy")
        if items:
            yield Entries([item.id for item in items], vectors[live], [item.metadata for item in items])


def sweep(catalog: Catalog, folder: Path) -> None:
    """Delete the files that no committed state refers to: those of killed and of failed changes.

    Only within a change, before it makes files of its own: another process cannot be making any then.
    """
    vectors = Path(str(catalog.meta("vectors")))
    structure = catalog.structure()
    used = {vectors.name, vectors.with_suffix(".codes").name, structure.file if structure else None}
    for path in folder.iterdir():
        if path.name.startswith(_PREFIXES) and path.name not in used:
            discard(path)


def discard(path: Path) -> None:
    """Delete a file that is not needed any more; where it is in use (on Windows) a later `sweep` does."""
    with suppress(OSError):
        path.unlink()
