"""Labels as they are given (strings, numbers) become the names of classes.

Two labels are one class exactly when their names are equal, so labels that text would silently join or split are
refused. What stands before the last slash of a name is the category of the class.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from vitembed.errors import DataError
from vitembed.layouts import Names, name_forgery

_TURN = re.compile(r"@(90|180|270)$")  # as `ImageDataset.with_rotations` names what it turns


def names_of_labels(labels: Iterable[object], forgery_of: Iterable[object] | None) -> Names:
    """Name images after their labels, strings or numbers.

    Args:
        labels: one an image; that of a forgery is not read.
        forgery_of: the label that an image imitates, None for genuine images; None if there are no forgeries.

    Raises:
        DataError: if a label is missing (None or NaN), labels are of several types, or the lengths differ.
    """
    given = [_plain(label) for label in labels]
    writers = [None] * len(given) if forgery_of is None else [_plain(writer) for writer in forgery_of]
    if len(writers) != len(given):
        raise DataError(f"expected forgery_of for each of the {len(given)} labels; got {len(writers)}")
    both = list(zip(given, writers, strict=True))
    _check_types([label if writer is None else writer for label, writer in both])
    return Names(
        [str(label) if writer is None else name_forgery(writer, i) for i, (label, writer) in enumerate(both)],
        [None if writer is None else str(writer) for writer in writers],
    )


def category_of(name: str) -> str:
    """Return the category of a class of this name; a turn stays, for what is turned alike is alike.

    >>> category_of("greek/alpha"), category_of("greek/alpha@90"), category_of("cup")
    ('greek', 'greek@90', '')
    """
    turn = _TURN.search(name)
    return name[: turn.start() if turn else None].rpartition("/")[0] + (turn[0] if turn else "")


def name_numbers(labels: Iterable[object], names: Sequence[str]) -> list[object]:
    """Return labels by name where each is a whole number below the number of names, and as they are where not.

    Raises:
        DataError: naming the first item whose label is negative, which is how torchvision says that there is none.
    """
    if isinstance(labels, np.ndarray | Tensor) and labels.ndim == 1:
        labels = labels.tolist()
    given = [_plain(label) for label in labels]
    numbers = [label for label in given if isinstance(label, int) and label < len(names)]
    if not names or len(numbers) < len(given):
        return given
    for item, number in enumerate(numbers):
        if number < 0:
            raise DataError(f"item {item} has no label; got {number}: leave it out, or take a split with labels")
    return [names[number] for number in numbers]


def _plain(label: object) -> object:
    """Return a label of NumPy or torch as one of Python's own types."""
    if isinstance(label, np.ndarray | Tensor) and label.ndim:
        raise DataError(f"expected one label an image, a string or a number; got one of shape {tuple(label.shape)}")
    return label.item() if isinstance(label, np.generic | np.ndarray | Tensor) else label


def _check_types(labels: Sequence[object]) -> None:
    """Refuse labels that are missing or of several types: 1 and "1" are not known to be one class, nor to be two."""
    for position, label in enumerate(labels):
        if label is None or label != label:  # NaN is what differs from itself
            raise DataError(f"image {position} has no label; got {label!r}")
        if type(label) is not type(labels[0]):
            first, other = (f"{value!r} ({type(value).__name__})" for value in (labels[0], label))
            raise DataError(
                f"expected labels of one type; image 0 has {first} and image {position} has {other}: convert them, so "
                "that it is plain which are one class"
            )
