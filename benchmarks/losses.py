"""How fast the exact triplet loss is, forward and backward, beside pytorch-metric-learning's miner and loss.

    python benchmarks/losses.py                              # batches of 1024 and 4096, then 16384 of ours alone
    python benchmarks/losses.py --sizes 512 2048 --against 512x2048 --repeats 9
    python benchmarks/losses.py --images-per-class 32 --device cuda --alone 16384 65536

The second table is of queries against a reference set, as a memory of earlier batches is one: its rows have no
gradient, and it holds as many images of each class as there is room for (16 in 4096, for 1024 queries with 4 a class).

Both take turns within one process and a figure is the ratio of medians; a check proves that they compute the same.
The embeddings are random ("start of training") or half-way between random and classes that are points ("half
trained"). Peak memory is that of a process of its own for each, less what the process had before the loss. Where the
peer would need more than `--peer-memory`, ours runs alone. About four minutes.
"""

import argparse
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_metric_learning import losses, miners
from timing import alternate, machine
from torch import Tensor

from vitembed.training.losses.metric import TripletLoss

MARGIN = 0.2
PULL = {"random": 0.0, "half trained": 0.7}
MININGS = ["all", "semihard"]


class Batch(NamedTuple):
    """What a loss is given."""

    embeddings: Tensor  # (B, dim), which want a gradient
    labels: Tensor  # (B,)
    references: Tensor | None  # (M, dim)
    theirs: Tensor | None  # (M,)


