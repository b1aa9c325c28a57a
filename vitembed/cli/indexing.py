"""`vitembed index ...`: an index of images on disk: made, changed, optimised, checked."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.evaluating import expand_folders
from vitembed.cli.indexes import open_index
from vitembed.cli.models import DEFAULT, MODEL, find_model, location_of, open_model
from vitembed.cli.output import BatchSize, Device, IndexPath, Json, print_figures, print_json, print_table, warn
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.index import Index

FAULTY = 1  # exit status of a check that found something

ModelPath = Annotated[
    str | None, typer.Option(help="The model's folder, if it is no longer where the index was made with it.")
]

index_app = typer.Typer(no_args_is_help=True, help="Make an index of images, keep it up to date, look into it.")


@index_app.command()
def create(
    index: IndexPath,
    model: Annotated[
        str | None, typer.Option(help=f"The model whose embeddings it will hold. {MODEL} By default {DEFAULT}.")
    ] = None,
    json: Json = False,
) -> None:
    """Make an empty index for the embeddings of a model; for vectors of your own use `import`.

    Example: vitembed index create photos.index --model runs/photos

    Example: vitembed index create letters.index
    """
    from vitembed.index import Index

    name = DEFAULT if model is None else model
    embedder = open_model(name)
    with Index.create(index, embedder.dim, embedder.fingerprint, location=location_of(name)) as made:
        if model is None:
            warn(
                f"no --model was given: {index} is for embeddings of {DEFAULT}, the model of handwritten characters "
                "that ships with vitembed; for photos or signatures name a model of your own"
            )
        _print_info(made, json)


@index_app.command()
def add(
    index: IndexPath,
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders of images; their absolute paths become ids.")
    ],
    model: ModelPath = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Add single images under their paths; to follow a whole folder use `sync`.

    Example: vitembed index add photos.index new.jpg
    """
    from vitembed.index.inputs import checked_ids

    with open_index(index) as opened:
        embedder = _model_of(opened, model, device)
        # Absolute, as `sync` has paths below its folder: neither depends on where one stands, nor meets the other's.
        named = {Path(os.path.normpath(path.absolute())).as_posix(): path for path in expand_folders(images)}
        ids, paths = checked_ids(named), [Path(name) for name in named]
        vectors = embedder.encode(paths, batch_size=batch_size, progress=True)
        opened.add(ids, vectors, [{"path": str(path)} for path in paths])
        _print_info(opened, json)


@index_app.command()
def remove(
    index: IndexPath,
    ids: Annotated[list[str], typer.Argument(help="Ids, as a search shows them.")],
    json: Json = False,
) -> None:
    """Remove entries by id; the images themselves stay where they are. `compact` gives the space back.

    Example: vitembed index remove photos.index cats/old.jpg
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        opened.remove(ids)
        _print_info(opened, json)


@index_app.command()
def annotate(
    index: IndexPath,
    table: Annotated[Path, typer.Argument(help="A .csv table with a column `id`; the other columns are the metadata.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop the metadata that the entries have; `path` stays.")
    ] = False,
    json: Json = False,
) -> None:
    """Give entries metadata to filter by; a cell that JSON reads as a number, true, false or null is taken for one.

    Example: vitembed index annotate photos.index years.csv
    """
    from vitembed.index import Index
    from vitembed.index.annotations import annotate_from_table

    with Index.open(index) as opened:
        changed = annotate_from_table(opened, table, replace)
    figures = {"index": str(index), "annotated": changed}
    print_json(figures) if json else print_figures(figures)


@index_app.command("list")
def list_entries(
    index: IndexPath,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FILTER", help="Only entries that match, as in `search`; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """List the ids of an index, and with --json their metadata, in the order in which they were last added.

    Example: vitembed index list photos.index --where 'year>=2020'
    """
    from vitembed.index import Index
    from vitembed.index.filters import parse_texts

    with Index.open(index) as opened:
        entries = opened.entries(parse_texts(where or []))
    if json:
        print_json([{"id": name, "metadata": metadata} for name, metadata in entries.items()])
    else:
        for name in entries:
            typer.echo(name)


@index_app.command()
def info(index: IndexPath, json: Json = False) -> None:
    """Say what an index holds.

    Example: vitembed index info photos.index
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        _print_info(opened, json)


