"""Memory of a training on a processor: what a step frees stays with the process for the next step.

glibc hands blocks of megabytes back to the kernel as soon as they are freed, and every step asks for the same blocks
again: the kernel then zeroes them page by page, which took a tenth to a sixth of a training step with a convolutional
stem (`benchmarks/allocation.py`).
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Parameters of glibc's mallopt(3). Once one is set, its rule of following the sizes of freed blocks is off for good, so
# that what comes afterwards is where that rule ends up in a process with large blocks, not the start values.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # never given back; never outside of the heap
_AFTERWARDS = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Let freed blocks stay with the process while it computes on a processor, and give them back afterwards.

    Without effect on other devices, whose memory torch keeps by itself, and with a C library other than glibc. The
    settings are the process's: one training's end gives back what another keeps beside it, and thresholds that the
    environment set (`GLIBC_TUNABLES`) are 64 MiB for trimming and 32 MiB for blocks of their own afterwards.
    """
    mallopt = _function("mallopt") if device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    for parameter, value in _KEPT.items():
        mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            mallopt(parameter, value)
        if (trim := _function("malloc_trim")) is not None:
            trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library of this process, if it has one of the name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no such library, as on Windows
        return None
