"""How good is a model? Retrieval and verification figures, with intervals, as plain values.

The definitions are those of `vitembed.metrics`. Thresholds in these reports are chosen a posteriori, on the pairs that
they are judged by; a threshold to use elsewhere is the work of `vitembed.verify`. Intervals are over identities: what
another draw of as many identities could have given (for recall: as queries, among the same images); with fewer than ten
there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError
from vitembed.images import ImageSource
from vitembed.verify.verifier import Encoder

FARS = (0.01, 0.001)


@dataclass(frozen=True)
class RetrievalReport:
    """Searching each image among all others.

    Attributes:
        recall_at_1: share of queries whose nearest other image is of their class.
        recall_at_1_interval: its 95 % bootstrap interval over classes; None with fewer than ten classes.
        recall_at_5: share of queries with an image of their class among the nearest five.
        map_at_r: mean average precision at R.
        queries: how many images were judged: those with another image of their class.
        images: how many images were searched.
        classes: how many classes the images have.
    """

    recall_at_1: float
    recall_at_1_interval: tuple[float, float] | None
    recall_at_5: float
    map_at_r: float
    queries: int
    images: int
    classes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it, under the names that papers use."""
        return {
            "recall@1": self.recall_at_1,
            "recall@1_interval": _as_list(self.recall_at_1_interval),
            "recall@5": self.recall_at_5,
            "map@r": self.map_at_r,
            "queries": self.queries,
            "images": self.images,
            "classes": self.classes,
        }


