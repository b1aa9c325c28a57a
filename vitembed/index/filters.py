"""Filters: which entries a search may return, by their metadata, as a small typed mapping.

    {"category": "shoe"}                     equal
    {"price": {"$gte": 5, "$lt": 10}}        operators; all of those of a key hold
    {"category": "shoe", "price": 5}         all keys hold
    {"$or": [{...}, {...}]}                  also "$and"; one at least
    {"$not": {...}}

| operator | holds for the entries |
|---|---|
| `$eq` | whose value is this text, number, bool or null; `{"key": value}` says the same |
| `$in` | whose value is one of a list; of an empty one: for none |
| `$gt` `$gte` `$lt` `$lte` | whose value is a number above, ... a number, or a text after, ... a text, by code point |
| `$prefix` | whose value is a text that begins with this one |
| `$exists` | that have the key, whatever its value (true), or have not (false) |
| `$ne` `$nin` | for which `$eq` or `$in` does not hold, those without the key among them |

What a filter means is exact:

- Types are JSON's: true is not 1, "1" is not 1, but 1 is 1.0; whole numbers of any size compare exactly.
- None asks for an explicit null; a key that is missing equals nothing.
- Numbers are never compared with texts.
- A list or mapping in the metadata is there for `$exists`, and equals nothing.
- `$not` is the complement: it holds for every entry for which the filter within does not.
- `{}` holds for every entry.

A key of the metadata that begins with "$" cannot be asked for. `parse` makes a checked `Filter` of a mapping;
`parse_text` makes the mapping of what was typed on a command line.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any

import numpy as np

from vitembed.errors import ConfigError, unknown_name
from vitembed.index.columns import BoolArray, Column, Columns, Scalar

# How deep "$and", "$or" and "$not" may nest.
MAX_DEPTH = 32

_ORDERS = ("$gt", "$gte", "$lt", "$lte")
_OPERATORS = ("$eq", "$ne", *_ORDERS, "$in", "$nin", "$prefix", "$exists")
_JOINS = ("$and", "$or", "$not")

# The operators of the shorthand; of those that begin at one place, the longer comes first.
_SIGNS = {"!=": "$ne", "<=": "$lte", ">=": "$gte", "^=": "$prefix", "=": "$eq", "<": "$lt", ">": "$gt"}
_SHORTHAND = re.compile(rf"(.+?)({'|'.join(map(re.escape, _SIGNS))})(.*)", re.DOTALL)


class Filter(ABC):
    """A checked filter; it compares equal to itself alone, for True and 1 are not the same filter."""

    @abstractmethod
    def keys(self) -> set[str]:
        """Return the keys of the metadata that must be known to apply it."""

    @abstractmethod
    def rows(self, columns: Columns) -> BoolArray:
        """Return which rows it holds for.

        Args:
            columns: those of `keys`, required before.

        Returns:
            (columns.rows,) bool, to be changed at will; rows that are dead count as entries without metadata.
        """


@dataclass(frozen=True, eq=False)
class Compare(Filter):
    """One operator on one key.

    Attributes:
        key: of the metadata's top level.
        operator: `$eq`, `$in`, `$gt`, `$gte`, `$lt`, `$lte`, `$prefix` or `$exists`; the others are a `Not` of these.
        value: a plain scalar; a tuple of them for `$in`; True for `$exists`.
    """

    key: str
    operator: str
    value: Any

    def keys(self) -> set[str]:
        """Return its key."""
        return {self.key}

    def rows(self, columns: Columns) -> BoolArray:
        """Return which rows it holds for."""
        return self._mask(columns.column(self.key))[: columns.rows]

    def _mask(self, column: Column) -> BoolArray:
        match self.operator:
            case "$exists":
                return column.present()
            case "$eq":
                return column.one_of([self.value])
            case "$in":
                return column.one_of(self.value)
            case "$prefix":
                return column.prefixed(self.value)
            case "$gt" | "$gte" | "$lt" | "$lte" as order:
                return column.compared(order, self.value)
        raise AssertionError(self.operator)


@dataclass(frozen=True, eq=False)
class AllOf(Filter):
    """Filters that must all hold; without any it holds for every row."""

    parts: tuple[Filter, ...]

    def keys(self) -> set[str]:
        """Return the keys of all parts."""
        return set[str]().union(*(part.keys() for part in self.parts))

    def rows(self, columns: Columns) -> BoolArray:
        """Return which rows it holds for."""
        return reduce(and_, (part.rows(columns) for part in self.parts), np.ones(columns.rows, np.bool_))


@dataclass(frozen=True, eq=False)
class AnyOf(Filter):
    """Filters of which one must hold."""

    parts: tuple[Filter, ...]

    def keys(self) -> set[str]:
        """Return the keys of all parts."""
        return set[str]().union(*(part.keys() for part in self.parts))

    def rows(self, columns: Columns) -> BoolArray:
        """Return which rows it holds for."""
        return reduce(or_, (part.rows(columns) for part in self.parts), np.zeros(columns.rows, np.bool_))


@dataclass(frozen=True, eq=False)
class Not(Filter):
    """A filter that must not hold."""

    part: Filter

    def keys(self) -> set[str]:
        """Return the keys of its part."""
        return self.part.keys()

    def rows(self, columns: Columns) -> BoolArray:
        """Return which rows it holds for."""
        return ~self.part.rows(columns)


def parse(where: Mapping[str, Any]) -> Filter:
    """Return the filter that a mapping describes (see above).

    Raises:
        ConfigError: it is no mapping, holds an unknown operator or a value that its operator does not take, or nests
            more than `MAX_DEPTH` deep; the message names the key.
    """
    return _parsed(where, "where", 0)


def _parsed(where: object, name: str, depth: int) -> Filter:
    if not isinstance(where, Mapping):
        example = 'write {"key": value}'
        raise ConfigError(f"{name} must map keys of the metadata to values; got {_shown(where)}; {example}")
    if depth > MAX_DEPTH:
        raise ConfigError(f"where must not nest $and, $or and $not more than {MAX_DEPTH} deep; write a flatter filter")
    parts: list[Filter] = []
    for key, value in where.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name} must have texts as keys; got {_shown(key)}; the metadata has no other keys")
        if key.startswith("$"):
            parts.append(_joined(key, value, depth))
        elif isinstance(value, Mapping):
            parts += _conditions(key, value)
        else:
            parts.append(_compared(key, "$eq", value))
    return parts[0] if len(parts) == 1 else AllOf(tuple(parts))


def _joined(operator: str, value: object, depth: int) -> Filter:
    """Return the filter of "$and", "$or" or "$not"."""
    if operator in _OPERATORS:
        raise ConfigError(
            f'where must have {operator} below a key, as {{"key": {{"{operator}": ...}}}}; got it as a key'
        )
    if operator not in _JOINS:
        raise unknown_name("operator", operator[:60], _JOINS)
    if operator == "$not":
        return Not(_parsed(value, "where must be a filter below '$not': it", depth + 1))
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"where must have a list of at least one filter below {operator!r}; got {_shown(value)}")
    inner = f"where must be a list of filters below {operator!r}: each"
    parts = tuple(_parsed(part, inner, depth + 1) for part in value)
    return AllOf(parts) if operator == "$and" else AnyOf(parts)


def _conditions(key: str, conditions: Mapping[object, object]) -> list[Filter]:
    """Return the filters of the operators on a key."""
    if not conditions:
        raise ConfigError(f'where must have an operator below {_shown(key)}, as {{"$gte": 5}}; got an empty mapping')
    for operator in conditions:
        if operator in _JOINS:
            raise ConfigError(f"where must have {operator} around whole filters, not below the key {_shown(key)}")
        if operator not in _OPERATORS:
            name = operator if isinstance(operator, str) else _shown(operator)
            raise unknown_name(f"operator below {_shown(key)}:", name[:60], _OPERATORS)
    return [_compared(key, str(operator), value) for operator, value in conditions.items()]


def _compared(key: str, operator: str, value: object) -> Filter:
    """Return the filter of one operator on a key, its value checked."""
    if operator in ("$in", "$nin"):
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            raise _refused(key, operator, "a list of values", value)
        wanted = tuple(_scalar(key, operator, one) for one in value)
        return Compare(key, "$in", wanted) if operator == "$in" else Not(Compare(key, "$in", wanted))
    plain = _scalar(key, operator, value)
    if operator == "$exists":
        if not isinstance(plain, bool):
            raise _refused(key, operator, "true or false", value)
        return Compare(key, operator, True) if plain else Not(Compare(key, operator, True))
    if operator == "$prefix" and not isinstance(plain, str):
        raise _refused(key, operator, "a text", value)
    if operator in _ORDERS and (plain is None or isinstance(plain, bool)):
        raise _refused(key, operator, "a number or a text", value)
    return Not(Compare(key, "$eq", plain)) if operator == "$ne" else Compare(key, operator, plain)


def _scalar(key: str, operator: str, value: object) -> Scalar:
    """Return a value as exactly the built-in type that it is a kind of; a scalar of numpy too."""
    plain = value.item() if isinstance(value, np.bool_ | np.integer | np.floating) else value
    if plain is None or isinstance(plain, bool):
        return plain
    if isinstance(plain, int):
        return int(plain)
    if isinstance(plain, str):
        return str.__str__(plain)
    if isinstance(plain, float):
        if not math.isfinite(plain):
            raise _refused(key, operator, "a finite number", value)
        return float(plain)
    raise _refused(key, operator, "a text, number, bool or None (a list goes below $in)", value)


def _refused(key: str, operator: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"where must have {wanted} for {_shown(key)} {operator}; got {_shown(value)}")


def _shown(value: object) -> str:
    """Return a value on one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_texts(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the filter that several texts of the command line make together; None for none.

    Raises:
        ConfigError: one of them is no filter.
    """
    parsed = [parse_text(text) for text in texts]
    return {"$and": parsed} if len(parsed) > 1 else parsed[0] if parsed else None


def parse_text(text: str) -> dict[str, Any]:
    """Return the filter that a text means, as `parse` takes it.

    The text is a mapping in JSON, or one comparison: `key=value`, `key!=value`, `key<5`, `key<=5`, `key>5`, `key>=5` or
    `key^=prefix`. There the value is a number, true, false, null or a text in double quotes if it reads as one in JSON,
    else the text as it is; spaces around key and value do not count. Several texts together are
    `{"$and": [parse_text(text), ...]}`.

    Raises:
        ConfigError: it is neither, or `parse` does not take what it means.

    >>> parse_text("price>=5"), parse_text("category=shoe")
    ({'price': {'$gte': 5}}, {'category': 'shoe'})
    """
    where = _from_json(text) if text.lstrip().startswith("{") else _from_shorthand(text)
    parse(where)
    return where


def _from_json(text: str) -> dict[str, Any]:
    try:
        where: dict[str, Any] = json.loads(text, object_pairs_hook=_distinct)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the filter {_shown(text)} must be one mapping in JSON: {error}") from error
    return where


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of pairs; Python itself would drop the first of two equal keys without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ConfigError(
            f"a filter must have a key once in a mapping; {twice!r} comes twice; use $and, or one mapping"
        )
    return found


def _from_shorthand(text: str) -> dict[str, Any]:
    match = _SHORTHAND.fullmatch(text)
    key, sign, value = (part.strip() for part in match.groups()) if match else ("", "", "")
    if not key or key.startswith("$"):
        forms = "key=value, key!=value, key<5, key<=5, key>5, key>=5, key^=prefix or a mapping in JSON"
        raise ConfigError(f"a filter must be {forms}; got {_shown(text)}")
    if value.startswith(("=", "<", ">")):
        raise ConfigError(f"the filter {_shown(text)} has two signs; if the value begins with one, put it in quotes")
    plain: Scalar = value
    try:
        read = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        read = value
    # A prefix is a text even when it has the looks of a number.
    if isinstance(read, str) or (sign != "^=" and not isinstance(read, list | dict)):
        plain = read
    return {key: plain if sign == "=" else {_SIGNS[sign]: plain}}


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which Python reads and JSON does not know
