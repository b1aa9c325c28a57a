"""What an index knows of the files of folders that it follows; `sync` keeps these records."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vitembed.index.database import Database

FILES_SCHEMA = """
CREATE TABLE files (
    root TEXT NOT NULL, id TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, digest TEXT, reason TEXT,
    PRIMARY KEY (root, id)
) WITHOUT ROWID;
CREATE INDEX files_id ON files (id);
CREATE INDEX files_digest ON files (digest);
"""


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


class FileRecords:
    """The records of files in a catalog.

    Args:
        db: the catalog's database; the caller sees to transactions.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, root: str) -> dict[str, FileRecord]:
        """Return what is recorded of the files of a folder, by id."""
        return {record.id: record for record in self._select("root = ?", root)}

    def owners(self, ids: Iterable[str]) -> dict[str, FileRecord]:
        """Return from which file of any folder each of these ids came, for those that came from one."""
        where = "reason IS NULL AND id IN (SELECT value FROM json_each(?))"
        return {record.id: record for record in self._select(where, json.dumps(list(ids)))}

    def copies(self, digests: Iterable[str]) -> dict[str, FileRecord]:
        """Return a file with each of these contents, for those contents that are in the index."""
        where = "reason IS NULL AND digest IN (SELECT value FROM json_each(?))"
        return {str(record.digest): record for record in self._select(where, json.dumps(list(digests)))}

    def set_aside(self) -> list[FileRecord]:
        """Return the records of all files that could not be used, by folder and id."""
        return list(self._select("reason IS NOT NULL AND ? ORDER BY root, id", 1))

    def put(self, records: Iterable[FileRecord]) -> None:
        """Insert or replace records."""
        rows = [tuple(vars(record).values()) for record in records]
        self._db.run_many("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget(self, root: str, ids: Iterable[str]) -> None:
        """Delete the records of files of a folder."""
        self._db.run_many("DELETE FROM files WHERE root = ? AND id = ?", [(root, name) for name in ids])

    def forget_entries(self, ids: Iterable[str]) -> None:
        """Delete the records of the files that these entries came from."""
        self._db.run_many("DELETE FROM files WHERE id = ? AND reason IS NULL", [(name,) for name in ids])

    def without_entry(self) -> list[str]:
        """Return the ids of files that are recorded as being in the index and are not."""
        sql = "SELECT id FROM files WHERE reason IS NULL AND id NOT IN (SELECT id FROM items)"
        return [str(row[0]) for row in self._db.rows(sql)]

    def _select(self, where: str, value: str | int) -> Iterator[FileRecord]:
        sql = f"SELECT root, id, size, mtime_ns, digest, reason FROM files WHERE {where}"
        return (FileRecord(*row) for row in self._db.rows(sql, (value,)))
