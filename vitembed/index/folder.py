"""A folder of images on the disk, as `sync` follows it: which files it has, and whether one is still what it was.

A file's name is its POSIX path below the folder. Links are followed; a folder that several ways lead to is listed once,
under its real name where that lies below the root, so that a new link renames nothing. A folder that cannot be read is
reported and not taken for an empty one. Names that begin with a dot are left out, and case and spelling are the file
system's: `A.png` and `a.png` are two files where it holds two.
"""

import hashlib
import heapq
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitembed.errors import DataError
from vitembed.images import IMAGE_SUFFIXES
from vitembed.index.files import FileRecord

# A file that changed this recently (ns) may change again without its time showing it, on coarse clocks.
_TOO_FRESH = 2_000_000_000

# What the system says of a file that went away, or whose folder did.
_GONE = (FileNotFoundError, NotADirectoryError)


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        names: of its images, sorted; bytes that are no UTF-8 are surrogates in them, as Python has it.
        closed: folders below it that cannot be read, and why.
    """

    names: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)


class Folder:
    """A folder of images.

    Args:
        path: the folder; links in it are resolved.

    Raises:
        DataError: its name is not valid Unicode, and so could not be recorded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = str(Path(path).resolve())
        try:
            self.root.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the name of the folder {shown(self.root)!r} is not valid Unicode; rename it") from error
        self._prefix = self.root if self.root.endswith(os.sep) else self.root + os.sep

    def path(self, name: str) -> str:
        """Return the absolute path of a file."""
        return self._prefix + name

    def list(self) -> Listing:
        """Look for images by their suffixes, whose case does not matter.

        Raises:
            DataError: the folder is missing, cannot be read, or holds no image at all.
        """
        listing = Listing()
        for name in self._folders(listing):
            listing.names.append(name)
        if "" in listing.closed:
            raise DataError(f"{self.root} {listing.closed['']}; expected a folder of images that may be read")
        if not listing.names:
            closed = f"; {len(listing.closed)} folders below it cannot be read" if listing.closed else ""
            raise DataError(
                f"{self.root} holds no image{closed}; looked for files that end in {', '.join(IMAGE_SUFFIXES)}"
            )
        listing.names.sort()
        return listing

    def _folders(self, listing: Listing) -> Iterator[str]:
        """Yield the names of images, folder by folder: first those without links, then what links lead to."""
        seen: set[tuple[int, int]] = set()
        folders, links = [""], list[str]()
        while folders or links:
            folder = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(self.path(folder))  # noqa: PTH116
                if (status.st_dev, status.st_ino) in seen:
                    continue  # another way to it, or a link back to where it lies
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(self.path(folder)) as entries:
                    found = [entry for entry in entries if not entry.name.startswith(".")]
            except OSError as error:
                if not isinstance(error, _GONE):
                    listing.closed[folder] = f"cannot be read: {error.strerror}"
                elif not folder:
                    listing.closed[folder] = "is a file" if os.path.exists(self.root) else "does not exist"  # noqa: PTH110
                continue
            below = f"{folder}/" if folder else ""
            for entry in found:
                if _is_folder(entry) and entry.is_symlink():
                    heapq.heappush(links, below + entry.name)
                elif _is_folder(entry):
                    folders.append(below + entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield below + entry.name

    def look(self, name: str) -> FileRecord | str | None:
        """Return what the file system says of a file, as a record without a digest.

        Returns:
            Why the file cannot be used, as text, where it cannot; None when it went away meanwhile.
        """
        try:
            status = os.stat(self.path(name))  # noqa: PTH116
        except OSError as error:
            return self._trouble(name, error)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return "is not a regular file"
        return _record(self.root, name, status)

    def read(self, name: str) -> FileRecord | str | None:
        """Return the record of a file with the digest of its content; otherwise as `look`."""
        try:
            with open(self.path(name), "rb") as stream:  # noqa: PTH123
                record = _record(self.root, name, os.fstat(stream.fileno()))
                return replace(record, digest=hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            return self._trouble(name, error)

    def still(self, record: FileRecord, thorough: bool = False) -> bool:
        """Tell whether a file holds what it held when its record was read.

        Args:
            record: what `read` returned.
            thorough: compare the content, and not only size and time; where the time tells nothing, it always is.
        """
        if thorough or not record.changed_ns:
            now = self.read(record.id)
            return isinstance(now, FileRecord) and now.digest == record.digest
        found = self.look(record.id)
        return isinstance(found, FileRecord) and (found.size, found.changed_ns) == (record.size, record.changed_ns)

    def _trouble(self, name: str, error: OSError) -> str | None:
        if not isinstance(error, _GONE):
            return error.strerror or str(error)
        return "is a link to a file that does not exist" if os.path.lexists(self.path(name)) else None


def unchanged(known: FileRecord, found: FileRecord) -> bool:
    """Tell whether a file is, by its size and time alone, the one that was read before."""
    times = known.changed_ns == found.changed_ns != 0
    return known.digest is not None and known.size == found.size and times


def is_there(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file exists; one that cannot be asked for, on a disk that fails or is locked, counts as there."""
    try:
        os.stat(path)  # noqa: PTH116
    except _GONE:
        return False
    except OSError:
        return True
    return True


def changed_ns(status: os.stat_result) -> int:
    """Return when a file last changed, as far as the system tells, in nanoseconds.

    The time of its content alone does not tell two files that swapped names, or one that was copied over another with
    its time kept. A rename changes the time of its status on the usual file systems (on Windows that one is the time of
    its creation).
    """
    return max(status.st_mtime_ns, status.st_ctime_ns)


def shown(path: str | os.PathLike[str]) -> str:
    r"""Return a path as text of one line that can be printed and stored, whatever bytes its name is made of.

    >>> print(shown(b"line\nbreak \xff.png".decode(errors="surrogateescape")))
    line\nbreak \xff.png
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        character.encode("unicode_escape").decode() if _is_control(character) else character for character in text
    )


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: the file that it seems to be is then set aside
        return False


def _record(root: str, name: str, status: os.stat_result) -> FileRecord:
    changed = changed_ns(status)
    fresh = time.time_ns() - changed < _TOO_FRESH
    return FileRecord(root, name, status.st_size, 0 if fresh else changed, None)
