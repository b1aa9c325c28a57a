"""The Omniglot recipe on small made-up alphabets; its protocols against plain loops and cases worked by hand."""

import importlib
import itertools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitembed.architecture import ViTConfig
from vitembed.errors import DataError
from vitembed.preprocess import Preprocess

DRAWERS = 4


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The protocols with five characters a run, and few of them."""
    module = importlib.import_module("omniglot_protocols")
    for name, value in {
        "WAYS": 5,
        "TRIALS": 6,
        "PAIRS": 12,
        "TASKS": ((3, 1), (2, 2)),
        "QUERIES": 1,
    }.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def recipe(protocols: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe with a tiny network."""
    module = importlib.import_module("omniglot")
    training = replace(module.TRAINING, classes_per_batch=8, images_per_class=2, epochs=1)
    network = ViTConfig((16, 16), 8, channels=1, width=16, depth=1, heads=2)
    assert module.PREPROCESS.scan  # which takes a second for a thousand images, and is tested elsewhere
    assert module.NETWORK.image_size == module.PREPROCESS.size
    reading = Preprocess.grey((16, 16))
    student = replace(training, learning_rate=module.STUDENT.learning_rate)
    made_up = {
        "NETWORK": network,
        "PREPROCESS": reading,
        "TRAINING": training,
        "STUDENT": student,
        "PRETRAINING": training,
        "GENERATED": 2,
        "TEACHERS": (1, 0.3),
    }
    for name, value in made_up.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def alphabets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven alphabets of five characters and a short one of two, each drawn by four people."""
    root = tmp_path_factory.mktemp("images_background")
    rng = np.random.default_rng(0)
    for letter, characters in zip("ABCDEFGH", [5] * 7 + [2], strict=True):
        for number in range(1, characters + 1):
            folder = root / f"Alphabet_{letter}" / f"character{number:02d}"
            folder.mkdir(parents=True)
            stroke = rng.integers(2, 30, 8)
            for drawer in range(1, DRAWERS + 1):
                image = Image.new("1", (32, 32), 1)
                points = np.clip(stroke + rng.integers(-1, 2, 8), 0, 31).tolist()
                ImageDraw.Draw(image).line(points, fill=0, width=2)
                image.save(folder / f"{number:04d}_{drawer:02d}.png")
    return root


def run(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["omniglot.py", *map(str, arguments)])
    recipe.main()


def all_runs(folder: Path, alphabets: Path) -> Path:
    """Write two runs in the layout of the published ones: the first drawer's images are the examples."""
    for number, letter in enumerate("GE", start=1):
        name = f"run{number:02d}"
        for part in ("training", "test"):
            (folder / name / part).mkdir(parents=True)
        lines = []
        for item in range(1, 6):
            source = alphabets / f"Alphabet_{letter}" / f"character{item:02d}"
            example, asked = f"{name}/training/class{item:02d}.png", f"{name}/test/item{6 - item:02d}.png"
            Image.open(source / f"{item:04d}_01.png").save(folder / example)
            Image.open(source / f"{item:04d}_02.png").save(folder / asked)
            lines.append(f"{asked} {example}\n")
        (folder / name / "class_labels.txt").write_text("".join(sorted(lines)))
    return folder


