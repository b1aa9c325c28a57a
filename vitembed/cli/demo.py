"""`vitembed demo`."""

from pathlib import Path
from typing import Annotated

import typer

from vitembed.cli.output import Json, Seed, print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the index and report.html.")] = Path("vitembed-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Of training; 40 take about a minute on two cores.")] = 40,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Do the whole job on real handwritten digits: train, measure, index, search, verify; nothing is downloaded.

    Example: vitembed demo --out vitembed-demo
    """
    from vitembed.demo import NEXT_COMMANDS, WHAT_IT_SHOWS, run_demo

    result = run_demo(out, seed=seed, epochs=epochs, say=lambda line: typer.echo(line, err=json))
    if json:
        print_json(result.to_dict())
        return
    typer.echo(f"\n{WHAT_IT_SHOWS}\n")
    typer.echo(f"Done in {result.seconds:.0f} s. Open {result.folder / 'report.html'} in a browser.")
    typer.echo("Next, with your own folder:\n")
    for command in NEXT_COMMANDS:
        typer.echo(f"    {command}")
