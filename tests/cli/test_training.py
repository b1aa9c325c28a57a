"""`vitembed train`: classification, cheaper computation, and what it goes on from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TRAIN, Outcome, Runner, draw


def config_of(model: Path) -> Any:
    return json.loads((model / "config.json").read_text())


def error(outcome: Outcome) -> str:
    """Check the contract of an error and return its line."""
    assert (outcome.status, outcome.out) == (2, "")
    lines = [line for line in re.split(r"[\r\n]+", outcome.err) if line.startswith("vitembed: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_cross_entropy_reports_the_accuracy_and_leaves_a_model_as_any_other(
    cli: Runner, world: Path, tmp_path: Path
) -> None:
    options = ["--loss", "cross-entropy", "--head", "mlp", "--label-smoothing", "0.1"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options, "--json")
    assert outcome.status == 0, outcome.err
    assert 0 <= outcome.json["validation accuracy"] <= 1
    assert outcome.json["validation accuracy"] == max(r["validation accuracy"] for r in outcome.json["history"])
    config = config_of(tmp_path / "m")
    assert (config["vit"]["num_classes"], config["vit"]["head_width"]) == (8, 128)
    assert config["provenance"]["classes"] == [f"class{number}" for number in range(8)]
    assert config["provenance"]["loss"] == "CrossEntropyLoss(label_smoothing=0.1)"
    assert cli("evaluate", tmp_path / "m", world / "data", "--json").json["classes"] == 8
    text = cli("train", world / "data", "--out", tmp_path / "n", *TRAIN, "--loss", "cross-entropy")
    assert re.search(r"^validation accuracy +\d", text.out, flags=re.MULTILINE)


def test_other_losses_report_no_accuracy(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--epochs", 1, "--json")
    assert "validation accuracy" not in outcome.json
    assert config_of(tmp_path / "m")["provenance"]["settings"]["validation"] == "classes"


def test_cheaper_computation_is_recorded(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--patch-dropout", "0.5", "--gradient-checkpointing", "--epochs", "1"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options)
    assert outcome.status == 0, outcome.err
    settings = config_of(tmp_path / "m")["provenance"]["settings"]
    assert (settings["patch_dropout"], settings["gradient_checkpointing"], settings["compile"]) == (0.5, True, False)


def test_muon_and_categories_are_recorded(cli: Runner, world: Path, tmp_path: Path) -> None:
    for path in (world / "data").glob("*/*"):
        number = int(path.parent.name.removeprefix("class"))
        home = tmp_path / "data" / ("odd" if number % 2 else "even") / path.parent.name
        home.mkdir(parents=True, exist_ok=True)
        (home / path.name).write_bytes(path.read_bytes())
    options = ["--optimizer", "muon", "--categories-per-batch", "1", "--epochs", "1"]
    outcome = cli("train", tmp_path / "data", "--out", tmp_path / "m", *TRAIN, *options)
    assert outcome.status == 0, outcome.err
    settings = config_of(tmp_path / "m")["provenance"]["settings"]
    assert (settings["optimizer"], settings["categories_per_batch"]) == ("muon", 1)
    refused = error(cli("train", world / "data", "--out", tmp_path / "n", *TRAIN, *options))
    assert "classes named CATEGORY/CLASS" in refused
    classified = cli("train", tmp_path / "data", "--out", tmp_path / "n", *TRAIN, *options, "--loss", "cross-entropy")
    assert "categories_per_batch is for a loss of embeddings" in error(classified)


def test_a_student_learns_from_teachers(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--loss", "distillation(temperature=0.1)", "--teacher", world / "model", "--epochs", "1"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options, "--teacher", world / "model")
    assert outcome.status == 0, outcome.err
    recorded = config_of(tmp_path / "m")["provenance"]["loss"]
    assert recorded.startswith("DistillationLoss(teachers=[sha256:")
    assert recorded.endswith("], temperature=0.1)")
    refused = error(cli("train", world / "data", "--out", tmp_path / "n", *TRAIN, "--teacher", world / "model"))
    assert "teachers are for the loss distillation, not 'triplet'" in refused
    alone = error(cli("train", world / "data", "--out", tmp_path / "n", *TRAIN, "--loss", "distillation"))
    assert "distillation needs teachers: name them with --teacher" in alone


def test_a_model_is_taken_on_to_images_of_another_size(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--init", world / "model", "--image-size", "16", "--lr", "1e-4", "--epochs", "1", "--workers", "0"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *options)
    assert outcome.status == 0, outcome.err
    before, after = config_of(world / "model"), config_of(tmp_path / "m")
    assert after["vit"] == {**before["vit"], "image_size": [16, 16]}
    assert after["preprocess"]["size"] == [16, 16]


def test_a_model_is_taken_on_by_the_name_of_a_library(
    cli: Runner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitembed.embedder import Embedder

    asked = []
    load = Embedder.from_pretrained

    def from_pretrained(name: object, **options: Any) -> Embedder:
        asked.append(name)
        return load(world / "model", **options)

    monkeypatch.setattr(Embedder, "from_pretrained", from_pretrained)
    options = ["--init", "torchvision:vit_b_16", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    assert cli("train", world / "data", "--out", tmp_path / "m", *options).status == 0
    assert asked == ["torchvision:vit_b_16"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "cross-entropy", "--validation", "classes"], "hold out 'images' or 'none'"),
        (["--loss", "cross-entropy", "--miner", "MultiSimilarityMiner"], "leave the miner out"),
        (["--loss", "cross-entropy", "--margin", "0.1"], "margin"),
        (["--loss", "cross-entropy", "--label-smoothing", "1"], "[0, 1)"),
        (["--loss", "cross-entropy", "--pooling", "mean"], "the mean of the patches"),
        (["--loss", "cross-entropy", "--dim", "8"], "a projection of it"),
        (["--loss", "cross-entropi"], "did you mean 'cross-entropy'"),
        (["--label-smoothing", "0.1"], "label_smoothing"),
        (["--head", "linear"], "for a classification loss"),
        (["--head", "mpl"], "'linear', 'mlp'"),
        (["--patch-dropout", "1"], "patch_dropout"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in error(cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options))
    assert not (tmp_path / "m").exists()


def test_the_network_of_init_is_not_changed_by_other_options(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--init", world / "model", "--image-size", "16", "--arch", "S/4", "--pooling", "mean"]
    line = error(cli("train", world / "data", "--out", tmp_path / "m", *options))
    assert "leave --arch, --pooling out" in line


def test_classification_needs_images_of_a_class_in_both_parts(cli: Runner, tmp_path: Path) -> None:
    folder = draw(tmp_path / "data", classes=4, per_class=4)
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{'val' if path.parent.name > 'class1' else 'train'}"
        for path in sorted(folder.rglob("*.png"))
    ]
    table = folder / "table.csv"
    table.write_text("path,label,split\n" + "\n".join(rows) + "\n")
    line = error(cli("train", table, "--out", tmp_path / "m", *TRAIN, "--loss", "cross-entropy"))
    assert "'class2' is held out" in line


def timm_options(arch: str = "timm:test_resnet") -> list[str]:
    return [arch if option == "N/4" else "32" if option == "8" else option for option in TRAIN]


def test_a_network_of_timm_is_trained_by_its_name(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *timm_options(), "--epochs", 1, "--json")
    assert outcome.status == 0, outcome.err
    assert config_of(tmp_path / "m")["backbone"]["timm"] == "test_resnet"


@pytest.mark.parametrize("stem", ["conv", "linear"])
def test_a_network_of_timm_has_its_own_stem(cli: Runner, world: Path, tmp_path: Path, stem: str) -> None:
    line = error(cli("train", world / "data", "--out", tmp_path / "m", *timm_options(), "--stem", stem))
    assert "timm:test_resnet has its own, so leave --stem out" in line


@pytest.mark.parametrize("stem", ["conv", "linear"])
def test_a_size_of_ours_has_the_stem_that_is_asked_for_and_conv_by_default(
    cli: Runner, world: Path, tmp_path: Path, stem: str
) -> None:
    assert config_of(world / "model")["vit"]["stem"]
    options = [*TRAIN, "--stem", stem, "--epochs", 1]
    assert cli("train", world / "data", "--out", tmp_path / "m", *options).status == 0
    assert bool(config_of(tmp_path / "m")["vit"]["stem"]) == (stem == "conv")


def test_the_projection_of_a_model_is_left_out_for_classification_with_a_warning(
    cli: Runner, world: Path, tmp_path: Path
) -> None:
    assert cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--epochs", 1, "--dim", 8).status == 0
    options = ["--init", tmp_path / "m", "--epochs", 1, "--workers", 0, "--device", "cpu", "--json"]
    kept = cli("train", world / "data", "--out", tmp_path / "kept", *options, "--classes-per-batch", 4)
    assert "warning" not in kept.err
    assert config_of(tmp_path / "kept")["dim"] == 8
    outcome = cli("train", world / "data", "--out", tmp_path / "c", *options, "--loss", "cross-entropy")
    assert outcome.status == 0, outcome.err
    assert f"vitembed: warning: the projection of {tmp_path / 'm'} is left out" in outcome.err
    assert config_of(tmp_path / "c")["dim"] is None
