"""`sync`: an index that follows a folder of images.

An image's id is its POSIX path below the folder. The catalog records of every file the size, the time when its content
or status last changed, and a hash of its content: a file whose size and time are the same is not read, one whose
content is the same is not embedded, and a content that the index holds under another id (a copy, a renamed file) lends
its vector.

Every batch is committed, with the records of its files, before the next one is embedded. So a killed run loses the one
batch that was being embedded, `batch_size` images at most, and the hashes of at most one slice of files; the next run
goes on from there.

An id belongs to the file that it was added for. It passes to a file of another folder when the first is gone and the
second has the same content: the folder was moved. Other processes may add and remove entries meanwhile; so what belongs
to whom is asked again within the transaction that changes it.

Files that cannot be used are set aside: recorded with the reason, out of the index, and tried again when they change.
A file that changes while it is embedded is set aside, too, and taken by the next run: what the catalog says of a
content is true of the vector beside it.
"""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitembed.errors import ConfigError, ModelMismatchError
from vitembed.index.aside import NO_ID, Claims, recorded
from vitembed.index.catalog import Item
from vitembed.index.files import FileRecord
from vitembed.index.folder import Folder, Listing, shown, unchanged
from vitembed.index.index import Index
from vitembed.index.lock import alone
from vitembed.index.model import Batch, Model
from vitembed.index.progress import Progress
from vitembed.index.vectors import FloatArray

# A slice of files is hashed before it is embedded: batches enough to keep the decoding workers of one stream busy, and
# few enough, in bytes too, that the files are still in the system's cache when they are decoded.
_SLICE_BATCHES = 16
_SLICE_BYTES = 1 << 29

# Listed files that are compared with their records at a time.
_LOOKED_UP = 4_096

_CHANGED = "changed while it was read; the next sync takes it"


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did.

    Attributes:
        added: files that were not in the index.
        updated: files whose content had changed.
        removed: entries whose file is gone.
        unchanged: files that were left as they were; those below a folder that cannot be read count among them.
        failed: files that are not in the index, and folders that cannot be read, and why: path -> reason. Those that
            failed before and did not change are listed too.
        embedded: contents that the model embedded; fewer than were added where some are copies.
        read: bytes of the files that were read to be compared; like the time, it does not count when reports are.
        seconds: that it took.
    """

    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    embedded: int = field(default=0, compare=False)
    read: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)


def sync(
    index: Index,
    model: Model,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    workers: int | None = None,
    retry: bool = False,
) -> SyncReport:
    """Make an index hold the images of a folder: new, changed and removed files, and no others of this folder.

    Entries that came from elsewhere are left alone, unless they name one of these files as their path. It may be
    stopped or killed at any time and called again. The metadata of a new entry are `{"path": absolute path}`; what
    `Index.annotate` adds stays when the file changes.

    Args:
        index: the index; it takes over the model's fingerprint if it has none.
        model: what embeds the images.
        folder: the folder of images, searched as `vitembed.index.folder` says.
        batch_size: images embedded, and committed, together.
        progress: show how far it is on standard error.
        workers: threads that decode images, see `Embedder.stream`.
        retry: try the files that were set aside again, although they did not change.

    Raises:
        ConfigError: `batch_size` is less than 1.
        DataError: the folder is missing or holds no images at all (an empty one is taken for a mistake, such as a disk
            that is not mounted, and not for the wish to remove everything).
        ModelMismatchError: the index was built with another model.
        SearchIndexError: another process writes to the index or synchronises it.
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    files = Folder(folder)
    listing = files.list()
    with alone(index.path):
        _agree(index, model)
        run = _Run(index, model, files, batch_size, workers, retry)
        todo = run.plan(listing)
        with Progress("sync", len(todo), progress) as bar:
            for part in _slices(todo, batch_size * _SLICE_BATCHES):
                run.take(part, bar)
        run.remove_gone()
    return run.report(time.perf_counter() - started)


