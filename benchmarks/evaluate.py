"""How fast and lean the metrics are: retrieval beside the bare matrix product, verification on many scores.

    python benchmarks/evaluate.py                                    # both sections, about ten minutes on two cores
    python benchmarks/evaluate.py retrieval --rows 60000 --images-per-class 5 100
    python benchmarks/evaluate.py scores --scores 10000000

Retrieval: recall@k and MAP@R of embeddings of 384 numbers, drawn around the centres of their classes, so that about
half of the matches are found. The bare product is `z @ z.T`, a slab at a time, with all threads of numpy; both take
turns and the figure is the ratio of medians. The full average precision, precision@k and the vote cost more; each runs
once in a process of its own, and the figure is the ratio of processor times, which other work on the machine disturbs
less. pytorch-metric-learning's `AccuracyCalculator` computes precision@1 and MAP@R on `--peer-rows`, and must
come to the same figures.

Scores: equal error rate and TAR@FAR of float32 scores, each in a process of its own; scikit-learn's `roc_curve` on
`--peer-scores`. Peak memory is that of the whole process, input included.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics

Floats = NDArray[np.float32]

SLAB = 1_024
FAR = 0.001

# Scores drawn at a time, so that the drawing takes no memory worth counting.
CHUNK = 1_000_000


def embeddings(rows: int, dim: int, per_class: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return unit rows around the centres of their classes, shuffled, and the classes."""
    random = np.random.default_rng(0)
    labels = random.permutation(rows) // per_class
    z = random.standard_normal((rows, dim), dtype=np.float32) * np.float32(2)
    z += random.standard_normal((-(-rows // per_class), dim), dtype=np.float32)[labels]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z, labels


def bare_product(z: Floats) -> None:
    """Compute all scores, a slab at a time, and look at none."""
    slab = np.empty((SLAB, len(z)), dtype=z.dtype)
    for first in range(0, len(z), SLAB):
        rows = z[first : first + SLAB]
        np.matmul(rows, z.T, out=slab[: len(rows)])


def scored_pairs(count: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Return scores (count,), of which a tenth are of matching pairs and higher by three standard deviations."""
    random = np.random.default_rng(0)
    scores, is_match = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.bool_)
    for first in range(0, count, CHUNK):
        part = slice(first, first + CHUNK)
        random.standard_normal(dtype=np.float32, out=scores[part])
        is_match[part] = random.random(is_match[part].size, dtype=np.float32) < 0.1
        scores[part] += np.float32(3) * is_match[part]
    return scores, is_match


def high_water() -> float:
    """Return the most resident memory in GB that this process ever had."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024 / 1e9


def peer_figures(z: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    found: dict[str, float] = calculator.get_accuracy(torch.from_numpy(z), torch.from_numpy(labels))
    return found


def sklearn_roc(scores: Floats, is_match: NDArray[np.bool_]) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(is_match, scores)


RETRIEVAL: dict[str, Callable[[Floats, NDArray[np.int64]], object]] = {
    "recall@k and MAP@R": lambda z, labels: metrics.query_ranks(z, labels),
    "+ precision@10": lambda z, labels: metrics.query_ranks(z, labels, ks=(10,)),
    "+ vote of 10": lambda z, labels: metrics.query_ranks(z, labels, voters=10),
    "+ full mAP": lambda z, labels: metrics.query_ranks(z, labels, full=True),
    "bare product": lambda z, labels: bare_product(z),
    "peer": peer_figures,
}
SCORES: dict[str, Callable[[Floats, NDArray[np.bool_]], object]] = {
    "EER": metrics.equal_error_rate,
    "TAR@FAR": lambda scores, is_match: metrics.tar_at_far(scores, is_match, FAR),
    "peer": sklearn_roc,
}


def measure(name: str, rows: int, dim: int, per_class: int) -> None:
    """Print seconds, processor seconds and peak memory in GB of a run in this process; scores have no classes."""
    work: Callable[..., object] = RETRIEVAL[name] if per_class else SCORES[name]
    given = embeddings(rows, dim, per_class) if per_class else scored_pairs(rows)
    began, used = time.perf_counter(), time.process_time()
    work(*given)
    print(time.perf_counter() - began, time.process_time() - used, high_water())


class Run(NamedTuple):
    """What a run in a process of its own took."""

    seconds: float
    processor: float  # seconds of all threads
    memory: float  # GB at the peak, of the whole process


def alone(name: str, rows: int, dim: int = 0, per_class: int = 0) -> Run:
    command = [sys.executable, __file__, "--measure", name, *map(str, (rows, dim, per_class))]
    return Run(*map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


def print_line(name: str, run: Run, note: str = "") -> None:
    print(
        f"{name:<22}{run.seconds:>9.2f} s{run.processor:>9.2f} s cpu{run.memory:>7.2f} GB   {note}".rstrip(), flush=True
    )


def retrieval(args: argparse.Namespace) -> None:
    from timing import alternate

    for per_class in args.images_per_class:
        print(f"\n{args.rows:,} x {args.dim}, {per_class} images a class; load {os.getloadavg()[0]:.1f}")
        z, labels = embeddings(args.rows, args.dim, per_class)
        found = metrics.query_ranks(z, labels)
        times = alternate(
            {
                "bare product": lambda z=z: bare_product(z),
                "recall@k and MAP@R": lambda z=z, labels=labels: metrics.query_ranks(z, labels),
            },
            repeats=args.repeats,
            warmup=0,
        )
        runs = {name: alone(name, args.rows, args.dim, per_class) for name in RETRIEVAL if name != "peer"}
        for name, run in runs.items():
            note = f"{run.processor / runs['bare product'].processor:5.2f} x of the product's processor time"
            print_line(name, run, note)
        ratio = times["recall@k and MAP@R"] / times["bare product"]
        print(
            f"in turns: {times['bare product']:.2f} s and {times['recall@k and MAP@R']:.2f} s, {ratio:.2f} x; bar 1.3 x"
        )
        print(f"recall@1 {np.mean(found.first_rank == 1):.4f}, MAP@R {np.mean(found.precision_at_r):.4f}")
        beside_peer(args, per_class)


def beside_peer(args: argparse.Namespace, per_class: int) -> None:
    """Print both on fewer rows, after a check that they find the same."""
    z, labels = embeddings(args.peer_rows, args.dim, per_class)
    theirs, ours = peer_figures(z, labels), metrics.query_ranks(z, labels)
    figures = (np.mean(ours.first_rank == 1), np.mean(ours.precision_at_r))
    np.testing.assert_allclose(figures, [theirs["precision_at_1"], theirs["mean_average_precision_at_r"]], rtol=1e-4)
    print(f"beside pytorch-metric-learning, {args.peer_rows:,} rows")
    names = ("bare product", "recall@k and MAP@R", "peer")
    rounds = [{name: alone(name, args.peer_rows, args.dim, per_class) for name in names} for _ in range(args.repeats)]
    medians = {name: Run(*map(statistics.median, zip(*(turn[name] for turn in rounds), strict=True))) for name in names}
    for name, run in medians.items():
        print_line(name, run, f"{run.seconds / medians['recall@k and MAP@R'].seconds:5.2f} x ours")


def scores(args: argparse.Namespace) -> None:
    print(f"\n{args.scores:,} scores; load {os.getloadavg()[0]:.1f}")
    for name in ("EER", "TAR@FAR"):
        print_line(name, alone(name, args.scores), "bar 30 s, 1 GB")
    print(f"beside scikit-learn, {args.peer_scores:,} scores")
    for name in ("EER", "TAR@FAR", "peer"):
        print_line(name, alone(name, args.peer_scores))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["retrieval", "scores"], help="retrieval, scores")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--images-per-class", type=int, nargs="+", default=[5, 100])
    parser.add_argument("--peer-rows", type=int, default=20_000)
    parser.add_argument("--scores", type=int, default=100_000_000)
    parser.add_argument("--peer-scores", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        name, *numbers = args.measure
        measure(name, *map(int, numbers))
        return
    from timing import machine

    print(machine())
    for section in args.sections:
        {"retrieval": retrieval, "scores": scores}[section](args)


if __name__ == "__main__":
    main()
