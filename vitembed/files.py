"""Files that are either wholly written or not touched at all.

Everything that vitembed saves goes through this module. The bytes go to a temporary sibling first, are forced
to the disk, and only then take the target's name by a rename, which POSIX makes atomic: whoever opens the
target, after a crash or a power cut too, finds the old file or the new one. A killed process can leave a
hidden sibling named `.NAME-XXXXXXXX.SUFFIX` behind, never a half-written target.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitembed.errors import VitembedError

# What a failed write or sync says; Python then names no file in the error.
_WRITE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

# What file systems say that cannot force a folder's entries to the disk.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file by `data`, all of it or nothing.

    Args:
        path: the file to write; its folder must exist.
        data: the new content; text is written as UTF-8 with its line ends as they are.

    Raises:
        VitembedError: the folder is missing, is not writable or is full; the old file is then unchanged.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which replaces `path` when the block ends without an exception.

    The temporary file lies in the target's folder, keeps its suffix (writers that choose a format by it work)
    and exists already, empty, so that a folder that cannot be written is found before the work and not after
    it. A symbolic link is followed: the file that it points to is replaced. An existing file's permissions
    are kept.

    Args:
        path: the file to replace or create; its folder must exist.

    Yields:
        The path to write to. After an exception in the block it is removed and the target is unchanged.

    Raises:
        VitembedError: the folder is missing, is not writable or is full. Any other exception of the block
            passes through as it is.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
    try:
        _check_target(path, target)
        temporary.touch(exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode & 0o7777
        yield temporary
        temporary.chmod(mode)  # some writers replace the file by one that only its owner may read
        _publish(temporary, target)
    except OSError as error:
        places = {str(temporary), str(target), str(target.parent)}
        if str(error.filename) in places or (error.filename is None and error.errno in _WRITE_FAILED):
            raise VitembedError(f"cannot write {os.fspath(path)}: {error.strerror}") from error
        raise
    finally:
        with suppress(OSError):  # gone already after a rename; a clean-up must not hide the first error
            temporary.unlink()


def _check_target(path: str | os.PathLike[str], target: Path) -> None:
    if target.is_dir():
        raise VitembedError(f"cannot write {os.fspath(path)}: it is a folder; name a file in it")
    if not target.parent.is_dir():
        raise VitembedError(f"cannot write {os.fspath(path)}: there is no folder {target.parent}; create it")


def _publish(temporary: Path, target: Path) -> None:
    """Force the temporary file to the disk, rename it over the target, and force the rename to the disk."""
    _sync(temporary, os.O_RDWR)
    temporary.replace(target)
    if os.name != "nt":  # Windows cannot open a folder, and needs no sync of it
        try:
            _sync(target.parent, os.O_RDONLY)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
