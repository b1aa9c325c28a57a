"""`sync`: an index that follows a folder of images.

An image's id is its POSIX path below the folder. The catalog records of every file the size, the time of its last
change and a hash of its content: a file whose size and time are the same is not read, one whose content is the same is
not embedded, and a content that the index holds under another id (a copy, a renamed file) lends its vector. Every batch
is committed with the records of its files, so that a killed run loses one batch at most and the next one goes on from
there.

Files that cannot be used are set aside: recorded with the reason, out of the index, and tried again when they change.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vitembed.errors import ConfigError, DataError, ImageError, ModelMismatchError, SearchIndexError
from vitembed.images import list_images
from vitembed.index.catalog import FileRecord
from vitembed.index.index import Index
from vitembed.index.inputs import id_problem
from vitembed.index.vectors import FloatArray

# Batches that are hashed before they are embedded: enough to keep the decoding workers of one stream busy, few enough
# that the files are still in the system's cache when they are decoded.
_SLICE_BATCHES = 16

# A file that changed this recently (ns) may change again without its time showing it, on coarse clocks.
_TOO_FRESH = 2_000_000_000


class Batch(Protocol):
    """What `Model.stream` yields; see `vitembed.embedder.EncodedBatch`."""

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Positions (b,) of the embedded images in the input."""
        ...

    @property
    def vectors(self) -> FloatArray:
        """Their embeddings (b, dim), rows of unit length."""
        ...

    @property
    def failures(self) -> list[tuple[int, ImageError]]:
        """Positions and reasons of those that could not be read."""
        ...


