"""`vitembed index export` and `vitembed index import`: an index in other programs' formats."""

from pathlib import Path
from typing import Annotated

import typer

from vitembed.cli.output import IndexPath, Json, print_figures, print_json, warn


def export_index(
    index: IndexPath,
    out: Annotated[Path, typer.Argument(help="A .parquet file to write, or a folder for a flat FAISS file and ids.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    json: Json = False,
) -> None:
    """Write all entries as a Parquet file; or as a folder of a flat FAISS file, its ids and metadata.

    Example: vitembed index export photos.index photos.parquet

    Example: vitembed index export photos.index photos-faiss
    """
    from vitembed.index import Index
    from vitembed.index.transfer import export_faiss, export_parquet

    as_table = out.suffix.lower() == ".parquet"
    with Index.open(index) as opened:
        rows = (export_parquet if as_table else export_faiss)(opened, out, overwrite=overwrite)
        figures = {"index": str(index), "out": str(out), "format": "parquet" if as_table else "faiss", "rows": rows}
    print_json(figures) if json else print_figures(figures)


def import_index(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="The index's folder; it is made when it is missing or empty.")
    ],
    file: Annotated[
        Path, typer.Argument(help="A .parquet table, a .npy file, a FAISS file, or a folder of `index export`.")
    ],
    ids: Annotated[
        Path | None,
        typer.Option(help="For .npy and FAISS files: a text file of an id a line, or .jsonl of id and metadata."),
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Scale the vectors to unit length, which they must have otherwise.")
    ] = False,
    id_column: Annotated[str, typer.Option(help="Of a table: texts or whole numbers.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Of a table: lists of numbers.")] = "vector",
    metadata_column: Annotated[
        str, typer.Option(help="Of a table: JSON objects or structs; without one all other columns are taken.")
    ] = "metadata",
    json: Json = False,
) -> None:
    """Add the vectors of a file, all of them or none; those whose ids are known replace the old ones.

    Example: vitembed index import photos.index photos.parquet

    Example: vitembed index import photos.index vectors.npy --ids ids.txt --normalise
    """
    from vitembed.index import Index
    from vitembed.index.transfer import TableColumns, import_file, index_from

    columns = TableColumns(id_column, vector_column, metadata_column)
    if not index.exists() or (index.is_dir() and not any(index.iterdir())):
        done = index_from(file, index, ids, columns, normalise)
    else:
        with Index.open(index) as opened:
            done = import_file(opened, file, ids, columns, normalise)
    if done.left_out:
        warn(f"these columns were not taken: {', '.join(done.left_out)}")
    with Index.open(index) as opened:
        figures = {"index": str(index), "imported": done.rows, "size": len(opened), "dim": opened.dim}
    if json:
        print_json({**figures, "left_out": done.left_out})
    else:
        print_figures(figures)
