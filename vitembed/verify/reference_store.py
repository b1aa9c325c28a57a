"""The references of identities in an index: who is enrolled, with which images and embeddings.

Every reference is one entry of a `vitembed.index.Index`, under the id "IDENTITY/first digits of the hash": its
embedding, and in its metadata the identity, where the image was, the SHA-256 of its content and the date. The index is
made when the first reference is stored. Nothing here needs a model or decides anything.
"""

import difflib
import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed.errors import DataError, ImageError, SearchIndexError
from vitembed.images import ImageSource, load_image
from vitembed.index import Index
from vitembed.index.inputs import id_problem

Vectors = NDArray[np.float32]

# Digits of the content's hash in an id. Of a million images, two share them with a probability of 3e-8.
_HASH_DIGITS = 16

# What an id may be long, less the separator and the digits.
_LONGEST = 1_000


@dataclass(frozen=True, eq=False)
class References:
    """The n references of one identity, in the order of enrolment.

    Attributes:
        paths: where their images were; None for one that came from memory.
        hashes: SHA-256 of their content.
        vectors: (n, D) unit rows.
    """

    paths: tuple[str | None, ...]
    hashes: tuple[str, ...]
    vectors: Vectors

    def __len__(self) -> int:
        return len(self.paths)


class ReferenceStore:
    """References in an index, which the first `add` makes where there is none.

    Args:
        path: of the index.
        index: the open index; None to open the one at `path`, if there is one, and to close it in `close`.
        fingerprint: of the model that embeds; None if that is not known.
        location: where the model is kept, a note for people.

    Raises:
        SearchIndexError: there is something else at `path`.
        ModelMismatchError: the references were embedded by another model.
    """

    def __init__(
        self, path: str | os.PathLike[str], index: Index | None, fingerprint: str | None, location: str | None = None
    ) -> None:
        self.path, self._fingerprint, self._location = Path(path), fingerprint, location
        self._owned = index is None
        missing = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        self._index = index if index is not None or missing else Index.open(self.path)
        if self._index is not None and fingerprint is not None:
            try:
                self._index.require_model(fingerprint)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the index if it was opened here; closing twice does nothing."""
        if self._owned and self._index is not None:
            self._index.close()

    def identities(self) -> dict[str, int]:
        """Return the number of references of each identity, in the order of their names.

        Raises:
            SearchIndexError: the index holds something else.
        """
        entries = {} if self._index is None else self._index.entries()
        counts: dict[str, int] = {}
        for id, entry in entries.items():
            name = self._checked(id, entry)["identity"]
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items()))

    def find(self, identity: str) -> References | None:
        """Return the references of an identity, or None where there are none."""
        found = self._index.entries(where={"identity": identity}) if self._index is not None else {}
        if self._index is None or not found:
            return None
        return _gathered([(self._checked(id, entry), self._index.get(id).vector) for id, entry in found.items()])

    def get(self, identity: str) -> References:
        """Return the references of an identity.

        Raises:
            DataError: it has none; the nearest name is told.
        """
        found = self.find(identity)
        if found is None:
            raise self._unknown(identity)
        return found

    def everybody(self) -> dict[str, References]:
        """Return the references of all identities.

        Raises:
            SearchIndexError: the index holds something else.
        """
        groups: dict[str, list[tuple[dict[str, Any], Vectors]]] = {}
        for batch in self._index.stream() if self._index is not None else ():
            for id, entry, vector in zip(batch.ids, batch.metadata, batch.vectors, strict=True):
                groups.setdefault(self._checked(id, entry)["identity"], []).append((entry, vector))
        return {name: _gathered(group) for name, group in groups.items()}

    def owners(self, hashes: Sequence[str]) -> dict[str, set[str]]:
        """Return, by the hash of its content, whose references an image is already."""
        wanted = {"sha256": {"$in": sorted(set(hashes))}}
        owners: dict[str, set[str]] = {}
        for id, entry in (self._index.entries(where=wanted) if self._index is not None else {}).items():
            owners.setdefault(entry["sha256"], set()).add(self._checked(id, entry)["identity"])
        return owners

    def add(
        self, identity: str, paths: Sequence[str | None], hashes: Sequence[str], vectors: Vectors
    ) -> tuple[list[int], int]:
        """Store references of an identity, all of them or none; content that it has already is left out.

        Args:
            identity: a name as `checked_identity` returns it.
            paths: where the n images are.
            hashes: SHA-256 of their content.
            vectors: (n, D) unit rows.

        Returns:
            The positions of those that are new, and how many references the identity has now.

        Raises:
            SearchIndexError: another process is writing, or the disk is full.
        """
        if self._index is None:
            self._index = self._created(vectors.shape[1])
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._index.transaction():
            for id, entry in self._index.entries(where={"sha256": {"$exists": False}}).items():
                self._checked(id, entry)  # not among entries of somebody else
            own = self._index.entries(where={"identity": identity})
            known = {self._checked(id, entry)["sha256"] for id, entry in own.items()}
            new = [i for i, mark in enumerate(hashes) if mark not in known and mark not in hashes[:i]]
            self._index.add(
                [f"{identity}/{hashes[i][:_HASH_DIGITS]}" for i in new],
                vectors[new],
                [{"identity": identity, "path": paths[i], "sha256": hashes[i], "enrolled": now} for i in new],
            )
        return new, len(known) + len(new)

    def remove(self, identity: str) -> int:
        """Remove an identity with all of its references, and return how many they were.

        Raises:
            DataError: it has none.
            SearchIndexError: another process is writing, or the disk is full.
        """
        if self._index is None:
            raise self._unknown(identity)
        with self._index.transaction():
            found = list(self._index.entries(where={"identity": identity}))
            if not found:
                raise self._unknown(identity)
            return self._index.remove(found)

    def _created(self, dim: int) -> Index:
        try:
            return Index.create(self.path, dim, self._fingerprint, self._location)
        except SearchIndexError:  # another process was first
            index = Index.open(self.path)
        if self._fingerprint is not None:
            try:
                index.require_model(self._fingerprint)
            except BaseException:
                index.close()
                raise
        return index

    def _checked(self, id: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata of an entry, which are those of a reference."""
        texts = [entry.get("identity"), entry.get("sha256"), entry.get("path") or ""]
        if not all(isinstance(text, str) for text in texts):
            raise SearchIndexError(
                f"{self.path} holds entries that are no references, like {id!r}; use a folder of its own"
            )
        return entry

    def _unknown(self, name: str) -> DataError:
        known = self.identities()
        if not known:
            return DataError(f"{name!r} is not enrolled; nobody is, in {self.path}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        people = "1 identity is" if len(known) == 1 else f"{len(known):,} identities are"
        return DataError(f"{name!r} is not enrolled{hint} {people} in {self.path}")


def checked_identity(name: object) -> str:
    """Return an identity's name in Unicode's form NFC, in which equal letters are equal.

    Raises:
        DataError: it is empty, too long, or holds control characters or spaces at its ends.
    """
    problem = id_problem(name)
    if problem is None:
        name = unicodedata.normalize("NFC", str(name))
        if name != name.strip():
            problem = "has spaces at its ends; remove them"
        elif len(name.encode()) > _LONGEST:
            problem = f"is longer than {_LONGEST:,} bytes; shorten it"
    if problem is not None:
        raise DataError(f"the identity {name!r:.80} {problem}")
    return str(name)


def content_hash(image: ImageSource) -> str:
    """Return the SHA-256, in hexadecimal, of a file's bytes, or of the pixels of an image in memory.

    Raises:
        ImageError: the image cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        try:
            with Path(image).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageError(str(image), f"cannot be read: {error.strerror}") from error
    pixels = load_image(image)
    digest = hashlib.sha256(f"{pixels.mode} {pixels.size} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def _gathered(group: Sequence[tuple[Mapping[str, Any], Vectors]]) -> References:
    return References(
        tuple(entry.get("path") for entry, _ in group),
        tuple(str(entry.get("sha256")) for entry, _ in group),
        np.stack([vector for _, vector in group]),
    )
