"""`migrate`: the entries of an index, embedded again with another model.

The new embeddings grow in a draft (see `vitembed.index.draft`), a batch a commit, so that a killed migration loses the
batch that was being embedded and goes on from there. Until the end everybody searches the old embeddings. Then draft
and index are compared once more, for others may have added, removed or changed entries, and if the index is still the
one that was compared, the draft replaces its entries in one transaction.

What the catalog says of synced files stays true: where a file no longer holds what it held when it was synced, its
record is reset, so that the next `sync` reads it again.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from vitembed.errors import ConfigError, DataError, unknown_name
from vitembed.index.draft import Draft, Embedded, Entry, discard, discard_finished, entries_of, nearest
from vitembed.index.files import FileRecord
from vitembed.index.folder import Folder
from vitembed.index.index import Index
from vitembed.index.lock import alone
from vitembed.index.model import Model
from vitembed.index.progress import Progress
from vitembed.index.reading import RewrittenError

Missing = Literal["stop", "drop"]

_T = TypeVar("_T")

# Of the neighbour overlap: how many neighbours, of how many entries, and how many of those are searched at a time.
NEIGHBOURS = 10
_SAMPLE = 1_000
_TOGETHER = 100

# How often what others changed meanwhile is compared and embedded without the write lock before it is under it.
_ROUNDS = 3

_SHOWN = 3


@dataclass(frozen=True)
class MigrationReport:
    """What `migrate` did.

    Attributes:
        entries: that the index holds now, embedded with the new model.
        embedded: files that were embedded by this call; fewer than the entries where some share a file or an earlier,
            interrupted call embedded them.
        failed: files that could not be read, and why: path -> reason; their entries are gone.
        overlap: share, in [0, 1], of the 10 nearest neighbours of an entry that are its neighbours with the new model,
            too: the mean of up to 1,000 entries drawn with a fixed seed; None where there are fewer than two entries.
        seconds: that it took.
    """

    entries: int = 0
    embedded: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    overlap: float | None = None
    seconds: float = field(default=0.0, compare=False)


class UnreadableFilesError(DataError):
    """A migration has embedded what it could, and stopped before the swap because files cannot be read.

    Attributes:
        failed: path -> reason.
    """

    def __init__(self, failed: dict[str, str]) -> None:
        shown = "; ".join(f"{path}: {reason}" for path, reason in list(failed.items())[:_SHOWN])
        more = f"; and {len(failed) - _SHOWN:,} more" if len(failed) > _SHOWN else ""
        super().__init__(
            f"the index was not changed: {len(failed):,} of its files cannot be read ({shown}{more}); bring them back "
            "and call again, which goes on from here, or drop their entries with missing='drop' (--missing drop)"
        )
        self.failed = failed


def migrate(
    index: Index,
    model: Model,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
    missing: Missing = "stop",
    location: str | None = None,
    restart: bool = False,
) -> MigrationReport:
    """Embed all entries of an index again, with another model, from the files that their metadata name as "path".

    It may be stopped or killed at any time and called again. Entries keep ids, metadata and order; the width of the
    vectors becomes the new model's. A file that several entries name is embedded once.

    While the entries are replaced, at the very end, nobody else can write: for about 25 microseconds an entry of 384
    numbers, so that from some 200,000 entries on a writer may wait in vain and get an error. Searches go on.

    Args:
        index: the index; until the end it holds the old embeddings.
        model: the new model.
        batch_size: images embedded, and committed, together.
        workers: threads that decode images, see `Embedder.stream`.
        progress: show how far it is on standard error.
        missing: what to do when files cannot be read: "stop" before anything is changed, or "drop" their entries.
        location: where the new model is kept, a note for whoever opens the index.
        restart: drop what an earlier, unfinished migration has embedded, instead of going on from there.

    Raises:
        ConfigError: a setting is out of range, or the index holds embeddings of this model already.
        DataError: entries name no file by an absolute path.
        UnreadableFilesError: files cannot be read, and `missing` is "stop".
        ModelMismatchError: an unfinished migration to another model is in the way.
        SearchIndexError: another process writes to the index, synchronises or migrates it.
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
    if missing not in ("stop", "drop"):
        raise unknown_name("missing", missing, ("stop", "drop"))
    fingerprint = model.fingerprint
    with alone(index.path):
        discard_finished(index)
        if index.fingerprint == fingerprint:
            raise ConfigError(f"{index.path} holds embeddings of this model already ({fingerprint}); name another one")
        _require_paths(index)
        with Draft.open(index, model.dim, fingerprint, restart) as draft:
            run = _Run(index, model, draft, batch_size, workers, missing)
            with Progress("migrate", run.compare().missing, progress) as bar:
                found = run.complete(bar)
                overlap = _overlap(index, draft)
                for _ in range(_ROUNDS):
                    if run.swap(found, fingerprint, location):
                        break
                    found = run.complete(bar)
                else:
                    with index.transaction():
                        done = run.swap(run.complete(bar), fingerprint, location)
                        assert done
        discard(index.path)
    return MigrationReport(len(index), run.embedded, run.failed, overlap, time.perf_counter() - started)


