"""Independent pieces of numpy work on all cores: a thread a piece, each with its own products on one core.

The threads of a matrix product wait for each other, and the work between products is on one core while the others idle;
pieces that are whole computations use all cores all the time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

# Each has its tiles, some 100 MB in all.
MOST_THREADS = 8

# The number of threads of a product is that of the whole process: two that set and reset it at a time leave it wrong.
_LIMITING = Lock()


def in_parallel(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Return what `work` returns for each part, in order, in as many threads as matrix products would have."""
    if len(parts) < 2:
        return [work(part) for part in parts]
    from threadpoolctl import threadpool_info, threadpool_limits

    with _LIMITING:
        pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        threads = min(max(pools, default=1), MOST_THREADS, len(parts))
        if threads == 1:
            return [work(part) for part in parts]
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, parts))
