"""Labelled pairs of images: from a table, or from folders named for identities.

A pair that does not match is random, two images of two identities, or skilled: an image of an identity and one by
somebody who imitates it, as a forged signature does.

`Pairs` names images without reading them. What is random here (which of many possible pairs are taken) depends on
the seed and on the sorted names of the files alone.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitembed.errors import ConfigError, DataError
from vitembed.images import ImageSource, list_images
from vitembed.layouts import names_of_folders, names_of_signatures, require_identities

COLUMNS = ("left", "right", "match")
KIND = "kind"  # a column that a table of pairs may have
_KINDS = ("genuine", "random", "skilled")

_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images, each matching or not.

    Attributes:
        left: the first image of each pair: a path, a PIL image or an array.
        right: the second image of each pair.
        is_match: (P,) bool, read-only.
        identities: (P, 2) numbers of whom the two images show; None where that is not known, as in a table. Of a
            skilled forgery both are the identity that is imitated.
        skilled: (P,) bool, read-only: where a pair does not match and one image imitates the other's identity; None
            where that is not known. All False says that there are no forgeries.

    Raises:
        DataError: they differ in length, are empty, `is_match` or `skilled` holds something else than booleans, or a
            pair that matches is called skilled.
    """

    left: tuple[ImageSource, ...]
    right: tuple[ImageSource, ...]
    is_match: NDArray[np.bool_]
    identities: NDArray[np.int64] | None = None
    skilled: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", tuple(self.left))
        object.__setattr__(self, "right", tuple(self.right))
        flags = np.array(self.is_match)
        if not len(self.left) == len(self.right) == flags.size or flags.ndim != 1:
            lengths = f"{len(self.left)}, {len(self.right)} and {flags.shape}"
            raise DataError(f"left, right and is_match must be of one length; got {lengths}")
        if flags.size == 0:
            raise DataError("expected at least one pair; got none")
        if flags.dtype != np.bool_:
            raise DataError(f"is_match must hold booleans; got {flags.dtype}")
        if self.identities is not None and self.identities.shape != (flags.size, 2):
            raise DataError(f"identities must have shape ({flags.size}, 2); got {self.identities.shape}")
        flags.flags.writeable = False
        object.__setattr__(self, "is_match", flags)
        if self.skilled is not None:
            object.__setattr__(self, "skilled", _checked_skilled(self.skilled, flags))

    def __len__(self) -> int:
        return len(self.left)

    @property
    def one_sided(self) -> int:
        """How many pairs are of one file with itself, which tell nothing of a model."""
        return sum(
            isinstance(a, str | os.PathLike) and isinstance(b, str | os.PathLike) and os.fspath(a) == os.fspath(b)
            for a, b in zip(self.left, self.right, strict=True)
        )

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> "Pairs":
        """Read a table with the header `left,right,match`, in any order; of other columns `kind` alone is read.

        Args:
            path: a CSV file in UTF-8. Relative image paths are relative to its folder. `match` is one of 1, 0, true,
                false, yes, no, in any case; `kind`, where there is such a column, genuine for a match, and random or
                skilled for a pair that does not match. Blank lines are skipped.

        Raises:
            DataError: names the file and the line, what was expected and what came; a missing image too, and two
                images that match in one line and not in another.
        """
        table = Path(path)
        left: list[ImageSource] = []
        right: list[ImageSource] = []
        flags: list[bool] = []
        kinds: list[str] = []
        known: dict[frozenset[ImageSource], bool] = {}
        found: set[Path] = set()  # each image is looked for once, however many pairs it is in
        for line, cells in _read_rows(table):
            for side, cell in ((left, cells[0]), (right, cells[1])):
                image = table.parent / cell
                if image not in found:
                    _check_image(table, line, cell, image)
                    found.add(image)
                side.append(image)
            flag = _FLAGS.get(cells[2].lower())
            if flag is None:
                expected = "expected match to be 1, 0, true, false, yes or no"
                raise DataError(f"{table}, line {line}: {expected}; got {cells[2]!r}")
            flags.append(flag)
            labelled = known.setdefault(frozenset((left[-1], right[-1])), flag)
            if labelled != flag:
                raise DataError(f"{table}, line {line}: {cells[0]} and {cells[1]} match in one line and not in another")
            if len(cells) > len(COLUMNS):
                _check_kind(table, line, cells[3], flag)
                kinds.append(cells[3].lower())
        if not flags:
            raise DataError(f"{table}: expected pairs below the header; got none")
        skilled = np.array([kind == "skilled" for kind in kinds]) if kinds else None
        return cls(tuple(left), tuple(right), np.array(flags), skilled=skilled)

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str], *, max_pairs: int = 100_000, seed: int = 0) -> "Pairs":
        """Make pairs of the images under a folder; an image's identity is the folder that it lies in.

        Args:
            root: a folder of folders, one or more levels deep: `root/alice/1.png`, `root/bob/1.png`. Where every image
                lies in `WRITER/genuine` or `WRITER/forged`, it is read as by `from_signatures`.
            max_pairs: at least 2; see `from_labels`.
            seed: of the random draw.

        Raises:
            ConfigError: `max_pairs` is below 2.
            DataError: no images, an image directly in `root`, fewer than two identities, or no identity with
                two images.
        """
        base = Path(root)
        images = list_images(base)
        names = names_of_folders(base, images)
        require_identities(base, names.classes)
        return cls.from_labels(images, names.classes, names.forgery_of, max_pairs=max_pairs, seed=seed)

    @classmethod
    def from_signatures(
        cls,
        root: str | os.PathLike[str],
        writers: Sequence[str] | None = None,
        *,
        max_pairs: int = 100_000,
        seed: int = 0,
    ) -> "Pairs":
        """Make pairs of `root/WRITER/genuine/image.png` and, imitating the writer, `root/WRITER/forged/image.png`.

        Args:
            root: the folder of writers.
            writers: only pairs among these; all when None.
            max_pairs: at least 2; see `from_labels`.
            seed: of the random draw.

        Raises:
            ConfigError: `max_pairs` is below 2.
            DataError: images lie elsewhere, a writer is not there, or there are no pairs of both kinds.
        """
        base = Path(root)
        images = list_images(base)
        names = names_of_signatures(base, images)
        owners = [of or name for name, of in zip(*names, strict=True)]
        wanted = set(owners) if writers is None else set(writers)
        if missing := sorted(wanted - set(owners)):
            raise DataError(f"{base} has no writer {missing[0]!r}; it has {', '.join(sorted(set(owners))[:5])}, ...")
        kept = [at for at, owner in enumerate(owners) if owner in wanted]
        classes, of = [names.classes[at] for at in kept], [names.forgery_of[at] for at in kept]
        return cls.from_labels([images[at] for at in kept], classes, of, max_pairs=max_pairs, seed=seed)

    @classmethod
    def from_labels(
        cls,
        images: Sequence[ImageSource],
        labels: ArrayLike,
        forgery_of: Sequence[object] | NDArray[np.int64] | None = None,
        *,
        max_pairs: int = 100_000,
        seed: int = 0,
    ) -> "Pairs":
        """Make pairs of labelled images.

        All pairs of one identity are taken as matching; as not matching random pairs of two identities and, where there
        are forgeries, each with the images of the identity that it imitates. Of matching pairs at most half of
        `max_pairs` are drawn without repetition, of the others as many, half of these skilled if there are forgeries.

        Args:
            images: N images.
            labels: (N,) their identities, numbers or strings; that of a forgery is not read.
            forgery_of: (N,) the label of the identity that an image imitates; None, or -1 in an array of numbers, for
                genuine images. None if there are no forgeries.
            max_pairs: at least 2.
            seed: of the random draw.

        Raises:
            ConfigError: `max_pairs` is below 2.
            DataError: one label an image is missing, fewer than two identities, no identity with two images, or a
                forgery of an identity that has no image.
        """
        if max_pairs < 2:
            raise ConfigError(f"max_pairs must be at least 2; got {max_pairs}")
        if seed < 0:
            raise ConfigError(f"seed must not be negative; got {seed}")
        codes, imitated = _coded(len(images), labels, forgery_of)
        genuine, random, skilled = _drawn(codes, imitated, max_pairs, np.random.default_rng(seed))
        if len(genuine) == 0 or len(random) + len(skilled) == 0:
            shown, count = np.count_nonzero(codes >= 0), len(np.unique(codes[codes >= 0]))
            raise DataError(
                "pairs of both kinds need two identities and one of them with two images; "
                f"got {shown} images of {count} {'identity' if count == 1 else 'identities'}"
            )
        chosen = np.concatenate([genuine, random, skilled])  # (P, 2)
        number = np.arange(len(chosen))
        return cls(
            tuple(images[i] for i in chosen[:, 0]),
            tuple(images[i] for i in chosen[:, 1]),
            number < len(genuine),
            np.where(codes < 0, imitated, codes)[chosen],
            number >= len(genuine) + len(random),
        )


