"""How fast the index is, beside raw FAISS: exact search, filters, structures, opening, adding and removing.

    python benchmarks/index.py                                   # 200,000 vectors of 384 numbers
    python benchmarks/index.py --rows 1000000 --kinds ivf ivfpq
    python benchmarks/index.py --rows 50000 --dim 128 --kinds ivf

The vectors are clustered: each is a centre (one for 100 of them) plus noise of 0.7 of the centre's length; the queries
come from the same centres and are in no index. Raw FAISS has the same vectors in memory, and of a structure the very
file that ours made, followed by the same exact re-ranking (IndexRefineFlat). Its answers are numbers of rows, ours are
ids, scores and metadata. Both take turns within one process on queries that come once (batches and warm-up too), and a
figure is the ratio of medians. Some four minutes for 200,000 vectors without graphs, and twenty for a million.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from timing import alternate, machine

from vitembed.index import Hit, Index

Floats = NDArray[np.float32]
K = 10
BATCH = 1_000
NOISE = 0.7
SELECTIVITIES = {"a": 0.01, "b": 0.10, "c": 0.50}

# What a new process does when it opens an index: the time, and the memory that is its own and not the files'.
OPENING = """
import sys, time
from vitembed.index import Index
import vitembed.index.index
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
before = private()
start = time.perf_counter()
index = Index.open(sys.argv[1])
size = len(index)
print(time.perf_counter() - start, (private() - before) / 1e3, private() / 1e3)
"""


def clustered(rows: int, dim: int, random: np.random.Generator, centres: Floats) -> Floats:
    """Return unit rows (rows, dim) around centres."""
    vectors = random.standard_normal((rows, dim), dtype=np.float32) * np.float32(NOISE)
    vectors += centres[random.integers(0, len(centres), rows)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def print_line(name: str, figure: str, bar: str = "") -> None:
    print(f"{name:<46}{figure:<44}{bar}", flush=True)


class Queries:
    """Fresh queries for every call."""

    def __init__(self, vectors: Floats) -> None:
        self._vectors, self._next = vectors, 0

    def take(self, count: int) -> Floats:
        self._next = (self._next + count) % (len(self._vectors) - count)
        return self._vectors[self._next : self._next + count]


def compare(
    name: str, ours: Callable[[Floats], object], raw: Callable[[Floats], object], queries: Queries, batch: int, bar: float
) -> None:
    """Print queries a second of both and their ratio."""
    repeats = 200 if batch == 1 else 7
    turns = {"ours": ours, "raw": raw}
    times = alternate(
        {turn: lambda search=search: search(queries.take(batch)) for turn, search in turns.items()}, repeats=repeats
    )
    rates = {turn: batch / seconds for turn, seconds in times.items()}
    figure = f"{rates['ours']:9.1f}/s   raw {rates['raw']:9.1f}/s   {times['raw'] / times['ours']:5.2f} x"
    print_line(name, figure, f"bar {bar}")


def same(hits: list[list[Hit]], raw: NDArray[np.int64]) -> int:
    """Return for how many queries the ids are those of raw FAISS's rows, in order."""
    return sum([int(hit.id[3:]) for hit in found] == row.tolist() for found, row in zip(hits, raw, strict=True))


def add(index: Index, vectors: Floats, random: np.random.Generator) -> None:
    """Add everything in calls of 10,000, and print how many a second."""
    draws = random.random(len(vectors))
    seconds = []
    for start in range(0, len(vectors), 10_000):
        stop = min(start + 10_000, len(vectors))
        ids = [f"id-{row}" for row in range(start, stop)]
        metadata = [
            {"path": f"/photos/{row}.jpg", **{key: bool(draws[row] < share) for key, share in SELECTIVITIES.items()}}
            for row in range(start, stop)
        ]
        began = time.perf_counter()
        index.add(ids, vectors[start:stop], metadata)
        seconds.append(time.perf_counter() - began)
    print_line("add, calls of 10,000", f"{len(vectors) / sum(seconds):9.0f}/s", "bar 30,000/s")


