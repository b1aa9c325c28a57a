"""Every command does its work, speaks JSON, and fails with one line and exit status 2."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TRAIN, Outcome, Runner, draw


def one_line(outcome: Outcome) -> str:
    """Check the contract of an error and return its line."""
    assert outcome.status == 2
    assert outcome.out == ""
    lines = [line for line in re.split(r"[\r\n]+", outcome.err) if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vitembed: error: ")
    assert "Traceback" not in outcome.err
    assert outcome.err.rstrip().endswith(lines[0])
    return lines[0]


def test_train_reports_the_best_epoch_and_saves_everything(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--json")
    assert outcome.status == 0
    assert len(outcome.json["history"]) == 2
    assert outcome.json["best epoch"] in (1, 2)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "README.md",
        "config.json",
        "curve.png",
        "history.json",
        "model.safetensors",
        "checkpoints",
        "settings.toml",
    }
    text = cli("train", world / "data", "--out", tmp_path / "n", *TRAIN)
    assert "validation recall@1" in text.out
    assert f"vitembed evaluate {tmp_path / 'n'}" in text.out


def test_train_goes_on_from_a_model_and_takes_losses_by_name(cli: Runner, world: Path, tmp_path: Path) -> None:
    options = ["--init", world / "model", "--loss", "MultiSimilarityLoss(alpha=2)", "--miner", "MultiSimilarityMiner"]
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *options, "--epochs", 1, "--workers", 0)
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "Augment" not in outcome.err
    assert config["provenance"]["settings"]["augment"]["flip"] == 0  # grey images are taken for ink
    assert config["vit"] == json.loads((world / "model" / "config.json").read_text())["vit"]
    assert "MultiSimilarityLoss" in config["provenance"]["loss"]


def test_train_without_validation_says_so_and_so_does_evaluate(cli: Runner, world: Path, tmp_path: Path) -> None:
    outcome = cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, "--validation", "none", "--epochs", 1)
    assert outcome.status == 0
    assert "warning: nothing was held out" in outcome.err
    assert "--held-out" not in outcome.out
    assert "8 of the 8 classes" in cli("evaluate", tmp_path / "m", world / "data").err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mining", "semi_hard"], "did you mean 'semihard'"),
        (["--loss", "tripet"], "did you mean 'triplet'"),
        (["--arch", "T/16"], "did you mean 'Ti'"),
        (["--stem", "convs"], "'linear', 'conv'"),
        (["--epochs", "many"], "epochs"),
        (["--epoch", "3"], "--epochs"),
        (["--augment", "inks"], "did you mean 'ink'"),
        (["--image-size", "10"], "multiples of the patch size"),
        (["--init", "missing"], "leave --arch, --ink out"),
        (["--seed", "-1"], "--seed"),
        (["--dim", "100000000000"], "out of memory"),
        (["--device", "gpu"], "cannot be used here"),
        (["--margin", "0"], "margin"),
    ],
)
def test_mistyped_options_of_train_are_one_line(
    cli: Runner, world: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    line = one_line(cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options))
    assert words in line
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_data_that_cannot_be_trained_on_is_one_line(cli: Runner, world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "missing": "does not exist",
        tmp_path / "empty": "holds no image",
        world / "data" / "class0": "lies in no class",
        draw(tmp_path / "one", classes=1): "at least 4 classes; got 1",
    }
    for data, words in cases.items():
        assert words in one_line(cli("train", data, "--out", tmp_path / "m", *TRAIN))
    broken = draw(tmp_path / "broken")
    (broken / "class3" / "2.png").write_bytes(b"")
    assert "2.png: is empty" in one_line(cli("train", broken, "--out", tmp_path / "m", *TRAIN))
    assert "already holds a model" in one_line(cli("train", world / "data", "--out", world / "model", *TRAIN))


def test_evaluate_prints_the_figures_and_warns_of_training_data(cli: Runner, world: Path) -> None:
    outcome = cli("evaluate", world / "model", world / "data", "--json")
    assert outcome.status == 0
    assert {"recall@1", "recall@5", "map@r", "eer", "auc"} <= set(outcome.json)
    assert outcome.json["classes"] == 8
    assert "warning: 6 of the 8 classes are named as those it was trained on; --held-out" in outcome.err
    honest = cli("evaluate", world / "model", world / "data", "--held-out", "--json")
    assert honest.json["classes"] == 2
    assert "warning" not in honest.err
    assert "recall@1" in cli("evaluate", world / "model", world / "data", "--held-out").out


def test_held_out_needs_the_training_data(cli: Runner, world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world / "data", other / "deeper")
    assert "has none of the classes" in one_line(cli("evaluate", world / "model", other, "--held-out"))
    options = ["--validation", "none", "--epochs", "1"]
    assert cli("train", world / "data", "--out", tmp_path / "m", *TRAIN, *options).status == 0
    assert "records no held-out" in one_line(cli("evaluate", tmp_path / "m", world / "data", "--held-out"))


def test_embed_writes_paths_and_unit_rows(cli: Runner, world: Path, tmp_path: Path) -> None:
    image = world / "data" / "class1" / "1.png"
    outcome = cli("embed", world / "model", world / "data" / "class0", image, "--out", tmp_path / "v.npz", "--json")
    assert outcome.json["images"] == 9
    with np.load(tmp_path / "v.npz") as file:
        assert file["paths"][-1] == str(image)
        np.testing.assert_allclose(np.linalg.norm(file["vectors"], axis=1), 1, atol=1e-6)
        assert file["vectors"].shape == (9, outcome.json["dim"])
    assert "images" in cli("embed", world / "model", image, "--out", tmp_path / "v.npz").out


def test_a_failed_embed_leaves_no_file(cli: Runner, world: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    line = one_line(cli("embed", world / "model", tmp_path / "text.png", "--out", tmp_path / "v.npz"))
    assert "text.png: is not an image" in line
    assert [p.name for p in tmp_path.iterdir()] == ["text.png"]
    assert "no folder" in one_line(cli("embed", world / "model", world / "data", "--out", tmp_path / "x" / "v.npz"))


def test_an_index_is_made_synced_searched_changed_and_checked(cli: Runner, world: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(world / "data", photos)
    (photos / "broken.png").write_bytes(b"\x89PNG")
    place = tmp_path / "photos.index"
    assert cli("index", "create", place, "--model", world / "model", "--json").json["size"] == 0
    assert "the index is empty" in cli("search", place, photos / "class0" / "0.png").out

    report = cli("index", "sync", place, photos, "--json")
    assert report.status == 0
    assert report.json["added"] == report.json["size"] == 64
    assert "set aside" in report.err
    assert "broken.png" in report.err
    assert "unchanged" in cli("index", "sync", place, photos).out

    [found] = cli("search", place, photos / "class3" / "2.png", "-k", 3, "--json").json
    assert found["query"] == str(photos / "class3" / "2.png")
    assert [sorted(hit) for hit in found["hits"]] == [["id", "metadata", "score"]] * 3
    assert found["hits"][0]["id"] == "class3/2.png"
    assert found["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert found["hits"][0]["metadata"]["path"] == str(photos / "class3" / "2.png")
    assert "class3/2.png" in cli("search", place, photos / "class3" / "2.png", "-k", 100).out

    assert cli("index", "remove", place, "class3/2.png", "--json").json["size"] == 63
    [found] = cli("search", place, photos / "class3" / "2.png", "-k", 100, "--json").json
    assert len(found["hits"]) == 63
    assert "class3/2.png" not in [hit["id"] for hit in found["hits"]]

    extra = tmp_path / "extra.png"
    shutil.copy(photos / "class3" / "2.png", extra)
    assert cli("index", "add", place, extra, "--json").json["size"] == 64
    assert str(extra) in cli("search", place, extra, "-k", 1).out
    assert cli("index", "info", place, "--json").json["dim"] == 128
    assert "size" in cli("index", "info", place).out
    assert cli("index", "check", place, "--json").json["problems"] == []
    assert "no problems" in cli("index", "check", place).out


def test_a_damaged_index_is_reported_with_exit_status_one(cli: Runner, world: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    cli("index", "create", place, "--model", world / "model")
    cli("index", "sync", place, world / "data")
    [vectors] = place.glob("vectors-*.f32")
    vectors.write_bytes(bytes([vectors.read_bytes()[0] ^ 1]) + vectors.read_bytes()[1:])
    outcome = cli("index", "check", place)
    assert outcome.status == 1
    assert vectors.name in outcome.out
    one_line(cli("search", place, world / "data" / "class0" / "0.png"))


def test_index_errors_are_one_line(cli: Runner, world: Path, tmp_path: Path) -> None:
    place = tmp_path / "i"
    image = world / "data" / "class0" / "0.png"
    assert "not an index" in one_line(cli("search", place, image))
    cli("index", "create", place, "--model", world / "model")
    assert "is an index already" in one_line(cli("index", "create", place, "--model", world / "model"))
    assert "not in the index" in one_line(cli("index", "remove", place, "nothing"))
    assert "does not exist" in one_line(cli("search", place, tmp_path / "missing.png"))
    assert "does not exist" in one_line(cli("index", "sync", place, tmp_path / "missing"))
    assert "-k" in one_line(cli("search", place, image, "-k", 0))
    cli("train", world / "data", "--out", tmp_path / "other", *TRAIN, "--seed", 1, "--epochs", 1)
    line = one_line(cli("search", place, image, "--model", tmp_path / "other"))
    assert "holds embeddings of the model" in line


def test_adding_under_a_synced_index_replaces_nothing_of_it(
    cli: Runner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "i"
    cli("index", "create", place, "--model", world / "model")
    cli("index", "sync", place, world / "data")
    other = tmp_path / "elsewhere" / "class0"
    other.mkdir(parents=True)
    shutil.copy(world / "data" / "class5" / "0.png", other / "0.png")
    monkeypatch.chdir(other.parent)
    assert cli("index", "add", place, Path("class0") / "0.png", "--json").json["size"] == 65
    assert cli("index", "sync", place, world / "data", "--json").json["unchanged"] == 64
    [found] = cli("search", place, world / "data" / "class0" / "0.png", "-k", 1, "--json").json
    assert found["hits"][0]["id"] == "class0/0.png"


def test_a_model_that_has_moved_is_asked_for_by_its_option(cli: Runner, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    image = world / "data" / "class0" / "0.png"
    cli("index", "create", tmp_path / "i", "--model", tmp_path / "model")
    calibrated = cli("calibrate", tmp_path / "model", world / "data", "--out", tmp_path / "v", "--far", 0.05)
    assert calibrated.status == 0
    assert "only 8 identities" in calibrated.err
    (tmp_path / "model").rename(tmp_path / "moved")
    for command in (["search", tmp_path / "i", image], ["verify", image, image, "--verifier", tmp_path / "v"]):
        assert "name it with --model" in one_line(cli(*command))
        assert cli(*command, "--model", tmp_path / "moved").status == 0


def test_an_index_without_a_model_asks_for_it(cli: Runner, world: Path, tmp_path: Path) -> None:
    from vitembed.index import Index

    Index.create(tmp_path / "i", 128).close()
    image = world / "data" / "class0" / "0.png"
    assert "name it with --model" in one_line(cli("search", tmp_path / "i", image))
    assert cli("search", tmp_path / "i", image, "--model", world / "model").status == 0


def test_a_verifier_is_calibrated_and_decides_with_its_exit_status(cli: Runner, world: Path, tmp_path: Path) -> None:
    verifier = tmp_path / "v.json"
    outcome = cli("calibrate", world / "model", world / "data", "--out", verifier, "--far", 0.05, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["far"] <= 0.05
    assert outcome.json["non_matches"] >= 60
    image = world / "data" / "class0" / "0.png"
    same = cli("verify", image, image, "--verifier", verifier, "--json")
    assert same.status == 0
    assert same.json["match"] is True
    others = [world / "data" / f"class{n}" / "0.png" for n in range(1, 8)]
    decisions = [cli("verify", image, other, "--verifier", verifier, "--json") for other in others]
    assert {d.status for d in decisions} <= {0, 1}
    assert any(d.status == 1 for d in decisions)
    assert all(d.json["match"] == (d.status == 0) for d in decisions)
    text = cli("verify", image, image, "--verifier", verifier)
    assert text.out.startswith("match: score 1.0")
    assert "pairs of different identities" in text.out
    assert "wanted" in cli("calibrate", world / "model", world / "data", "--out", verifier, "--far", 0.05).out


def test_a_verifier_from_a_table_of_pairs(cli: Runner, world: Path, tmp_path: Path) -> None:
    rows = ["left,right,match"]
    for a in range(8):
        rows += [f"{world}/data/class{a}/0.png,{world}/data/class{a}/{i}.png,1" for i in range(1, 4)]
        rows += [f"{world}/data/class{a}/{i}.png,{world}/data/class{b}/0.png,0" for b in range(a) for i in range(3)]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(rows))
    outcome = cli("calibrate", world / "model", table, "--out", tmp_path / "v.json", "--far", 0.1, "--json")
    assert outcome.status == 0, outcome.err
    assert (outcome.json["matches"], outcome.json["non_matches"]) == (24, 84)
    refused = cli("calibrate", world / "model", table, "--out", tmp_path / "v.json", "--held-out")
    assert "--held-out goes with a folder" in one_line(refused)


def test_verifier_errors_are_one_line(cli: Runner, world: Path, tmp_path: Path) -> None:
    verifier = tmp_path / "v.json"
    image = world / "data" / "class0" / "0.png"
    line = one_line(cli("calibrate", world / "model", world / "data", "--out", verifier, "--far", 0.0001))
    assert "30,000" in line
    assert not verifier.exists()
    assert "no verifier at" in one_line(cli("verify", image, image, "--verifier", verifier))
    cli("calibrate", world / "model", world / "data", "--out", verifier, "--far", 0.05)
    assert "does not exist" in one_line(cli("verify", image, "missing.png", "--verifier", verifier))
    cli("train", world / "data", "--out", tmp_path / "other", *TRAIN, "--seed", 1, "--epochs", 1)
    line = one_line(cli("verify", image, image, "--verifier", verifier, "--model", tmp_path / "other"))
    assert "belongs to the model" in line
    document = json.loads(verifier.read_text())
    document["location"] = None
    verifier.write_text(json.dumps(document))
    assert "--model" in one_line(cli("verify", image, image, "--verifier", verifier))


def test_doctor_names_versions_devices_and_caches(cli: Runner) -> None:
    outcome = cli("doctor", "--json")
    topics = {finding["topic"] for finding in outcome.json}
    assert {"torch", "faiss-cpu", "devices", "threads", "OpenMP", "temporary files"} <= topics
    assert outcome.status == (0 if all(finding["ok"] for finding in outcome.json) else 1)
    assert "OpenMP" in cli("doctor").out


def test_a_bug_is_one_line_and_no_answer(
    cli: Runner, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("vitembed.embedder.Embedder.from_pretrained", broken)
    assert "unexpected KeyError: 'surprise'" in one_line(cli("evaluate", world / "model", world / "data"))
    monkeypatch.setenv("VITEMBED_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli("evaluate", world / "model", world / "data")


@pytest.mark.parametrize(("signal_name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_command_leaves_no_file(world: Path, tmp_path: Path, signal_name: str, status: int) -> None:
    many = [str(world / "data")] * 400
    command = [sys.executable, "-m", "vitembed", "embed", str(world / "model"), *many, "--out", "v.npz"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.iterdir()), "the temporary file is made before the work"
    time.sleep(1)  # into the work
    process.send_signal(getattr(signal, signal_name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert list(tmp_path.iterdir()) == []
    if signal_name == "SIGINT":
        assert err.endswith("vitembed: interrupted\n")


def test_unknown_commands_and_no_command(cli: Runner) -> None:
    assert "tran" in one_line(cli("tran"))
    assert "Missing argument" in one_line(cli("evaluate"))
    assert cli("--version").out.startswith("vitembed ")
    assert "Commands" in cli("--help").out
    for nothing in (cli(), cli("index")):
        assert (nothing.status, nothing.err) == (0, "")
        assert "Commands" in nothing.out


def test_the_installed_command_exits_with_the_status(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitembed"]
    run = subprocess.run([*command, "verify", "a", "b", "--verifier", "c"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "vitembed: error: there is no verifier at c; make one with Verifier.fit or calibrate\n"
    image = Image.new("L", (5, 5))
    image.save(tmp_path / "x.png")
    run = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "train" in run.stdout


def test_whoever_stops_reading_sees_no_traceback() -> None:
    code = "import sys; from vitembed.cli.app import run; sys.exit(run(['doctor', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 141  # no status that means something, such as the 1 of `verify`
