"""Times and peaks of functions that take turns, as benchmarks of this folder report them."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def alternate(functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Run functions in turn, A B C A B C ..., and return the median seconds of each.

    Turns make drift of the machine's speed fall on all alike; the first `warmup` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ratios(times: Mapping[str, float], *, ours: str, per: int, unit: str) -> None:
    """Print a table: median seconds, how much a second, and how many times as fast ours is."""
    for name, seconds in times.items():
        print(f"{name:<16}{seconds:>10.4f} s{per / seconds:>12.1f} {unit}{seconds / times[ours]:>10.2f} x")


def machine() -> str:
    """Return one line about where this runs."""
    processor = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}{gpu}"
