"""Contact sheets: searches, groups of near-duplicates and clusters as rows of thumbnails, in one HTML file.

A picture is found by the path in an entry's metadata, under "path", as `sync` and `vitembed index add` write it. One
that is missing or damaged leaves its reason in its place: a sheet is never refused because of a picture.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitembed.errors import ConfigError, ImageError
from vitembed.files import atomic_path
from vitembed.images import ImageSource, load_image
from vitembed.index import Hit, Record
from vitembed.index.clusters import Clustering
from vitembed.index.duplicates import DuplicateGroup
from vitembed.report import Page, Tile

Query: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Record | Hit
"""What a search was made with: an image as a path, a PIL image or an array of pixels; an entry, as `Index.get` returns
it; or a vector (dim,)."""

PICTURES = 2_000
"""Pictures in one sheet; some 6 kB each."""

PER_ROW = 24
"""Hits shown of a row."""

_SIDE = 160  # pixels: twice what a tile measures, for screens of high density
_THREADS = 4  # that read pictures, each with a whole one in memory
_KEPT = 500  # thumbnails remembered, of pictures that come again: 77 kB each
_LABEL = 48  # characters of an id that are shown; the rest is in the title

_VECTOR = "a vector, no picture"
_NO_PATH = "no picture: its metadata have no path"

_Picture: TypeAlias = Image.Image | str


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a contact sheet.

    Attributes:
        hits: entries, in the order in which they are shown.
        queries: what was searched with, shown before them.
        heading: what stands above the row; empty for nothing.
    """

    hits: Sequence[Hit]
    queries: Sequence[Query] = ()
    heading: str = ""


def search_rows(queries: Iterable[Query | Sequence[Query]], found: Iterable[Sequence[Hit]]) -> list[Row]:
    """Return a row for each search: its query, or its several queries as a list or tuple, and its hits.

    Raises:
        ConfigError: there is not one list of hits for each query.
    """
    asked, answers = list(queries), list(found)
    if len(asked) != len(answers):
        raise ConfigError(f"there must be one list of hits for each query; got {len(answers)} for {len(asked)}")
    rows = []
    for query, hits in zip(asked, answers, strict=True):
        several: Sequence[Any] = query if isinstance(query, list | tuple) else [query]
        rows.append(Row(hits, several))
    return rows


def group_rows(groups: Iterable[DuplicateGroup]) -> list[Row]:
    """Return a row for each group of near-duplicates, the representative first, then the others by their scores."""
    rows = []
    for group in groups:
        hits = sorted(group.members, key=lambda hit: (hit.id != group.representative, -hit.score, hit.id))
        rows.append(Row(hits, heading=f"{len(hits)} alike, lowest linked score {group.weakest:.3f}"))
    return rows


def cluster_rows(clustering: Clustering) -> list[Row]:
    """Return a row for each cluster, the members nearest to its centre first."""
    return [
        Row(cluster.members, heading=f"Cluster {number}: {len(cluster.members):,}")
        for number, cluster in enumerate(clustering.clusters, 1)
    ]


def contact_sheet(
    out: str | os.PathLike[str],
    rows: Iterable[Row],
    title: str,
    *,
    note: str = "",
    per_row: int = PER_ROW,
    limit: int = PICTURES,
) -> int:
    """Write rows of thumbnails as one HTML file that works offline, wholly or not at all.

    Args:
        out: the file; its folder must exist.
        rows: see `search_rows`, `group_rows` and `cluster_rows`.
        title: of the page.
        note: a line below the title.
        per_row: hits shown of a row; the number of the others is said.
        limit: pictures in all; rows beyond them are left out, and their number is said.

    Returns:
        How many pictures could not be shown; each has its reason in its place.

    Raises:
        ConfigError: `per_row` or `limit` is less than 1.
        VitembedError: the file cannot be written.
    """
    with atomic_path(out) as temporary:
        text, missing = draw_sheet(rows, title, note=note, per_row=per_row, limit=limit)
        temporary.write_bytes(text.encode())
    return missing


def draw_sheet(
    rows: Iterable[Row], title: str, *, note: str = "", per_row: int = PER_ROW, limit: int = PICTURES
) -> tuple[str, int]:
    """Return the HTML of a contact sheet, and how many pictures could not be shown; as `contact_sheet` otherwise.

    Raises:
        ConfigError: `per_row` or `limit` is less than 1.
    """
    for name, value in (("per_row", per_row), ("limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
    page = Page(_text(title))
    if note:
        page.paragraph(_text(note))
    known = functools.lru_cache(_KEPT)(thumbnail)
    remaining, missing, left_out = limit, 0, 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for row in rows:
            if remaining <= len(row.queries):
                left_out += 1
                continue
            shown = row.hits[: min(per_row, remaining - len(row.queries))]
            tiles = [_query_tile(query, known) for query in row.queries]
            tiles += pool.map(lambda hit: _entry_tile(hit, known, hit.score), shown)
            remaining -= len(tiles)
            missing += sum(isinstance(tile.image, str) and tile.image != _VECTOR for tile in tiles)
            _add(page, row, tiles, len(row.hits) - len(shown))
    if remaining == limit:
        page.paragraph("There is nothing to show.")
    _close(page, missing, left_out)
    return page.html(), missing


def thumbnail(source: ImageSource, side: int = _SIDE) -> Image.Image | str:
    """Return a picture, upright, with no side longer than `side` pixels; or, as a text, why it cannot be read."""
    try:
        image = load_image(source)
    except ImageError as error:
        return error.reason
    image.thumbnail((side, side))
    return image


def path_of(metadata: dict[str, Any]) -> str | None:
    """Return the path of an entry's picture; None where its metadata have none."""
    path = metadata.get("path")
    return path if isinstance(path, str) and path else None


def _add(page: Page, row: Row, tiles: list[Tile], more: int) -> None:
    if row.heading:
        page.heading(_text(row.heading))
    page.tiles(tiles, wrap=True)
    if more:
        page.paragraph(f"and {more:,} more", faint=True)
    elif not row.hits:
        page.paragraph("no hits", faint=True)


def _close(page: Page, missing: int, left_out: int) -> None:
    """Say at the page's end what it does not show."""
    if left_out:
        page.paragraph(f"{left_out:,} more row{'s are' if left_out > 1 else ' is'} not shown.", faint=True)
    if missing:
        page.paragraph(f"{missing:,} picture{'s' if missing > 1 else ''} could not be shown.", faint=True)


def _query_tile(query: Query, known: Callable[[str], _Picture]) -> Tile:
    if isinstance(query, Record | Hit):
        return _entry_tile(query, known, None)
    if isinstance(query, str | os.PathLike):
        path = os.fspath(query)
        return Tile(known(path), _label(path), title=_text(path))
    if isinstance(query, np.ndarray) and query.ndim == 1:
        return Tile(_VECTOR, "query")
    return Tile(thumbnail(query), "query")


def _entry_tile(entry: Record | Hit, known: Callable[[str], _Picture], score: float | None) -> Tile:
    path = path_of(entry.metadata)
    metadata = json.dumps(entry.metadata, ensure_ascii=False)
    picture = known(path) if path else _NO_PATH
    return Tile(picture, _label(entry.id), score, title=_text(f"{entry.id}\n{metadata}"))


def _label(name: str) -> str:
    """Return a name as it fits below a picture: of a long one the end, which tells most paths apart."""
    return _text(name if len(name) <= _LABEL else "…" + name[1 - _LABEL :])


def _text(text: str) -> str:
    """Return text that can be written as UTF-8, whatever bytes a file's name is made of."""
    return text.encode("utf-8", "replace").decode()
