"""The map: the entries of an index as points in the plane, alike ones together, in one HTML file that works offline.

The vectors are brought to 50 numbers by PCA, and those to two by t-SNE or UMAP. Both keep neighbours together; neither
the distance between two clusters nor the size of one means much. Method "pca" shows the two directions in which the
vectors differ most, whose distances do mean something, and hides the others.
"""

import base64
import html
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

import numpy as np
from PIL import Image

from vitembed.errors import DataError, MissingExtraError, unknown_name
from vitembed.files import atomic_path
from vitembed.gallery import path_of, thumbnail
from vitembed.index import Index, Records
from vitembed.index.clusters import sample
from vitembed.index.vectors import FloatArray

METHODS = ("pca", "tsne", "umap")

BUDGET = 24_000_000
"""Bytes of all thumbnails in a page, as they stand in it."""

SIDES = (112, 80, 56, 40)
"""Longest side of a thumbnail in pixels: the first at which all of them are within the budget."""

_COMPONENTS = 50  # of the PCA before t-SNE, as in van der Maaten and Hinton 2008
_PERPLEXITY = 30.0
_NEIGHBOURS = 15  # UMAP's own default
_FEWEST = 5  # entries that t-SNE and UMAP need to say anything
_THREADS = 4

# Six colours that the colour-blind tell apart (Tol, "bright") times three shapes; then grey for all the others.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_SHAPES = "●■▲"
_GREY = "#8a8f98"
_CATEGORIES = len(_COLOURS) * len(_SHAPES)
_SCALE = ("#5c6bd9", "#8a5fd0", "#b356b8", "#d2568f", "#e4695f", "#ec8a3d", "#e9b43a")  # of a number, low to high
_OTHERS, _NONE = "others", "(none)"


@dataclass(frozen=True)
class MapReport:
    """What a map shows.

    Attributes:
        entries: in the index.
        shown: points of the map; fewer than `entries` if a sample was drawn.
        method: "pca", "tsne" or "umap": what was used, which for fewer than 5 entries is "pca".
        thumbnails: points that have a picture.
    """

    entries: int
    shown: int
    method: str
    thumbnails: int


@dataclass(frozen=True)
class _Groups:
    """The groups that points are coloured by: their names and styles, and for each point its group and its value."""

    names: list[str]
    styles: list[tuple[str, str]]
    numbers: list[int]
    values: list[str]

    def with_none(self) -> "_Groups":
        """Return them with a group for the points that have no value, if there are any."""
        if len(self.names) not in self.numbers:
            return self
        return _Groups([*self.names, _NONE], [*self.styles, (_GREY, _SHAPES[1])], self.numbers, self.values)


