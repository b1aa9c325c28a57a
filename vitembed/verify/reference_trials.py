"""Trials of questioned images against references, drawn from labelled embeddings as they will happen.

Of each identity some images become references. Its other images are questioned as matches, forgeries of it as skilled
non-matches, and images of other identities as random ones. No identity judges an image twice, so that the numbers of
trials mean what they say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import DataError
from vitembed.verify.reference_rules import Bools, Evidence, Floats, gather_evidence

Ints = NDArray[np.int64]

# How often references of an identity are drawn. Each draw questions other images, so that more draws cost nothing, and
# no single choice of references decides: over seeds, the equal error rate of 19 writers (skilled forgeries) had a
# standard deviation of 1.5 points with one draw, 1.0 with two, 0.9 with four and with eight.
DRAWS = 4

FOLDS = 5

# The least that cross-validation can do with: two identities to learn from beside one to judge.
LEAST_IDENTITIES = 3

# Random non-matches: ten times what is needed, 200 an identity at least, and no more than memory takes.
_RANDOM_EACH, _RANDOM_FACTOR, _RANDOM_MOST = 200, 10, 2_000_000

# Genuine images of one identity that are questioned.
_GENUINE_MOST = 1_000


@dataclass(frozen=True)
class Trials:
    """Questioned images against references: `evidence` (P,), and of each what it is.

    Attributes:
        evidence: of the P trials, those of one set of references together.
        is_match: (P,) whether the image is the identity's own.
        skilled: (P,) whether it imitates the identity.
        identities: (P, 2) whose the references and the image are; of a skilled forgery twice the identity's.
        sets: (S,) the first trial of each set of references.
    """

    evidence: Evidence
    is_match: Bools
    skilled: Bools
    identities: Ints
    sets: Ints


def checked_identities(
    vectors: ArrayLike, labels: ArrayLike, forgery_of: ArrayLike | None
) -> tuple[Floats, Ints, Ints]:
    """Return unit rows (N, D), identities (N,) 0, 1, ... (-1 for forgeries) and whom forgeries imitate (N,) or -1."""
    rows = metrics.unit_rows(vectors).astype(np.float64, copy=False)
    names = np.asarray(labels)
    if names.shape != (len(rows),) or names.dtype.kind not in "iuU":
        raise DataError(
            f"labels must be {len(rows)} whole numbers or texts, one a vector; got {names.dtype} {names.shape}"
        )
    if forgery_of is None:
        codes = np.unique(names, return_inverse=True)[1].astype(np.int64)
        return rows, codes, np.full(len(rows), -1)
    imitated = np.asarray(forgery_of)
    if imitated.shape != names.shape or imitated.dtype.kind not in "iu" or names.dtype.kind not in "iu":
        raise DataError(
            "forgery_of and labels must both be whole numbers, one a vector; "
            f"got {imitated.dtype} {imitated.shape} and {names.dtype} {names.shape}"
        )
    genuine = imitated < 0
    distinct = np.unique(names[genuine])
    unknown = np.setdiff1d(imitated[~genuine], distinct)
    if unknown.size:
        raise DataError(f"forgeries imitate the label {unknown[0]}, which has no genuine image; check forgery_of")
    codes = np.where(genuine, np.searchsorted(distinct, np.where(genuine, names, 0)), -1)
    return rows, codes, np.where(genuine, -1, np.searchsorted(distinct, imitated))


def draw_trials(
    rows: Floats, codes: Ints, imitated: Ints, count: int, impostors: int, rng: np.random.Generator
) -> Trials:
    """Draw references of every identity that has enough images, several times, and question the others.

    Args:
        rows: (N, D) unit rows.
        codes: (N,) identities; see `checked_identities`, as for the next.
        imitated: (N,) whom forgeries imitate.
        count: references of each identity.
        impostors: random non-matches that are needed; ten times as many are drawn, where there are so many.
        rng: where the draws come from.

    Raises:
        DataError: fewer than `LEAST_IDENTITIES` have more than `count` genuine images.
    """
    sizes = np.bincount(codes[codes >= 0]) if (codes >= 0).any() else np.zeros(0, dtype=np.int64)
    usable = np.flatnonzero(sizes > count)
    if len(usable) < LEAST_IDENTITIES:
        raise DataError(
            f"{count} references and one more to question need {LEAST_IDENTITIES} identities with at least "
            f"{count + 1} genuine images; got {len(usable)} of {len(sizes)}. Add images, or take fewer references"
        )
    wanted = min(_RANDOM_MOST, max(_RANDOM_EACH * len(usable), _RANDOM_FACTOR * impostors))
    each = -(-wanted // len(usable))
    parts: list[Evidence] = []
    facts: list[tuple[Bools, Bools, Ints]] = []
    for identity in usable.tolist():
        for references, questioned in _sets(codes, imitated, identity, count, each, rng):
            among = cosines(rows[references], rows[references])
            parts.append(gather_evidence(cosines(rows[questioned], rows[references]), among))
            others = np.where(imitated[questioned] >= 0, imitated[questioned], codes[questioned])
            skilled = imitated[questioned] >= 0
            pair = np.stack([np.full_like(others, identity), others], axis=1)
            facts.append((codes[questioned] == identity, skilled, pair))
    is_match, skilled, pairs = (np.concatenate(part) for part in zip(*facts, strict=True))
    lengths = [len(part) for part in parts]
    return Trials(Evidence.concatenate(parts), is_match, skilled, pairs, np.cumsum([0, *lengths[:-1]]))


def _sets(
    codes: Ints, imitated: Ints, identity: int, count: int, each: int, rng: np.random.Generator
) -> Iterator[tuple[Ints, Ints]]:
    """Yield, for each draw of an identity, the positions of its references (count,) and of what is questioned.

    The references are windows that move evenly over the shuffled genuine images. Every other image is questioned by
    one draw: a genuine one by a draw whose references it is not among, where there is such a draw.
    """
    own = rng.permutation(np.flatnonzero(codes == identity))
    starts = np.arange(DRAWS) * len(own) // DRAWS
    away = (np.arange(len(own))[:, None] - starts) % len(own)  # (own, DRAWS): place in the window of each draw
    free = away >= count
    lots = np.where(free, rng.random(free.shape), -1.0)
    draw_of_own = np.where(free.any(axis=1), lots.argmax(axis=1), -1)
    draw_of_own[np.flatnonzero(draw_of_own >= 0)[_GENUINE_MOST:]] = -1
    others = np.flatnonzero((codes >= 0) & (codes != identity))
    if len(others) > each:
        others = rng.choice(others, each, replace=False)
    rest = np.concatenate([np.flatnonzero(imitated == identity), others])
    draw_of_rest = rng.permutation(len(rest)) % DRAWS
    for draw in range(DRAWS):
        questioned = np.concatenate([own[draw_of_own == draw], rest[draw_of_rest == draw]])
        if len(questioned):
            yield own[away[:, draw] < count], questioned


def folds_of(identities: Ints, seed: int) -> Ints:
    """Return the fold of every identity, by its number; whole identities, at random."""
    enrolled = np.unique(identities[:, 0])
    fold = np.random.default_rng((seed, 1)).permutation(int(identities.max()) + 1) % FOLDS
    # Identities that are enrolled are spread evenly; the others go along.
    fold[np.random.default_rng((seed, 2)).permutation(enrolled)] = np.arange(len(enrolled)) % FOLDS
    return fold


def cosines(left: Floats, right: Floats) -> Floats:
    """Return the cosines (n, m) of unit rows, within [-1, 1] whatever rounding does."""
    result: Floats = np.clip(left @ right.T, -1, 1)
    return result
