"""The catalog of an index: one SQLite file that is the truth of everything but the vectors' numbers.

It knows the width and the model of the vectors, which id lives in which row with what metadata, the checksum of every
block of rows, which rows live, and which files of a folder the rows came from. Its invariants:

- A change is one transaction (write-ahead log, synchronous=FULL), so that it is there in full or not at all.
- Rows are numbered in the order of insertion and never used twice: a replaced id takes a new row, and the old row's bit
  in its block's bitmap is cleared.
- `generation` grows with every transaction, and a block carries the generation that last changed it, so that a reader
  refreshes what it keeps by reading the changed blocks alone.
- SQLite does not check its own pages, so every record that a hit depends on carries a CRC-32 of its values (its seal)
  and is checked when it is read.

Ids and metadata arrive here already checked.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitembed.errors import SearchIndexError
from vitembed.index.blocks import BLOCK_ROWS, Block

FORMAT = 1
NAME = "catalog.sqlite"

# Marks the SQLite file as ours ("vite" in ASCII).
_APPLICATION = 0x76697465

# How long a writer waits for another before it gives up, in seconds.
WRITER_WAIT = 5.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT, seal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (
    number INTEGER PRIMARY KEY, rows INTEGER NOT NULL, live INTEGER NOT NULL, bitmap BLOB NOT NULL,
    checksum INTEGER NOT NULL, generation INTEGER NOT NULL, seal INTEGER NOT NULL
);
CREATE INDEX blocks_generation ON blocks (generation);
CREATE TABLE items (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL, seal INTEGER NOT NULL
);
CREATE TABLE files (
    root TEXT NOT NULL, id TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, digest TEXT, reason TEXT,
    PRIMARY KEY (root, id)
) WITHOUT ROWID;
CREATE INDEX files_id ON files (id);
CREATE INDEX files_digest ON files (digest);
"""

# What `json_each` calls the types of values, for `Catalog.matching`.
_TYPES = {bool: ["true", "false"], int: ["integer", "real"], float: ["integer", "real"], str: ["text"]}


@dataclass(frozen=True)
class Item:
    """A live row: its number, id and metadata (JSON text)."""

    row: int
    id: str
    metadata: str


@dataclass(frozen=True)
class FileRecord:
    """What is known about a file that `sync` has met.

    Attributes:
        root: the folder that was synced, absolute.
        id: the file's POSIX path relative to it, which is its id in the index.
        size: in bytes.
        mtime_ns: time of last change; 0 when it was too fresh to tell the next change from this one.
        digest: hash of the content; None when the file could not be read.
        reason: why it was set aside; None when it is in the index.
    """

    root: str
    id: str
    size: int
    mtime_ns: int
    digest: str | None
    reason: str | None = None