def map_index(
    index: Index,
    out: str | os.PathLike[str],
    method: str = "tsne",
    limit: int = 5_000,
    seed: int = 0,
    label: str | None = None,
) -> MapReport:
    """Draw the entries of an index as points, with their pictures under the pointer, in one HTML file.

    t-SNE of 5,000 entries takes under a minute on two cores; the time grows a little faster than their number.

    Args:
        index: the index.
        out: the file; its folder must exist. It holds up to 24 MB of thumbnails.
        method: "tsne" (van der Maaten and Hinton 2008), "umap" (McInnes et al. 2018) or "pca". Fewer than 5 entries are
            drawn by "pca" whatever is asked for. The perplexity of t-SNE is 30, or a third of the other entries if that
            is less; UMAP looks at 15 neighbours, or all the others.
        limit: entries; of more a sample is drawn by the seed, and the page says so.
        seed: from 0 on; the same index and seed give the same map, in whatever order the entries were added.
        label: a key of the metadata, by whose values the points are coloured; None for one colour. The 18 most frequent
            values have a colour and shape of their own; a number of more values is shown in 7 ranges.

    Raises:
        ConfigError: the method is unknown, or `limit` or the seed is no whole number in range.
        DataError: no entry has the label.
        MissingExtraError: UMAP is not installed.
        VitembedError: the file cannot be written.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "umap":
        _umap()
    with atomic_path(out) as temporary:
        records = sample(index, limit, seed)
        one = _Groups([], [(_COLOURS[0], _SHAPES[0])], [0] * len(records), [])
        groups = one if label is None else _grouped(records, label)
        used = method if len(records) >= _FEWEST else "pca"
        points, share = project(records.vectors, used, seed)
        pictures, side = _pictures(records)
        report = MapReport(len(index), len(records), used, sum(map(bool, pictures)))
        data = {
            "ids": records.ids,
            "points": _placed(points),
            "groups": groups.names,
            "styles": groups.styles,
            "group": groups.numbers,
            "label": label,
            "values": groups.values,
            "pictures": pictures,
        }
        temporary.write_text(_page(data, report, _about(report, method, share, side)), encoding="utf-8", newline="")
    return report


def project(vectors: FloatArray, method: str = "tsne", seed: int = 0) -> tuple[FloatArray, float]:
    """Bring vectors to two numbers each.

    Args:
        vectors: (n, dim) float32.
        method: "tsne", "umap" or "pca"; see `map_index`. The first two need 5 rows.
        seed: from 0 on.

    Returns:
        (n, 2) float32, and the share of the variance that the first two principal components hold, in [0, 1].

    Raises:
        MissingExtraError: UMAP is not installed.
    """
    components, share = _principal(vectors, seed)
    state = int(np.random.default_rng(seed).integers(2**32))
    start = components[:, :2]
    if method == "pca" or not start.any():  # all vectors are the same
        return start, share
    if method == "umap":
        # One thread, for with several UMAP's answers differ from run to run.
        neighbours = min(_NEIGHBOURS, len(vectors) - 1)
        reducer = _umap().UMAP(n_neighbors=neighbours, init=start / start.std() * 10, random_state=state, n_jobs=1)
    else:
        from sklearn.manifold import TSNE

        # The components as a start keep the large-scale order, and the map steady (Kobak and Berens 2019).
        start = start / start[:, 0].std() * 1e-4
        perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
        reducer = TSNE(perplexity=perplexity, init=start.astype(np.float32), random_state=state)
    return np.asarray(reducer.fit_transform(components), np.float32), share


def _principal(vectors: FloatArray, seed: int) -> tuple[FloatArray, float]:
    """Return up to 50 principal components (n, max(2, c)), of which those that do not exist are 0."""
    from sklearn.decomposition import PCA

    found = np.zeros((len(vectors), 2), np.float32)
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        return found, 1.0
    count = min(_COMPONENTS, *vectors.shape)
    pca = PCA(count, random_state=int(np.random.default_rng(seed).integers(2**32)))
    components = pca.fit_transform(vectors).astype(np.float32)
    found = np.pad(components, ((0, 0), (0, max(0, 2 - count))))
    return found, float(pca.explained_variance_ratio_[:2].sum())


def _umap() -> Any:
    try:
        return import_module("umap")
    except ImportError as error:
        raise MissingExtraError("a map by UMAP", "map") from error


def _grouped(records: Records, key: str) -> _Groups:
    """Return the entries in groups by the value of a key.

    Raises:
        DataError: no entry has the key.
    """
    if len(records) and not any(key in metadata for metadata in records.metadata):
        keys = sorted({name for metadata in records.metadata for name in metadata})
        there = ", ".join(map(repr, keys[:10])) or "none"
        raise DataError(f"the metadata of no entry have the label {key!r}; the keys that there are: {there}")
    values = [metadata.get(key) for metadata in records.metadata]
    numbers = [_number(value) for value in values]
    found = {number for number in numbers if number is not None}
    if len(found) > len(_SCALE) and numbers.count(None) == values.count(None):
        return _ranges(values, numbers)
    texts = [_NONE if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    counts = Counter(text for text, value in zip(texts, values, strict=True) if value is not None)
    names = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    styles = [(colour, shape) for shape in _SHAPES for colour in _COLOURS][: len(names)]
    number = {name: at for at, name in enumerate(names[:_CATEGORIES])}
    if len(names) > _CATEGORIES:
        names = [*names[:_CATEGORIES], _OTHERS]
        styles.append((_GREY, _SHAPES[0]))
    groups = [
        len(names) if value is None else number.get(text, _CATEGORIES)
        for text, value in zip(texts, values, strict=True)
    ]
    return _Groups(names, styles, groups, texts).with_none()


def _number(value: Any) -> float | None:
    """Return a value as a float; None if it is no number or beyond what a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _ranges(values: Sequence[Any], numbers: Sequence[float | None]) -> _Groups:
    """Return ranges of a number that hold as equally many entries as can be; None belongs to none."""
    known = np.array([number for number in numbers if number is not None])
    edges = np.unique(np.quantile(known, np.linspace(0, 1, len(_SCALE) + 1), method="lower"))
    names = [f"{_shown(low)} to {_shown(high)}" for low, high in itertools.pairwise(edges.tolist())]
    last = len(names) - 1
    groups = [
        len(names) if number is None else min(last, int(np.searchsorted(edges, number, "right")) - 1)
        for number in numbers
    ]
    texts = [_NONE if value is None else json.dumps(value) for value in values]
    return _Groups(names, [(colour, _SHAPES[0]) for colour in _SCALE[: len(names)]], groups, texts).with_none()


