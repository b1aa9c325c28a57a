"""What may go into an index: the checks of ids, vectors and metadata, before anything is changed.

Each returns its argument in the one form that the rest of the package works with, or raises an error that names the
item.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.errors import DataError, VectorError
from vitembed.index.vectors import FloatArray

Metadata = dict[str, Any]

# How far from 1 a row's length may be: rounding to float16 stays below it, a forgotten normalisation does not.
UNIT_TOLERANCE = 1e-3

MAX_ID_BYTES = 1_024

# How deep the lists and mappings of metadata may be nested: less than what Python can read back at any call depth.
MAX_NESTING = 100


def checked_ids(ids: Iterable[str], distinct: bool = True) -> list[str]:
    """Return ids as a list of plain strings, in order.

    Args:
        ids: the ids.
        distinct: whether an id that comes twice is an error; otherwise it is taken once.

    Raises:
        DataError: one of them cannot be an id, or comes twice.
    """
    if isinstance(ids, str | bytes):
        raise DataError(f"ids must be a list of strings; got the single {ids!r}; write [{ids!r}]")
    names: dict[str, None] = {}
    for name in ids:
        problem = id_problem(name)
        if problem:
            shown = repr(name)
            raise DataError(f"the id {shown if len(shown) <= 80 else shown[:77] + '...'} {problem}")
        if name in names and distinct:
            raise DataError(f"ids must be different in one call; {name!r} comes twice")
        names[str(name)] = None
    return list(names)


def id_problem(name: object) -> str | None:
    """Return what makes a value unfit to be an id, or None when it is fit."""
    if not isinstance(name, str):
        return f"must be a string; got {type(name).__name__}"
    if not name:
        return "is empty; give every entry a name"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name):
        return "holds control characters; remove them"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode; rename it"
    return f"is longer than {MAX_ID_BYTES:,} bytes; shorten it" if size > MAX_ID_BYTES else None


def checked_metadata(metadata: Sequence[Metadata | None] | None, names: list[str]) -> list[str]:
    """Return one JSON text for each id.

    Raises:
        DataError: there is not one mapping for each id, or one cannot be written as JSON.
    """
    if metadata is None:
        return ["{}"] * len(names)
    if isinstance(metadata, Mapping) or len(metadata) != len(names):
        raise DataError(
            f"metadata must be a list with one mapping for each of the {len(names)} ids; got {len(metadata)}"
        )
    texts = []
    for name, value in zip(names, metadata, strict=True):
        if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise DataError(f"the metadata of {name!r} must be a dict with strings as keys; got {value!r:.80}")
        try:
            text = json.dumps(value or {}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            text.encode()
            _require_shallow(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the metadata of {name!r} cannot be written as JSON: {error}") from error
        texts.append(text)
    return texts


def _require_shallow(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = deepest = 0
    for character in re.sub(r'"(?:[^"\\]|\\.)*"', "", text):
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise ValueError(f"it is nested {deepest} deep; {MAX_NESTING} is the most")


def checked_vectors(
    vectors: npt.ArrayLike, dim: int, names: Sequence[str] | None = None, *, single: bool = False
) -> FloatArray:
    """Return vectors as float32 rows that can be stored or searched with.

    Args:
        vectors: (n, dim) numbers; rows finite and of unit length.
        dim: the width that is wanted.
        names: what to call the rows in a message; their numbers by default.
        single: take a vector (dim,) as one row.

    Returns:
        (n, dim) float32, contiguous.

    Raises:
        VectorError: the shape, the type or a row's values are not as above; the message names the first such row.
    """
    try:
        array = np.asarray(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VectorError(f"vectors must be an array of shape (n, {dim}); {error}".splitlines()[0]) from error
    if array.dtype.kind not in "fiu":
        raise VectorError(f"vectors must be an array of numbers of shape (n, {dim}); got dtype {array.dtype}")
    if single and array.ndim == 1:
        array = array[None]  # (dim,) -> (1, dim)
    if array.ndim != 2 or array.shape[1] != dim:
        raise VectorError(
            f"vectors must have shape (n, {dim}) to match this index; got {array.shape}. "
            "Was it built with another model?"
        )
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is reported below
        rows = np.ascontiguousarray(array, np.float32)
    _require_unit(rows, names)
    return rows


def _require_unit(rows: FloatArray, names: Sequence[str] | None) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # a row that is not finite has no finite length
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        good = np.abs(lengths - 1.0) <= UNIT_TOLERANCE
    bad = np.flatnonzero(~good)
    if not len(bad):
        return
    first = int(bad[0])
    name = f"row {first}" if names is None else f"the row of {names[first]!r}"
    if not np.isfinite(rows[first]).all():
        raise VectorError(f"vectors must be finite; {name} holds NaN or infinite numbers")
    raise VectorError(
        f"vectors must have unit length; {name} has length {lengths[first]:.4g}. "
        "Normalise first: v / np.linalg.norm(v, axis=1, keepdims=True)"
    )
