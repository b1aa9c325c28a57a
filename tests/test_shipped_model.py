"""The model "ink": it is there, offline and in the wheel; its card, figures and verifier are of these very weights."""

import json
import math
import os
import subprocess
import sys
import zipfile
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

import vitembed
from vitembed import metrics
from vitembed.embedder import Embedder
from vitembed.errors import CheckpointError
from vitembed.preprocess import Preprocess
from vitembed.verify import Verifier
from vitembed.vit import ViT
from vitembed.weights import SHIPPED, shipped_folder, shipped_verifier

ROOT = Path(vitembed.__file__).parent.parent
FOLDER = shipped_folder("ink")
FILES = {"README.md", "config.json", "figures.json", "ink.verifier", "model.safetensors"}
ARCHIVE = Path(os.environ.get("VITEMBED_DATA", "missing")) / "omniglot_background.zip"


@pytest.fixture(scope="module")
def model() -> Embedder:
    return Embedder.from_pretrained("ink", device="cpu")


@pytest.fixture(scope="module")
def figures() -> list[dict[str, Any]]:
    document = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    assert set(document) == {"model", "figures"}
    return list(document["figures"])


def test_it_is_a_saved_model_under_its_name(model: Embedder) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert model.fingerprint == config["fingerprint"]
    assert model.provenance == config["provenance"]
    assert model.fingerprint == Embedder.from_pretrained(FOLDER, device="cpu").fingerprint
    vectors = model.encode([np.full((40, 40), 255, np.uint8)])
    assert vectors.shape == (1, model.dim)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)
    assert ViT.from_pretrained("ink").config == model.network.vit.config


def test_the_folder_holds_its_files_and_at_most_six_megabytes() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000


def test_the_card_is_filled_in(model: Embedder, figures: list[dict[str, Any]]) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert model.fingerprint in card
    assert 'Embedder.from_pretrained("ink")' in card
    assert "To be filled in" not in card
    for heading in ("Data", "Figures", "Threshold", "Licence and limits"):
        assert f"\n## {heading}\n" in card
    assert "Command: `" in card
    for figure in figures:
        assert f"| {figure['name']} | {figure['value']:.4f} |" in card


def test_the_figures_are_of_these_weights_and_say_how_they_came_about(
    model: Embedder, figures: list[dict[str, Any]]
) -> None:
    assert json.loads((FOLDER / "figures.json").read_text())["model"] == model.fingerprint
    assert {figure["of"] for figure in figures} >= {"model", "sister"}
    trained = {name.split("/")[0].split("@")[0] for name in model.provenance["trained classes"]}
    for figure in figures:
        assert 0 <= figure["value"] <= 1
        assert figure["name"]
        assert figure["protocol"]
        assert "seed" in figure
        if figure["of"] == "model":
            assert figure["model"] == model.fingerprint
            assert "trained on" in figure["protocol"]
        else:
            assert figure["model"] != model.fingerprint
            assert figure["held out"]
            assert set(figure["held out"]) <= trained  # which is why they cannot be of the model itself


def test_the_verifier_is_bound_to_the_model_and_says_that_a_sister_was_measured(
    model: Embedder, figures: list[dict[str, Any]]
) -> None:
    verifier = Verifier.load(shipped_verifier("ink"), model)
    assert verifier.fingerprint == model.fingerprint
    assert verifier.location == "ink"
    assert -1 < verifier.threshold < 1
    assert verifier.calibration.far <= verifier.calibration.far_wanted
    assert verifier.calibration.far_interval is not None
    assert "measured with another model" in verifier.calibration.protocol
    sisters = {figure["model"] for figure in figures if figure["of"] == "sister"}
    assert any(sister in verifier.calibration.protocol for sister in sisters)


def read_subset(characters: int, drawings: int, folder: Path) -> tuple[list[Path], list[str]]:
    """Return the first drawings of the first characters of every alphabet, by their names in the archive."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        chosen = []
        for _, of_alphabet in groupby(names, lambda name: PurePosixPath(name).parts[0]):
            by_character = [list(part) for _, part in groupby(of_alphabet, lambda name: PurePosixPath(name).parent)]
            chosen += [name for part in by_character[:characters] for name in part[:drawings]]
        archive.extractall(folder, chosen)
    return [folder / name for name in chosen], [str(PurePosixPath(name).parent) for name in chosen]


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="VITEMBED_DATA names no folder with Omniglot")
def test_the_recorded_figures_are_what_it_does_here(
    model: Embedder, figures: list[dict[str, Any]], tmp_path: Path
) -> None:
    recorded = {figure["name"]: figure for figure in figures if "subset" in figure}
    assert set(recorded) == {"recall@1", "equal error rate"}
    images, labels = read_subset(**recorded["recall@1"]["subset"], folder=tmp_path)
    assert 300 <= len(images) <= 600
    vectors, numbers = model.encode(images, workers=0), np.unique(labels, return_inverse=True)[1]
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    recall = float(np.mean(numbers[scores.argmax(axis=1)] == numbers))
    upper = np.triu_indices(len(images), 1)
    eer = metrics.equal_error_rate(scores[upper], (numbers[:, None] == numbers)[upper])[0]
    for name, value in (("recall@1", recall), ("equal error rate", eer)):
        assert math.isclose(value, recorded[name]["value"], abs_tol=recorded[name]["tolerance"]), name
    assert recall > 0.5


def test_a_model_of_that_name_in_the_current_folder_is_told_and_not_taken(
    model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ink").mkdir()
    assert Embedder.from_pretrained("ink", device="cpu").fingerprint == model.fingerprint  # a folder of drawings, say
    other = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), stem="conv", device="cpu")
    other.save_pretrained("ink")
    with pytest.warns(UserWarning, match=r"ships with vitembed; the one here is \./ink"):
        assert Embedder.from_pretrained("ink", device="cpu").fingerprint == model.fingerprint
    for local in ("./ink", Path("ink"), tmp_path / "ink"):
        assert Embedder.from_pretrained(local, device="cpu").fingerprint == other.fingerprint


def test_an_unknown_name_and_a_broken_installation_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="ships with vitembed: ink"):
        Embedder.from_pretrained("inc")
    with pytest.raises(CheckpointError, match="no model 'inc' ships"):
        shipped_folder("inc")
    monkeypatch.setattr("vitembed.weights.shipped._ROOT", tmp_path)
    with pytest.raises(CheckpointError, match="missing from this installation"):
        Embedder.from_pretrained("ink")


def test_the_wheel_brings_it_and_loads_it_without_a_network(model: Embedder, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / built.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        for name in SHIPPED:
            assert {f"vitembed/models/{name}/{file}" for file in FILES} <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = (
        "import vitembed; print(vitembed.__file__, vitembed.Embedder.from_pretrained('ink', device='cpu').fingerprint)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "installed" / "vitembed" / "__init__.py"), model.fingerprint]
