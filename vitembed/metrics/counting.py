"""Scores that are read again and again, chunk by chunk, and counted by their leading bits.

The bits of a finite float, with the sign turned, are an integer of the same order; we call it the key. Counting keys by
their leading 16 bits takes a table of fixed size; counting those of one such bucket by their next 16 bits tells all
float32 in it apart, after three more levels all float64. No score is ever rounded.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import DataError, VectorError
from vitembed.metrics.checks import Bools, Floats, Ints, checked_scores

Chunks: TypeAlias = Callable[[], Iterable[tuple[ArrayLike, ArrayLike]]]

BUCKETS = 2**16

CHUNK = 2**18
"""Scores of one chunk: the few arrays of a chunk stay in the cache (four times as many take 1.4 times as long)."""


class ScoreReader:
    """Scores with their kind, in chunks, checked whenever they are read.

    Args:
        chunks: called for each reading; gives pairs of scores (n,) and is_match (n,), the same ones each time.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._dtype: np.dtype[Any] | None = None
        next(self._read(), None)  # the first chunk tells the type

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the scores, float32 or float64."""
        return np.dtype(np.float32) if self._dtype is None else self._dtype

    @property
    def bits(self) -> int:
        """How many bits a key has: 32 or 64."""
        return 8 * self.dtype.itemsize

    def count(self, first: int = 0, shift: int | None = None) -> tuple[Ints, Ints]:
        """Count the pairs of either kind in buckets of keys.

        Args:
            first: the lowest key of the first bucket.
            shift: a bucket holds 2**shift keys; by default all buckets together hold all keys.

        Returns:
            matching and non-matching pairs in each bucket, two arrays (BUCKETS,).
        """
        whole = shift is None
        shift = self.bits - 16 if shift is None else shift
        counts = np.zeros(2 * BUCKETS, dtype=np.int64)
        for scores, matching in self._read() if whole else self._between(first, first + (BUCKETS << shift)):
            found = keys(scores)
            buckets = ((found - found.dtype.type(first)) >> shift).astype(np.int64)
            buckets += np.multiply(matching, BUCKETS, dtype=np.int64)
            counts += np.bincount(buckets, minlength=2 * BUCKETS)
        return counts[BUCKETS:], counts[:BUCKETS]

    def gather(self, first: int, end: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return 2 * (key - `first`) + (1 for a match) of all pairs with keys in [first, end), in any order.

        Args:
            first: the lowest key.
            end: the key beyond the range, which holds floats of one sign; the result is as wide as they are then.
            count: how many pairs the range holds.

        Raises:
            DataError: it holds another number of pairs.
        """
        kind = np.dtype(f"u{self.dtype.itemsize}").type
        packed, filled = np.empty(count, dtype=kind), 0
        for scores, matching in self._between(first, end):
            upto = filled + scores.size
            if upto <= count:
                packed[filled:upto] = (keys(scores) - kind(first)) << kind(1)
                packed[filled:upto] |= matching
            filled = upto
        if filled != count:
            raise changed_chunks()
        return packed

    def next_above(self, value: float) -> float:
        """Return the lowest score above `value`, +inf if there is none."""
        limit = self.dtype.type(value)
        return min((float(np.min(s, where=s > limit, initial=np.inf)) for s, _ in self._read()), default=float("inf"))

    def _between(self, first: int, end: int) -> Iterator[tuple[Floats, Bools]]:
        """Yield what has a key in [first, end), compared as floats: that spares the keys of all the others."""
        lowest, beyond = (key_value(key, self.dtype) for key in (first, end))
        for scores, matching in self._read():
            inside = np.flatnonzero((scores >= lowest) & (scores < beyond))
            yield scores[inside], matching[inside]

    def _read(self) -> Iterator[tuple[Floats, Bools]]:
        for scores, is_match in self._chunks():
            checked = checked_scores(scores)
            matching = checked_flags(is_match, checked.size, "is_match")
            if checked.size == 0:
                continue
            self._dtype = self._dtype or checked.dtype
            if checked.dtype != self._dtype:
                raise VectorError(f"scores of all chunks must be of one type; got {self._dtype} and {checked.dtype}")
            for first in range(0, checked.size, CHUNK):
                yield checked[first : first + CHUNK], matching[first : first + CHUNK]


