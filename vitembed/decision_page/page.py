"""The page of one decision: warnings, verdict, images, reasons and small print, from top to bottom."""

import html
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from vitembed.decision_page import pictures, scale
from vitembed.decision_page.pictures import Picture, draw_maps, draw_pair, draw_references, map_legend, name_of
from vitembed.errors import ConfigError, VectorError, unknown_name
from vitembed.files import atomic_write
from vitembed.images import ImageSource
from vitembed.preprocess import Preprocess
from vitembed.report import Page
from vitembed.verify import Calibration, Verifier
from vitembed.verify.quality import Quality
from vitembed.verify.words import (
    HEADLINES,
    SIGNS,
    Terms,
    digits_needed,
    how_often_it_errs,
    how_probable,
    where_it_lies,
)

if TYPE_CHECKING:
    from vitembed.explain import Shared

_COSINES = ("mean", "max", "centre")  # rules whose score lies on the scale of the single references' scores

_STYLE = """
:root { --unsure: #8a6100; } @media (prefers-color-scheme: dark) { :root { --unsure: #e3b341; } }
.verdict { display: flex; gap: 1rem; align-items: center; margin: 1rem 0; padding: .5rem 1.1rem; border: 2px solid;
  border-left-width: 12px; border-radius: 6px; max-width: none; font-size: 1.5rem; font-weight: 650; }
.verdict span { font-size: 2.2rem; line-height: 1.1; }
.verdict.match { color: var(--right); } .verdict.no { color: var(--wrong); } .verdict.unsure { color: var(--unsure); }
.warnings { margin: 1rem 0; padding: .5rem 1rem; border: 2px dashed var(--unsure); border-radius: 6px;
  list-style: none; } .warnings li { overflow-wrap: anywhere; } .warnings li::before { content: "\\26A0\\00A0"; }
.reasons { margin: 1rem 0; } .reasons p { margin: .4rem 0; max-width: none; }
.reasons p:first-child { font-weight: 600; }
.small { width: 100%; font-size: .8rem; } .small th, .small td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
.small th { font-weight: 500; white-space: nowrap; } .small td { text-align: left; }
@media print { @page { size: A4; margin: 12mm; } :root { font-size: 9.5pt; }
  body { font-size: 1rem; line-height: 1.35; } h2 { margin: .8rem 0 .2rem; }
  .pair { grid-template-columns: 1fr 1fr; gap: .6rem; } .pair svg { max-height: 4.5cm; }
  .reasons, .verdict, .warnings { margin: .5rem 0; } .faint { margin: .2rem 0; max-width: none; }
  .verdict { padding: .2rem .9rem; } .references { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
  figure, .small { break-inside: avoid; } }
"""