class _Run:
    """One call of `sync`: what is known of the files in hand, and the counts."""

    def __init__(
        self, index: Index, model: Model, folder: Folder, batch_size: int, workers: int | None, retry: bool
    ) -> None:
        self.index, self.model, self.folder = index, model, folder
        self.batch_size, self.workers, self.retry = batch_size, workers, retry
        self.records, self.claims = index.catalog.file_records, Claims(index, folder.root)
        self.known: dict[str, FileRecord] = {}  # id -> record, of the files in hand: there may be millions of others
        self.gone: set[str] = set()
        self.added = self.updated = self.removed = self.unchanged = self.embedded = self.read = 0
        self.failed: dict[str, str] = {}

    def plan(self, listing: Listing) -> list[FileRecord]:
        """Return the files that must be read, as records without a digest; set aside what cannot be."""
        todo, aside = list[FileRecord](), set[str]()
        for start in range(0, len(listing.names), _LOOKED_UP):
            names = listing.names[start : start + _LOOKED_UP]
            self.known = self.records.find(self.folder.root, map(recorded, names))
            found, bad = self._planned(names)
            self._commit([], bad)
            todo += found
            aside |= {record.id for record in bad}
        stays = "what the index holds of it stays"
        closed = [self._aside(name, f"{reason}; {stays}") for name, reason in listing.closed.items()]
        self.known = self.records.find(self.folder.root, [record.id for record in closed])
        self._commit([], closed)
        self._find_gone(listing, aside | {record.id for record in closed})
        return todo

    def _planned(self, names: Sequence[str]) -> tuple[list[FileRecord], list[FileRecord]]:
        """Return which of these files must be read, and which cannot be used."""
        todo, aside = [], []
        problems = self.claims.problems({name: None for name in names if self._live(name) is None})
        for name in names:
            known, found = self.known.get(name), problems.get(name) or self.folder.look(name)
            if isinstance(found, str):
                aside.append(self._aside(name, found))
            elif found is None:
                self.gone |= {name} if known else set()
            elif known and unchanged(known, found) and not (self.retry and known.reason):
                self._keep(known)
            else:
                todo.append(found)
        return todo, aside

    def _find_gone(self, listing: Listing, aside: Collection[str]) -> None:
        """Tell which recorded files are not listed any more; those below a folder that cannot be read are left."""
        for record in self.records.of(self.folder.root):
            place = bisect_left(listing.names, record.id)
            if listing.names[place : place + 1] == [record.id] or record.id in aside:
                continue
            name = record.id.removeprefix(NO_ID)
            if listing.closed and any(name[:end] in listing.closed for end, sign in enumerate(name) if sign == "/"):
                self._keep(record)
            else:
                self.gone.add(record.id)

    def take(self, files: Sequence[FileRecord], progress: Progress) -> None:
        """Bring one slice of files into the index, batch by batch."""
        self.known = self.records.find(self.folder.root, [file.id for file in files])
        fresh, records = list[FileRecord](), list[FileRecord]()
        for number, file in enumerate(files, 1):
            found = self.folder.read(file.id)
            settled = not isinstance(found, FileRecord) or self._is_known(found)
            if isinstance(found, FileRecord):
                self.read += found.size
                if settled:
                    self._keep(self.known[found.id])
                    records.append(replace(found, reason=self.known[found.id].reason))
                else:
                    fresh.append(found)
            else:
                records += self._lost(file, found)
            progress.advance(int(settled), f"comparing {number:,} of {len(files):,}")
        problems = self.claims.problems({file.id: file.digest for file in fresh if self._live(file.id) is None})
        self._commit([], [*records, *(self._aside(name, problem) for name, problem in problems.items())])
        copies: dict[str, list[FileRecord]] = {}  # content -> the files that hold it
        for file in fresh:
            if file.id not in problems:
                copies.setdefault(str(file.digest), []).append(file)
        progress.advance(len(problems) + self._lend(copies))
        for done in self._embed(list(copies.values())):
            progress.advance(done)

    def remove_gone(self) -> None:
        """Remove the entries and records of files that are no longer there."""
        if not self.gone:
            return
        with self.index.transaction():
            self.removed += self.index.remove(self.claims.own(self.gone))
            self.records.forget(self.folder.root, self.gone)

    def report(self, seconds: float) -> SyncReport:
        """Return the counts."""
        return SyncReport(
            added=self.added,
            updated=self.updated,
            removed=self.removed,
            unchanged=self.unchanged,
            failed=dict(sorted(self.failed.items())),
            embedded=self.embedded,
            read=self.read,
            seconds=seconds,
        )

    def _live(self, name: str) -> FileRecord | None:
        known = self.known.get(name)
        return known if known and known.reason is None else None

    def _keep(self, known: FileRecord) -> None:
        if known.reason is None:
            self.unchanged += 1
        else:
            self.failed[self._shown(known.id)] = known.reason

    def _is_known(self, file: FileRecord) -> bool:
        """Tell whether a file was only touched: its content is the one that was recorded."""
        known = self.known.get(file.id)
        return known is not None and known.digest == file.digest and not (self.retry and known.reason)

    def _aside(self, name: str, reason: str) -> FileRecord:
        """Return the record of a file that could not be read; the next run looks at it again."""
        return FileRecord(self.folder.root, recorded(name), 0, 0, None, reason)

    def _lost(self, file: FileRecord, reason: str | None) -> list[FileRecord]:
        """Return the record of a file that could be looked at and not read; none, when it went away meanwhile."""
        if reason is not None:
            return [self._aside(file.id, reason)]
        if file.id in self.known:
            self.gone.add(file.id)
        return []

    def _lend(self, copies: dict[str, list[FileRecord]]) -> int:
        """Give files whose content the index holds already that content's vector; take them out of `copies`."""
        if not self.records.copies(copies):
            return 0
        # All vectors are fetched before any is replaced: of two files that swapped contents, each lends to the other.
        # In one transaction, so that no other process removes the lender in between.
        with self.index.transaction():
            vectors = {digest: self.index.get(name).vector for digest, name in self.records.copies(copies).items()}
            entries = [(file, vector) for digest, vector in vectors.items() for file in copies.pop(digest)]
            self._commit(entries, [])
        return len(entries)

    def _embed(self, groups: list[list[FileRecord]]) -> Iterator[int]:
        """Embed one file of each group of equal files and commit the group; yield how many files each batch settled."""
        while groups:
            again: list[list[FileRecord]] = []
            paths = [Path(self.folder.path(group[0].id)) for group in groups]
            for batch in self.model.stream(paths, batch_size=self.batch_size, workers=self.workers):
                entries, records, spoilt = list[tuple[FileRecord, FloatArray]](), list[FileRecord](), 0
                for position, result in _results(batch):
                    first, *others = group = groups[position]
                    # What the model met must be what was hashed. A failure is rare, and worth a closer look.
                    if not self.folder.still(first, thorough=isinstance(result, str)):
                        spoilt += 1
                        records += self._lost(first, None if self.folder.look(first.id) is None else _CHANGED)
                        again += [others] if others else []
                    elif isinstance(result, str):
                        records += [replace(file, reason=result) for file in group]
                    else:
                        entries += [(file, result) for file in group]
                        self.embedded += 1
                self._commit(entries, records)
                yield len(entries) + spoilt + sum(record.reason != _CHANGED for record in records)
            groups = again

    def _commit(self, entries: list[tuple[FileRecord, FloatArray]], records: list[FileRecord]) -> None:
        """In one transaction: add or replace entries, record files, and remove what is recorded as set aside."""
        self.failed |= {self._shown(record.id): record.reason for record in records if record.reason is not None}
        records = [record for record in records if self.known.get(record.id) != record]
        if not entries and not records:
            return
        with self.index.transaction():
            # Since they were looked at, others may have taken these ids, or removed them.
            own = self.claims.own([*(file.id for file, _ in entries), *(record.id for record in records)])
            problems = self.claims.problems({file.id: file.digest for file, _ in entries if file.id not in own})
            entries = [(file, vector) for file, vector in entries if file.id not in problems]
            files = [file for file, _ in entries]
            if files:
                known = self.index.catalog.find([file.id for file in files])
                metadata = [{**_annotations(known.get(file.id)), "path": self.folder.path(file.id)} for file in files]
                self.index.add([file.id for file in files], np.stack([vector for _, vector in entries]), metadata)
            records = [record for record in records if record.id in own or record.reason is not None]
            records += [self._aside(name, problem) for name, problem in problems.items()]
            self.index.remove([record.id for record in records if record.reason is not None and record.id in own])
            self.records.put([*files, *records])
        self.failed |= {self._shown(name): problem for name, problem in problems.items()}
        updated = sum(file.id in own for file in files)
        self.updated += updated
        self.added += len(files) - updated

    def _shown(self, name: str) -> str:
        return shown(self.folder.path(name.removeprefix(NO_ID)))