class Model(Protocol):
    """What embeds images; an `vitembed.Embedder` is one."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells this model from every other."""
        ...

    def stream(self, images: Sequence[Any], *, batch_size: int = 64, workers: int | None = None) -> Iterator[Batch]:
        """Embed images lazily, in order."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did.

    Attributes:
        added: files that were not in the index.
        updated: files whose content had changed.
        removed: entries whose file is gone.
        unchanged: files that were left as they were.
        failed: files that are not in the index, and why: path -> reason. Those that failed before and did not change
        are
            listed too.
    """

    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def sync(
    index: Index,
    model: Model,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    workers: int | None = None,
) -> SyncReport:
    """Make an index hold the images of a folder: new, changed and removed files, and no others of this folder.

    Entries that came from elsewhere are left alone. It may be stopped or killed at any time and called again. The
    metadata of an entry become `{"path": absolute path}`.

    Args:
        index: an open index. Where it has no model's fingerprint yet, this model's is recorded.
        model: makes the embeddings.
        folder: searched with its subfolders, see `vitembed.images.list_images`.
        batch_size: images embedded, and committed, together.
        progress: show a bar on standard error.
        workers: processes that decode images, see `Embedder.stream`.

    Raises:
        DataError: the folder is missing or holds no images at all (an empty one is taken for a mistake, such as a disk
            that is not mounted, and not for the wish to remove everything).
        ModelMismatchError: the index was built with another model.
        SearchIndexError: another process writes to the index or synchronises it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    root = Path(folder).resolve()
    if _shown(root) != str(root):
        raise DataError(f"the name of the folder {_shown(root)!r} is not valid Unicode; rename it")
    paths = list_images(root)
    with _alone(index.path):
        _agree(index, model)
        run = _Run(index, model, root, batch_size, workers)
        todo = run.plan(paths)
        with _bar(len(todo), progress) as bar:
            for start in range(0, len(todo), batch_size * _SLICE_BATCHES):
                for done in run.take(todo[start : start + batch_size * _SLICE_BATCHES]):
                    bar.update(done)
        run.remove_gone()
    return run.report()


class _Run:
    """One call of `sync`: what is known of the folder's files, and the counts."""

    def __init__(self, index: Index, model: Model, root: Path, batch_size: int, workers: int | None) -> None:
        self.index, self.model, self.root = index, model, root
        self.batch_size, self.workers = batch_size, workers
        self.known = index.catalog.files(str(root))  # id -> record
        self.gone = dict(self.known)
        self.added = self.updated = self.removed = self.unchanged = 0
        self.failed: dict[str, str] = {}

    def plan(self, paths: list[Path]) -> list[FileRecord]:
        """Return the files that must be read, as records without a digest."""
        todo = []
        owners = self._foreign([path.relative_to(self.root).as_posix() for path in paths])
        for path in paths:
            name = path.relative_to(self.root).as_posix()
            known = self.gone.pop(name, None)
            problem = id_problem(name) or owners.get(name)
            if problem:
                self.failed[_shown(path)] = f"its name below the folder is its id, which {problem}"
                continue
            found = self._look(path, name)
            if found and known and _unchanged(known, found):
                self._keep(known)
            elif found:
                todo.append(found)
        return todo

    def take(self, files: list[FileRecord]) -> Iterator[int]:
        """Bring one slice of files into the index, batch by batch; yield how many files each batch settled."""
        hashed = [file for file in map(self._hashed, files) if file]
        yield len(files) - len(hashed)
        same = [file for file in hashed if self._is_known(file)]
        self._commit([], [replace(file, reason=self.known[file.id].reason) for file in same])
        yield len(same)
        settled = {file.id for file in same}
        copies: dict[str, list[FileRecord]] = {}  # content -> the files that hold it
        for file in hashed:
            if file.id not in settled:
                copies.setdefault(str(file.digest), []).append(file)
        yield from self._lend(copies)
        yield from self._embed(list(copies.values()))

    def remove_gone(self) -> None:
        """Remove the entries and records of files that are no longer there."""
        if not self.gone:
            return
        present = [name for name, record in self.gone.items() if record.reason is None]
        with self.index.transaction():
            self.removed += self.index.remove(present, missing_ok=True)
            self.index.catalog.forget_files(str(self.root), self.gone)

    def report(self) -> SyncReport:
        """Return the counts."""
        return SyncReport(self.added, self.updated, self.removed, self.unchanged, dict(sorted(self.failed.items())))

    def _foreign(self, names: list[str]) -> dict[str, str]:
        """Return those ids that the index holds for something else than this folder's files, and for what."""
        new = [name for name in names if not id_problem(name) and self._live(name) is None]
        taken = self.index.catalog.find(new)
        owners = self.index.catalog.owners(taken)
        foreign = {}
        for name in taken:
            if name not in owners:
                foreign[name] = "is in the index already and was not added by sync"
            elif (Path(owners[name].root) / name).exists():
                foreign[name] = f"is in the index already for a file in {owners[name].root}"
        return foreign  # an owner that is gone has moved here with its folder, and hands its id over

    def _look(self, path: Path, name: str) -> FileRecord | None:
        try:
            status = path.stat()
        except OSError as error:
            self._set_aside(FileRecord(str(self.root), name, 0, 0, None), error.strerror or str(error))
            return None
        fresh = time.time_ns() - status.st_mtime_ns < _TOO_FRESH
        return FileRecord(str(self.root), name, status.st_size, 0 if fresh else status.st_mtime_ns, None)

    def _live(self, name: str) -> FileRecord | None:
        known = self.known.get(name)
        return known if known and known.reason is None else None

    def _keep(self, known: FileRecord) -> None:
        if known.reason is None:
            self.unchanged += 1
        else:
            self.failed[str(self.root / known.id)] = known.reason

    def _hashed(self, file: FileRecord) -> FileRecord | None:
        """Return the record with the hash of the file's content, or set the file aside and return None."""
        try:
            with (self.root / file.id).open("rb") as stream:
                return replace(file, digest=hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            self._set_aside(file, error.strerror or str(error))
            return None

    def _is_known(self, file: FileRecord) -> bool:
        """Count a file that was only touched: its content is the one that was recorded."""
        known = self.known.get(file.id)
        if known is None or known.digest != file.digest:
            return False
        self._keep(known)
        return True

    def _lend(self, copies: dict[str, list[FileRecord]]) -> Iterator[int]:
        """Give files whose content the index holds already that content's vector; take them out of `copies`."""
        # All vectors are fetched before any is committed: of two files that swapped contents, each lends to the other.
        entries = [
            (file, self.index.get(owner.id).vector)
            for digest, owner in self.index.catalog.copies(copies).items()
            for file in copies.pop(digest)
        ]
        self._commit(entries, [])
        yield len(entries)

    def _embed(self, groups: list[list[FileRecord]]) -> Iterator[int]:
        """Embed the first file of each group of equal files, and commit whole groups."""
        if not groups:
            return
        paths = [self.root / group[0].id for group in groups]
        for batch in self.model.stream(paths, batch_size=self.batch_size, workers=self.workers):
            entries = [
                (file, vector)
                for position, vector in zip(batch.positions.tolist(), batch.vectors, strict=True)
                for file in groups[position]
            ]
            aside = [
                replace(file, reason=error.reason) for position, error in batch.failures for file in groups[position]
            ]
            self._commit(entries, aside)
            yield len(entries) + len(aside)

    def _set_aside(self, file: FileRecord, reason: str) -> None:
        self._commit([], [replace(file, reason=reason)])

    def _commit(self, entries: list[tuple[FileRecord, FloatArray]], records: list[FileRecord]) -> None:
        """In one transaction: add or replace entries, record files, and remove what is recorded as set aside."""
        if not entries and not records:
            return
        files = [file for file, _ in entries]
        aside = [record for record in records if record.reason is not None]
        with self.index.transaction():
            if entries:
                metadata = [{"path": str(self.root / file.id)} for file in files]
                self.index.add([file.id for file in files], np.stack([vector for _, vector in entries]), metadata)
            self.index.remove([record.id for record in aside if self._live(record.id)], missing_ok=True)
            self.index.catalog.put_files([*files, *records])
        for file in files:
            self.added, self.updated = (
                (self.added, self.updated + 1) if self._live(file.id) else (self.added + 1, self.updated)
            )
        self.failed |= {str(self.root / record.id): str(record.reason) for record in aside}


def _shown(path: Path) -> str:
    """Return a path as text that can be printed and stored, whatever bytes its name is made of."""
    return str(path).encode("utf-8", "replace").decode()


def _unchanged(known: FileRecord, found: FileRecord) -> bool:
    """Tell whether a file is, by its size and time, the one that was read before."""
    times = known.mtime_ns == found.mtime_ns != 0
    return known.digest is not None and known.size == found.size and times


def _agree(index: Index, model: Model) -> None:
    """Raise unless index and model fit; record the model where none is."""
    index.require_model(model.fingerprint)
    if model.dim != index.dim:
        raise ModelMismatchError(
            f"{index.path} holds vectors of {index.dim} numbers and this model makes {model.dim}; "
            "use the model it was built with, or build a new index"
        )
    if index.fingerprint is None:
        with index.transaction():
            index.catalog.set_meta("fingerprint", model.fingerprint)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Raise when another process is in this block for the same index.

    The lock is SQLite's on a file of its own: it works on every system, and ends with the process that holds it.
    """
    try:
        connection = sqlite3.connect(path / "sync.lock", timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise SearchIndexError(f"{path / 'sync.lock'}: cannot write ({error}); check its permissions") from error
    with closing(connection):
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise SearchIndexError(f"another process is synchronising {path}; wait for it or stop it") from error
        yield


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit=" images", desc="sync", disable=not shown) as bar:
        yield bar
