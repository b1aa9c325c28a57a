"""The page of an evaluation: figures with intervals and definitions, curves, and the mistakes as pictures.

One HTML file that works offline. Everything on it is in the report; the images are only looked at for thumbnails, and
one that cannot be read leaves its reason in its place.
"""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from vitembed import metrics, plots
from vitembed.errors import ImageError
from vitembed.evaluate import EvaluationReport, Figure, IdentityErrors, Separation
from vitembed.images import ImageSource, load_image
from vitembed.report import Page, picture_data

IDENTITIES = 30
"""Identities whose errors are shown, the worst first."""

_LABEL = 40  # characters of an image's name that are shown; the rest is in its title
_SIDE = 200  # pixels of a thumbnail's longer side

_STYLE = """
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.mistake { border: 1px solid var(--line); border-radius: 6px; padding: .6rem; font-size: .8rem; line-height: 1.35; }
.mistake div { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.mistake p { margin: .2rem 0 0; overflow-wrap: anywhere; } .mistake .missing { height: 7rem; }
.mistake img { width: 100%; height: 7rem; object-fit: contain; background: #fff; border-radius: 3px; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.2rem; } .figures figure { flex: 1 1 24rem; }
.alert { border-left: 5px solid var(--wrong); padding: .2rem .8rem; overflow-wrap: anywhere; }
dl { max-width: 48rem; font-size: .88rem; } dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1rem; }
"""

Curves = dict[str, tuple[ArrayLike, ArrayLike]]


def write_evaluation_page(
    path: str | os.PathLike[str],
    report: EvaluationReport,
    *,
    title: str = "Evaluation",
    about: Sequence[str] = (),
) -> None:
    """Write an evaluation as one HTML file, wholly or not at all.

    Args:
        path: the file; its folder must exist.
        report: what was measured.
        title: of the page.
        about: paragraphs below the title: which model, which data.

    Raises:
        VitembedError: the file cannot be written.
    """
    draw_evaluation_page(report, title=title, about=about).write(path)


def draw_evaluation_page(report: EvaluationReport, *, title: str = "Evaluation", about: Sequence[str] = ()) -> Page:
    """Return the page; arguments are as in `write_evaluation_page`."""
    page = Page(_text(title))
    page.add(style=_STYLE)
    for line in about:
        page.paragraph(_text(line))
    if report.split is not None:
        _add_split(page, report)
    _add_verification(page, report)
    _add_references(page, report)
    _add_retrieval(page, report)
    _add_decision(page, report)
    _add_curves(page, report)
    _add_identities(page, report.verification.identities)
    _add_mistakes(page, report)
    page.heading("Definitions")
    told = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in report.definitions.items())
    page.add("<dl>" + "".join(told) + "</dl>")
    return page


# Figures --------------------------------------------------------------------------------------------------


def _add_split(page: Page, report: EvaluationReport) -> None:
    assert report.split is not None
    for line in report.split.warnings:
        page.add(f"<p class=alert><b>Perhaps not unseen:</b> {html.escape(_text(line))}</p>")
    if not report.split.warnings:
        page.paragraph(
            f"No identity, file or near-duplicate is shared with the {report.split.train_images:,} images trained on.",
            faint=True,
        )


def _add_verification(page: Page, report: EvaluationReport) -> None:
    verification = report.verification
    page.heading("Verification")
    kinds = verification.kinds or {"all": verification.overall}
    columns = {f"against {kind}" if verification.kinds else "": separation for kind, separation in kinds.items()}
    _add_separations(page, columns)
    counts = " and ".join(f"{one.non_matches:,} {kind} ones" for kind, one in kinds.items())
    page.paragraph(
        f"{verification.matches:,} matching pairs against {counts.replace('all ones', 'non-matching ones')}, of "
        f"{report.paired_images:,} images. {verification.protocol}",
        faint=True,
    )
    if verification.mean_identity_eer is not None:
        page.paragraph(
            f"The mean of the equal error rates of single identities is {verification.mean_identity_eer:.2%}."
        )


def _add_separations(page: Page, columns: Mapping[str, Separation]) -> None:
    names = list(next(iter(columns.values())).figures())
    rows = {_called(name): [one.figures()[name] for one in columns.values()] for name in names}
    _add_figures(page, "", [name or "measured" for name in columns], rows)


def _add_figures(page: Page, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[Figure | None]]) -> None:
    """Add a table of figures, each with its interval beside it; where none has one, that is said below."""
    known = any(figure is not None and figure.interval is not None for row in rows.values() for figure in row)
    header = [corner]
    for column in columns:
        header += [column, "95 %"] if known else [column]
    page.table(header, [[name, *(cell for one in row for cell in _cells(one, known))] for name, row in rows.items()])
    if not known:
        page.paragraph(
            "No intervals: they need nine known identities, and figures that differ between draws of these.", faint=True
        )


