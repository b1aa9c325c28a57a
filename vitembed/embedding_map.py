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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from vitembed.errors import DataError, MissingExtraError, unknown_name
from vitembed.files import atomic_path
from vitembed.gallery import path_of, thumbnail
from vitembed.index import Index, Records
from vitembed.index.groups import sample
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
    known = [value for value in values if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if numeric and len(set(known)) > len(_SCALE):
        return _ranges(values, known)
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


def _ranges(values: Sequence[Any], known: Sequence[float]) -> _Groups:
    """Return ranges of a number that hold as equally many entries as can be."""
    edges = np.unique(np.quantile(np.array(known, np.float64), np.linspace(0, 1, len(_SCALE) + 1), method="lower"))
    names = [f"{low:.6g} to {high:.6g}" for low, high in itertools.pairwise(edges.tolist())]
    last = len(names) - 1
    groups = [
        len(names) if value is None else min(last, int(np.searchsorted(edges, value, "right")) - 1) for value in values
    ]
    texts = [_NONE if value is None else json.dumps(value) for value in values]
    return _Groups(names, [(colour, _SHAPES[0]) for colour in _SCALE[: len(names)]], groups, texts).with_none()


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
    title, about = html.escape(title), html.escape(about)
    return _TEMPLATE.replace("{{title}}", title).replace("{{about}}", about).replace("{{data}}", text)


# Everything that comes from the index is shown with `textContent`, and the policy lets nothing be loaded.
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7280; --line: #d9dce1; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #a0a6ad; --line: #3a3f45; --page: #16181b; } }
html, body { height: 100%; margin: 0; } h1 { font-size: 1.2rem; margin: 0; } p { margin: .1rem 0 0; }
body { display: flex; flex-direction: column; font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
header { padding: .7rem 1rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
header p { color: var(--faint); font-size: .85rem; }
main { flex: 1; min-height: 0; display: flex; } #stage { flex: 1; min-width: 0; position: relative; overflow: hidden; }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: crosshair; touch-action: none; }
#legend { max-width: min(14rem, 40vw); overflow-y: auto; padding: .5rem; border-left: 1px solid var(--line);
  font-size: .82rem; } #legend:empty { display: none; }
#legend button { display: block; width: 100%; padding: .12rem .3rem; border: 0; background: none; color: inherit;
  font: inherit; text-align: left; cursor: pointer; overflow-wrap: anywhere; } #legend .off { opacity: .35; }
#tip { position: absolute; display: none; max-width: 15rem; padding: .4rem; border: 1px solid var(--line);
  border-radius: 4px; background: var(--page); font-size: .8rem; pointer-events: none; overflow-wrap: anywhere; }
#tip img { display: block; width: 9rem; height: 9rem; object-fit: contain; margin-bottom: .2rem; }
noscript { padding: 1rem; }
</style>
</head>
<body>
<header><h1>{{title}}</h1><p>{{about}} Wheel or pinch zooms, dragging moves, a double click goes back.</p></header>
<noscript>A script in this page draws the map; allow it to run to see the points.</noscript>
<main><div id="stage"><canvas></canvas><div id="tip"><img alt=""><div></div></div></div><div id="legend"></div></main>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const stage = document.getElementById("stage"), canvas = stage.querySelector("canvas"), pen = canvas.getContext("2d");
const tip = document.getElementById("tip"), picture = tip.querySelector("img"), words = tip.querySelector("div");
const hidden = new Set(), fingers = new Map(), dark = matchMedia("(prefers-color-scheme: dark)");
let view = { x: 0.5, y: 0.5, zoom: 1 }, chosen = -1, width = 0, height = 0;

const scale = () => 0.92 * Math.min(width, height) * view.zoom;
const screenX = (i) => (data.points[i][0] - view.x) * scale() + width / 2;
const screenY = (i) => (data.points[i][1] - view.y) * scale() + height / 2;
const radius = () => Math.min(9, (data.ids.length > 1500 ? 2.6 : 4) * Math.pow(view.zoom, 0.3));

function mark(x, y, r, shape) {
  pen.beginPath();
  if (shape === "■") pen.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
  else if (shape === "▲") { pen.moveTo(x, y - 1.2 * r); pen.lineTo(x + 1.1 * r, y + 0.8 * r);
    pen.lineTo(x - 1.1 * r, y + 0.8 * r); pen.closePath(); }
  else pen.arc(x, y, r, 0, 7);
}

