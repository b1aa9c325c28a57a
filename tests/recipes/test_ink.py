"""`recipes/ink.py` on a tiny Omniglot: what it writes is bound together, and what is no sister is refused."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitembed
from tests.conftest import draw
from vitembed.embedder import Embedder
from vitembed.preprocess import Preprocess
from vitembed.verify import Verifier

SCRIPT = Path(vitembed.__file__).parents[1] / "recipes" / "ink.py"
ALPHABETS = ("Aaa", "Bbb", "Ccc")
HELD_OUT = "Ccc"

Run = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with data, a model that has seen all alphabets, and a sister that has not seen the last."""
    for alphabet in ALPHABETS:
        draw(tmp_path / "data" / alphabet, classes=10, per_class=6)
    for name, seen in (("model", ALPHABETS), ("sister", ALPHABETS[:2])):
        save(tmp_path / name, seen, seed=len(seen))
    return tmp_path


def save(folder: Path, seen: tuple[str, ...], seed: int, **settings: object) -> None:
    model = Embedder.create("N/4", preprocess=Preprocess.grey((8, 8)), stem="conv", seed=seed, device="cpu")
    classes = [f"{alphabet}/class{number}{turn}" for alphabet in seen for number in range(10) for turn in ("", "@90")]
    model.provenance |= {"trained classes": classes, "settings": settings, "loss": "TripletLoss()"}
    model.save_pretrained(folder)


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*extra: str, held_out: str = HELD_OUT) -> str:
        folders = [text for name in ("data", "model", "sister") for text in (f"--{name}", str(place / name))]
        fixed = ["--command", "python train.py", "--held-out", held_out, "--far", "0.1", "--out", str(place / "ink")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *folders, *fixed, *extra])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_the_folder_is_the_model_with_the_sister_s_threshold_and_both_figures(place: Path, run: Run) -> None:
    more = {"of": "elsewhere", "name": "one-shot error", "value": 0.25, "protocol": "published", "seed": 3}
    (place / "more.json").write_text(json.dumps([more]))
    said = run("--figures", str(place / "more.json"))
    assert "one-shot error" in said
    assert "differs" not in said
    model, sister = (Embedder.from_pretrained(place / name, device="cpu") for name in ("model", "sister"))
    shipped = Embedder.from_pretrained(place / "ink", device="cpu")
    assert shipped.fingerprint == model.fingerprint != sister.fingerprint
    verifier = Verifier.load(place / "ink" / "ink.verifier", shipped)
    assert verifier.location == "ink"
    assert f"without the alphabets {HELD_OUT} ({sister.fingerprint})" in verifier.calibration.protocol
    assert (verifier.calibration.identities, verifier.calibration.matches) == (10, 10 * 15)
    document = json.loads((place / "ink" / "figures.json").read_text())
    assert document["model"] == model.fingerprint
    assert document["figures"][-1] == more
    values = {(one["of"], one["name"]): one["value"] for one in document["figures"]}
    for of, embedder, alphabets, characters, drawings in (
        ("sister", sister, (HELD_OUT,), 10, 6),
        ("model", model, ALPHABETS, 3, 4),
    ):
        images = [
            place / "data" / alphabet / f"class{number}" / f"{drawing}.png"
            for alphabet in alphabets
            for number in range(characters)
            for drawing in range(drawings)
        ]
        labels = np.arange(len(images)) // drawings
        vectors = embedder.encode(images)
        scores = vectors @ vectors.T - 3 * np.eye(len(images))
        recall = np.mean(labels[scores.argmax(axis=1)] == labels)
        assert values[of, "recall@1"] == pytest.approx(recall, abs=0.02)  # ties apart
    assert values["sister", "false-accept rate at the threshold"] == verifier.calibration.far <= 0.1
    card = (place / "ink" / "README.md").read_text()
    assert "Command: `python train.py`" in card
    assert "3 alphabets, 30 characters, each drawn online by 6 people" in card
    assert "| one-shot error | 0.2500 | elsewhere: published |" in card
    assert "To be filled in" not in card
    assert max(map(len, card.partition("## Threshold")[2].splitlines())) <= 120


def test_what_is_no_sister_is_refused_in_one_line(place: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*extra: str, held_out: str = HELD_OUT) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*extra, held_out=held_out)
        assert stopped.value.code == 2
        [line] = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
        return line

    assert "the sister was trained on Aaa; hold out" in error(held_out="Aaa")
    assert "no alphabet Xxx; it has Aaa, Bbb, Ccc" in error(held_out="Xxx")
    assert "false-accept rate" in error("--far", "0.0001")
    save(place / "model", ALPHABETS[:2], seed=3)
    assert "the model was not trained on Ccc" in error()
    save(place / "model", ALPHABETS, seed=3)
    Image.new("L", (8, 8)).save(place / "data" / "loose.png")
    assert "loose.png lies in no class" in error()
    (place / "data" / "loose.png").unlink()
    save(place / "sister", (), seed=2)
    assert "does not record what it was trained on" in error()
    other = Embedder.create("N/4", preprocess=Preprocess.grey((16, 16)), stem="conv", device="cpu")
    other.provenance["trained classes"] = ["Aaa/class0"]
    other.save_pretrained(place / "sister")
    assert "different networks" in error()
    assert not (place / "ink").exists()


def test_settings_that_differ_are_told(place: Path, run: Run) -> None:
    save(place / "sister", ALPHABETS[:2], seed=2, epochs=3)
    save(place / "model", ALPHABETS, seed=3, epochs=2)
    assert "differs: epochs is 2 for the model and 3 for the sister" in run()