@dataclass(frozen=True)
class _Comparison:
    """What a comparison of draft and index found.

    Attributes:
        state: the state of the index, as `Catalog.state` has it.
        missing: how many entries are still to be embedded.
        lost: entries whose files could not be read.
    """

    state: tuple[int, str]
    missing: int
    lost: list[Entry]


class _Run:
    """One call of `migrate`: what it has embedded, and what it could not."""

    def __init__(
        self, index: Index, model: Model, draft: Draft, batch_size: int, workers: int | None, missing: Missing
    ) -> None:
        self.index, self.model, self.draft = index, model, draft
        self.batch_size, self.workers, self.policy = batch_size, workers, missing
        self.embedded = 0
        self.failed: dict[str, str] = {}  # path -> reason, of the entries that were dropped
        self._lost: dict[str, str] = {}  # id -> mark of the entry whose file could not be read
        self._reasons: dict[str, str] = {}  # path -> reason

    def compare(self) -> _Comparison:
        """Compare the draft with the index, and take out of the draft what is gone from the index."""
        return _again(self._compare)

    def complete(self, bar: Progress) -> _Comparison:
        """Embed what the draft does not hold, and compare.

        Raises:
            UnreadableFilesError: files of entries cannot be read, and these may not be dropped.
        """
        _again(lambda: self._embed_rest(bar))
        found = self.compare()
        if found.lost and self.policy == "stop":
            raise UnreadableFilesError(self._failures(found.lost))
        return found

    def swap(self, found: _Comparison, fingerprint: str, location: str | None) -> bool:
        """Put the draft in the place of the entries, if it was found complete and nothing has changed since then.

        Returns:
            Whether it was done.
        """
        if found.missing:
            return False
        self.draft.remove(entry.id for entry in found.lost)  # successors of what had their ids before
        files = [*self._changed_files(), *self._lost_files(found.lost)]
        with self.index.transaction():
            generation, name = self.index.catalog.state()
            if (generation - 1, name) != found.state:  # this change has a generation of its own
                return False
            self.index.rewrite(self.draft.records(), dim=self.model.dim, fingerprint=fingerprint, location=location)
            self.index.catalog.file_records.put(files)
        self.failed = self._failures(found.lost)
        return True

    def _compare(self) -> _Comparison:
        state = self.index.catalog.state()
        self.draft.prune(self.index)
        missing, lost = 0, list[Entry]()
        for records in self.index.stream():
            absent = self.draft.missing(entries_of(records))
            failed = [entry for entry in absent if self._is_lost(entry)]
            missing += len(absent) - len(failed)
            lost += failed
        return _Comparison(state, missing, lost)

    def _embed_rest(self, bar: Progress) -> None:
        for records in self.index.stream():
            todo = [entry for entry in self.draft.missing(entries_of(records)) if not self._is_lost(entry)]
            pathless = [entry.id for entry in todo if entry.path is None]
            if pathless:
                raise _no_path(pathless)
            if todo:
                self._embed(todo, bar)

    def _is_lost(self, entry: Entry) -> bool:
        return self._lost.get(entry.id) == entry.mark

    def _failures(self, lost: Sequence[Entry]) -> dict[str, str]:
        return {path: self._reasons[path] for path in sorted({str(entry.path) for entry in lost})}

    def _embed(self, entries: Sequence[Entry], bar: Progress) -> None:
        """Embed the files of entries, each once, and put the entries into the draft, in their order."""
        files = self.index.catalog.file_records.owners([entry.id for entry in entries])
        known = self.draft.known(entries, {name: file.digest for name, file in files.items()})
        results: dict[str, Embedded | str] = {**known}  # path -> what came of it
        synced = {str(entry.path): files[entry.id] for entry in entries if entry.id in files}
        done = self._put(entries, results)
        bar.advance(done)
        paths = list(dict.fromkeys(str(entry.path) for entry in entries if str(entry.path) not in known))
        for batch in self.model.stream(
            [Path(path) for path in paths], batch_size=self.batch_size, workers=self.workers
        ):
            for position, vector in zip(batch.positions.tolist(), batch.vectors, strict=True):
                path = paths[position]
                results[path] = Embedded(vector, _content(path, synced.get(path)))
            for position, error in batch.failures:
                results[paths[position]] = self._reasons[paths[position]] = error.reason
            self.embedded += len(batch.positions)
            more = self._put(entries[done:], results)
            bar.advance(more)
            done += more

    def _put(self, entries: Sequence[Entry], results: Mapping[str, Embedded | str]) -> int:
        """Put entries into the draft up to the first whose file was not met yet; return how many that are."""
        ready = list(itertools.takewhile(lambda entry: entry.path in results, entries))
        found = [(entry, results[str(entry.path)]) for entry in ready]
        self.draft.put([(entry, result) for entry, result in found if isinstance(result, Embedded)])
        self._lost |= {entry.id: entry.mark for entry, result in found if isinstance(result, str)}
        return len(ready)

    def _changed_files(self) -> Iterator[FileRecord]:
        """Yield new records of the files that hold something else than when they were synced: to be read again."""
        for contents in self.draft.contents():
            for name, file in self.index.catalog.file_records.owners(contents).items():
                if file.digest != contents[name]:
                    yield replace(file, changed_ns=0, digest=None)

    def _lost_files(self, entries: Sequence[Entry]) -> Iterator[FileRecord]:
        """Yield the records that set the files of dropped entries aside, whether they were synced or not."""
        files = self.index.catalog.file_records.owners([entry.id for entry in entries])
        for entry in entries:
            path = Path(str(entry.path))
            file = files.get(entry.id) or FileRecord(str(path.parent.resolve()), path.name, 0, 0, None)
            yield replace(file, changed_ns=0, digest=None, reason=self._reasons[str(entry.path)])


