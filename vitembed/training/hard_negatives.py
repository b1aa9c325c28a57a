"""Hard negatives from the whole data set, and the labels that look wrong beside them.

A batch of a hundred images holds few of the wrong images that lie nearest to each other in a set of a hundred thousand.
So every few epochs all training images are embedded and searched with the exact search of `vitembed.index`, and each
image gets the positions of its hardest wrong neighbours, from which the sampler composes batches.

The nearest wrong neighbours are also where false negatives gather: images of the same class under a wrong label. The
guard leaves out a pair that is more alike than either image is to its own nearest positive, and what looks mislabelled
is listed for a person to look at (see `vitembed.training.label_errors`). Neither rule knows a scale of scores, for that
changes while a model learns.
"""

import csv
import importlib.util
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.files import atomic_write
from vitembed.images import ImageSource
from vitembed.index import exact
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.label_errors import VOTES, Suspect, find_suspects

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Wrong neighbours looked at for each image. Under the guard the hardest eight that were kept of Omniglot's characters
# had a mean rank of 8; what lies beyond 64 is not hard.
DEPTH = 64

# From this cosine on two images are copies as far as the model can tell; float32 leaves about 1e-6.
COPY = 1 - 1e-5

# Classes up to this size are searched together, the own class taken out afterwards; larger ones one by one, without it.
_LARGE = 128

_QUERIES = 4_096  # searched at a time
_PRODUCTS = 1 << 24  # scores of a class with itself held at a time: 64 MB

COLUMNS = ("path", "label", "suggested_label", "score", "neighbours_agreeing")


@dataclass(frozen=True)
class HardNegatives:
    """When to search for hard negatives, how many, and how alike they may be.

    Compare with a training without them: short ones on Omniglot did slightly better without. A small model from scratch
    on ten alphabets reached 73 % recall@1 on others after six epochs with them and 74 % without (one seed), and 120
    further steps of one of 25 alphabets gave 81 % and 82 %, with another seed 80 % and 81 %. Long trainings, and sets
    of very many classes, of which a batch holds few, were not measured.

    Attributes:
        every: epochs between two searches. Each costs a pass over the images without gradient, about a third of an
            epoch, and the search itself: 9 s for 20,000 vectors of 384 on one core, growing with their square.
        first: the epoch before which the first search is made, counted from 1. The weights of the first epoch know
            nothing yet of what is alike.
        neighbours: wrong neighbours kept for each image.
        guard: the share, in (0, 1], of an image's score with its nearest positive that a negative must stay below;
            None for no guard. This is TopK-PercPos of NV-Retriever (Moreira et al. 2024, arXiv:2407.15831), asked of
            both images of a pair: a mislabelled image betrays itself by its own far positives, seldom by the other's.
            The paper's 0.95 is for texts; cosines of a young model of images lie closer together. On Omniglot with 3 %
            of the labels wrong, three epochs from scratch, 1.0 kept 60 % of the eight hardest true negatives of an
            image and 0.5 % of the false ones, asked of one image alone 55 % of the false ones; 0.95 kept 1 % of the
            true ones.

    Raises:
        ConfigError: if a value is out of range.
    """

    every: int = 2
    first: int = 2
    neighbours: int = 8
    guard: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("every", "first", "neighbours"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} of hard negatives must be a whole number of at least 1; got {value!r}")
        if self.neighbours > DEPTH:
            raise ConfigError(f"neighbours of hard negatives must be at most {DEPTH}; got {self.neighbours}")
        share = self.guard
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise ConfigError(f"guard of hard negatives must lie in (0, 1], or be None for none; got {self.guard!r}")

    def due(self, epoch: int) -> bool:
        """Tell whether a search belongs before this epoch, counted from 1.

        >>> [epoch for epoch in range(1, 8) if HardNegatives(every=2, first=3).due(epoch)]
        [3, 5, 7]
        """
        return epoch >= self.first and (epoch - self.first) % self.every == 0


@dataclass(frozen=True, eq=False)
class Mined:
    """What a search of the training images found.

    Attributes:
        neighbours: (N, m) int64, positions of the hardest wrong neighbours of each image, hardest first; -1 for none.
        suspects: images whose labels look wrong, most suspect first.
        guarded: how many of the m nearest wrong neighbours, over all images, the guard left out.
        copies: how many of them are copies of the image (a cosine of 1) under another label.
        without: how many images that could be read have no hard negative.
    """

    neighbours: Ints
    suspects: tuple[Suspect, ...]
    guarded: int
    copies: int
    without: int


