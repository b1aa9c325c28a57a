"""Near-duplicates among the entries of an index: groups that are connected by pairs of a high score, exactly.

The answer does not depend on the order in which entries were added: where a choice is free, the smaller id is taken.
All pairs of one committed state are scored, once each, as products of blocks of rows where these lie; beyond such a
block some 250 bytes an entry are held, and the groups.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitembed.errors import ConfigError
from vitembed.index.exact import RowArray, ScoreArray, as_floats, pair_scores, rounding
from vitembed.index.index import Index
from vitembed.index.reading import RewrittenError
from vitembed.index.results import Hit
from vitembed.index.rows import FrozenRows
from vitembed.index.vectors import StoredArray

# Rows multiplied at a time, and by how many others: a table of 16 MB.
_ROWS, _OTHERS = 1_024, 4_096

# Rows whose vectors are read at a time to find the same ones.
_BATCH = 4_096


@dataclass(frozen=True)
class DuplicateGroup:
    """Entries that are connected by pairs at or above a score (single linkage).

    Two members need not be that alike themselves: a chain of alike entries connects its ends.

    Attributes:
        representative: the id of the member that is linked to the most others; of several, the smallest id.
        weakest: the lowest score of two members that are linked, in [-1, 1].
        members: all of them by id, the representative too; each with its score to the representative.
    """

    representative: str
    weakest: float
    members: tuple[Hit, ...]


def near_duplicates(index: Index, score: float = 0.95, progress: bool = False) -> list[DuplicateGroup]:
    """Return the groups of entries that are connected by pairs at or above a score, exactly.

    Entries with the very same vector belong together whatever the score. What another process adds meanwhile is left
    out, and so is what it removes. The time grows with the square of the number of entries: for 100,000 of 384 numbers
    it is half a minute on two cores, for a million an hour; where most are alike, several times that.

    Args:
        index: the index.
        score: the lowest cosine that links two entries, in [-1, 1].
        progress: show a bar on standard error.

    Returns:
        Groups of two entries or more: the largest first, then by their first member's id.

    Raises:
        ConfigError: `score` is no number in [-1, 1].
        SearchIndexError: what had to be read is damaged.
        RewrittenError: another process compacted or rewrote the index meanwhile; begin again.
    """
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise ConfigError(f"score must be a number from -1 to 1; got {score!r}")
    with index.snapshot() as rows:
        source = rows.frozen()
    links = _Links(source)
    unique = links.unique
    with _bar(len(unique) * (len(unique) + 1) // 2, progress) as bar:
        for start in range(0, len(unique), _ROWS):
            for first, second, scores in _pairs(source, unique, start, score, bar):
                links.connect(first, second, scores)
    groups = _groups(index, source, links)
    return sorted(groups, key=lambda group: (-len(group.members), group.members[0].id))


def _pairs(
    source: FrozenRows, unique: RowArray, start: int, score: float, bar: Any
) -> Iterator[tuple[RowArray, RowArray, ScoreArray]]:
    """Yield the pairs of some rows with themselves and later ones that reach a score.

    They come as rows (p,), of which all pairs of one stand together, later rows (p,) and scores (p,).
    """
    mine = unique[start : start + _ROWS]
    queries = as_floats(source.vectors[mine])
    # Rounding may take a product below the score, and the score itself may be rounded up.
    floor = np.nextafter(np.float32(score - rounding(source.dim)), np.float32(-2))
    for begin in range(start, len(unique), _OTHERS):
        others = unique[begin : begin + _OTHERS]
        rough = queries @ as_floats(source.vectors[others]).T  # (q, c)
        owner, position = np.divmod(np.flatnonzero(rough >= floor), len(others))
        first, second = mine[owner], others[position]
        later = second > first
        owner, first, second = owner[later], first[later], second[later]
        scores = pair_scores(source.vectors, second, queries, owner)
        near = scores >= score
        if near.any():
            yield first[near], second[near], scores[near]
        both = len(mine) * (len(mine) - 1) // 2 if begin == start else 0
        bar.update(len(mine) * len(others) - both)


class _Links:
    """Which rows are linked: a union-find over their numbers (Tarjan and van Leeuwen 1984), and what is told of groups.

    Args:
        source: the rows.

    Attributes:
        unique: (n,) the live rows; of those with the same vector the first one.
    """

    def __init__(self, source: FrozenRows) -> None:
        self._live, self._first = np.flatnonzero(source.mask), _first_rows(source)
        self._copies = np.bincount(self._first[self._live], minlength=len(source.mask))  # of each first row's vector
        self.unique: RowArray = np.flatnonzero(self._copies)
        self._parents = np.arange(len(source.mask))
        self._degrees = self._copies - 1
        self._weakest = np.full(len(source.mask), np.inf)
        copied = np.flatnonzero(self._copies > 1)
        owners = np.arange(len(copied))
        self._weakest[copied] = pair_scores(source.vectors, copied, as_floats(source.vectors[copied]), owners)

    def connect(self, first: RowArray, second: RowArray, scores: ScoreArray) -> None:
        """Link rows (p,) to rows (p,); all links of one of the first stand together."""
        np.add.at(self._degrees, first, self._copies[second])
        np.add.at(self._degrees, second, self._copies[first])
        np.minimum.at(self._weakest, first, scores)
        np.minimum.at(self._weakest, second, scores)
        starts = np.flatnonzero(np.diff(first, prepend=-1))
        for row, linked in zip(first[starts], np.split(second, starts[1:]), strict=True):
            roots = self._roots(np.append(linked, row))
            self._parents[roots] = roots.min()

    def degree(self, row: int) -> int:
        """Return to how many others a row is linked."""
        return int(self._degrees[self._first[row]])

    def weakest(self, rows: list[int]) -> float:
        """Return the lowest score of a link of some rows, as a search gives it."""
        return float(self._weakest[self._first[rows]].min().clip(-1, 1))

    def groups(self) -> list[list[int]]:
        """Return the rows of each group of two or more."""
        together: dict[int, list[int]] = {}
        for row, root in zip(self._live.tolist(), self._roots(self._first[self._live]).tolist(), strict=True):
            together.setdefault(root, []).append(row)
        return [rows for rows in together.values() if len(rows) > 1]

    def _roots(self, rows: RowArray) -> RowArray:
        """Return the root of each row's group, and make the way there short."""
        found = self._parents[rows]
        while not np.array_equal(above := self._parents[found], found):
            found = above
        self._parents[rows] = found
        return found


