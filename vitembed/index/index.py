"""`Index`: string ids, vectors and metadata that are added, replaced, removed, searched and checked.

An index is a directory. `catalog.sqlite` is the truth (see `vitembed.index.catalog`); `vectors-*.f32` holds the numbers
(see `vitembed.index.vectors`); `vectors-*.codes` (see `vitembed.index.codes`) and `structure-*.faiss` (see
`vitembed.index.structure`) are caches that searches are faster with and that can be made again.

Nothing in the folder is to be deleted by hand: without its log, `catalog.sqlite-wal`, the catalog is that of an earlier
commit, and nothing tells.

A change is one transaction; see `vitembed.index.changes` for the order of writes in it.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from vitembed.errors import ConfigError, DataError, SearchIndexError, VectorError
from vitembed.index import changes, checking, searching
from vitembed.index.catalog import NAME, Catalog
from vitembed.index.changes import Entries
from vitembed.index.codes import codes_path
from vitembed.index.inputs import Metadata, checked_ids, checked_metadata, checked_vectors
from vitembed.index.optimization import Optimization
from vitembed.index.optimize import Optimizer, Wanted, unchanged
from vitembed.index.reading import ATTEMPTS, IndexReader, unknown_ids
from vitembed.index.results import Records
from vitembed.index.structure import Structure, memory_needed, require_kind
from vitembed.index.vectors import DTYPES, sync_folder

_MAX_DIM = 65_536

# How long a structure that was built waits for another writer, in seconds; a change that is soon repeated waits less.
_INSTALL_WAIT = 600.0


class Index(IndexReader):
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
        super().__init__(path)
        self._files = changes.ChangeFiles(self.path, self.catalog)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        dim: int,
        fingerprint: str | None = None,
        location: str | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Make an empty index and open it.

        Args:
            path: the directory to make; it must be missing or empty, and the folder around it must exist.
            dim: the width of the vectors, from 1 to 65,536.
            fingerprint: of the model that makes the vectors; None when it is not known (yet).
            location: where that model is kept (a folder or a name), a note for whoever opens the index.
            dtype: what vectors are stored as: "float32", or "float16" in half the space, which rounds each number by
                up to 0.05 % and with it scores by about 1e-4.

        Raises:
            ConfigError: `dim` is out of range, or `dtype` is unknown.
            SearchIndexError: there is something at `path` already, or it cannot be written.
        """
        target = Path(path)
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= _MAX_DIM:
            raise ConfigError(f"dim must be a whole number from 1 to {_MAX_DIM:,}; got {dim!r}")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            what = "is an index already; open it or" if (target / NAME).exists() else "is there and not empty;"
            raise SearchIndexError(f"cannot create an index: {target} {what} choose another name")
        # Made beside its final place and then renamed, so that a kill leaves no half-made index under the name.
        draft = target.absolute().with_name(f".{target.absolute().name}-{secrets.token_hex(4)}")
        try:
            draft.mkdir()
            name = _vector_name(dtype)
            (draft / name).touch()
            codes_path(draft / name).touch()
            settings = {"dim": str(dim), "dtype": dtype, "vectors": name}
            Catalog.create(draft / NAME, {**settings, "fingerprint": fingerprint, "location": location})
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
        """Open an index for reading and writing; for reading alone where it lies in a place that cannot be written.

        Raises:
            SearchIndexError: it is missing, damaged or of a newer format.
        """
        return cls(path)

    # Entries

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes of a block one change: all of them are committed at its end, or none after an exception.

        Raises:
            SearchIndexError: another process is writing, or the index lies where it cannot be written.
        """
        with self._open():
            mark = self._files.mark()
            try:
                with self.catalog.writing():
                    yield
            except BaseException:
                self._forget_change()
                self._files.undo(mark)
                raise
            if not self.catalog.in_change:
                self._keep_change()
                self._files.commit()

    def add(
        self,
        ids: Sequence[str],
        vectors: npt.ArrayLike,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> None:
        """Add vectors, or replace those whose ids are known, all of them or none.

        Args:
            ids: n different strings of 1 to 1,024 bytes of UTF-8 without control characters.
            vectors: (n, dim) finite numbers, rows of unit length.
            metadata: n mappings that JSON can hold; None for none. A replaced id loses its old metadata.

        Raises:
            DataError: an id or a mapping is not as above; the message names it.
            VectorError: the vectors are not as above; the message names the id.
            SearchIndexError: another process is writing, or the disk is full.
        """
        names = checked_ids(ids)
        numbers = checked_vectors(vectors, self.dim, names)
        if len(numbers) != len(names):
            raise VectorError(f"there must be one vector for each id; got {len(names)} ids and {len(numbers)} vectors")
        texts = checked_metadata(metadata, names)
        if not names:
            return
        with self.transaction(), self.snapshot() as rows:
            checked_vectors(numbers[:1], rows.dim)  # another process may have rewritten the index meanwhile
            changes.drop(self.catalog, list(self.catalog.find(names).values()))
            changes.append(self.catalog, rows, Entries(names, numbers, texts))

    def annotate(self, ids: Sequence[str], metadata: Sequence[Metadata | None]) -> None:
        """Give entries other metadata; their vectors stay, and `sync` goes on to follow their files.

        Args:
            ids: n different ids of the index.
            metadata: n mappings, each in place of the whole that was stored; see `get`.

        Raises:
            DataError: an id is not in the index, or a mapping cannot be written as JSON.
            SearchIndexError: another process is writing, or the disk is full.
        """
        names = checked_ids(ids)
        texts = checked_metadata(metadata, names)
        with self.transaction(), self.snapshot() as rows:
            found = self.catalog.find(names)
            missing = [name for name in names if name not in found]
            if missing:
                raise unknown_ids(missing)
            if not names:
                return
            places = np.array([found[name].row for name in names])
            vectors = rows.verified(places)[places]
            changes.drop(self.catalog, list(found.values()), keep_files=True)
            changes.append(self.catalog, rows, Entries(names, vectors, texts))

    def remove(self, ids: Iterable[str], missing_ok: bool = False) -> int:
        """Remove ids, all of them or none. `compact` gives their space back.

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
                raise unknown_ids(missing)
            changes.drop(self.catalog, list(found.values()))
        return len(found)

    def rewrite(
        self, records: Iterable[Records], dim: int, fingerprint: str | None = None, location: str | None = None
    ) -> None:
        """Replace all entries, the width and the model, in one change.

        Within `transaction` other records can be changed along. The structure goes: call `optimize` afterwards.

        Args:
            records: the new entries in batches, in order; ids, vectors (n, dim) and metadata as in `add`. They must not
                be read from this index meanwhile.
            dim: the new width.
            fingerprint: of the model that made the vectors.
            location: where that model is kept.

        Raises:
            DataError: an id or a mapping is not as it must be, or comes twice.
            VectorError: the vectors are not as they must be.
            SearchIndexError: another process is writing, or the disk is full.
        """
        self._rewrite(_checked(records, dim), {"dim": str(dim), "fingerprint": fingerprint, "location": location})

    def compact(self) -> int:
        """Write the vectors anew without the rows of removed and replaced entries.

        Searches in other processes go on meanwhile. The structure goes: call `optimize` afterwards.

        Returns:
            How many rows were dropped; with none the index is left as it is.

        Raises:
            SearchIndexError: another process is writing, the disk is full, or a vector is damaged.
        """
        with self.transaction(), self.snapshot() as rows:
            dead = len(rows.mask) - rows.live
            if dead:
                rows.verified(np.flatnonzero(rows.mask))  # before their checksums are deleted
                self._rewrite(changes.surviving(self.catalog, rows), {})
        if not self.catalog.in_change:
            self.catalog.shrink()
        return dead

    def _rewrite(self, batches: Iterable[Entries], settings: dict[str, str | None]) -> None:
        with self.transaction(), self.snapshot() as rows:
            self._files.sweep()
            self._files.replace(rows.vectors.path, rows.codes.path)
            if rows.optimization and rows.optimization.file:
                self._files.replace(self.path / rows.optimization.file)
            name = _vector_name(self.dtype)
            self._files.make(self.path / name, codes_path(self.path / name))
            self._rewriting = True
            try:
                changes.rewrite(self.catalog, self.path, {**settings, "vectors": name}, batches)
            finally:
                self._rewriting = False

    def optimize(
        self,
        recall: float = 0.95,
        memory: int | None = None,
        kind: str | None = None,
        k: int = 10,
        seed: int = 0,
        progress: bool = False,
    ) -> Optimization:
        """Make searches faster at a known recall: build a FAISS structure, measure it, and search with it from now on.

        Some entries are kept out of the structure while it is built, and serve as queries: the recall is the mean share
        of their k nearest entries, by exact search, that the structure finds. They join it afterwards. Later entries
        are searched exactly beside the structure until `optimize` is called again, which adds them to it (or builds it
        anew when they are many, or when other things are asked for). Searches and changes go on meanwhile.

        Args:
            recall: to reach, in (0, 1); 1 goes back to exact search, as does an index that is fast enough as it is.
            memory: the most that a structure may take, in bytes; None for no limit.
            kind: "hnsw", "ivf" or "ivfpq" (see `vitembed.index.structure`), or "exact"; None to choose by the number of
                entries, the memory, and what is measured.
            k: number of neighbours to measure the recall with.
            seed: of the choice of entries to measure with.
            progress: show bars on standard error.

        Returns:
            What was chosen, with the measured curve.

        Raises:
            ConfigError: an argument is out of range.
            SearchIndexError: the kind that was asked for does not reach the recall or does not fit; the index was
                rewritten meanwhile; the disk is full.
        """
        searching.checked_recall(recall, None)
        if kind is not None:
            require_kind(kind)
        if recall == 1 and kind not in (None, "exact"):
            raise ConfigError(
                f"a structure of kind {kind!r} does not find everything; ask for a recall below 1, or no kind"
            )
        for name, number in (("memory", memory), ("seed", seed)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
                raise ConfigError(f"{name} must be a whole number of at least 0; got {number!r}")
        wanted = Wanted(float(recall), searching.checked_k(k), memory, "exact" if recall == 1 else kind, seed)
        if self.catalog.read_only:  # told before the work
            raise SearchIndexError(f"{self.path} cannot be written; copy it to a folder that can")
        with self.snapshot() as rows:
            source, known = rows.frozen(), rows.optimization
        if known is not None and unchanged(known, source, wanted):
            return known
        return self._install(source.name, *Optimizer(source, wanted, progress).run(known))

    def _install(self, name: str, structure: Structure | None, chosen: Optimization) -> Optimization:
        """Make a structure that was built from the rows of a numbering the index's own."""
        with self.catalog.patient(_INSTALL_WAIT), self.transaction(), self.snapshot() as rows:
            if rows.name != name:
                raise SearchIndexError(f"{self.path} was rewritten while its structure was built; call optimize again")
            self._files.sweep()
            if rows.optimization and rows.optimization.file:
                self._files.replace(self.path / rows.optimization.file)
            if structure is not None:
                file = self.path / f"structure-{secrets.token_hex(4)}.faiss"
                self._files.make(file)
                chosen = replace(chosen, file=file.name, checksum=structure.save(file))
            self.catalog.set_meta("structure", chosen.to_json())
        return chosen

    # Checking it

    def check(self, repair: bool = False) -> list[str]:
        """Compare everything with its checksum and the files with each other.

        Args:
            repair: make again what can be made again: the codes, the structure, and SQLite's own indices.

        Returns:
            What is wrong, one line each, and still wrong after a repair; empty when all is well.
        """
        problems = self._problems()
        if not problems or not repair:
            return problems
        try:
            self._repair()
        except SearchIndexError as error:
            return list(dict.fromkeys([*self._problems(), str(error)]))
        return self._problems()

    def _repair(self) -> None:
        with self.transaction():
            self.catalog.rebuild_indices()
            with self.snapshot() as rows:
                for number in rows.uncoded():
                    self.catalog.put_codes(rows.encode(number))
        with self.snapshot() as rows:
            lost, dim, live = rows.optimization, rows.dim, rows.live
            lost = None if rows.structure() is not None else lost
        if lost is not None and lost.file is not None:
            memory = memory_needed(lost.kind, dim, live, lost.code_bytes)
            try:
                self.optimize(lost.target, memory, lost.kind, lost.k)
            except SearchIndexError:  # the entries have changed, and it does not reach or fit any more
                self.optimize(1.0)

    def _problems(self) -> list[str]:
        problems: list[str] = []
        try:
            with self._open():
                self._forget()  # files that were deleted or replaced would still be open, and taken as verified
            with self.snapshot() as rows:
                problems += checking.lasting_problems(self.catalog, rows)
            return problems + self._cache_problems()
        except SearchIndexError as error:
            return [*problems, str(error)]

    def _cache_problems(self) -> list[str]:
        for _ in range(ATTEMPTS):
            with self.snapshot() as rows:
                problems, state = list(checking.cache_problems(rows)), self.catalog.state()
            with self.snapshot():
                if not problems or self.catalog.state() == state:
                    break  # otherwise another process may have replaced the files after the snapshot began
        return problems


def _vector_name(dtype: str) -> str:
    return f"vectors-{secrets.token_hex(4)}.f{8 * DTYPES[dtype].itemsize}"


def _checked(records: Iterable[Records], dim: int) -> Iterator[Entries]:
    seen: set[str] = set()
    for batch in records:
        names = checked_ids(batch.ids)
        again = next((name for name in names if name in seen), None)
        if again is not None:
            raise DataError(f"ids must be different; {again!r} comes twice")
        seen.update(names)
        yield Entries(names, checked_vectors(batch.vectors, dim, names), checked_metadata(batch.metadata, names))