def require_search() -> None:
    """Check, before hours are spent on training, that hard negatives can be searched for.

    Raises:
        ConfigError: if FAISS is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            "hard negatives are searched for with FAISS, which is not installed: "
            "pip install faiss-cpu, or train without hard negatives"
        )


def embed_all(model: Embedder, batches: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> tuple[Floats, Bools]:
    """Embed all images of a data set as they are, without augmentation.

    Args:
        model: the embedder; its network is left in the mode it was in.
        batches: (b, C, H, W) uint8 pixels, (b,) labels and (b,) positions of the images, in any order; images that
            cannot be read are missing.
        count: N, how many images the data set has.

    Returns:
        (N, dim) float32 unit rows, zeros for images that did not come, and (N,) bool, which of them came.

    Raises:
        VectorError: if the network gives NaN or infinity.
    """
    vectors = np.zeros((count, model.dim), np.float32)
    known = np.zeros(count, np.bool_)
    for pixels, _, positions in batches:
        where = positions.numpy()
        vectors[where] = model.embed_pixels(pixels)
        known[where] = True
    return vectors, known


def find_hard_negatives(
    vectors: Floats,
    labels: Ints,
    settings: HardNegatives,
    *,
    known: Bools | None = None,
    forgery_of: Ints | None = None,
) -> Mined:
    """Search every training image among the images of other classes.

    A copy of an image under another label is never its negative. A skilled forgery may be as alike to the genuine
    images of its writer as it likes, and is never a suspect; forgeries of one writer are no negatives of each other,
    since nobody knows whether one hand made them. An image without a positive has no score to be guarded by: for its
    pairs the other image decides.

    Args:
        vectors: (N, D) float32 unit rows.
        labels: (N,) int64 classes >= 0.
        settings: how many neighbours, and the guard.
        known: (N,) bool, the images to search and to be found; None for all. The rows of others are not looked at.
        forgery_of: (N,) int64, the class whose images a skilled forgery imitates, -1 for genuine images; None where
            there are no forgeries.

    Raises:
        VectorError: if the vectors are not as above.
        DataError: if labels, `known` or `forgery_of` do not fit.
        ConfigError: if FAISS is not installed.
    """
    require_search()
    known = np.ones(len(vectors), np.bool_) if known is None else known
    forgery_of = np.full(len(vectors), -1, np.int64) if forgery_of is None else forgery_of
    _check(vectors, labels, known, forgery_of)
    positives = _positives(vectors, labels, known)
    rows, scores = _wrong_neighbours(vectors, labels, known)
    copies = scores >= COPY
    one_writer = (forgery_of[:, None] >= 0) & (forgery_of[:, None] == forgery_of[rows])
    candidates = (rows >= 0) & ~copies & ~one_writer
    kept = candidates & _below_ceilings(positives[:, 0], rows, scores, labels, forgery_of, settings.guard)
    m = settings.neighbours
    order = np.argsort(~kept, axis=1, kind="stable")[:, :m]  # what was kept first, hardest first
    neighbours = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(rows, order, 1), -1)
    return Mined(
        neighbours=neighbours,
        suspects=find_suspects(labels, positives, rows, scores, forgery_of),
        guarded=int((candidates & ~kept)[:, :m].sum()),
        copies=int(copies[:, :m].sum()),
        without=int((known & (neighbours < 0).all(axis=1)).sum()),
    )


def write_suspects(path: str | os.PathLike[str], dataset: ImageDataset, mined: Mined) -> None:
    """Write the suspected label errors as a CSV table, the most suspect first, all of it or nothing.

    Its columns are path ("image 17" for one without a path), label, suggested_label, score and neighbours_agreeing.

    Args:
        path: the file to write, by custom `suspected_label_errors.csv`.
        dataset: the images that were searched.
        mined: what the search found.

    Raises:
        DataError: if the data set is not the one that was searched.
        VitembedError: if the file cannot be written.
    """
    if len(dataset) != len(mined.neighbours):
        raise DataError(f"expected the {len(mined.neighbours)} images that were searched; got {len(dataset)}")
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for suspect in mined.suspects:
        names = dataset.classes[suspect.label], dataset.classes[suspect.suggested]
        figures = f"{suspect.score:.4f}", f"{suspect.agreeing:.2f}"
        table.writerow([_name(dataset.images[suspect.position], suspect.position), *names, *figures])
    atomic_write(path, text.getvalue())


def _name(image: ImageSource, position: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {position}"


def _check(vectors: Floats, labels: Ints, known: Bools, forgery_of: Ints) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise VectorError(f"expected float32 vectors of shape (n, d); got {vectors.dtype} of shape {vectors.shape}")
    for name, values in (("label", labels), ("known", known), ("forgery_of", forgery_of)):
        if values.shape != (len(vectors),):
            raise DataError(f"expected one {name} a vector; got {values.shape} for {len(vectors)} vectors")
    if len(labels) and labels.min() < 0:
        raise DataError(f"labels must be 0 or above; got {labels.min()}")
    wrong = np.flatnonzero(known & ~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3))  # NaN is wrong, too
    if wrong.size:
        raise VectorError(f"vectors must be of unit length; row {wrong[0]} is not ({wrong.size} such rows)")


def _positives(vectors: Floats, labels: Ints, known: Bools) -> Floats:
    """Return the scores (N, VOTES) of each image with its nearest positives, best first, -inf where there are none."""
    nearest = np.full((len(vectors), VOTES), -np.inf, np.float32)
    for members in _by_class(labels, known):
        rows = vectors[members]
        width = min(VOTES, len(members) - 1)
        step = max(1, _PRODUCTS // len(members))
        for start in range(0, len(members) if width else 0, step):
            scores = rows[start : start + step] @ rows.T  # (s, members)
            own = np.arange(len(scores))
            scores[own, own + start] = -np.inf
            best = np.partition(scores, -width, axis=1)[:, -width:]
            nearest[members[start : start + step], :width] = -np.sort(-best, axis=1)
    return nearest


def _wrong_neighbours(vectors: Floats, labels: Ints, known: Bools) -> tuple[Ints, Floats]:
    """Return positions and scores (N, DEPTH) of the nearest images of other classes; -1 and -inf where there are none.

    Every image gets as many as there are, however large its class: the search asks for its whole class more, or, where
    that is much, leaves the class out.
    """
    vectors = np.ascontiguousarray(vectors)
    rows = np.full((len(vectors), DEPTH), -1, np.int64)
    scores = np.full((len(vectors), DEPTH), -np.inf, np.float32)

    def search(queries: Ints, mask: Bools, k: int) -> None:
        """Fill in the k nearest of the masked rows for some images."""
        for start in range(0, len(queries), _QUERIES):
            part = queries[start : start + _QUERIES]
            best = exact.nearest(exact.Plain(vectors), mask, vectors[part], k)
            found, alike = (np.stack(table) for table in zip(*best, strict=True))
            wrong = labels[found] != labels[part, None]
            order = np.argsort(~wrong, axis=1, kind="stable")[:, :DEPTH]
            there = np.take_along_axis(wrong, order, 1)
            width = slice(order.shape[1])
            rows[part, width] = np.where(there, np.take_along_axis(found, order, 1), -1)
            scores[part, width] = np.where(there, np.take_along_axis(alike, order, 1), -np.inf)

    together = []
    for members in _by_class(labels, known):
        if len(members) <= _LARGE:
            together.append(members)
        elif len(members) < np.count_nonzero(known):
            search(members, known & (labels != labels[members[0]]), DEPTH)
    if together:
        search(np.concatenate(together), known, DEPTH + max(map(len, together)))
    return rows, scores


def _by_class(labels: Ints, known: Bools) -> list[Ints]:
    """Return the positions of each class's known images."""
    positions = np.flatnonzero(known)
    order = positions[np.argsort(labels[positions], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def _below_ceilings(
    nearest: Floats, rows: Ints, scores: Floats, labels: Ints, forgery_of: Ints, guard: float | None
) -> Bools:
    """Return which of the pairs (N, DEPTH) are less alike than the guard allows for both images.

    Args:
        nearest: (N,) the score of each image with its nearest positive; -inf without one.
        rows: (N, DEPTH) the other image of each pair.
        scores: (N, DEPTH) of the pairs.
        labels: (N,) classes.
        forgery_of: (N,) the class that a forgery imitates, or -1.
        guard: see `HardNegatives`.
    """
    if guard is None:
        return np.ones(rows.shape, np.bool_)
    ceilings = np.minimum(nearest, guard * nearest)  # a share of a score below 0 would be above it
    ceilings[np.isneginf(nearest)] = np.inf
    imitation = (forgery_of[:, None] == labels[rows]) | (forgery_of[rows] == labels[:, None])
    below: Bools = imitation | (scores < np.minimum(ceilings[:, None], ceilings[rows]))
    return below
