"""An evaluation as tables for people."""

from typing import TYPE_CHECKING

import typer

from vitembed.cli.output import print_table

if TYPE_CHECKING:
    from vitembed.evaluate import EvaluationReport, Figure, ReferencesReport, VerificationReport

_IDENTITIES = 5  # shown, the worst first

_Row = tuple[str, str, str]


def print_evaluation(report: "EvaluationReport") -> None:
    """Print the figures with their intervals, a section at a time; the worst identities; and how pairs were made."""
    if report.retrieval is not None:
        counts = f"{report.retrieval.queries:,} queries, {report.retrieval.classes:,} classes"
        searched = "among each other" if report.retrieval.gallery is None else f"in {report.retrieval.gallery:,} images"
        _section(
            f"retrieval ({counts}, {searched})", [_row(name, one) for name, one in report.retrieval.figures.items()]
        )
    if report.few_shot:
        rows = [_row(f"{few.task.name} accuracy", few.accuracy) for few in report.few_shot]
        _section(f"few-shot, ways x shots ({report.few_shot[0].episodes:,} episodes)", rows)
    _print_verification(report.verification)
    if report.references is not None:
        _print_references(report.references)
    typer.echo("\n95 % intervals in brackets; --json says what each figure means")


def _print_references(report: "ReferencesReport") -> None:
    enrolled = f"{report.enrolled:,} of {report.identities:,} identities have more images"
    if not report.rules:
        typer.echo(f"\nno verification with {report.count} references: {enrolled}")
    for rule, verification in report.rules.items():
        kinds = verification.kinds or {"": verification.overall}
        rows = [_row(f"eer {kind}".strip(), one.eer) for kind, one in kinds.items()]
        _section(f"verification with {report.count} references, score by {rule} ({enrolled})", rows)


def _print_verification(report: "VerificationReport") -> None:
    counts = f"{report.matches:,} matching pairs, {report.non_matches:,} others"
    kinds = report.kinds or {"": report.overall}
    rows = [
        _row(f"{name} {kind}".strip(), figure)
        for kind, separation in kinds.items()
        for name, figure in separation.figures().items()
    ]
    if report.mean_identity_eer is not None:
        rows.append(("mean eer of identities", _percent(report.mean_identity_eer), ""))
    _section(f"verification ({counts})", rows)
    if report.decision is not None:
        decision = report.decision
        rates = {
            "far": decision.far,
            "far random": decision.far_random,
            "far skilled": decision.far_skilled,
            "frr": decision.frr,
        }
        rows = [_row(name, rate) for name, rate in rates.items() if rate is not None]
        _section(f"the verifier at its threshold {decision.threshold:.4f} (wanted far {decision.far_wanted:.2%})", rows)
        for sentence in (decision.choice, decision.expectation):
            if sentence is not None:
                typer.echo(sentence)
        if report.probabilities is not None:
            figures = report.probabilities.to_dict()
            _section("its probabilities", [(name, f"{value:.4f}", "") for name, value in figures.items()])
    worst = [one for one in report.identities if one.error > 0][:_IDENTITIES]
    if worst:
        typer.echo(f"\nworst identities at the threshold {report.mistakes.threshold:.4f}")
        header = ("", "frr", "far random", "far skilled")
        rates_of = [(one.identity, one.frr, one.far_random, one.far_skilled) for one in worst]
        print_table(
            [
                header,
                *((name, *("-" if rate is None else _percent(rate) for rate in rates)) for name, *rates in rates_of),
            ]
        )


def _section(heading: str, rows: list[_Row]) -> None:
    typer.echo(f"\n{heading}")
    print_table(rows)


def _row(name: str, figure: "Figure | None") -> _Row:
    if figure is None:
        return name, "-", "too few pairs"
    interval = "" if figure.interval is None else f"({_percent(figure.interval[0])} to {_percent(figure.interval[1])})"
    return name, _percent(figure.value), interval


def _percent(rate: float) -> str:
    return f"{100 * rate:6.2f} %"
