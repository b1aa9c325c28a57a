"""Memory of a training on a processor: what a step frees stays with the process for the next step.

glibc hands blocks of megabytes back to the kernel as soon as they are freed, and every step asks for the same blocks
again: the kernel then zeroes them page by page, which took a sixth of a training step with a convolutional stem
(`benchmarks/allocation.py`).
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Parameters of glibc's mallopt(3) and what they are by default.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Let freed blocks stay with the process while it computes on a processor, and give them back afterwards.

    Without effect on other devices, whose memory torch keeps by itself, and with a C library other than glibc. Settings
    of the allocator that the environment made (`GLIBC_TUNABLES`) are glibc's defaults afterwards.
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
        for parameter, value in _DEFAULTS.items():
            mallopt(parameter, value)
        if (trim := _function("malloc_trim")) is not None:
            trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library of this process, if it has one of the name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no such library, as on Windows
        return None
