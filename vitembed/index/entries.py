"""`Entries`: ids and metadata of rows, kept in memory once they were asked for.

The entry of a row never changes, so what was read is read again only when it had to make room. Where searches keep
asking for rows of one block, the whole block is read: soon they need nothing more from SQLite.
"""

from collections import Counter
from collections.abc import Sequence

from vitembed.errors import SearchIndexError
from vitembed.index.blocks import BLOCK_ROWS
from vitembed.index.catalog import Catalog, Item

# A row's id and its metadata (JSON text). A plain tuple, which the garbage collector soon leaves alone.
Entry = tuple[str, str]

# How many are kept; about 0.35 kB each.
_KEPT = 500_000

# A block of which so many rows had to be looked up one by one is read whole; that takes as long as some 500 of them.
_OFTEN = 64


class Entries:
    """The entries of one numbering.

    Args:
        catalog: where they are read; the caller sees to transactions.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.forget()

    def forget(self) -> None:
        """Go back to knowing nothing."""
        self._kept: dict[int, Entry] = {}
        self._asked: Counter[int] = Counter()  # by block: how many rows of it were looked up one by one

    def of(self, rows: Sequence[int], total: int) -> list[Entry]:
        """Return the entries of live rows, in the order in which they are given.

        Args:
            rows: numbers of rows; one may come twice.
            total: how many rows there are.

        Raises:
            KeyError: a row has no entry.
            SearchIndexError: one does not match its checksum.
        """
        try:
            return list(map(self._kept.__getitem__, rows))
        except KeyError:
            self._read(set(rows), total)
            return list(map(self._kept.__getitem__, rows))

    def _read(self, rows: set[int], total: int) -> None:
        missing = {row for row in rows if row not in self._kept}  # a difference of sets would go over all that is kept
        if len(self._kept) + len(missing) > _KEPT:
            self.forget()
            missing = rows
        if total <= _KEPT:
            missing -= self._read_blocks(missing)
        self._keep(self._catalog.items(sorted(missing)))

    def _read_blocks(self, rows: set[int]) -> set[int]:
        """Read whole the blocks of which many rows were asked for, and return what is there now of these rows."""
        self._asked.update(row // BLOCK_ROWS for row in rows)
        for number in {row // BLOCK_ROWS for row in rows}:
            if self._asked[number] >= _OFTEN:
                self._asked[number] = 0  # rows that are added to it will be asked for again
                try:
                    self._keep(self._catalog.items_between(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS))
                except SearchIndexError:
                    continue  # a damaged entry fails those who ask for it, one by one
        return {row for row in rows if row in self._kept}

    def _keep(self, items: Sequence[Item]) -> None:
        self._kept.update((item.row, (item.id, item.metadata)) for item in items)