def _again(job: Callable[[], _T]) -> _T:
    """Call what reads the index from end to end until nobody compacts it meanwhile."""
    while True:
        try:
            return job()
        except RewrittenError:
            continue


def _content(path: str, file: FileRecord | None) -> str | None:
    """Return the recorded digest of a file that was just embedded, if that is still what it holds."""
    if file is None or file.digest is None:
        return None
    folder = Folder(file.root)
    same = folder.path(file.id) == path and (folder.still(file) or folder.still(file, thorough=True))
    return file.digest if same else None


def _require_paths(index: Index) -> None:
    """Raise when entries name no file, before anything is embedded."""

    def pathless_entries() -> list[str]:
        return [entry.id for records in index.stream() for entry in entries_of(records) if entry.path is None]

    pathless = _again(pathless_entries)
    if pathless:
        raise _no_path(pathless)


def _no_path(names: Sequence[str]) -> DataError:
    shown = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    return DataError(
        f'a migration embeds the files that the metadata name as an absolute "path"; {len(names):,} entries have none '
        f"({shown}); remove them, or add them again with {{'path': ...}}"
    )


def _overlap(index: Index, draft: Draft) -> float | None:
    """Return the mean share of nearest neighbours that stay, see `MigrationReport.overlap`."""
    sample = draft.sample(_SAMPLE)
    shares = []
    for start in range(0, len(sample), _TOGETHER):
        part = sample[start : start + _TOGETHER]
        before, after = nearest(index, part, NEIGHBOURS), draft.nearest(part, NEIGHBOURS)
        shares += [len({*old} & {*after[name]}) / len(old) for name, old in before.items() if old]
    return float(np.mean(shares)) if shares else None
