"""The recipe for products reads the lists as they are published, and prints figures that a plain loop gives, too."""

import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.training.stripes import stripes
from vitembed.embedder import Embedder
from vitembed.vit import ViT, ViTConfig

RECIPES = Path(__file__).parents[2] / "recipes"
SOP_COLUMNS, IN_SHOP_COLUMNS = "image_id class_id super_class_id path", "image_name item_id evaluation_status"

Recipe = Callable[..., tuple[str, str]]
Listed = list[tuple[Path, str]]  # a file and its class


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of weights with the names of a DINO checkpoint, much too small and random."""
    path = tmp_path_factory.mktemp("init") / "tiny.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(ViT(ViTConfig((16, 16), 8, 3, width=64, depth=1, heads=1)).state_dict(), path)
    return path


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dino: Path) -> Recipe:
    """Run the recipe as its command line does, for one epoch; return what it printed and its complaints."""

    def run(benchmark: str, data: Path, out: Path, *more: str) -> tuple[str, str]:
        where = ["--data", str(data), "--out", str(out), "--init", str(dino)]
        monkeypatch.setattr(sys, "argv", ["products.py", benchmark, *where, "--epochs", "1", "--workers", "0", *more])
        capsys.readouterr()
        runpy.run_path(str(RECIPES / "products.py"), run_name="__main__")
        return capsys.readouterr()

    return run


def draw(folder: Path, names: Sequence[str], each: int, first: int, kind: str) -> Listed:
    """Write `each` pictures a class below a folder, the classes numbered from `first`."""
    pictures = iter(stripes(len(names), each, seed=first).images)
    listed = []
    for number, name in enumerate(names, first):
        for picture in range(each):
            path = folder / kind.format(number=number, picture=picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(next(pictures)).convert("RGB").save(path)
            listed.append((path, name))
    return listed


def make_sop(folder: Path) -> dict[str, Listed]:
    """Write a small Stanford Online Products: 6 classes of 4 images to train on, 10 of 3 to test."""
    kind = "chair_final/{number}_{picture}.JPG"
    parts = {
        "train": draw(folder, [str(i) for i in range(1, 7)], 4, 1, kind),
        "test": draw(folder, [str(i) for i in range(7, 17)], 3, 7, kind),
    }
    for part, images in parts.items():
        rows = [f"{i} {name} 3 {path.relative_to(folder)}" for i, (path, name) in enumerate(images, 1)]
        (folder / f"Ebay_{part}.txt").write_text("\n".join([SOP_COLUMNS, *rows]) + "\n")
    return parts


def make_in_shop(folder: Path) -> dict[str, Listed]:
    """Write a small In-Shop: 6 items of 4 images to train on, 10 others with 2 queries and 3 images of the gallery."""
    images, kinds = folder / "Img", "img/WOMEN/Dresses/id_{number:08}/{kind}_{picture}_front.jpg"
    train, test = ([f"id_{number:08}" for number in span] for span in (range(6), range(6, 16)))
    parts = {
        "train": draw(images, train, 4, 0, kinds.replace("{kind}", "01")),
        "query": draw(images, test, 2, 6, kinds.replace("{kind}", "02")),
        "gallery": draw(images, test, 3, 6, kinds.replace("{kind}", "03")),
    }
    listed = [(path, name, part) for part in ("query", "train", "gallery") for path, name in parts[part]]
    rows = [f"{path.relative_to(images)!s:60} {name} {part}      " for path, name, part in listed]
    (folder / "Eval").mkdir()
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join([f"{len(rows)}", IN_SHOP_COLUMNS, *rows]) + "\n")
    return parts


def by_hand(model: Embedder, queries: Listed, ks: Sequence[int], gallery: Listed | None = None) -> list[float]:
    """Return recall@k and MAP@R by a plain loop over the queries."""
    vectors = embedded(model, queries)
    items = vectors if gallery is None else embedded(model, gallery)
    names = [name for _, name in (queries if gallery is None else gallery)]
    recalls, precisions = [], []
    for i, (vector, (_, name)) in enumerate(zip(vectors, queries, strict=True)):
        others = [j for j in range(len(items)) if gallery is not None or j != i]
        others.sort(key=lambda j: -float(vector @ items[j]))
        right = [names[j] == name for j in others]
        recalls.append([any(right[:k]) for k in ks])
        r = sum(right)
        precisions.append(sum(sum(right[: n + 1]) / (n + 1) for n in range(r) if right[n]) / r)
    return [*np.mean(recalls, axis=0).tolist(), float(np.mean(precisions))]


def embedded(model: Embedder, listed: Listed) -> NDArray[np.float32]:
    return model.encode([path for path, _ in listed], workers=0)


def printed(out: str, who: str) -> list[float]:
    """Return the numbers of a row of the table."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{who}  ")]
    return [float(number) for number in re.findall(r"\d\.\d{4}", line)]