def _first_rows(source: FrozenRows) -> RowArray:
    """Return for each live row the first one (rows,) that has the same vector, which may be itself."""
    found = np.arange(len(source.mask))
    first: dict[bytes, int] = {}
    live = np.flatnonzero(source.mask)
    for start in range(0, len(live), _BATCH):
        batch = live[start : start + _BATCH]
        digests = (hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in source.vectors[batch])
        found[batch] = [first.setdefault(digest, row) for row, digest in zip(batch.tolist(), digests, strict=True)]
    return found


def _groups(index: Index, source: FrozenRows, links: _Links) -> Iterator[DuplicateGroup]:
    """Yield the groups as entries, without those that were removed meanwhile."""
    with index.snapshot() as rows:
        if rows.name != source.name:
            raise RewrittenError(f"{index.path} was rewritten while it was read; begin again")
        for numbers in links.groups():
            there = [row for row in numbers if rows.mask[row]]
            if len(there) < 2:
                continue
            entries = dict(zip(there, rows.entries(there), strict=True))
            chosen = min(there, key=lambda row: (-links.degree(row), entries[row][0]))
            scores = _scores(source.vectors, np.array(there), chosen)
            members = [Hit(name, score, text) for (name, text), score in zip(entries.values(), scores, strict=True)]
            members.sort(key=lambda hit: hit.id)
            yield DuplicateGroup(entries[chosen][0], links.weakest(there), tuple(members))


def _scores(vectors: StoredArray, rows: RowArray, chosen: int) -> list[float]:
    """Return the scores of rows (n,) to a chosen one, as a search gives them."""
    found = pair_scores(vectors, rows, as_floats(vectors[[chosen]]), np.zeros(len(rows), np.int64))
    scores: list[float] = found.clip(-1, 1).tolist()
    return scores


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=" pairs", unit_scale=True, desc="duplicates", disable=not shown)
