"""Recipes are run as their command lines do; a small random model stands in for pre-trained weights."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitembed import Embedder, Preprocess

RECIPES = Path(__file__).parents[2] / "recipes"

Ran = tuple[int, str, str]


@pytest.fixture
def run_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a recipe as its command line does, and return its exit status and what it printed on either stream."""

    def run(name: str, *arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(RECIPES / name), run_name="__main__")
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model of small colour images."""
    folder = tmp_path_factory.mktemp("model") / "random"
    Embedder.create("N/8", preprocess=Preprocess((32, 32)), stem="conv", seed=1).save_pretrained(folder)
    return folder
