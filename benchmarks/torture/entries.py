"""What the tortures fill an index with, and the answers that it then owes: plain loops, no code of the index.

Every vector follows from a key, so that any process can tell, from the log of the changes alone, what every entry must
hold to the bit.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.index import Hit, Index, changes, codes, exact, rows
from vitembed.index.structure import KINDS as STRUCTURES
from vitembed.index.structure import MIN_ROWS

DIM = 16

KINDS = ["exact", *STRUCTURES]
"""What `optimise` is told to make; `--kinds` of the command line changes it for a shorter run."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """What an id must hold.

    Attributes:
        key: what its vector follows from, see `vector_of`.
        metadata: as they were added.
        content: of the file it came from; None when it came from none.
    """

    key: str
    metadata: dict[str, Any] = field(default_factory=dict)
    content: str | None = None


State = dict[str, Entry]  # in the order in which the ids were last added


@functools.lru_cache(maxsize=500_000)
def vector_of(key: str) -> Vector:
    """Return the unit vector (DIM,) float32 that belongs to a key; float16 holds its numbers exactly."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    numbers = np.random.default_rng(seed).standard_normal(DIM)
    vector: Vector = (numbers / np.linalg.norm(numbers)).astype(np.float16).astype(np.float32)
    vector.flags.writeable = False
    return vector


def vectors_of(keys: Sequence[str]) -> Vector:
    """Return the vectors of keys, (n, DIM) float32."""
    return np.stack([vector_of(key) for key in keys]) if keys else np.empty((0, DIM), np.float32)


def entry(name: str, step: int) -> Entry:
    """Return the entry of a name as the change number `step` writes it."""
    return Entry(f"{name}@{step}", {"step": step, "class": step % 5, "name": name})


def add(index: Index, state: State, names: Sequence[str], step: int) -> None:
    """Add names to an index and to its state, as the change number `step`."""
    entries = [entry(name, step) for name in names]
    index.add(names, vectors_of([one.key for one in entries]), [one.metadata for one in entries])
    put(state, dict(zip(names, entries, strict=True)))


def put(state: State, entries: Mapping[str, Entry]) -> None:
    """Add or replace entries of a state; replaced ones move to the end, as in an index."""
    for name, one in entries.items():
        state.pop(name, None)
        state[name] = one


class Truth:
    """The answers that an index with these entries owes, by plain float64 products.

    Attributes:
        state: the entries; they must not change any more.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    @functools.cached_property
    def _vectors(self) -> npt.NDArray[np.float64]:
        return vectors_of([one.key for one in self.state.values()]).astype(np.float64)

    def ranking(self, query: Vector, where: Mapping[str, Any] | None = None) -> list[tuple[str, float]]:
        """Return all ids whose metadata hold `where`, with their scores, best first; equal scores in order."""
        scores = self._vectors @ query.astype(np.float64)
        names = list(self.state)
        ranked = [(names[n], float(scores[n])) for n in np.argsort(-scores, kind="stable")]
        return [pair for pair in ranked if not where or where.items() <= self.state[pair[0]].metadata.items()]

    def wrong_hits(self, query: Vector, hits: Sequence[Hit]) -> list[str]:
        """Return what is wrong with hits one by one: unknown, with another's values, out of order, twice."""
        problems = []
        for hit in hits:
            one = self.state.get(hit.id)
            if one is None:
                problems.append(f"a hit that is no entry: {hit.id!r}")
                continue
            expected = float(vector_of(one.key).astype(np.float64) @ query.astype(np.float64))
            if not abs(hit.score - expected) < 1e-9:
                problems.append(f"{hit.id!r} scores {expected!r}, the hit says {hit.score!r}")
            if hit.metadata != one.metadata:
                problems.append(f"{hit.id!r} has other metadata than {hit.metadata!r:.80}")
        falling = all(a.score >= b.score for a, b in itertools.pairwise(hits))
        if len({hit.id for hit in hits}) != len(hits) or not falling:
            problems.append("hits are repeated or out of order")
        return problems

    def wrong_answer(
        self, query: Vector, hits: Sequence[Hit], k: int, where: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Return what is wrong with the hits of an exact search."""
        expected = [name for name, _ in self.ranking(query, where)[:k]]
        others = [] if [hit.id for hit in hits] == expected else [f"found {[hit.id for hit in hits]}, not {expected}"]
        return self.wrong_hits(query, hits) + others

    def wrong_entry(self, name: str, vector: npt.ArrayLike, metadata: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with an entry: an unknown id, other metadata, a vector that differs in any bit."""
        one = self.state.get(name)
        if one is None:
            return [f"{name!r} is no entry"]
        same = one.metadata == metadata and np.array_equal(vector_of(one.key), vector)
        return [] if same else [f"{name!r} has another vector or other metadata"]


def use_small_blocks() -> None:
    """Let this process code every 256 rows and score none outright: small indexes then go the way of large ones."""
    for module in (changes, codes, exact, rows):
        vars(module)["CODE_ROWS"] = 256
    exact.FEW_ROWS = 0


def optimise(index: Index, kind: str) -> None:
    """Give an index a structure of a kind, or none where it holds too little for one.

    The recall that is asked for is one that every kind reaches with vectors as narrow as these.
    """
    index.optimize(recall=0.5, kind=kind if len(index) >= MIN_ROWS else "exact")
