"""How the folders of images name the identities that they show.

    root/IDENTITY/image.png                                        folders named for identities, one or more levels deep
    root/WRITER/genuine/image.png, root/WRITER/forged/image.png    signatures: others imitate the writer

A skilled forgery of a writer gets a name, and so a class, of its own: `WRITER/forged/FILE`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vitembed.errors import DataError

GENUINE, FORGED = "genuine", "forged"  # the folders of a writer, in any case


class Names(NamedTuple):
    """The classes of N images.

    Attributes:
        classes: the name of each image's class.
        forgery_of: the name of the class that each image imitates, None for a genuine image.
    """

    classes: list[str]
    forgery_of: list[str | None]


def name_forgery(writer: object, file: object) -> str:
    """Return the name of a forgery's own class."""
    return f"{writer}/{FORGED}/{file}"


def names_of_folders(root: Path, paths: Sequence[Path]) -> Names:
    """Name images after the folders that hold them; as `names_of_signatures` where that layout is met throughout.

    Raises:
        DataError: if an image lies in no folder below `root`, or a writer's genuine and forged images lie beside
            others: as a class, the forgeries would be positives of each other.
    """
    writers = [_writer_of(path, root) for path in paths]
    if None not in writers:
        return names_of_signatures(root, paths)
    stray = paths[writers.index(None)]
    kinds = {(writer, _kind_of(path)) for writer, path in zip(writers, paths, strict=True) if writer is not None}
    if any((writer, GENUINE) in kinds and (writer, FORGED) in kinds for writer, _ in kinds):
        raise DataError(
            f"{stray} lies in no {root}/WRITER/{GENUINE} or {FORGED}, as others do; move it away, or rename these "
            "folders if they hold no forgeries"
        )
    names = [path.parent.relative_to(root).as_posix() for path in paths]
    if "." in names:
        loose = paths[names.index(".")]
        raise DataError(f"{loose} lies in no class; expected {root}/CLASS/IMAGE: make one folder a class")
    return Names(names, [None] * len(names))


def require_identities(root: Path, classes: Iterable[str]) -> None:
    """Refuse the folder of one writer, whose genuine and forged images would be taken for two people.

    Raises:
        DataError: the only classes are genuine and forged.
    """
    if {name.casefold() for name in classes} == {GENUINE, FORGED}:
        raise DataError(f"{root} is the folder of one writer; name the folder above it")


def names_of_signatures(root: Path, paths: Sequence[Path]) -> Names:
    """Name images that lie in `root/WRITER/genuine` and, imitating the writer, in `root/WRITER/forged`.

    Raises:
        DataError: naming the first image that lies elsewhere.
    """
    names = Names([], [])
    for path in paths:
        writer = _writer_of(path, root)
        if writer is None:
            raise DataError(f"{path} lies in no {root}/WRITER/{GENUINE} and in no {root}/WRITER/{FORGED}")
        is_forged = _kind_of(path) == FORGED
        names.classes.append(name_forgery(writer, path.name) if is_forged else writer)
        names.forgery_of.append(writer if is_forged else None)
    return names


def _writer_of(path: Path, root: Path) -> str | None:
    """Return the WRITER of root/WRITER/genuine/x.png or root/WRITER/forged/x.png; None for an image elsewhere."""
    folder = path.parent
    if _kind_of(path) not in (GENUINE, FORGED) or folder in (root, root / folder.name):
        return None
    return folder.parent.relative_to(root).as_posix()


def _kind_of(path: Path) -> str:
    return path.parent.name.casefold()
