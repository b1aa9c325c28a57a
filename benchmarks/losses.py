"""How fast the exact triplet loss is, forward and backward, beside pytorch-metric-learning's miner and loss.

    python benchmarks/losses.py                              # batches of 1024 and 4096, then 16384 of ours alone
    python benchmarks/losses.py --sizes 512 2048 --repeats 9
    python benchmarks/losses.py --images-per-class 32 --device cuda

Both take turns within one process and a figure is the ratio of medians; a check proves that they compute the same.
The embeddings are random ("start of training") or half-way between random and classes that are points ("half
trained"). Peak memory is that of a process of its own for each, less what the process had before the loss. About three
minutes.
"""

import argparse
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_metric_learning import losses, miners
from timing import alternate, machine
from torch import Tensor, nn

from vitembed.training.losses import TripletLoss

MARGIN = 0.2
PULL = {"random": 0.0, "half trained": 0.7}
MININGS = ["all", "semihard"]


def batch(size: int, args: argparse.Namespace, state: str) -> tuple[Tensor, Tensor]:
    """Return embeddings (size, dim), which want a gradient, and labels (size,), shuffled."""
    random = torch.Generator().manual_seed(size)
    labels = torch.randperm(size, generator=random) // args.images_per_class
    noise, centres = torch.randn(2, size, args.dim, generator=random)
    return (noise + PULL[state] * centres[labels]).to(args.device).requires_grad_(), labels.to(args.device)


def step(name: str, mining: str, embeddings: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes the loss and leaves its gradient in the embeddings."""
    loss: nn.Module
    if name == "ours":
        loss, miner = TripletLoss(MARGIN, mining), None
    else:
        loss = losses.TripletMarginLoss(margin=MARGIN)
        miner = miners.TripletMarginMiner(margin=MARGIN, type_of_triplets=mining)

    def run() -> Tensor:
        embeddings.grad = None
        value = loss(embeddings, labels, miner(embeddings, labels) if miner else None)
        value.backward()
        if embeddings.is_cuda:
            torch.cuda.synchronize()
        return value.detach()

    return run


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


def peak(size: int, name: str, mining: str, args: argparse.Namespace) -> float:
    """Return the peak memory in GB that one step takes, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(size), name, mining, "--dim", str(args.dim)]
    command += ["--images-per-class", str(args.images_per_class), "--device", args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(args: argparse.Namespace) -> None:
    """Print the peak memory in GB of one step, above what there was before it."""
    size, name, mining = args.measure
    # A small step first, so that libraries, threads and their buffers are there already.
    step(name, mining, *batch(64, args, "random"))()
    run = step(name, mining, *batch(int(size), args, "random"))
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


def compare(size: int, args: argparse.Namespace) -> None:
    """Print the rows of one batch size."""
    for mining in MININGS:
        memory = {name: peak(size, name, mining, args) for name in ("ours", "peer")}
        for state in PULL:
            embeddings, labels = batch(size, args, state)
            functions = {name: step(name, mining, embeddings, labels) for name in ("ours", "peer")}
            check_agreement(functions, embeddings)
            rounds = args.repeats if size <= 2048 else max(args.repeats // 2, 1)
            times = alternate(functions, repeats=rounds, warmup=0)
            gc.collect()
            print(
                f"{size:>6}  {mining:<9}{state:<13}{times['ours'] * 1e3:>9.1f}{times['peer'] * 1e3:>10.1f}"
                f"{times['peer'] / times['ours']:>8.1f} x{memory['ours']:>9.3f}{memory['peer']:>8.3f}"
                f"{memory['ours'] / memory['peer']:>9.3f}",
                flush=True,
            )


def alone(size: int, args: argparse.Namespace) -> None:
    """Print the rows of a batch size that is beyond the peer's reach."""
    for mining in MININGS:
        embeddings, labels = batch(size, args, "random")
        times = alternate({"ours": step("ours", mining, embeddings, labels)}, repeats=1, warmup=1)
        memory = peak(size, "ours", mining, args)
        print(f"{size:>6}  {mining:<9}{'random':<13}{times['ours'] * 1e3:>9.1f}{'':>20}{memory:>9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 4096], help="batch sizes to compare at")
    parser.add_argument("--alone", type=int, nargs="*", default=[16384], help="batch sizes of ours alone")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; half of them above 2048")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    print(machine())
    print(f"margin {MARGIN}, {args.dim} dimensions, {args.images_per_class} images a class, forward and backward\n")
    print("                                     milliseconds                 peak memory, GB")
    print(" batch  mining   embeddings        ours      peer   faster     ours    peer    ratio")
    for size in args.sizes:
        compare(size, args)
    for size in args.alone:
        alone(size, args)


if __name__ == "__main__":
    main()