def _shown(number: float) -> str:
    """Return a number as text: a whole one, such as a time in milliseconds, with all its digits."""
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else f"{number:.10g}"


def _pictures(records: Records) -> tuple[list[str], int]:
    """Return for each entry its thumbnail as JPEG in base64, "" where there is none, and their longest side.

    Where the budget does not reach for all of them at the smallest size, every second, third, ... entry has one.
    """
    paths = [path_of(metadata) for metadata in records.metadata]
    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(lambda path: b"" if path is None else _jpeg(path, SIDES[0]), paths))
    for side in SIDES:
        if side != SIDES[0]:
            files = [_smaller(file, side) if file else b"" for file in files]
        if sum(map(_size, files)) <= BUDGET:
            break
    step = 1
    while sum(map(_size, files[::step])) > BUDGET and step <= len(files):
        step += 1
    chosen = range(0, len(files), step) if step <= len(files) else ()
    return [base64.b64encode(file).decode() if at in chosen else "" for at, file in enumerate(files)], side


def _jpeg(path: str, side: int) -> bytes:
    image = thumbnail(path, side)
    return b"" if isinstance(image, str) else _encoded(image)


def _smaller(file: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(file)) as image:
        image.thumbnail((side, side))
        return _encoded(image)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=75, optimize=True)
    return buffer.getvalue()


def _size(file: bytes) -> int:
    return math.ceil(len(file) / 3) * 4  # in base64


def _about(report: MapReport, asked: str, share: float, side: int) -> str:
    """Return the line that says what the map shows."""
    some = f" of {report.entries:,}, drawn at random" if report.shown < report.entries else ""
    entries = f"{report.shown:,} {'entry' if report.shown == 1 else 'entries'}{some}"
    how = {
        "tsne": "t-SNE after PCA: neighbours are alike, larger distances mean little",
        "umap": "UMAP after PCA: neighbours are alike, larger distances mean little",
        "pca": f"PCA: the two directions of most variance, {share:.0%} of it in all",
    }[report.method]
    few = f" (too few for {asked})" if asked != report.method else ""
    pictures = (
        f"{report.thumbnails:,} have a picture, {side} pixels at most" if report.thumbnails else "none has a picture"
    )
    return f"{entries}. {how}{few}. {pictures[0].upper()}{pictures[1:]}."


def _placed(points: FloatArray) -> list[list[float]]:
    """Return points in the unit square, both axes to one scale; their last digit is less than a pixel."""
    low, high = points.min(axis=0, initial=np.inf), points.max(axis=0, initial=-np.inf)
    span = float((high - low).max()) if len(points) else 0.0
    placed = (points - (low + high) / 2) / (span or 1.0) + 0.5 if len(points) else points
    return [[round(x, 5), round(1 - y, 5)] for x, y in placed.tolist()]


def _page(data: dict[str, Any], report: MapReport, about: str) -> str:
    """Return the page: the data as JSON, in which nothing ends its element, and the script that draws them."""
    title = f"Map of {report.entries:,} {'entry' if report.entries == 1 else 'entries'}"
    if data["label"] is not None:
        title += f" by {data['label']}"
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # ASCII, so that no character is special
    values = {"title": html.escape(title), "about": html.escape(about), "data": text}
    # Everything that comes from the index is shown with `textContent`, and the page's policy lets nothing be loaded.
    template = resources.files("vitembed").joinpath("embedding_map.html").read_text("utf-8")
    # All at once, for a value may hold the name of another one.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
