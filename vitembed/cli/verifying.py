"""`vitembed calibrate` and `vitembed verify`: a threshold with a known error rate, and decisions by it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.evaluating import HeldOut, load_labelled
from vitembed.cli.models import MODEL, find_model, location_of, open_model
from vitembed.cli.output import BatchSize, Device, Json, Seed, print_figures, print_json, warn
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.verify import Pairs

NO_MATCH = 1  # exit status, as `cmp` and `diff` have it


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[Path, typer.Argument(help="A folder DATA/IDENTITY/IMAGE, or a table of left,right,match.")],
    out: Annotated[Path, typer.Option(help="The verifier file to write (JSON).")],
    far: Annotated[float, typer.Option(help="Wanted false-accept rate, in (0, 1).")] = 0.01,
    max_pairs: Annotated[
        int, typer.Option(min=2, help="Pairs to draw from a folder, half of them matching.")
    ] = 100_000,
    held_out: HeldOut = False,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose the threshold for a wanted false-accept rate; use images that the model was not trained on.

    Example: vitembed calibrate runs/photos photos/ --held-out --out photos.verifier --far 0.01
    """
    from dataclasses import asdict

    from vitembed.verify import Verifier

    embedder = open_model(model, device)
    pairs = _pairs(embedder, data, held_out, max_pairs, seed)
    location = location_of(model)
    verifier = Verifier.fit(embedder, pairs, far, location=location, batch_size=batch_size, progress=True)
    verifier.save(out)
    if verifier.calibration.identities is not None and verifier.calibration.far_interval is None:
        warn(
            f"only {verifier.calibration.identities} identities: the rates hold for these images, "
            "and nobody knows how they will be for others; calibrate on ten identities or more"
        )
    figures = {"verifier": str(out), **asdict(verifier.calibration)}
    if json:
        print_json(figures)
    else:
        print_figures(figures)


def verify(
    left: Annotated[Path, typer.Argument(help="An image.")],
    right: Annotated[Path, typer.Argument(help="Another image.")],
    verifier: Annotated[Path, typer.Option(help="A file that `vitembed calibrate` wrote.")],
    model: Annotated[
        str | None, typer.Option(help="The model's folder, if it is no longer where the verifier was made with it.")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Decide whether two images match; exit status 0 for a match, 1 for none, 2 for an error.

    Example: vitembed verify a.png b.png --verifier photos.verifier
    """
    from dataclasses import asdict, replace

    from vitembed.verify import Verifier

    loaded = Verifier.load(verifier)
    folder = find_model(verifier, loaded.location, model)
    bound = replace(loaded, model=open_model(folder, device))
    decision = bound.compare(left, right)
    if json:
        print_json(asdict(decision))
    else:
        calibration = bound.calibration
        word = "match" if decision.match else "no match"
        typer.echo(f"{word}: score {decision.score:.4f}, threshold {decision.threshold:.4f}")
        typer.echo(f"probability of a match, were both answers equally likely before: {decision.probability:.4f}")
        typer.echo(
            f"at this threshold {calibration.far:.2%} of non-matching and {calibration.frr:.2%} of matching pairs "
            f"were judged wrongly ({calibration.non_matches:,} and {calibration.matches:,} pairs)"
        )
    return 0 if decision.match else NO_MATCH


def _pairs(model: "Embedder", data: Path, held_out: bool, max_pairs: int, seed: int) -> "Pairs":
    from vitembed.verify import Pairs

    if data.is_file():
        if held_out:
            raise ConfigError(f"--held-out goes with a folder; {data} names its pairs itself")
        return Pairs.from_csv(data)
    dataset = load_labelled(model, data, held_out)
    return Pairs.from_labels(dataset.images, dataset.labels, max_pairs=max_pairs, seed=seed)
