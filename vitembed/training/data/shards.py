"""Labelled images in webdataset's tar shards, read at random where they lie.

A sample is what the members of a shard share up to the first dot of their base name: `cats/0001.jpg` and
`cats/0001.cls` are the sample `cats/0001`. The headers of the shards are read once, in order; of each image remain its
place and size, 28 bytes, so that any image can be fetched at any time, as batches of classes x images need it, and
nothing is unpacked. A shard that ends before its end mark is refused, for samples would be missing without a word.
"""

import glob
import itertools
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError, ImageError
from vitembed.images import IMAGE_SUFFIXES, decode_image
from vitembed.training.data.datasets import ImageDataset
from vitembed.training.data.lazy import LazyImages

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_PLACE = np.dtype([("shard", "<i4"), ("header", "<i8"), ("start", "<i8"), ("size", "<i8")])  # of an image
_LABELS = ("cls", "json", "txt")  # the first that a sample has tells its label
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}  # by their first two bytes
_OPEN_SHARDS = 64  # that a process keeps open
_BLOCK = 512  # bytes; of nothing but zeros it ends a tar file


def from_shards(shards: Shards) -> ImageDataset:
    """Read the samples of tar shards: an image each (by its suffix), and a label in .cls, .json or .txt.

    A `.cls` holds a whole number or a name, a `.txt` a name, and a `.json` one of them as "label" or "cls". Other
    members of a sample are left alone.

    Args:
        shards: a file, a pattern ("train-{000000..000012}.tar", "train-{a,b}.tar", "train-*.tar"), or several of them.

    Returns:
        The samples in the order of the shards; an image that cannot be read raises an `ImageError` that names the
        shard and the member when it is fetched.

    Raises:
        DataError: naming the shard, and the sample where there is one: no such shard, a compressed or truncated one,
            a sample without an image or label, or one that is there twice.
    """
    paths = list(_paths(shards))
    _check_distinct(paths)
    labels: list[str] = []
    places: list[NDArray[Any]] = []
    for number, path in enumerate(paths):
        found = []
        for image, label in _read_shard(path):
            found.append((number, image.offset, image.offset_data, image.size))
            labels.append(sys.intern(label))
        places.append(np.array(found, dtype=_PLACE))
    if not labels:
        raise DataError(f"{paths[0]} holds no sample; expected members such as 0001.jpg and 0001.cls")
    return ImageDataset.from_arrays(_ShardImages(tuple(map(str, paths)), np.concatenate(places)), labels)


def is_shards(text: str) -> bool:
    """Tell whether what somebody typed names tar shards, and no folder or table.

    >>> is_shards("train-{000..012}.tar"), is_shards("train.tar.gz"), is_shards("photos/target")
    (True, True, False)
    """
    return re.search(r"\.(tar|tgz)(\.\w+)?$", text.lower()) is not None and not os.path.isdir(text)  # noqa: PTH112


