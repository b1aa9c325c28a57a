"""What an index hands out: hits of a search, single entries, and batches of entries."""

import json
from dataclasses import dataclass
from typing import Any

from vitembed.index.inputs import Metadata
from vitembed.index.vectors import FloatArray


class Hit:
    """One result of a search; two are equal when all that they hold is.

    Args:
        id: the id that was given to `Index.add`.
        score: cosine of the two embeddings, in [-1, 1], higher is more alike.
        metadata: what was stored with the id: the mapping, or its JSON text, which is read when it is first asked for.

    Attributes:
        id: as above.
        score: as above.
    """

    __slots__ = ("_metadata", "id", "score")

    id: str
    score: float
    _metadata: Metadata | str

    def __init__(self, id: str, score: float, metadata: Metadata | str) -> None:
        object.__setattr__(self, "id", id)
        object.__setattr__(self, "score", score)
        object.__setattr__(self, "_metadata", metadata)

    @property
    def metadata(self) -> Metadata:
        """What was stored with the id; this hit's own, so that changing it changes nothing else."""
        found = self._metadata
        if isinstance(found, str):
            found = {} if found == "{}" else json.loads(found)
            object.__setattr__(self, "_metadata", found)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return id, score and metadata by their names, to be written as JSON."""
        return {"id": self.id, "score": self.score, "metadata": self.metadata}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a hit cannot be changed; make another one to set {name!r}")

    def __reduce__(self) -> tuple[type["Hit"], tuple[str, float, Metadata]]:
        return Hit, (self.id, self.score, self.metadata)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hit) and self.as_dict() == other.as_dict()

    def __repr__(self) -> str:
        return f"Hit(id={self.id!r}, score={self.score!r}, metadata={self.metadata!r})"


@dataclass(frozen=True, eq=False)
class Record:
    """One entry of an index: its id, its vector (dim,) float32 and its metadata."""

    id: str
    vector: FloatArray
    metadata: Metadata


@dataclass(frozen=True, eq=False)
class Records:
    """Some entries of an index, in the order in which they were last added.

    Attributes:
        ids: n ids.
        vectors: (n, dim) float32, rows of unit length.
        metadata: n mappings.
    """

    ids: list[str]
    vectors: FloatArray
    metadata: list[Metadata]

    def __len__(self) -> int:
        return len(self.ids)
