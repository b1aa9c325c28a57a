"""Pictures: one a file, none lost, and maps that lie where the network looked."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitembed import plots
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, ImageError, VitembedError
from vitembed.explain import explain
from vitembed.explain.pictures import as_seen
from vitembed.preprocess import Preprocess
from vitembed.vit import ViTConfig


@pytest.fixture(scope="module")
def model() -> Embedder:
    config = ViTConfig(image_size=(16, 16), patch_size=8, width=16, depth=2, heads=2)
    return Embedder.create(config, preprocess=Preprocess((16, 16)), device="cpu")


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8))
    few.resize((30, 20), Image.Resampling.NEAREST).save(path)
    return path


def test_each_image_has_a_picture_and_no_two_share_one(model: Embedder, tmp_path: Path) -> None:
    names = ["a/x.png", "b/x.png", "b/X.jpg", "b/x-rollout-2.png", "c/" + "long" * 50 + ".png"]
    images = [save(tmp_path / name, seed) for seed, name in enumerate(names)]
    found = explain(model, [*images, images[0]], tmp_path / "new" / "out")
    assert len({str(path).casefold() for path in found.pictures}) == 6
    assert sorted(found.files) == sorted((tmp_path / "new" / "out").iterdir())
    assert found.pictures[0].name == "x-rollout.png"
    for picture in found.pictures:
        with Image.open(picture) as drawn:
            assert drawn.size == (2 * 448 + 8, 448)


def test_a_picture_never_takes_the_place_of_an_image(model: Embedder, tmp_path: Path) -> None:
    images = [save(tmp_path / "x.png"), save(tmp_path / "X-rollout.png")]
    before = [path.read_bytes() for path in images]
    found = explain(model, images, tmp_path, pair=True)
    assert [path.read_bytes() for path in images] == before
    assert not set(images) & set(found.files)
    assert len(set(found.files)) == 3


def test_a_pair_and_distances_are_drawn_and_reported(model: Embedder, tmp_path: Path) -> None:
    images = [save(tmp_path / "x.png", 1), save(tmp_path / "y.png", 2)]
    found = explain(model, images, tmp_path / "out", pair=True, distances=True, fusion="max", discard=0.5)
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert sorted(path.name for path in found.files) == [
        "attention-distances.png",
        "x-and-y-shared.png",
        "x-rollout.png",
        "y-rollout.png",
    ]
    assert report["pair"]["sum first"] + report["pair"]["residual first"] == pytest.approx(report["pair"]["score"])
    assert np.sum(report["pair"]["second"]) == pytest.approx(report["pair"]["sum second"])
    assert np.shape(report["distances"]["pixels"]) == (2, 2)
    row, column = report["rollouts"][0]["strongest patch"]
    assert found.maps[0][row, column] == found.maps[0].max()
    for path in found.files:
        with Image.open(path) as drawn:
            drawn.verify()


def test_nothing_is_written_when_something_is_wrong(model: Embedder, tmp_path: Path) -> None:
    out, image = tmp_path / "out", save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="exactly two images; got 1"):
        explain(model, [image], out, pair=True)
    with pytest.raises(ConfigError, match="at least one image"):
        explain(model, [], out)
    with pytest.raises(ConfigError, match="discard"):
        explain(model, [image], out, discard=1)
    with pytest.raises(ImageError, match="missing"):
        explain(model, [image, tmp_path / "missing.png"], out)
    assert not out.exists()
    with pytest.raises(VitembedError, match="cannot create the folder"):
        explain(model, [image], image)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_what_is_drawn_is_the_part_that_the_network_sees(resize: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)).resize((96, 48), Image.Resampling.BICUBIC)
    preprocess = Preprocess((16, 16), resize=resize)  # type: ignore[arg-type]
    drawn = as_seen(preprocess, image)
    assert drawn.size == (448, 448)
    smaller = np.asarray(drawn.resize((16, 16), Image.Resampling.BOX), dtype=float)
    assert np.abs(smaller - preprocess(image).transpose(1, 2, 0)).mean() < 6


def test_inverted_ink_is_drawn_as_it_was_written() -> None:
    page = Image.new("L", (20, 20), 255)
    page.paste(0, (8, 8, 12, 12))
    drawn = np.asarray(as_seen(Preprocess.grey((16, 16)), page))
    assert drawn.shape == (448, 448, 3)
    assert drawn[0, 0, 0] == 255
    assert drawn[224, 224, 0] == 0


def test_shared_maps_are_coloured_by_their_sign(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), "grey")
    heat = np.array([[1.0, -1.0], [0.0, 0.0]])
    drawn = plots.plot_shared([image, image], [heat, 0 * heat], names=["a", "b"], score=0.5, residuals=[0.5, 0.5])
    path = tmp_path / "drawn.png"
    path.write_bytes(drawn)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"), dtype=int)
    half = pixels[:, : pixels.shape[1] // 2]
    green, brown = half[..., 1] - half[..., 0] > 30, half[..., 0] - half[..., 2] > 30
    assert green.sum() > 1000
    assert brown.sum() > 1000
    assert np.argwhere(green)[:, 1].mean() < np.argwhere(brown)[:, 1].mean()
    nothing = plots.plot_shared([image, image], [0 * heat] * 2, names=["a", "b"], score=0.5, residuals=[0.5, 0.5])
    assert nothing.startswith(b"\x89PNG")