class _ShardImages(LazyImages):
    """The images of tar shards, decoded when they are asked for.

    Several threads and forked or spawned processes may read at once: reads share no position in a file, and a copy in
    another process opens the shards by itself.
    """

    def __init__(self, shards: tuple[str, ...], places: NDArray[Any]) -> None:
        self._shards = shards
        self._places = places
        self._open = lru_cache(_OPEN_SHARDS)(_Descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._shards, self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: Any) -> Any:
        place = self._places[position]
        shard, size = self._shards[place["shard"]], int(place["size"])
        try:
            data = self._open(shard).read(int(place["start"]), size)
        except OSError as error:
            raise ImageError(self._name(place), f"cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            raise ImageError(self._name(place), "is cut short: the shard has changed since its headers were read")
        try:
            return decode_image(data, shard)
        except ImageError as error:
            raise ImageError(self._name(place), error.reason) from error

    def take(self, positions: Sequence[int]) -> "_ShardImages":
        """Return some of the images."""
        return _ShardImages(self._shards, self._places[np.asarray(positions, dtype=np.int64)])

    def _name(self, place: Any) -> str:
        """Return what an error calls an image; its name is read again, for millions of names would fill the memory."""
        shard = self._shards[place["shard"]]
        try:
            with tarfile.open(shard, "r:") as tar:
                _file(tar).seek(int(place["header"]))
                return f"{shard}:{tarfile.TarInfo.fromtarfile(tar).name}"
        except (OSError, tarfile.TarError):
            return f"{shard}: image at byte {place['start']}"


class _Descriptor:
    """A file open for reading, closed when nobody holds it any more, so that no thread closes it under another."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - it stays open

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, size: int) -> bytes:
        """Read so many bytes from a place, fewer only where the file ends."""
        parts = []
        while size > 0 and (part := os.pread(self._file.fileno(), size, start)):  # one call gives 2 GiB at most
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)


def _paths(shards: Shards) -> Iterator[Path]:
    """Yield the shards that a pattern, or several, stand for."""
    if isinstance(shards, str | os.PathLike):
        shards = [shards]
    if not shards:
        raise DataError("expected at least one shard; got an empty list")
    for pattern in map(str, shards):
        if _is_file(pattern):
            yield Path(pattern)
            continue
        for name in _expand_braces(pattern):
            found = [name] if _is_file(name) else sorted(glob.glob(name))  # noqa: PTH207 - may start anywhere
            if not found:
                raise DataError(
                    f"there is no shard {name}; expected a .tar file, or a pattern such as a-{{00..12}}.tar"
                )
            yield from map(Path, found)


def _is_file(name: str) -> bool:
    return os.path.isfile(name)  # noqa: PTH113 - that of Path raises errors for a name that is too long


def _check_distinct(paths: Sequence[Path]) -> None:
    """Refuse a shard that is named twice, be it in another way or by a link."""
    seen: dict[str, Path] = {}
    for path in paths:
        first = seen.setdefault(os.path.realpath(path), path)
        if first is not path:
            also = "" if first == path else f" (also as {path})"
            raise DataError(f"the shard {first}{also} is named twice; each of its images would be there twice")


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a shell makes of braces with numbers or alternatives in them.

    >>> list(_expand_braces("{train,val}-{08..10}.tar"))[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices: Iterator[str] = iter(match[1].split(","))
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if first > last:
            raise DataError(f"{pattern}: {match[0]} counts down and names no shard; write the smaller number first")
        width = max(len(number) if number.startswith("0") else 0 for number in numbers.groups())
        choices = (f"{number:0{width}d}" for number in range(first, last + 1))
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _read_shard(path: Path) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the header of the image and the label of each sample of a shard."""
    try:
        _check_plain(path)
        with tarfile.open(path, "r:") as tar:
            yield from _samples(path, tar)
    except tarfile.TarError as error:
        raise DataError(f"{path} is no tar file, truncated or damaged: {error}; copy or write it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_plain(path: Path) -> None:
    with path.open("rb") as file:
        compression = _COMPRESSED.get(file.read(2))
    if compression:
        raise DataError(f"{path} is compressed ({compression}) and cannot be read at random; decompress it to a .tar")


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """Check what tarfile passes over in silence: that the file ends with its end mark, and that nothing comes after."""
    file = _file(tar)
    file.seek(tar.offset)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK:
        raise DataError(f"{path} is truncated: it ends at byte {tar.offset + len(first)} without an end mark")
    if any(first):
        raise DataError(f"{path} is damaged: there is no tar header at byte {tar.offset}; copy or write it again")
    while block := file.read(1 << 16):
        if any(block):
            raise DataError(f"{path} goes on after its end mark; tar files are joined with tar --concatenate, not cat")


def _file(tar: tarfile.TarFile) -> Any:
    """Return the open file of a tar file; where it stands does not matter to tarfile, which knows its place."""
    return tar.fileobj


def _samples(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the image and the label of each run of members with one key."""
    seen = set()
    for key, members in itertools.groupby(_members(path, tar), key=lambda member: member[0]):
        if key in seen:
            raise DataError(f"{path} has the sample {key} twice, or its members apart; they belong side by side")
        seen.add(key)
        by_extension: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in members:
            if extension in by_extension:
                raise DataError(f"{path} has the member {member.name} twice; every sample needs a key of its own")
            by_extension[extension] = member
        yield _image(path, key, by_extension), _label(path, tar, key, by_extension)


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, extension in lower case and header of each file that has a key, without keeping the headers."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # they would fill the memory
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not (member.isreg() and stem and dot):
            continue
        if member.issparse():
            raise DataError(f"{path}: {member.name} is stored as a sparse file, which cannot be read at random")
        yield folder + slash + stem, extension.lower(), member
    _check_end(path, tar)  # before the last sample, which may be a part of one, is looked at


def _image(path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    images = [member for extension, member in members.items() if f".{extension}" in IMAGE_SUFFIXES]
    if len(images) == 1:
        return images[0]
    found = " and ".join(member.name for member in images) or f"{key}.{{{','.join(members)}}}"
    raise DataError(
        f"{path}: the sample {key} has {len(images) or 'no'} images; expected one such as .jpg, got {found}"
    )


def _label(path: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> str:
    """Return the label of a sample as text; the number of a .cls without leading zeros, as webdataset reads it."""
    extension = next((extension for extension in _LABELS if extension in members), None)
    if extension is None:
        raise DataError(f"{path}: the sample {key} has no label; expected {key}.cls, .json or .txt beside its image")
    member = members[extension]
    _file(tar).seek(member.offset_data)
    data = _file(tar).read(member.size)
    try:
        text = data.decode("utf-8-sig").strip()
        label = _label_of_json(text) if extension == "json" else text
        if extension == "cls" and label.isdecimal():
            label = str(int(label))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise DataError(f"{path}: {member.name} holds no label: {error}") from error
    if not label:
        raise DataError(f"{path}: {member.name} holds no label: it is empty")
    return label


def _label_of_json(text: str) -> str:
    document = json.loads(text)
    for name in ("label", "cls"):
        value = document.get(name) if isinstance(document, dict) else None
        if isinstance(value, str) or type(value) is int:
            return str(value).strip()
    raise ValueError('expected {"label": ...} or {"cls": ...} with a text or a whole number')
