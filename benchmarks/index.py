"""How fast the index is, beside raw FAISS: exact search, filters, structures, opening, adding and removing.

    python benchmarks/index.py                                   # 200,000 vectors of 384 numbers
    python benchmarks/index.py --rows 1000000 --kinds ivf ivfpq
    python benchmarks/index.py --rows 50000 --dim 128 --kinds ivf

The vectors are clustered: each is the centre of a class (of 200 members), plus as much again in 40 directions that all
classes share, as embeddings vary within their classes, plus 0.3 of noise. The queries are drawn likewise and are in no
index. Raw FAISS has the same vectors in memory, and of a structure the very file that ours made, with the same exact
re-ranking (IndexRefineFlat) and without any. Its answers are numbers of rows; ours are ids, scores and metadata. Both
take turns within one process (25 single queries, or one batch), on queries that come once, and a figure is the ratio of
medians; of single queries raw FAISS has the better of one thread and all. Ours reads ids, metadata and checksums into
memory as searches ask for them; before structures are timed some thousand queries are asked, and their time is printed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
THREADS = faiss.omp_get_max_threads()

# Before each turn, in seconds: OpenMP's threads go on spinning for some milliseconds, on somebody else's time.
PAUSE = 0.02
CLASS, SHARED, NOISE = 200, 40, 0.3
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


class Source:
    """Clustered vectors: see above."""

    def __init__(self, rows: int, dim: int) -> None:
        self._random = np.random.default_rng(0)
        self._centres = self._random.standard_normal((max(rows // CLASS, 2), dim), dtype=np.float32)
        self._directions = self._random.standard_normal((SHARED, dim), dtype=np.float32) / np.float32(SHARED**0.5)

    def draw(self, count: int) -> Floats:
        """Return unit rows (count, dim)."""
        dim = self._centres.shape[1]
        vectors = self._random.standard_normal((count, dim), dtype=np.float32) * np.float32(NOISE)
        for start in range(0, count, 100_000):
            part = vectors[start : start + 100_000]
            part += self._centres[self._random.integers(0, len(self._centres), len(part))]
            part += self._random.standard_normal((len(part), SHARED), dtype=np.float32) @ self._directions
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return vectors


def print_line(name: str, figure: str, bar: str = "") -> None:
    print(f"{name:<46} {figure:<44} {bar}".rstrip(), flush=True)


class Queries:
    """Queries that come once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = source.draw(0)

    def take(self, count: int) -> Floats:
        """Return the next queries (count, dim)."""
        if len(self._left) < count:
            self._left = self._source.draw(max(20_000, count))
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def with_threads(search: Callable[[Floats], object], threads: int) -> Callable[[Floats], object]:
    """Return a search that FAISS does with so many threads."""

    def run(queries: Floats) -> object:
        faiss.omp_set_num_threads(threads)
        try:
            return search(queries)
        finally:
            faiss.omp_set_num_threads(THREADS)

    return run


def plain_search(index: Any) -> Callable[..., Any]:
    """Return FAISS's own search, which faiss.contrib.torch_utils replaces by one without parameters."""
    return getattr(index, "search_numpy", index.search)


def compare(
    name: str,
    ours: Callable[[Floats], object],
    raw: Callable[[Floats], object],
    queries: Queries,
    batch: int,
    bar: float,
) -> None:
    """Print queries a second of both and their ratio; of raw FAISS with one thread and with all, the faster."""
    repeats = 10 if batch == 1 else 7
    turns = {"ours": ours, "raw": raw}
    if batch == 1 and THREADS > 1:
        turns["raw, one thread"] = with_threads(raw, 1)
    seconds: dict[str, list[float]] = {turn: [] for turn in turns}
    for number in range(repeats + 1):
        for turn, search in turns.items():
            drawn = [queries.take(batch) for _ in range(25 if batch == 1 else 1)]
            time.sleep(PAUSE)
            for part in drawn:
                began = time.perf_counter()
                search(part)
                if number:  # the first round warms up
                    seconds[turn].append(time.perf_counter() - began)
    times = {turn: float(np.median(values)) for turn, values in seconds.items()}
    best = min(seconds for turn, seconds in times.items() if turn != "ours")
    figure = f"{batch / times['ours']:9.1f}/s   raw {batch / best:9.1f}/s   {best / times['ours']:5.2f} x"
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
    print_line(
        "open, a new process", f"{float(seconds):6.3f} s, {own} MB more, {all_own} MB in all", "bar 0.3 s, 200 MB"
    )


def exact(index: Index, raw: Any, queries: Queries) -> None:
    compare("exact, single", lambda q: index.search(q, K), lambda q: raw.search(q, K), queries, 1, 2.0)
    compare("exact, batch", lambda q: index.search(q, K), lambda q: raw.search(q, K), queries, BATCH, 0.95)
    some = queries.take(200)
    singly = [index.search(query, K)[0] for query in some]
    rows = raw.search(some, K)[1]
    print_line(
        "the same ten ids as IndexFlatIP",
        f"{same(singly, rows)} of 200 singly, {same(index.search(some, K), rows)} in a batch",
    )


