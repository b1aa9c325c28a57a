"""Opening an index on the command line, with advice for whoever names something else."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vitembed.errors import SearchIndexError

if TYPE_CHECKING:
    from vitembed.index import Index


def open_index(path: Path) -> "Index":
    """Open an index.

    Raises:
        SearchIndexError: it is damaged, or there is none; the error then says how to make one.
    """
    from vitembed.index import Index
    from vitembed.index.catalog import NAME

    # A folder with vectors and without a catalog is a damaged index, of which the library says so.
    if (path / NAME).is_file() or any(path.glob("vectors-*")):
        return Index.open(path)
    if path.is_file():
        raise SearchIndexError(f"{path} is a file and not an index; name the folder of the index first")
    is_full = path.is_dir() and any(path.iterdir())
    beside = Path(f"{path.resolve().name or 'images'}.index")  # in the folder that one stands in; / has no name
    index, images = (beside, str(path)) if is_full else (path, "FOLDER")
    what = "a folder of other things" if is_full else "an empty folder" if path.is_dir() else "no such folder"
    raise SearchIndexError(
        f"{path} is not an index ({what}); make one with: vitembed index create {shlex.quote(str(index))} && "
        f"vitembed index sync {shlex.quote(str(index))} {shlex.quote(images)}"
    )
