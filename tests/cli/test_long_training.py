"""`vitembed train`: resuming, planning, settings in a file, and what makes large or long trainings possible."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_training import config_of, error
from tests.conftest import TRAIN, Runner, draw
from vitembed.embedder import Embedder


def fingerprint(folder: Path) -> str:
    return Embedder.from_pretrained(folder, device="cpu").fingerprint


def test_everything_can_be_switched_on_at_once(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--memory", 64, "--memory-warmup", 1, "--hard-negatives", 1, "--gradient-cache", 4, "--ema", 0.9]
    more = ["--patience", 5, "--layer-decay", 0.8, "--loss", "triplet(soft=True)", "--tracker", "tensorboard"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options, *more, "--json")
    assert outcome.status == 0, outcome.err
    assert "drift" in outcome.json["history"][0]
    settings = config_of(tmp_path / "m")["provenance"]["settings"]
    assert (settings["gradient_cache"], settings["ema"], settings["fine_tune"]["layer_decay"]) == (4, 0.9, 0.8)
    assert settings["hard_negatives"]["every"] == 1
    assert config_of(tmp_path / "m")["provenance"]["loss"].startswith("CrossBatchMemory(TripletLoss(")
    assert list((tmp_path / "m" / "tensorboard").rglob("events*"))


def test_a_run_can_be_run_again_from_its_settings(cli: Runner, world: Path, tmp_path: Path) -> None:
    first = cli("train", world / "data", "--out", tmp_path / "a", *TRAIN, "--lr", "3e-4", "--mining", "hard", "--json")
    settings = tmp_path / "a" / "settings.toml"
    again = cli("train", "--config", settings, "--out", tmp_path / "b", "--json")
    assert again.status == 0, again.err
    assert again.json["fingerprint"] == first.json["fingerprint"]
    assert "lr" in settings.read_text() or "learning-rate" in settings.read_text()


def test_a_mistake_in_the_settings_is_one_line(cli: Runner, world: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text, words in {"epoch = 3": "did you mean 'epochs'", "epochs = 'three'": "epochs", "epochs =": "TOML"}.items():
        file.write_text(text)
        line = error(cli("train", world / "data", "--out", tmp_path / "m", "--config", file))
        assert words in line
        assert "run.toml" in line


def test_a_dry_run_tells_what_would_be_trained_and_writes_nothing(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--dry-run")
    assert outcome.status == 0, outcome.err
    for words in ("classes", "parameters", "memory, estimated", "time, estimated"):
        assert words in outcome.out
    assert not (tmp_path / "m").exists()
    figures = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--dry-run", "--json").json
    assert figures["parameters"] == sum(
        tensor.numel() for tensor in Embedder.from_pretrained(world / "model", device="cpu").network.parameters()
    )


def test_a_learning_rate_is_found_and_nothing_is_trained(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--find-lr", "--json")
    assert outcome.status == 0, outcome.err
    assert 1e-6 < outcome.json["learning_rate"] < 1
    assert len(outcome.json["rates"]) == len(outcome.json["losses"])
    assert not (tmp_path / "m").exists()


def test_a_projection_is_put_on_a_frozen_model(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--init", world / "model", "--dim", 12, "--frozen-epochs", 1, "--epochs", 1, "--lr", "1e-2"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *options, "--workers", 0)
    assert outcome.status == 0, outcome.err
    before = Embedder.from_pretrained(world / "model", device="cpu").network.vit.state_dict()
    after = Embedder.from_pretrained(tmp_path / "m", device="cpu")
    assert after.dim == 12
    changed = [name for name, tensor in after.network.vit.state_dict().items() if not tensor.equal(before[name])]
    assert all("running" in name or "tracked" in name for name in changed)  # batch norm's statistics move on


def test_an_unreadable_image_is_set_aside_with_a_warning(cli: Runner, tmp_path: Path) -> None:
    data = draw(tmp_path / "data")
    (data / "class3" / "2.png").write_bytes(b"no picture")
    outcome = cli("train", data, "--out", tmp_path / "m", *TRAIN, "--max-unreadable", 0.05)
    assert outcome.status == 0, outcome.err
    assert re.search(r"warning: 1 images? could not be read.*2\.png", outcome.err)
    assert "2.png" in (tmp_path / "m" / "unreadable.csv").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory-warmup", "5"], "add --memory"),
        (["--tracker", "tensorbord"], "did you mean 'tensorboard'"),
        (["--resume", "--overwrite"], "choose one"),
        (["--mining", "batch_hard"], "did you mean 'batch-hard'"),
        (["--loss-lr", "1"], "has no parameters"),
        (["--frozen-epochs", "1"], "nothing to train"),
        (["--ema", "1.5"], "ema must be in (0, 1)"),
        (["--memory", "64", "--loss", "ProxyAnchorLoss"], "cross-batch memory"),
        (["--on-collapse", "panic"], "--on-collapse"),
        (["--soft", "--margin", "0.2"], "margin"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in error(cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options))
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_other_inputs_that_do_not_exist_are_one_line(cli: Runner, tmp_path: Path) -> None:
    for data in ("missing-{000..003}.tar", "missing.tar"):
        assert "missing" in error(cli("train", data, "--out", tmp_path / "m", *TRAIN))


def test_shards_are_trained_on_like_a_folder(cli: Runner, world: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "data-000.tar", "w") as archive:
        for number, path in enumerate(sorted((world / "data").rglob("*.png"))):
            for suffix, content in {"png": path.read_bytes(), "cls": path.parent.name.encode()}.items():
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    shards = cli("train", tmp_path / "data-{000..000}.tar", "--out", tmp_path / "a", *TRAIN, "--json")
    assert shards.status == 0, shards.err
    folder = cli("train", world / "data", "--out", tmp_path / "b", *TRAIN, "--json")
    assert shards.json["fingerprint"] == folder.json["fingerprint"]


def test_a_terminated_training_leaves_with_143_and_is_resumed_to_the_same_model(tmp_path: Path) -> None:
    data = draw(tmp_path / "data")
    command = [sys.executable, "-m", "vitembed", "train", str(data), *TRAIN, "--epochs", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(out: Path, *options: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*command, "--out", str(out), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    process = begin(tmp_path / "pieces")
    while not (tmp_path / "pieces" / "history.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143
    assert "Traceback" not in errors
    interrupted = begin(tmp_path / "pieces")
    assert "resume it" in interrupted.communicate()[1] or interrupted.returncode == 2
    rest, whole = begin(tmp_path / "pieces", "--resume"), begin(tmp_path / "whole")
    assert (rest.communicate() and rest.returncode, whole.communicate() and whole.returncode) == (0, 0)
    assert fingerprint(tmp_path / "pieces") == fingerprint(tmp_path / "whole")
    assert len(json.loads((tmp_path / "pieces" / "history.json").read_text())) == 6