def _add_references(page: Page, report: EvaluationReport) -> None:
    references = report.references
    if references is None:
        return
    page.heading(f"With {references.count} references")
    page.paragraph(
        f"{references.enrolled:,} of {references.identities:,} identities have more than {references.count} genuine "
        "images and are judged."
    )
    if not references.rules:
        return
    kinds = ["skilled", "random"] if any(one.kinds for one in references.rules.values()) else [""]
    rows = {
        rule: [
            one.overall.eer if not one.kinds else one.kinds[kind].eer if kind in one.kinds else None for kind in kinds
        ]
        for rule, one in references.rules.items()
    }
    _add_figures(page, "score by", [f"EER, {kind}" if kind else "EER" for kind in kinds], rows)
    own = {rule: one.mean_identity_eer for rule, one in references.rules.items()}
    means = ", ".join(f"{mean:.2%} by {rule}" for rule, mean in own.items() if mean is not None)
    page.paragraph(f"The mean of the equal error rates of single identities is {means}.")
    page.paragraph(references.protocol, faint=True)


def _add_retrieval(page: Page, report: EvaluationReport) -> None:
    if report.retrieval is not None:
        page.heading("Retrieval")
        _add_figures(
            page, "", ["measured"], {_called(name): [figure] for name, figure in report.retrieval.figures.items()}
        )
        where = "among each other" if report.retrieval.gallery is None else f"in {report.retrieval.gallery:,} others"
        page.paragraph(
            f"{report.retrieval.queries:,} of {report.retrieval.images:,} images of {report.retrieval.classes:,} "
            f"classes were searched {where}; the rest has nothing to find.",
            faint=True,
        )
    if report.few_shot:
        page.heading("Few-shot classification")
        rows = {f"{few.task.ways} ways, {few.task.shots} shots": [few.accuracy] for few in report.few_shot}
        _add_figures(page, "", ["accuracy"], rows)


def _add_decision(page: Page, report: EvaluationReport) -> None:
    decision, probabilities = report.verification.decision, report.verification.probabilities
    raw = report.verification.raw_probabilities
    if decision is None:
        return
    page.heading("The verifier's decisions")
    rates = {
        "false-accept rate": decision.far,
        "... of random pairs": decision.far_random,
        "... of skilled forgeries": decision.far_skilled,
        "false-reject rate": decision.frr,
    }
    _add_figures(page, "", ["measured"], {name: [rate] for name, rate in rates.items() if rate is not None})
    text = decision.choice
    if decision.expectation is not None:
        text += f" {decision.expectation}"
    if decision.unsure is not None:
        text += f" It is unsure of {decision.unsure:.2%} of all pairs."
    page.paragraph(text)
    if probabilities is None:
        return
    named = {"the verifier's probability": probabilities} | ({} if raw is None else {"(1 + cosine) / 2": raw})
    rows = [[name, f"{one.brier:.4f}", f"{one.log_loss:.4f}", f"{one.ece:.4f}"] for name, one in named.items()]
    page.table(["", "Brier score", "log-loss", "ECE"], rows)
    page.figure(
        plots.plot_reliability({name: one.reliability for name, one in named.items()}),
        "Reliability: on the diagonal, that share of the pairs with a stated probability match. Right, how many pairs "
        "have which probability. Both kinds of pair are weighted to the share that is supposed.",
    )


def _add_curves(page: Page, report: EvaluationReport) -> None:
    pairs, verification = report.pairs, report.verification
    curves: Curves = {}
    fewest = pairs.is_match.size
    for name, chosen in (pairs.kinds or {"all pairs": ~pairs.is_match}).items():
        both = pairs.is_match | chosen
        curve = metrics.det_curve(pairs.scores[both], pairs.is_match[both])
        curves[f"against {name}" if pairs.kinds else name] = (curve.far, curve.frr)
        fewest = min(fewest, int(np.count_nonzero(chosen)), int(np.count_nonzero(pairs.is_match)))
    page.heading("Curves")
    lowest = float(np.clip(0.7 / fewest, 1e-5, 0.1))  # below the lowest rate that can be seen
    page.add("<div class=figures>")
    page.figure(plots.plot_roc(curves, lowest=lowest), "Receiver operating characteristic, on these pairs.")
    page.figure(
        plots.plot_det(curves, lowest=max(lowest, 1e-4)),
        "Detection error trade-off, both axes on the scale of normal deviates: lower is better.",
    )
    page.add("</div>")
    kinds = {"matching": pairs.scores[pairs.is_match]}
    others = {name: pairs.scores[chosen] for name, chosen in pairs.kinds.items()}
    kinds |= others or {"non-matching": pairs.scores[~pairs.is_match]}
    whose = "the verifier's" if verification.decision is not None else "that of equal error rates, a posteriori"
    page.figure(
        plots.plot_scores(kinds, verification.mistakes.threshold),
        f"Scores by kind of pair, each with an area of one; the threshold is {whose}.",
    )


