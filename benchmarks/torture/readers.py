"""Readers in processes of their own search an index while a writer changes it.

The writer keeps groups of entries: all members of a group are written, replaced or removed in one transaction, and
carry the number of the change that wrote them. So a reader sees at once when an answer is torn (members of different
changes, or some of a group), when it is older than an earlier answer, and when a hit's score is not that of the vector
which its id and its change's number determine.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import entries, processes
from benchmarks.torture.entries import DIM, optimise, vector_of, vectors_of
from vitembed.errors import SearchIndexError
from vitembed.index import Hit, Index

GROUPS = 150
MEMBERS = 12

# Never removed, so that ten hits can always be had.
_PERMANENT = 20

# Seconds that all may take beyond the time they are given, for the call that they are in.
_PATIENCE = 60.0


@dataclass
class Report:
    """What a run of readers beside a writer has come to.

    Attributes:
        reads: of all readers, by call.
        writes: by kind.
        problems: what was wrong, with the number of the reader.
        seconds: of the whole run.
    """

    reads: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def put_group(index: Index, group: int, step: int) -> None:
    """Write all members of a group in one transaction."""
    names = [f"{group}/{member}" for member in range(MEMBERS)]
    vectors = vectors_of([f"{name}@{step}" for name in names])
    index.add(names, vectors, [{"group": group, "step": step}] * MEMBERS)


def write(path: Path, until: float, seed: int) -> Counter[str]:
    """Change an index at random until a time (of `time.monotonic`), and count the changes."""
    random = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    step = 1
    with Index.open(path) as index:
        while time.monotonic() < until:
            step += 1
            group = int(random.integers(1, GROUPS))
            kind = str(random.choice(["put", "put", "put", "remove", "both"]))
            if step % 15 == 0:
                kind = ("compact", "optimize")[step // 15 % 2]
            counts[kind] += 1
            match kind:
                case "put":
                    put_group(index, group, step)
                case "remove":
                    index.remove([f"{group}/{member}" for member in range(MEMBERS)], missing_ok=True)
                case "both":
                    with index.transaction():
                        for one in {group, int(random.integers(1, GROUPS))}:
                            put_group(index, one, step)
                case "compact":
                    index.compact()
                case "optimize":
                    optimise(index, str(random.choice(entries.KINDS)))
            with index.transaction():  # the clock: what a reader may never see go back
                put_group(index, 0, step)
    return counts


class Reader:
    """A reader that remembers what it has seen, and what was wrong with it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.random = np.random.default_rng(seed)
        self.seen: dict[int, int] = {}  # group -> the latest change seen of it
        self.reads: Counter[str] = Counter()
        self.problems: list[str] = []
        self.calls: list[Callable[[Index], None]] = [
            self.search, self.search, self.batch, self.group, self.group, self.within, self.get, self.ids, self.stream,
        ]  # fmt: skip

    def work(self, until: float, reopen: bool) -> tuple[Counter[str], list[str]]:
        """Read at random until a time, opening the index once or for every few calls."""
        while time.monotonic() < until and len(self.problems) < 10:
            with Index.open(self.path) as index:
                for turn in range(10 if reopen else 10**9):
                    if time.monotonic() >= until or len(self.problems) >= 10:
                        break
                    call = self.check if turn % 50 == 49 else self.calls[self.random.integers(len(self.calls))]
                    self.reads[call.__name__] += 1
                    call(index)
        return self.reads, self.problems

    def search(self, index: Index) -> None:
        """Ask for ten hits, as optimised as it may be."""
        [query] = self._queries(1)
        [hits] = index.search(query, 10)
        self._judge(query, hits)
        self._require(len(hits) == 10, f"{len(hits)} hits instead of 10")

    def batch(self, index: Index) -> None:
        """Ask for the hits of several queries, exactly: they are of one state."""
        queries = self._queries(8)
        answers = index.search(queries, 10, recall=1.0)
        for query, hits in zip(queries, answers, strict=True):
            self._judge(query, hits)
            self._require(len(hits) == 10, f"{len(hits)} hits instead of 10")
        self._one_state({(hit.metadata["group"], hit.metadata["step"]) for hits in answers for hit in hits})

    def group(self, index: Index) -> None:
        """Ask for a group: it is there in full, or not at all."""
        [query] = self._queries(1)
        number = int(self.random.integers(GROUPS))
        [hits] = index.search(query, 2 * MEMBERS, where={"group": number})
        self._judge(query, hits)
        self._require(len(hits) in (MEMBERS, 0), f"{len(hits)} members of group {number}")
        self._require(bool(hits) or number != 0, "no clock")
        self._one_state({(hit.metadata["group"], hit.metadata["step"]) for hit in hits})

    def within(self, index: Index) -> None:
        """Ask for all within a score that all are within: every group is there in full."""
        [query] = self._queries(1)
        [hits] = index.search_within(query, -1.0)
        self._judge(query, hits)
        members = Counter((hit.metadata["group"], hit.metadata["step"]) for hit in hits)
        self._one_state(set(members))
        self._require(set(members.values()) <= {MEMBERS, _PERMANENT}, "a part of a group is within the score")

    def get(self, index: Index) -> None:
        """Get a member of the clock, which is always there."""
        record = index.get(f"0/{self.random.integers(MEMBERS)}")
        expected = vector_of(f"{record.id}@{record.metadata['step']}")
        self._require(np.array_equal(record.vector, expected), f"{record.id} has another vector")
        self._see(0, record.metadata["step"])

    def ids(self, index: Index) -> None:
        """Ask for all ids: every group is there in full."""
        members = Counter(name.split("/")[0] for name in index.ids())
        self._require(set(members.values()) <= {MEMBERS, _PERMANENT}, "ids hold a part of a group")

    def stream(self, index: Index) -> None:
        """Read everything, unless `compact` comes between; every vector is that of its change."""
        batches = index.stream(256)
        while True:
            try:
                records = next(batches, None)
            except SearchIndexError as error:
                self._require("begin again" in str(error), str(error))
                self.reads["stream begun again"] += 1
                return
            if records is None:
                return
            for name, vector, metadata in zip(records.ids, records.vectors, records.metadata, strict=True):
                expected = vector_of(f"{name}@{metadata['step']}")
                self._require(np.array_equal(vector, expected), f"stream: {name} has another vector")

    def check(self, index: Index) -> None:
        """Check the index while it is being written."""
        problems = index.check()
        self._require(problems == [], f"check: {problems}")

    def _queries(self, count: int) -> Any:
        return vectors_of([f"query {number}" for number in self.random.integers(10_000, size=count)])

    def _judge(self, query: Any, hits: list[Hit]) -> None:
        for hit in hits:
            vector = vector_of(f"{hit.id}@{hit.metadata['step']}")
            score = float(vector.astype(np.float64) @ query.astype(np.float64))
            self._require(abs(score - hit.score) < 1e-9, f"{hit.id} scores {hit.score!r}, its vector {score!r}")
        scores = [hit.score for hit in hits]
        self._require(scores == sorted(scores, reverse=True), "hits are out of order")
        self._require(len({hit.id for hit in hits}) == len(hits), "a hit is repeated")

    def _one_state(self, found: set[tuple[int, int]]) -> None:
        self._require(len(dict(found)) == len(found), "a group is of two changes in one answer")
        for group, step in found:
            self._see(group, step)

    def _see(self, group: int, step: int) -> None:
        latest = self.seen.get(group, 0)
        self._require(step >= latest, f"group {group} was of change {latest} and is of {step} now")
        self.seen[group] = max(step, latest)

    def _require(self, truth: bool, otherwise: str) -> None:
        if not truth:
            self.problems.append(otherwise)


