"""What an index knows of the files of folders that it follows; `sync` keeps these records."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vitembed.index.database import Database

FILES_SCHEMA = """
CREATE TABLE files (
    root TEXT NOT NULL, id TEXT NOT NULL, size INTEGER NOT NULL, changed_ns INTEGER NOT NULL, digest TEXT, reason TEXT,
    PRIMARY KEY (root, id)
) WITHOUT ROWID;
CREATE INDEX files_id ON files (id);
CREATE INDEX files_digest ON files (digest);
"""


# Records read at a time where all of a folder are.
_PAGE = 4_096


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known about a file that `sync` has met.

    Attributes:
        root: the folder that was synced, absolute.
        id: the file's POSIX path relative to it, which is its id in the index.
        size: in bytes.
        changed_ns: when its content or status last changed, the later of the two; 0 when that was too fresh to tell the
            next change from this one.
        digest: hash of the content; None when the file could not be read.
        reason: why it was set aside; None when it is in the index.
    """

    root: str
    id: str
    size: int
    changed_ns: int
    digest: str | None
    reason: str | None = None


class FileRecords:
    """The records of files in a catalog.

    Args:
        db: the catalog's database; the caller sees to transactions.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, root: str) -> Iterator[FileRecord]:
        """Yield what is recorded of the files of a folder, by id; a page is in memory at a time."""
        last = ""
        while page := list(self._select("root = ? AND id > ? ORDER BY id LIMIT ?", root, last, _PAGE)):
            yield from page
            last = page[-1].id

    def find(self, root: str, ids: Iterable[str]) -> dict[str, FileRecord]:
        """Return what is recorded of these files of a folder, by id."""
        where = "root = ? AND id IN (SELECT value FROM json_each(?))"
        return {record.id: record for record in self._select(where, root, json.dumps(list(ids)))}

    def owners(self, ids: Iterable[str]) -> dict[str, FileRecord]:
        """Return from which file of any folder each of these ids came, for those that came from one."""
        where = "reason IS NULL AND id IN (SELECT value FROM json_each(?))"
        return {record.id: record for record in self._select(where, json.dumps(list(ids)))}

    def copies(self, digests: Iterable[str]) -> dict[str, str]:
        """Return digest -> id of one file with this content, for those contents that are in the index."""
        first = "SELECT id FROM files WHERE digest = value AND reason IS NULL LIMIT 1"  # a blank picture has a million
        found = self._db.rows(f"SELECT value, ({first}) FROM json_each(?)", (json.dumps(list(digests)),))
        return {str(digest): str(name) for digest, name in found if name is not None}

    def set_aside(self) -> list[FileRecord]:
        """Return the records of all files that could not be used, by folder and id."""
        return list(self._select("reason IS NOT NULL ORDER BY root, id"))

    def named(self, paths: Iterable[str]) -> set[str]:
        """Return those of these paths that entries name as the "path" of their metadata."""
        path = "json_extract(metadata, '$.path')"
        sql = f"SELECT DISTINCT {path} FROM items WHERE {path} IN (SELECT value FROM json_each(?))"
        return {str(row[0]) for row in self._db.rows(sql, (json.dumps(list(paths)),))}

    def put(self, records: Iterable[FileRecord]) -> None:
        """Insert or replace records."""
        rows = [(one.root, one.id, one.size, one.changed_ns, one.digest, one.reason) for one in records]
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

    def _select(self, where: str, *values: str | int) -> Iterator[FileRecord]:
        sql = f"SELECT root, id, size, changed_ns, digest, reason FROM files WHERE {where}"
        return (FileRecord(*row) for row in self._db.rows(sql, values))
