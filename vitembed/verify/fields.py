"""Reading values back from JSON: every key and every value is checked, and the first wrong one is named.

A saved verifier that was damaged or mistyped must not decide: unknown and missing keys, texts for numbers, booleans for
counts, and numbers out of their range are errors. Another valid threshold, written on purpose, cannot be told.
"""

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vitembed.errors import VerifierError


def check_keys(values: object, expected: Sequence[str], name: str = "") -> Mapping[str, Any]:
    """Return `values` when it is an object with exactly these keys.

    Args:
        values: what JSON gave.
        expected: all the keys that it must have.
        name: what the object is, for the error.

    Raises:
        VerifierError: it is none, a key is unknown (the nearest known one is named) or missing.
    """
    if not isinstance(values, Mapping):
        what = f"{name} must be an object" if name else "expected an object"
        raise VerifierError(f"{what} with {', '.join(expected)}; got {values!r}")
    for key in values:
        if key not in expected:
            near = difflib.get_close_matches(str(key), expected, n=1)
            raise VerifierError(f"unknown key {key!r}" + (f", the nearest is {near[0]!r}" if near else ""))
    missing = [key for key in expected if key not in values]
    if missing:
        raise VerifierError(f"missing {', '.join(missing)}")
    return values


def number(name: str, value: object, low: float = -1e300, high: float = 1e300) -> float:
    """Return a finite number in [low, high].

    Raises:
        VerifierError: it is none, or out of that range.
    """
    # A whole number of 400 digits is valid JSON, and no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise VerifierError(f"{name} must be a finite number; got {value!r:.80}")
    if not low <= value <= high:
        raise VerifierError(f"{name} must be in [{low:g}, {high:g}]; got {value}")
    return float(value)


def share(name: str, value: object) -> float:
    """Return a number in [0, 1]."""
    return number(name, value, 0, 1)


def count(name: str, value: object, low: int = 0) -> int:
    """Return a whole number that is at least `low`.

    Raises:
        VerifierError: it is none.
    """
    if type(value) is not int or value < low:
        raise VerifierError(f"{name} must be a count of at least {low}; got {value!r:.80}")
    return value


def interval(name: str, value: object) -> tuple[float, float]:
    """Return two numbers in [0, 1], the first no higher than the second.

    Raises:
        VerifierError: it is anything else.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise VerifierError(f"{name} must hold two numbers; got {value!r:.80}")
    low, high = share(name, value[0]), share(name, value[1])
    if low > high:
        raise VerifierError(f"{name} must rise; got {low} and {high}")
    return low, high


def numbers(name: str, value: object, *, rising: bool = False) -> tuple[float, ...]:
    """Return a list of finite numbers, at least two, strictly rising where that is asked for.

    Raises:
        VerifierError: it is anything else.
    """
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise VerifierError(f"{name} must be a list of two numbers or more; got {value!r:.80}")
    result = tuple(number(name, item) for item in value)
    if rising and any(b <= a for a, b in pairwise(result)):
        raise VerifierError(f"{name} must rise from one to the next")
    return result


def text(name: str, value: object) -> str:
    """Return a text.

    Raises:
        VerifierError: it is none.
    """
    if not isinstance(value, str):
        raise VerifierError(f"{name} must be text; got {value!r:.80}")
    return value


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """Return a text that is one of `known`.

    Raises:
        VerifierError: it is none of them.
    """
    if value not in known:
        raise VerifierError(f"{name} must be one of {', '.join(known)}; got {value!r:.80}")
    return str(value)
