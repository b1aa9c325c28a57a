"""`vitembed calibrate` and `vitembed verify`: a threshold with a known error rate, and decisions by it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitembed.cli.decisions import (
    STATUS,
    ModelFolder,
    ReferencesFolder,
    judge_ink,
    open_default_verifier,
    open_verifier,
    print_decision,
    say_default,
)
from vitembed.cli.enrolling import verify_identity
from vitembed.cli.evaluating import HeldOut, is_pairs, load_labelled, read_pairs
from vitembed.cli.models import DEFAULT, MODEL, location_of, open_model
from vitembed.cli.output import BatchSize, Device, Json, Seed, print_figures, print_json, warn
from vitembed.errors import ConfigError
from vitembed.layouts import require_identities

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.verify import Calibration, Verifier


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder DATA/IDENTITY/IMAGE or DATA/WRITER/genuine and forged, a .csv or .parquet: path,label, or a "
            ".csv of pairs: left,right,match."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The verifier file to write (JSON).")],
    far: Annotated[float, typer.Option(help="Wanted false-accept rate, in (0, 1).")] = 0.01,
    frr: Annotated[
        float | None,
        typer.Option(help="Share of matching pairs that may be called no match; between that and a match: unsure."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="skilled, random or all: pairs that --far is for; skilled ones where there are any."),
    ] = None,
    curve: Annotated[
        str, typer.Option(help="From score to probability: logistic, 'likelihood ratio', isotonic, or auto.")
    ] = "auto",
    prior: Annotated[float, typer.Option(help="Share of matching pairs that the probability supposes.")] = 0.5,
    test_identities: Annotated[
        int | None,
        typer.Option(min=1, help="For how many identities the intervals are; as many as in DATA by default."),
    ] = None,
    max_pairs: Annotated[
        int, typer.Option(min=2, help="Pairs to draw from a folder, half of them matching.")
    ] = 100_000,
    enrolled: Annotated[
        int, typer.Option(min=0, help="References that an identity will have; 0 to decide on pairs alone.")
    ] = 6,
    held_out: HeldOut = False,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Choose the threshold for a wanted false-accept rate; use images that the model was not trained on.

    Example: vitembed calibrate runs/photos photos/ --held-out --out photos.verifier --far 0.01 --frr 0.02
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: there is no folder {out.parent}; make it first")
    embedder = open_model(model, device)
    settings: dict[str, Any] = {"far": far, "frr": frr, "against": against, "prior": prior, "curve": curve}
    settings |= {"test_identities": test_identities, "location": location_of(model)}
    settings |= {"batch_size": batch_size, "progress": True}
    verifier, lacking = _fitted(embedder, data, held_out, settings, enrolled, max_pairs, seed)
    verifier.save(out)
    _warn_of_few(verifier.calibration)
    if lacking:
        warn(f"not calibrated for references ({lacking}); decisions on an identity will use the rates of pairs")
    references = verifier.references
    if json:
        by_references = None if references is None else references.to_dict()
        print_json({"verifier": str(out), **verifier.calibration.to_dict(), "references": by_references})
        return
    print_figures({"verifier": str(out), **_figures(verifier.calibration)})
    if references is not None:
        typer.echo(f"\nby {references.count} references of an identity, rule {references.rule.name}:")
        print_figures(_figures(references.calibration))


def verify(
    images: Annotated[list[Path], typer.Argument(help="Two images; with --identity the questioned one alone.")],
    verifier: Annotated[
        Path | None,
        typer.Option(
            help="A file that `vitembed calibrate` wrote; without one, the model of handwritten characters and the "
            "threshold that ship with vitembed."
        ),
    ] = None,
    identity: Annotated[
        str | None, typer.Option(metavar="NAME", help="Decide from the references of this enrolled identity.")
    ] = None,
    references: ReferencesFolder = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page: images, decision in words, why, and the small print.")
    ] = None,
    model: ModelFolder = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Decide whether two images match; exit status 0 for a match, 1 for none, 3 for unsure, 2 for an error.

    Example: vitembed verify a.png b.png --verifier photos.verifier --html decision.html

    Example: vitembed verify letter.png another.png

    Example: vitembed verify --identity alice questioned.png --verifier photos.verifier
    """
    wanted = 2 if identity is None else 1
    if len(images) != wanted:
        instead = "" if identity is None else f" beside --identity {identity}"
        raise ConfigError(f"expected {wanted} image{'s' * (wanted > 1)}{instead}; got {len(images)}")
    if identity is not None:
        if verifier is None:
            raise ConfigError(
                "--identity needs --verifier: references belong to a verifier of your own; make one with: "
                "vitembed calibrate MODEL DATA --out FILE, and then vitembed enroll"
            )
        return verify_identity(
            identity, images[0], verifier, references=references, model=model, device=device, html=html, json=json
        )
    if references is not None:
        raise ConfigError("--references goes with --identity")
    return _verify_pair(images, verifier, model, device, html, json)


