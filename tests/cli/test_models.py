"""Naming a model on the command line: anybody's, with what had to be assumed said, and found again by an index."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Runner, draw
from vitembed.vit import ViT, ViTConfig

CONFIG = ViTConfig((32, 32), 16, 3, width=64, depth=1, heads=1)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(ViT(CONFIG).state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_what_a_bare_file_does_not_say_is_said(cli: Runner, bare: Path, tmp_path: Path) -> None:
    image = next(draw(tmp_path / "data", 2, 2).rglob("*.png"))
    done = cli("explain", bare, image, "--out", tmp_path / "pictures", "--device", "cpu")
    assert done.status == 0
    assert "warning" in done.err
    assert "pre-processing" in done.err


def test_an_index_finds_a_bare_file_again(cli: Runner, bare: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", 2, 2)
    assert cli("index", "create", tmp_path / "index", "--model", bare).status == 0
    assert cli("index", "sync", tmp_path / "index", data, "--device", "cpu").status == 0
    bare.unlink()
    gone = cli("index", "sync", tmp_path / "index", data, "--device", "cpu")
    assert gone.status == 2
    assert "--model" in gone.err


@pytest.mark.parametrize("command", [["train", "{data}", "--out", "{out}", "--init", ""], ["evaluate", "", "{data}"]])
def test_an_empty_name_is_an_error_and_not_a_new_model(cli: Runner, command: list[str], tmp_path: Path) -> None:
    draw(tmp_path / "data", 2, 2)
    done = cli(*(part.format(data=tmp_path / "data", out=tmp_path / "out") for part in command))
    assert done.status == 2
    assert "empty" in done.err
    assert not (tmp_path / "out").exists()


def test_held_out_classes_whose_images_were_seen_are_told(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--arch", "N/4", "--image-size", "8", "--ink", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    assert cli("pretrain", world / "data", "--out", tmp_path / "start", *options).status == 0
    done = cli(
        *("train", world / "data", "--out", tmp_path / "model", "--init", tmp_path / "start", "--epochs", 1),
        *("--classes-per-batch", 4, "--images-per-class", 2, "--workers", 0, "--device", "cpu"),
    )
    assert done.status == 0
    done = cli("evaluate", tmp_path / "model", world / "data", "--held-out", "--device", "cpu")
    assert done.status == 0
    assert "seen, without labels" in done.err