@dataclass(frozen=True)
class VerificationReport:
    """Telling matching from non-matching pairs by their scores.

    Attributes:
        eer: equal error rate.
        eer_interval: its 95 % bootstrap interval over identities; None where these are not known or fewer than ten.
        eer_threshold: where it is reached, a posteriori.
        auc: area under the ROC curve.
        tar_at_far: true-accept rate at each false-accept rate; None where there are fewer than 1 / rate
            non-matching pairs, so that the rate cannot be seen at all.
        matches: how many matching pairs.
        non_matches: how many non-matching pairs.
    """

    eer: float
    eer_interval: tuple[float, float] | None
    eer_threshold: float
    auc: float
    tar_at_far: dict[float, float | None]
    matches: int
    non_matches: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it, under the names that papers use."""
        return {
            "eer": self.eer,
            "eer_interval": _as_list(self.eer_interval),
            "eer_threshold": self.eer_threshold,
            "auc": self.auc,
            **{f"tar@far={far:g}": tar for far, tar in self.tar_at_far.items()},
            "matches": self.matches,
            "non_matches": self.non_matches,
        }


@dataclass(frozen=True)
class EvaluationReport:
    """Both reports on one set of labelled images.

    Attributes:
        retrieval: over all images.
        verification: over all pairs of `paired_images`.
        paired_images: how many images were paired; fewer than all when these have more than `max_pairs` pairs.
    """

    retrieval: RetrievalReport
    verification: VerificationReport
    paired_images: int

    def to_dict(self) -> dict[str, Any]:
        """Return one flat dictionary as JSON takes it."""
        return {**self.retrieval.to_dict(), **self.verification.to_dict(), "paired_images": self.paired_images}


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
    _check_count(len(images), labels)
    vectors = model.encode(images, batch_size=batch_size, progress=progress)
    return evaluate_embeddings(vectors, labels, max_pairs=max_pairs, seed=seed)


def evaluate_embeddings(
    embeddings: ArrayLike, labels: ArrayLike, *, max_pairs: int = 500_000, seed: int = 0
) -> EvaluationReport:
    """Measure retrieval and verification on embeddings, (N, D) of any length but zero, with labels (N,).

    Args:
        embeddings: a model's, or raw pixels (as rows) for comparison.
        labels: (N,) classes.
        max_pairs: verification takes all pairs of the images; when these are more, all pairs of so many randomly
            drawn images that they are at most this many.
        seed: of all that is drawn.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit, one class only, or no class with two images.
    """
    if max_pairs < 1:
        raise ConfigError(f"max_pairs must be at least 1; got {max_pairs}")
    retrieval = evaluate_retrieval(embeddings, labels, seed=seed)
    vectors, names = np.asarray(embeddings), np.asarray(labels)
    fitting = int((1 + np.sqrt(1 + 8 * max_pairs)) / 2)  # the largest n with n (n - 1) / 2 <= max_pairs
    if len(vectors) > fitting:
        chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), fitting, replace=False))
        vectors, names = vectors[chosen], names[chosen]
    scores, is_match = metrics.pair_scores(vectors, names)
    codes = np.unique(names, return_inverse=True)[1]
    identities = np.stack([codes[side] for side in np.triu_indices(len(codes), 1)], axis=1)
    verification = evaluate_verification(scores, is_match, identities=identities, seed=seed)
    return EvaluationReport(retrieval, verification, len(vectors))


def evaluate_retrieval(
    embeddings: ArrayLike, labels: ArrayLike, *, rounds: int = 100, seed: int = 0
) -> RetrievalReport:
    """Search each image among all others.

    Args:
        embeddings: (N, D), of any length but zero.
        labels: (N,) classes, integers or strings.
        rounds: draws of the bootstrap interval.
        seed: of these draws.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit, or no class has two images.
    """
    found = metrics.query_ranks(embeddings, labels)
    names = np.asarray(labels)
    hits = found.first_rank == 1
    judged = names[found.queries]
    interval = None
    if np.unique(judged).size >= metrics.IDENTITIES_NEEDED:
        interval = metrics.bootstrap_interval(lambda at: float(np.mean(hits[at])), judged, rounds=rounds, seed=seed)
    return RetrievalReport(
        recall_at_1=float(np.mean(hits)),
        recall_at_1_interval=interval,
        recall_at_5=float(np.mean(found.first_rank <= 5)),
        map_at_r=float(np.mean(found.precision_at_r)),
        queries=len(found.queries),
        images=len(names),
        classes=int(np.unique(names).size),
    )


def evaluate_verification(
    scores: ArrayLike,
    is_match: ArrayLike,
    *,
    identities: ArrayLike | None = None,
    fars: Sequence[float] = FARS,
    rounds: int = 100,
    seed: int = 0,
) -> VerificationReport:
    """Measure how well scores tell matching from non-matching pairs.

    Args:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) booleans (or 0 and 1), both kinds present.
        identities: (P, 2) whom the two images of each pair show; needed for the interval of the EER.
        fars: false-accept rates to report the true-accept rate at.
        rounds: draws of the bootstrap interval.
        seed: of these draws.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` or `identities` does not fit, or there is one kind of pair only.
    """
    checked, matching = metrics.checked_pairs(scores, is_match)
    eer, threshold = metrics.equal_error_rate(checked, matching)
    interval = None
    names = None if identities is None else _checked_identities(identities, matching)
    if names is not None and np.unique(names).size >= metrics.IDENTITIES_NEEDED:
        interval = metrics.bootstrap_interval(
            lambda at: metrics.equal_error_rate(checked[at], matching[at])[0], names, rounds=rounds, seed=seed
        )
    matches = int(np.count_nonzero(matching))
    non_matches = matching.size - matches
    return VerificationReport(
        eer=eer,
        eer_interval=interval,
        eer_threshold=threshold,
        auc=metrics.roc_auc(checked, matching),
        tar_at_far={
            float(far): metrics.tar_at_far(checked, matching, far) if far * non_matches >= 1 - 1e-9 else None
            for far in fars
        },
        matches=matches,
        non_matches=non_matches,
    )


def _checked_identities(identities: ArrayLike, matching: NDArray[np.bool_]) -> NDArray[Any]:
    array = np.asarray(identities)
    if array.shape != (matching.size, 2):
        raise DataError(f"identities must have shape ({matching.size}, 2), two for each pair; got {array.shape}")
    if np.any((array[:, 0] == array[:, 1]) != matching):
        at = int(np.flatnonzero((array[:, 0] == array[:, 1]) != matching)[0])
        raise DataError(f"a pair must match exactly when its identities are equal; pair {at} contradicts that")
    return array


def _check_count(n: int, labels: ArrayLike) -> None:
    """Refuse before the images are encoded, which takes long."""
    if np.shape(labels) != (n,):
        raise DataError(f"labels must hold one class for each of the {n} images; got shape {np.shape(labels)}")


def _as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
