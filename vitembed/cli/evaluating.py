"""`vitembed evaluate` and `vitembed embed`: what a model makes of images, and how good that is."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from vitembed.cli.evaluation_reports import print_evaluation
from vitembed.cli.models import MODEL, open_model
from vitembed.cli.output import BatchSize, Device, Json, Seed, print_figures, print_json, warn
from vitembed.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitembed.embedder import Embedder
    from vitembed.evaluate import EvaluationReport, Task
    from vitembed.training import ImageDataset
    from vitembed.verify import Pairs, Verifier

HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Only the classes never trained on (they chose the best epoch).")
]


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder DATA/CLASS/IMAGE or DATA/WRITER/genuine and forged, a .csv or .parquet: path,label, or a "
            ".csv of pairs: left,right,match."
        ),
    ],
    gallery: Annotated[Path | None, typer.Option(help="Search the images of DATA in those of this folder.")] = None,
    few_shot: Annotated[
        list[str] | None, typer.Option(metavar="WAYSxSHOTS", help="Classify episodes such as 20x1; may be repeated.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="A .csv of left,right,match to verify instead of DATA.")] = None,
    verifier: Annotated[Path | None, typer.Option(help="Judge this verifier, made elsewhere, on the pairs.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="What the model was trained on: warn of what DATA shares with it.")
    ] = None,
    near: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Score of near-duplicates in --train; found out by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report as one HTML file.")] = None,
    held_out: HeldOut = False,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure a model on labelled images: as a search (recall, MAP@R) and as a verifier (equal error rate).

    Example: vitembed evaluate runs/photos photos/ --held-out --html report.html
    """
    from vitembed.evaluate import Task
    from vitembed.files import atomic_path
    from vitembed.verify import Verifier

    tasks = [Task.parse(text) for text in few_shot or ()]
    judged = None if verifier is None else Verifier.load(verifier)
    with atomic_path(html) if html else nullcontext() as temporary:  # before the work, so that an error comes at once
        embedder = open_model(model, device)
        settings: _Settings = {"verifier": judged, "batch_size": batch_size, "progress": True, "seed": seed}
        if is_pairs(data):
            _refuse_with_pairs(
                data, {"gallery": gallery, "few-shot": few_shot, "pairs": pairs, "train": train}, held_out
            )
            report = _evaluate_pairs(embedder, data, settings)
        else:
            report = _evaluate_images(embedder, data, held_out, (gallery, pairs, train), tasks, near, settings)
        for warning in report.split.warnings if report.split is not None else ():
            warn(warning)
        if temporary is not None:
            _write_page(temporary, report, embedder, model, data)
    if json:
        print_json(report.to_dict() | ({"report": str(html)} if html else {}))
    else:
        print_evaluation(report)


class _Settings(TypedDict):
    """What both ways of evaluating take."""

    verifier: "Verifier | None"
    batch_size: int
    progress: bool
    seed: int


def _evaluate_images(
    model: "Embedder",
    data: Path,
    held_out: bool,
    others: tuple[Path | None, Path | None, Path | None],
    tasks: "Sequence[Task]",
    near: float | None,
    settings: _Settings,
) -> "EvaluationReport":
    from vitembed.evaluate import evaluate_data
    from vitembed.training import ImageDataset

    gallery, pairs, train = others
    dataset = load_labelled(model, data, held_out)
    searched = None if gallery is None else ImageDataset.load(gallery)
    if searched is not None:
        _refuse_overlap(data, dataset, searched)
    return evaluate_data(
        model,
        dataset,
        gallery=searched,
        pairs=None if pairs is None else read_pairs(pairs),
        train=None if train is None else _trained_on(model, train, held_out),
        few_shot=tasks,
        near=near,
        **settings,
    )


def _refuse_overlap(data: Path, queries: "ImageDataset", gallery: "ImageDataset") -> None:
    """Refuse a gallery that holds the queries, which would find themselves, and forgeries, which belong to nobody."""
    if queries.forgery_of is not None or gallery.forgery_of is not None:
        raise ConfigError("--gallery is for identities without forgeries; name folders of genuine images")
    files = (
        {Path(image).resolve() for image in side.images if isinstance(image, str | Path)} for side in (queries, gallery)
    )
    if shared := set.intersection(*files):
        raise ConfigError(
            f"{len(shared)} images of {data} are in the gallery too, like {min(shared)}, and would find themselves; "
            "name other images, or leave --gallery out to search DATA among itself"
        )


def _trained_on(model: "Embedder", train: Path, held_out: bool) -> "ImageDataset":
    """Return the training images: without the classes that training held out, where these are judged."""
    from vitembed.training import ImageDataset

    dataset = ImageDataset.load(train)
    kept = dataset.with_classes(model.provenance.get("trained classes", ())) if held_out else dataset
    if kept is None:
        raise DataError(f"{train} has none of the classes that the model was trained on; is it the training data?")
    return kept


def _evaluate_pairs(model: "Embedder", data: Path, settings: _Settings) -> "EvaluationReport":
    from vitembed.evaluate import evaluate_given_pairs

    return evaluate_given_pairs(model, read_pairs(data), **settings)


def read_pairs(table: Path) -> "Pairs":
    """Read a table of pairs, and tell if some are of one file with itself."""
    from vitembed.verify import Pairs

    pairs = Pairs.from_csv(table)
    if pairs.one_sided:
        warn(f"{pairs.one_sided} of {len(pairs)} pairs are of one file with itself and tell nothing; leave them out")
    return pairs


def is_pairs(data: Path) -> bool:
    """Tell whether a file is a table of pairs, by its header; what cannot be read is left to whoever reads it."""
    if data.suffix.lower() != ".csv" or not data.is_file():
        return False
    with data.open(encoding="utf-8-sig", errors="replace") as file:
        header = {name.strip().strip('"').lower() for name in file.readline().split(",")}
    return {"left", "right", "match"} <= header


def _refuse_with_pairs(data: Path, options: dict[str, object], held_out: bool) -> None:
    given = [name for name, value in options.items() if value] + (["held-out"] if held_out else [])
    if given:
        raise ConfigError(f"--{given[0]} goes with images and their classes; {data} is a table of pairs")


def _write_page(file: Path, report: "EvaluationReport", model: "Embedder", name: str, data: Path) -> None:
    from datetime import UTC, datetime

    from vitembed.evaluation_page import write_evaluation_page

    about = [f"Model {name} ({model.fingerprint[:19]}…) on {data}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."]
    write_evaluation_page(file, report, title=f"Evaluation of {Path(name).name}", about=about)


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
