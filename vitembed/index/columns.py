"""Metadata as columns: what a process keeps of the keys that filters asked for, so that a filter costs milliseconds.

A column holds the values of one key by row, each kind in the form that is fastest to compare:

- a byte a row says whether the key is missing, null, false, true or something else;
- numbers lie in a float64 array, NaN where there is none;
- texts are coded by a dictionary of the distinct ones, in one, two or four bytes a row. So are the whole numbers that
  float64 cannot hold exactly, so that every comparison of numbers is exact.

An array is allocated when its first value comes: a category costs 2 bytes a row, a number 9, a path that no other row
has 5 and its share of the dictionary, some 150 with the path itself (12 more once a range or prefix was asked for).
Lists and mappings, and the NaN that JSON does not know, are present and equal nothing.

Rows are only ever appended and the metadata of a row never change, so a column is extended and never built again. A row
that was dead when it was read counts as missing.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vitembed.errors import SearchIndexError

BoolArray = npt.NDArray[np.bool_]
Scalar = str | int | float | bool | None
Order = Literal["$lt", "$lte", "$gt", "$gte"]
Reader = Callable[[int, int], Iterable[tuple[int, str]]]

# Rows read and parsed at a time: more are no faster, and take more memory on the way.
CHUNK = 4_096

# Kinds of a row's value, in `Column._kinds`; 0 where the key is missing.
_VALUE, _NULL, _FALSE, _TRUE = 1, 2, 3, 4

_ABSENT = object()

# Up to here every whole number is a float64.
_EXACT = 2**53

# Up to so many are compared one by one, faster than looking each row's code up in a table, or its number in a list.
_FEW_CODES = 16
_FEW_NUMBERS = 128


class Columns:
    """The metadata of an index by key and row, read as far as it was asked for.

    Args:
        read: yields row number and metadata (JSON text of a mapping) of the live rows from `start` to before `stop`,
            by row.

    Attributes:
        rows: how many rows the last `require` was for: the length of the masks.
    """

    def __init__(self, read: Reader) -> None:
        self.rows = 0
        self._read = read
        self._columns: dict[str, Column] = {}

    def require(self, keys: Iterable[str], rows: int) -> None:
        """Have the columns of these keys ready for the first `rows` rows, reading only rows that they lack.

        Raises:
            SearchIndexError: metadata cannot be read; what was read before stays.
        """
        needed = {key: self._columns.setdefault(key, Column()) for key in keys}
        while behind := {key: column for key, column in needed.items() if column.rows < rows}:
            # Those that are furthest behind, up to where the next one is: each row is parsed once for all of them.
            start = min(column.rows for column in behind.values())
            ends = (column.rows for column in behind.values() if column.rows > start)
            stop = min(start + CHUNK, rows, *ends)
            found = list(self._read(start, stop))
            places = np.array([row for row, _ in found], np.int64)
            entries = _parsed(found)
            for key, column in behind.items():
                if column.rows == start:
                    column.extend(stop, places, [entry.get(key, _ABSENT) for entry in entries], rows)
        self.rows = rows

    def column(self, key: str) -> "Column":
        """Return the column of a key that was required; its masks can be longer than `rows`."""
        return self._columns[key]

    def forget(self) -> None:
        """Go back to knowing nothing: after a change was undone or rows were numbered anew."""
        self._columns.clear()
        self.rows = 0


class Column:
    """The values of one key; every method but `extend` returns a mask (rows,) bool of its own.

    Attributes:
        rows: how many rows were taken in.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._kinds = _Array(np.uint8, 0)
        self._numbers = _Array(np.float64, math.nan)
        self._integers = _Dictionary()  # those that float64 does not hold
        self._texts = _Dictionary()

    def extend(self, stop: int, places: npt.NDArray[np.int64], values: list[Any], room: int = 0) -> None:
        """Take in the rows up to `stop`.

        Args:
            stop: number of the row after the last new one.
            places: (n,) numbers of the new rows that live.
            values: n values as `json.loads` gives them, or `_ABSENT`.
            room: how many rows will soon be there, to allocate memory once.
        """
        room = max(room, stop)
        kinds = list(map(type, values))
        distinct = set(kinds)
        if len(distinct) == 1:
            self._put(distinct.pop(), places, values, room)
        for kind in distinct:
            chosen = [number for number, other in enumerate(kinds) if other is kind]
            self._put(kind, places[chosen], [values[number] for number in chosen], room)
        self.rows = stop

    def _put(self, kind: type[object], places: npt.NDArray[np.int64], values: list[Any], room: int) -> None:
        if kind is object:  # _ABSENT
            return
        if kind is bool:
            self._kinds.put(places, np.where(values, _TRUE, _FALSE), room)
            return
        self._kinds.put(places, _NULL if kind is type(None) else _VALUE, room)
        if kind is str:
            self._texts.put(places, values, room)
        elif kind is float or (kind is int and max(map(abs, values)) <= _EXACT):
            self._numbers.put(places, np.array(values, np.float64), room)
        elif kind is int:
            exact = np.array([_nearest(value) == value for value in values])
            of = [float(value) for value, fits in zip(values, exact, strict=True) if fits]
            self._numbers.put(places[exact], np.array(of, np.float64), room)
            rest = [value for value, fits in zip(values, exact, strict=True) if not fits]
            self._integers.put(places[~exact], rest, room)

    def present(self) -> BoolArray:
        """Return where the key is there, whatever its value."""
        return np.asarray(self._kinds.view(self.rows) != 0)

    def one_of(self, values: Iterable[Scalar]) -> BoolArray:
        """Return where the value is one of these, of the same JSON type: True is not 1, but 1 is 1.0."""
        wanted = list(values)
        mask = np.zeros(self.rows, np.bool_)
        for code, constant in ((_NULL, None), (_FALSE, False), (_TRUE, True)):
            if any(value is constant for value in wanted):
                mask |= self._kinds.view(self.rows) == code
        numbers = [value for value in wanted if isinstance(value, int | float) and not isinstance(value, bool)]
        if numbers:
            mask |= self._equal_numbers([near for value in numbers if (near := _nearest(value)) == value])
            mask |= self._integers.one_of(numbers, self.rows)
        texts = [value for value in wanted if isinstance(value, str)]
        if texts:
            mask |= self._texts.one_of(texts, self.rows)
        return mask

    def _equal_numbers(self, wanted: list[float]) -> BoolArray:
        numbers = self._numbers.view(self.rows)
        if len(wanted) <= _FEW_NUMBERS:
            return _any_equal(numbers, wanted)
        ordered = np.unique(wanted)
        # NaN goes after all others, where clipping compares it with the last number, which it does not equal.
        return np.asarray(ordered.take(np.searchsorted(ordered, numbers), mode="clip") == numbers)

    def compared(self, order: Order, bound: str | int | float) -> BoolArray:
        """Return where the value is a number on this side of a number, or a text (by code point) of a text."""
        if isinstance(bound, str):
            return self._texts.compared(order, bound, self.rows)
        numbers, near = self._numbers.view(self.rows), _nearest(bound)
        # A bound between two float64: its neighbour `near` is compared, strictly or not by the side it lies on.
        strict = order in ("$lt", "$gt") if near == bound else (near > bound) == (order in ("$lt", "$lte"))
        if order in ("$lt", "$lte"):
            mask = numbers < near if strict else numbers <= near
        else:
            mask = numbers > near if strict else numbers >= near
        return np.asarray(mask) | self._integers.compared(order, bound, self.rows)

    def prefixed(self, prefix: str) -> BoolArray:
        """Return where the value is a text that begins with this one."""
        return self._texts.prefixed(prefix, self.rows)