def test_it_trains_judges_and_writes_what_it_prints(
    recipe: ModuleType,
    protocols: ModuleType,
    alphabets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = all_runs(tmp_path / "all_runs", alphabets)
    arguments = ["--data", alphabets, "--out", tmp_path / "out", "--seeds", 0, 1, "--runs", runs]
    run(recipe, monkeypatch, *arguments)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert list(figures) == ["0", "1"]
    printed = capsys.readouterr().out
    for name, value in figures["1"].items():
        assert 0 <= value <= 1
        assert f"{name}: {value:.2%}" in printed
        mean = np.mean([figures[seed][name] for seed in figures])
        assert f"{name}: {mean:.2%} +- " in printed
    model = recipe.Embedder.from_pretrained(tmp_path / "out" / "seed1")
    drawings = protocols.Drawings.load(alphabets)
    held_out = drawings.of([f"Alphabet_{letter}" for letter in "DEFGH"])
    vectors = model.encode(held_out.images.images, workers=0)
    assert protocols.one_shot_error(vectors, held_out) == figures["1"]["within-alphabet 5-way one-shot error"]
    teachers = [recipe.Embedder.from_pretrained(tmp_path / "out" / f"seed1-teacher{number}") for number in range(2)]
    assert [teacher.provenance["settings"]["seed"] for teacher in teachers] == [1, 1001]
    assert all(teacher.fingerprint in model.provenance["loss"] for teacher in teachers)
    assert model.provenance["initialised from"] == teachers[0].fingerprint


def test_a_second_run_of_the_same_command_trains_nothing_anew(
    recipe: ModuleType, alphabets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", alphabets, "--out", tmp_path, "--held-out", "Alphabet_G", "Alphabet_F"]
    run(recipe, monkeypatch, *arguments)
    folders = [tmp_path / name for name in ("seed0-teacher0", "seed0-teacher1", "seed0")]
    files = [*(folder / "history.json" for folder in folders), tmp_path / "figures.json"]  # with seconds of each epoch
    before = [file.read_text() for file in files]
    run(recipe, monkeypatch, *arguments)
    assert [file.read_text() for file in files] == before


def test_without_held_out_alphabets_all_are_trained_on_and_only_the_runs_judge(
    recipe: ModuleType, alphabets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    real = recipe.train
    monkeypatch.setattr(
        recipe, "train", lambda model, data, **rest: seen.append(data.classes) or real(model, data, **rest)
    )
    runs = all_runs(tmp_path / "all_runs", alphabets)
    run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path / "out", "--runs", runs, "--held-out")
    assert len(seen[0]) == 4 * (7 * 5 + 2)
    assert list(json.loads((tmp_path / "out" / "figures.json").read_text())["0"]) == ["published runs, one-shot error"]
    monkeypatch.setattr(recipe, "MINIMAL", ("Alphabet_B", "Alphabet_C"))
    run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path / "two", "--minimal")
    assert len(seen) == 3 + 4  # two teachers and their student; now generated characters before them
    assert {name.split("/")[0] for name in seen[3]} == {"generated 0", "generated 1"}
    assert all({name.split("/")[0] for name in classes} == {"Alphabet_B", "Alphabet_C"} for classes in seen[4:])
    names = ("generated", "teacher0", "teacher1")
    begun, *teachers = (recipe.Embedder.from_pretrained(tmp_path / "two" / f"seed0-{name}") for name in names)
    assert {teacher.provenance["initialised from"] for teacher in teachers} == {begun.fingerprint}
    run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path / "none", "--minimal", "--generated", 0)
    assert len(seen) == 3 + 4 + 3