def opening(path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(path)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
    seconds, own, all_own = sorted(runs, key=lambda run: float(run[0]))[1]
    print_line("open, a new process", f"{float(seconds):6.3f} s, {own} MB more, {all_own} MB in all", "bar 0.3 s, 200 MB")


def exact(index: Index, raw: Any, queries: Queries) -> None:
    compare("exact, single", lambda q: index.search(q, K), lambda q: raw.search(q, K), queries, 1, 2.0)
    compare("exact, batch", lambda q: index.search(q, K), lambda q: raw.search(q, K), queries, BATCH, 0.95)
    some = queries.take(200)
    singly = [index.search(query, K)[0] for query in some]
    rows = raw.search(some, K)[1]
    print_line("the same ten ids as IndexFlatIP", f"{same(singly, rows)} of 200 singly, {same(index.search(some, K), rows)} in a batch")


def filters(index: Index, vectors: Floats, queries: Queries) -> None:
    began = time.perf_counter()
    index.search(queries.take(1), K, where={key: True for key in SELECTIVITIES})
    print_line("first filter of a process, three keys", f"{time.perf_counter() - began:6.2f} s")
    for key, share in SELECTIVITIES.items():
        turns = {
            "filtered": lambda key=key: index.search(queries.take(1), K, where={key: True}),
            "all": lambda: index.search(queries.take(1), K, recall=1.0),
        }
        times = alternate(turns, repeats=100)
        names = [name for batch in index.stream() for name, data in zip(batch.ids, batch.metadata, strict=True) if data[key]]
        rows = np.array([int(name[3:]) for name in names])
        some = queries.take(50)
        truth = rows[np.argsort(-(some @ vectors[rows].T), axis=1, kind="stable")[:, :K]]
        right = same([index.search(query, K, where={key: True})[0] for query in some], truth)
        figure = f"{times['filtered'] * 1e3:7.2f} ms   unfiltered {times['all'] * 1e3:7.2f} ms   right {right} of 50"
        print_line(f"filter that lets {share:.0%} through, single", figure, "bar: not slower, all right")


def removing(index: Index, random: np.random.Generator) -> None:
    names = index.ids()
    seconds = []
    for _ in range(3):
        chosen = [names.pop(int(place)) for place in random.integers(0, len(names) - 1_000, 1_000)]
        began = time.perf_counter()
        index.remove(chosen)
        seconds.append(time.perf_counter() - began)
    print_line("remove 1,000", f"{float(np.median(seconds)):6.3f} s", "bar 0.5 s")


def structures(index: Index, vectors: Floats, queries: Queries, kinds: list[str], recall: float) -> None:
    truth = faiss.IndexFlatIP(vectors.shape[1])
    truth.add(vectors)
    for kind in kinds:
        began = time.perf_counter()
        chosen = index.optimize(recall, kind=None if kind == "auto" else kind, progress=True)
        print_line(f"optimize: {chosen.kind}", f"{time.perf_counter() - began:7.1f} s, {chosen.memory / 1e6:7.1f} MB")
        if chosen.file is None:
            continue
        some = queries.take(BATCH)
        found = index.search(some, K)
        rows = truth.search(some, K)[1]
        reached = np.mean(
            [len({int(hit.id[3:]) for hit in hits} & set(row.tolist())) / K for hits, row in zip(found, rows, strict=True)]
        )
        curve = ", ".join(f"{point.effort}: {point.recall:.3f}" for point in chosen.curve)
        print_line(f"  recall at effort {chosen.effort()}, unseen queries", f"{reached:.4f} (curve {curve})", f"bar {recall - 0.01}")
        raw = faiss.read_index(str(index.path / chosen.file))
        effort, width = int(chosen.effort() or 1), 10 * K if chosen.kind == "ivfpq" else K + 6
        own = faiss.SearchParametersHNSW(efSearch=max(effort, width)) if chosen.kind == "hnsw" else faiss.SearchParametersIVF(nprobe=effort)
        refined = faiss.IndexRefineFlat(raw, faiss.swig_ptr(vectors))
        both = faiss.IndexRefineSearchParameters(k_factor=width / K, base_index_params=own)
        for batch in (1, BATCH):
            size = "single" if batch == 1 else "batch"
            compare(f"  {chosen.kind}, {size}, re-ranked", lambda q: index.search(q, K), lambda q: refined.search(q, K, params=both), queries, batch, 0.95)
            compare(f"  {chosen.kind}, {size}, not re-ranked", lambda q: index.search(q, K), lambda q: raw.search(q, K, params=own), queries, batch, 0.95)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kinds", nargs="*", default=["hnsw", "ivf", "ivfpq"], help="structures; auto lets the index choose")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--folder", type=Path, help="where the index is made; a temporary folder by default")
    args = parser.parse_args(arguments)
    print(f"FAISS {faiss.__version__}, {faiss.omp_get_max_threads()} threads of FAISS; {machine()}")
    for rows in args.rows:
        random = np.random.default_rng(0)
        centres = random.standard_normal((max(rows // 100, 1), args.dim), dtype=np.float32)
        vectors, queries = clustered(rows, args.dim, random, centres), Queries(clustered(40_000, args.dim, random, centres))
        print(f"\n{rows:,} vectors of {args.dim}, {vectors.nbytes / 1e9:.2f} GB")
        raw = faiss.IndexFlatIP(args.dim)
        raw.add(vectors)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, Index.create(f"{folder}/x.index", args.dim) as index:
            add(index, vectors, random)
            index.search(queries.take(1), K)
            opening(index.path)
            exact(index, raw, queries)
            filters(index, vectors, queries)
            structures(index, vectors, queries, args.kinds, args.recall)
            removing(index, random)
            began = time.perf_counter()
            dropped = index.compact()
            print_line("compact", f"{time.perf_counter() - began:6.2f} s, {dropped:,} rows dropped")
            began = time.perf_counter()
            problems = index.check()
            print_line("check", f"{time.perf_counter() - began:6.2f} s, {len(problems)} problems")


if __name__ == "__main__":
    main()
