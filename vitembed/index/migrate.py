"""`migrate`: the entries of an index, embedded again with another model.

The new embeddings grow in a draft (see `vitembed.index.draft`), a batch a commit, so that a killed migration loses the
batch that was being embedded and goes on from there. Until the end everybody searches the old embeddings. Then, under
the write lock, draft and index are compared once more, for others may have added, removed or changed entries, and the
draft replaces the entries in one transaction.

What the catalog says of synced files stays true: where a file no longer holds what it held when it was synced, its
record is reset, so that the next `sync` reads it again.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vitembed.errors import ConfigError, DataError, unknown_name
from vitembed.index.draft import Draft, Embedded, Entry, discard, discard_finished, entries_of, nearest
from vitembed.index.files import FileRecord
from vitembed.index.folder import Folder
from vitembed.index.index import Index
from vitembed.index.lock import alone
from vitembed.index.model import Model
from vitembed.index.progress import Progress

Missing = Literal["stop", "drop"]

# Of the neighbour overlap: how many neighbours, of how many entries, and how many of those are searched at a time.
NEIGHBOURS = 10
_SAMPLE = 1_000
_TOGETHER = 100

# How often what others changed meanwhile is embedded without the write lock before it is done under it.
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
            run = _Run(index, model, draft, batch_size, workers)
            with Progress("migrate", run.compare(), progress) as bar:
                run.embed_rest(bar)
                run.require_files(missing)
                overlap = _overlap(index, draft)
                for number in range(_ROUNDS + 1):
                    if run.swap(bar, missing, fingerprint, location, last=number == _ROUNDS):
                        break
                    run.embed_rest(bar)
        discard(index.path)
    return MigrationReport(len(index), run.embedded, run.failed, overlap, time.perf_counter() - started)


class _Run:
    """One call of `migrate`: what it has embedded, and what it could not."""

    def __init__(self, index: Index, model: Model, draft: Draft, batch_size: int, workers: int | None) -> None:
        self.index, self.model, self.draft = index, model, draft
        self.batch_size, self.workers = batch_size, workers
        self.embedded = 0
        self.failed: dict[str, str] = {}  # path -> reason
        self._lost: dict[str, Entry] = {}  # id -> the entry whose file could not be read

    def compare(self) -> int:
        """Take out of the draft what is gone from the index; return how many entries it does not hold yet."""
        present, missing = set(), 0
        for records in self.index.stream():
            for entry in entries_of(records):
                present.add(entry.id)
                missing += not self.draft.holds(entry)
        self.draft.keep(present)
        return missing

    def embed_rest(self, bar: Progress) -> None:
        """Embed what the draft does not hold."""
        for records in self.index.stream():
            self._embed(self._missing(entries_of(records)), bar)

    def require_files(self, missing: Missing) -> None:
        """Raise when files could not be read and their entries may not be dropped."""
        if self.failed and missing == "stop":
            raise UnreadableFilesError(dict(sorted(self.failed.items())))

    def swap(self, bar: Progress, missing: Missing, fingerprint: str, location: str | None, last: bool) -> bool:
        """Put the draft in the place of the entries, if it holds all of them, or all but a few.

        Returns:
            Whether it was done; otherwise much was changed meanwhile, which is better embedded without the write lock.
        """
        with self.index.transaction():
            todo, held, lost = list[Entry](), set[str](), list[Entry]()
            for records in self.index.stream():
                entries = entries_of(records)
                todo += self._missing(entries)
                held |= {entry.id for entry in entries if self.draft.holds(entry)}
                lost += [entry for entry in entries if self._is_lost(entry)]
            if len(todo) > self.batch_size and not last:
                return False
            self._embed(todo, bar)
            self.require_files(missing)
            lost += [entry for entry in todo if self._is_lost(entry)]
            self.draft.keep(held | {entry.id for entry in todo if self.draft.holds(entry)})
            files = [*self._changed_files(), *self._lost_files(lost)]
            self.index.rewrite(self.draft.records(), dim=self.model.dim, fingerprint=fingerprint, location=location)
            self.index.catalog.file_records.put(files)
        return True

    def _missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return those entries that are to be embedded.

        Raises:
            DataError: one of them names no file.
        """
        found = [entry for entry in entries if not self.draft.holds(entry) and not self._is_lost(entry)]
        pathless = [entry.id for entry in found if entry.path is None]
        if pathless:
            raise _no_path(pathless)
        return found

    def _is_lost(self, entry: Entry) -> bool:
        return self._lost.get(entry.id) == entry

    def _embed(self, entries: Sequence[Entry], bar: Progress) -> None:
        """Embed the files of entries, each once, and put the entries into the draft, in their order."""
        files = self.index.catalog.file_records.owners([entry.id for entry in entries])
        results: dict[str, Embedded | str] = {}  # path -> what came of it
        wanted: dict[str, None] = {}
        for entry in entries:
            known = self.draft.known(entry, files[entry.id].digest if entry.id in files else None)
            if known:
                results[str(entry.path)] = known
            else:
                wanted[str(entry.path)] = None
        results = {path: result for path, result in results.items() if path not in wanted}
        synced = {str(entry.path): files[entry.id] for entry in entries if entry.id in files}
        done = self._put(entries, results)
        bar.advance(done)
        paths = list(wanted)
        for batch in self.model.stream(
            [Path(path) for path in paths], batch_size=self.batch_size, workers=self.workers
        ):
            for position, vector in zip(batch.positions.tolist(), batch.vectors, strict=True):
                path = paths[position]
                results[path] = Embedded(vector, _content(path, synced.get(path)))
            for position, error in batch.failures:
                results[paths[position]] = self.failed[paths[position]] = error.reason
            self.embedded += len(batch.positions)
            more = self._put(entries[done:], results)
            bar.advance(more)
            done += more

    def _put(self, entries: Sequence[Entry], results: Mapping[str, Embedded | str]) -> int:
        """Put entries into the draft up to the first whose file was not met yet; return how many that are."""
        ready = list(itertools.takewhile(lambda entry: entry.path in results, entries))
        found = [(entry, results[str(entry.path)]) for entry in ready]
        self.draft.put([(entry, result) for entry, result in found if isinstance(result, Embedded)])
        self._lost |= {entry.id: entry for entry, result in found if isinstance(result, str)}
        return len(ready)

    def _changed_files(self) -> Iterator[FileRecord]:
        """Yield new records of the files that hold something else than when they were synced: to be read again."""
        for contents in self.draft.contents():
            for name, file in self.index.catalog.file_records.owners(contents).items():
                if file.digest != contents[name]:
                    yield replace(file, mtime_ns=0, digest=None)

    def _lost_files(self, entries: Sequence[Entry]) -> Iterator[FileRecord]:
        """Yield the records that set the files of dropped entries aside, whether they were synced or not."""
        files = self.index.catalog.file_records.owners([entry.id for entry in entries])
        for entry in entries:
            path = Path(str(entry.path))
            file = files.get(entry.id) or FileRecord(str(path.parent), path.name, 0, 0, None)
            yield replace(file, mtime_ns=0, digest=None, reason=self.failed[str(entry.path)])


def _content(path: str, file: FileRecord | None) -> str | None:
    """Return the recorded digest of a file that was just embedded, if that is still what it holds."""
    if file is None or file.digest is None:
        return None
    folder = Folder(file.root)
    same = folder.path(file.id) == path and (folder.still(file) or folder.still(file, thorough=True))
    return file.digest if same else None


def _require_paths(index: Index) -> None:
    """Raise when entries name no file, before anything is embedded."""
    pathless = [entry.id for records in index.stream() for entry in entries_of(records) if entry.path is None]
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
    names = list(draft.marks)
    drawn = np.random.default_rng(0).permutation(len(names))[:_SAMPLE]
    sample = [names[position] for position in np.sort(drawn).tolist()]
    shares = []
    for start in range(0, len(sample), _TOGETHER):
        part = [name for name in sample[start : start + _TOGETHER] if name in index]
        before, after = nearest(index, part, NEIGHBOURS), draft.nearest(part, NEIGHBOURS)
        pairs = zip(before, after, strict=True)
        shares += [len({*old} & {*new}) / len(old) for old, new in pairs if old]
    return float(np.mean(shares)) if shares else None