@pytest.mark.parametrize(
    ("benchmark", "make", "ks", "sizes", "hyp_dino", "oml"),
    [
        (
            "sop",
            make_sop,
            (1, 10, 100, 1000),
            "24 images of 6 classes; 30 images of 10 classes",
            [0.851, 0.944, 0.978],
            [0.866],
        ),
        (
            "inshop",
            make_in_shop,
            (1, 10, 20, 30),
            "24 images of 6 classes; 20 images of 10 classes; 30 images of 10 classes",
            [0.924, 0.984, 0.989],
            [0.921],
        ),
    ],
)
def test_the_recall_before_and_after_stands_beside_what_was_published(
    recipe: Recipe,
    dino: Path,
    tmp_path: Path,
    benchmark: str,
    make: Callable[[Path], dict[str, Listed]],
    ks: tuple[int, ...],
    sizes: str,
    hyp_dino: list[float],
    oml: list[float],
) -> None:
    parts = make(tmp_path / "data")
    out, err = recipe(benchmark, tmp_path / "data", tmp_path / "model")
    assert out.splitlines()[0] == sizes
    assert "warning: the published parts have" in err
    header = out.splitlines()[1].split("  ")
    assert [name.strip() for name in header if "@" in name] == [
        *(f"recall@{k}" for k in ks),
        "map@r",
        "95 % interval of recall@1",
    ]
    assert printed(out, "Hyp-DINO (Ermolov et al.)") == hyp_dino
    assert printed(out, "open-metric-learning") == oml

    queries, gallery = parts.get("test", parts.get("query", [])), parts.get("gallery")
    table = json.loads((tmp_path / "model" / "comparison.json").read_text())
    models = {
        "ours, not fine-tuned": Embedder.from_pretrained(dino),
        "ours, fine-tuned": Embedder.from_pretrained(tmp_path / "model"),
    }
    assert models["ours, fine-tuned"].fingerprint != models["ours, not fine-tuned"].fingerprint
    for who, model in models.items():
        expected = by_hand(model, queries, ks, gallery)
        assert 0 < expected[0] < 1  # else any search would do
        *figures, low, high = printed(out, who)
        np.testing.assert_allclose(figures, expected, atol=5.1e-5)
        assert low <= figures[0] <= high
        np.testing.assert_allclose([*table[who].values()][:-1], expected, rtol=1e-9)
        if gallery is not None:  # the queries are not searched among themselves, which would find more or less
            assert abs(figures[0] - by_hand(model, queries + gallery, ks)[0]) > 1e-3
    held_out = models["ours, fine-tuned"].provenance["held-out classes"]
    assert held_out
    assert {*held_out} < {name for _, name in parts["train"]}


def edit(file: Path, change: Callable[[str], str]) -> None:
    file.write_text(change(file.read_text()))


PARTITION = "Eval/list_eval_partition.txt"


@pytest.mark.parametrize(
    ("benchmark", "spoil", "words"),
    [
        ("sop", lambda data: (data / "Ebay_test.txt").unlink(), "there is no {data}/Ebay_test.txt"),
        ("sop", lambda data: (data / "Ebay_train.txt").write_text(""), "must name its columns in line 1"),
        ("sop", lambda data: (data / "Ebay_test.txt").write_text(SOP_COLUMNS), "line 2 is none"),
        ("sop", lambda data: edit(data / "Ebay_test.txt", lambda text: text.replace(" 3 ", " ", 1)), "line 2 is none"),
        ("sop", lambda data: (data / "chair_final/7_1.JPG").unlink(), "chair_final/7_1.JPG, which is missing"),
        ("sop", lambda data: (data / "chair_final/8_0.JPG").write_text("no picture"), "8_0.JPG"),
        ("inshop", lambda data: (data / PARTITION).unlink(), "there is no {data}/Eval/list_eval_partition.txt"),
        ("inshop", lambda data: edit(data / PARTITION, lambda text: text.split("\n", 1)[1]), "columns in line 2"),
        ("inshop", lambda data: edit(data / PARTITION, lambda text: text.replace("gallery", "train")), "has no images"),
        ("inshop", lambda data: (data / "Img").rename(data / "Image"), "which is missing, as are 23 others"),
    ],
)
def test_a_folder_that_is_another_ends_the_recipe_with_one_line(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    benchmark: str,
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    data = tmp_path / "data"
    {"sop": make_sop, "inshop": make_in_shop}[benchmark](data)
    spoil(data)
    with pytest.raises(SystemExit) as left:
        recipe(benchmark, data, tmp_path / "model")
    assert left.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("products.py: error: ")
    assert words.format(data=data) in line
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--init", "nothing.pth"], "there is no file nothing.pth"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--out", "{data}"], "already holds a model"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    make_sop(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit) as left:
        recipe("sop", tmp_path, tmp_path / "new", *(word.format(data=tmp_path) for word in more))
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert line.startswith("products.py: error: ")
    assert words in line
