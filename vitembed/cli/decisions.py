"""What commands that decide have in common: the verifier's file, exit statuses, and decisions in words or as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.models import DEFAULT, find_model, open_model
from vitembed.cli.output import warn
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.verify import Calibration, Decision, ReferenceDecision, Verdict, Verifier
    from vitembed.verify.quality import Quality

# Exit statuses; 2 is an error, as everywhere.
STATUS: "dict[Verdict, int]" = {"match": 0, "no match": 1, "unsure": 3}

VerifierFile = Annotated[Path, typer.Option(help="A file that `vitembed calibrate` wrote.")]
ReferencesFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Of the references; beside the verifier by default.")
]
ModelFolder = Annotated[
    str | None, typer.Option(help="The model's folder, if it is no longer where the verifier was made with it.")
]


def open_verifier(path: Path, model: str | None, device: str | None) -> "tuple[Verifier, Embedder]":
    """Read a verifier together with its model."""
    from vitembed.verify import Verifier

    location = Verifier.load(path).location
    embedder = open_model(find_model(path, location, model), device)
    return Verifier.load(path, embedder), embedder


def open_default_verifier(model: str | None, device: str | None) -> "tuple[Verifier, Embedder]":
    """Read the verifier that ships with vitembed, together with its model.

    Raises:
        ConfigError: another model is named, for which that verifier's threshold means nothing.
    """
    from vitembed.weights import shipped_verifier

    if model not in (None, DEFAULT):
        raise ConfigError(
            f"--model needs --verifier, as a threshold belongs to its model; make one with: "
            f"vitembed calibrate {model} DATA --out FILE"
        )
    return open_verifier(shipped_verifier(DEFAULT), DEFAULT, device)


def say_default(calibration: "Calibration") -> str:
    """Return the line that says whose threshold decides where no verifier was named, and what it is good for."""
    whom = "" if calibration.identities is None else f"{calibration.identities:,} "
    return (
        f"no --verifier was given: judged by {DEFAULT}, the model of handwritten characters that ships with vitembed; "
        f"its threshold is for a false-accept rate of {100 * calibration.far_wanted:g} %, chosen on pairs of {whom}"
        "Omniglot characters of alphabets not seen in training, with a sister model; signatures and photos need a "
        "verifier of their own: vitembed calibrate MODEL DATA --out FILE"
    )


def judge_ink(model: "Embedder", images: Sequence[Path]) -> "list[Quality]":
    """Return what is wrong with images as ink; an empty list where the model reads none.

    Raises:
        ImageError: one is blank.
    """
    from vitembed.verify.quality import reads_ink, require_ink

    return [require_ink(image) for image in images] if reads_ink(model.preprocess) else []


def print_decision(
    decision: "Decision | ReferenceDecision",
    calibration: "Calibration",
    created: str,
    quality: "Sequence[Quality]" = (),
    *,
    by: str = "",
    known: bool = True,
    people: str = "identities",
) -> None:
    """Print a decision for the person who answers for it; what needs attention goes to standard error.

    Args:
        decision: of two images, or of an identity's references.
        calibration: that it was made by.
        created: when that was measured.
        quality: of the images.
        by: whose references it was decided by, in words.
        known: whether the calibration is of such decisions: that of pairs says nothing of several references.
        people: what identities are, in the plural.
    """
    from vitembed.verify.words import Terms, how_often_it_errs, how_probable, where_it_lies

    for note in (*decision.notes, *(problem.text for one in quality for problem in one.problems)):
        warn(note)
    terms = Terms.of_references(people) if by else Terms.of_pairs(people)
    typer.echo(f"{decision.verdict}: {by}score {decision.score:.4f}, threshold {decision.threshold:.4f}")
    if decision.verdict == "unsure":
        typer.echo(where_it_lies(decision.verdict, decision.score, decision.threshold, calibration.reject_below))
    if not known:
        typer.echo("how often such a decision errs is not known; `vitembed calibrate` needs more images for that")
        return
    typer.echo(how_probable(decision.probability, calibration.prior, decision.verdict))
    for sentence in how_often_it_errs(calibration, terms, created):
        typer.echo(sentence)