def _annotations(known: Item | None) -> dict[str, Any]:
    """Return what an entry that is replaced says beside its path."""
    metadata: dict[str, Any] = json.loads(known.metadata) if known else {}
    return metadata


def _results(batch: Batch) -> Iterator[tuple[int, FloatArray | str]]:
    """Yield what came of each image of a batch: its vector, or why it could not be read."""
    yield from zip(batch.positions.tolist(), batch.vectors, strict=True)
    yield from ((position, error.reason) for position, error in batch.failures)


def _slices(files: list[FileRecord], longest: int) -> Iterator[list[FileRecord]]:
    """Cut a list of files where a part has as many files, or bytes, as are hashed at a time."""
    part: list[FileRecord] = []
    size = 0
    for file in files:
        part.append(file)
        size += file.size
        if len(part) == longest or size >= _SLICE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _agree(index: Index, model: Model) -> None:
    """Raise unless index and model fit; record the model where none is."""
    fingerprint = model.fingerprint
    index.require_model(fingerprint)
    if model.dim != index.dim:
        raise ModelMismatchError(
            f"{index.path} holds vectors of {index.dim} numbers and this model makes {model.dim}; "
            "use the model it was built with, or build a new index"
        )
    if index.fingerprint is None:
        with index.transaction():
            index.catalog.set_meta("fingerprint", fingerprint)