class _Array:
    """A growing array, `fill` where nothing was put; it takes no memory until something is."""

    def __init__(self, dtype: npt.DTypeLike, fill: float) -> None:
        self._fill = fill
        self._data: npt.NDArray[Any] = np.empty(0, dtype)

    def view(self, rows: int) -> npt.NDArray[Any]:
        """Return the first rows, to be read only."""
        if len(self._data) < rows:
            if not len(self._data):
                return np.broadcast_to(np.array(self._fill, self._data.dtype), rows)
            self._grow(rows)
        return self._data[:rows]

    def put(self, places: npt.NDArray[np.int64], values: npt.NDArray[Any] | int, room: int) -> None:
        """Set the rows of these places, of which none is `room` or more."""
        if len(places):
            if len(self._data) < room:
                self._grow(room)
            self._data[places] = values

    def widen(self, largest: int) -> None:
        """Have room for codes up to this one."""
        if largest > np.iinfo(self._data.dtype).max:
            self._data = self._data.astype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.int32)

    def _grow(self, rows: int) -> None:
        # An eighth more than before at least, so that many small additions do not copy the whole each time.
        grown = np.full(max(rows, len(self._data) * 9 // 8), self._fill, self._data.dtype)
        grown[: len(self._data)] = self._data
        self._data = grown


class _Codes(dict[Any, int]):
    """Numbers for values, from 1 in the order in which they come; 0 is for rows without one."""

    def __missing__(self, value: object) -> int:
        code = self[value] = len(self) + 1
        return code


class _Dictionary:
    """Values of one kind that have an order, texts or whole numbers, as codes; each method's mask is (rows,) bool."""

    def __init__(self) -> None:
        self._codes = _Codes()
        self._rows = _Array(np.uint8, 0)
        self._values: list[Any] = []  # by code - 1; brought up to date, as the next, only when an order is asked for
        self._order: npt.NDArray[np.int32] = np.empty(0, np.int32)  # the codes - 1, by value

    def put(self, places: npt.NDArray[np.int64], values: list[Any], room: int) -> None:
        """Set the rows of these places."""
        codes = np.fromiter(map(self._codes.__getitem__, values), np.int32, len(values))
        self._rows.widen(len(self._codes))
        self._rows.put(places, codes, room)

    def one_of(self, values: Iterable[Any], rows: int) -> BoolArray:
        """Return where the value is one of these."""
        codes = {self._codes.get(value, 0) for value in values} - {0}
        return self._coded(np.array(sorted(codes), np.int32), rows)

    def compared(self, order: Order, bound: str | int | float, rows: int) -> BoolArray:
        """Return where the value is on this side of a bound."""
        # Equal values are before the cut of <= and >, and behind the cut of < and >=.
        bisect = bisect_right if order in ("$lte", "$gt") else bisect_left
        ordered = self._ordered()
        cut = bisect(ordered, bound, key=self._values.__getitem__)
        return self._coded(ordered[:cut] + 1 if order in ("$lt", "$lte") else ordered[cut:] + 1, rows)

    def prefixed(self, prefix: str, rows: int) -> BoolArray:
        """Return where the value, a text, begins with this one."""

        def head(place: int) -> str:
            return str(self._values[place][: len(prefix)])

        ordered = self._ordered()
        start, stop = (bisect(ordered, prefix, key=head) for bisect in (bisect_left, bisect_right))
        return self._coded(ordered[start:stop] + 1, rows)

    def _coded(self, codes: npt.NDArray[np.int32], rows: int) -> BoolArray:
        """Return where the code is one of these, all of which are known."""
        if len(codes) <= _FEW_CODES:
            return _any_equal(self._rows.view(rows), codes.tolist())
        table = np.zeros(len(self._codes) + 1, np.bool_)
        table[codes] = True
        return np.asarray(table[self._rows.view(rows)])

    def _ordered(self) -> Any:
        """Return the codes - 1 by value, (n,) int32."""
        # Those that came since the last time are sorted in: two runs, of which one is in order already.
        known = len(self._order)
        if known < len(self._codes):
            self._values = list(self._codes)
            places = [*self._order.tolist(), *sorted(range(known, len(self._values)), key=self._values.__getitem__)]
            self._order = np.array(sorted(places, key=self._values.__getitem__), np.int32)
        return self._order


def _any_equal(array: npt.NDArray[Any], values: Sequence[float]) -> BoolArray:
    """Return where an array equals one of a few values."""
    mask = np.asarray(array == values[0]) if values else np.zeros(len(array), np.bool_)
    for value in values[1:]:
        mask |= array == value
    return mask


def _nearest(value: int | float) -> float:
    """Return the float64 next to a number, infinite beyond the largest one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _parsed(found: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Return the metadata of rows, parsed together, which takes a third of the time of one by one."""
    try:
        entries = json.loads(f"[{','.join(text for _, text in found)}]")
    except (ValueError, RecursionError):
        entries = []
    if len(entries) == len(found) and set(map(type, entries)) <= {dict}:
        return list(entries)
    return list(_parsed_singly(found))


def _parsed_singly(found: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for row, text in found:
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unreadable(row, str(error)) from error
        if not isinstance(entry, dict):
            raise _unreadable(row, f"it is no mapping but {text!r:.80}")
        yield entry


def _unreadable(row: int, why: str) -> SearchIndexError:
    return SearchIndexError(f"the metadata of row {row} must be JSON to filter by it: {why}; add its entry again")
