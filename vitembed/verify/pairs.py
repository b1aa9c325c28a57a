"""Labelled pairs of images: from a table, or from folders named for identities.

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

COLUMNS = ("left", "right", "match")

_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images, each matching or not.

    Attributes:
        left: the first image of each pair: a path, a PIL image or an array.
        right: the second image of each pair.
        is_match: (P,) bool, read-only.
        identities: (P, 2) numbers of whom the two images show; None where that is not known, as in a table.

    Raises:
        DataError: they differ in length, are empty, or `is_match` holds something else than booleans.
    """

    left: tuple[ImageSource, ...]
    right: tuple[ImageSource, ...]
    is_match: NDArray[np.bool_]
    identities: NDArray[np.int64] | None = None

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

    def __len__(self) -> int:
        return len(self.left)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> "Pairs":
        """Read a table with the header `left,right,match`, in any order; other columns are not read.

        Args:
            path: a CSV file in UTF-8. Relative image paths are relative to its folder. `match` is one of 1, 0, true,
                false, yes, no, in any case. Blank lines are skipped.

        Raises:
            DataError: names the file and the line, what was expected and what came; a missing image too.
        """
        table = Path(path)
        left: list[ImageSource] = []
        right: list[ImageSource] = []
        flags: list[bool] = []
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
        if not flags:
            raise DataError(f"{table}: expected pairs below the header; got none")
        return cls(tuple(left), tuple(right), np.array(flags))

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str], *, max_pairs: int = 100_000, seed: int = 0) -> "Pairs":
        """Make pairs of the images under a folder; an image's identity is the folder that it lies in.

        Args:
            root: a folder of folders, one or more levels deep: `root/alice/1.png`, `root/bob/1.png`.
            max_pairs: at least 2; see `from_labels`.
            seed: of the random draw.

        Raises:
            ConfigError: `max_pairs` is below 2.
            DataError: no images, an image directly in `root`, fewer than two identities, or no identity with
                two images.
        """
        base = Path(root)
        images = list_images(base)
        identities = [path.relative_to(base).parent.as_posix() for path in images]
        if "." in identities:
            loose = images[identities.index(".")]
            raise DataError(f"{loose} lies in no identity's folder; expected {base}/IDENTITY/{loose.name}")
        return cls.from_labels(images, identities, max_pairs=max_pairs, seed=seed)

    @classmethod
    def from_labels(
        cls, images: Sequence[ImageSource], labels: ArrayLike, *, max_pairs: int = 100_000, seed: int = 0
    ) -> "Pairs":
        """Make pairs of labelled images.

        All pairs of one identity are taken as matching, and random pairs of two identities as non-matching; of
        either kind at most half of `max_pairs`, drawn without repetition.

        Args:
            images: N images.
            labels: (N,) their identities, numbers or strings.
            max_pairs: at least 2.
            seed: of the random draw.

        Raises:
            ConfigError: `max_pairs` is below 2.
            DataError: one label an image is missing, fewer than two identities, or no identity with two images.
        """
        if max_pairs < 2:
            raise ConfigError(f"max_pairs must be at least 2; got {max_pairs}")
        if seed < 0:
            raise ConfigError(f"seed must not be negative; got {seed}")
        codes = np.unique(np.asarray(labels), return_inverse=True)[1]
        if codes.shape != (len(images),):
            raise DataError(f"expected one label an image; got {codes.shape} labels for {len(images)} images")
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        # Sorted by identity, the images from i + 1 to end[i] share i's identity, and those from end[i] do not.
        end = np.searchsorted(codes, codes, side="right")
        position = np.arange(len(order))
        rng = np.random.default_rng(seed)
        genuine = _draw(position + 1, end - position - 1, max_pairs // 2, rng)
        impostor = _draw(end, len(order) - end, max_pairs // 2, rng)
        if len(genuine) == 0 or len(impostor) == 0:
            count = len(np.unique(codes))
            raise DataError(
                "pairs of both kinds need two identities and one of them with two images; "
                f"got {len(images)} images of {count} {'identity' if count == 1 else 'identities'}"
            )
        pairs = np.concatenate([genuine, impostor])  # (P, 2)
        chosen = order[pairs]
        return cls(
            tuple(images[i] for i in chosen[:, 0]),
            tuple(images[i] for i in chosen[:, 1]),
            np.arange(len(chosen)) < len(genuine),
            codes[pairs],
        )


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


def _read_rows(table: Path) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yield the line number and the three cells of each row."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if any(header.count(name) != 1 for name in COLUMNS):
                expected = "expected a header with the columns left, right and match"
                raise DataError(f"{table}, line 1: {expected}; got {','.join(header)!r}")
            at = [header.index(name) for name in COLUMNS]
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{table}, line {reader.line_num}: expected {len(header)} cells; got {len(cells)}")
                left, right, match = (cells[k].strip() for k in at)
                yield reader.line_num, (left, right, match)
    except OSError as error:
        raise DataError(f"{table}: expected a CSV file of pairs; {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table}: expected a CSV file of pairs in UTF-8; {error}") from error


def _check_image(table: Path, line: int, cell: str, image: Path) -> None:
    if not cell:
        raise DataError(f"{table}, line {line}: expected a path; got an empty cell")
    if not image.is_file():
        raise DataError(f"{table}, line {line}: expected an image at {image}; there is no such file")
