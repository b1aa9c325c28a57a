"""What an index knows of its structure: the kind, what it covers, and its measured recall."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Point:
    """One measurement of a structure.

    Attributes:
        effort: HNSW's efSearch, or the number of lists looked at.
        recall: mean share of the true k nearest that were found, in [0, 1].
        ms: milliseconds for a query, one at a time.
    """

    effort: int
    recall: float
    ms: float


@dataclass(frozen=True)
class Optimization:
    """How an index searches, as `Index.optimize` chose it.

    Attributes:
        kind: "hnsw", "ivf" or "ivfpq"; "exact" when no structure is worth its memory.
        target: the recall that was asked for.
        k: the number of neighbours that the recall was measured with.
        curve: the measurements, by rising effort.
        exact_ms: milliseconds of an exact search for one query; None when nothing was measured.
        entries: how many entries the structure holds, the removed ones too.
        covers: every entry in a row before this one is in the structure.
        memory: size of the structure in bytes.
        seconds: what building and measuring took.
        reason: why this kind was taken, in a few words.
        code_bytes: size of a product-quantised code; 0 for other kinds.
        file: name of the structure's file; None for "exact".
        checksum: CRC-32 of that file.
    """

    kind: str
    target: float
    k: int
    curve: tuple[Point, ...]
    exact_ms: float | None
    entries: int
    covers: int
    memory: int
    seconds: float
    reason: str
    code_bytes: int = 0
    file: str | None = None
    checksum: int = 0

    def effort(self, recall: float | None = None) -> int | None:
        """Return the least effort that reached a recall, by default the target; None if none did.

        None has reached a recall of 1, whatever was measured: other queries may miss.
        """
        wanted = self.target if recall is None else recall
        if wanted >= 1:
            return None
        return next((point.effort for point in self.curve if point.recall >= wanted), None)

    def point(self) -> Point | None:
        """Return the measurement that searches rest on."""
        return next((point for point in self.curve if point.effort == self.effort()), None)

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """Read what `to_json` wrote; None if it is of another format, since a structure can be built again."""
        values: dict[str, Any] = json.loads(text)
        if values.keys() != {field.name for field in fields(cls)}:
            return None
        return cls(**{**values, "curve": tuple(Point(**point) for point in values["curve"])})