def filters(index: Index, vectors: Floats, queries: Queries) -> None:
    began = time.perf_counter()
    index.search(queries.take(1), K, where=dict.fromkeys(SELECTIVITIES, True))
    print_line("first filter of a process, three keys", f"{time.perf_counter() - began:6.2f} s")
    for key, share in SELECTIVITIES.items():
        turns = {
            "filtered": lambda key=key: index.search(queries.take(1), K, where={key: True}),
            "all": lambda: index.search(queries.take(1), K, recall=1.0),
        }
        times = alternate(turns, repeats=100)
        names = [
            name for batch in index.stream() for name, data in zip(batch.ids, batch.metadata, strict=True) if data[key]
        ]
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
        count = min(1_000, len(names) // 10)
        chosen = [names.pop(int(place)) for place in random.integers(0, len(names) - count, count)]
        began = time.perf_counter()
        index.remove(chosen)
        seconds.append(time.perf_counter() - began)
    print_line("remove 1,000", f"{float(np.median(seconds)):6.3f} s", "bar 0.5 s")


def structure(index: Index, vectors: Floats, flat: Any, queries: Queries, kind: str | None, recall: float) -> None:
    began = time.perf_counter()
    chosen = index.optimize(recall, kind=kind, progress=True)
    print_line(f"optimize: {chosen.kind}", f"{time.perf_counter() - began:7.1f} s, {chosen.memory / 1e6:7.1f} MB")
    if chosen.file is None:
        return
    some = queries.take(BATCH)
    pairs = zip(index.search(some, K), flat.search(some, K)[1], strict=True)
    reached = np.mean([len({int(hit.id[3:]) for hit in hits} & set(row.tolist())) / K for hits, row in pairs])
    curve = ", ".join(f"{point.effort}: {point.recall:.3f}" for point in chosen.curve)
    effort = int(chosen.effort() or 1)
    print_line(
        f"  recall at effort {effort}, unseen queries", f"{reached:.4f} (curve {curve})", f"bar {recall - 0.01:.2f}"
    )
    raw = faiss.read_index(str(index.path / chosen.file))
    width = 10 * K if chosen.kind == "ivfpq" else K + 6
    if chosen.kind == "hnsw":
        own = faiss.SearchParametersHNSW(efSearch=max(effort, width))
    else:
        own = faiss.SearchParametersIVF(nprobe=effort)
    refined = faiss.IndexRefineFlat(raw, faiss.swig_ptr(vectors))
    both = faiss.IndexRefineSearchParameters(k_factor=width / K, base_index_params=own)
    ours = partial(index.search, k=K)
    began = time.perf_counter()
    for _ in range(10 if len(vectors) <= 500_000 else 20):
        ours(queries.take(BATCH))
    print_line("  warming up, thousands of queries", f"{time.perf_counter() - began:6.2f} s")
    for size, batch in (("single", 1), ("batch", BATCH)):
        ranked = partial(plain_search(refined), k=K, params=both)
        unranked = partial(plain_search(raw), k=K, params=own)
        compare(f"  {chosen.kind}, {size}, raw re-ranked", ours, ranked, queries, batch, 0.95)
        compare(f"  {chosen.kind}, {size}, raw not", ours, unranked, queries, batch, 0.95)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument(
        "--kinds", nargs="*", default=["hnsw", "ivf", "ivfpq"], help="structures; auto lets the index choose"
    )
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--folder", type=Path, help="where the index is made; a temporary folder by default")
    args = parser.parse_args(arguments)
    print(f"FAISS {faiss.__version__}, {THREADS} threads of FAISS; {machine()}; load {os.getloadavg()[0]:.1f}")
    for rows in args.rows:
        random = np.random.default_rng(0)
        source = Source(rows, args.dim)
        vectors, queries = source.draw(rows), Queries(source)
        print(f"\n{rows:,} vectors of {args.dim}, {vectors.nbytes / 1e9:.2f} GB")
        raw = faiss.IndexFlatIP(args.dim)
        raw.add(vectors)
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            Index.create(f"{folder}/x.index", args.dim) as index,
        ):
            add(index, vectors, random)
            index.search(queries.take(1), K)
            opening(index.path)
            exact(index, raw, queries)
            filters(index, vectors, queries)
            for kind in args.kinds:
                structure(index, vectors, raw, queries, None if kind == "auto" else kind, args.recall)
            removing(index, random)
            began = time.perf_counter()
            dropped = index.compact()
            print_line("compact", f"{time.perf_counter() - began:6.2f} s, {dropped:,} rows dropped")
            began = time.perf_counter()
            problems = index.check()
            print_line("check", f"{time.perf_counter() - began:6.2f} s, {len(problems)} problems")


if __name__ == "__main__":
    main()