class Decided(Protocol):
    """What the page reads of a decision; `vitembed.verify.Decision` is one, and that on an identity's references."""

    @property
    def verdict(self) -> str:
        """`match`, `no match` or `unsure`."""

    @property
    def probability(self) -> float:
        """That it matches, in [0, 1]."""

    @property
    def score(self) -> float:
        """What was decided on."""

    @property
    def threshold(self) -> float:
        """From which score on it matches."""

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of this decision."""


def write_decision_page(
    path: str | os.PathLike[str],
    decision: Decided,
    images: Sequence[ImageSource],
    *,
    calibration: Calibration,
    names: Sequence[str] | None = None,
    shared: "Shared | None" = None,
    references: Sequence[ImageSource | None] = (),
    reference_scores: Sequence[float] = (),
    quality: Sequence[Quality] = (),
    identity: str | None = None,
    preprocess: Preprocess | None = None,
    verifier: Verifier | None = None,
    people: str | None = None,
    title: str | None = None,
) -> None:
    """Write one decision as an HTML file that works offline, wholly or not at all.

    Args:
        path: the file; its folder must exist.
        decision: of a `Verifier` or an `Enrolment`.
        images: the two that were compared; or the questioned one, alone or with the reference that is closest to it.
        calibration: that the decision was made by.
        names: what the images are called; their files' names by default.
        shared: what the two images share (`vitembed.explain.explain_pair`), drawn over them.
        references: of the identity, each shown; one that cannot be read leaves the reason in its place, None is one
            whose image is not kept.
        reference_scores: the cosine of the questioned image with each reference; empty if not known.
        quality: what `vitembed.verify.judge_quality` found, for each image in order; may be shorter. Problems become
            warnings above the verdict, as do the decision's notes.
        identity: whose references they are; None for a decision on two images.
        preprocess: of the model: where it cleans scans, the page shows them cleaned, and `shared` is drawn where it
            belongs. None shows images as they are.
        verifier: for the small print: which model, and when it was calibrated.
        people: what identities are, in the plural; "people" where `preprocess` cleans scans, else "identities".
        title: of the page.

    Raises:
        ConfigError: the verdict is none, there are not one or two images, `shared` has not two, or lengths differ.
        ImageError: one of the images cannot be read.
        VectorError: a score is NaN or infinite, or a map of `shared` is no finite (rows, columns) array.
        VitembedError: the file cannot be written.
    """
    called = [name_of(image, n) for n, image in enumerate(images, 1)] if names is None else list(names)
    _check_counts(len(images), len(called), shared is not None, len(references), len(reference_scores))
    if decision.verdict not in SIGNS:
        raise unknown_name("verdict", decision.verdict, SIGNS)
    _check_scores([decision.score, decision.threshold, decision.probability, *reference_scores])
    shown = [Picture.read(image, name, preprocess) for image, name in zip(images, called, strict=True)]
    scan = preprocess is not None and preprocess.scan
    people = people or ("people" if scan else "identities")
    page = Page(title or _title(called, identity))
    page.add(style=pictures.STYLE + scale.STYLE + _STYLE)
    _add_warnings(page, called, quality, decision.notes)
    _add_verdict(page, decision.verdict)
    digits = digits_needed(decision.score, decision.threshold)
    gallery = draw_references(references, reference_scores, preprocess, digits) if references else ""
    owner = "References" if identity is None else f"References of {identity}"
    page.add(draw_pair(shown, gallery if len(shown) == 1 else "", owner))
    terms = Terms.of_pairs(people) if identity is None else Terms.of_references(people)
    known = identity is None or verifier is None or verifier.references is not None
    _add_reasons(page, decision, calibration, terms if known else None, "" if verifier is None else verifier.created)
    _add_scale(page, decision, calibration, reference_scores)
    if gallery and len(shown) > 1:
        page.heading(owner)
        page.add(gallery)
    if shared is not None:
        page.heading("Where the score comes from")
        page.add(map_legend("the handwriting" if scan else "what the images show"))
        page.add(draw_maps(shown, [shared.first, shared.second], preprocess))
    page.heading("Small print")
    page.add(_small_print(_facts(decision, calibration, verifier, terms)))
    # A file's name may hold bytes that are no text.
    atomic_write(path, page.html().encode("utf-8", "replace"))


def _check_counts(images: int, names: int, shared: bool, references: int, scores: int) -> None:
    if images not in (1, 2):
        raise ConfigError(f"a decision is shown with one or two images; got {images}")
    if names != images:
        raise ConfigError(f"there must be a name for each image; got {names} for {images}")
    if shared and images != 2:
        raise ConfigError(f"what two images share needs both of them; got {images}")
    if scores not in (0, references):
        raise ConfigError(f"there must be a score for each reference, or none; got {scores} for {references}")


def _check_scores(scores: Sequence[float]) -> None:
    if not all(map(math.isfinite, scores)):
        raise VectorError("scores must be finite; got NaN or infinity")


def _title(names: Sequence[str], identity: str | None) -> str:
    if identity is not None:
        return f"Does {names[0]} match {identity}?"
    return f"Do {' and '.join(names)} match?" if len(names) > 1 else names[0]


def _add_warnings(page: Page, names: Sequence[str], quality: Sequence[Quality], notes: Sequence[str]) -> None:
    found = [(name, problem.text) for name, judged in zip(names, quality, strict=False) for problem in judged.problems]
    texts = [f"{name}: {text}" for name, text in found if text not in notes]  # an `Enrolment` has them in its notes
    if texts := [*texts, *notes]:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        page.add(f'<ul class=warnings aria-label="Warnings">{items}</ul>')


def _add_verdict(page: Page, verdict: str) -> None:
    """Add the answer, told by sign, words and colour."""
    sign = f"<span aria-hidden=true>{SIGNS[verdict]}</span>"
    page.add(f'<p class="verdict {verdict.split()[0]}">{sign}{HEADLINES[verdict]}</p>')


def _add_scale(page: Page, decision: Decided, calibration: Calibration, reference_scores: Sequence[float]) -> None:
    # The single scores are cosines; where the decision's score is none, they have no place beside it.
    single = reference_scores if getattr(decision, "rule", "mean") in _COSINES else ()
    below = _reject_below(decision, calibration)
    page.add(scale.draw_scale(decision.score, decision.threshold, below, single))


def _reject_below(decision: Decided, calibration: Calibration) -> float | None:
    """Return where the unsure band begins; None without one, also where this decision's line is another."""
    below = calibration.reject_below
    return None if below is None or below >= decision.threshold else below


