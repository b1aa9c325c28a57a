"""The draft of a migration: the new embeddings of an index, in an index of their own, until they replace the old ones.

It lies in the folder `migration` below the index and is made for one model. Each entry says of which entry it is the
successor: its mark is a digest of that entry's vector and metadata, so that a change of either shows. Which of its
entries came from which image file stands in its catalog's table of files, by a digest of the path: at most one entry of
each. So it is asked for a batch of entries at a time, and keeps nothing of them in memory.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from vitembed.errors import DataError, ModelMismatchError, SearchIndexError
from vitembed.index.catalog import Item
from vitembed.index.files import FileRecord
from vitembed.index.index import Index
from vitembed.index.inputs import Metadata
from vitembed.index.results import Records
from vitembed.index.vectors import FloatArray

FOLDER = "migration"

# A draft that is being deleted has such a name, so that a kill leaves no half of one under the real name.
_DELETED = ".deleted-migration-"

# Rows of the draft looked at together.
_PAGE = 4_096

# The "folder" of the records in the draft's table of files.
_HOMES = "migration"


@dataclass(frozen=True)
class Entry:
    """An entry that is to be embedded again.

    Attributes:
        id: its id.
        path: of the image file that it came from, absolute; None where its metadata name none.
        metadata: all of it.
        mark: of its vector (the first half) and metadata.
    """

    id: str
    path: str | None
    metadata: Metadata
    mark: str


@dataclass(frozen=True)
class Embedded:
    """What came of a file: its embedding (dim,), and the digest of its content where that is the one sync recorded."""

    vector: FloatArray
    content: str | None


class _Note(NamedTuple):
    """What the draft says of one of its entries: the mark of its predecessor, and the content as in `Embedded`."""

    mark: str
    content: str | None


def entries_of(records: Records) -> list[Entry]:
    """Return the entries of a batch of an index, with their marks."""
    entries = []
    for name, vector, metadata in zip(records.ids, records.vectors, records.metadata, strict=True):
        path = metadata.get("path")
        usable = isinstance(path, str) and Path(path).is_absolute()
        text = json.dumps(metadata, sort_keys=True).encode()
        # Two halves: the first tells whether the picture may be another one, the second whether anything is.
        mark = _digest(vector.tobytes()) + _digest(text)
        entries.append(Entry(name, path if usable else None, metadata, mark))
    return entries


def _digest(data: bytes, size: int = 8) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def _path_digest(entry: Entry) -> str:
    return _digest(str(entry.path).encode("utf-8", "surrogatepass"), 16)


def _noted(item: Item) -> _Note:
    metadata = json.loads(item.metadata)
    return _Note(metadata["mark"], metadata["content"])


class Draft:
    """An open draft; a context manager.

    Args:
        staged: the index of the new embeddings.
    """

    def __init__(self, staged: Index) -> None:
        self._staged = staged
        self._homes = staged.catalog.file_records

    @classmethod
    def open(cls, index: Index, dim: int, fingerprint: str, restart: bool = False) -> Self:
        """Open the draft of an index, or begin one.

        Args:
            index: that is to be migrated.
            dim: width of the new embeddings.
            fingerprint: of the new model.
            restart: drop what an unfinished migration left, to whatever model.

        Raises:
            ModelMismatchError: there is an unfinished draft for another model.
            SearchIndexError: there is one that cannot be read, or the folder cannot be written.
        """
        place = index.path / FOLDER
        if restart:
            discard(index.path)
        if not place.exists():
            return cls(Index.create(place, dim, fingerprint, dtype=index.dtype))
        try:
            staged = Index.open(place)
        except SearchIndexError as error:
            raise SearchIndexError(f"{error}; or drop this unfinished migration with restart (--restart)") from error
        try:
            if staged.fingerprint != fingerprint:
                raise ModelMismatchError(
                    f"{place} is an unfinished migration to another model, {staged.fingerprint}; "
                    "finish that one, or drop it with restart (--restart)"
                )
            return cls(staged)
        except BaseException:
            staged.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._staged.close()

    def missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return those of these entries whose successors the draft does not have."""
        notes = self._notes(entry.id for entry in entries)
        return [entry for entry in entries if entry.id not in notes or notes[entry.id].mark != entry.mark]

    def known(self, entries: Sequence[Entry], contents: Mapping[str, str | None]) -> dict[str, Embedded]:
        """Return the embeddings that the draft has for the files of entries already, under whatever id, by path.

        Args:
            entries: entries that the draft does not hold.
            contents: id -> digest of the file, where sync recorded one: another content needs another embedding.
        """
        homes = self._homes.copies(map(_path_digest, entries))
        notes = self._notes([*homes.values(), *(entry.id for entry in entries)])
        found: dict[str, str] = {}  # path -> id
        changed = set()
        for entry in entries:
            home, before, content = homes.get(_path_digest(entry)), notes.get(entry.id), contents.get(entry.id)
            if home is None:
                continue
            found[str(entry.path)] = home
            if (before and before.mark[:16] != entry.mark[:16]) or (content and content != notes[home].content):
                changed.add(str(entry.path))
        usable = {path: home for path, home in found.items() if path not in changed}
        return {path: Embedded(self._staged.get(home).vector, notes[home].content) for path, home in usable.items()}

    def put(self, results: Sequence[tuple[Entry, Embedded]]) -> None:
        """Add or replace the successors of entries, all of them or none."""
        if not results:
            return
        metadata = [
            {"entry": entry.metadata, "mark": entry.mark, "content": result.content} for entry, result in results
        ]
        vectors = np.stack([result.vector for _, result in results])
        homes = {_path_digest(entry): entry.id for entry, _ in results}
        with self._staged.transaction():
            self._staged.add([entry.id for entry, _ in results], vectors, metadata)
            self._homes.forget(_HOMES, self._homes.copies(homes).values())
            self._homes.put(FileRecord(_HOMES, name, 0, 0, digest) for digest, name in homes.items())

    def remove(self, ids: Iterable[str]) -> None:
        """Remove the successors of entries, where there are any."""
        self._staged.remove(ids, missing_ok=True)

    def prune(self, index: Index) -> None:
        """Remove the successors of entries that are gone from the index."""
        gone = list[str]()
        for page in self._pages():
            names = [item.id for item in page]
            present = index.catalog.find(names)
            gone += [name for name in names if name not in present]
        if gone:
            self.remove(gone)

    def records(self) -> Iterator[Records]:
        """Yield the new entries in batches, with the metadata of the old ones."""
        for records in self._staged.stream():
            yield Records(records.ids, records.vectors, [metadata["entry"] for metadata in records.metadata])

    def contents(self) -> Iterator[dict[str, str | None]]:
        """Yield, in batches, id -> digest of the content that was embedded, where it is the one that sync recorded."""
        for page in self._pages():
            yield {item.id: _noted(item).content for item in page}

    def sample(self, count: int) -> list[str]:
        """Return the ids of so many entries, or all, drawn with a fixed seed, in order."""
        drawn = np.sort(np.random.default_rng(0).permutation(len(self._staged))[:count])
        names, start = list[str](), 0
        for page in self._pages():
            names += [page[place - start].id for place in drawn.tolist() if start <= place < start + len(page)]
            start += len(page)
        return names

    def nearest(self, ids: Sequence[str], k: int) -> dict[str, list[str]]:
        """Return, for each of these ids, those of the k entries most alike to it, without itself."""
        return nearest(self._staged, ids, k)

    def _notes(self, ids: Iterable[str]) -> dict[str, _Note]:
        return {name: _noted(item) for name, item in self._staged.catalog.find(ids).items()}

    def _pages(self) -> Iterator[list[Item]]:
        catalog = self._staged.catalog
        for start in range(0, catalog.last_block().stop, _PAGE):
            yield catalog.items_between(start, start + _PAGE)


