"""`vitembed pretrain`: unlabelled images in, a checkpoint out that `train --init` takes as it is."""

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import one_line
from tests.conftest import Runner
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.training import jigsaw
from vitembed.training.jigsaw import JigsawResult

PRETRAIN = [
    "--arch",
    "N/4",
    "--image-size",
    "8",
    "--ink",
    "--epochs",
    "2",
    "--batch-size",
    "32",
    "--workers",
    "0",
    "--device",
    "cpu",
]


def test_pretrain_then_train_goes_on_from_the_folder(cli: Runner, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "jigsaw"
    outcome = cli("pretrain", world / "data", "--task", "jigsaw", "--out", out, *PRETRAIN)
    assert outcome.status == 0, outcome.err
    assert "jigsaw accuracy" in outcome.out
    assert "chance" in outcome.out
    assert f"vitembed train LABELLED --init {out}" in outcome.out
    pretrained = Embedder.from_pretrained(out)
    assert pretrained.provenance["task"] == "jigsaw"
    assert pretrained.provenance["settings"]["augment"]["rotate"] > 0  # --ink brings its augmentation

    options = ["--init", out, "--epochs", 1, "--classes-per-batch", 4, "--workers", 0, "--device", "cpu"]
    trained = cli("train", world / "data", "--out", tmp_path / "m", *options, "--json")
    assert trained.status == 0, trained.err
    model = Embedder.from_pretrained(tmp_path / "m")
    assert model.provenance["initialised from"] == pretrained.fingerprint
    assert model.network.vit.config == pretrained.network.vit.config
    assert len(model.provenance["held-out classes"]) == 2  # none of them counts as trained


def test_pretrain_speaks_json_and_progress_goes_to_standard_error(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN, "--tile", 1, "--mask", 0.25, "--json")
    assert outcome.status == 0, outcome.err
    assert "epoch 2/2" in outcome.err
    found = outcome.json
    assert len(found["history"]) == 2
    assert found["history"] == json.loads((tmp_path / "m" / "history.json").read_text())
    assert found["jigsaw accuracy"] == found["history"][-1]["validation accuracy"]
    assert 0 < found["chance"] <= 1
    assert found["fingerprint"] == Embedder.from_pretrained(tmp_path / "m").fingerprint


@pytest.mark.parametrize("command", ["pretrain", "train"])
def test_black_ink_is_part_of_the_model(cli: Runner, world: Path, tmp_path: Path, command: str) -> None:
    options = ["--out", tmp_path / "m", "--arch", "N/8", "--image-size", 16, "--epochs", 1, "--device", "cpu"]
    assert "add --scan" in one_line(cli(command, world / "data", *options, "--ink", "--binarize"))
    assert cli(command, world / "data", *options, "--scan", "--binarize").status == 0
    assert Embedder.from_pretrained(tmp_path / "m").preprocess == Preprocess.grey((16, 16), scan=True, binarize=True)


def test_what_has_learned_nothing_is_warned_of(
    cli: Runner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for accuracy, warned in ((0.25, True), (0.5, False)):
        result = JigsawResult(history=[], accuracy=accuracy, chance=0.25)
        monkeypatch.setattr(jigsaw, "pretrain_jigsaw", lambda *_, result=result, **__: result)
        outcome = cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN)
        assert outcome.status == 0
        assert ("warning: it places tiles no better than a constant answer" in outcome.err) == warned


def test_a_folder_without_classes_will_do(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("pretrain", world / "data" / "class0", "--out", tmp_path / "m", *PRETRAIN, "--pooling", "mean")
    assert outcome.status == 0, outcome.err
    assert Embedder.from_pretrained(tmp_path / "m").provenance["pre-trained on"] == ["."]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "jigsw"], "unknown task 'jigsw'; did you mean 'jigsaw'"),
        (["--tile", "2"], "2 x 2 patches"),
        (["--tile", "0"], "--tile"),
        (["--mask", "1"], "mask must be in [0, 1)"),
        (["--min-contrast", "-1"], "min_contrast"),
        (["--arch", "T/4"], "did you mean 'Ti'"),
        (["--image-size", "10"], "multiple"),
        (["--arch", "timm:test_resnet", "--image-size", "32"], "has no patches to put together"),
        (["--arch", "timm:test_resnet", "--stem", "conv"], "leave --stem out"),
        (["--augment", "inks"], "did you mean 'ink'"),
        (["--lr", "nan"], "learning_rate"),
        (["--device", "gpu"], "cannot be used here"),
        (["--epoch", "3"], "--epochs"),
    ],
)
def test_mistyped_options_are_one_line(
    cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in one_line(cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN, *options))
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_data_that_cannot_be_used_is_one_line(cli: Runner, world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no image" in one_line(cli("pretrain", tmp_path / "empty", "--out", tmp_path / "m", *PRETRAIN))
    assert "does not exist" in one_line(cli("pretrain", tmp_path / "none", "--out", tmp_path / "m", *PRETRAIN))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    (broken / "b.png").write_bytes(b"no image")
    assert str(broken) in one_line(cli("pretrain", broken, "--out", tmp_path / "m", *PRETRAIN))


def test_an_earlier_model_is_overwritten_on_purpose_alone(cli: Runner, world: Path, tmp_path: Path) -> None:
    assert cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN).status == 0
    assert "already holds a model" in one_line(cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN))
    assert cli("pretrain", world / "data", "--out", tmp_path / "m", *PRETRAIN, "--overwrite").status == 0