function draw() {
  const dots = devicePixelRatio || 1, r = radius();
  width = stage.clientWidth; height = stage.clientHeight;
  canvas.width = width * dots; canvas.height = height * dots;
  pen.scale(dots, dots);
  for (let i = 0; i < data.ids.length; i++) {
    const x = screenX(i), y = screenY(i);
    if (hidden.has(data.group[i]) || x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
    const [colour, shape] = data.styles[data.group[i]];
    pen.globalAlpha = 0.8; pen.fillStyle = colour;
    mark(x, y, r, shape); pen.fill();
  }
  pen.globalAlpha = 1;
  if (chosen >= 0) {
    pen.lineWidth = 2; pen.strokeStyle = getComputedStyle(document.body).color;
    mark(screenX(chosen), screenY(chosen), r + 3, "●"); pen.stroke();
  }
}

function point(x, y) {
  let best = 16 * 16, found = -1;
  for (let i = 0; i < data.ids.length; i++) {
    const d = (screenX(i) - x) ** 2 + (screenY(i) - y) ** 2;
    if (d < best && !hidden.has(data.group[i])) { best = d; found = i; }
  }
  if (found === chosen) return;
  chosen = found; draw();
  tip.style.display = found < 0 ? "none" : "block";
  if (found < 0) return;
  picture.style.display = data.pictures[found] ? "block" : "none";
  if (data.pictures[found]) picture.src = "data:image/jpeg;base64," + data.pictures[found];
  words.textContent = data.ids[found];
  if (data.label !== null) words.append(document.createElement("br"), data.label + ": " + data.values[found]);
  const left = screenX(found) + 14, top = screenY(found) + 14;
  tip.style.left = Math.max(0, left + tip.offsetWidth > width ? left - 28 - tip.offsetWidth : left) + "px";
  tip.style.top = Math.max(0, Math.min(top, height - tip.offsetHeight)) + "px";
}

function zoom(factor, x, y) {
  const before = scale();
  view.zoom = Math.min(2000, Math.max(0.5, view.zoom * factor));
  view.x += (x - width / 2) * (1 / before - 1 / scale());
  view.y += (y - height / 2) * (1 / before - 1 / scale());
}

function moved(event) {
  const box = canvas.getBoundingClientRect(), now = [event.clientX - box.left, event.clientY - box.top];
  const before = fingers.get(event.pointerId);
  if (!before) return point(...now);
  const other = [...fingers].find(([id]) => id !== event.pointerId);
  if (other) {
    const apart = (a) => Math.max(1, Math.hypot(a[0] - other[1][0], a[1] - other[1][1]));
    zoom(apart(now) / apart(before), (now[0] + other[1][0]) / 2, (now[1] + other[1][1]) / 2);
  } else { view.x -= (now[0] - before[0]) / scale(); view.y -= (now[1] - before[1]) / scale(); }
  fingers.set(event.pointerId, now); forget();
}

function forget() { chosen = -1; tip.style.display = "none"; draw(); }

canvas.addEventListener("pointerdown", (event) => {
  const box = canvas.getBoundingClientRect(), at = [event.clientX - box.left, event.clientY - box.top];
  point(...at); fingers.set(event.pointerId, at); canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", moved);
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => fingers.delete(e.pointerId));
canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") forget(); });
canvas.addEventListener("dblclick", () => { view = { x: 0.5, y: 0.5, zoom: 1 }; forget(); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
  forget();
}, { passive: false });
data.groups.forEach((name, number) => {
  const button = document.createElement("button"), sign = document.createElement("span");
  sign.textContent = data.styles[number][1] + " "; sign.style.color = data.styles[number][0];
  button.append(sign, name + " (" + data.group.filter((group) => group === number).length + ")");
  button.addEventListener("click", () => {
    button.classList.toggle("off");
    if (!hidden.delete(number)) hidden.add(number);
    forget();
  });
  document.getElementById("legend").append(button);
});
new ResizeObserver(forget).observe(stage);
dark.addEventListener("change", draw);
</script>
</body>
</html>
"""
