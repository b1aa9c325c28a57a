"""What commands share: common options, printing results, and a warning line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitembed.gallery import Row

IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything that is drawn at random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; the first accelerator by default.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in one pass of the network.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Threads or processes that decode images; one a core by default.")
]


def print_json(document: object) -> None:
    """Print one JSON document on standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=_to_json)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file that is no UTF-8
        text = json.dumps(document, indent=2, default=_to_json)
    typer.echo(text)


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows of text, the columns aligned; numbers are right-aligned and floats have four digits."""
    cells = [[_to_text(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    for row, texts in zip(rows, cells, strict=True):
        parts = [
            text.rjust(width) if isinstance(value, int | float) else text.ljust(width)
            for value, text, width in zip(row, texts, widths, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def print_figures(figures: Mapping[str, object]) -> None:
    """Print named values, one a line."""
    print_table([(name, _to_text(value)) for name, value in figures.items()])


def warn(message: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"vitembed: warning: {message}", err=True)


def write_sheet(file: Path, rows: "Iterable[Row]", title: str, note: str = "", per_row: int | None = None) -> None:
    """Write a contact sheet, and say how many of its pictures are missing.

    Args:
        file: as `vitembed.files.atomic_path` gives it; that it can be written was found out before the work.
        rows: see `vitembed.gallery`.
        title: of the page.
        note: a line below the title.
        per_row: hits shown of a row.
    """
    from vitembed.gallery import PER_ROW, draw_sheet

    text, missing = draw_sheet(rows, title, note=note, per_row=per_row or PER_ROW)
    file.write_bytes(text.encode())
    if missing:
        warn(f"{missing:,} picture{'s' if missing > 1 else ''} could not be shown; the page says why")


def _to_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return " to ".join(_to_text(item) for item in value)
    return "-" if value is None else str(value)


def _to_json(value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON type")
