"""Which way a search takes: exact, or over the structure with what came after it beside; and hits from rows."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from vitembed.errors import ConfigError
from vitembed.index import exact
from vitembed.index.blocks import BoolArray
from vitembed.index.exact import Found, RowSource
from vitembed.index.filters import parse
from vitembed.index.results import Hit
from vitembed.index.rows import Rows
from vitembed.index.structure import Structure
from vitembed.index.vectors import FloatArray

# What FAISS takes for an effort.
_MOST_EFFORT = 2**31 - 1

# Below this share of the entries an exact search over the few that match is faster than a structure, and sure.
_FILTER_SHARE = 0.2


def find(
    rows: Rows, queries: FloatArray, k: int, where: Mapping[str, Any] | None, recall: float | None, effort: int | None
) -> list[Found]:
    """Return the nearest rows of each query; the arguments are those of `Index.search`, checked.

    A filter makes the search exact unless a recall or an effort is asked for.
    """
    mask = rows.mask if where is None else rows.matching(parse(where))
    live = rows.live if where is None else int(np.count_nonzero(mask))
    k = min(k, max(live, 1))
    chosen = _effort(rows, recall, effort) if where is None or recall is not None or effort is not None else None
    structure = None if chosen is None or live < _FILTER_SHARE * rows.live else rows.structure()
    if structure is None or chosen is None:
        return exact.nearest(rows, mask, queries, k)
    if where is None:
        found = _approximate(rows, structure, queries, k, chosen, rows.covered, rows.tail)
    else:
        found = _approximate(rows, structure, queries, k, chosen, mask, None if rows.tail is None else mask & rows.tail)
    short = [n for n, (best, _) in enumerate(found) if len(best) < min(k, live)]
    for n, whole in zip(short, exact.nearest(rows, mask, queries[short], k) if short else [], strict=True):
        found[n] = whole
    return found


def _effort(rows: Rows, recall: float | None, effort: int | None) -> int | None:
    """Return the effort for the structure; None for an exact search."""
    if rows.optimization is None or rows.optimization.file is None:
        return None
    return rows.optimization.effort(recall) if effort is None else min(int(effort), _MOST_EFFORT)


def _approximate(
    rows: Rows,
    structure: Structure,
    queries: FloatArray,
    k: int,
    effort: int,
    mask: BoolArray | None,
    tail: BoolArray | None,
) -> list[Found]:
    found = proposed(rows, structure, queries, k, effort, mask)
    if tail is None:
        return found
    beside = exact.nearest(rows, tail, queries, k)
    return [_merged(one, other, k) for one, other in zip(found, beside, strict=True)]


def proposed(
    rows: RowSource, structure: Structure, queries: FloatArray, k: int, effort: int, mask: BoolArray | None
) -> list[Found]:
    """Return for each query the best k of the rows that a structure proposes, with their exact scores."""
    # Codes of one byte a number rank nearly as the rows themselves; product-quantised ones need more to choose from.
    width = 10 * k if structure.kind == "ivfpq" else k + max(6, k // 4)
    proposals = structure.search(queries, width, effort, mask)  # (q, width), -1 where there are fewer
    there = proposals >= 0
    flat = proposals[there]
    owners = np.repeat(np.arange(len(queries)), there.sum(axis=1))
    pairs = exact.pair_scores(rows.verified(flat), flat, queries, owners)
    if len(queries) == 1:
        return [exact.best(flat, pairs, k)]
    scores = np.full(proposals.shape, -np.inf)
    scores[there] = pairs
    order = np.lexsort((proposals, -scores), axis=1)[:, :k]
    best, scores = np.take_along_axis(proposals, order, 1), np.take_along_axis(scores, order, 1)
    if len(flat) == proposals.size:
        return list(zip(best, scores, strict=True))
    return [(own[own >= 0], values[own >= 0]) for own, values in zip(best, scores, strict=True)]


def _merged(one: Found, other: Found, k: int) -> Found:
    return exact.best(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]), k)


def hits(rows: Rows, found: list[Found]) -> list[list[Hit]]:
    """Return the hits of each query."""
    if not found:
        return []
    flat = np.concatenate([best for best, _ in found]).tolist()
    # Rounding may take a score a little beyond what a cosine can be.
    scores = np.concatenate([scores for _, scores in found]).clip(-1.0, 1.0).tolist()
    made = [Hit(name, score, text) for (name, text), score in zip(rows.entries(flat), scores, strict=True)]
    ends = list(accumulate(len(best) for best, _ in found))
    return [made[start:stop] for start, stop in pairwise([0, *ends])]


def checked_recall(recall: float | None, effort: int | None) -> None:
    """Raise unless a recall and an effort can be asked for.

    Raises:
        ConfigError: the recall is not in (0, 1], the effort no whole number of at least 1, or both are given.
    """
    if recall is not None and effort is not None:
        raise ConfigError("give recall or effort, not both")
    number = isinstance(recall, int | float | np.number) and not isinstance(recall, bool)
    if recall is not None and not (number and 0 < recall <= 1):
        raise ConfigError(f"recall must be a number above 0 and at most 1; got {recall!r}")
    if effort is not None and (isinstance(effort, bool) or not isinstance(effort, int | np.integer) or effort < 1):
        raise ConfigError(f"effort must be a whole number of at least 1; got {effort!r}")


def checked_k(k: int) -> int:
    """Return the number of hits as a plain int.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"k must be a whole number of at least 1; got {k!r}")
    return int(k)
