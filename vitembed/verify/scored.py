"""Scores with what is known of their pairs: which match, whom they show, which are skilled forgeries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import DataError, unknown_name

AGAINST = ("skilled", "random", "all")


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Checked scores of P pairs.

    Attributes:
        scores: (P,) finite.
        is_match: (P,) bool, both kinds present.
        codes: (P, 2) numbers of the identities from 0 on, without gaps; where they are not known each pair has its own.
        identities: how many identities there are; None where they are not known.
        skilled: (P,) bool, some of the non-matching pairs; None where that is not known.
    """

    scores: NDArray[np.floating[Any]]
    is_match: NDArray[np.bool_]
    codes: NDArray[np.int64]
    identities: int | None
    skilled: NDArray[np.bool_] | None

    @classmethod
    def check(
        cls,
        scores: ArrayLike,
        is_match: ArrayLike,
        identities: ArrayLike | None = None,
        skilled: ArrayLike | None = None,
    ) -> "ScoredPairs":
        """Check what a caller gave.

        Args:
            scores: (P,) finite numbers.
            is_match: (P,) booleans (or 0 and 1), both kinds present.
            identities: (P, 2) whom the two images of each pair show, numbers or texts; None if not known.
            skilled: (P,) booleans (or 0 and 1); None if not known.

        Raises:
            VectorError: scores are no finite (P,) array.
            DataError: anything else does not fit them.
        """
        checked, matching = metrics.checked_pairs(scores, is_match)
        codes, count = identity_codes(identities, checked.size)
        return cls(checked, matching, codes, count, _skilled(skilled, matching))

    @property
    def kinds(self) -> Mapping[str, NDArray[np.bool_]]:
        """The kinds of pair that there are, as masks (P,): "matching", "all" that do not match, "random", "skilled"."""
        masks = {"matching": self.is_match, "all": ~self.is_match}
        if self.skilled is not None:
            masks |= {"random": ~self.is_match & ~self.skilled, "skilled": self.skilled}
        return {kind: mask for kind, mask in masks.items() if mask.any()}

    def against(self, wanted: str | None) -> str:
        """Return the kind of non-matching pair to choose a threshold on: by default skilled ones where there are any.

        Raises:
            ConfigError: `wanted` is no kind.
            DataError: there is no such pair.
        """
        if wanted is None:
            return "skilled" if "skilled" in self.kinds else "all"
        if wanted not in AGAINST:
            raise unknown_name("kind of non-matching pair", wanted, AGAINST)
        if wanted not in self.kinds:
            why = "which pairs are skilled is not known" if self.skilled is None else "there is none among these pairs"
            raise DataError(f"expected {wanted} non-matching pairs to choose the threshold on; {why}")
        return wanted

    def take(self, mask: NDArray[np.bool_]) -> "ScoredPairs":
        """Return the pairs of a mask (P,), or at positions; identities keep their numbers."""
        skilled = None if self.skilled is None else self.skilled[mask]
        return ScoredPairs(self.scores[mask], self.is_match[mask], self.codes[mask], self.identities, skilled)


def identity_codes(identities: ArrayLike | None, n: int) -> tuple[NDArray[np.int64], int | None]:
    """Return the identities (P, 2) as numbers from 0 on without gaps, and how many there are.

    Where they are not known each of the n pairs is given its own, and the count is None.

    Raises:
        DataError: they do not fit n pairs, or are neither numbers nor texts.
    """
    if identities is None:
        return np.repeat(np.arange(n)[:, None], 2, axis=1), None
    names = np.asarray(identities)
    if names.shape != (n, 2):
        raise DataError(f"identities must have shape ({n}, 2), two for each pair; got {names.shape}")
    if names.dtype.kind not in "iubU":
        raise DataError(f"identities must be numbers or texts; got {names.dtype}")
    distinct, codes = np.unique(names, return_inverse=True)
    return codes.reshape(names.shape).astype(np.int64, copy=False), int(distinct.size)


def _skilled(skilled: ArrayLike | None, matching: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    if skilled is None:
        return None
    flags = np.asarray(skilled)
    if flags.shape != matching.shape or flags.dtype.kind not in "biu" or not np.all((flags == 0) | (flags == 1)):
        raise DataError(
            f"skilled must hold one boolean for each of {matching.size} pairs; got {flags.dtype} of {flags.shape}"
        )
    result: NDArray[np.bool_] = flags.astype(np.bool_, copy=False)
    if np.any(result & matching):
        at = int(np.flatnonzero(result & matching)[0])
        raise DataError(f"a skilled pair does not match; pair {at} is said to be both")
    return result