def _verify_pair(
    images: list[Path], path: Path | None, model: str | None, device: str | None, html: Path | None, json: bool
) -> int:
    """Decide on two images, by the verifier that ships where none is named; print it, and return the exit status."""
    verifier, embedder = open_default_verifier(model, device) if path is None else open_verifier(path, model, device)
    decision = verifier.compare(*images)
    quality = judge_ink(embedder, images)
    people = "characters" if path is None else None
    said = (say_default(verifier.calibration),) if path is None else ()
    noted = replace(decision, notes=(*decision.notes, *said))
    if html is not None:
        from vitembed.decision_page import write_decision_page
        from vitembed.explain import explain_pair

        write_decision_page(
            html,
            noted,
            images,
            calibration=verifier.calibration,
            shared=explain_pair(embedder, *images),
            quality=quality,
            preprocess=embedder.preprocess,
            verifier=verifier,
            people=people,
        )
    if json:
        texts = [problem.text for one in quality for problem in one.problems]
        named = DEFAULT if path is None else str(path)
        print_json({**asdict(noted), "notes": [*noted.notes, *texts], "verifier": named})
    else:
        for line in said:
            warn(line)
        print_decision(decision, verifier.calibration, verifier.created, quality, people=people or "identities")
    return STATUS[decision.verdict]


def _warn_of_few(calibration: "Calibration") -> None:
    if calibration.identities is not None and calibration.far_interval is None:
        warn(
            f"only {calibration.identities} identities: the rates hold for these images, "
            "and nobody knows how they will be for others; calibrate on nine identities or more"
        )


def _figures(calibration: "Calibration") -> dict[str, object]:
    """Return the calibration for a table: the curve by its kind, what does not apply left out."""
    figures = {key: value for key, value in calibration.to_dict().items() if value is not None}
    figures["curve"] = calibration.curve.kind
    figures["prior"] = calibration.prior
    for kind, numbers in figures.pop("candidates").items():
        figures[f"{kind}: log-loss"] = numbers["log_loss"]
        figures[f"{kind}: calibration error"] = numbers["ece"]
    return figures


def _fitted(
    model: "Embedder",
    data: Path,
    held_out: bool,
    settings: dict[str, Any],
    enrolled: int,
    max_pairs: int,
    seed: int,
) -> "tuple[Verifier, str | None]":
    """Return the verifier for a table of pairs or for labelled images, and why it knows nothing of references."""
    from vitembed.verify import Verifier, fit_labelled

    if is_pairs(data):
        if held_out:
            raise ConfigError(f"--held-out goes with a folder; {data} names its pairs itself")
        return Verifier.fit(model, read_pairs(data), **settings), None
    dataset = load_labelled(model, data, held_out)
    require_identities(data, dataset.classes)
    whom = dataset.forgery_of
    settings |= {"count": enrolled, "max_pairs": max_pairs, "seed": seed}
    return fit_labelled(model, dataset.images, dataset.labels, whom, **settings)
