"""A small world for the command line: letters as images, a trained model, and a runner."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitembed.cli.app import run


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Runner = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Runner:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call


def draw(folder: Path, classes: int = 8, per_class: int = 8) -> Path:
    """Write noisy stripes, a direction a class, as `folder/class/image.png`."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:12, :12]
    for label in range(classes):
        angle = np.pi * label / classes
        for number in range(per_class):
            wave = np.sin(np.cos(angle) * x + np.sin(angle) * y + rng.uniform(0, 2 * np.pi))
            pixels = np.clip(127 + 100 * wave + rng.normal(0, 10, (12, 12)), 0, 255).astype(np.uint8)
            path = folder / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


TRAIN = [
    "--arch",
    "N/4",
    "--image-size",
    "8",
    "--ink",
    "--epochs",
    "2",
    "--classes-per-batch",
    "4",
    "--workers",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data` and a model in `model`, to be read only."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "data")
    assert run(["train", str(folder / "data"), "--out", str(folder / "model"), *TRAIN]) == 0
    return folder
