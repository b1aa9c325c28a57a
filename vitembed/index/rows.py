"""`Rows`: the rows of an index as one process knows them, as of one committed state.

Rows are only ever appended and never change, so what is known of a row (that its vector matches its checksum, its id,
its metadata) stays known; a later state adds rows and takes some out of the mask. Nothing is read before it is needed,
and nothing that was read is used before it was compared with its checksum.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index.blocks import BLOCK_ROWS, Block, BoolArray
from vitembed.index.catalog import Catalog, Item
from vitembed.index.codes import CODE_ROWS, CodedRows, CodeFile, CodeRecord, codes_path, encode
from vitembed.index.columns import Columns
from vitembed.index.entries import Entries, Entry
from vitembed.index.exact import RowArray
from vitembed.index.filters import Filter
from vitembed.index.optimization import Optimization
from vitembed.index.structure import Structure
from vitembed.index.vectors import ChecksumArray, StoredArray, VectorFile, checksums

# A block of which so many rows were compared with their checksums is compared whole, and never asked about again.
_OFTEN = 256


@dataclass(frozen=True, eq=False)
class FrozenRows:
    """The rows of one committed state, all compared with their checksums; later changes do not touch it.

    Attributes:
        path: the file of vectors.
        mask: (rows,) bool, which rows live.
        vectors: (rows, dim), mapped.
        blocks: the blocks of codes by number.
    """

    path: Path
    mask: BoolArray
    vectors: StoredArray
    blocks: dict[int, CodedRows]

    @property
    def name(self) -> str:
        """Name of the file of vectors, which tells numberings apart."""
        return self.path.name

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])

    def verified(self, rows: RowArray) -> StoredArray:
        """Return all vectors."""
        return self.vectors

    def coded(self, number: int) -> CodedRows | None:
        """Return a block of codes, if there is one."""
        return self.blocks.get(number)


class Rows:
    """The rows of one numbering, kept in step with the catalog by `update`.

    Args:
        folder: the index's.
        catalog: the index's catalog; the caller sees to transactions.
        name: name of the file of vectors.

    Attributes:
        vectors: the file of vectors.
        generation: the change up to which the rows are known; -1 when nothing is.
        mask: (rows,) bool, which rows live.
        live: how many do.
        optimization: how the index searches; None when it was never optimised.
        covered: (rows,) bool, the live rows that the structure holds, when it holds dead ones too; None when all live.
        tail: (rows,) bool, the live rows that came after the structure; None when there are none.
    """

    def __init__(self, folder: Path, catalog: Catalog, name: str) -> None:
        self._catalog = catalog
        self.name = name
        self.dim = int(catalog.meta("dim") or 0)
        self.vectors = VectorFile(folder / name, self.dim, str(catalog.meta("dtype")))
        self.codes = CodeFile(codes_path(folder / name), self.dim)
        self._entries = Entries(catalog)
        self._columns = Columns(self._metadata)
        self.generation = -1
        self.forget()

    def forget(self) -> None:
        """Go back to knowing nothing."""
        self.generation = -1
        self.blocks: list[Block] = []
        self.mask: BoolArray = np.empty(0, np.bool_)
        self._verified: BoolArray = np.empty(0, np.bool_)
        self._asked: Counter[int] = Counter()  # by block: how many rows of it were compared with their checksums
        self._checksums: dict[int, ChecksumArray] = {}
        self._code_records: dict[int, CodeRecord] = {}
        self._codes_verified: dict[int, bool] = {}
        self._entries.forget()
        self._columns.forget()
        self.optimization: Optimization | None = None
        self._structure: tuple[str, Structure | None] | None = None
        self.live = 0
        self.covered: BoolArray | None = None
        self.tail: BoolArray | None = None

    def close(self) -> None:
        """Let go of the files."""
        self.vectors.close()
        self.codes.close()

    def update(self, generation: int) -> int:
        """Take in what changed up to a generation.

        Returns:
            The generation of the latest change of a row or a code that was taken in; -1 when there was none.

        Raises:
            SearchIndexError: blocks are missing, or the vector file is too short for them.
        """
        changed = self._catalog.blocks_after(self.generation)
        blocks = self.blocks[:]
        for block in changed:
            blocks[block.number : block.number + 1] = [block]
        numbered = all(block.number == number for number, block in enumerate(blocks))
        if not numbered or any(block.rows != BLOCK_ROWS for block in blocks[:-1]):
            raise self._damaged("its catalog has lost blocks of rows")
        total = blocks[-1].stop if blocks else 0
        mask, verified = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
        mask[: len(self.mask)] = self.mask
        verified[: len(self._verified)] = self._verified
        for block in changed:
            mask[block.start : block.stop] = block.mask()
            if len(self._checksums.get(block.number, ())) != block.rows:
                self._checksums.pop(block.number, None)
        records = self._catalog.codes_after(self.generation)
        for record in records:
            self._code_records[record.number] = record
            self._codes_verified.pop(record.number, None)
        self.vectors.read(total)
        self._take_structure(self._catalog.structure(), mask)
        self.generation, self.blocks, self.mask, self._verified = generation, blocks, mask, verified
        return max([-1, *(block.generation for block in changed), *(record.generation for record in records)])

    # Vectors

    def verified(self, rows: RowArray) -> StoredArray:
        """Return all vectors (n, dim), mapped, after comparing these rows with their checksums.

        Raises:
            SearchIndexError: a row does not match.
        """
        vectors = self.vectors.read(len(self.mask))
        fresh = rows[~self._verified[rows]]
        if len(fresh):
            self._verify(vectors, fresh)
            bad = rows[~self._verified[rows]]
            if len(bad):
                raise self._damaged_row(int(bad[0]))
        return vectors

    def _verify(self, vectors: StoredArray, rows: RowArray) -> None:
        """Compare rows with their checksums, and with them all live rows of a block of which many were asked for."""
        for number, count in zip(*np.unique(rows // BLOCK_ROWS, return_counts=True), strict=True):
            start = int(number) * BLOCK_ROWS
            self._asked[int(number)] += int(count)
            if self._asked[int(number)] < _OFTEN:
                mine = rows[rows // BLOCK_ROWS == number]
            else:
                block = slice(start, start + BLOCK_ROWS)
                mine = np.flatnonzero(self.mask[block] & ~self._verified[block]) + start
            wanted = self._block_checksums(int(number))[mine - start]
            self._verified[mine] = checksums(vectors, mine.tolist()) == wanted

    def frozen(self) -> FrozenRows:
        """Return what stays as it is now.

        Raises:
            SearchIndexError: a row does not match its checksum.
        """
        vectors = self.verified(np.flatnonzero(self.mask))
        coded = {number: self.coded(number) for number in range(len(self.mask) // CODE_ROWS)}
        blocks = {number: block for number, block in coded.items() if block is not None}
        return FrozenRows(self.vectors.path, self.mask.copy(), vectors, blocks)

    def _block_checksums(self, number: int) -> ChecksumArray:
        if number not in self._checksums:
            found = self._catalog.checksums(number)
            count = self.blocks[number].rows
            if len(found) < count:  # within a change there may be more already
                raise self._damaged(f"block {number} has {count} rows and {len(found)} checksums")
            self._checksums[number] = found[:count]
        return self._checksums[number]

    # Codes

    def coded(self, number: int) -> CodedRows | None:
        """Return a block of codes; None where there are none, or they are damaged."""
        record = self._code_records.get(number)
        if record is None or self._codes_verified.get(number) is False:
            return None
        coded = self.codes.get(record, verified=number in self._codes_verified)
        self._codes_verified[number] = coded is not None
        return coded

    def uncoded(self) -> list[int]:
        """Return the numbers of the full blocks that have no sound codes."""
        return [number for number in range(len(self.mask) // CODE_ROWS) if self.coded(number) is None]

    def encode(self, number: int) -> CodeRecord:
        """Code a full block of rows, write it, and return its record for the catalog.

        Raises:
            SearchIndexError: a row that lives does not match its checksum, or the disk is full.
        """
        start, stop = number * CODE_ROWS, (number + 1) * CODE_ROWS
        known = self.mask[start:stop]  # what comes after was written just now
        self.verified(np.flatnonzero(known) + start)
        block: StoredArray = self.vectors.read(stop)[start:].copy()
        block[: len(known)][~known] = 0  # a dead row may be damaged; it must not coarsen the steps
        return self.codes.put(number, encode(block))

    # Structure

    def _take_structure(self, optimization: Optimization | None, mask: BoolArray) -> None:
        self.optimization = optimization
        self.live = int(np.count_nonzero(mask))
        self.covered = self.tail = None
        if optimization is None or optimization.file is None:
            return
        covers = optimization.covers
        alive = int(np.count_nonzero(mask[:covers]))
        if alive < optimization.entries:
            self.covered = mask.copy()
            self.covered[covers:] = False
        if alive < self.live:
            self.tail = mask.copy()
            self.tail[:covers] = False

    def structure(self) -> Structure | None:
        """Return the structure, read when it is first needed; None where there is none, or it is damaged."""
        known = self.optimization
        if known is None or known.file is None:
            return None
        if self._structure is None or self._structure[0] != known.file:
            path = self.vectors.path.with_name(known.file)
            self._structure = known.file, Structure.load(path, known.kind, known.checksum)
        return self._structure[1]

    # Entries

    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """Return id and metadata (JSON text) of live rows, in the order in which they are given.

        Raises:
            SearchIndexError: one is missing or does not match its checksum.
        """
        try:
            return self._entries.of(rows, len(self.mask))
        except KeyError as error:
            raise self._damaged(f"live row {error} has no entry") from error

    def all_items(self, start: int = 0, stop: int | None = None) -> list[Item]:
        """Return the items of all live rows from `start` to before `stop`, by row.

        Raises:
            SearchIndexError: they are not those of the rows that live, or one does not match its checksum.
        """
        stop = len(self.mask) if stop is None else stop
        items = self._catalog.items_between(start, stop)
        if [item.row for item in items] != (np.flatnonzero(self.mask[start:stop]) + start).tolist():
            raise self._damaged(f"of rows {start} to {stop - 1} others live than have an entry")
        return items

    def matching(self, wanted: Filter) -> BoolArray:
        """Return which live rows match a filter, (rows,) bool."""
        self._columns.require(wanted.keys(), len(self.mask))
        return self.mask & wanted.rows(self._columns)

    def _metadata(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        return ((item.row, item.metadata) for item in self.all_items(start, stop))

    def _damaged_row(self, row: int) -> SearchIndexError:
        items = self._catalog.items([row])
        name = repr(items[0].id) if items else "an entry"
        return SearchIndexError(
            f"{self.vectors.path} is damaged: the vector of {name} (row {row}) does not match its checksum; "
            "remove this entry and add it again, or restore the index from a copy"
        )

    def _damaged(self, what: str) -> SearchIndexError:
        return SearchIndexError(
            f"{self.vectors.path} is damaged: {what}; restore the index from a copy or build it again"
        )
