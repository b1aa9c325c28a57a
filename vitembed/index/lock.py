"""One long job at a time: the lock that keeps `sync` and `migrate` of several processes apart.

Neither holds the index's own write lock while it embeds, so that single additions and removals go on meanwhile.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from vitembed.errors import SearchIndexError

LOCK = "sync.lock"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the block no other process is in this block for the same index.

    The lock is SQLite's on a file of its own: it works on every system, and ends with the process that holds it.

    Args:
        path: the index's folder.

    Raises:
        SearchIndexError: another process is in the block, or the lock cannot be written.
    """
    try:
        connection = sqlite3.connect(path / LOCK, timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise SearchIndexError(f"{path / LOCK}: cannot write ({error}); check its permissions") from error
    with closing(connection):
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if not str(getattr(error, "sqlite_errorname", "")).startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise SearchIndexError(f"{path / LOCK}: cannot write ({error}); check its permissions") from error
            raise SearchIndexError(
                f"another process is synchronising or migrating {path}; wait for it or stop it"
            ) from error
        yield