def _add_identities(page: Page, identities: Sequence[IdentityErrors]) -> None:
    if not identities:
        return
    shown = identities[:IDENTITIES]
    page.heading("Errors by identity")
    rates = {
        "wrongly rejected": [one.frr for one in shown],
        "random pairs accepted": [one.far_random for one in shown],
        "skilled forgeries accepted": [one.far_skilled for one in shown],
    }
    caption = f"The {len(shown):,} worst of {len(identities):,} identities" if len(identities) > len(shown) else "All"
    page.figure(
        plots.plot_identity_errors([one.identity for one in shown], rates),
        f"{caption}, the worst first, at the threshold above.",
    )
    rows = [
        [
            _short(one.identity),
            *(_share(rate) for rate in (one.frr, one.far_random, one.far_skilled, one.eer)),
            *(f"{count:,}" for count in (one.matches, one.random + one.skilled)),
        ]
        for one in shown
    ]
    header = ["identity", "FRR", "FAR, random", "FAR, skilled", "own EER", "matching", "others"]
    if all(one.far_skilled is None for one in shown):
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    page.table(header, rows)


# Mistakes -------------------------------------------------------------------------------------------------


def _add_mistakes(page: Page, report: EvaluationReport) -> None:
    mistakes = report.verification.mistakes
    root = _common_folder(report.images)
    groups = (
        ("Worst false accepts", mistakes.false_accepts, mistakes.accepted, "pairs that do not match were accepted"),
        ("Worst false rejects", mistakes.false_rejects, mistakes.rejected, "matching pairs were rejected"),
    )
    for heading, positions, total, what in groups:
        page.heading(heading)
        shown = f"; these are the {len(positions)} worst" if total > len(positions) else ""
        page.paragraph(f"{total:,} {what} at the threshold {mistakes.threshold:.4f}{shown}.", faint=True)
        if positions:
            page.add("<div class=mistakes>" + "".join(_mistake(report, at, root) for at in positions) + "</div>")


def _mistake(report: EvaluationReport, at: int, root: str) -> str:
    pairs = report.pairs
    score = f"score {pairs.scores[at]:.4f}"
    if pairs.skilled is not None and pairs.skilled[at]:
        score += ", a skilled forgery"
    sides = []
    for side in (0, 1):
        source = report.images[int(pairs.images[at, side])] if pairs.images is not None and len(report.images) else None
        whom = "" if pairs.identities is None else pairs.names[int(pairs.identities[at, side])]
        sides.append(_side(source, whom, root))
    return f"<div class=mistake><div>{''.join(sides)}</div><p><b>{score}</b></p></div>"


def _side(source: ImageSource | None, whom: str, root: str) -> str:
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    label = html.escape(_short(os.path.relpath(path, root) if path and root else path or whom))
    picture = _thumbnail(source) if source is not None else "no picture"
    if isinstance(picture, str):
        shown = f"<p class=missing>{html.escape(_text(picture))}</p>"
    else:
        shown = f'<img src="{picture_data(picture, _SIDE)}" alt="{label}">'
    return f'<figure style="margin:0" title="{html.escape(_text(path))}">{shown}<p>{label}</p></figure>'


def _common_folder(images: Sequence[ImageSource]) -> str:
    """Return the folder that all images lie in; empty where there is none, or an image is in memory."""
    paths = [os.fspath(image) for image in images if isinstance(image, str | os.PathLike)]
    try:
        return os.path.commonpath([Path(path).parent for path in paths]) if len(paths) == len(images) else ""
    except ValueError:  # on two drives, or some absolute and some not
        return ""


def _thumbnail(source: ImageSource) -> Image.Image | str:
    """Return a picture, upright and small; or, as a text, why it cannot be read."""
    try:
        image = load_image(source)
    except ImageError as error:
        return error.reason
    image.thumbnail((_SIDE, _SIDE))
    return image


# Words ----------------------------------------------------------------------------------------------------


def _called(name: str) -> str:
    names = {"eer": "equal error rate (EER)", "auc": "area under the ROC curve", "map@r": "MAP@R", "map": "mAP"}
    names |= {"r-precision": "R-precision", "mrr": "MRR", "nmi": "NMI"}
    return names.get(name, name.replace("tar@far=", "TAR at FAR ").replace("-nn ", "-NN "))


def _cells(figure: Figure | None, with_interval: bool) -> list[str]:
    value = "too few pairs" if figure is None else f"{figure.value:.2%}"
    bounds = None if figure is None else figure.interval
    interval = "" if bounds is None else f"{bounds[0]:.2%} to {bounds[1]:.2%}"
    return [value, interval] if with_interval else [value]


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1%}"


def _short(name: str) -> str:
    return _text(name if len(name) <= _LABEL else "…" + name[1 - _LABEL :])


def _text(text: str) -> str:
    """Return text that can be written as UTF-8, whatever bytes a file's name is made of."""
    return text.encode("utf-8", "replace").decode()
