"""Self-contained HTML pages: text, tables, pictures and contact sheets in one file that works offline.

Pictures are part of the page, as data; there are no scripts. Every text is escaped; what `Page.add` takes
was so before.
"""

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vitembed.files import atomic_write

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7280; --line: #d9dce1; --page: #fff;
  --right: #1b7f5c; --wrong: #b3532d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #a0a6ad; --line: #3a3f45; --page: #16181b;
  --right: #4cc79a; --wrong: #e58a63; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 62rem; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p { max-width: 44rem; } .faint, figcaption { color: var(--faint); font-size: .88rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line); }
td, th[scope=col]:not(:first-child) { text-align: right; }
figure { margin: 1rem 0; } figure > img { max-width: 100%; background: #fff; border-radius: 4px; }
.sheet { display: grid; gap: .9rem; overflow-x: auto; } .row { display: flex; gap: .6rem; }
.cell { flex: none; width: 5.4rem; font-size: .74rem; line-height: 1.3; overflow-wrap: anywhere; }
.cell img { width: 100%; height: 5.4rem; object-fit: contain; background: #0001; border: 3px solid transparent;
  border-radius: 4px; box-sizing: border-box; image-rendering: auto; }
body:has(.wide) { max-width: 70rem; } .wide { margin: 1.1rem 0; } .wrap { flex-wrap: wrap; align-content: start; }
.before { flex: none; flex-wrap: wrap; align-content: start; max-width: 14rem; }
.missing { box-sizing: border-box; height: 5.4rem; margin: 0 0 .4rem; padding: .3rem; overflow: hidden;
  color: var(--faint); border: 1px dashed var(--line); border-radius: 4px; font-size: .66rem; }
.query { border-right: 1px solid var(--line); padding-right: .6rem; width: 6rem; }
.right img { border-color: var(--right); } .wrong img { border-color: var(--wrong); }
.right b { color: var(--right); } .wrong b { color: var(--wrong); }
pre { background: #0000000d; padding: .8rem 1rem; border-radius: 4px; overflow-x: auto; font-size: .88rem; }
@media (prefers-color-scheme: dark) { pre { background: #ffffff12; } }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, .row { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Tile:
    """A picture in a contact sheet.

    Attributes:
        image: the picture; or, where there is none, the reason, which is shown in its place.
        label: what is written below it.
        score: its similarity to the query; None for the query itself.
        correct: whether it is a right answer: drawn as a frame, a sign and a word; None if that is not known.
        title: what is shown when the pointer rests on it.
    """

    image: Image.Image | str
    label: str
    score: float | None = None
    correct: bool | None = None
    title: str = ""


class Page:
    """An HTML page that is built from top to bottom.

    Args:
        title: of the page and its first heading.
    """

    def __init__(self, title: str) -> None:
        self._title = html.escape(title)
        self._parts: list[str] = [f"<h1>{self._title}</h1>"]
        self._style = _STYLE

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, *, faint: bool = False) -> None:
        """Add a paragraph, in a paler and smaller type if it is an aside."""
        self._parts.append(f"<p{' class=faint' if faint else ''}>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add lines to be typed."""
        self._parts.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; the first column is text, the others are numbers, formatted already."""
        head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr><th scope=row>{html.escape(row[0])}</th>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        # On a phone a wide table is scrolled by itself, also with the keyboard, and the page stays as wide as it is.
        self._parts.append(f'<div class=table tabindex=0 role=region aria-label="table">{table}</div>')

    def figure(self, png: bytes, caption: str) -> None:
        """Add a picture with a caption, which is its description for those who cannot see it."""
        text = html.escape(caption)
        self._parts.append(f'<figure><img src="{_data_uri(png)}" alt="{text}"><figcaption>{text}</figcaption></figure>')

    def sheet(self, rows: Sequence[Sequence[Tile]]) -> None:
        """Add a contact sheet: in each row a query and its neighbours, best first."""
        lines = ("<div class=row>" + "".join(map(_cell, row)) + "</div>" for row in rows)
        self._parts.append("<div class=sheet>" + "\n".join(lines) + "</div>")

    def tiles(self, tiles: Sequence[Tile], *, wrap: bool = False) -> None:
        """Add pictures side by side, queries first; those that do not fit are scrolled to, or go to further lines."""
        if not wrap:
            self._parts.append('<div class="row sheet">' + "".join(map(_cell, tiles)) + "</div>")
            return
        # Queries stand in a column of their own, so that the further lines of their hits begin below the first hit.
        queries = "".join(_cell(tile) for tile in tiles if tile.score is None)
        others = "".join(_cell(tile) for tile in tiles if tile.score is not None)
        before = f'<div class="row before">{queries}</div>' if queries else ""
        self._parts.append(f'<div class="row wide">{before}<div class="row wrap">{others}</div></div>')

    def add(self, markup: str = "", *, style: str = "") -> None:
        """Add HTML of another module, in which every text is escaped already, and the CSS that it needs."""
        self._parts += [markup] if markup else []
        self._style += style

    def html(self) -> str:
        """Return the whole document."""
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{self._title}</title>\n<style>{self._style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the document as one file, wholly or not at all.

        Raises:
            VitembedError: if the folder is missing, cannot be written or is full.
        """
        atomic_write(path, self.html())


def _cell(tile: Tile) -> str:
    kind = {None: "" if tile.score is not None else " query", True: " right", False: " wrong"}[tile.correct]
    verdict = {None: "", True: "<b>✓ right</b> ", False: "<b>✗ wrong</b> "}[tile.correct]
    score = "" if tile.score is None else f"{tile.score:.3f}<br>"
    label = html.escape(tile.label)
    title = f' title="{html.escape(tile.title)}"' if tile.title else ""
    if isinstance(tile.image, str):
        picture = f"<p class=missing>{html.escape(tile.image)}</p>"
    else:
        picture = f'<img src="{picture_data(tile.image)}" alt="{label}"><br>'
    return f'<div class="cell{kind}"{title}>{picture}{verdict}{score}{label}</div>'


def picture_data(image: Image.Image, side: int = 160) -> str:
    """Return a picture as data for `src`, the longer side of `side` pixels; of small ones pixels are shown as they are.

    A colour picture that is large enough becomes JPEG, a tenth of the bytes; everything else PNG, which is exact.
    """
    scale = side / max(image.size)
    sampling = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, sampling)
    buffer = io.BytesIO()
    if image.mode == "RGB" and scale <= 1:
        resized.save(buffer, format="JPEG", quality=85)
        return _data_uri(buffer.getvalue(), "jpeg")
    resized.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