def batch(sizes: tuple[int, int], args: argparse.Namespace, state: str) -> Batch:
    """Return embeddings and shuffled labels, and as many references of the same classes, if any."""
    size, held = sizes
    random = torch.Generator().manual_seed(size)
    labels = torch.randperm(size, generator=random) // args.images_per_class
    noise, centres = torch.randn(2, size, args.dim, generator=random)
    embeddings = (noise + PULL[state] * centres[labels]).to(args.device).requires_grad_()
    if not held:
        return Batch(embeddings, labels.to(args.device), None, None)
    theirs = torch.randperm(held, generator=random) % (size // args.images_per_class)
    references = torch.randn(held, args.dim, generator=random) + PULL[state] * centres[theirs]
    return Batch(embeddings, labels.to(args.device), references.to(args.device), theirs.to(args.device))


def step(name: str, mining: str, given: Batch) -> Callable[[], Tensor]:
    """Return a function that computes the loss and leaves its gradient in the embeddings."""
    loss = TripletLoss(MARGIN, mining) if name == "ours" else losses.TripletMarginLoss(margin=MARGIN)
    miner = None if name == "ours" else miners.TripletMarginMiner(margin=MARGIN, type_of_triplets=mining)
    embeddings, labels, references, theirs = given

    def run() -> Tensor:
        embeddings.grad = None
        tuples = miner(embeddings, labels, references, theirs) if miner else None
        value = loss(embeddings, labels, tuples, ref_emb=references, ref_labels=theirs)
        value.backward()
        if embeddings.is_cuda:
            torch.cuda.synchronize()
        return value.detach()

    return run


def peer_bytes(sizes: tuple[int, int], args: argparse.Namespace) -> float:
    """Return about how much memory the peer needs: its triplets' indices and distances, and what it makes of them."""
    size, held = sizes[0], sizes[1] or sizes[0]
    return 70.0 * size * (held - 1) * held / (size / args.images_per_class)  # bytes a triplet (measured)


def check_agreement(functions: dict[str, Callable[[], Tensor]], embeddings: Tensor) -> None:
    """Stop unless both give the same value and gradient."""
    values, gradients = [], []
    for run in functions.values():
        values.append(run())
        gradients.append(embeddings.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    if error > 1e-3:
        raise SystemExit(f"the gradients differ by {error:.1e} of their size: nothing to compare")


def peak(sizes: tuple[int, int], name: str, mining: str, args: argparse.Namespace) -> float:
    """Return the peak memory in GB that one step takes, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, sizes), name, mining, "--dim", str(args.dim)]
    command += ["--images-per-class", str(args.images_per_class), "--device", args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(args: argparse.Namespace) -> None:
    """Print the peak memory in GB of one step, above what there was before it."""
    size, held, name, mining = args.measure
    # A small step first, so that libraries, threads and their buffers are there already.
    step(name, mining, batch((64, 0), args, "random"))()
    run = step(name, mining, batch((int(size), int(held)), args, "random"))
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 1e9)
        return
    before = high_water()
    run()
    print((high_water() - before) * 1024 / 1e9)


def high_water() -> int:
    """Return the most resident memory that this process ever had, in KiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss down from the parent process, which may have been larger
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(sizes: tuple[int, int], args: argparse.Namespace) -> None:
    """Print the rows of one batch size."""
    size, held = sizes
    rounds = args.repeats if size * max(size, held) <= 2048**2 else max(args.repeats // 2, 1)
    if held:
        rounds = max(args.repeats // 4, 1)  # the peer takes long
    for mining in MININGS:
        memory = {name: peak(sizes, name, mining, args) for name in ("ours", "peer")}
        for state in PULL:
            given = batch(sizes, args, state)
            functions = {name: step(name, mining, given) for name in ("ours", "peer")}
            check_agreement(functions, given.embeddings)
            times = alternate(functions, repeats=rounds, warmup=0)
            gc.collect()
            print(
                f"{title(sizes)}  {mining:<9}{state:<13}{times['ours'] * 1e3:>9.1f}{times['peer'] * 1e3:>10.1f}"
                f"{times['peer'] / times['ours']:>8.1f} x{memory['ours']:>9.3f}{memory['peer']:>8.3f}"
                f"{memory['ours'] / memory['peer']:>9.3f}",
                flush=True,
            )


def alone(sizes: tuple[int, int], args: argparse.Namespace) -> None:
    """Print the rows of a batch size that is beyond the peer's reach."""
    for mining in MININGS:
        memory = peak(sizes, "ours", mining, args)
        for state in PULL if sizes[1] else ["random"]:
            run = step("ours", mining, batch(sizes, args, state))
            times = alternate({"ours": run}, repeats=1, warmup=0 if sizes[1] else 1)
            print(
                f"{title(sizes)}  {mining:<9}{state:<13}{times['ours'] * 1e3:>9.1f}{'ours alone':>20}{memory:>9.3f}",
                flush=True,
            )


def title(sizes: tuple[int, int]) -> str:
    """Return the first column: queries, and references if any."""
    return f"{sizes[0]:>6} x {sizes[1]:<6}" if sizes[1] else f"{sizes[0]:>6}{'':9}"


def table(rows: list[tuple[int, int]], args: argparse.Namespace) -> None:
    """Print the rows of each size, of ours alone where the peer would not fit."""
    for sizes in rows:
        fits = peer_bytes(sizes, args) <= args.peer_memory * 1e9
        chosen = sizes[0] in args.alone and not sizes[1]
        (compare if fits and not chosen else alone)(sizes, args)


def pair(text: str) -> tuple[int, int]:
    """Read "1024x4096"."""
    queries, references = text.split("x")
    return int(queries), int(references)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 4096], help="batch sizes to compare at")
    parser.add_argument("--alone", type=int, nargs="*", default=[16384], help="batch sizes of ours alone")
    parser.add_argument(
        "--against",
        type=pair,
        nargs="*",
        default=[(1024, 4096), (4096, 4096), (4096, 16384)],
        help="queries x references",
    )
    parser.add_argument("--peer-memory", type=float, default=8.0, help="GB that the peer may take")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds; half of them above 2048, a quarter against references"
    )
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    print(machine())
    print(f"margin {MARGIN}, {args.dim} dimensions, {args.images_per_class} images a class, forward and backward")
    header = "                                              milliseconds                 peak memory, GB\n"
    header += " batch           mining   embeddings        ours      peer   faster     ours    peer    ratio"
    print(f"\nWithin a batch\n{header}")
    table([(size, 0) for size in [*args.sizes, *args.alone]], args)
    print(f"\nQueries against a reference set\n{header}")
    table(args.against, args)


if __name__ == "__main__":
    main()
