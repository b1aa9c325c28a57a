"""`vitembed index sync` and `vitembed index migrate`: an index that follows a folder, or takes another model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.indexes import open_index
from vitembed.cli.models import MODEL, find_model, location_of, open_model
from vitembed.cli.output import BatchSize, Device, IndexPath, Json, Workers, print_figures, print_json, warn

if TYPE_CHECKING:
    from vitembed.index import Index

# How many of the files that cannot be used are named one by one; --json has all of them.
NAMED = 10


def sync(
    index: IndexPath,
    folder: Annotated[Path, typer.Argument(help="The folder of images to follow.")],
    model: Annotated[
        str | None, typer.Option(help="The model's folder, if it is no longer where the index was made with it.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try the files that were set aside again, although they did not change.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring an index up to date with a folder: new, changed and deleted images; bad files are set aside.

    Stopped or killed, it goes on where it stood when it is called again.

    Example: vitembed index sync photos.index photos/
    """
    from dataclasses import asdict

    from vitembed.index import sync as sync_folder

    with open_index(index) as opened:
        embedder = open_model(find_model(opened.path, opened.location, model), device)
        with _goes_on(opened, "sync"):
            report = sync_folder(
                opened, embedder, folder, batch_size=batch_size, progress=True, workers=workers, retry=retry
            )
        size = len(opened)
    _name_failed(report.failed)
    figures = {**asdict(report), "size": size}
    if json:
        print_json(figures)
    else:
        print_figures({**figures, "failed": len(report.failed)})


def migrate(
    index: IndexPath,
    model: Annotated[str, typer.Option(help=f"The new model. {MODEL}")],
    missing: Annotated[
        str, typer.Option(help="When files cannot be read: stop, with the index unchanged, or drop their entries.")
    ] = "stop",
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an unfinished migration has embedded, and begin again.")
    ] = False,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Embed an index's images again, with another model; the old embeddings are searched until all are done.

    Stopped or killed, it goes on where it stood when it is called again.

    Example: vitembed index migrate photos.index --model runs/better

    Example: vitembed index migrate photos.index --model runs/better --missing drop
    """
    from dataclasses import asdict

    from vitembed.index import Index
    from vitembed.index.migrate import Missing, UnreadableFilesError
    from vitembed.index.migrate import migrate as migrate_index

    choice: Missing = missing  # type: ignore[assignment]  # checked there
    with Index.open(index) as opened:
        embedder = open_model(model, device)
        known = opened.optimization
        try:
            with _goes_on(opened, "migration"):
                report = migrate_index(
                    opened,
                    embedder,
                    batch_size=batch_size,
                    workers=workers,
                    progress=True,
                    missing=choice,
                    location=location_of(model),
                    restart=restart,
                )
        except UnreadableFilesError as error:
            _name_failed(error.failed, "cannot be read", "--missing drop --json lists")
            raise
    _name_failed(report.failed)
    if known and known.file:
        warn(f"searches are exact until you run: vitembed index optimize {index}")
    figures = {"index": str(index), "model": location_of(model), **asdict(report)}
    if json:
        print_json(figures)
    else:
        print_figures({**figures, "failed": len(report.failed)})


@contextmanager
def _goes_on(index: "Index", what: str) -> Iterator[None]:
    """Say, when Ctrl-C or SIGTERM ends the block, that what was done is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = f"{len(index):,} images are in {index.path}" if what == "sync" else f"{index.path} is as it was"
        typer.echo(f"vitembed: {what} stopped; {kept}; the same command goes on where it stopped", err=True)
        raise


def _name_failed(failed: Mapping[str, str], what: str = "set aside", all_of_them: str = "--json lists") -> None:
    for path, reason in list(failed.items())[:NAMED]:
        warn(f"{what}: {path}: {reason}")
    if len(failed) > NAMED:
        warn(f"{what}: {len(failed) - NAMED:,} more; {all_of_them} all of them")
