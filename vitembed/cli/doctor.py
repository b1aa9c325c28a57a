"""`vitembed doctor`."""

import typer

from vitembed.cli.output import Json, print_json

FAULTY = 1  # exit status when something should be mended


def doctor(json: Json = False) -> int:
    """Look at versions, devices, threads and caches, and say what to mend; exit status 1 if anything.

    Example: vitembed doctor
    """
    from dataclasses import asdict

    from vitembed.doctor import examine

    findings = examine()
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            typer.echo(f"{'ok ' if finding.ok else 'BAD'}  {finding.topic:<{width}}  {finding.found}")
            if finding.advice:
                typer.echo(f"     {'':<{width}}  -> {finding.advice}")
    return 0 if all(finding.ok for finding in findings) else FAULTY