def array_chunks(scores: NDArray[Any], is_match: NDArray[Any]) -> Chunks:
    """Return a reader's chunks of two arrays (P,), which are not copied."""

    def chunks() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for first in range(0, scores.size, CHUNK):
            yield scores[first : first + CHUNK], is_match[first : first + CHUNK]

    return chunks


def keys(scores: Floats) -> NDArray[Any]:
    """Return unsigned integers of the width and the order of finite float32 or float64; both zeros have one key.

    >>> keys(np.array([-1, -0.0, 0, 1], dtype=np.float32)).tolist()
    [1082130431, 2147483648, 2147483648, 3212836864]
    """
    bits = 8 * scores.itemsize
    signed = (scores + 0).view(f"i{scores.itemsize}")  # -0.0 + 0 is +0.0
    # A negative float grows as its bits fall: turn them all. Of another turn the sign alone.
    turned: NDArray[Any] = (signed ^ ((signed >> (bits - 1)) | np.iinfo(signed.dtype).min)).view(f"u{scores.itemsize}")
    return turned


def key_value(key: int, dtype: np.dtype[Any]) -> Any:
    """Return the float of a key, a scalar of `dtype`; -inf and +inf stand for the keys beyond the finite floats."""
    kind = np.dtype(f"u{dtype.itemsize}")
    lowest, highest = (int(keys(np.array([value], dtype=dtype))[0]) for value in (-np.inf, np.inf))
    return key_values(np.array([min(max(key, lowest), highest)], dtype=kind), dtype)[0]


def key_values(found: NDArray[Any], dtype: np.dtype[Any]) -> Floats:
    """Return the floats of unsigned keys; the inverse of `keys`."""
    sign = found.dtype.type(1 << (8 * dtype.itemsize - 1))
    floats: Floats = np.where(found & sign, found ^ sign, ~found).view(dtype)
    return floats


def counted_keys(packed: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Return the distinct numbers above the lowest bit, ascending, and how often each has that bit set or not.

    >>> [found.tolist() for found in counted_keys(np.array([7, 4, 5, 5], dtype=np.uint32))]
    [[2, 3], [2, 1], [1, 0]]
    """
    counts = np.bincount(packed.astype(np.int64))
    counts = np.append(counts, 0) if counts.size % 2 else counts
    names = np.flatnonzero(counts[::2] + counts[1::2])
    return names, counts[1::2][names], counts[::2][names]


def sorted_keys(packed: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Do as `counted_keys`, for numbers of any size; sorts and changes `packed`."""
    packed.sort()
    one = packed.dtype.type(1)
    below = np.cumsum(packed & one, dtype=np.int64)
    packed >>= one
    last = np.flatnonzero(np.append(packed[1:] != packed[:-1], True))
    matches = np.diff(below[last], prepend=0)
    return packed[last], matches, np.diff(last, prepend=-1) - matches


def changed_chunks() -> DataError:
    """Return the error for chunks that differ from one reading to the next, as those of a used-up generator do."""
    return DataError("the chunks held other scores when read again; they must be the same in each reading")


def checked_flags(flags: ArrayLike, count: int, name: str) -> Bools:
    """Return flags as booleans (n,).

    Raises:
        DataError: not `count` of them, or something else than booleans or 0 and 1.
    """
    array = np.asarray(flags)
    if array.shape != (count,):
        raise DataError(f"{name} must hold one flag for each of {count} scores; got shape {array.shape}")
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf" or not np.all((array == 0) | (array == 1)):
        raise DataError(f"{name} must hold booleans, or 0 and 1 only")
    return array.astype(np.bool_)
