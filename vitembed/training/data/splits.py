"""Which images are held out for validation: whole classes, or some images of every class.

All of it works on labels alone. A forgery goes with the class that it imitates: none is trained on while its writer is
held out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def pick_classes(labels: Ints, writers: Ints, share: float, rng: np.random.Generator) -> Mask:
    """Return which images a share of the classes holds, two classes of two images at least, with their forgeries.

    Args:
        labels: (N,) class of each image.
        writers: (N,) the class that an image imitates, -1 for a genuine image.
        share: of the classes, in (0, 1).
        rng: draws them.

    Raises:
        DataError: if there are fewer than four classes; those of forgeries do not count.
    """
    count = len(np.unique(labels[writers < 0]))
    if count < 4:
        raise DataError(
            f"holding out classes for validation needs at least 4 classes; got {count}. "
            "Hold out images (validation 'images'), or nothing ('none')"
        )
    several = np.flatnonzero(np.bincount(labels) >= 2)  # one image has nothing to be found
    number = min(max(2, round(share * count)), count - 2)
    return of_classes(labels, writers, rng.permutation(several)[:number])


def pick_images(labels: Ints, writers: Ints, share: float, rng: np.random.Generator) -> Mask:
    """Return a share of the images of each class of four or more, and of the forgeries of these.

    Arguments are as in `pick_classes`. Two images stay on either side at least: a lone image has no positive.
    """
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) >= 4:
            number = min(max(2, round(share * len(members))), len(members) - 2)
            held_out[members[:number]] = True
            forged = np.flatnonzero(writers == label)
            if len(forged):
                held_out[rng.permutation(forged)[: round(share * len(forged))]] = True
    return held_out


def of_classes(labels: Ints, writers: Ints, wanted: Ints | Sequence[int]) -> Mask:
    """Return which images are of the wanted classes, or imitate one."""
    chosen = np.asarray(wanted, dtype=np.int64)
    return np.isin(labels, chosen) | np.isin(writers, chosen)


def leaked_classes(labels: Ints, writers: Ints, held_out: Mask) -> Ints:
    """Return the classes that are held out as a whole although forgeries of them are trained on."""
    unseen = np.setdiff1d(labels[held_out], labels[~held_out])
    return np.intersect1d(writers[~held_out], unseen)
