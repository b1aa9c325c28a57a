"""Memory stays with the process as long as a training runs, and no longer."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.errors import TrainingError
from vitembed.preprocess import Preprocess
from vitembed.training import TrainConfig, allocation, find_learning_rate, train
from vitembed.training.allocation import kept_memory
from vitembed.training.jigsaw import JigsawConfig, pretrain_jigsaw
from vitembed.training.plan import plan_training

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
    with kept_memory(torch.device("cpu")):
        assert kept_after_use() > SIZE / 2
        for _ in range(5):
            kept_after_use()
        assert resident() - before < 2.5 * SIZE  # the same pages again, or once more beside them
    assert resident() - before < SIZE / 4


def test_every_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(allocation, "_function", lambda name: lambda *values: calls.append(values))
    with kept_memory(torch.device("cpu")):
        changed, inside = {parameter for parameter, _ in calls}, len(calls)
    assert changed == {-1, -4}
    assert calls[-1] == (0,)  # malloc_trim
    assert changed <= {parameter for parameter, _ in calls[inside:-1]}


@pytest.mark.parametrize("task", ["train", "puzzles", "plan", "rate"])
def test_what_trains_keeps_its_memory(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def seen(name: str) -> Callable[..., int]:
        return lambda *values: kept.append(values == (-4, 0)) or 1

    monkeypatch.setattr(allocation, "_function", seen)
    model = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), device="cpu")
    config = TrainConfig(epochs=1, classes_per_batch=4, validation="none", workers=0)
    if task == "train":
        train(model, stripes(), config=config)
    elif task == "puzzles":
        pretrain_jigsaw(model, stripes(), config=JigsawConfig(epochs=1, workers=0))
    elif task == "plan":
        plan_training(model, stripes(), config=config)
    else:
        with contextlib.suppress(TrainingError):  # so few steps may find none
            find_learning_rate(model, stripes(), config=config, steps=20)
    assert any(kept)


@GLIBC
def test_an_error_inside_puts_it_back_too() -> None:
    def fail() -> None:
        with kept_memory(torch.device("cpu")):
            kept_after_use()
            raise RuntimeError

    before = resident()
    with pytest.raises(RuntimeError):
        fail()
    assert resident() - before < SIZE / 4


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
