"""One SQLite file: transactions, records that carry a checksum, and errors that say what they mean to a user.

SQLite keeps a transaction whole and does not check its own pages, so every record that an answer depends on carries a
CRC-32 of its values (its seal) and is checked when it is read.
"""

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitembed.errors import SearchIndexError

# How long a writer waits for another before it gives up, in seconds.
WRITER_WAIT = 5.0

# What a write-ahead log is cut to when it begins anew; a large change may make it longer for a while.
_LOG_BYTES = 64 << 20

# How SQLite is asked for a file: to write it; to read it in a folder where others write; to read it where nobody can
# write, not even SQLite its shared memory.
_WRITABLE, _READABLE, _IMMUTABLE = "mode=rw", "mode=ro", "immutable=1"


# A damaged file may put bytes into SQLite's messages that are no text.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)


class Database:
    """An open SQLite file: one connection, used by one thread at a time.

    Args:
        path: the file, which must exist. Where it cannot be written it is opened for reading alone.

    Attributes:
        path: the file.
        read_only: whether it can only be read.

    Raises:
        SearchIndexError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._connection, self.read_only = _open(path)

    def close(self) -> None:
        """Close the connection; the last one to close folds the write-ahead log into the file."""
        self._connection.close()

    # Transactions

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block every read sees the same committed state, whatever other processes commit."""
        if self._within():
            yield
            return
        try:
            self.run("BEGIN")
            yield
        finally:
            if self._within():  # not when BEGIN was refused
                self.run("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block changes are made; they are committed at its end, or all undone after an exception.

        Blocks nest: an inner block that fails undoes its own changes alone.

        Raises:
            SearchIndexError: another process writes and does not end within `WRITER_WAIT` seconds, or the file can only
                be read.
        """
        if self.read_only:
            raise SearchIndexError(f"{self.path.parent} cannot be written; copy it to a folder that can")
        name = f"change{self._depth}"
        begin, keep = (f"SAVEPOINT {name}", f"RELEASE {name}") if self._depth else ("BEGIN IMMEDIATE", "COMMIT")
        self._depth += 1
        try:
            self.run(begin)
            yield
            self.run(keep)
        except BaseException:
            with suppress(SearchIndexError):  # SQLite has undone it itself when the disk is full
                self.run(f"ROLLBACK TO {name}" if self._depth > 1 else "ROLLBACK")
                if self._depth > 1:
                    self.run(keep)
            raise
        finally:
            self._depth -= 1

    def _within(self) -> bool:
        return self._connection.in_transaction

    @property
    def depth(self) -> int:
        """How many `writing` blocks surround the caller."""
        return self._depth

    # Statements

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement and return all its rows."""
        try:
            return self._connection.execute(sql, values).fetchall()
        except _FAILURES as error:
            raise translated(self.path, error) from error

    def run(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Run a statement that has no rows."""
        self.rows(sql, values)

    def run_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each row of values."""
        try:
            self._connection.executemany(sql, rows)
        except _FAILURES as error:
            raise translated(self.path, error) from error

    def script(self, sql: str) -> None:
        """Run statements to their ends, each in a transaction of its own; only outside of a transaction."""
        try:
            self._connection.executescript(sql)
        except _FAILURES as error:
            raise translated(self.path, error) from error

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within the block another writer is waited for so long."""
        self.run(f"PRAGMA busy_timeout={int(seconds * 1000)}")
        try:
            yield
        finally:
            self.run(f"PRAGMA busy_timeout={int(WRITER_WAIT * 1000)}")

    # Records

    def unsealed(self, row: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        """Return a record without its last value, its seal, after comparing the two.

        Raises:
            SearchIndexError: they do not match.
        """
        if row[-1] != seal(*row[:-1]):
            raise self.damaged(f"{name} does not match its checksum")
        return row[:-1]

    def damaged(self, what: str) -> SearchIndexError:
        """Return the error for a file that holds something wrong."""
        return SearchIndexError(f"{self.path} is damaged: {what}; restore the index from a copy or build it again")


def create_database(path: Path, script: str) -> None:
    """Make a new SQLite file in WAL mode by a script of statements, which run in one transaction.

    Raises:
        SearchIndexError: it cannot be written.
    """
    connection = None
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(f"BEGIN; {script} COMMIT;")
    except _FAILURES as error:
        raise translated(path, error) from error
    finally:
        if connection is not None:
            connection.close()


def seal(*values: object) -> int:
    """Return the CRC-32 of a record's values."""
    texts = [value.hex() if isinstance(value, bytes) else str(value) for value in values]
    return zlib.crc32("\x1f".join(texts).encode("utf-8", "surrogatepass"))


def translated(path: Path, error: Exception) -> SearchIndexError:
    """Return what an error of SQLite means to the user of an index."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return SearchIndexError(f"another process is writing to {path.parent}; wait until it has finished, or stop it")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return SearchIndexError(
            f"{path}: cannot read or write ({error}); check free space and permissions; nothing was changed"
        )
    return SearchIndexError(f"{path} is damaged ({error}); restore the index from a copy or build it again")


def _open(path: Path) -> tuple[sqlite3.Connection, bool]:
    """Return a connection, and whether it can only read."""
    log = path.with_name(path.name + "-wal")
    try:
        return _connect(path, _WRITABLE), False
    except _FAILURES as error:
        unwritable = str(getattr(error, "sqlite_errorname", "")).startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN"))
        if not unwritable:
            raise translated(path, error) from error
        first = error
    for mode in (_READABLE, _IMMUTABLE):
        if mode == _IMMUTABLE and log.exists() and log.stat().st_size:
            raise SearchIndexError(
                f"{path.parent} cannot be written and has changes that were not folded into {path.name}; "
                "copy it to a folder that can be written and open it there"
            ) from first
        with suppress(*_FAILURES):
            return _connect(path, mode), True
    raise translated(path, first) from first


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # Transactions are written out above (isolation_level=None); the index sees to one thread at a time.
    uri = f"file:{quote(str(path.absolute()))}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=WRITER_WAIT, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        # SQLite opens a file that it cannot use without a word; the first read tells.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
