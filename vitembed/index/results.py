"""What an index hands out: hits of a search, single entries, and batches of entries."""

from dataclasses import dataclass

from vitembed.index.inputs import Metadata
from vitembed.index.vectors import FloatArray


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search.

    Attributes:
        id: the id that was given to `Index.add`.
        score: cosine of the two embeddings, in [-1, 1], higher is more alike.
        metadata: what was stored with the id.
    """

    id: str
    score: float
    metadata: Metadata


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
