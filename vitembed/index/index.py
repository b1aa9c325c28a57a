"""`Index`: string ids, vectors and metadata that are added, replaced, removed, searched and checked.

An index is a directory: `catalog.sqlite` is the truth (see `vitembed.index.catalog`), `vectors.f32` holds the numbers
(see `vitembed.index.vectors`), FAISS scores them (see `vitembed.index.ann`). What this module owns is the order of
things:

- Vectors are on the disk before the transaction that makes them part of the index commits; a kill in between leaves
  rows that nobody looks at.
- A search, from the list of live rows to the metadata of its hits, sees one committed state.
- A block of vectors is compared with its checksum before this process first uses it.
"""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from vitembed.errors import ConfigError, DataError, ModelMismatchError, SearchIndexError, VectorError
from vitembed.index import ann
from vitembed.index.blocks import Block, BoolArray, LiveRows, extended
from vitembed.index.catalog import NAME, Catalog, Item
from vitembed.index.inputs import Metadata, MetadataValue, checked_ids, checked_metadata, checked_vectors, checked_where
from vitembed.index.results import Hit, Record, Records
from vitembed.index.vectors import VectorFile, sync_folder

_MAX_DIM = 65_536


class Index:
    """A searchable collection of unit vectors under string ids, in a directory.

    There is no `save`: every change is committed, durably, when the call that makes it returns, and other processes
    that have the index open see it at once. Any number of processes may read while one writes; a second writer waits a
    few seconds and then gets an error. Threads may share an index; their calls take turns.

    Make one with `Index.create` or `Index.open`, and close it, or use it as a context manager:

        with Index.create("photos.index", dim=384) as index:
            index.add(["a.jpg"], vectors, metadata=[{"category": "shoe"}])
            hits = index.search(queries, k=10)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._closed = False
        if not self.path.is_dir():
            raise SearchIndexError(f"{self.path} is not an index: there is no such folder; use Index.create")
        self.catalog = Catalog(self.path / NAME)  # for the other modules of this package
        self._vectors = VectorFile(self.path / self.catalog.vectors, self.catalog.dim)
        self._live = LiveRows(self._vectors)
        try:
            with self._snapshot():
                pass
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], dim: int, fingerprint: str | None = None, location: str | None = None
    ) -> Self:
        """Make an empty index and open it.

        Args:
            path: the directory to make; it must be missing or empty, and the folder around it must exist.
            dim: the width of the vectors, from 1 to 65,536.
            fingerprint: of the model that makes the vectors; None when it is not known (yet).
            location: where that model is kept (a folder or a name), a note for whoever opens the index.

        Raises:
            ConfigError: `dim` is out of range.
            SearchIndexError: there is something at `path` already, or it cannot be written.
        """
        target = Path(path)
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= _MAX_DIM:
            raise ConfigError(f"dim must be a whole number from 1 to {_MAX_DIM:,}; got {dim!r}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            what = "is an index already; open it" if (target / NAME).exists() else "exists and is not empty"
            raise SearchIndexError(f"cannot create an index: {target} {what}, or choose another name")
        # Made beside its final place and then renamed, so that a kill leaves no half-made index under the name.
        draft = target.absolute().with_name(f".{target.absolute().name}-{secrets.token_hex(4)}")
        try:
            draft.mkdir()
            (draft / "vectors.f32").touch()
            meta = {"dim": str(dim), "fingerprint": fingerprint, "location": location, "vectors": "vectors.f32"}
            Catalog.create(draft / NAME, meta)
            if target.exists():
                target.rmdir()
            draft.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise SearchIndexError(f"cannot create an index at {target}: {error.strerror}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(target)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an index for reading and writing.

        Raises:
            SearchIndexError: it is missing, damaged or of a newer format.
        """
        return cls(path)

    def close(self) -> None:
        """Close the index; closing twice does nothing."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._vectors.close()
                self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} vectors of {self.dim}"
        return f"Index({str(self.path)!r}, {state})"

    # What is in it

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.catalog.dim

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the model that made the vectors; None when it was never recorded."""
        with self._open():
            return self.catalog.meta("fingerprint")

    @property
    def location(self) -> str | None:
        """Where the model that made the vectors is kept; None when it was never recorded."""
        with self._open():
            return self.catalog.meta("location")

    def __len__(self) -> int:
        with self._open():
            return self.catalog.live()

    def __contains__(self, name: object) -> bool:
        with self._open():
            return isinstance(name, str) and name in self.catalog.find([name])

    def ids(self) -> list[str]:
        """Return all ids, in the order in which they were last added."""
        with self._open(), self.catalog.reading():
            return self.catalog.ids()

    def get(self, name: str) -> Record:
        """Return the entry of an id.

        Raises:
            DataError: the id is not in the index.
            SearchIndexError: the entry or its block of vectors is damaged.
        """
        with self._snapshot() as live:
            item = self.catalog.find(checked_ids([name])).get(name)
            if item is None:
                raise _unknown([name])
            only = np.arange(len(live.mask)) == item.row
            return Record(item.id, live.verified(only)[item.row].copy(), json.loads(item.metadata))

    def stream(self, size: int = 4_096) -> Iterator[Records]:
        """Yield all entries in batches, in the order in which they were last added.

        What is added after the first batch does not come; what is removed before its batch does not either. An id comes
        at most once.

        Args:
            size: rows looked at for one batch, at least 1; removed ones count, so that batches may be smaller.

        Raises:
            SearchIndexError: what had to be read is damaged.
        """
        if size < 1:
            raise ConfigError(f"size must be at least 1; got {size}")
        with self._snapshot() as live:
            stop = len(live.mask)
        for start in range(0, stop, size):
            with self._snapshot() as live:
                rows = np.flatnonzero(live.mask[start : min(start + size, stop)]) + start
                only = np.zeros_like(live.mask)
                only[rows] = True
                items = self.catalog.items(rows.tolist())
                batch = Records(
                    [item.id for item in items],
                    live.verified(only)[rows],
                    [json.loads(item.metadata) for item in items],
                )
            if len(batch):
                yield batch

    def require_model(self, fingerprint: str) -> None:
        """Raise unless the vectors were made by the model with this fingerprint, or by one that was never recorded.

        Raises:
            ModelMismatchError: they were made by another model.
        """
        recorded = self.fingerprint
        if recorded is not None and recorded != fingerprint:
            raise ModelMismatchError(
                f"{self.path} holds embeddings of the model {recorded}, not of {fingerprint}; "
                "use the model it was built with, or build a new index"
            )

    # Changing it

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes of a block one change: all of them are committed at its end, or none after an exception.

        Raises:
            SearchIndexError: another process is writing.
        """
        with self._open():
            generation = self._live.generation
            try:
                with self.catalog.writing():
                    yield
            except BaseException:
                if self._live.generation != generation:
                    self._live.forget()  # a search within the block has seen what is now undone
                raise

    def add(
        self,
        ids: Sequence[str],
        vectors: npt.ArrayLike,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """Add vectors, or replace those whose ids are known, all of them or none.

        Args:
            ids: n different strings of 1 to 1,024 bytes of UTF-8 without control characters.
            vectors: (n, dim) finite numbers, rows of unit length; stored as float32.
            metadata: n mappings that JSON can hold; None for none. A replaced id loses its old metadata.

        Raises:
            DataError: an id or a mapping is not as above; the message names it.
            VectorError: the vectors are not as above; the message names the id.
            SearchIndexError: another process is writing, or the disk is full.
        """
        names = checked_ids(ids)
        rows = checked_vectors(vectors, self.dim, names)
        if len(rows) != len(names):
            raise VectorError(f"there must be one vector for each id; got {len(names)} ids and {len(rows)} vectors")
        texts = checked_metadata(metadata, names)
        if not names:
            return
        with self.transaction():
            self._drop(list(self.catalog.find(names).values()))
            last = self.catalog.last_block()  # after the drop, which may have changed it
            first = last.stop
            self._vectors.append(first, rows)
            for block in extended(last, rows):
                self.catalog.put_block(block)
            self.catalog.insert_items(
                [Item(first + n, name, text) for n, (name, text) in enumerate(zip(names, texts, strict=True))]
            )

    def remove(self, ids: Iterable[str], missing_ok: bool = False) -> int:
        """Remove ids, all of them or none.

        Args:
            ids: the ids; one that is named twice counts once.
            missing_ok: ignore those that are not in the index.

        Returns:
            How many were removed.

        Raises:
            DataError: an id is not in the index.
            SearchIndexError: another process is writing, or the disk is full.
        """
        names = checked_ids(ids, distinct=False)
        with self.transaction():
            found = self.catalog.find(names)
            missing = [name for name in names if name not in found]
            if missing and not missing_ok:
                raise _unknown(missing)
            self._drop(list(found.values()))
        return len(found)

    def _drop(self, items: Sequence[Item]) -> None:
        """Delete live items and clear their rows' bits."""
        self.catalog.delete_items(items)
        rows = np.array([item.row for item in items], np.int64)
        for block in self.catalog.blocks_of(rows.tolist()):
            mask = block.mask()
            mask[rows[(rows >= block.start) & (rows < block.stop)] - block.start] = False
            self.catalog.put_block(block.with_mask(mask))

    # Searching it

    def search(
        self, vectors: npt.ArrayLike, k: int = 10, where: Mapping[str, MetadataValue] | None = None
    ) -> list[list[Hit]]:
        """Return the k entries most alike to each query, exactly.

        Args:
            vectors: (n, dim) or (dim,) finite numbers of unit length.
            k: how many hits; where the index holds fewer, there are fewer.
            where: only entries whose metadata hold these values under these keys; all when None.

        Returns:
            For each query its hits, best first; equal scores in the order of insertion. A single vector gives a list of
            one list.

        Raises:
            VectorError: the vectors are not as above.
            ConfigError: `k` is less than 1, or `where` asks for something else than a text, number, bool or None.
            SearchIndexError: what had to be read is damaged.
        """
        queries = checked_vectors(vectors, self.dim, single=True)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k must be a whole number of at least 1; got {k!r}")
        with self._snapshot() as live:
            mask = live.mask if where is None else self._matching(live.mask, where)
            return self._hits(ann.nearest(live.verified(mask), mask, queries, int(k)))

    def search_within(
        self, vectors: npt.ArrayLike, score: float, where: Mapping[str, MetadataValue] | None = None
    ) -> list[list[Hit]]:
        """Return all entries that are at least this alike to each query, exactly.

        Args:
            vectors: (n, dim) or (dim,) finite numbers of unit length.
            score: the lowest cosine that counts, in [-1, 1].
            where: as in `search`.

        Returns:
            For each query its hits, best first; equal scores in the order of insertion.

        Raises:
            VectorError: the vectors are not as above.
            ConfigError: `score` is no number in that range, or `where` is not as in `search`.
            SearchIndexError: what had to be read is damaged.
        """
        queries = checked_vectors(vectors, self.dim, single=True)
        with self._snapshot() as live:
            mask = live.mask if where is None else self._matching(live.mask, where)
            found = ann.nearest(live.verified(mask), mask, queries, max(int(mask.sum()), 1))
            return self._hits([(rows[scores >= score], scores[scores >= score]) for rows, scores in found])

    def _matching(self, mask: BoolArray, where: Mapping[str, MetadataValue]) -> BoolArray:
        """Return which of the rows of a mask hold every one of these values."""
        for key, value in checked_where(where).items():
            found = np.zeros_like(mask)
            found[self.catalog.matching(key, value)] = True
            mask = mask & found
        return mask

    def _hits(self, found: list[tuple[ann.RowArray, ann.ScoreArray]]) -> list[list[Hit]]:
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])).tolist()
        items = {item.row: item for item in self.catalog.items(rows)}
        if len(items) != len(rows):
            raise SearchIndexError(
                f"{self.path} is damaged: a live row has no entry; restore it from a copy or build it again"
            )
        return [
            [
                Hit(items[row].id, max(-1.0, min(1.0, score)), json.loads(items[row].metadata))
                for row, score in zip(best.tolist(), scores.tolist(), strict=True)
            ]
            for best, scores in found
        ]

    # Checking it

    def check(self) -> list[str]:
        """Compare everything with its checksum and the two files with each other.

        Returns:
            What is wrong, one line each; empty when all is well.
        """
        problems: list[str] = []
        with self._open(), self.catalog.reading():
            self._live.forget()  # so that every row is compared again
            try:
                problems += self.catalog.check()
                with self._snapshot() as live:
                    for block in live.blocks:
                        problems += self._check_block(live, block)
            except SearchIndexError as error:
                problems.append(str(error))
        return problems

    def _check_block(self, live: LiveRows, block: Block) -> list[str]:
        try:
            live.verify(block)
            rows = [item.row for item in self.catalog.items_between(block.start, block.stop)]
        except SearchIndexError as error:
            return [str(error)]
        if rows != (np.flatnonzero(block.mask()) + block.start).tolist():
            return [f"{self.path}: of rows {block.start} to {block.stop - 1} others live than have an entry"]
        return []

    # What this process keeps of the catalog

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._mutex:
            if self._closed:
                raise SearchIndexError(f"{self.path} is closed; open it again with Index.open")
            yield

    @contextmanager
    def _snapshot(self) -> Iterator[LiveRows]:
        """Within the block everything that is read belongs to one committed state, the live rows too."""
        with self._open(), self.catalog.reading():
            generation = self.catalog.generation()
            if generation != self._live.generation:
                self._live.update(generation, self.catalog.blocks_after(self._live.generation))
            yield self._live


def _unknown(names: list[str]) -> DataError:
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return DataError(f"not in the index: {shown} ({len(names)} in all); see Index.ids()")