def _drawn(
    codes: NDArray[np.int64], imitated: NDArray[np.int64], max_pairs: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return matching, random and skilled pairs (n, 2) of images, whose codes are those of `_coded`."""
    order = np.argsort(codes, kind="stable")
    order = order[codes[order] >= 0]
    whom = codes[order]  # the identities of genuine images, rising
    # The genuine images from i + 1 to end[i] share i's identity, and those from end[i] do not.
    end = np.searchsorted(whom, whom, side="right")
    position = np.arange(len(order))
    forged = np.flatnonzero(imitated >= 0)
    half = max_pairs // 2
    quarter = half // 2 if len(forged) else 0
    genuine = _draw(position + 1, end - position - 1, half, rng)
    random = _draw(end, len(order) - end, half - quarter, rng)
    first = np.searchsorted(whom, imitated[forged], side="left")
    skilled = _draw(first, np.searchsorted(whom, imitated[forged], side="right") - first, quarter, rng)
    return order[genuine], order[random], np.stack([order[skilled[:, 1]], forged[skilled[:, 0]]], axis=1)


def _coded(
    count: int, labels: ArrayLike, forgery_of: Sequence[object] | NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return whom each image shows (N,), -1 for a forgery, and whom it imitates (N,), -1 for a genuine image."""
    names = np.asarray(labels)
    if names.shape != (count,):
        raise DataError(f"expected one label an image; got {names.shape} labels for {count} images")
    if forgery_of is None:
        return np.unique(names, return_inverse=True)[1].astype(np.int64), np.full(count, -1)
    if len(forgery_of) != count:
        raise DataError(f"expected forgery_of for each of the {count} images; got {len(forgery_of)}")
    numbers = isinstance(forgery_of, np.ndarray)
    is_forged = np.array([of is not None and not (numbers and of == -1) for of in forgery_of], np.bool_)
    known, genuine_codes = np.unique(names[~is_forged], return_inverse=True)
    place = {name: code for code, name in enumerate(known.tolist())}
    codes, imitated = np.full(count, -1), np.full(count, -1)
    codes[~is_forged] = genuine_codes
    for at in np.flatnonzero(is_forged).tolist():
        of = forgery_of[at]
        name = of.item() if isinstance(of, np.generic) else of
        if name not in place:
            raise DataError(f"image {at} imitates {name!r}, of whom there is no genuine image")
        imitated[at] = place[name]
    return codes, imitated


def _checked_skilled(skilled: ArrayLike, is_match: NDArray[np.bool_]) -> NDArray[np.bool_]:
    flags = np.array(skilled)
    if flags.shape != is_match.shape or flags.dtype != np.bool_:
        raise DataError(f"skilled must hold {is_match.size} booleans, one a pair; got {flags.dtype} {flags.shape}")
    if np.any(flags & is_match):
        at = int(np.flatnonzero(flags & is_match)[0])
        raise DataError(f"a skilled forgery does not match; pair {at} is called both")
    flags.flags.writeable = False
    return flags


def _draw(
    first: NDArray[np.int64], partners: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw distinct pairs (i, j), (wanted or fewer, 2), where i has the partners first[i], first[i] + 1, ...

    Pairs are numbered through, never listed: a thousand images of one identity have half a million.
    """
    totals = np.cumsum(partners)
    total = int(totals[-1]) if len(totals) else 0
    numbers = np.arange(total) if total <= wanted else np.sort(rng.choice(total, wanted, replace=False))
    i = np.searchsorted(totals, numbers, side="right")
    j = first[i] + numbers - (totals[i] - partners[i])
    return np.stack([i, j], axis=1)


def _read_rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number of each row and its cells: left, right, match and, where the table has it, kind."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if any(header.count(name) != 1 for name in COLUMNS):
                expected = "expected a header with the columns left, right and match"
                raise DataError(f"{table}, line 1: {expected}; got {','.join(header)!r}")
            if header.count(KIND) > 1:
                raise DataError(f"{table}, line 1: expected one column {KIND}; got {header.count(KIND)}")
            at = [header.index(name) for name in (*COLUMNS, KIND) if name in header]
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{table}, line {reader.line_num}: expected {len(header)} cells; got {len(cells)}")
                yield reader.line_num, [cells[k].strip() for k in at]
    except OSError as error:
        raise DataError(f"{table}: expected a CSV file of pairs; {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table}: expected a CSV file of pairs in UTF-8; {error}") from error


def _check_image(table: Path, line: int, cell: str, image: Path) -> None:
    if not cell:
        raise DataError(f"{table}, line {line}: expected a path; got an empty cell")
    if not image.is_file():
        raise DataError(f"{table}, line {line}: expected an image at {image}; there is no such file")


def _check_kind(table: Path, line: int, kind: str, is_match: bool) -> None:
    expected = _KINDS[:1] if is_match else _KINDS[1:]
    if kind.lower() not in expected:
        pair = "a pair that matches" if is_match else "one that does not match"
        raise DataError(f"{table}, line {line}: the kind of {pair} must be {' or '.join(expected)}; got {kind!r}")
