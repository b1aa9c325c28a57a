"""`vitembed enroll`, `vitembed identify` and `vitembed verify --identity`: decisions from references of identities."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitembed.cli.decisions import (
    STATUS,
    ModelFolder,
    ReferencesFolder,
    VerifierFile,
    judge_ink,
    open_verifier,
    print_decision,
)
from vitembed.cli.evaluating import expand_folders
from vitembed.cli.output import BatchSize, Device, Json, print_figures, print_json, print_table, warn
from vitembed.errors import ConfigError

if TYPE_CHECKING:
    from vitembed.embedder import Embedder
    from vitembed.verify import Calibration, Enrolment, ReferenceDecision, Verifier


def enroll(
    verifier: VerifierFile,
    identity: Annotated[str | None, typer.Argument(help="Whose references they are.")] = None,
    images: Annotated[list[Path] | None, typer.Argument(help="Images, or folders of images.")] = None,
    references: ReferencesFolder = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the identity with all of its references.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Show who is enrolled.")] = False,
    model: ModelFolder = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Keep images as references of an identity, remove an identity, or list all of them.

    Example: vitembed enroll alice a.png b.png c.png --verifier photos.verifier

    Example: vitembed enroll alice --remove --verifier photos.verifier

    Example: vitembed enroll --list --verifier photos.verifier
    """
    if list_all and (identity or remove):
        raise ConfigError("--list shows everybody; leave the identity and --remove out")
    if not list_all and identity is None:
        raise ConfigError("there is nobody to enrol; name an identity and its images, or give --list")
    if identity is not None and Path(identity).is_file():
        raise ConfigError(f"{identity} is an image; name the identity first, then its images")
    if remove and images:
        raise ConfigError("--remove takes an identity with all of its references; leave the images out")
    if list_all or remove:
        with _open_enrolment(verifier, references) as enrolled:
            if list_all:
                _print_identities(enrolled.identities(), json)
            else:
                figures = {"identity": str(identity), "removed": enrolled.remove(str(identity))}
                print_json(figures) if json else print_figures(figures)
        return
    paths = expand_folders(images or [])
    with _open_enrolment(verifier, references, model=model, device=device, embeds=True) as enrolled:
        report = enrolled.enroll(str(identity), paths, batch_size=batch_size, progress=len(paths) > batch_size)
        folder = str(enrolled.path)
    for image, problems in report.problems.items():
        for problem in problems:
            warn(f"{image}: {problem}")
    if json:
        from dataclasses import asdict

        print_json({**asdict(report), "folder": folder})
        return
    added, known = len(report.added), len(report.known)
    figures = {"identity": report.identity, "added": added, "known already": known, "references": report.references}
    print_figures({**figures, "folder": folder})


def identify(
    image: Annotated[Path, typer.Argument(help="The questioned image.")],
    verifier: VerifierFile,
    references: ReferencesFolder = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Candidates to show.")] = 5,
    model: ModelFolder = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Find whom an image shows among all enrolled; exit status 0 for somebody, 1 for nobody, 3 unsure, 2 an error.

    Example: vitembed identify questioned.png --verifier photos.verifier -k 3
    """
    with _open_enrolment(verifier, references, model=model, device=device, embeds=True) as enrolled:
        found = enrolled.identify(image, k)
        known = enrolled.verifier.references is not None
    if json:
        from dataclasses import asdict

        print_json(asdict(found))
        return STATUS[found.verdict]
    first = found.candidates[0]
    for note in dict.fromkeys((*found.notes, *first.notes)):
        warn(note)
    answer = {"match": f"match: {found.best}", "unsure": f"unsure: perhaps {first.identity}", "no match": "no match"}
    typer.echo(f"{answer[found.verdict]}, of {found.compared:,} enrolled; threshold {found.threshold:.4f}")
    print_table([("", each.score, each.verdict, each.identity) for each in found.candidates])
    if known:
        typer.echo(f"of strangers, at most {found.false_positive_rate:.2%} are taken for one of them")
    return STATUS[found.verdict]


def verify_identity(
    identity: str,
    image: Path,
    verifier: Path,
    *,
    references: Path | None = None,
    model: str | None = None,
    device: str | None = None,
    html: Path | None = None,
    json: bool = False,
) -> int:
    """Decide whether an image shows an enrolled identity, print it, and return the exit status.

    Args:
        identity: a name as it was enrolled.
        image: the questioned image.
        verifier: the verifier's file.
        references: the folder of the references; None for the one beside the verifier.
        model: where the model is; None for where the verifier was made with it.
        device: where it runs.
        html: a page of the decision to write.
        json: print one JSON document.
    """
    from vitembed.verify import Enrolment

    loaded, embedder = open_verifier(verifier, model, device)
    with Enrolment.open(references_folder(verifier, references), loaded) as enrolled:
        decision = enrolled.verify(identity, image)
        calibration = enrolled.calibration
    if html is not None:
        _write_page(html, decision, image, loaded, embedder, calibration)
    if json:
        from dataclasses import asdict

        print_json(asdict(decision))
    else:
        many = "1 reference" if len(decision.cosines) == 1 else f"{len(decision.cosines)} references"
        by = f"{decision.identity}, by {many}, rule {decision.rule}\n"
        print_decision(decision, calibration, loaded.created, by=by, known=loaded.references is not None)
    return STATUS[decision.verdict]


def _write_page(
    path: Path,
    decision: "ReferenceDecision",
    image: Path,
    verifier: "Verifier",
    model: "Embedder",
    calibration: "Calibration",
) -> None:
    """Write the page of a decision: the image beside its closest reference, and all references."""
    from vitembed.decision_page import write_decision_page
    from vitembed.explain import explain_pair

    closest = decision.references[max(range(len(decision.cosines)), key=decision.cosines.__getitem__)]
    beside = [] if closest is None or not Path(closest).is_file() else [Path(closest)]
    write_decision_page(
        path,
        decision,
        [image, *beside],
        calibration=calibration,
        shared=explain_pair(model, image, beside[0]) if beside else None,
        references=decision.references,
        reference_scores=decision.cosines,
        quality=judge_ink(model, [image]),
        identity=decision.identity,
        preprocess=model.preprocess,
        verifier=verifier,
    )


def references_folder(verifier: Path, references: Path | None) -> Path:
    """Return the folder of the references: the one that was named, or `photos.references` beside `photos.verifier`.

    Raises:
        ConfigError: the verifier's own name ends in `.references`.
    """
    folder = references or verifier.with_suffix(".references")
    if folder == verifier:
        raise ConfigError(f"{verifier} cannot be both verifier and references; name their folder with --references")
    return folder


def _open_enrolment(
    verifier: Path,
    references: Path | None,
    *,
    model: str | None = None,
    device: str | None = None,
    embeds: bool = False,
) -> "Enrolment":
    """Open the references that go with a verifier; the model only where it is needed to embed."""
    from vitembed.verify import Enrolment, Verifier

    loaded = open_verifier(verifier, model, device)[0] if embeds else Verifier.load(verifier)
    return Enrolment.open(references_folder(verifier, references), loaded)


def _print_identities(counts: dict[str, int], json: bool) -> None:
    if json:
        print_json(counts)
    elif counts:
        print_table(list(counts.items()))
    else:
        typer.echo("nobody is enrolled")