class Catalog:
    """An open catalog: one connection, used by one thread at a time.

    Args:
        path: the SQLite file, which must exist.

    Raises:
        SearchIndexError: it is missing, damaged, of a newer format or no catalog at all.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._depth = 0
        if not path.is_file():
            raise SearchIndexError(f"{path.parent} is not an index: it has no {NAME}; make one with Index.create")
        self._connection = _connect(path)
        try:
            self._require_format()
            self.dim = int(self.meta("dim") or 0)
            self.vectors = str(self.meta("vectors"))
        except BaseException:
            self._connection.close()
            raise

    @staticmethod
    def create(path: Path, meta: Mapping[str, str | None]) -> None:
        """Write a new catalog, all of it or nothing of any use."""
        connection = _connect(path)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(
                f"BEGIN; PRAGMA application_id={_APPLICATION}; PRAGMA user_version={FORMAT}; {_SCHEMA} COMMIT;"
            )
            rows = [(key, value, _seal(key, value)) for key, value in {**meta, "generation": "0"}.items()]
            connection.executemany("INSERT INTO meta VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise _translated(path, error) from error
        finally:
            connection.close()

    def close(self) -> None:
        """Close the connection; the last one to close folds the write-ahead log into the file."""
        self._connection.close()

    # Transactions

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block every read sees the same committed state, whatever other processes commit."""
        if self._connection.in_transaction:
            yield
            return
        self._run("BEGIN")
        try:
            yield
        finally:
            self._run("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block changes are made; they are committed at its end, or all undone after an exception.

        Blocks nest: an inner block that fails undoes its own changes alone.

        Raises:
            SearchIndexError: another process writes and does not end within `WRITER_WAIT` seconds.
        """
        begin, keep = ("SAVEPOINT change", "RELEASE change") if self._depth else ("BEGIN IMMEDIATE", "COMMIT")
        self._run(begin)
        self._depth += 1
        try:
            self.set_meta("generation", str(self.generation() + 1))
            yield
            self._run(keep)
        except BaseException:
            with suppress(SearchIndexError):  # SQLite has undone it itself when the disk is full
                self._run("ROLLBACK TO change" if self._depth > 1 else "ROLLBACK")
                if self._depth > 1:
                    self._run(keep)
            raise
        finally:
            self._depth -= 1

    # What holds for the whole index

    def meta(self, key: str) -> str | None:
        """Return a setting of the index."""
        rows = self._rows("SELECT value, seal FROM meta WHERE key = ?", (key,))
        if len(rows) != 1 or rows[0][1] != _seal(key, rows[0][0]):
            raise self._damaged(f"its setting {key!r} does not match its checksum")
        value = rows[0][0]
        return None if value is None else str(value)

    def set_meta(self, key: str, value: str) -> None:
        """Change a setting of the index."""
        self._run("UPDATE meta SET value = ?, seal = ? WHERE key = ?", (value, _seal(key, value), key))

    def generation(self) -> int:
        """Return the number of the last change."""
        return int(self.meta("generation") or 0)

    # Blocks

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
        columns = "number, rows, live, bitmap, checksum, generation, seal"
        found = self._rows(f"SELECT {columns} FROM blocks WHERE {where}", (value,))
        return [self._unsealed(Block, row, f"block {row[0]}") for row in found]

    def put_block(self, block: Block) -> None:
        """Insert or replace a block as part of the change that is being made."""
        block = replace(block, generation=self.generation())
        values = tuple(vars(block).values())
        self._run("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, _seal(*values)))

    def live(self) -> int:
        """Return how many ids there are."""
        return int(self._rows("SELECT coalesce(sum(live), 0) FROM blocks")[0][0])

    # Items

    def ids(self) -> list[str]:
        """Return all ids by row."""
        ids = [str(row[0]) for row in self._rows("SELECT id FROM items ORDER BY row")]
        if len(ids) != self.live():
            raise self._damaged(f"{self.live()} rows live and {len(ids)} have an id")
        return ids

    def find(self, ids: Iterable[str]) -> dict[str, Item]:
        """Return the items of those ids that are in the index.

        Raises:
            SearchIndexError: an item does not match its checksum, or SQLite finds one under another's id.
        """
        wanted = list(ids)
        found = self._items("id IN (SELECT value FROM json_each(?))", json.dumps(wanted))
        items = {item.id: item for item in found}
        if len(items) != len(found) or not items.keys() <= set(wanted):
            raise self._damaged("its list of ids is out of order")
        return items

    def items(self, rows: Iterable[int]) -> list[Item]:
        """Return the items of those of these rows that live, by row.

        Raises:
            SearchIndexError: an item does not match its checksum.
        """
        return self._items("row IN (SELECT value FROM json_each(?))", json.dumps(list(rows)))

    def items_between(self, start: int, stop: int) -> list[Item]:
        """Return the items of the rows from `start` to before `stop`, by row, checked like `items`."""
        return self._items("row >= ? AND row < ?", start, stop)

    def _items(self, where: str, *values: int | str) -> list[Item]:
        found = self._rows(f"SELECT row, id, metadata, seal FROM items WHERE {where} ORDER BY row", values)
        return [self._unsealed(Item, row, f"the entry of row {row[0]}") for row in found]

    def matching(self, key: str, value: str | int | float | bool | None) -> list[int]:
        """Return the rows whose metadata hold exactly this value under a key of their top level."""
        # `IS`, since JSON null is SQL's NULL. The wanted value passes through SQLite's own parser of JSON, as the
        # stored ones did, so that equal texts of a float are equal numbers.
        found = self._rows(
            "SELECT items.row FROM items, json_each(items.metadata) AS field WHERE field.key = ? "
            "AND field.type IN (SELECT value FROM json_each(?)) AND field.atom IS json_extract(?, '$')",
            (key, json.dumps(_TYPES.get(type(value), ["null"])), json.dumps(value, ensure_ascii=False)),
        )
        return [int(row[0]) for row in found]

    def insert_items(self, items: Sequence[Item]) -> None:
        """Insert new items; their ids must be free."""
        rows = [(item.row, item.id, item.metadata, _seal(item.row, item.id, item.metadata)) for item in items]
        self._run_many("INSERT INTO items VALUES (?, ?, ?, ?)", rows)

    def delete_items(self, items: Sequence[Item]) -> None:
        """Delete items, and forget which files they came from."""
        self._run_many("DELETE FROM items WHERE row = ?", [(item.row,) for item in items])
        self._run_many("DELETE FROM files WHERE id = ? AND reason IS NULL", [(item.id,) for item in items])

    # Files

    def files(self, root: str) -> dict[str, FileRecord]:
        """Return what is recorded of the files of a folder, by id."""
        return {record.id: record for record in self._files("root = ?", root)}

    def owners(self, ids: Iterable[str]) -> dict[str, FileRecord]:
        """Return from which file of any folder each of these ids came, for those that came from one."""
        where = "reason IS NULL AND id IN (SELECT value FROM json_each(?))"
        return {record.id: record for record in self._files(where, json.dumps(list(ids)))}

    def copies(self, digests: Iterable[str]) -> dict[str, FileRecord]:
        """Return a file with each of these contents, for those contents that are in the index."""
        where = "reason IS NULL AND digest IN (SELECT value FROM json_each(?))"
        return {str(record.digest): record for record in self._files(where, json.dumps(list(digests)))}

    def put_files(self, records: Iterable[FileRecord]) -> None:
        """Insert or replace the records of files."""
        rows = [tuple(vars(record).values()) for record in records]
        self._run_many("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget_files(self, root: str, ids: Iterable[str]) -> None:
        """Delete the records of files of a folder."""
        self._run_many("DELETE FROM files WHERE root = ? AND id = ?", [(root, name) for name in ids])

    def _files(self, where: str, value: str) -> Iterator[FileRecord]:
        sql = f"SELECT root, id, size, mtime_ns, digest, reason FROM files WHERE {where}"
        return (FileRecord(*row) for row in self._rows(sql, (value,)))

    # Checks

    def check(self) -> list[str]:
        """Return what is wrong within the catalog, one line each; blocks and items are checked as they are read."""
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check(5)")]
        problems = [] if found == ["ok"] else [f"{self._path}: {line}" for line in found]
        [(entries,)] = self._rows("SELECT count(*) FROM items")
        if entries != self.live():
            problems.append(f"{self._path}: {self.live()} rows live and {entries} have an entry")
        sql = "SELECT id FROM files WHERE reason IS NULL AND id NOT IN (SELECT id FROM items)"
        return problems + [f"{self._path}: the file {row[0]!r} has no entry" for row in self._rows(sql)]

    def _require_format(self) -> None:
        application = self._rows("PRAGMA application_id")[0][0]
        version = self._rows("PRAGMA user_version")[0][0]
        if application != _APPLICATION:
            raise SearchIndexError(f"{self._path} is not the catalog of an index; make one with Index.create")
        if version != FORMAT:
            raise SearchIndexError(
                f"{self._path} has format {version}, this vitembed reads format {FORMAT}; upgrade vitembed"
            )

    # SQLite

    def _unsealed(self, kind: type[Any], row: tuple[Any, ...], name: str) -> Any:
        if row[-1] != _seal(*row[:-1]):
            raise self._damaged(f"{name} does not match its checksum")
        return kind(*row[:-1])

    def _rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _translated(self._path, error) from error

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> None:
        self._rows(sql, values)

    def _run_many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            self._connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _translated(self._path, error) from error

    def _damaged(self, what: str) -> SearchIndexError:
        return SearchIndexError(f"{self._path} is damaged: {what}; restore the index from a copy or build it again")


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # Transactions are written out below (isolation_level=None); the index sees to one thread at a time.
        connection = sqlite3.connect(path, timeout=WRITER_WAIT, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _translated(path, error) from error
    try:
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        connection.close()
        raise _translated(path, error) from error
    return connection


def _seal(*values: object) -> int:
    """Return the CRC-32 of a record's values."""
    texts = (value.hex() if isinstance(value, bytes) else str(value) for value in values)
    return zlib.crc32("\x1f".join(texts).encode("utf-8", "surrogatepass"))


def _translated(path: Path, error: sqlite3.Error) -> SearchIndexError:
    """Return what an error of SQLite means to the user of an index."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return SearchIndexError(f"another process is writing to {path.parent}; wait until it has finished, or stop it")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return SearchIndexError(
            f"{path}: cannot read or write ({error}); check free space and permissions; nothing was changed"
        )
    return SearchIndexError(f"{path} is damaged ({error}); restore the index from a copy or build it again")