def run(home: Path, seconds: float, readers: int = 4, seed: int = 0) -> Report:
    """Let readers read beside a writer for so long.

    Args:
        home: an empty folder to work in.
        seconds: how long.
        readers: how many processes; every second one opens the index again all the time.
        seed: of what they do.
    """
    path = home / "x.index"
    with Index.create(path, DIM) as index:
        names = [f"-1/{number}" for number in range(_PERMANENT)]
        vectors = vectors_of([f"{name}@0" for name in names])
        index.add(names, vectors, [{"group": -1, "step": 0}] * _PERMANENT)
        for group in range(GROUPS):
            put_group(index, group, 1)
    began = time.monotonic()
    until = began + seconds
    work: list[Callable[[], Any]] = [partial(write, path, until, seed)]
    work += [partial(Reader(path, seed + n).work, until, n % 2 == 1) for n in range(readers)]
    writer, *others = processes.run_all(work, seconds + _PATIENCE)
    report = Report(seconds=time.monotonic() - began)
    if writer.how == "returned":
        report.writes = writer.value
    else:
        report.problems.append(f"the writer {_how(writer)}")
    for number, ended in enumerate(others):
        if ended.how == "returned":
            report.reads += ended.value[0]
            report.problems += [f"reader {number}: {problem}" for problem in ended.value[1]]
        else:
            report.problems.append(f"reader {number} {_how(ended)}")
    with Index.open(path) as index:
        report.problems += [f"check at the end: {problem}" for problem in index.check()]
    return report


def _how(ended: processes.Ended) -> str:
    return f"{ended.how}: {str(ended.value or '').strip().splitlines()[-1:]}"
