"""What keeps files out of an index: names that are the ids of something else, and reasons to set them aside."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitembed.index.catalog import Item
from vitembed.index.files import FileRecord
from vitembed.index.folder import is_there, shown
from vitembed.index.index import Index
from vitembed.index.inputs import id_problem

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

    A file that has an entry all the same, by way of another folder or added by hand, is left out.

    Raises:
        SearchIndexError: the catalog is damaged.
    """
    records = index.catalog.file_records
    found = records.set_aside()
    named = records.named(str(Path(one.root, one.id)) for one in found) if found else set()
    left = [one for one in found if str(Path(one.root, one.id)) not in named]
    listed = [SetAside(shown(Path(one.root, one.id.removeprefix(NO_ID))), str(one.reason)) for one in left]
    return sorted(listed, key=lambda one: one.path)


def recorded(name: str) -> str:
    """Return under which id a file is recorded: its name, unless that cannot be an id."""
    return NO_ID + shown(name) if id_problem(name) else name


class Claims:
    """Which ids the files of a folder may have.

    Within a transaction the answers hold until its end; before, only until another process changes the index.

    Args:
        index: the index.
        root: the folder, absolute.
    """

    def __init__(self, index: Index, root: str) -> None:
        self._catalog, self._root = index.catalog, root

    def own(self, names: Iterable[str]) -> set[str]:
        """Return those of these ids whose entries are those of this folder's files."""
        owners = self._catalog.file_records.owners(names)
        return {name for name, owner in owners.items() if owner.root == self._root}

    def problems(self, files: Mapping[str, str | None]) -> dict[str, str]:
        """Return which files may not have their names as ids, and why.

        Args:
            files: name -> digest of the file, or None while it was not read.
        """
        problems = {name: problem for name in files if (problem := id_problem(name))}
        taken = self._catalog.find([name for name in files if name not in problems])
        owners = self._catalog.file_records.owners(taken)
        for name, item in taken.items():
            problem = self._problem(item, owners.get(name), files[name])
            if problem:
                problems[name] = problem
        return {name: f"its name below the folder is its id, which {problem}" for name, problem in problems.items()}

    def _problem(self, item: Item, owner: FileRecord | None, digest: str | None) -> str | None:
        """Return why an id that is in the index is not one for a file of this folder."""
        if owner is None:
            # One that was imported, or added by hand, for this very file is taken over.
            ours = json.loads(item.metadata).get("path") == str(Path(self._root, item.id))
            return None if ours else "is in the index already and was not added by sync"
        name, place = item.id, Path(owner.root, item.id)
        if owner.root == self._root:
            return None
        if is_there(place):
            return f"is in the index already for a file in {owner.root}"
        if digest is None or owner.digest == digest:
            return None  # it has moved here with its folder
        return (
            f"is in the index already for {place}, which is not there now and held another picture; bring it back, or, "
            f"if it moved here and was edited or is given up, remove {name!r} from the index and sync again"
        )
