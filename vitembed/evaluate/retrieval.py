"""Retrieval: is what a search finds first of the query's class?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitembed import metrics
from vitembed.evaluate.figures import Figure, Interval, flatten, with_width

KS = (1, 5, 10)
VOTERS = 5

# Images times classes: above it no clustering is made. 20,000 images of 500 classes and 384 dimensions took 11 s on one
# busy core, 10,000 of 1,000 classes and 128 dimensions 1 s.
_CLUSTERING = 10_000_000

# Queries times images searched: above it the ranks of all matches are not followed. For 20,000 images of 384 dimensions
# that took 31 s where the other figures took 11.
_ALL_RANKS = 400_000_000


@dataclass(frozen=True)
class RetrievalReport:
    """Searching each image among all others, or each query in a gallery.

    Attributes:
        figures: "recall@1", "recall@5", "recall@10", "map@r", "r-precision", "map", "mrr", "precision@5",
            "precision@10" and "5-nn accuracy", each in [0, 1], with its 95 % bootstrap interval over classes (None with
            fewer than nine classes, or where every draw gives the same); and "nmi", without one, where there is no
            gallery. "map" and "nmi" are left out of sets so large that they would take long: more than 20,000 images,
            and images times classes above 10 million.
        queries: how many images were judged: those with another image of their class to find.
        images: how many images were given to be searched for.
        classes: how many classes these have.
        gallery: how many images were searched in; None where they are the queries themselves.
    """

    figures: Mapping[str, Figure]
    queries: int
    images: int
    classes: int
    gallery: int | None = None

    @property
    def recall_at_1(self) -> float:
        """The share of queries whose nearest image is of their class."""
        return self.figures["recall@1"].value

    @property
    def recall_at_1_interval(self) -> Interval | None:
        """Its 95 % bootstrap interval over classes; None as in `figures`."""
        return self.figures["recall@1"].interval

    @property
    def recall_at_5(self) -> float:
        """The share of queries with an image of their class among the nearest five."""
        return self.figures["recall@5"].value

    @property
    def map_at_r(self) -> float:
        """Mean average precision at R."""
        return self.figures["map@r"].value

    @property
    def definitions(self) -> dict[str, str]:
        """What the figures mean, in words."""
        left_out = "gallery" if self.gallery is None else "self-match"
        told = {name: text for name, text in _DEFINITIONS.items() if name != left_out}
        return {name: text for name, text in told.items() if name not in _OPTIONAL or name.lower() in self.figures}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it, under the names that papers use."""
        counts = {"queries": self.queries, "images": self.images, "classes": self.classes}
        return flatten(self.figures) | counts | ({} if self.gallery is None else {"gallery": self.gallery})


def evaluate_retrieval(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    rounds: int = 200,
    seed: int = 0,
) -> RetrievalReport:
    """Search each image among all others, or in a gallery.

    Args:
        embeddings: (N, D), of any length but zero.
        labels: (N,) classes, integers or strings.
        gallery: (M, D) to search in; the images themselves by default.
        gallery_labels: (M,) its classes.
        rounds: draws of the bootstrap intervals.
        seed: of these draws, and of the clustering.

    Raises:
        VectorError: the embeddings are no finite (N, D) array, or a row is zero.
        DataError: labels do not fit, or no query has an image of its class to find.
    """
    names = np.asarray(labels)
    searched = np.shape(embeddings if gallery is None else gallery)[:1]
    full = math.prod((names.size, *searched)) <= _ALL_RANKS
    found = metrics.query_ranks(embeddings, labels, gallery, gallery_labels, ks=KS[1:], full=full, voters=VOTERS)
    columns = {f"recall@{k}": found.first_rank <= k for k in KS} | {
        "map@r": found.precision_at_r,
        "r-precision": found.r_precision,
        **({"map": found.average_precision} if full else {}),
        "mrr": found.reciprocal_rank,
        **{f"precision@{k}": shares for k, shares in found.precision_at_k.items()},
        f"{VOTERS}-nn accuracy": found.voted_right,
    }
    table = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    values = np.stack(list(table.values()), axis=1)  # (Q, F)
    judged = names[found.queries]
    intervals: dict[str, Interval] = {}
    if np.unique(judged).size >= metrics.IDENTITIES_NEEDED:
        intervals = metrics.bootstrap_intervals(
            lambda weights: dict(zip(columns, (weights @ values / weights.sum()).tolist(), strict=True)),
            judged,
            rounds=rounds,
            seed=seed,
            weighted=True,
        )
    figures = {name: Figure(float(np.mean(column)), with_width(intervals.get(name))) for name, column in table.items()}
    if gallery is None and (nmi := _clustering_score(embeddings, names, seed)) is not None:
        figures["nmi"] = Figure(nmi)
    return RetrievalReport(
        figures=figures,
        queries=len(found.queries),
        images=len(names),
        classes=int(np.unique(names).size),
        gallery=None if gallery is None else len(np.asarray(gallery)),
    )


def _clustering_score(embeddings: ArrayLike, names: np.ndarray[Any, Any], seed: int) -> float | None:
    """Return the NMI of the classes of two images or more and as many clusters; None where that takes too long."""
    _, codes, counts = np.unique(names, return_inverse=True, return_counts=True)
    kept = counts[codes] > 1
    classes = int(np.count_nonzero(counts > 1))
    if classes < 2 or np.count_nonzero(kept) * classes > _CLUSTERING:
        return None
    clusters = metrics.cluster_rows(np.asarray(embeddings)[kept], classes, seed)
    return float(metrics.normalized_mutual_information(codes[kept], clusters))


_OPTIONAL = ("mAP", "NMI")

_DEFINITIONS = {
    "self-match": "Each image is searched among all others; itself is left out. An image without another of its class "
    "is searched in, but is no query.",
    "gallery": "Each query is searched in the gallery. A query without an image of its class there is not judged.",
    "ties": "An image of another class that scores as high as one of the query's class counts as found before it.",
    "recall@k": "The share of queries with at least one image of their class among the k nearest (hit rate).",
    "precision@k": "The mean share of images of the query's class among the k nearest.",
    "R-precision": "The mean share of images of the query's class among the R nearest, R being how many there are.",
    "MAP@R": "For each query (1 / R) * the sum, over the ranks up to R that hold an image of its class, of the "
    "precision up to that rank (Musgrave et al. 2020); the mean over queries.",
    "mAP": "As MAP@R, but over all ranks: the mean over queries of the average precision.",
    "MRR": "The mean of 1 / rank of the first image of the query's class.",
    "k-NN accuracy": "The share of queries whose class has most votes among the k nearest.",
    "NMI": "Normalised mutual information (arithmetic mean) of the classes with two images or more and as many "
    "clusters of spherical k-means, started by seed.",
    "retrieval intervals": "95 % bootstrap over the classes of the queries, which are searched among the same images. "
    "None with fewer than nine classes, or where every draw gives the same figure.",
}