def nearest(index: Index, ids: Sequence[str], k: int) -> dict[str, list[str]]:
    """Return, for each of these ids that an index has, those of the k entries most alike to it, without itself."""
    vectors = {}
    for name in ids:
        with suppress(DataError):  # others may have removed it
            vectors[name] = index.get(name).vector
    if not vectors:
        return {}
    found = index.search(np.stack(list(vectors.values())), k + 1, recall=1.0)
    return {name: [hit.id for hit in hits if hit.id != name][:k] for name, hits in zip(vectors, found, strict=True)}


def discard(path: Path) -> None:
    """Delete the draft of an index, and what a killed deletion left of one.

    Raises:
        SearchIndexError: the folder cannot be written.
    """
    place = path / FOLDER
    try:
        if place.exists():
            place.rename(path / f"{_DELETED}{secrets.token_hex(4)}")
        for leftover in [*path.glob(f"{_DELETED}*"), *path.glob(f".{FOLDER}-*")]:
            shutil.rmtree(leftover)
    except OSError as error:
        raise SearchIndexError(f"{place}: cannot delete ({error.strerror}); check its permissions") from error


def discard_finished(index: Index) -> None:
    """Delete a draft that has replaced the entries already: its migration was killed just before this.

    Raises:
        SearchIndexError: the folder cannot be written.
    """
    place, finished = index.path / FOLDER, False
    with suppress(SearchIndexError), Index.open(place) as staged:  # what cannot be opened is the next one's to report
        finished = staged.fingerprint is not None and staged.fingerprint == index.fingerprint
    if finished:
        discard(index.path)
