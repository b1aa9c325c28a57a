"""`IndexReader`: what an index holds, read and searched.

Every call sees one committed state, from the list of live rows to the metadata of its hits, whatever other processes do
meanwhile. What a process knows of the rows (see `vitembed.index.rows`) is kept between calls and brought up to date at
the start of each.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vitembed.errors import ConfigError, DataError, ModelMismatchError, SearchIndexError
from vitembed.index import exact, searching
from vitembed.index.catalog import NAME, Catalog
from vitembed.index.filters import parse
from vitembed.index.inputs import Metadata, checked_ids, checked_vectors
from vitembed.index.mapped import VanishedError
from vitembed.index.optimization import Optimization
from vitembed.index.results import Hit, Record, Records
from vitembed.index.rows import Rows

# How often a reader tries again that meets an index being rewritten.
ATTEMPTS = 5


class RewrittenError(SearchIndexError):
    """Another process has compacted or rewritten the index between two batches of `IndexReader.stream`."""


class IndexReader:
    """An open index, for reading; see `vitembed.index.Index`.

    Args:
        path: the index's directory.

    Attributes:
        path: the index's directory.
        catalog: its SQLite file, for the other modules of this package.

    Raises:
        SearchIndexError: it is missing, damaged or of another format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._closed = False
        if not self.path.is_dir():
            raise SearchIndexError(f"{self.path} is not an index: there is no such folder; use Index.create")
        self.catalog = Catalog(self.path / NAME)
        self._rows: Rows | None = None
        self._rewriting = False
        self._tentative = False  # whether the rows that are kept were seen within a change
        self._base: int | None = None  # the last generation before the change that is being made
        self._process = os.getpid()
        try:
            with self.snapshot():
                pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the index; closing twice does nothing.

        Raises:
            SearchIndexError: a change is being made.
        """
        with self._mutex:
            if not self._closed and self.catalog.in_change:
                raise SearchIndexError(f"{self.path} cannot be closed within a change; leave the transaction first")
            if not self._closed:
                self._closed = True
                if self._rows is not None:
                    self._rows.close()
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
        with self.snapshot() as rows:
            return rows.dim

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

    @property
    def dtype(self) -> str:
        """What vectors are stored as, "float32" or "float16"."""
        with self._open():
            return str(self.catalog.meta("dtype"))

    @property
    def optimization(self) -> Optimization | None:
        """How the index searches, as `optimize` chose it; None, and then searches are exact, when it never did."""
        with self.snapshot() as rows:
            return rows.optimization

    def __len__(self) -> int:
        with self._open():
            return self.catalog.live()

    def __contains__(self, name: object) -> bool:
        with self._open():
            return isinstance(name, str) and name in self.catalog.find([name])

    def ids(self) -> list[str]:
        """Return all ids, in the order in which they were last added."""
        with self.snapshot() as rows:
            return [item.id for item in rows.all_items()]

    def entries(self, where: Mapping[str, Any] | None = None) -> dict[str, Metadata]:
        """Return the metadata of all entries by id, in the order in which they were last added.

        Args:
            where: only entries whose metadata match, as in `search`; all when None.

        Raises:
            ConfigError: `where` is no filter.
            SearchIndexError: an entry is damaged.
        """
        with self.snapshot() as rows:
            mask = rows.mask if where is None else rows.matching(parse(where))
            items = [item for item in rows.all_items() if mask[item.row]]
            return {item.id: json.loads(item.metadata) for item in items}

    def get(self, name: str) -> Record:
        """Return the entry of an id.

        Raises:
            DataError: the id is not in the index.
            SearchIndexError: the entry or its block of vectors is damaged.
        """
        with self.snapshot() as rows:
            item = self.catalog.find(checked_ids([name])).get(name)
            if item is None:
                raise unknown_ids([name])
            only = np.array([item.row])
            return Record(item.id, exact.as_floats(rows.verified(only)[only])[0], json.loads(item.metadata))

    def stream(self, size: int = 4_096) -> Iterator[Records]:
        """Yield all entries in batches, in the order in which they were last added.

        What is added after the first batch does not come; what is removed before its batch does not either. An id comes
        at most once.

        Args:
            size: rows looked at for one batch, at least 1; removed ones count, so that batches may be smaller.

        Raises:
            RewrittenError: the index was compacted or rewritten meanwhile; begin again.
            SearchIndexError: what had to be read is damaged.
        """
        if size < 1:
            raise ConfigError(f"size must be at least 1; got {size}")
        with self.snapshot() as rows:
            stop, name = len(rows.mask), rows.name
        for start in range(0, stop, size):
            with self.snapshot() as rows:
                if rows.name != name:
                    raise RewrittenError(f"{self.path} was rewritten while it was read; begin again")
                items = rows.all_items(start, min(start + size, stop))
                live = np.array([item.row for item in items], np.int64)
                batch = Records(
                    [item.id for item in items],
                    exact.as_floats(rows.verified(live)[live]),
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

    def search(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        recall: float | None = None,
        effort: int | None = None,
    ) -> list[list[Hit]]:
        """Return the k entries most alike to each query.

        The search is exact, unless `optimize` built a structure. Then it is as good as was asked for there, but for
        searches with a filter, which are exact; `recall` and `effort` change that for one call.

        Args:
            vectors: (n, dim) or (dim,) finite numbers of unit length.
            k: how many hits; where fewer entries match, there are fewer, and never otherwise.
            where: only entries whose metadata match, as `vitembed.index.filters` describes; all when None.
            recall: the share of the true hits to find, in (0, 1]; 1 for an exact search. The least effort that was
                measured to reach it is taken, exact search if none was.
            effort: how much of the structure to look at: HNSW's efSearch, or the number of lists.

        Returns:
            For each query its hits, best first; equal scores in the order of insertion. A single vector gives a list of
            one list.

        Raises:
            VectorError: the vectors are not as above.
            ConfigError: `k`, `where`, `recall` or `effort` is not as above.
            SearchIndexError: what had to be read is damaged.
        """
        with self.snapshot() as rows:
            queries = checked_vectors(vectors, rows.dim, single=True)
            searching.checked_recall(recall, effort)
            return searching.hits(rows, searching.find(rows, queries, searching.checked_k(k), where, recall, effort))

    def search_within(
        self, vectors: npt.ArrayLike, score: float, where: Mapping[str, Any] | None = None
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
        if isinstance(score, bool) or not isinstance(score, int | float | np.number) or not -1 <= score <= 1:
            raise ConfigError(f"score must be a number from -1 to 1; got {score!r}")
        with self.snapshot() as rows:
            queries = checked_vectors(vectors, rows.dim, single=True)
            mask = rows.mask if where is None else rows.matching(parse(where))
            return searching.hits(rows, exact.within(rows, mask, queries, float(score)))

    # What this process keeps of the catalog

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._mutex:
            if self._closed:
                raise SearchIndexError(f"{self.path} is closed; open it again with Index.open")
            if os.getpid() != self._process:
                raise SearchIndexError(f"{self.path} was opened in another process; open it in this one too")
            if self._rewriting:
                raise SearchIndexError(
                    f"{self.path} cannot be read while it is rewritten; make a list of its records first"
                )
            yield

    @contextmanager
    def snapshot(self) -> Iterator[Rows]:
        """Within the block everything that is read belongs to one committed state; for the modules of this package."""
        with self._open():
            for attempt in range(ATTEMPTS):
                with self.catalog.reading():
                    try:
                        rows = self._refreshed()
                    except VanishedError:
                        # Between the start of this state and now another process has rewritten the index.
                        if attempt == ATTEMPTS - 1 or self.catalog.in_change:
                            raise
                        continue
                    yield rows
                    return

    def _refreshed(self) -> Rows:
        generation, name = self.catalog.state()
        if self.catalog.in_change and self._base is None:
            self._base = generation - self.catalog.depth
        if self._rows is None or self._rows.name != name:
            self._forget()
            self._rows = Rows(self.path, self.catalog, name)
            self._tentative = self.catalog.in_change
        if self._rows.generation != generation:
            known = self._rows.optimization
            newest = self._rows.update(generation)
            if self._base is not None:
                self._tentative |= newest > self._base or self._rows.optimization != known
                self._rows.generation = generation - 1  # more may change before this change ends
        return self._rows

    def _forget_change(self) -> None:
        """Forget what was seen of a change that is undone: its row numbers will be used again."""
        if self._tentative:
            self._forget()
        if not self.catalog.in_change:
            self._base = None

    def _keep_change(self) -> None:
        """Take what was seen of a change as committed."""
        self._tentative, self._base = False, None

    def _forget(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        self._tentative = False


def unknown_ids(names: list[str]) -> DataError:
    """Return the error for ids that are not in the index."""
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return DataError(f"not in the index: {shown} ({len(names)} in all); see Index.ids()")
