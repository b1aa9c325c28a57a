"""`vitembed pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from vitembed.cli.networks import NETWORK, Binarize, Ink, Pooling, Scan, Stem, new_embedder
from vitembed.cli.output import Device, Json, Seed, Workers, print_figures, print_json, warn
from vitembed.cli.training import SETTINGS, Precision
from vitembed.errors import unknown_name

TASKS = ("jigsaw",)
PUZZLE = "Puzzle"  # a group of options in --help


def pretrain(
    data: Annotated[Path, typer.Argument(help="A folder of images of any depth, or a .csv or .parquet table.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; go on with: vitembed train --init.")],
    task: Annotated[str, typer.Option(help="What is learned: jigsaw.")] = "jigsaw",
    arch: Annotated[
        str, typer.Option(help="Size/patch: N Ti S B L H; N/4 for small images.", rich_help_panel=NETWORK)
    ] = "S/16",
    stem: Annotated[
        Stem | None, typer.Option(help="linear, or conv (the default), as for train.", rich_help_panel=NETWORK)
    ] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Side in pixels.", rich_help_panel=NETWORK)] = 224,
    pooling: Annotated[
        Pooling, typer.Option(help="Of the embedding to train later: cls or mean.", rich_help_panel=NETWORK)
    ] = "cls",
    dim: Annotated[
        int | None, typer.Option(min=1, help="Width of the embedding to train later.", rich_help_panel=NETWORK)
    ] = None,
    ink: Ink = False,
    scan: Scan = False,
    binarize: Binarize = False,
    tile: Annotated[int, typer.Option(min=1, help="Side of a tile, in patches.", rich_help_panel=PUZZLE)] = 1,
    mask: Annotated[float, typer.Option(help="Share of the tiles that is hidden.", rich_help_panel=PUZZLE)] = 0.1,
    min_contrast: Annotated[
        float, typer.Option(help="Grey levels' deviation below which a tile is blank.", rich_help_panel=PUZZLE)
    ] = 8.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.", rich_help_panel=SETTINGS)] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.", rich_help_panel=SETTINGS)] = 128,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="The highest.", rich_help_panel=SETTINGS)
    ] = 1e-3,
    augment: Annotated[
        str | None,
        typer.Option(help="none, ink or photo; by default ink with --ink, else photo.", rich_help_panel=SETTINGS),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the arithmetic; auto is bf16 where CUDA has it.", rich_help_panel=SETTINGS)
    ] = "auto",
    device: Device = None,
    workers: Workers = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that --out holds.")] = False,
    json: Json = False,
) -> None:
    """Pre-train a network on images without labels, for `vitembed train --init` to go on from.

    Example: vitembed pretrain photos/ --task jigsaw --out runs/jigsaw

    Example: vitembed pretrain letters/ --out runs/jigsaw --arch N/4 --image-size 28 --ink --epochs 40
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    from vitembed.training import Augment
    from vitembed.training.jigsaw import JigsawConfig, pretrain_jigsaw, unlabelled_images

    settings = JigsawConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        tile=tile,
        mask=mask,
        min_contrast=min_contrast,
        augment=Augment.named(augment or ("ink" if ink or scan else "photo")),
        precision=precision,
        workers=workers,
        seed=seed,
    )
    dataset = unlabelled_images(data)
    model = new_embedder(
        device,
        seed,
        arch=arch,
        stem=stem,
        image_size=image_size,
        pooling=pooling,
        dim=dim,
        ink=ink,
        scan=scan,
        binarize=binarize,
    )
    result = pretrain_jigsaw(model, dataset, config=settings, out=out, overwrite=overwrite, progress=True)
    if result.accuracy <= result.chance:
        warn("it places tiles no better than a constant answer would: nothing has been learned yet; train longer")
    figures = {"model": str(out), "jigsaw accuracy": result.accuracy, "chance": result.chance}
    if json:
        print_json({**figures, "history": result.history, "fingerprint": model.fingerprint})
    else:
        print_figures(figures)
        typer.echo(f"\nNext: vitembed train LABELLED --init {out} --out MODEL")
