"""The recipe for birds splits CUB by species, and prints figures that a plain loop gives, too."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.vit import ViT, ViTConfig

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINED_ON, TESTED = (1, 2, 50, 98, 99, 100), (101, 102, 103, 150, 151, 160, 170, 180, 199, 200)

Recipe = Callable[..., tuple[str, str]]


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    """Write a file of weights with the names of a DINO checkpoint, much too small and random."""
    path = tmp_path / "tiny.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.save(ViT(ViTConfig((16, 16), 8, 3, width=64, depth=1, heads=1)).state_dict(), path)
    return path


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dino: Path) -> Recipe:
    """Run the recipe as its command line does, for one epoch; return what it printed and its complaints."""

    def run(data: Path) -> tuple[str, str]:
        where = ["--data", str(data), "--out", str(tmp_path / "model"), "--init", str(dino)]
        monkeypatch.setattr(sys, "argv", ["birds.py", *where, "--epochs", "1", "--workers", "0"])
        capsys.readouterr()
        runpy.run_path(str(RECIPES / "birds.py"), run_name="__main__")
        return capsys.readouterr()

    return run


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """Write a small CUB_200_2011: sixteen of the 200 species, each with 3 images, its lists in another order."""
    folder = tmp_path / "CUB_200_2011"
    pictures = iter(stripes(16, 3).images)
    paths, species = [], []
    for number in (*TRAINED_ON, *TESTED):
        for picture in range(3):
            name = f"{number:03}.Albatross/Albatross_{picture:04}_796111.jpg"
            path = folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(next(pictures)).convert("RGB").save(path)
            paths.append(f"{len(paths) + 1} {name}\n")
            species.append(f"{len(paths)} {number}\n")
    (folder / "images.txt").write_text("".join(paths))
    (folder / "image_class_labels.txt").write_text("".join(reversed(species)))
    (folder / "train_test_split.txt").write_text("".join(f"{i} {i % 2}\n" for i in range(1, len(paths) + 1)))
    return folder


def test_the_second_half_of_the_species_is_searched_among_itself(
    recipe: Recipe, cub: Path, dino: Path, tmp_path: Path
) -> None:
    out, err = recipe(cub)
    assert out.splitlines()[0] == "18 images of 6 classes; 30 images of 10 classes"
    assert "the published parts have (5864, 5924) images" in err
    rows = {line[:40].strip(): [float(n) for n in re.findall(r"\d\.\d{4}", line)] for line in out.splitlines()[2:]}
    assert rows["DINO, not fine-tuned (Ermolov et al.)"] == [0.708, 0.811, 0.888]
    assert rows["Hyp-DINO (Ermolov et al.)"] == [0.809, 0.876, 0.924]
    assert len(rows) == 4

    images = [path for number in TESTED for path in sorted((cub / "images").glob(f"{number}.*/*"))]
    truth = np.repeat(TESTED, 3)
    models = {"ours, not fine-tuned": dino, "ours, fine-tuned": tmp_path / "model"}
    for who, where in models.items():
        vectors = Embedder.from_pretrained(where).encode(images, workers=0)
        hits = []
        for i in range(len(images)):
            nearest = sorted((j for j in range(len(images)) if j != i), key=lambda j: -float(vectors[i] @ vectors[j]))
            hits.append([truth[i] in truth[nearest[:k]] for k in (1, 2, 4, 8)])
        expected = np.mean(hits, axis=0)
        assert 0 < expected[0] < expected[-1]
        np.testing.assert_allclose(rows[who][:4], expected, atol=5.1e-5)
    table = json.loads((tmp_path / "model" / "comparison.json").read_text())
    assert [name for name in table["ours, fine-tuned"] if "@" in name][:5] == [
        *(f"recall@{k}" for k in (1, 2, 4, 8)),
        "map@r",
    ]
    held_out = Embedder.from_pretrained(tmp_path / "model").provenance["held-out classes"]
    assert held_out
    assert {*held_out} < {str(number) for number in TRAINED_ON}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("images.txt", None, "there is no "),
        ("image_class_labels.txt", None, "there is no "),
        ("images.txt", lambda text: "", "line 1 is none"),
        ("images.txt", lambda text: text.replace(".jpg", ".png"), "which is missing, as are 17 others"),
        ("image_class_labels.txt", lambda text: text.split("\n", 1)[1], "a number of a species to each image"),
        ("image_class_labels.txt", lambda text: text.replace("1 1\n", "1 crow\n"), "a number of a species"),
        ("image_class_labels.txt", lambda text: re.sub(r" \d+\n", " 7\n", text), "has no images for a part"),
        ("image_class_labels.txt", lambda text: text.replace(" ", ","), "line 1 is none"),
    ],
)
def test_lists_that_do_not_fit_end_the_recipe_with_one_line(
    recipe: Recipe,
    cub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: Callable[[str], str] | None,
    words: str,
) -> None:
    if change is None:
        (cub / file).unlink()
    else:
        (cub / file).write_text(change((cub / file).read_text()))
    with pytest.raises(SystemExit) as left:
        recipe(cub)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("birds.py: error: ")
    assert words in line
    assert not (tmp_path / "model").exists()
