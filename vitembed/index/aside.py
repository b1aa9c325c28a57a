"""The files that `sync` and `migrate` could not use: each with its path and the reason, kept in the index's catalog."""

from dataclasses import dataclass
from pathlib import Path

from vitembed.index.folder import shown
from vitembed.index.index import Index

NO_ID = "\x1a"
"""Before a name that cannot be an id, in the table of files: no id holds a control character, so that none is met."""


@dataclass(frozen=True)
class SetAside:
    """A file that could not be used, or a folder that could not be read, and so is not in the index.

    Attributes:
        path: where it is, absolute; bytes that are no UTF-8 and control characters are escaped.
        reason: why it could not be used.
    """

    path: str
    reason: str


def set_aside(index: Index) -> list[SetAside]:
    """Return what was set aside, of all folders, as the last `sync` of each has left it; sorted by path.

    Raises:
        SearchIndexError: the catalog is damaged.
    """
    found = [
        SetAside(shown(Path(record.root, record.id.removeprefix(NO_ID))), str(record.reason))
        for record in index.catalog.file_records.set_aside()
    ]
    return sorted(found, key=lambda one: one.path)
