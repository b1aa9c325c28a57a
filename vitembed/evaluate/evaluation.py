"""The whole evaluation of a model on labelled images: retrieval, few-shot tasks and verification in one value."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.evaluate.few_shot import FewShotReport, Task, evaluate_few_shot
from vitembed.evaluate.references import ReferencesReport, evaluate_references
from vitembed.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from vitembed.evaluate.scored import EvaluatedPairs, score_pairs
from vitembed.evaluate.signatures import SignatureReport, Signatures, evaluate_signatures
from vitembed.evaluate.splits import Side, SplitReport, check_split
from vitembed.evaluate.verification import ALL_PAIRS, GIVEN_PAIRS, VerificationReport, evaluate_pairs
from vitembed.images import ImageSource
from vitembed.verify.calibration import Calibration
from vitembed.verify.pairs import Pairs
from vitembed.verify.verifier import Encoder, Verifier

GALLERY_PAIRS = "All pairs of a query and an image of the gallery, or of a random part of both."


class Labelled(Protocol):
    """Images with classes, as `vitembed.training.ImageDataset` has them."""

    @property
    def images(self) -> Sequence[ImageSource]:
        """N images."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) positions in `classes`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""

    @property
    def forgery_of(self) -> NDArray[np.int64] | None:
        """(N,) the class that a skilled forgery imitates, -1 for genuine images; None if all are genuine."""


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What was measured; parts that were not asked for, or that the data do not allow, are None or empty.

    Attributes:
        retrieval: over all images.
        verification: over the pairs in `pairs`.
        pairs: what verification was measured on.
        paired_images: how many different images these are of.
        few_shot: one report a task.
        signatures: the protocol for signatures.
        references: decisions by several references of an identity; None for tables of pairs and galleries.
        split: what the images share with those trained on.
        images: those that `pairs` names by number; empty where embeddings were measured.
    """

    retrieval: RetrievalReport | None
    verification: VerificationReport
    pairs: EvaluatedPairs = field(repr=False)
    paired_images: int
    few_shot: tuple[FewShotReport, ...] = ()
    signatures: SignatureReport | None = None
    references: ReferencesReport | None = None
    split: SplitReport | None = None
    images: Sequence[ImageSource] = field(default=(), repr=False)

    @property
    def definitions(self) -> dict[str, str]:
        """What the figures mean, in words."""
        told = {} if self.retrieval is None else dict(self.retrieval.definitions)
        told |= {f"few-shot {report.task.name}": report.definition for report in self.few_shot}
        told |= self.verification.definitions
        if self.references is not None and self.references.rules:
            told["references"] = self.references.protocol
        return told

    def to_dict(self) -> dict[str, Any]:
        """Return one dictionary as JSON takes it; the figures of retrieval and verification stand at its top."""
        document: dict[str, Any] = {} if self.retrieval is None else self.retrieval.to_dict()
        document |= self.verification.to_dict() | {"paired_images": self.paired_images}
        if self.few_shot:
            document["few_shot"] = [report.to_dict() for report in self.few_shot]
        if self.signatures is not None:
            document["signatures"] = self.signatures.to_dict()
        if self.references is not None:
            document["references"] = self.references.to_dict()
        if self.split is not None:
            document["split"] = self.split.to_dict()
        return document | {"definitions": self.definitions}


def evaluate(
    model: Encoder,
    images: Sequence[ImageSource],
    labels: ArrayLike,
    *,
    batch_size: int = 64,
    progress: bool = False,
    max_pairs: int = 500_000,
    seed: int = 0,
) -> EvaluationReport:
    """Encode labelled images and measure retrieval and verification on them.

    Args:
        model: encodes images.
        images: N paths, PIL images or arrays.
        labels: (N,) their classes (identities), integers or strings.
        batch_size: images in one pass of the network.
        progress: show a progress bar on standard error.
        max_pairs: see `evaluate_embeddings`.
        seed: of all that is drawn.

    Raises:
        ImageError: an image cannot be read.
        DataError: labels do not fit, one class only, or no class with two images.
    """
    if np.shape(labels) != (len(images),):  # before the images are encoded, which takes long
        raise DataError(
            f"labels must hold one class for each of the {len(images)} images; got shape {np.shape(labels)}"
        )
    vectors = model.encode(images, batch_size=batch_size, progress=progress)
    report = evaluate_embeddings(vectors, labels, max_pairs=max_pairs, seed=seed)
    return dataclasses.replace(report, images=images)


def evaluate_embeddings(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    forgery_of: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    verifier: Verifier | None = None,
    max_pairs: int = 500_000,
    seed: int = 0,
) -> EvaluationReport:
    """Measure retrieval and verification on embeddings, (N, D) of any length but zero, with labels (N,).

    Args:
        embeddings: a model's, or raw pixels (as rows) for comparison.
        labels: (N,) classes.
        forgery_of: (N,) the label of the writer whom a skilled forgery imitates, -1 for genuine images; each forgery is
            a class of its own, and labels are numbers then. Verification follows the protocols for signatures.
        names: the names of the classes, of which labels are positions; labels name themselves by default.
        verifier: made elsewhere, to be judged on these pairs. Only its calibration is looked at.
        max_pairs: verification takes all pairs of the images; when these are more, all pairs of so many randomly
            drawn images that they are at most this many. Signatures are paired by writers, whatever this says.
        seed: of all that is drawn.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit, one class only, or no class with two images.
        ConfigError: `max_pairs` is below 1.
    """
    if max_pairs < 1:
        raise ConfigError(f"max_pairs must be at least 1; got {max_pairs}")
    called = _called(labels, names)
    retrieval = evaluate_retrieval(embeddings, called, seed=seed)
    calibration = _calibration(verifier)
    fitted = None if verifier is None else verifier.references
    if forgery_of is None:
        pairs = EvaluatedPairs.of_set(embeddings, called, max_pairs=max_pairs, seed=seed)
        verification = evaluate_pairs(pairs, calibration=calibration, protocol=ALL_PAIRS, seed=seed)
        references = evaluate_references(embeddings, called, fitted=fitted, seed=seed)
        return EvaluationReport(retrieval, verification, pairs, _count_images(pairs), references=references)
    codes = np.asarray(labels)
    if names is None:
        names = [str(code) for code in range(int(codes.max(initial=0)) + 1)] if codes.dtype.kind in "iu" else []
    signatures = Signatures(np.asarray(embeddings), codes, np.asarray(forgery_of), names)
    measured = evaluate_signatures(signatures, calibration=calibration, seed=seed)
    references = evaluate_references(
        signatures.vectors, signatures.labels, signatures.forgery_of, names=names, fitted=fitted, seed=seed
    )
    scored = measured.scored
    return EvaluationReport(
        retrieval, measured.pairs, scored, _count_images(scored), signatures=measured, references=references
    )


def evaluate_gallery(
    embeddings: ArrayLike,
    labels: ArrayLike,
    gallery: ArrayLike,
    gallery_labels: ArrayLike,
    *,
    verifier: Verifier | None = None,
    max_pairs: int = 500_000,
    seed: int = 0,
) -> EvaluationReport:
    """Measure queries, (N, D) with labels (N,), in a gallery, (M, D) with labels (M,): no query is part of it.

    Verification takes all pairs of a query and an image of the gallery, or those of a random part of both sides. Other
    arguments and errors are as in `evaluate_embeddings`.
    """
    retrieval = evaluate_retrieval(embeddings, labels, gallery=gallery, gallery_labels=gallery_labels, seed=seed)
    pairs = EvaluatedPairs.of_gallery(embeddings, labels, gallery, gallery_labels, max_pairs=max_pairs, seed=seed)
    verification = evaluate_pairs(pairs, calibration=_calibration(verifier), protocol=GALLERY_PAIRS, seed=seed)
    return EvaluationReport(retrieval, verification, pairs, _count_images(pairs))


def evaluate_given_pairs(
    model: Encoder,
    pairs: Pairs,
    *,
    verifier: Verifier | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int = 0,
) -> EvaluationReport:
    """Encode every distinct image of labelled pairs once and measure verification on the pairs.

    Raises:
        ImageError: an image cannot be read.
        DataError: one kind of pair only.
        ModelMismatchError: the verifier belongs to another model.
    """
    metrics.checked_pairs(np.zeros(len(pairs)), pairs.is_match)  # before the images are encoded, which takes long
    _check_model(model, verifier)
    images, at = _distinct(pairs)
    vectors = model.encode(images, batch_size=batch_size, progress=progress)
    scores = score_pairs(vectors, at[:, 0], at[:, 1])
    scored = EvaluatedPairs.named(scores, pairs.is_match, pairs.identities, pairs.skilled, at)
    verification = evaluate_pairs(scored, calibration=_calibration(verifier), protocol=GIVEN_PAIRS, seed=seed)
    return EvaluationReport(None, verification, scored, len(images), images=images)


def evaluate_data(
    model: Encoder,
    data: Labelled,
    *,
    gallery: Labelled | None = None,
    pairs: Pairs | None = None,
    train: Labelled | None = None,
    few_shot: Sequence[Task] = (),
    verifier: Verifier | None = None,
    near: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int = 0,
) -> EvaluationReport:
    """Encode labelled images and measure all that was asked for.

    Args:
        model: encodes images.
        data: what the model is judged on; with skilled forgeries by the protocols for signatures.
        gallery: images to search those of `data` in; these themselves by default.
        pairs: what verification is measured on, in place of pairs of `data`.
        train: what the model was trained on, to look for what `data` shares with it.
        few_shot: tasks to draw episodes of.
        verifier: made elsewhere, to be judged on these pairs.
        near: the score from which on two images are called near-duplicates; see `check_split`, also for the default.
        batch_size: images in one pass of the network.
        progress: show a progress bar on standard error.
        seed: of all that is drawn.

    Raises:
        ImageError: an image cannot be read.
        DataError: one class only, no class with two images, or too few for a task.
        ModelMismatchError: the verifier belongs to another model.
        ConfigError: `near` is out of range.
    """
    _check_model(model, verifier)
    given = None
    if pairs is not None:
        given = evaluate_given_pairs(
            model, pairs, verifier=verifier, batch_size=batch_size, progress=progress, seed=seed
        )
    encoded = {
        name: model.encode(part.images, batch_size=batch_size, progress=progress)
        for name, part in (("data", data), ("gallery", gallery), ("train", train))
        if part is not None
    }
    vectors, classes = encoded["data"], np.asarray(data.classes)[data.labels]
    if gallery is not None:
        theirs = np.asarray(gallery.classes)[gallery.labels]
        report = evaluate_gallery(vectors, classes, encoded["gallery"], theirs, verifier=verifier, seed=seed)
        report = dataclasses.replace(report, images=[*data.images, *gallery.images])
    else:
        report = evaluate_embeddings(
            vectors, data.labels, forgery_of=data.forgery_of, names=data.classes, verifier=verifier, seed=seed
        )
        report = dataclasses.replace(report, images=data.images)
    if given is not None:
        report = dataclasses.replace(given, retrieval=report.retrieval)
    tasks = tuple(evaluate_few_shot(vectors, classes, task, seed=seed) for task in few_shot)
    split = None
    if train is not None:
        known, unseen = _side(train, encoded["train"]), _side(data, vectors)
        split = check_split(known, unseen, score=near)
    return dataclasses.replace(report, few_shot=tasks, split=split)


def _side(data: Labelled, vectors: ArrayLike) -> Side:
    """Return one side of a split; a forgery goes by the writer whom it imitates."""
    whom = data.labels if data.forgery_of is None else np.where(data.forgery_of < 0, data.labels, data.forgery_of)
    return Side(data.images, [data.classes[code] for code in whom.tolist()], vectors)


def _check_model(model: Encoder, verifier: Verifier | None) -> None:
    """Refuse a verifier of another model."""
    if verifier is not None:
        dataclasses.replace(verifier, model=model)


def _calibration(verifier: Verifier | None) -> Calibration | None:
    return None if verifier is None else verifier.calibration


def _count_images(pairs: EvaluatedPairs) -> int:
    assert pairs.images is not None
    return int(np.unique(pairs.images).size)


def _called(labels: ArrayLike, names: Sequence[str] | None) -> NDArray[Any]:
    """Return the labels, by name where names are given."""
    codes = np.asarray(labels)
    if names is None:
        return codes
    if codes.dtype.kind not in "iu" or codes.min(initial=0) < 0 or codes.max(initial=0) >= len(names):
        raise DataError(f"labels must be positions in the {len(names)} names of classes; got {codes.dtype}")
    called: NDArray[Any] = np.asarray(names)[codes]
    return called


def _distinct(pairs: Pairs) -> tuple[list[ImageSource], NDArray[np.int64]]:
    """Return each distinct image once, and for both sides of the pairs the positions (P, 2) in that list."""
    images: list[ImageSource] = []
    positions: dict[str | int, int] = {}
    at = np.empty((len(pairs), 2), dtype=np.int64)
    for side, sources in enumerate((pairs.left, pairs.right)):
        for row, source in enumerate(sources):
            # Images in memory are told apart as objects; `pairs` keeps them alive, so no id is given twice.
            key = os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)
            if key not in positions:
                positions[key] = len(images)
                images.append(source)
            at[row, side] = positions[key]
    return images, at
