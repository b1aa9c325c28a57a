"""Is what a model is judged on really unseen? Identities, files and near-duplicates on both sides of a split."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed import metrics
from vitembed.errors import ConfigError, DataError, ImageError
from vitembed.images import ImageSource

# Images of two identities are different pictures; a near-duplicate is nearer still. As near as a third of the distance
# 1 - cosine that 1 training image in 100 has to its nearest of another identity was no image of another identity, of
# three models (two of signatures, one of photographs) and 330 images never trained on. Of copies that were scaled by
# 0.9, it was 97, 23 and 80 of 100; of those saved again as JPEG of quality 60, 6, 41 and 100 of 100.
_QUANTILE, _SHARE = 0.01, 1 / 3
_SAMPLE = 2_000  # training images that this is measured on

Floats = NDArray[np.floating[Any]]

_NAMED = 5  # in a warning
_KEPT = 1_000  # near-duplicates that are listed; their number is counted in full
_SLAB = 1_024  # rows of the test side multiplied at a time


@dataclass(frozen=True)
class Duplicate:
    """An image of the test side and the image of the training side that it equals, or that is nearly the same.

    Attributes:
        test: the path, or what describes the image.
        train: likewise.
        score: the cosine of their embeddings; None for files whose bytes are equal.
    """

    test: str
    train: str
    score: float | None = None


@dataclass(frozen=True)
class SplitReport:
    """What the two sides of a split share.

    Attributes:
        identities: names on both sides, sorted.
        equal_files: images of the test side whose file has the same bytes as one of the training side.
        near_duplicates: images of the test side that score at least `score` with one of the training side, without
            those in `equal_files`; the most alike first, at most 1,000.
        near_count: how many these are in all.
        score: from which on two images are called nearly the same; None where embeddings were not compared.
        train_images: how many images were trained on.
        test_images: how many images are judged.
    """

    identities: tuple[str, ...]
    equal_files: tuple[Duplicate, ...]
    near_duplicates: tuple[Duplicate, ...]
    near_count: int
    score: float | None
    train_images: int
    test_images: int
    warnings: tuple[str, ...] = field(init=False)
    """One line for each kind of fault, with the names; nothing where the split is clean."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "warnings", tuple(_warnings(self)))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "train_images": self.train_images,
            "test_images": self.test_images,
            "shared_identities": list(self.identities),
            "equal_files": [[pair.test, pair.train] for pair in self.equal_files],
            "near_duplicates": [[pair.test, pair.train, pair.score] for pair in self.near_duplicates],
            "near_duplicates_count": self.near_count,
            "near_duplicates_score": self.score,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a split.

    Attributes:
        images: N images.
        identities: N names of whom they show; of a forgery the identity that is imitated, for it is as unseen or not.
        vectors: (N, D) embeddings of any length but zero; None leaves near-duplicates out.
    """

    images: Sequence[ImageSource]
    identities: Sequence[str]
    vectors: ArrayLike | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.identities):
            raise DataError(
                f"expected one identity for each of the {len(self.images)} images; got {len(self.identities)}"
            )


def check_split(train: Side, test: Side, *, score: float | None = None) -> SplitReport:
    """Look for what would make a figure on the test side look better than it is.

    Near-duplicates are found by embeddings, which is no proof either way: a model that tells images apart loosely puts
    different ones close, and a copy that was cropped or turned may lie far from its original. Look at those named.

    Args:
        train: what the model was trained on.
        test: what it is judged on.
        score: two images of at least this cosine, in [-1, 1], are called near-duplicates. By default it is chosen from
            the training side, as a score that its images of different identities do not come near; with fewer than two
            identities there nothing is compared.

    Raises:
        ConfigError: `score` is not in [-1, 1].
        ImageError: a file cannot be read.
        VectorError: embeddings do not fit.
    """
    if score is not None and not -1 <= score <= 1:
        raise ConfigError(f"the score of near-duplicates must be in [-1, 1]; got {score}")
    shared = set(map(str, train.identities)) & set(map(str, test.identities))
    equal = _equal_files(train.images, test.images)
    near: list[Duplicate] = []
    if train.vectors is None or test.vectors is None:
        score = None
    else:
        known, unseen = _rows(train, "train"), _rows(test, "test")
        if known.shape[1] != unseen.shape[1]:
            raise DataError(
                f"both sides need embeddings of one model; got {known.shape[1]} and {unseen.shape[1]} columns"
            )
        score = _usual_score(known, train.identities) if score is None else score
        near = [] if score is None else _near_duplicates(train, test, known, unseen, score)
    told = {pair.test for pair in equal}
    others = [pair for pair in near if pair.test not in told]
    return SplitReport(
        identities=tuple(sorted(shared)),
        equal_files=tuple(equal),
        near_duplicates=tuple(others[:_KEPT]),
        near_count=len(others),
        score=score,
        train_images=len(train.images),
        test_images=len(test.images),
    )


def _equal_files(train: Sequence[ImageSource], test: Sequence[ImageSource]) -> list[Duplicate]:
    """Return the files of the test side that are on the training side too, by their bytes."""
    sizes: dict[int, list[str]] = {}
    for path in _paths(train):
        sizes.setdefault(_size(path), []).append(path)
    digests: dict[int, dict[str, str]] = {}  # of the training files of one size, read when one of the test side has it
    found = []
    for path in _paths(test):
        size = _size(path)
        if size not in sizes:
            continue
        if size not in digests:
            digests[size] = {_digest(other): other for other in reversed(sizes[size])}
        twin = digests[size].get(_digest(path))
        if twin is not None:
            found.append(Duplicate(path, twin))
    return found


def _rows(side: Side, name: str) -> Floats:
    assert side.vectors is not None
    rows = metrics.unit_rows(side.vectors, f"{name}.vectors")
    if len(rows) != len(side.images):
        raise DataError(f"{name}.vectors must have a row for each of {len(side.images)} images; got {len(rows)}")
    return rows


def _usual_score(rows: Floats, identities: Sequence[str]) -> float | None:
    """Return the score from which on images are suspiciously alike; None with fewer than two identities."""
    codes = np.unique(np.asarray(identities), return_inverse=True)[1]
    if codes.max() == 0:
        return None
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(np.int64))
    nearest = []
    for start in range(0, len(chosen), _SLAB):
        at = chosen[start : start + _SLAB]
        product = rows[at] @ rows.T
        product[codes[at][:, None] == codes] = -1
        nearest.append(product.max(axis=1).astype(np.float64))
    distance = float(np.quantile(1 - np.concatenate(nearest), _QUANTILE))
    return 1 - _SHARE * max(0.0, distance)


def _near_duplicates(train: Side, test: Side, known: Floats, unseen: Floats, score: float) -> list[Duplicate]:
    """Return the test images whose nearest training image scores at least `score`, the most alike first."""
    best = np.empty(len(unseen), dtype=np.int64)
    scores: NDArray[np.float64] = np.empty(len(unseen))
    for start in range(0, len(unseen), _SLAB):
        slab = slice(start, start + _SLAB)
        product = unseen[slab] @ known.T  # (slab, N)
        best[slab] = product.argmax(axis=1)
        scores[slab] = product.max(axis=1)
    np.minimum(scores, 1.0, out=scores)
    # Rounding puts the cosine of equal float32 rows a few units below 1.
    chosen = np.flatnonzero(scores >= score - 1e-6)
    order = chosen[np.argsort(-scores[chosen], kind="stable")]
    return [
        Duplicate(_name(test.images[at], at), _name(train.images[best[at]], int(best[at])), float(scores[at]))
        for at in order.tolist()
    ]


def _paths(images: Sequence[ImageSource]) -> list[str]:
    return [os.fspath(image) for image in images if isinstance(image, str | os.PathLike)]


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


def _digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


def _name(image: ImageSource, at: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {at}"


def _warnings(report: SplitReport) -> list[str]:
    lines = []
    if report.identities:
        lines.append(_line(len(report.identities), "identity is", "identities are", report.identities))
    if report.equal_files:
        names = [f"{pair.test} = {pair.train}" for pair in report.equal_files]
        lines.append(_line(len(names), "file is", "files are", names))
    if report.near_duplicates:
        names = [f"{pair.test} ~ {pair.train} ({pair.score:.3f})" for pair in report.near_duplicates]
        lines.append(
            _line(
                report.near_count,
                "pair of images that look alike to the model is",
                "pairs of images that look alike to the model are",
                names,
            )
        )
    return lines


def _line(count: int, one: str, many: str, names: Sequence[str]) -> str:
    more = f" and {count - _NAMED:,} more" if count > _NAMED else ""
    listed = ", ".join(names[:_NAMED])
    return f"{count:,} {one if count == 1 else many} on both sides of the split: {listed}{more}"
