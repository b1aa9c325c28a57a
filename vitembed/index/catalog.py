"""The catalog of an index: one SQLite file that is the truth of everything but the vectors' numbers.

It knows the width and the model of the vectors, which id lives in which row with what metadata, the checksum of every
row, which rows live, and which files of a folder the rows came from. Its invariants:

- A change is one transaction (write-ahead log, synchronous=FULL), so that it is there in full or not at all.
- Rows are numbered in the order of insertion and never used twice: a replaced id takes a new row, and the old row's bit
  in its block's bitmap is cleared. Only `rewrite` numbers them anew, and then the vectors lie in a new file: the name
  of that file tells one numbering from the next.
- `generation` grows with every transaction, and a block carries the generation that last changed it, so that a reader
  refreshes what it keeps by reading the changed blocks alone.
- Every record carries its seal (see `vitembed.index.database`).

Ids and metadata arrive here already checked.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index.blocks import BLOCK_ROWS, Block
from vitembed.index.codes import CodeRecord
from vitembed.index.database import Database, create_database, seal
from vitembed.index.files import FILES_SCHEMA, FileRecords
from vitembed.index.optimization import Optimization
from vitembed.index.vectors import ChecksumArray

FORMAT = 2
NAME = "catalog.sqlite"

# Marks the SQLite file as ours ("vite" in ASCII).
_APPLICATION = 0x76697465

_ITEMS_TABLE = """CREATE TABLE items (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL, seal INTEGER NOT NULL
)"""

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT, seal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (
    number INTEGER PRIMARY KEY, rows INTEGER NOT NULL, live INTEGER NOT NULL, bitmap BLOB NOT NULL,
    generation INTEGER NOT NULL, seal INTEGER NOT NULL
);
CREATE INDEX blocks_generation ON blocks (generation);
CREATE TABLE checksums (number INTEGER PRIMARY KEY, checksums BLOB NOT NULL, seal INTEGER NOT NULL);
CREATE TABLE codes (
    number INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, slack REAL NOT NULL, norm REAL NOT NULL,
    generation INTEGER NOT NULL, seal INTEGER NOT NULL
);
{_ITEMS_TABLE};
{FILES_SCHEMA}
"""

# Up to so many rows are looked up by a statement of their own.
_FEW = 100

# What `Catalog.rewriting` calls the table of the rows from before.
OLD = "old_items"

# The settings that every catalog has.
_SETTINGS = ("dim", "dtype", "vectors", "fingerprint", "location", "structure", "generation")


class Item(NamedTuple):
    """A live row: its number, id and metadata (JSON text)."""

    row: int
    id: str
    metadata: str


