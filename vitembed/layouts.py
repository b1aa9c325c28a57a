"""How the folders of images name the identities that they show.

    root/IDENTITY/image.png                                        folders named for identities, one or more levels deep
    root/WRITER/genuine/image.png, root/WRITER/forged/image.png    signatures: others imitate the writer
    root/full_org/original_W_N.png, root/full_forg/forgeries_W_N.png    the same as CEDAR has it: image N of writer W

Signatures may lie deeper, too: the folders between `root` and them are then a part of the writer's name. A skilled
forgery of a writer gets a name, and so a class, of its own: `WRITER/forged/FILE`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vitembed.errors import DataError

GENUINE, FORGED = "genuine", "forged"  # the folders of a writer, in any case

# The folders of all writers, and what their files are called, both in any case. The database: Kalera, Srihari and Xu
# 2004, "Offline signature verification and identification using distance statistics"; 55 writers, 24 images of each
# kind.
_CEDAR = {
    "full_org": (GENUINE, re.compile(r"original_(\d+)_\d+", re.IGNORECASE | re.ASCII)),
    "full_forg": (FORGED, re.compile(r"forgeries_(\d+)_\d+", re.IGNORECASE | re.ASCII)),
}


class Names(NamedTuple):
    """The classes of N images.

    Attributes:
        classes: the name of each image's class.
        forgery_of: the name of the class that each image imitates, None for a genuine image.
    """

    classes: list[str]
    forgery_of: list[str | None]


class _Signature(NamedTuple):
    """Whose signature an image shows, or imitates; which of the two, `GENUINE` or `FORGED`; and in which layout."""

    writer: str
    kind: str
    of_cedar: bool


def name_forgery(writer: object, file: object) -> str:
    """Return the name of a forgery's own class."""
    return f"{writer}/{FORGED}/{file}"


def names_of_folders(root: Path, paths: Sequence[Path]) -> Names:
    """Name images after the folders that hold them; as `names_of_signatures` where these layouts are met throughout.

    Raises:
        DataError: if an image lies in no folder below `root`, or a writer's genuine and forged images lie beside
            others: as a class, the forgeries would be positives of each other.
    """
    signatures = [_signature(path, root) for path in paths]
    if None not in signatures:
        return names_of_signatures(root, paths)
    stray = paths[signatures.index(None)]
    found = set(signatures)
    if any(one is not None and {one._replace(kind=kind) for kind in (GENUINE, FORGED)} <= found for one in found):
        raise DataError(
            f"{stray} lies in no {root}/WRITER/{GENUINE} or {FORGED}, as others do, and is not named as CEDAR's "
            "signatures are; move it away, or rename these folders if they hold no forgeries"
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
    """Name images that lie in `root/WRITER/genuine` and, imitating the writer, in `root/WRITER/forged`; or as CEDAR's.

    Raises:
        DataError: naming the first image that lies elsewhere, or that would make one writer of two: of CEDAR's
            number 7 and a folder 7.
    """
    names = Names([], [])
    layouts: dict[str, bool] = {}
    for path in paths:
        signature = _signature(path, root)
        if signature is None:
            raise DataError(
                f"{path} lies in no {root}/WRITER/{GENUINE} and in no {root}/WRITER/{FORGED}, and is no "
                "full_org/original_W_N or full_forg/forgeries_W_N, as CEDAR names them"
            )
        if layouts.setdefault(signature.writer, signature.of_cedar) != signature.of_cedar:
            raise DataError(
                f"{path} is of a writer {signature.writer!r}, and so are images in the other layout of signatures; "
                "move each data set into a folder of its own"
            )
        writer, is_forged = signature.writer, signature.kind == FORGED
        names.classes.append(name_forgery(writer, path.name) if is_forged else writer)
        names.forgery_of.append(writer if is_forged else None)
    return names


def _signature(path: Path, root: Path) -> _Signature | None:
    """Return what an image is in one of the two layouts of signatures; None for an image elsewhere."""
    folder = path.parent
    if folder == root:
        return None
    kind, above = folder.name.casefold(), folder.parent.relative_to(root)
    if kind in (GENUINE, FORGED):
        return None if folder.parent == root else _Signature(above.as_posix(), kind, False)
    if kind in _CEDAR:
        kind, pattern = _CEDAR[kind]
        if named := pattern.fullmatch(path.stem):
            return _Signature((above / named[1]).as_posix(), kind, True)
    return None
