"""What the metrics accept: shapes, types and values are checked here, once, with errors of one line."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import DataError, VectorError

Floats: TypeAlias = NDArray[np.floating[Any]]
Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]

# Of a similarity matrix this much is held at a time: wide enough for full speed of the matrix product, small
# beside the embeddings of a set for which chunks matter.
CHUNK_BYTES = 64 * 2**20

# Rows with norms outside are divided by their largest number first. A norm must be a normal number of the rows' type,
# and squares of float64 must neither overflow (the norm is infinite then) nor be lost: below the root of the least
# normal number / epsilon those that underflow would count.
_SAFE_NORMS = {
    np.float32: (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)),
    np.float64: (1e-146, float(np.finfo(np.float64).max)),
}


def unit_rows(embeddings: ArrayLike, name: str = "embeddings") -> Floats:
    """Return the rows scaled to unit length, float64 for float64 and integers, float32 for float32 and float16.

    Raises:
        VectorError: not a finite (N, D) array, or a row is zero and so has no direction.
    """
    array = _as_array(embeddings, name)
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise VectorError(f"{name} must be numbers of shape (n, d); got {array.dtype} of shape {array.shape}")
    floats: Floats = array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64, copy=False)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norms: Floats = np.sqrt(np.einsum("nd,nd->n", floats, floats, dtype=np.float64))
    low, high = _SAFE_NORMS[floats.dtype.type]
    odd = np.flatnonzero(~((norms >= low) & (norms <= high)))
    if not odd.size:
        return _divided(floats, norms)
    peaks = np.abs(floats[odd]).max(axis=1, initial=0)
    bad = odd[~np.isfinite(peaks) | (peaks == 0)]
    if bad.size:
        kind = "holds NaN or infinity" if not np.all(np.isfinite(floats[bad[0]])) else "is all zeros"
        raise VectorError(
            f"{name} must be finite and not zero; row {bad[0]} {kind} ({bad.size} such rows of {len(array)})"
        )
    scaled = floats.copy()
    scaled[odd] /= peaks[:, None]
    norms[odd] = np.sqrt(np.einsum("nd,nd->n", scaled[odd], scaled[odd], dtype=np.float64))
    return _divided(scaled, norms)


def _divided(rows: Floats, norms: Floats) -> Floats:
    unit: Floats = rows / norms[:, None].astype(rows.dtype)
    return unit


def label_codes(labels: ArrayLike, n: int, name: str) -> Ints:
    """Return labels as integers 0, 1, ... (n,), one for each distinct class."""
    return np.unique(checked_labels(labels, n, name), return_inverse=True)[1].astype(np.int64)


def checked_labels(labels: ArrayLike, n: int, name: str) -> NDArray[Any]:
    """Return the labels as an array (n,) of integers or strings.

    Raises:
        DataError: not one label for each embedding, or labels of another type, or NaN.
    """
    array = _as_array(labels, name)
    if array.shape != (n,):
        raise DataError(f"{name} must hold one class for each of the {n} embeddings; got shape {array.shape}")
    if array.dtype.kind not in "iubU" and not (array.dtype.kind == "f" and np.all(np.isfinite(array))):
        raise DataError(f"{name} must be integers or strings without gaps; got {array.dtype}")
    return array


def checked_scores(scores: ArrayLike) -> Floats:
    """Return the scores (P,) as float32 or float64.

    Raises:
        VectorError: no finite (P,) array of numbers.
    """
    array = _as_array(scores, "scores")
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise VectorError(f"scores must be numbers of shape (n,); got {array.dtype} of shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise VectorError(f"scores must be finite; {bad.size} of {array.size} are not, the first at position {bad[0]}")
    return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64, copy=False)


def checked_pairs(scores: ArrayLike, is_match: ArrayLike) -> tuple[Floats, Bools]:
    """Return scores (P,) and is_match (P,) bool, with at least one pair of each kind.

    Raises:
        VectorError: scores are no finite (P,) array.
        DataError: `is_match` does not fit, or has one kind of pair only.
    """
    checked = checked_scores(scores)
    flags = _as_array(is_match, "is_match")
    if flags.shape != checked.shape:
        raise DataError(f"is_match must hold one flag for each of {checked.size} scores; got shape {flags.shape}")
    if flags.dtype.kind not in "biuf" or not np.all((flags == 0) | (flags == 1)):
        raise DataError("is_match must hold booleans, or 0 and 1 only")
    matching = flags.astype(np.bool_, copy=False)
    count = int(np.count_nonzero(matching))
    if count in (0, matching.size):
        raise DataError(
            f"pairs of both kinds are needed; got {count} matching and {matching.size - count} non-matching"
        )
    return checked, matching


def slabs(n: int, items: Floats) -> Iterator[slice]:
    """Cut n rows into slices whose scores against all `items` fill about `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (items.itemsize * len(items)))
    for first in range(0, n, rows):
        yield slice(first, min(first + rows, n))


def _as_array(value: ArrayLike, name: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise VectorError(f"{name} must be an array, or lists of equal length; numpy says: {error}") from error
