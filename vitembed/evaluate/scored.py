"""Pairs with their scores: what verification is measured on, and which images they are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_CHUNK = 16_384  # pairs scored at a time: 24 MB of rows a side for 384 dimensions


@dataclass(frozen=True, eq=False)
class EvaluatedPairs:
    """P pairs of images with the score of each.

    Attributes:
        scores: (P,) finite, higher is more alike.
        is_match: (P,) bool, both kinds present.
        identities: (P, 2) int64, positions in `names` of whom the two images show; of a skilled forgery both are the
            identity that is imitated. None where that is not known.
        skilled: (P,) bool, where one image imitates the other's identity; None where that is not known.
        names: the names of the identities.
        images: (P, 2) int64, which images these are, for people to look at; None where that is not known.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: the others do not fit them, there is one kind of pair only, or they contradict each other.
    """

    scores: NDArray[np.floating[Any]]
    is_match: Bools
    identities: Ints | None = None
    skilled: Bools | None = None
    names: tuple[str, ...] = ()
    images: Ints | None = None

    def __post_init__(self) -> None:
        scores, matching = metrics.checked_pairs(self.scores, self.is_match)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "is_match", matching)
        if self.skilled is not None:
            object.__setattr__(self, "skilled", _checked_skilled(self.skilled, matching))
        for name in ("identities", "images"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != (matching.size, 2):
                raise DataError(
                    f"{name} must have shape ({matching.size}, 2), two for each pair; got {np.shape(value)}"
                )
        if self.identities is not None:
            self._check_identities(self.identities)

    def __len__(self) -> int:
        return int(self.is_match.size)

    @classmethod
    def named(
        cls,
        scores: ArrayLike,
        is_match: ArrayLike,
        identities: ArrayLike | None = None,
        skilled: ArrayLike | None = None,
        images: ArrayLike | None = None,
    ) -> "EvaluatedPairs":
        """Take pairs whose identities, (P, 2), are numbers or strings; the other arguments are as the attributes."""
        codes: Ints | None = None
        names: tuple[str, ...] = ()
        if identities is not None:
            array = np.asarray(identities)
            distinct, inverse = np.unique(array, return_inverse=True)
            codes, names = inverse.reshape(array.shape).astype(np.int64), _as_names(distinct)
        flags = None if skilled is None else np.asarray(skilled)
        places = None if images is None else np.asarray(images, dtype=np.int64)
        return cls(np.asarray(scores), np.asarray(is_match), codes, flags, names, places)

    @classmethod
    def of_set(
        cls, embeddings: ArrayLike, labels: ArrayLike, *, max_pairs: int = 500_000, seed: int = 0
    ) -> "EvaluatedPairs":
        """Score all pairs of a set; when these are more than `max_pairs`, those of a random part of the images.

        Args:
            embeddings: (N, D), of any length but zero.
            labels: (N,) classes.
            max_pairs: all pairs of so many randomly drawn images are taken that they are at most this many.
            seed: of the draw.

        Raises:
            ConfigError: `max_pairs` is below 1.
            VectorError: the embeddings are no finite (N, D) array, or a row is zero.
            DataError: labels do not fit, or there is one kind of pair only.
        """
        _check_max_pairs(max_pairs)
        vectors, names = np.asarray(embeddings), np.asarray(labels)
        chosen = np.arange(len(vectors))
        fitting = int((1 + np.sqrt(1 + 8 * max_pairs)) / 2)  # the largest n with n (n - 1) / 2 <= max_pairs
        if len(vectors) > fitting:
            chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), fitting, replace=False))
            vectors, names = vectors[chosen], names[chosen]
        scores, is_match = metrics.pair_scores(vectors, names)
        at = np.stack(np.triu_indices(len(vectors), 1), axis=1)  # (P, 2)
        distinct, codes = np.unique(names, return_inverse=True)
        return cls(scores, is_match, codes.astype(np.int64)[at], names=_as_names(distinct), images=chosen[at])

    @classmethod
    def of_gallery(
        cls,
        queries: ArrayLike,
        labels: ArrayLike,
        gallery: ArrayLike,
        gallery_labels: ArrayLike,
        *,
        max_pairs: int = 500_000,
        seed: int = 0,
    ) -> "EvaluatedPairs":
        """Score every query, (Q, D), with every image of a gallery, (M, D).

        When these pairs are more than `max_pairs`, the same share of both sides is drawn at random. The positions of
        the gallery's images in `images` begin at Q. Errors are as in `of_set`.
        """
        _check_max_pairs(max_pairs)
        sides = [metrics.unit_rows(queries), metrics.unit_rows(gallery, "gallery")]
        share = min(1.0, float(np.sqrt(max_pairs / (len(sides[0]) * len(sides[1])))))
        rng = np.random.default_rng(seed)
        taken = []
        for rows in sides:
            kept = max(1, int(share * len(rows)))
            taken.append(np.sort(rng.choice(len(rows), kept, replace=False)) if kept < len(rows) else np.arange(kept))
        names = [np.asarray(labels)[taken[0]], np.asarray(gallery_labels)[taken[1]]]
        distinct, codes = np.unique(np.concatenate(names), return_inverse=True)
        scores = np.clip(sides[0][taken[0]] @ sides[1][taken[1]].T, -1, 1).ravel()
        left, right = (side.ravel() for side in np.indices((len(taken[0]), len(taken[1]))))
        whom = np.stack([codes[left], codes[len(taken[0]) + right]], axis=1).astype(np.int64)
        places = np.stack([taken[0][left], len(sides[0]) + taken[1][right]], axis=1)
        return cls(scores, whom[:, 0] == whom[:, 1], whom, names=_as_names(distinct), images=places)

    def at_least(self, threshold: float) -> Bools:
        """Return which pairs score at least a threshold, (P,) bool; it is not rounded to the type of the scores."""
        flags: Bools = self.scores >= np.float64(threshold)  # numpy rounds a plain number to the array's type
        return flags

    @property
    def kinds(self) -> dict[str, Bools]:
        """The pairs that do not match, (P,) bool, by kind: "random" and "skilled"; nothing without skilled ones."""
        if self.skilled is None or not self.skilled.any():
            return {}
        random = ~self.is_match & ~self.skilled
        return {"random": random, "skilled": self.skilled} if random.any() else {"skilled": self.skilled}

    def _check_identities(self, identities: Ints) -> None:
        same = identities[:, 0] == identities[:, 1]
        expected = self.is_match if self.skilled is None else self.is_match | self.skilled
        wrong = np.flatnonzero(same != expected)
        if wrong.size:
            raise DataError(
                "the identities of a pair must be equal exactly when it matches or is a skilled forgery; "
                f"pair {wrong[0]} contradicts that"
            )


def score_pairs(vectors: ArrayLike, left: Sequence[int] | Ints, right: Sequence[int] | Ints) -> NDArray[np.float64]:
    """Return the cosines (P,) of the rows vectors[left] and vectors[right].

    Row by row in float64, not as a matrix product, so that a pair's score does not depend on the other pairs.
    """
    unit = metrics.unit_rows(vectors)
    first, second = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
    scores = np.empty(first.size, dtype=np.float64)
    for start in range(0, first.size, _CHUNK):
        at = slice(start, start + _CHUNK)
        np.einsum("nd,nd->n", unit[first[at]], unit[second[at]], dtype=np.float64, out=scores[at])
    return np.clip(scores, -1, 1, out=scores)


def _checked_skilled(skilled: ArrayLike, matching: Bools) -> Bools:
    flags = np.asarray(skilled)
    if flags.shape != matching.shape or flags.dtype != np.bool_:
        raise DataError(
            f"skilled must hold a boolean for each of {matching.size} pairs; got {flags.dtype} of shape {flags.shape}"
        )
    both = np.flatnonzero(flags & matching)
    if both.size:
        raise DataError(f"a pair that matches is no forgery; pair {both[0]} is called both")
    return flags


def _as_names(distinct: NDArray[Any]) -> tuple[str, ...]:
    return tuple(map(str, distinct.tolist()))


def _check_max_pairs(max_pairs: int) -> None:
    if max_pairs < 1:
        raise ConfigError(f"max_pairs must be at least 1; got {max_pairs}")