def _add_reasons(page: Page, decision: Decided, calibration: Calibration, terms: Terms | None, created: str) -> None:
    """Say why in words; without terms the calibration is not of such decisions and says nothing of their errors."""
    place = where_it_lies(decision.verdict, decision.score, decision.threshold, _reject_below(decision, calibration))
    paragraphs = [place, "How often such a decision errs is not known: the verifier was calibrated for pairs alone."]
    if terms is not None:
        errors = " ".join(how_often_it_errs(calibration, terms, created))
        paragraphs = [place, errors, how_probable(decision.probability, calibration.prior, decision.verdict)]
    page.add(f"<div class=reasons>{''.join(f'<p>{html.escape(text)}</p>' for text in paragraphs)}</div>")


def _facts(
    decision: Decided, calibration: Calibration, verifier: Verifier | None, terms: Terms
) -> list[tuple[str, str]]:
    """Return the small print: what a second reviewer needs to check or repeat the decision."""
    rule = getattr(decision, "rule", None)
    facts = [] if rule is None else [("Rule", f"one score of all references: {rule}")]
    kinds = [
        (calibration.matches, "matching"),
        (calibration.random, "random"),
        (calibration.skilled, "skilled forgeries"),
    ]
    counts = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    identities = "" if calibration.identities is None else f"; {calibration.identities:,} {terms.people}"
    facts.append(("Measured on", f"{counts}{identities}"))
    facts.append(
        (
            "False accepts",
            f"{calibration.far_wanted:.3g} wanted ({calibration.against} pairs), {calibration.far:.3g} measured",
        )
    )
    facts.append(("Equal error rate", f"{calibration.eer:.3g}"))
    if calibration.interval_identities is not None:
        others = terms.people if calibration.identities is not None else terms.trials
        facts.append(("Ranges", f"hold for 95 of 100 other groups of {calibration.interval_identities:,} {others}"))
    facts.append(("Protocol", calibration.protocol))
    if verifier is not None:
        facts.append(("Verifier", f"calibrated {verifier.created or 'at an unknown time'}"))
        facts.append(
            ("Model", f"{verifier.fingerprint or 'unknown'}{f', {verifier.location}' if verifier.location else ''}")
        )
    facts.append(("Page written", datetime.now(UTC).isoformat(timespec="seconds")))
    return facts


def _small_print(facts: Sequence[tuple[str, str]]) -> str:
    rows = (
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts if text
    )
    return f"<table class=small>{''.join(rows)}</table>"
