"""Choosing a structure: build, measure on the index's own vectors, keep what reaches the wanted recall.

Some entries are kept out of the structure while it is built, and their true neighbours among the others, found by exact
search, are what it is measured against; so the curve is that of queries which the structure has not seen. They are
added afterwards. The kinds are tried in an order that the number of entries and the memory decide, and the first that
reaches the recall faster than exact search is taken; where none does, the index stays exact.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index import exact
from vitembed.index.exact import Found, RowArray
from vitembed.index.optimization import Optimization, Point
from vitembed.index.rows import FrozenRows
from vitembed.index.searching import proposed
from vitembed.index.structure import (
    MIN_ROWS,
    Structure,
    code_sizes,
    file_checksum,
    in_chunks,
    memory_needed,
    training_rows,
)
from vitembed.index.vectors import FloatArray

# Entries kept out to measure with, at most.
QUERIES = 1_000

# Single queries that are timed.
_TIMED = 100

# Below this many entries exact search takes well under a millisecond a query.
SMALL = 20_000

# A structure is extended by at least so many rows, by at most this share of it, and while no more of it is dead.
MIN_FRESH, _FRESH_SHARE, _DEAD_SHARE = 20, 0.5, 0.2

# Efforts beyond this recall are not measured.
_COMPLETE = 0.995

# Up to this many entries a graph is built in minutes on two cores; above it lists come first.
GRAPH_ROWS = 300_000


@dataclass(frozen=True)
class Wanted:
    """What a structure should be.

    Attributes:
        recall: the share of the true k nearest to find, in (0, 1).
        k: the number of neighbours.
        memory: the most that a structure may take, in bytes; None for no limit.
        kind: the only kind to try; None to choose.
        seed: of the choice of the entries to measure with.
    """

    recall: float
    k: int
    memory: int | None
    kind: str | None
    seed: int


def candidates(wanted: Wanted, dim: int, rows: int) -> list[tuple[str, int]]:
    """Return the kinds to try and the size of their codes, in order."""
    order = ("hnsw", "ivf", "ivfpq") if rows <= GRAPH_ROWS else ("ivf", "hnsw", "ivfpq")
    if wanted.kind is None and rows < SMALL:
        return []
    sized = [(kind, size) for kind in order for size in (code_sizes(dim) if kind == "ivfpq" else [0])]
    return [
        (kind, size)
        for kind, size in sized
        if (wanted.kind is None or kind == wanted.kind)
        and (wanted.memory is None or memory_needed(kind, dim, rows, size) <= wanted.memory)
    ]


class Optimizer:
    """One call of `Index.optimize`: the state of the rows that a structure is built from.

    Args:
        rows: the rows of the index as of now; they may grow meanwhile, which does not matter.
        wanted: what is asked for.
        progress: whether to show a bar on standard error.
    """

    def __init__(self, rows: FrozenRows, wanted: Wanted, progress: bool) -> None:
        self._rows, self._wanted, self._progress = rows, wanted, progress
        self._live = np.flatnonzero(rows.mask)
        self._random = np.random.default_rng(wanted.seed)
        self._start = time.perf_counter()

    def run(self, known: Optimization | None) -> tuple[Structure | None, Optimization]:
        """Return the structure that was chosen, not saved yet, and its description.

        Args:
            known: the structure that the index has; it is extended where that serves.

        Raises:
            SearchIndexError: no structure of the kind that was asked for fits or reaches the recall.
        """
        plans = candidates(self._wanted, self._rows.dim, len(self._live))
        if self._wanted.kind not in (None, "exact"):
            self._require_plans(plans)
        if not plans:
            return None, self._described("exact", self._no_plan())
        if known is not None and self._extends(known, plans):
            extended = self._extended(known)
            if extended is not None:
                return extended
        return self._first(plans)

    def _first(self, plans: list[tuple[str, int]]) -> tuple[Structure | None, Optimization]:
        """Build and measure until a structure is good enough."""
        held_out = self._choice(self._live, min(QUERIES, len(self._live) // 10))
        rows = np.setdiff1d(self._live, held_out)
        reached = 0.0
        exact_ms = None
        for kind, size in plans:
            sample = self._choice(rows, training_rows(kind, len(rows)))
            structure = Structure.train(kind, self._vectors(sample), len(self._live), size)
            self._add(structure, rows)
            curve, exact_ms = self._measured(structure, held_out)
            chosen = self._described(kind, "", curve, exact_ms, size, structure)
            point = chosen.point()
            if point is not None and (point.ms < exact_ms or self._wanted.kind):
                self._add(structure, held_out)
                reason = "asked for" if self._wanted.kind else "the first that is faster than exact search"
                return structure, self._described(kind, reason, curve, exact_ms, size, structure)
            reached = max(reached, curve[-1].recall)
        if self._wanted.kind:
            raise SearchIndexError(
                f"a structure of kind {self._wanted.kind!r} finds {reached:.3f} of the true neighbours at most, not "
                f"{self._wanted.recall:.3f}; ask for less, allow more memory, or leave the kind open"
            )
        tried = ", ".join(dict.fromkeys(kind for kind, _ in plans))
        reason = f"none of {tried} reaches the recall faster than exact search"
        return None, self._described("exact", reason, exact_ms=exact_ms)

    def _no_plan(self) -> str:
        if self._wanted.kind == "exact":
            return "asked for"
        if len(self._live) < SMALL:
            return f"{len(self._live):,} entries are searched exactly in no time; structures begin at {SMALL:,}"
        return f"no structure fits {self._wanted.memory or 0:,} bytes"

    def _extends(self, known: Optimization, plans: list[tuple[str, int]]) -> bool:
        """Tell whether a structure is what is wanted but for some later rows."""
        fresh = int(np.count_nonzero(self._live >= known.covers))
        dead = known.entries - (len(self._live) - fresh)
        fits = (
            (known.kind, known.code_bytes) in plans
            and known.target == self._wanted.recall
            and known.k == self._wanted.k
        )
        return fits and MIN_FRESH <= fresh <= _FRESH_SHARE * known.entries and dead <= _DEAD_SHARE * known.entries

    def _extended(self, known: Optimization) -> tuple[Structure, Optimization] | None:
        """Add the later rows to a structure and measure it anew; None if it is damaged or no longer good enough."""
        path = self._rows.path.with_name(str(known.file))
        structure = Structure.load(path, known.kind, known.checksum)
        if structure is None:
            return None
        fresh = self._live[self._live >= known.covers]
        held_out = self._choice(fresh, min(QUERIES, len(fresh) // 2))  # of those that it has not seen
        self._add(structure, np.setdiff1d(fresh, held_out))
        curve, exact_ms = self._measured(structure, held_out)
        self._add(structure, held_out)
        reason = "the earlier one, with the entries that came since"
        chosen = self._described(known.kind, reason, curve, exact_ms, known.code_bytes, structure)
        return (structure, chosen) if chosen.point() is not None else None

    def _require_plans(self, plans: list[tuple[str, int]]) -> None:
        if len(self._live) < MIN_ROWS:
            raise SearchIndexError(f"a structure needs at least {MIN_ROWS:,} entries; there are {len(self._live):,}")
        if not plans:
            limit = "this width" if self._wanted.memory is None else f"{self._wanted.memory:,} bytes of memory"
            raise SearchIndexError(
                f"a structure of kind {self._wanted.kind!r} does not fit {limit}; allow more, or leave the kind open"
            )

    def _described(
        self,
        kind: str,
        reason: str,
        curve: tuple[Point, ...] = (),
        exact_ms: float | None = None,
        code_bytes: int = 0,
        structure: Structure | None = None,
    ) -> Optimization:
        entries = len(structure) if structure else 0
        return Optimization(
            kind=kind,
            target=self._wanted.recall,
            k=self._wanted.k,
            curve=curve,
            exact_ms=None if exact_ms is None else round(exact_ms, 4),
            entries=entries,
            covers=len(self._rows.mask),
            memory=memory_needed(kind, self._rows.dim, entries, code_bytes) if structure else 0,
            seconds=round(time.perf_counter() - self._start, 2),
            reason=reason,
            code_bytes=code_bytes,
        )

    def _choice(self, rows: RowArray, count: int) -> RowArray:
        return np.sort(self._random.choice(rows, count, replace=False))

    def _vectors(self, rows: RowArray) -> FloatArray:
        return exact.as_floats(self._rows.vectors[rows])

    def _add(self, structure: Structure, rows: RowArray) -> None:
        from tqdm import tqdm

        with tqdm(total=len(rows), unit=" vectors", desc=structure.kind, disable=not self._progress) as bar:
            for chunk in in_chunks(rows):
                structure.add(chunk, self._vectors(chunk))
                bar.update(len(chunk))

    def _measured(self, structure: Structure, held_out: RowArray) -> tuple[tuple[Point, ...], float]:
        """Measure rising efforts until the recall is beyond the target and nearly complete.

        Args:
            structure: which does not hold the rows that were kept out.
            held_out: (q,) rows to search for.

        Returns:
            The curve, and the milliseconds of an exact search for one query.
        """
        k = self._wanted.k
        queries = self._vectors(held_out)
        mask = self._rows.mask.copy()
        mask[held_out] = False
        truth = exact.nearest(self._rows, mask, queries, k)
        exact_ms = _milliseconds(lambda query: exact.nearest(self._rows, mask, query, k), queries)
        # Dead rows, which an extended structure may hold, must not be found.
        living = None if len(structure) == np.count_nonzero(mask) else mask
        curve: list[Point] = []
        for effort in structure.efforts():
            search = partial(proposed, self._rows, structure, k=k, effort=effort, mask=living)
            shares = [
                len(np.intersect1d(found, true)) / len(true)
                for (found, _), (true, _) in zip(search(queries), truth, strict=True)
            ]
            curve.append(Point(effort, round(float(np.mean(shares)), 5), round(_milliseconds(search, queries), 4)))
            if curve[-1].recall >= max(self._wanted.recall, _COMPLETE):
                break
        return tuple(curve), exact_ms


def unchanged(known: Optimization, rows: FrozenRows, wanted: Wanted) -> bool:
    """Tell whether what an index has is what is wanted, and nothing came since."""
    same = known.target == wanted.recall and known.k == wanted.k and wanted.kind in (None, known.kind)
    fits = wanted.memory is None or known.memory <= wanted.memory
    covers = known.covers == len(rows.mask) and known.entries == np.count_nonzero(rows.mask)
    if not (same and fits and covers and known.file):
        return False
    with suppress(OSError):
        return file_checksum(rows.path.with_name(known.file)) == known.checksum
    return False


def _milliseconds(search: Callable[[FloatArray], list[Found]], queries: FloatArray) -> float:
    """Return the median time of single queries."""
    times = []
    for n in range(min(_TIMED, len(queries))):
        start = time.perf_counter()
        search(queries[n : n + 1])
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3