class Catalog:
    """An open catalog, used by one thread at a time.

    Args:
        path: the SQLite file, which must exist.

    Attributes:
        file_records: what `sync` knows of the files of folders.

    Raises:
        SearchIndexError: it is missing, damaged, of another format or no catalog at all.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise SearchIndexError(f"{path.parent} is not an index: it has no {NAME}; make one with Index.create")
        self._db = Database(path)
        self.file_records = FileRecords(self._db)
        try:
            self._require_format()
        except BaseException:
            self._db.close()
            raise

    @staticmethod
    def create(path: Path, settings: Mapping[str, str | None]) -> None:
        """Write a new catalog, all of it or nothing of any use."""
        create_database(path, f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={FORMAT}; {_SCHEMA}")
        db = Database(path)
        try:
            values = {**dict.fromkeys(_SETTINGS), "generation": "0", **settings}
            db.run_many(
                "INSERT INTO meta VALUES (?, ?, ?)", [(key, text, seal(key, text)) for key, text in values.items()]
            )
        finally:
            db.close()

    def close(self) -> None:
        """Close the connection; the last one to close folds the write-ahead log into the file."""
        self._db.close()

    @property
    def read_only(self) -> bool:
        """Whether the index lies where it cannot be written."""
        return self._db.read_only

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block every read sees the same committed state; see `Database.reading`."""
        with self._db.reading():
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block changes are made, which are one change; see `Database.writing`."""
        with self._db.writing():
            self.set_meta("generation", str(int(self.meta("generation") or 0) + 1))
            yield

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within the block another writer is waited for so long."""
        with self._db.patient(seconds):
            yield

    @property
    def in_change(self) -> bool:
        """Whether a `writing` block surrounds the caller."""
        return self.depth > 0

    @property
    def depth(self) -> int:
        """How many `writing` blocks surround the caller."""
        return self._db.depth

    # What holds for the whole index

    def meta(self, key: str) -> str | None:
        """Return a setting of the index."""
        return self._settings([key])[key]

    def set_meta(self, key: str, value: str | None) -> None:
        """Change a setting of the index."""
        self._db.run("UPDATE meta SET value = ?, seal = ? WHERE key = ?", (value, seal(key, value), key))

    def state(self) -> tuple[int, str]:
        """Return the number of the last change, and the name of the file of vectors, which tells numberings apart."""
        found = self._settings(["generation", "vectors"])
        return int(found["generation"] or 0), str(found["vectors"])

    def structure(self) -> Optimization | None:
        """Return what is known of the index's structure."""
        text = self.meta("structure")
        return None if text is None else Optimization.from_json(text)

    def _settings(self, keys: Sequence[str]) -> dict[str, str | None]:
        marks = ", ".join("?" * len(keys))
        found = self._db.rows(f"SELECT key, value, seal FROM meta WHERE key IN ({marks})", keys)
        settings = {key: value for key, value, mark in found if mark == seal(key, value)}
        for key in keys:
            if key not in settings:
                raise self._db.damaged(f"its setting {key!r} does not match its checksum")
        return settings

    # Blocks of rows

    def blocks_after(self, generation: int) -> list[Block]:
        """Return the blocks that changed after a generation, by number; all of them after -1."""
        return self._blocks("generation > ? ORDER BY number", generation)

    def blocks_of(self, rows: Iterable[int]) -> list[Block]:
        """Return the blocks that hold these rows, by number."""
        numbers = sorted({row // BLOCK_ROWS for row in rows})
        return self._blocks("number IN (SELECT value FROM json_each(?)) ORDER BY number", json.dumps(numbers))

    def last_block(self) -> Block:
        """Return the block that the next row goes to, or after."""
        return next(iter(self._blocks("number = (SELECT max(number) FROM blocks WHERE ?)", 1)), Block(0))

    def _blocks(self, where: str, value: int | str) -> list[Block]:
        found = self._db.rows(
            f"SELECT number, rows, live, bitmap, generation, seal FROM blocks WHERE {where}", (value,)
        )
        return [Block(*self._db.unsealed(row, f"block {row[0]}")) for row in found]

    def put_block(self, block: Block) -> None:
        """Insert or replace a block as part of the change that is being made."""
        block = replace(block, generation=self.state()[0])
        values = tuple(vars(block).values())
        self._db.run("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?)", (*values, seal(*values)))

    def live(self) -> int:
        """Return how many ids there are."""
        return int(self._db.rows("SELECT coalesce(sum(live), 0) FROM blocks")[0][0])

    def checksums(self, number: int) -> ChecksumArray:
        """Return the CRC-32 of each row of a block, (rows,) uint32.

        Raises:
            SearchIndexError: they are missing or do not match their own checksum.
        """
        found = self._db.rows("SELECT number, checksums, seal FROM checksums WHERE number = ?", (number,))
        if not found:
            raise self._db.damaged(f"the checksums of block {number} are missing")
        return np.frombuffer(self._db.unsealed(found[0], f"block {number}")[1], "<u4")

    def put_checksums(self, number: int, checksums: ChecksumArray) -> None:
        """Insert or replace the checksums of a block's rows."""
        values = (number, checksums.astype("<u4").tobytes())
        self._db.run("INSERT OR REPLACE INTO checksums VALUES (?, ?, ?)", (*values, seal(*values)))

    # Codes, see `vitembed.index.codes`

    def codes_after(self, generation: int) -> list[CodeRecord]:
        """Return the records of the blocks of codes that were written after a generation; all of them after -1."""
        found = self._db.rows(
            "SELECT number, checksum, slack, norm, generation, seal FROM codes WHERE generation > ?", (generation,)
        )
        return [CodeRecord(*self._db.unsealed(row, f"the codes of block {row[0]}")) for row in found]

    def put_codes(self, record: CodeRecord) -> None:
        """Insert or replace the record of a block of codes."""
        values = tuple(vars(replace(record, generation=self.state()[0])).values())
        self._db.run("INSERT OR REPLACE INTO codes VALUES (?, ?, ?, ?, ?, ?)", (*values, seal(*values)))

    # Items

    def find(self, ids: Iterable[str]) -> dict[str, Item]:
        """Return the items of those ids that are in the index.

        Raises:
            SearchIndexError: an item does not match its checksum, or SQLite finds one under another's id.
        """
        wanted = list(ids)
        found = self._items("id IN (SELECT value FROM json_each(?))", json.dumps(wanted))
        items = {item.id: item for item in found}
        if len(items) != len(found) or not items.keys() <= set(wanted):
            raise self._db.damaged("its list of ids is out of order")
        return items

    def items(self, rows: Iterable[int]) -> list[Item]:
        """Return the items of those of these rows that live, by row.

        Raises:
            SearchIndexError: an item does not match its checksum.
        """
        wanted = list(rows)
        if len(wanted) <= _FEW:  # a list of their own is read sooner than one in JSON
            return self._items(f"row IN ({', '.join('?' * len(wanted))})", *wanted)
        return self._items("row IN (SELECT value FROM json_each(?))", json.dumps(wanted))

    def items_between(self, start: int, stop: int, table: str = "items") -> list[Item]:
        """Return the items of the rows from `start` to before `stop`, by row, checked like `items`."""
        return self._items("row >= ? AND row < ?", start, stop, table=table)

    def _items(self, where: str, *values: int | str, table: str = "items") -> list[Item]:
        found = self._db.rows(f"SELECT row, id, metadata, seal FROM {table} WHERE {where} ORDER BY row", values)
        items = [
            Item(row, name, metadata) for row, name, metadata, mark in found if mark == _item_seal(row, name, metadata)
        ]
        if len(items) < len(found):
            row = next(row for row, name, metadata, mark in found if mark != _item_seal(row, name, metadata))
            raise self._db.damaged(f"the entry of row {row} does not match its checksum")
        return items

    def insert_items(self, items: Sequence[Item]) -> None:
        """Insert new items; their ids must be free."""
        rows = [(item.row, item.id, item.metadata, _item_seal(item.row, item.id, item.metadata)) for item in items]
        self._db.run_many("INSERT INTO items VALUES (?, ?, ?, ?)", rows)

    def delete_items(self, items: Sequence[Item], keep_files: bool = False) -> None:
        """Delete items, and forget which files they came from unless these are kept."""
        self._db.run_many("DELETE FROM items WHERE row = ?", [(item.row,) for item in items])
        if not keep_files:
            self.file_records.forget_entries([item.id for item in items])

    # All rows anew

    @contextmanager
    def rewriting(self, settings: Mapping[str, str | None]) -> Iterator[None]:
        """Within the block the catalog has no rows, and those from before are read by `items_between(.., OLD)`.

        Args:
            settings: what changes for the whole index, the name of the new file of vectors among it.
        """
        self._db.run(f"ALTER TABLE items RENAME TO {OLD}")
        self._db.run(_ITEMS_TABLE)
        for table in ("blocks", "checksums", "codes"):
            self._db.run(f"DELETE FROM {table}")
        for key, value in {**settings, "structure": None}.items():
            self.set_meta(key, value)
        yield
        self._db.run(f"DROP TABLE {OLD}")

    def shrink(self) -> None:
        """Give back what deleted records leave free, unless another process is in the way; only outside of a change."""
        with suppress(SearchIndexError), self._db.patient(0):
            self._db.script("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    # Checks

    def rebuild_indices(self) -> None:
        """Make SQLite's own indices anew from its tables."""
        self._db.run("REINDEX")

    def check(self) -> list[str]:
        """Return what is wrong within the catalog, one line each; blocks and items are checked as they are read."""
        found = [str(row[0]) for row in self._db.rows("PRAGMA integrity_check(5)")]
        problems = [] if found == ["ok"] else [f"{self._db.path}: {line}" for line in found]
        [(entries,)] = self._db.rows("SELECT count(*) FROM items")
        if entries != self.live():
            problems.append(f"{self._db.path}: {self.live()} rows live and {entries} have an entry")
        return problems + [
            f"{self._db.path}: the file {name!r} has no entry" for name in self.file_records.without_entry()
        ]

    def _require_format(self) -> None:
        application = self._db.rows("PRAGMA application_id")[0][0]
        version = self._db.rows("PRAGMA user_version")[0][0]
        if application != _APPLICATION:
            raise SearchIndexError(f"{self._db.path} is not the catalog of an index; make one with Index.create")
        if version != FORMAT:
            raise SearchIndexError(
                f"{self._db.path} has format {version}, this vitembed reads format {FORMAT}; upgrade vitembed"
                if version > FORMAT
                else f"{self._db.path} has the old format {version}, not {FORMAT}; build the index again"
            )


def _item_seal(row: int, name: str, metadata: str) -> int:
    """Return what `seal` does, sooner: it is the record that is read most often."""
    return zlib.crc32(f"{row}\x1f{name}\x1f{metadata}".encode("utf-8", "surrogatepass"))
