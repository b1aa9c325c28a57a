"""`vitembed export`: a model for other programs, or a cheaper or larger variant of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitembed.cli.evaluating import expand_folders
from vitembed.cli.models import MODEL, open_model
from vitembed.cli.output import Json, print_figures, print_json
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder

Format = Literal["onnx", "vitembed"]


def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Option(help="The .onnx file to write; with --format vitembed a new folder.")],
    format: Annotated[
        Format, typer.Option(help="onnx, for programs without torch; vitembed, a model of its own.")
    ] = "onnx",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="For square images of another side; positions are resampled.")
    ] = None,
    merge: Annotated[
        int | None, typer.Option(min=0, help="Tokens that each block merges away: faster, no longer exact; 0 for none.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Images or folders to check an ONNX file with, up to 64 of them; else two photographs."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a model as an ONNX file, refused if its embeddings differ; or as a model of another size or speed.

    Example: vitembed export runs/photos --out photos.onnx
    """
    if images and format != "onnx":
        raise ConfigError("--images checks an ONNX file; leave it out with --format vitembed")
    embedder = open_model(model, "cpu")
    if image_size is not None or merge is not None:
        embedder = embedder.replace(image_size=image_size, merge=merge)
    figures = {"model": model, "format": format, "fingerprint": embedder.fingerprint, "dim": embedder.dim}
    figures |= _write(embedder, out, format, images)
    if json:
        print_json(figures)
    else:
        shown = {name: value for name, value in figures.items() if value is not None}
        print_figures({name: f"{value:.1e}" if isinstance(value, float) else value for name, value in shown.items()})


def _write(embedder: "Embedder", out: Path, format: Format, images: list[Path] | None) -> dict[str, object]:
    """Write the model, and return what there is to say about that."""
    from vitembed.export import export_folder, export_onnx

    if format == "vitembed":
        export_folder(embedder, out)
        return {"folder": str(out)}
    written = export_onnx(embedder, out, check_images=expand_folders(images) if images else None)
    return {
        "file": str(written.path),
        "weights in": None if written.data_path is None else str(written.data_path),
        "bytes": written.size,
        "opset": written.opset,
        "largest distance": written.largest_distance,
        "images": written.images,
    }