class Pixels:
    """A model whose embedding of an image is its 16 x 16 ink as a unit vector."""

    def encode(self, images: Any, **_: Any) -> np.ndarray[Any, Any]:
        rows = np.stack([255.0 - np.asarray(Image.open(path).convert("L").resize((16, 16))) for path in images])
        rows = rows.reshape(len(rows), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_published_runs_are_judged_as_a_plain_loop_does(protocols: ModuleType, alphabets: Path, tmp_path: Path) -> None:
    runs = all_runs(tmp_path, alphabets)
    wrong = []
    for listing in sorted(runs.glob("*/class_labels.txt")):
        pairs = [line.split() for line in listing.read_text().splitlines()]
        for asked, example in pairs:
            (query,) = Pixels().encode([runs / asked])
            scores = {other: float(Pixels().encode([runs / other])[0] @ query) for _, other in pairs}
            wrong.append(max(scores, key=scores.__getitem__) != example)
    assert len(wrong) == 10
    assert protocols.published_runs_error(Pixels(), runs) == pytest.approx(np.mean(wrong))
    with pytest.raises(DataError, match="holds no runs"):
        protocols.published_runs_error(Pixels(), alphabets)


def test_a_tie_is_an_error(protocols: ModuleType) -> None:
    scores = np.array([[3, 1, 2], [1, 1, 0], [0, 2, 1]], dtype=np.float32)
    assert protocols.error_of_run(scores, np.arange(3)) == pytest.approx(2 / 3)
    assert protocols.error_of_run(scores, np.array([0, 2, 1])) == pytest.approx(1 / 3)


def test_the_error_over_all_runs_is_the_mean_of_all_of_them(protocols: ModuleType, alphabets: Path) -> None:
    protocols.WAYS = 3
    drawings = protocols.Drawings.load(alphabets).of(["Alphabet_A", "Alphabet_B", "Alphabet_H"])  # H has two characters
    vectors = Pixels().encode(drawings.images.images) + np.random.default_rng(0).normal(0, 0.1, (48, 256))
    by_alphabet = []
    for letter in "AB":
        wrong = []
        for drawn in itertools.combinations(range(1, 6), 3):
            for one, other in itertools.permutations(range(1, DRAWERS + 1), 2):
                rows = [
                    [
                        drawings.images.images.index(
                            alphabets / f"Alphabet_{letter}" / f"character{item:02d}" / f"{item:04d}_{drawer:02d}.png"
                        )
                        for item in drawn
                    ]
                    for drawer in (one, other)
                ]
                scores = vectors[rows[1]] @ vectors[rows[0]].T
                wrong.append(np.mean(scores.argmax(axis=1) != np.arange(3)))
        by_alphabet.append(np.mean(wrong))
    assert 0.05 < np.mean(by_alphabet) < 0.95
    assert protocols.expected_one_shot_error(vectors, drawings) == pytest.approx(np.mean(by_alphabet))


def test_perfect_and_blind_embeddings_have_the_figures_that_they_must(protocols: ModuleType, alphabets: Path) -> None:
    drawings = protocols.Drawings.load(alphabets).of(["Alphabet_A", "Alphabet_B", "Alphabet_C"])
    perfect = np.eye(15, dtype=np.float32)[drawings.images.labels]
    assert protocols.one_shot_error(perfect, drawings) == protocols.expected_one_shot_error(perfect, drawings) == 0
    assert protocols.verification_accuracy(perfect, drawings) == 1
    blind = np.ones_like(perfect) / np.sqrt(15)
    assert protocols.one_shot_error(blind, drawings) == protocols.expected_one_shot_error(blind, drawings) == 1  # ties
    assert protocols.verification_accuracy(blind, drawings) == 0.5


def test_pairs_are_of_one_alphabet_and_two_drawers_half_of_them_of_one_character(
    protocols: ModuleType, alphabets: Path
) -> None:
    drawings = protocols.Drawings.load(alphabets)
    expected = {"character": (1, 0), "drawer": (0, 0), "alphabet": (1, 1)}  # what two images of a pair have in common
    of_images = {"character": drawings.images.labels, "drawer": drawings.drawers, "alphabet": drawings.alphabet}
    for what, kind in of_images.items():
        codes = np.eye(np.unique(kind).size)[np.unique(kind, return_inverse=True)[1]]  # cosine 1 if equal, else 0
        same, different = protocols.draw_pairs(codes, drawings, "Alphabet_B", np.random.default_rng(0))
        assert len(same) == len(different) == protocols.PAIRS // 2
        assert (set(same), set(different)) == ({expected[what][0]}, {expected[what][1]})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--held-out", "Klingon"], "no alphabet 'Klingon' here"), (["--minimal"], "no alphabet 'Balinese' here")],
)
def test_an_alphabet_that_is_not_there_is_named_in_one_line(
    recipe: ModuleType,
    alphabets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_cannot_be_judged_is_told_before_anything_is_trained(
    recipe: ModuleType,
    alphabets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recipe, "train", lambda *_, **__: pytest.fail("trained all the same"))
    for arguments, words in (
        (["--held-out", "Alphabet_A"], "Alphabet_A alone is judged"),
        (["--held-out", "Alphabet_H"], "no judged alphabet has 5 characters, all of them by two drawers"),
        (["--runs", tmp_path], "holds no runs"),
        (["--epochs", 0], "epochs must be at least 1"),
        (["--precision", "fp31"], "unknown precision 'fp31'"),
        (["--generated", 1], "two alphabets of two characters"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path, *arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_an_interrupted_run_says_so_in_one_line_and_other_beginnings_are_not_mixed(
    recipe: ModuleType,
    alphabets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as at:
            run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path, *arguments)
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return at.value.code, line

    real, trained = recipe.train, []

    def train(*arguments: Any, **settings: Any) -> object:
        trained.append(settings["out"].name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(recipe, "train", train)
    assert ended("--generated", 2) == (
        130,
        "omniglot.py: interrupted; the same command goes on from the last checkpoint",
    )
    assert trained == ["seed0-generated", "seed0-teacher0", "seed0-teacher1"]
    code, line = ended()  # the teachers would not be of one beginning
    assert code == 2
    assert re.search("seed0-teacher0 holds a training with initial weights sha256:.*, and now it is None", line)


def test_alphabets_of_a_folder_of_their_own_are_judged_and_then_none_is_held_out(
    recipe: ModuleType,
    alphabets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path, "--test", alphabets)
    assert (
        f"trained on 8 alphabets, judged on {', '.join(f'Alphabet_{a}' for a in 'ABCDEFGH')}" in capsys.readouterr().out
    )
    run(recipe, monkeypatch, "--data", alphabets, "--out", tmp_path, "--test", alphabets, "--seeds", 1)
    assert list(json.loads((tmp_path / "figures.json").read_text())) == ["0", "1"]  # that of an earlier command is kept
    assert "+-" not in capsys.readouterr().out  # but not averaged with this one: its settings may be others


def test_a_character_that_somebody_did_not_draw_takes_this_drawer_out(
    protocols: ModuleType, alphabets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(alphabets, folder)
    (folder / "Alphabet_A" / "character01" / "0001_01.png").unlink()
    drawings = protocols.Drawings.load(folder).of(["Alphabet_A"])
    of_drawer = np.eye(DRAWERS, dtype=np.float32)[drawings.drawers - 1]
    seen: list[float] = []
    real = protocols.error_of_run
    protocols.error_of_run = lambda scores, truth: seen.append(float(scores.max())) or real(scores, truth)
    assert protocols.one_shot_error(of_drawer, drawings) == 1
    protocols.error_of_run = real
    assert seen == [0.0] * protocols.TRIALS  # never two images of one drawer


@pytest.mark.parametrize("text", ["", "a b c\nd e f\n", "a b\nc b\n", "a b\n"])
def test_a_broken_list_of_a_published_run_is_named(protocols: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "run01").mkdir()
    (tmp_path / "run01" / "class_labels.txt").write_text(text)
    with pytest.raises(DataError, match=r"class_labels\.txt must have lines"):
        protocols.published_runs_error(Pixels(), tmp_path)


def test_a_download_of_torchvision_is_found_again(protocols: ModuleType, alphabets: Path, tmp_path: Path) -> None:
    shutil.copytree(alphabets, tmp_path / "omniglot-py" / "images_background")
    assert protocols.Drawings.load(tmp_path).alphabets == protocols.Drawings.load(alphabets).alphabets
    with pytest.raises(DataError, match="ALPHABET/CHARACTER"):
        protocols.Drawings.load(tmp_path / "omniglot-py")


def test_folders_of_another_kind_are_refused(protocols: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "1.png")
    with pytest.raises(DataError, match=r"ALPHABET/CHARACTER/CCCC_DRAWER\.png"):
        protocols.Drawings.load(tmp_path)
