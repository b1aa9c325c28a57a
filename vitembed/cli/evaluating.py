"""`vitembed evaluate` and `vitembed embed`: what a model makes of images, and how good that is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.models import MODEL, open_model
from vitembed.cli.output import BatchSize, Device, Json, print_figures, print_json, warn
from vitembed.errors import DataError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.training import ImageDataset

HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Only the classes never trained on (they chose the best epoch).")
]


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[Path, typer.Argument(help="A folder DATA/CLASS/IMAGE, or a .csv or .parquet: path,label.")],
    held_out: HeldOut = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure a model on labelled images: as a search (recall, MAP@R) and as a verifier (equal error rate).

    Example: vitembed evaluate runs/photos photos/ --held-out
    """
    from vitembed.evaluate import evaluate as evaluate_model

    embedder = open_model(model, device)
    dataset = load_labelled(embedder, data, held_out)
    report = evaluate_model(embedder, dataset.images, dataset.labels, batch_size=batch_size, progress=True)
    if json:
        print_json(report.to_dict())
    else:
        print_figures(report.to_dict())


def embed(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write: paths and vectors.")],
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Embed images into a .npz file with the arrays `paths` and `vectors` (rows of length 1).

    Example: vitembed embed runs/photos photos/ --out vectors.npz
    """
    import numpy as np

    from vitembed.files import atomic_path

    embedder = open_model(model, device)
    paths = expand_folders(images)
    with atomic_path(out) as temporary:  # before the work, so that a folder that cannot be written is known at once
        vectors = embedder.encode(paths, batch_size=batch_size, progress=True)
        with temporary.open("wb") as file:
            np.savez(file, paths=np.array([str(path) for path in paths]), vectors=vectors)
    figures = {"file": str(out), "images": len(paths), "dim": embedder.dim, "fingerprint": embedder.fingerprint}
    if json:
        print_json(figures)
    else:
        print_figures(figures)


def load_labelled(model: "Embedder", data: Path, held_out: bool) -> "ImageDataset":
    """Read labelled images, and say so where the model has been trained on some of them.

    Raises:
        DataError: if the held-out classes are wanted and the model does not know them, or the data has none of them.
    """
    from vitembed.training import ImageDataset

    dataset = ImageDataset.load(data)
    known = model.provenance.get("held-out classes")
    if not held_out:
        trained = set(model.provenance.get("trained classes", ())) & set(dataset.classes)
        if trained:
            remedy = "; --held-out takes the others" if known else ", and it held none out"
            warn(f"{len(trained)} of the {len(dataset.classes)} classes are named as those it was trained on{remedy}")
        return dataset
    if not known:
        raise DataError(
            "the model records no held-out classes; train it with --validation classes, or leave --held-out"
        )
    seen = set(known) & set(model.provenance.get("pre-trained on", ()))
    if seen:
        warn(f"images of {len(seen)} of the {len(known)} held-out classes were seen, without labels, in pre-training")
    kept = dataset.with_classes(known)
    if kept is None:
        raise DataError(f"{data} has none of the classes that the training held out; is it the training data?")
    return kept


def expand_folders(paths: list[Path]) -> list[Path]:
    """Return images as they are, and the images under folders in their place."""
    from vitembed.images import list_images

    return [image for path in paths for image in (list_images(path) if path.is_dir() else [path])]
