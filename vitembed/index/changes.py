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
from vitembed.index.codes import CODE_ROWS, codes_path
from vitembed.index.rows import Rows
from vitembed.index.vectors import StoredArray, checksums, sync_folder

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


class ChangeFiles:
    """The files that a change of an index makes and replaces, so that they go with the change, whatever its end.

    A file that is deleted is never one that the catalog refers to: before the commit that is what others still read,
    and an interrupt may arrive after it.

    Args:
        folder: the index's.
        catalog: of the index.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self._folder, self._catalog = folder, catalog
        self._made: list[Path] = []
        self._replaced: list[Path] = []

    def mark(self) -> tuple[int, int]:
        """Return where the change stands, for `undo`."""
        return len(self._made), len(self._replaced)

    def make(self, *paths: Path) -> None:
        """Make empty files, which the change is going to refer to.

        Raises:
            SearchIndexError: the folder cannot be written.
        """
        for path in paths:
            self._made.append(path)
            try:
                path.touch()
            except OSError as error:
                raise SearchIndexError(f"{path}: cannot write ({error.strerror}); nothing was changed") from error
        sync_folder(self._folder)

    def replace(self, *paths: Path) -> None:
        """Delete files once the change is committed."""
        self._replaced += paths

    def undo(self, mark: tuple[int, int]) -> None:
        """Delete what was made since a mark; the changes of the catalog since then are undone."""
        made = self._made[mark[0] :]
        del self._made[mark[0] :], self._replaced[mark[1] :]
        with suppress(SearchIndexError):  # what cannot be looked up stays, for a later sweep
            self._discard(made)

    def commit(self) -> None:
        """Delete what was replaced; the change is committed."""
        replaced, self._made, self._replaced = self._replaced, [], []
        self._discard(replaced)

    def sweep(self) -> None:
        """Delete the files that no state refers to: those of killed changes.

        Only within a change: another process cannot be making files then.
        """
        kept = {*self._made, *self._replaced}
        found = [path for path in self._folder.iterdir() if path.name.startswith(_PREFIXES)]
        self._discard([path for path in found if path not in kept])

    def _discard(self, paths: Iterable[Path]) -> None:
        if not paths:
            return
        with self._catalog.reading():
            vectors, structure = Path(str(self._catalog.meta("vectors"))), self._catalog.structure()
        used = {vectors.name, codes_path(vectors).name, structure.file if structure else None}
        for path in paths:
            if path.name not in used:
                with suppress(OSError):  # in use, on Windows: a later sweep deletes it
                    path.unlink()


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


def drop(catalog: Catalog, items: Sequence[Item], keep_files: bool = False) -> None:
    """Delete live items and clear their rows' bits; the records of their files may be kept."""
    catalog.delete_items(items, keep_files)
    rows = np.array(sorted(item.row for item in items), np.int64)
    for block in catalog.blocks_of(rows.tolist()):
        first, last = np.searchsorted(rows, [block.start, block.stop])
        mask = block.mask()
        mask[rows[first:last] - block.start] = False
        catalog.put_block(block.with_mask(mask))


def rewrite(catalog: Catalog, folder: Path, settings: dict[str, str | None], batches: Iterable[Entries]) -> None:
    """Replace all rows by these, numbered anew, in a new file.

    Args:
        catalog: of the index.
        folder: the index's.
        settings: "vectors", the name of the new file, which exists, and what else changes.
        batches: the entries, in order; they may be read from the old ones while this runs, see `surviving`.
    """
    with catalog.rewriting(settings):
        fresh = Rows(folder, catalog, str(settings["vectors"]))
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
