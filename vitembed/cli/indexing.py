"""`vitembed index ...` and `vitembed search`: an index of images on disk, kept up to date and searched."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.evaluating import expand_folders
from vitembed.cli.models import MODEL, find_model, location_of, open_model
from vitembed.cli.output import BatchSize, Device, Json, Workers, print_figures, print_json, print_table, warn

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.index import Index

FAULTY = 1  # exit status of a check that found something

IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.")]
ModelPath = Annotated[
    str | None, typer.Option(help="The model's folder, if it is no longer where the index was made with it.")
]

index_app = typer.Typer(no_args_is_help=True, help="Make an index of images, keep it up to date, look into it.")


@index_app.command()
def create(
    index: IndexPath,
    model: Annotated[str, typer.Option(help=f"The model whose embeddings it will hold. {MODEL}")],
    json: Json = False,
) -> None:
    """Make an empty index for the embeddings of a model.

    Example: vitembed index create photos.index --model runs/photos
    """
    from vitembed.index import Index

    embedder = open_model(model)
    with Index.create(index, embedder.dim, embedder.fingerprint, location=location_of(model)) as made:
        _print_info(made, json)


@index_app.command()
def sync(
    index: IndexPath,
    folder: Annotated[Path, typer.Argument(help="The folder of images to follow.")],
    model: ModelPath = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Bring an index up to date with a folder: new, changed and deleted images; bad files are set aside.

    Example: vitembed index sync photos.index photos/
    """
    from dataclasses import asdict

    from vitembed.index import Index
    from vitembed.index import sync as sync_folder

    with Index.open(index) as opened:
        embedder = _model_of(opened, model, device)
        report = sync_folder(opened, embedder, folder, batch_size=batch_size, progress=True, workers=workers)
        size = len(opened)
    for path, reason in report.failed.items():
        warn(f"set aside: {path}: {reason}")
    figures = {**asdict(report), "size": size}
    if json:
        print_json(figures)
    else:
        print_figures({**figures, "failed": len(report.failed)})


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
    from vitembed.index import Index

    with Index.open(index) as opened:
        embedder = _model_of(opened, model, device)
        # Absolute, as `sync` has paths below its folder: neither depends on where one stands, nor meets the other's.
        paths = [path.absolute() for path in expand_folders(images)]
        vectors = embedder.encode(paths, batch_size=batch_size, progress=True)
        opened.add([path.as_posix() for path in paths], vectors, [{"path": str(path)} for path in paths])
        _print_info(opened, json)


@index_app.command()
def remove(
    index: IndexPath,
    ids: Annotated[list[str], typer.Argument(help="Ids, as a search shows them.")],
    json: Json = False,
) -> None:
    """Remove entries by id; the images themselves stay where they are.

    Example: vitembed index remove photos.index cats/old.jpg
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        opened.remove(ids)
        _print_info(opened, json)


@index_app.command()
def info(index: IndexPath, json: Json = False) -> None:
    """Say what an index holds.

    Example: vitembed index info photos.index
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        _print_info(opened, json)


@index_app.command()
def check(index: IndexPath, json: Json = False) -> int:
    """Compare an index with its checksums; exit status 0 if all is well, 1 if not.

    Example: vitembed index check photos.index
    """
    from vitembed.index import Index

    with Index.open(index) as opened:
        problems = opened.check()
    if json:
        print_json({"index": str(index), "problems": problems})
    else:
        for line in problems or [f"{index}: no problems"]:
            typer.echo(line)
    return FAULTY if problems else 0


def search(
    index: IndexPath,
    queries: Annotated[list[Path], typer.Argument(metavar="QUERY...", help="Images to search with.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Hits for each query.")] = 10,
    model: ModelPath = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find the images of an index that are most alike to each query.

    Example: vitembed search photos.index cat.jpg -k 5
    """
    from dataclasses import asdict

    from vitembed.index import Index

    with Index.open(index) as opened:
        embedder = _model_of(opened, model, device)
        found = opened.search(embedder.encode(queries), k)
    if json:
        results = zip(queries, found, strict=True)
        print_json([{"query": str(query), "hits": [asdict(hit) for hit in hits]} for query, hits in results])
        return
    for query, hits in zip(queries, found, strict=True):
        typer.echo(f"{query}:" if hits else f"{query}: the index is empty")
        print_table([("", hit.score, hit.id) for hit in hits])


def _model_of(index: "Index", folder: str | None, device: str | None) -> "Embedder":
    """Load the model that an index belongs to.

    Raises:
        CheckpointError: if it is not known or not there.
        ModelMismatchError: if the folder holds another model by now.
    """
    embedder = open_model(find_model(index.path, index.location, folder), device)
    index.require_model(embedder.fingerprint)
    return embedder


def _print_info(index: "Index", json: bool) -> None:
    figures = {
        "index": str(index.path),
        "size": len(index),
        "dim": index.dim,
        "model": index.location,
        "fingerprint": index.fingerprint,
    }
    if json:
        print_json(figures)
    else:
        print_figures(figures)
