"""The draft of a migration: the new embeddings of an index, in an index of their own, until they replace the old ones.

It lies in the folder `migration` below the index and is made for one model. Each entry says of which entry it is the
successor: its mark is a digest of that entry's vector and metadata, so that a change of either shows.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vitembed.errors import ModelMismatchError, SearchIndexError
from vitembed.index.index import Index
from vitembed.index.inputs import Metadata
from vitembed.index.results import Records
from vitembed.index.vectors import FloatArray

FOLDER = "migration"

# A draft that is being deleted has such a name, so that a kill leaves no half of one under the real name.
_DELETED = ".deleted-migration-"


@dataclass(frozen=True)
class Entry:
    """An entry that is to be embedded again.

    Attributes:
        id: its id.
        path: of the image file that it came from, absolute; None where its metadata name none.
        metadata: all of it.
        mark: of its vector and metadata, see `Draft.marks`.
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


@dataclass(frozen=True)
class _Home:
    """An entry of the draft that came from a certain file."""

    id: str
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


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Draft:
    """An open draft; a context manager.

    Args:
        staged: the index of the new embeddings.

    Attributes:
        marks: id -> mark of the entry that it succeeds, for every entry of the draft.
    """

    def __init__(self, staged: Index) -> None:
        self._staged = staged
        self.marks: dict[str, str] = {}
        self._homes: dict[str, _Home] = {}
        for records in staged.stream():
            for name, metadata in zip(records.ids, records.metadata, strict=True):
                self._note(name, metadata["entry"].get("path"), metadata["mark"], metadata["content"])

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

    def __len__(self) -> int:
        return len(self.marks)

    def holds(self, entry: Entry) -> bool:
        """Tell whether the draft has the successor of this very entry."""
        return self.marks.get(entry.id) == entry.mark

    def known(self, entry: Entry, content: str | None) -> Embedded | None:
        """Return the embedding that the draft has for an entry's file already, under whatever id.

        Args:
            entry: an entry that the draft does not hold.
            content: digest of the file, where sync recorded one: another content needs another embedding.
        """
        home = self._homes.get(str(entry.path))
        before = self.marks.get(entry.id)
        if home is None or (before and before[:16] != entry.mark[:16]) or (content and content != home.content):
            return None
        return Embedded(self._staged.get(home.id).vector, home.content)

    def put(self, results: Sequence[tuple[Entry, Embedded]]) -> None:
        """Add or replace the successors of entries, all of them or none."""
        if not results:
            return
        metadata = [
            {"entry": entry.metadata, "mark": entry.mark, "content": result.content} for entry, result in results
        ]
        vectors = np.stack([result.vector for _, result in results])
        self._staged.add([entry.id for entry, _ in results], vectors, metadata)
        for entry, result in results:
            self._note(entry.id, entry.path, entry.mark, result.content)

    def keep(self, ids: set[str]) -> None:
        """Remove the successors of all entries but these."""
        gone = [name for name in self.marks if name not in ids]
        if gone:
            self._staged.remove(gone)
            for name in gone:
                del self.marks[name]
            self._homes = {path: home for path, home in self._homes.items() if home.id in self.marks}

    def records(self) -> Iterator[Records]:
        """Yield the new entries in batches, with the metadata of the old ones."""
        for records in self._staged.stream():
            yield Records(records.ids, records.vectors, [metadata["entry"] for metadata in records.metadata])

    def contents(self) -> Iterator[dict[str, str | None]]:
        """Yield, in batches, id -> digest of the content that was embedded, where it is the one that sync recorded."""
        for records in self._staged.stream():
            found = zip(records.ids, records.metadata, strict=True)
            yield {name: metadata["content"] for name, metadata in found}

    def nearest(self, ids: Sequence[str], k: int) -> list[list[str]]:
        """Return the ids of the k entries most alike to each of these, without itself."""
        return nearest(self._staged, ids, k)

    def _note(self, name: str, path: str | None, mark: str, content: str | None) -> None:
        self.marks[name] = mark
        if path is not None:
            self._homes[path] = _Home(name, content)


def nearest(index: Index, ids: Sequence[str], k: int) -> list[list[str]]:
    """Return the ids of the k entries of an index most alike to each of these, without itself.

    Raises:
        DataError: an id is not in the index.
    """
    if not ids:
        return []
    vectors = np.stack([index.get(name).vector for name in ids])
    found = index.search(vectors, k + 1, recall=1.0)
    return [[hit.id for hit in hits if hit.id != name][:k] for name, hits in zip(ids, found, strict=True)]


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
