"""Training steps on a processor with memory that is kept from step to step, beside glibc's usual way.

    python benchmarks/allocation.py

Forward and backward of a network as that of recipes/omniglot.py, at 32 pixels, in bfloat16, and of ViT-S/16 in float32;
processes take turns, one a setting, and print seconds a step and the peak of their memory. A ratio is one of medians.
Five minutes on one core.
"""

import argparse
import contextlib
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from timing import machine

from vitembed.architecture import ViTConfig
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.training.allocation import kept_memory

CPU = torch.device("cpu")
STEM = ((64, 1), (64, 2), (128, 1), (128, 2), (192, 1), (192, 2))
CASES = {
    "omniglot, 256 x 32 x 32, bf16": (ViTConfig((32, 32), 8, 1, 192, 2, 3, mlp_width=384, stem=STEM), 256, True),
    "S/16, 16 x 224 x 224, fp32": (ViTConfig.named("S/16"), 16, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=5, help="of a process, after two that are not counted")
    options = parser.parse_args()

    print(machine())
    print(f"{'':<30}{'usual':>16}{'kept':>16}{'ratio':>8}")
    for name in CASES:
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(options.repeats):
            for kept, runs in found.items():
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    runs.append(process.submit(measure, name, options.steps, kept).result())
        seconds = {kept: statistics.median(run[0] for run in runs) for kept, runs in found.items()}
        peaks = {kept: statistics.median(run[1] for run in runs) for kept, runs in found.items()}
        columns = "".join(f"{seconds[kept]:>7.3f} s {peaks[kept]:>4.2f} GB" for kept in (False, True))
        print(f"{name:<30}{columns}{seconds[False] / seconds[True]:>7.2f}x")


def measure(name: str, steps: int, kept: bool) -> tuple[float, float]:
    """Return the median seconds of a step and the peak of this process's memory in GB."""
    config, batch, half = CASES[name]
    preprocess = Preprocess(config.image_size) if config.channels == 3 else Preprocess.grey(config.image_size)
    network = Embedder.create(config, preprocess=preprocess, device="cpu").network.train()
    images = torch.randint(0, 256, (batch, config.channels, *config.image_size), dtype=torch.uint8)
    seconds = []
    with kept_memory(CPU) if kept else contextlib.nullcontext():
        for _ in range(2 + steps):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                embeddings = network(images)
            embeddings.float().square().sum().backward()
            network.zero_grad()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