@index_app.command()
def optimize(
    index: IndexPath,
    recall: Annotated[
        float, typer.Option(help="Share of the true hits that a search must find; 1 goes back to exact search.")
    ] = 0.95,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most that the structure may take, such as 500MB or 2GB.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="hnsw, ivf, ivfpq or exact; by default chosen by size, memory and measurement.")
    ] = None,
    json: Json = False,
) -> None:
    """Make searches faster at a known recall, which is measured on entries kept out meanwhile.

    Call it again when many entries were added: they are searched beside the structure until then.

    Example: vitembed index optimize photos.index --recall 0.98 --memory 2GB
    """
    from dataclasses import asdict

    from vitembed.index import Index

    with Index.open(index) as opened:
        chosen = opened.optimize(recall, None if memory is None else _bytes(memory), kind, progress=True)
    if json:
        print_json(asdict(chosen))
        return
    point = chosen.point()
    print_figures(
        {
            "kind": f"{chosen.kind} ({chosen.reason})",
            "entries": chosen.entries,
            "memory (MB)": chosen.memory / 1e6,
            "recall": point.recall if point else None if chosen.file else 1.0,
            "ms a query": point.ms if point else chosen.exact_ms,
            "ms a query, exact": chosen.exact_ms,
            "seconds": chosen.seconds,
        }
    )
    if len(chosen.curve) > 1:
        typer.echo("effort, recall and ms a query, for `Index.search(..., effort=...)`:")
        print_table([(one.effort, one.recall, one.ms) for one in chosen.curve])


@index_app.command()
def compact(index: IndexPath, json: Json = False) -> None:
    """Write the vectors anew without those of removed and replaced entries; run `optimize` again afterwards.

    Example: vitembed index compact photos.index
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        known = opened.optimization
        dropped = opened.compact()
        if known and known.file and opened.optimization is None:
            warn(f"searches are exact again until you run: vitembed index optimize {index}")
    figures = {"index": str(index), "dropped": dropped}
    print_json(figures) if json else print_figures(figures)


@index_app.command()
def check(
    index: IndexPath,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what can be made again.")] = False,
    json: Json = False,
) -> int:
    """Compare an index with its checksums; exit status 0 if all is well (or repaired), 1 if not.

    Example: vitembed index check photos.index --repair
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        problems = opened.check()
        left = opened.check(repair=True) if repair and problems else problems
    if json:
        print_json({"index": str(index), "problems": left, "repaired": [line for line in problems if line not in left]})
    else:
        for line in problems:
            typer.echo(line if line in left else f"repaired: {line}")
        if not problems:
            typer.echo(f"{index}: no problems")
    return FAULTY if left else 0


def _model_of(index: "Index", folder: str | None, device: str | None) -> "Embedder":
    """Load the model that an index belongs to.

    Raises:
        CheckpointError: if it is not known or not there.
        ModelMismatchError: if the folder holds another model by now.
    """
    embedder = open_model(find_model(index.path, index.location, folder), device)
    index.require_model(embedder.fingerprint)
    return embedder


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(text: str) -> int:
    """Return a size such as 500MB in bytes.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it as 500MB or 2GB")
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])


def _print_info(index: "Index", json: bool) -> None:
    from vitembed.index import set_aside

    with index.snapshot() as rows:
        chosen, dead = rows.optimization, len(rows.mask) - rows.live
        beside = 0 if rows.tail is None else int(rows.tail.sum())
    figures = {
        "index": str(index.path),
        "size": len(index),
        "dim": index.dim,
        "model": index.location,
        "fingerprint": index.fingerprint,
        "dtype": index.dtype,
        "structure": chosen.kind if chosen else "exact",
        "beside_structure": beside,
        "dead_rows": dead,
        "set_aside": len(set_aside(index)),
    }
    print_json(figures) if json else print_figures({name.replace("_", " "): value for name, value in figures.items()})
