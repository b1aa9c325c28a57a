"""`vitembed explain`: pictures of what a model looks at."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitembed.cli.models import MODEL, open_model
from vitembed.cli.output import Device, Json, print_figures, print_json

Fusion = Literal["mean", "max", "min"]


def explain(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[list[Path], typer.Argument(help="Images.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures (PNG), named after the images.")],
    fusion: Annotated[Fusion, typer.Option(help="How the heads of a block become one: mean, max or min.")] = "mean",
    discard: Annotated[
        float, typer.Option(help="Share of each token's weakest attentions that is left out, in [0, 1).")
    ] = 0.0,
    pair: Annotated[
        bool, typer.Option("--pair", help="Of exactly two images, also draw which patches carry their score.")
    ] = False,
    distances: Annotated[
        bool, typer.Option("--distances", help="Also draw how far each head looks, by layer; take 100 images or so.")
    ] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Draw what a model looks at: attention rollout over each image, and what two images share.

    Example: vitembed explain runs/photos a.jpg b.jpg --out pictures --pair
    """
    from vitembed.explain import explain as explain_images

    embedder = open_model(model, device)
    found = explain_images(embedder, images, out, fusion=fusion, discard=discard, pair=pair, distances=distances)
    if json:
        print_json({"model": model, "fusion": fusion, "discard": discard, **found.to_dict()})
        return
    for picture in found.files:
        typer.echo(picture)
    if found.shared is not None:
        typer.echo()
        print_figures({name: value for name, value in found.shared.to_dict().items() if isinstance(value, float)})
