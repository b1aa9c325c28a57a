"""Memory stays with the process as long as a training runs, and no longer."""

import ctypes
import os
import platform
from pathlib import Path

import pytest
import torch

from vitembed.training import allocation
from vitembed.training.allocation import kept_memory

SIZE = 200_000_000  # bytes
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept_after_use() -> int:
    """Return the bytes that stay with the process when a block of `SIZE` was used and freed."""
    before = resident()
    block = torch.ones(SIZE, dtype=torch.uint8)
    del block
    return resident() - before


@GLIBC
def test_what_is_freed_stays_until_the_end_and_no_longer() -> None:
    before = resident()
    assert kept_after_use() < SIZE / 4
    with kept_memory(torch.device("cpu")):
        assert kept_after_use() > SIZE / 2
        assert kept_after_use() < SIZE / 4  # the same pages again
    assert resident() - before < SIZE / 4
    assert kept_after_use() < SIZE / 4


@GLIBC
def test_an_error_inside_puts_it_back_too() -> None:
    with pytest.raises(RuntimeError), kept_memory(torch.device("cpu")):
        raise RuntimeError
    assert kept_after_use() < SIZE / 4


def test_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(_: str) -> None:
        raise AssertionError

    monkeypatch.setattr(allocation, "_function", unexpected)
    with kept_memory(torch.device("cuda")):
        pass


@pytest.mark.parametrize("raised", [OSError, TypeError, None])
def test_without_glibc_nothing_happens(raised: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: object) -> object:
        if raised:
            raise raised
        return object()  # a C library without mallopt

    monkeypatch.setattr(ctypes, "CDLL", library)
    with kept_memory(torch.device("cpu")):
        assert torch.ones(3).sum() == 3
